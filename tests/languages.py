"""Tiny random language models of every family, in transformers' format on disk, made in the tests."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB, WIDTH, INNER, LAYERS, CONTEXT = 53, 12, 20, 4, 24

_GATED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": CONTEXT,
}

CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_inner=INNER, n_layer=LAYERS, n_head=3, n_positions=CONTEXT,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=3,
        max_position_embeddings=CONTEXT, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5},
    ),
    "gpt_neox_serial": GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=3,
        max_position_embeddings=CONTEXT, use_parallel_residual=False,
    ),
    "llama": LlamaConfig(**_GATED),
    "mistral": MistralConfig(**_GATED, sliding_window=5),
    "qwen2": Qwen2Config(**_GATED, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": Qwen3Config(**_GATED, tie_word_embeddings=True),
    "bert": BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=3,
        max_position_embeddings=CONTEXT,
    ),
}  # fmt: skip
"""Widths differ from each other; windows are shorter than the context; gates, heads and ties of every kind."""


def tiny_language(kind: str) -> PreTrainedModel:
    """A model with its head, whose weights, norms and biases are all random."""
    config = copy.deepcopy(CONFIGS[kind])  # saving a model in another precision writes that into its config
    maker = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = maker.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name.lower() or ".ln_" in name else 0.0, 0.3)
    return model


def saved(kind: str, folder: Path, **options: Any) -> tuple[PreTrainedModel, Path]:
    """Such a model, and the folder where it lies."""
    model = tiny_language(kind)
    model.save_pretrained(folder / kind, **options)
    return model, folder / kind


DOWN = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "bert": "output.dense"}
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "bert": "bert.encoder.layer"}


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """A block of a model."""
    kind = model.config.model_type
    return model.get_submodule(f"{BLOCKS.get(kind, 'model.layers')}.{layer}")


def reference(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...], torch.Tensor]:
    """MLP activations of every layer, hidden states before every block and after the last, and logits.

    By transformers' own forward with hooks.
    """
    kind = model.config.model_type
    seen: list[torch.Tensor] = []
    handles = [
        block(model, layer).get_submodule(DOWN.get(kind, "mlp.down_proj")).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        for layer in range(LAYERS)
    ]  # fmt: skip
    entered: list[torch.Tensor] = []
    handles += [
        block(model, layer).register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in range(LAYERS)
    ]
    handles.append(
        block(model, LAYERS - 1).register_forward_hook(
            lambda _, __, out: entered.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=None if mask is None else mask.long()).logits
    for handle in handles:
        handle.remove()
    return seen, tuple(entered), logits
