"""Which question it answers: *how strongly, and where, does each MLP neuron of a language model respond to a document?*

Place in the flow: the subject of a PSI sweep over documents, as `vision.py` is that of one over images. Documents are
read in windows (`probes/reading.py`), several of which share a forward pass of one fixed shape; a response is the
maximum over the tokens of a document.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyray.errors import ConfigError, ModelError
from polyray.models.blocks import context_length, layer_name
from polyray.models.devices import require_cuda
from polyray.models.language import LanguageModel, Shard
from polyray.models.layers import LayerInfo
from polyray.models.peaks import peaks
from polyray.probes.reading import Around, Passage, Window, around, windows
from polyray.probes.tokens import Tokenizer
from polyray.psi_text_config import LanguageSubject
from polyray.settings import NumericsConfig

_RECTIFIED = ("relu", "relu2", "relu_squared")
"""Activations that are 0 below 0."""


class Response(NamedTuple):
    """What the neurons of a layer say of one document."""

    response: Tensor
    """Maximum over its tokens, float32 [N]; NaN where any is NaN."""
    position: Tensor
    """Index in the document of the first token that has it, int64 [N]; 0 for NaN."""


class Opened:
    """A language model as a subject: what its configuration and tokenizer say, without its weights.

    Args:
        config: of the subject.
        span: tokens of a snippet.

    Raises:
        ModelError: there is no such model, its family is unknown, or it has no tokens to read a document with.
        ConfigError: layers that it does not have, or a window that has no room for twice a snippet.
    """

    def __init__(self, config: LanguageSubject, span: int) -> None:
        self.model = LanguageModel(config.path)
        self.tokenizer = Tokenizer(self.model.folder)
        info = self.model.info
        self.causal, self.n_vocab = info.causal, info.vocab
        chosen = range(info.n_layers) if config.layers == "all" else sorted(set(config.layers))
        if not chosen or chosen[-1] >= info.n_layers:
            raise ConfigError(
                f"science.subject.layers: {config.path!r} has layers 0 to {info.n_layers - 1}, got {list(chosen)[-1:]}."
            )
        self.blocks = list(chosen)
        self.lead, self.trail = _special_around(self.tokenizer, self.causal, config.path)
        self.context = context_length("science.subject.context", config.context, info.context)
        self.room = self.context - len(self.lead) - len(self.trail)
        self.beside: Around = around(span, self.causal)
        if 2 * span > self.room:
            raise ConfigError(
                f"science.extract.span {span} is more than half of the {self.room} tokens of a document in a window of "
                f"{self.context}: windows overlap by a snippet. Lower it, or raise science.subject.context."
            )

    @property
    def digest(self) -> str:
        """64 hexadecimal digits of SHA-256 over weights and tokenizer."""
        return hashlib.sha256((self.model.checkpoint.digest() + self.tokenizer.digest()).encode()).hexdigest()

    def layers(self) -> tuple[LayerInfo, ...]:
        """The layers that are swept, in order of depth. Positions and boxes are counted in tokens of a document."""
        config, info = self.model.config, self.model.info
        activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
        return tuple(
            LayerInfo(
                name=layer_name(block),
                depth=block,
                width=info.n_neurons,
                layout="tokens",
                grid_h=1,
                grid_w=self.room,
                activation=None if info.gated else str(activation),
                ranked_by="response",
                positive_only=not info.gated and activation in _RECTIFIED,
                receptive_px=None,
                center_x_px=0.5,
                center_y_px=0.5,
                stride_px=1.0,
            )
            for block in self.blocks
        )

    def check_weights(self) -> None:
        """Reads all weights that a sweep needs, a block at a time; raises `ModelError` where one does not fit."""
        for block in range(self.blocks[-1] + 1):
            Shard(self.model, range(block, block + 1))


def _special_around(tokenizer: Tokenizer, causal: bool, name: str) -> tuple[list[int], list[int]]:
    """Tokens that stand before and behind what is read of a document in a window."""
    if causal:
        if tokenizer.eot is None:
            raise ModelError(f"the tokenizer of {name!r} has neither an end-of-text nor a beginning-of-text token.")
        return [tokenizer.eot], []
    if tokenizer.around is None:
        raise ModelError(f"the tokenizer of {name!r} has no tokens to put around a document ([CLS] and [SEP]).")
    return [tokenizer.around[0]], [tokenizer.around[1]]


@dataclass
class _Reading:
    """A document under way."""

    document: int
    n_left: int
    """Windows whose answers are not there yet."""
    best: dict[int, Response] = field(default_factory=dict)
    """By block."""
    why: str | None = None
    """Why it cannot be used."""


class Reader(Opened):
    """A language model that reads documents; holds the blocks up to the last one swept.

    Args:
        config: of the subject.
        span: tokens of a snippet.
        numerics: where to compute.

    Raises:
        ModelError, ConfigError: as `Opened`; or a tensor is missing, damaged or of another shape.
    """

    def __init__(self, config: LanguageSubject, span: int, numerics: NumericsConfig) -> None:
        super().__init__(config, span)
        require_cuda(numerics)
        self.micro_batch = config.micro_batch
        dtype = getattr(torch, config.dtype)
        self.shard = Shard(self.model, range(self.blocks[-1] + 1), dtype, numerics.device)

    def responses(
        self, documents: Iterable[tuple[int, Passage]], neurons: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, list[Response] | str]]:
        """What neurons say of documents.

        Whichever documents share a forward pass, a document gives the same bits.

        Args:
            documents: index and tokens of each.
            neurons: blocks that are read, and which of their neurons are wanted.

        Yields:
            In order, index and responses, block by block as asked for; or why there are none: the hidden states of
            the document are not finite. A single neuron that is not finite is NaN or infinite in its response, and 0
            for the layers after it, which would otherwise all be lost with it.
        """
        waiting: list[_Reading] = []
        batch: list[tuple[_Reading, Passage, Window]] = []
        for document, tokens in documents:
            # Unknown tokens alone: nothing in the window counts.
            spans = [
                w for w in windows(len(tokens.ids), self.room, self.beside) if tokens.counts[w.first : w.last].any()
            ]
            reading = _Reading(document, len(spans))
            waiting.append(reading)
            for window in spans:
                batch.append((reading, tokens, window))
                if len(batch) == self.micro_batch:
                    self._forward(batch, neurons)
                    batch.clear()
            while waiting and waiting[0].n_left == 0:
                yield _done(waiting.pop(0), neurons)
        if batch:
            self._forward(batch, neurons)
        yield from (_done(reading, neurons) for reading in waiting)

    def _forward(self, batch: Sequence[tuple[_Reading, Passage, Window]], neurons: Mapping[int, Tensor]) -> None:
        pad = self.tokenizer.pad if self.tokenizer.pad < self.n_vocab else 0
        ids = np.full((self.micro_batch, self.context), pad, np.int64)
        there, counted = np.zeros(ids.shape, np.bool_), np.zeros(ids.shape, np.bool_)
        lead = len(self.lead)
        for row, (_, tokens, w) in enumerate(batch):
            seen = [*self.lead, *tokens.ids[w.start : w.stop], *self.trail]
            ids[row, : len(seen)] = seen
            there[row, : len(seen)] = True
            counted[row, lead + w.first - w.start : lead + w.last - w.start] = tokens.counts[w.first : w.last]
        counting = torch.from_numpy(counted).to(self.shard.device)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        broken = torch.zeros(len(ids), dtype=torch.bool, device=self.shard.device)

        def read(block: int, activations: Tensor) -> Tensor | None:
            wanted = neurons[block].to(activations.device)
            read_out = activations if len(wanted) == activations.shape[2] else activations[:, :, wanted]
            response, position = peaks(read_out.masked_fill(~counting[:, :, None], -torch.inf))
            found[block] = response.cpu(), position.cpu()
            finite = torch.isfinite(activations)
            if finite.all():
                return None
            broken.logical_or_((counting & ~finite.any(2)).any(1))  # no neuron of the layer is finite at a token
            return activations.where(finite, 0)

        why = "hidden states are not finite"
        with torch.inference_mode():
            try:
                self.shard(torch.from_numpy(ids), torch.from_numpy(there), read, list(neurons), max(neurons))
            except ModelError as e:
                # Hidden states that are not finite. Whose they are, the activations say.
                why = str(e)
        for row, (reading, _, w) in enumerate(batch):
            reading.n_left -= 1
            if broken[row]:
                reading.why = why
            for block, (response, position) in found.items():
                here = Response(response[row], position[row] + (w.start - lead))
                reading.best[block] = _later(reading.best.get(block), here)


def _done(reading: _Reading, blocks: Iterable[int]) -> tuple[int, list[Response] | str]:
    return reading.document, reading.why or [reading.best[block] for block in blocks]


def _later(best: Response | None, here: Response) -> Response:
    """The larger of two responses, the first one's position where they are equal."""
    if best is not None:
        larger = here.response > best.response
        response = torch.maximum(best.response, here.response)
        here = Response(response, torch.where(larger, here.position, best.position))
    return here._replace(position=here.position.masked_fill(here.response.isnan(), 0))
