"""Counting and mining against naive double loops over transformers' own forward."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from languages import CONTEXT, LAYERS, VOCAB, reference, saved

from polyray.categorical.count import Kept, count_tokens, select
from polyray.categorical.mine import LayerSums, TokenStatistics, batches, core_tokens, mine
from polyray.errors import DataError
from polyray.kernels.random import layer_word, tie_hash
from polyray.kernels.tokens import SCALE, means
from polyray.models.language import LanguageModel, Shard

MICRO_BATCH = 3


def corpus(n: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts with frequent and rare tokens, padding and separators."""
    generator = torch.Generator().manual_seed(4)
    tokens = (torch.rand(n, CONTEXT, generator=generator) ** 3 * VOCAB).int()
    mask = torch.ones(n, CONTEXT, dtype=torch.bool)
    mask[-1, 9:] = False
    return tokens, mask, mask & (tokens != 3)


def kept_of(tokens: torch.Tensor, counted: torch.Tensor, min_count: int) -> Kept:
    return select(count_tokens(tokens, counted, VOCAB), min_count)


def test_counts_are_those_of_a_counter() -> None:
    tokens, _, counted = corpus()
    want = Counter(t for t, c in zip(tokens.flatten().tolist(), counted.flatten().tolist(), strict=True) if c)
    counts = count_tokens(tokens, counted, VOCAB)
    assert {t: n for t, n in enumerate(counts.tolist()) if n} == want
    parts = [count_tokens(tokens[a:b], counted[a:b], VOCAB) for a, b in pairwise((0, 2, 7))]
    assert torch.equal(sum(parts), counts)
    kept = select(counts, 5, exclude=[1])
    assert kept.ids.tolist() == sorted(t for t, n in want.items() if n >= 5 and t != 1)
    assert kept.counts.tolist() == [want[t] for t in kept.ids.tolist()]
    rows = kept.rows(tokens, counted)
    for row, token, is_counted in zip(rows.flatten(), tokens.flatten(), counted.flatten(), strict=True):
        has_row = bool(is_counted) and int(token) in kept.ids.tolist()
        assert (int(row) >= 0) == has_row
        if has_row:
            assert kept.ids[row] == token


def test_a_corpus_without_a_frequent_token_is_refused() -> None:
    tokens, _, counted = corpus()
    counts = count_tokens(tokens, counted, VOCAB)
    with pytest.raises(
        DataError, match=rf"1,000 times.*{int(counts.sum()):,} tokens.*occurs {int(counts.max())} times"
    ):
        select(counts, 1000)
    with pytest.raises(DataError, match="0 tokens"):
        select(torch.zeros(VOCAB, dtype=torch.int64), 1)


def test_tokens_of_another_models_tokenizer_are_refused() -> None:
    tokens, _, counted = corpus()
    with pytest.raises(DataError, match=f"{int(tokens.max())} is beyond the model's 20 tokens"):
        count_tokens(tokens, counted, 20)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "bert"])
def test_means_are_those_of_a_double_loop(kind: str, tmp_path: Path) -> None:
    network, folder = saved(kind, tmp_path)
    tokens, mask, counted = corpus()
    kept = kept_of(tokens, counted, 4)
    shard = Shard(LanguageModel(str(folder)), range(LAYERS))
    mined = mine([shard], tokens, mask, counted, kept, [1, 3], MICRO_BATCH)
    assert sorted(mined) == [1, 3]
    said: dict[int, dict[int, list[torch.Tensor]]] = {1: {}, 3: {}}
    for context in range(len(tokens)):
        length = int(mask[context].sum())
        activations, _, _ = reference(network, tokens[context : context + 1, :length].long())
        for layer in said:
            for position in range(length):
                token = int(tokens[context, position])
                if counted[context, position] and token in kept.ids:
                    said[layer].setdefault(token, []).append(activations[layer][0, position].double())
    for layer, of_tokens in said.items():
        want = torch.stack([torch.stack(of_tokens[t]).mean(0) for t in kept.ids.tolist()])
        assert [len(of_tokens[t]) for t in kept.ids.tolist()] == kept.counts.tolist()
        torch.testing.assert_close(means(mined[layer].sums, kept.counts), want, atol=1e-5, rtol=0)
        assert not mined[layer].refused.any()


def test_no_cut_order_or_split_changes_a_bit(tmp_path: Path) -> None:
    _, folder = saved("gpt2", tmp_path)
    model = LanguageModel(str(folder))
    tokens, mask, counted = corpus(9)
    kept = kept_of(tokens, counted, 4)
    whole = mine([Shard(model, range(LAYERS))], tokens, mask, counted, kept, range(LAYERS), MICRO_BATCH)
    for cut in ((0, 1, 4), (0, 1, 2, 3, 4)):
        shards = [Shard(model, range(a, b)) for a, b in pairwise(cut)]
        again = mine(shards, tokens, mask, counted, kept, range(LAYERS), MICRO_BATCH)
        assert all(torch.equal(again[layer].sums, whole[layer].sums) for layer in range(LAYERS))
    shard = Shard(model, range(LAYERS))
    # Whole batches in another order, as units of work.
    parts = [
        mine([shard], tokens[p], mask[p], counted[p], kept, [2], MICRO_BATCH)[2].sums
        for p in (slice(6, 9), slice(0, 3), slice(3, 6))
    ]
    assert torch.equal(sum(parts), whole[2].sums)
    first = mine([shard], tokens, mask, counted, kept, [0], MICRO_BATCH)
    assert torch.equal(first[0].sums, whole[0].sums)


def test_the_last_batch_is_filled_up() -> None:
    tokens, mask, counted = corpus(7)
    kept = kept_of(tokens, counted, 4)
    made = list(batches(tokens, mask, counted, kept, MICRO_BATCH))
    assert [b.tokens.shape[0] for b in made] == [3, 3, 3]
    assert (made[2].rows[1:] == -1).all()
    assert not made[2].mask[1:].any()
    assert torch.equal(torch.cat([b.tokens for b in made])[:7], tokens.long())
    assert torch.equal(torch.cat([b.rows for b in made])[:7], kept.rows(tokens, counted))


def test_a_neuron_that_is_not_finite_costs_itself() -> None:
    kept = Kept(torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([0, 1]))
    statistics = TokenStatistics(kept, [5], 3)
    rows = torch.tensor([[0, 1]])
    for bad in (1.0, torch.nan, 1.0):
        values = torch.ones(1, 2, 3)
        values[0, 1, 1] = bad
        statistics.reader(rows)(5, values)
    of_layer = statistics.finish()[5]
    assert of_layer.refused.tolist() == [False, True, False]
    assert (of_layer.sums / SCALE).tolist() == [[3, 0, 3], [3, 0, 3]]
    core = core_tokens(of_layer, kept, 5, 0, n_core=2)
    assert core.core[1].tolist() == [-1, -1]
    assert torch.isnan(core.mean[1]).all()
    assert (core.core[0] >= 0).all()


def sums_of(values: torch.Tensor, counts: torch.Tensor) -> LayerSums:
    sums = (values.double() * counts[:, None] * SCALE).round().long()
    return LayerSums(sums, torch.zeros(values.shape[1], dtype=torch.bool))


def test_core_tokens_are_those_of_highest_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(8)
    ids = torch.arange(40) * 3 + 1
    kept = Kept(ids, torch.randint(1, 9, (40,), generator=generator), torch.zeros(0, dtype=torch.int64))
    values = torch.randint(-6, 6, (40, 11), generator=generator) / 2  # many ties
    of_layer = sums_of(values, kept.counts)
    core = core_tokens(of_layer, kept, 2, seed=9, n_core=10)
    for neuron in range(11):
        hashes = tie_hash(9, layer_word("h.2"), torch.tensor(neuron), ids).tolist()
        order = sorted(range(40), key=lambda t: (-float(values[t, neuron]), hashes[t]))
        assert core.core[neuron].tolist() == order[:10]
        assert core.mean[neuron].tolist() == [float(values[t, neuron]) for t in order[:10]]
        at_cut = float(values[order[9], neuron])
        assert int(core.n_tied_at_cut[neuron]) == sum(float(values[t, neuron]) == at_cut for t in order[10:])
    monkeypatch.setattr("polyray.categorical.mine._CHUNK", 100)
    again = core_tokens(of_layer, kept, 2, seed=9, n_core=10)
    alone = core_tokens(
        LayerSums(of_layer.sums[:, [7, 3]], of_layer.refused[[7, 3]]), kept, 2, 9, 10, torch.tensor([7, 3])
    )
    assert torch.equal(again.core, core.core)
    assert torch.equal(alone.core, core.core[[7, 3]])
    assert not torch.equal(core_tokens(of_layer, kept, 2, 10, 10).core, core.core)
    assert not torch.equal(core_tokens(of_layer, kept, 3, 9, 10).core, core.core)


def test_ties_at_rank_100_go_to_the_smaller_hash() -> None:
    ids = torch.arange(300)
    kept = Kept(ids, torch.ones(300, dtype=torch.int64), ids)
    values = torch.zeros(300, 2)
    values[:60, 0] = 1.0
    core = core_tokens(sums_of(values, kept.counts), kept, 0, seed=3)
    hashes = tie_hash(3, layer_word("h.0"), torch.tensor(0), ids)
    tied = sorted(range(60, 300), key=lambda t: int(hashes[t]))
    assert set(core.core[0, :60].tolist()) == set(range(60))
    assert core.core[0, 60:].tolist() == tied[:40]
    assert core.n_tied_at_cut.tolist() == [200, 200]
    assert core.core[0, 60:].tolist() != list(range(60, 100))


def test_fewer_tokens_than_core_tokens() -> None:
    kept = Kept(torch.tensor([4, 9]), torch.tensor([1, 1]), torch.zeros(0, dtype=torch.int64))
    core = core_tokens(sums_of(torch.tensor([[1.0], [2.0]]), kept.counts), kept, 0, 0, n_core=4)
    assert core.core.tolist() == [[1, 0, -1, -1]]
    assert core.mean[0, :2].tolist() == [2.0, 1.0]
    assert torch.isnan(core.mean[0, 2:]).all()
