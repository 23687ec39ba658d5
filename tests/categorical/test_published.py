"""Published neuron files in place of mining."""

import json
from pathlib import Path

import pytest
import torch

from polyray.categorical.published import published_digest, read_published
from polyray.errors import DataError
from polyray.models.checkpoint import MINILM, locate
from polyray.probes.tokens import Tokenizer

WORDS = ["cat", "dog", "tree", "house", "river"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(locate(MINILM))


def write(folder: Path, neuron: int, tokens: object, values: object) -> None:
    said = {"tokens": tokens, "average_activations": values, "dataclass_name": "TokenLookupTableSummaryOfNeuron"}
    (folder / "1").mkdir(exist_ok=True)
    (folder / "1" / f"{neuron}.json").write_text(json.dumps(said))


def test_files_become_core_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    of_word = {word: int(tokenizer.encode(word)[0]) for word in WORDS}
    ids = torch.tensor(sorted(of_word[word] for word in WORDS[:4]))
    row = {word: ids.tolist().index(of_word[word]) for word in WORDS[:4]}
    write(tmp_path, 0, ["tree", "cat", "no such token", "river"], [3.5, 2.0, 1.5, 1.0])
    write(tmp_path, 2, ["dog", "house", "cat"], [0.5, 2.5, 1.0])
    write(tmp_path, 3, ["dog"], [1.0, 2.0])
    write(tmp_path, 4, ["dog"], ["high"])
    write(tmp_path, 5, [3], [1.0])
    write(tmp_path, 6, ["dog"], [float("nan")])
    (tmp_path / "1" / "7.json").write_text("[]")
    (tmp_path / "1" / "8.json").write_text("{")
    read = read_published(tmp_path, 1, range(9), ids, tokenizer, n_core=3)
    core = read.core_tokens
    assert core.core[0].tolist() == [row["tree"], row["cat"], -1]
    assert core.mean[0, :2].tolist() == [3.5, 2.0]
    assert core.core[2].tolist() == [row["house"], row["cat"], row["dog"]]  # sorted, whatever the file's order
    assert read.n_unknown.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert read.missing == [1]
    assert sorted(read.failures) == [3, 4, 5, 6, 7, 8]
    assert all("damaged" in reason for reason in read.failures.values())
    for neuron in (1, *read.failures):
        assert (core.core[neuron] == -1).all()
        assert torch.isnan(core.mean[neuron]).all()
    some = read_published(tmp_path, 1, [2, 8, 1], ids, tokenizer, n_core=3)
    assert torch.equal(some.core_tokens.core, core.core[[2, 8, 1]])
    assert (some.missing, list(some.failures)) == ([1], [8])
    short = read_published(tmp_path, 1, range(3), ids, tokenizer, n_core=2).core_tokens
    assert short.core[2].tolist() == [row["house"], row["cat"]]


def test_of_a_layer_without_a_folder_all_files_are_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert read_published(tmp_path, 1, range(2), torch.tensor([1]), tokenizer).missing == [0, 1]


def test_the_digest_is_that_of_the_files_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 0, ["tree"], [1.0])
    write(tmp_path, 2, ["tree"], [2.0])
    digest = published_digest(tmp_path, {1: [0, 1, 2]})
    assert digest == published_digest(tmp_path, {1: [0, 2]}) != published_digest(tmp_path, {1: [0]})
    write(tmp_path, 2, ["tree"], [3.0])
    assert digest != published_digest(tmp_path, {1: [0, 2]})
    with pytest.raises(DataError, match="a file of none of the neurons"):
        published_digest(tmp_path, {0: [0], 1: [1]})
