"""Which question it answers: *where does a sentence lie, and which prompts lie near it?*

Place in the flow: the encoder of a PSI sweep over documents: one space for snippets and prompts, so that geometry and
names come from the same vectors. A BERT's last hidden states, averaged over a text's tokens (Reimers and Gurevych 2019,
arXiv 1908.10084).
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor
from torch.nn import functional as F

from polyray.errors import ModelError
from polyray.models.devices import require_cuda
from polyray.models.encoders import PromptEncoder
from polyray.models.language import LanguageModel, Shard
from polyray.probes.tokens import Ids, Tokenizer
from polyray.psi_text_config import SentenceEncoder as SentenceConfig
from polyray.settings import NumericsConfig

_STEP = 16
"""Texts of like length share a forward: they are filled up to a multiple of so many tokens."""


class SentenceEncoder(PromptEncoder):
    """A sentence encoder.

    Args:
        config: which, and how many texts at a time.
        numerics: where to compute.

    Raises:
        ModelError: there is no such model, it is no BERT, or its context is shorter than `max_tokens`.
    """

    def __init__(self, config: SentenceConfig, numerics: NumericsConfig) -> None:
        require_cuda(numerics)
        model = LanguageModel(config.path)
        if model.info.causal:
            raise ModelError(
                f"science.encoder.path {config.path!r} is a {model.info.family} model, whose states see only what is "
                "before them; give a BERT that was trained to encode sentences."
            )
        if model.info.context < config.max_tokens:
            raise ModelError(
                f"science.encoder.max_tokens {config.max_tokens} is more than the {model.info.context} tokens that "
                f"{config.path!r} sees at once."
            )
        self.name = config.path
        self.info = model.info
        self.text_dim = model.info.width
        self.micro_batch = config.micro_batch
        self.max_tokens = config.max_tokens
        self.trained = True
        self.notes = []
        self.weights_digest = model.checkpoint.digest()
        """Of the weights alone."""
        self._tokenizer = Tokenizer(model.folder)
        if self._tokenizer.around is None:
            raise ModelError(f"the tokenizer of {config.path!r} has no tokens to put around a text ([CLS] and [SEP]).")
        self._around = self._tokenizer.around
        self._shard = Shard(model, range(model.info.n_layers), getattr(torch, config.dtype), numerics.device)
        self.device = self._shard.device
        parts = [self.weights_digest, self._tokenizer.digest(), config.max_tokens, config.dtype]
        self.digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> Float16[Tensor, "n d"]:
        """Unit vectors of texts, in their order.

        A text gives the same bits whichever others are with it: those of like length share a forward pass, whose shape
        follows from that length. One without any token is what stands around texts alone. What is NaN or infinite stays
        so.
        """
        return self._vectors(texts).half()

    def _encode_text(self, prompts: list[str]) -> Tensor:
        return self._vectors(prompts)

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        by_length: dict[int, list[int]] = {}
        ids: list[Ids] = []
        for i, text in enumerate(texts):
            tokens = self._tokenizer.encode(text)[-(self.max_tokens - 2) :]
            ids.append(np.array([self._around[0], *tokens, self._around[1]], np.int32))
            length = min(self.max_tokens, -(-len(ids[-1]) // _STEP) * _STEP)
            by_length.setdefault(length, []).append(i)
        out = torch.zeros(len(texts), self.text_dim)
        for length, rows in by_length.items():
            for start in range(0, len(rows), self.micro_batch):
                batch = rows[start : start + self.micro_batch]
                out[batch] = self._forward([ids[i] for i in batch], length)
        return out

    def _forward(self, ids: Sequence[Ids], length: int) -> Tensor:
        tokens = np.full((self.micro_batch, length), self._tokenizer.pad, np.int64)
        there = np.zeros(tokens.shape, np.bool_)
        for row, found in enumerate(ids):
            tokens[row, : len(found)] = found
            there[row, : len(found)] = True
        mask = torch.from_numpy(there)
        try:
            with torch.inference_mode():
                states = self._shard(torch.from_numpy(tokens), mask).float().cpu()
        except ModelError:
            # Some text's states are not finite; alone, in the same shape, each shows whether they are its own.
            if len(ids) == 1:
                return torch.full((1, self.text_dim), torch.nan)
            return torch.cat([self._forward([one], length) for one in ids])
        weight = mask[:, :, None].float()
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        return F.normalize(mean, dim=1)[: len(ids)]
