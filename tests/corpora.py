"""Tokenizers for the tiny language models, and corpora in files, made in the tests."""

import json
from collections.abc import Sequence
from pathlib import Path

from languages import VOCAB, saved
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<eot>", "<unk>", "[CLS]", "[SEP]")
WORDS = [f"w{i}" for i in range(VOCAB - len(SPECIAL))]
EOT, UNK, CLS, SEP = range(len(WORDS), VOCAB)


def with_words(kind: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A tiny random model with a tokenizer whose token i is the word `w<i>`."""
    model, place = saved(kind, folder)
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, *SPECIAL])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {"eos_token": "<eot>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names).save_pretrained(place)
    return model, place


def write_corpus(path: Path, texts: Sequence[str | None], labels: Sequence[str | None] | None = None) -> Path:
    """A file of JSON lines; a label that is None is left out."""
    lines = []
    for i, text in enumerate(texts):
        label = None if labels is None else labels[i]
        lines.append(json.dumps({"text": text} | ({} if label is None else {"label": label})))
    path.write_text("\n".join(lines))
    return path
