"""Which question it answers: *what do the MLP neurons of a language model say to these tokens?*

Place in the flow: the subject of the categorical census. `LanguageModel` says what a model is and gives single weights
without loading the others. A `Shard` is a contiguous range of its blocks, with the weights of those blocks alone; the
blocks are transformers' own. Shards in a row give what the whole model gives, whatever the cut.

A layer is the index of a block, from 0, in tables `h.<index>`. A neuron is a hidden unit of the block's MLP after its
non-linearity (gated MLP: activation(gate) * up), which is what enters the last linear map of the MLP.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from polyray.errors import ModelError
from polyray.models.checkpoint import Checkpoint, locate, read_config

Read = Callable[[int, Tensor], Tensor | None]
"""Given a layer and its activations [B, L, N]; what it returns, if anything, takes their place in the model."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, as far as its configuration says."""

    family: str
    n_layers: int
    n_neurons: int
    """Hidden units of the MLP of each block."""
    width: int
    """Of the residual stream."""
    context: int
    """The largest number of tokens that it sees at once."""
    vocab: int
    """Rows of its input embeddings; the tokenizer may know fewer tokens."""
    causal: bool
    """Each position sees only what is before it."""
    gated: bool
    """The MLP has a gate beside its up projection."""


def describe(model: str) -> ModelInfo:
    """What a model is; loads no weights.

    Args:
        model: as for `checkpoint.locate`.

    Raises:
        ModelError: there is none, or its family is unknown.
    """
    return LanguageModel(model).info


class LanguageModel:
    """A model in transformers' format. Opening one reads its configuration; weights are read when asked for.

    Args:
        model: as for `checkpoint.locate`.

    Raises:
        ModelError: there is none, or its family is unknown.
    """

    def __init__(self, model: str) -> None:
        self.name = model
        self.folder = locate(model)
        self.family, self.config = read_config(self.folder)
        width = int(self.config.hidden_size)
        inner = getattr(self.config, "intermediate_size", None) or getattr(self.config, "n_inner", None) or 4 * width
        self.info = ModelInfo(
            family=self.family.name,
            n_layers=int(self.config.num_hidden_layers),
            n_neurons=int(inner),
            width=width,
            context=int(self.config.max_position_embeddings),
            vocab=int(self.config.vocab_size),
            causal=self.family.causal,
            gated=self.family.gate is not None,
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's tensors, read from mapped files one by one."""
        return Checkpoint(self.folder, self._prefix)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The whole network with its head and without any weights, on the meta device."""
        maker = AutoModelForCausalLM if self.family.causal else AutoModelForMaskedLM
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return maker.from_config(self.config, attn_implementation="sdpa", trust_remote_code=False).eval()

    @property
    def _prefix(self) -> str:
        return f"{self.skeleton.base_model_prefix}."

    def _weight(self, path: str, ending: str = "weight") -> Float32[Tensor, "..."]:
        return self.checkpoint.tensor(f"{self._prefix}{path}.{ending}").float()

    def _block(self, layer: int, path: str) -> str:
        return f"{self.family.blocks}.{layer}.{path}"

    def check_layer(self, layer: int, first: int = 0) -> None:
        """Raises `ModelError` unless the layer exists and is at least `first`."""
        if not first <= layer < self.info.n_layers:
            raise ModelError(
                f"layer {layer} is out of range: {self.name!r} has layers {first} to {self.info.n_layers - 1} here."
            )

    def _linear(self, layer: int, path: str) -> Float32[Tensor, "in out"]:
        self.check_layer(layer)
        weight = self._weight(self._block(layer, path))
        return weight if self.family.in_by_out else weight.T

    def w_in(self, layer: int) -> Float32[Tensor, "d N"]:
        """From the residual stream to the neurons of a layer (gated MLP: the up projection)."""
        return self._linear(layer, self.family.up)

    def w_out(self, layer: int) -> Float32[Tensor, "N d"]:
        """From the neurons of a layer to the residual stream."""
        return self._linear(layer, self.family.down)

    def gate(self, layer: int) -> Float32[Tensor, "d N"] | None:
        """From the residual stream to the gates of a layer's neurons; None where the MLP has none."""
        return None if self.family.gate is None else self._linear(layer, self.family.gate)

    def gains(self, layer: int) -> Float32[Tensor, " d"]:
        """Product of the gains of the norms that stand between w_out of the layer before and w_in of this one.

        Raises:
            ModelError: layer 0 has none before it.
        """
        self.check_layer(layer, first=1)
        product = torch.ones(self.info.width)
        for offset, path in self.family.gains:
            product = product * self._weight(self._block(layer + offset, path))
        return product

    def input_embeddings(self) -> Float32[Tensor, "V d"]:
        """One row a token id."""
        return self._weight(self.family.tokens)

    def has_head(self) -> bool:
        """Whether the weights hold all that predicts tokens from the last hidden states."""
        head = self.skeleton.get_submodule(self.family.head)
        names = [f"{self.family.head}.{name}" for name, _ in head.named_parameters()]
        return all(self.stored(name) is not None for name in names)

    def stored(self, name: str) -> str | None:
        """Where a tensor lies: under its own name, or under that of the one it is tied to; None where it is missing."""
        if name in self.checkpoint:
            return name
        tied = getattr(self.skeleton, "_tied_weights_keys", None)
        source = tied.get(name) if isinstance(tied, dict) else None
        if source is None or (
            source.startswith(self._prefix) and not getattr(self.config, "tie_word_embeddings", True)
        ):
            return None
        return source if source in self.checkpoint else None


class Shard:
    """A contiguous range of blocks on one device, with their weights alone.

    The first shard holds the embeddings as well. Shards must be of one model and follow on each other; what one
    returns is what the next is given.

    Args:
        model: the model.
        blocks: which blocks, at least one, in steps of 1.
        dtype: in which to compute. float32 is what results are comparable in.
        device: where to compute.
        with_head: hold the last norm and the head too, for `logits`; only of the last blocks.

    Raises:
        ModelError: there are no such blocks, a tensor is missing, damaged or of another shape, or the model has no
            head.
    """

    def __init__(
        self,
        model: LanguageModel,
        blocks: range,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        with_head: bool = False,
    ) -> None:
        if len(blocks) == 0 or blocks.step != 1:
            raise ModelError(f"a shard is a range of at least one block in steps of 1, not {blocks}.")
        model.check_layer(blocks.start)
        model.check_layer(blocks.stop - 1)
        self.info = model.info
        self.family = model.family
        self.config = model.config
        self.blocks = blocks
        self.dtype = dtype
        self.device = torch.device(device)
        self.first = blocks.start == 0
        self.last = blocks.stop == model.info.n_layers
        if with_head and not (self.last and model.has_head()):
            raise ModelError(
                f"{model.name!r} has no head that predicts tokens."
                if self.last
                else f"blocks {blocks.start} to {blocks.stop - 1} are not the last ones: no head follows on them."
            )
        base = model.skeleton.get_submodule(model.skeleton.base_model_prefix)
        prefix = f"{model.skeleton.base_model_prefix}."
        self.has_head = with_head
        self._modules: dict[str, nn.Module] = {}
        own = [f"{self.family.blocks}.{layer}" for layer in blocks]
        own += self.family.entry if self.first else ()
        own += [self.family.norm] if with_head and self.family.norm else []
        for path in own:
            self._modules[path] = self._load(model, base.get_submodule(path), prefix + path)
        if with_head:
            head = model.skeleton.get_submodule(self.family.head)
            self._modules[self.family.head] = self._load(model, head, self.family.head)
        self._rotary: nn.Module | None = None
        if self.family.rotary:
            # Its frequencies are no weights: they follow from the configuration, and are float32 in every dtype.
            rotary = base.get_submodule(self.family.rotary)
            self._rotary = type(rotary)(config=base.config).to(self.device)

    def _load(self, model: LanguageModel, module: nn.Module, path: str) -> nn.Module:
        state = {}
        for name, empty in module.state_dict().items():
            full = f"{path}.{name}"
            stored = model.stored(full)
            tensor = model.checkpoint.tensor(stored or full)
            if tensor.shape != empty.shape:
                raise ModelError(
                    f"{full!r} of {model.name!r} has the shape {list(tensor.shape)}, not {list(empty.shape)}: the "
                    "weights do not fit config.json."
                )
            state[name] = tensor.to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else None)
        loaded = copy.deepcopy(module)
        loaded.load_state_dict(state, assign=True)
        return loaded.eval().requires_grad_(False)

    def forward(
        self,
        x: Int[Tensor, "B L"] | Float[Tensor, "B L d"],
        mask: Bool[Tensor, "B L"] | None = None,
        read: Read | None = None,
        layers: Collection[int] = (),
        last: int | None = None,
        start: int | None = None,
    ) -> Float[Tensor, "B L d"]:
        """Runs the shard's blocks.

        Bits depend on the shape of x, and on neither the cut nor, for a causal model, the mask.

        Args:
            x: token ids for the first shard, what the shard before returned for the others; L at most
                `info.context`.
            mask: where there is a token; the rest is padding. A causal model is padded on the right, where padding
                changes no token; others do not attend to it. A context without any token gives meaningless numbers.
            read: called once for each layer to be read, with its activations in the shard's dtype.
            layers: which layers to read; those of other shards are no concern of this one.
            last: no block after this one is run (by default all are).
            start: no block before this one is run, and x is what enters it (by default all are).

        Returns:
            Hidden states after the last block that was run.

        Raises:
            ModelError: hidden states are not finite: too large for half precision, or the weights are broken.
        """
        hidden = self._enter(x.to(self.device), start)
        length = hidden.shape[1]
        positions = torch.arange(length, device=self.device)[None]
        more = {} if self._rotary is None else {"position_embeddings": self._rotary(hidden, positions)}
        full = self._full_mask(mask, length)
        for layer in self.blocks:
            if not (start or 0) <= layer <= (self.blocks.stop if last is None else last):
                continue
            block = self._modules[f"{self.family.blocks}.{layer}"]
            hooks = [] if read is None or layer not in layers else [_listen(block, self.family.down, layer, read)]
            try:
                out = block(
                    hidden, attention_mask=full if full is not None else self._window(layer, length),
                    position_ids=positions, **more,
                )  # fmt: skip
            finally:
                for hook in hooks:
                    hook.remove()
            hidden = out[0] if isinstance(out, tuple) else out
        if not torch.isfinite(hidden).all():
            raise ModelError(
                f"hidden states of blocks {self.blocks.start} to {self.blocks.stop - 1} are not finite in "
                f"{str(self.dtype).removeprefix('torch.')}. Use float32"
                f"{', or bfloat16 for its range' if self.dtype == torch.float16 else ', or check the weights'}."
            )
        return hidden

    __call__ = forward

    def _enter(self, x: Tensor, start: int | None) -> Tensor:
        if not self.first or start is not None:
            return x.to(self.dtype)
        if x.shape[1] > self.info.context:
            raise ModelError(f"{x.shape[1]} tokens at once; the model's context is {self.info.context}.")
        return self.family.embed(self._modules.__getitem__, x)

    def _full_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """Which tokens a model that is not causal attends to, [B, 1, L, L]."""
        if self.family.causal or mask is None:
            return None
        # Without anything to attend to, attention would be 0 / 0.
        seen = mask.to(self.device) | ~mask.to(self.device).any(1, keepdim=True)
        return seen[:, None, None, :].expand(-1, 1, length, -1)

    def _window(self, layer: int, length: int) -> Tensor | None:
        """What a causal block attends to; None is all that is before, for which there is a faster kernel."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if not window or length <= window or (kinds is not None and kinds[layer] != "sliding_attention"):
            return None
        at = torch.arange(length, device=self.device)
        back = at[:, None] - at[None, :]
        return ((back >= 0) & (back < window))[None, None]

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n V"]:
        """What the head makes of the last hidden states.

        Raises:
            ModelError: the shard was made without a head.
        """
        if not self.has_head:
            raise ModelError("this shard holds no head: make it with with_head=True.")
        if self.family.norm:
            hidden = self._modules[self.family.norm](hidden)
        out: Tensor = self._modules[self.family.head](hidden)
        return out


def _listen(block: nn.Module, place: str, layer: int, read: Read) -> RemovableHandle:
    """Calls `read` with what enters a part of the block."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        changed = read(layer, inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    return block.get_submodule(place).register_forward_pre_hook(hook)
