"""Which question it answers: *where are the parts of a language model?*

Place in the flow: what `language.py` knows about architectures, and all it knows: one entry a family. A new family is
one entry here and one tiny random model in the tests. Paths are those of the modules in transformers.

A neuron is a hidden unit of a block's MLP after its non-linearity. In every family that is what enters the last
linear map of the MLP (`down`); of a gated MLP, activation(gate) * up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyray.errors import ModelError

Parts = Callable[[str], nn.Module]
"""A part of the model by its path."""


def _tokens_alone(path: str) -> Callable[[Parts, Tensor], Tensor]:
    def embed(parts: Parts, ids: Tensor) -> Tensor:
        out: Tensor = parts(path)(ids)
        return out

    return embed


def _tokens_and_positions(parts: Parts, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    out: Tensor = parts("wte")(ids) + parts("wpe")(positions)
    return out


def _bert_embeddings(parts: Parts, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    out: Tensor = parts("embeddings")(ids, token_type_ids=torch.zeros_like(ids), position_ids=positions)
    return out


@dataclass(frozen=True)
class Family:
    """One architecture. Paths of a block's parts start at the block, the others at the model without its head."""

    name: str
    """As `ModelInfo.family` says it."""
    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    causal: bool
    """A position sees what is before it alone; otherwise all tokens of its context."""
    blocks: str
    """The list of blocks."""
    up: str
    """W_in: from the residual stream to the neurons."""
    down: str
    """W_out: from the neurons to the residual stream. What enters it are the neurons' activations."""
    gate: str | None
    """The gate's weights of a gated MLP."""
    gains: tuple[tuple[int, str], ...]
    """Norms that the output of the MLP before passes on its way to this one: (block relative to this one, path)."""
    entry: tuple[str, ...]
    """Modules that the first shard needs besides its blocks."""
    embed: Callable[[Parts, Tensor], Tensor]
    """From (parts of the model, token ids [B, L]) to the input of the first block [B, L, d]."""
    tokens: str
    """The input embeddings."""
    rotary: str | None
    """Makes the rotary position embeddings that every block is given."""
    norm: str | None
    """The norm after the last block."""
    head: str
    """From the final hidden states to the vocabulary; the path starts at the model with its head."""
    in_by_out: bool = False
    """Weights are stored as [in, out] (transformers' Conv1D) instead of [out, in]."""


_GPT2 = Family(
    name="GPT-2", model_types=("gpt2",), causal=True, blocks="h", up="mlp.c_fc", down="mlp.c_proj", gate=None,
    gains=((0, "ln_2"),), entry=("wte", "wpe"), embed=_tokens_and_positions, tokens="wte", rotary=None, norm="ln_f",
    head="lm_head", in_by_out=True,
)  # fmt: skip

# With a parallel residual, too, this norm stands before the MLP.
_GPT_NEOX = Family(
    name="GPT-NeoX", model_types=("gpt_neox",), causal=True, blocks="layers", up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h", gate=None, gains=((0, "post_attention_layernorm"),), entry=("embed_in",),
    embed=_tokens_alone("embed_in"), tokens="embed_in", rotary="rotary_emb", norm="final_layer_norm", head="lm_head",
)  # fmt: skip

_LLAMA = Family(
    name="Llama", model_types=("llama", "mistral", "qwen2", "qwen3"), causal=True, blocks="layers", up="mlp.up_proj",
    down="mlp.down_proj", gate="mlp.gate_proj", gains=((0, "post_attention_layernorm"),), entry=("embed_tokens",),
    embed=_tokens_alone("embed_tokens"), tokens="embed_tokens", rotary="rotary_emb", norm="norm", head="lm_head",
)  # fmt: skip

_BERT = Family(
    name="BERT", model_types=("bert",), causal=False, blocks="encoder.layer", up="intermediate.dense",
    down="output.dense", gate=None, gains=((-1, "output.LayerNorm"), (0, "attention.output.LayerNorm")),
    entry=("embeddings",), embed=_bert_embeddings, tokens="embeddings.word_embeddings", rotary=None, norm=None,
    head="cls",
)  # fmt: skip

FAMILIES = (_GPT2, _GPT_NEOX, _LLAMA, _BERT)


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a model.

    Args:
        config: what its config.json says.
        source: what to call the model in a message.

    Raises:
        ModelError: no entry names its `model_type`, or it is used in a way that its entry does not cover.
    """
    model_type = str(config.get("model_type", ""))
    for family in FAMILIES:
        if model_type in family.model_types:
            if config.get("is_decoder") and not family.causal:
                raise ModelError(f"{source!r} is a {family.name} model used as a decoder; polyray reads encoders only.")
            return family
    known = [name for family in FAMILIES for name in family.model_types]
    raise ModelError(
        f"{source!r} is a model of the family {model_type!r}, which polyray does not know. Known are "
        f"{', '.join(repr(k) for k in known)}; another one is an entry in polyray/models/families.py."
    )
