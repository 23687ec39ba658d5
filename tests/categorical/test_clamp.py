"""Clamps on a tiny model: of known wiring, at the actual value, and against naive loops."""

import math
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from languages import CONTEXT, INNER, LAYERS, VOCAB, WIDTH, reference, saved
from safetensors.torch import load_file, save_file

from polyray.categorical.clamp import (
    N_NEAR,
    QUANTILES,
    Contexts,
    Effect,
    clamp,
    coherence_of,
    control_of,
    holding,
    measure,
)
from polyray.errors import DataError
from polyray.models.language import LanguageModel, Shard

SEED = 6
LAYER, NEURON = 1, 4


def contexts(n: int = 6) -> Contexts:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (n, CONTEXT), generator=generator)
    mask = torch.ones(n, CONTEXT, dtype=torch.bool)
    mask[0, 11:] = False
    rows = torch.where(mask & (tokens % 5 > 0), tokens, -1)  # every token but some is kept, under its own id
    return Contexts(tokens, mask, rows)


def core_and_precursors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Core-tokens of the layer and the next one, and precursors: neuron 4 feeds neurons 2, 7 and 9."""
    generator = torch.Generator().manual_seed(3)
    kept = torch.tensor([t for t in range(VOCAB) if t % 5])
    core, following = (
        torch.stack([kept[torch.randperm(len(kept), generator=generator)[:12]] for _ in range(INNER)]) for _ in "ab"
    )
    precursors = torch.stack([torch.randperm(INNER, generator=generator)[:3] for _ in range(INNER)])
    precursors[precursors == NEURON] = -1
    precursors[[2, 7, 9], 0] = NEURON
    return core, following, precursors


def silent(folder: Path, layers: range) -> None:
    """Makes blocks write nothing but what their MLP writes: attention adds 0."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for layer in layers:
        for part in ("weight", "bias"):
            weights[f"transformer.h.{layer}.attn.c_proj.{part}"].zero_()
    save_file(weights, path, metadata={"format": "pt"})


def run(kind: str, tmp_path: Path, head: bool = True, **changed: object) -> tuple[LanguageModel, list[Shard], dict]:
    _, folder = saved(kind, tmp_path)
    if kind == "gpt2":
        silent(folder, range(LAYER + 1, LAYER + 2))
    model = LanguageModel(str(folder))
    shards = [Shard(model, range(0, 2)), Shard(model, range(2, LAYERS), with_head=head)]
    core, following, precursors = core_and_precursors()
    given = {
        "shards": shards,
        "contexts": contexts(),
        "layer": LAYER,
        "neuron": NEURON,
        "core": core,
        "next_core": following,
        "precursors": precursors,
        "embeddings": model.input_embeddings(),
        "distribution": measure(shards, contexts(), LAYER, SEED, model.w_out(LAYER), 6, 2),
        "seed": SEED,
        "n_contexts": 4,
    }
    return model, shards, given | changed


def test_the_change_downstream_is_the_computed_one(tmp_path: Path) -> None:
    model, shards, given = run("gpt2", tmp_path)
    effects = clamp(**given)
    assert [e.quantile for e in effects] == list(QUANTILES)
    # Which contexts: those that have its core-tokens, by hash; found again from the numbers stored.
    effect = effects[2]
    assert effect.targets.tolist() == [2, 7, 9]
    mine = set(given["core"][NEURON].tolist())
    spaces = contexts()
    weights = {name: tensor.double() for name, tensor in load_file(model.folder / "model.safetensors").items()}
    norm, norm_bias = (weights[f"transformer.h.{LAYER + 1}.ln_2.{part}"] for part in ("weight", "bias"))
    bias = weights[f"transformer.h.{LAYER + 1}.mlp.c_fc.bias"]
    w_in, w_out = model.w_in(LAYER + 1).double(), model.w_out(LAYER).double()

    def next_activations(entering: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.layer_norm(entering, (WIDTH,), norm, norm_bias, 1e-5)
        x = normed @ w_in + bias
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # GPT-2's GELU

    def changes(which: list[int], neuron: int, value: float) -> torch.Tensor:
        found = []
        for context in which:
            with torch.inference_mode():
                seen: dict[int, torch.Tensor] = {}
                hidden = shards[0](spaces.tokens[[context]], read=seen.__setitem__, layers=[LAYER])
            for position in range(CONTEXT):
                if int(spaces.rows[context, position]) in mine:
                    actual = float(seen[LAYER][0, position, neuron])
                    after = hidden[0, position].double()
                    pushed = after + (value - actual) * w_out[neuron]
                    found.append(next_activations(pushed) - next_activations(after))
        return torch.stack(found).mean(0)

    having = [c for c in range(6) if any(int(r) in mine for r in spaces.rows[c])]
    candidates = [list(c) for c in combinations(having, 4)]
    fits = [
        c for c in candidates
        if torch.allclose(changes(c, NEURON, effect.value)[effect.targets], effect.change, atol=1e-5, rtol=0)
    ]  # fmt: skip
    assert len(fits) == 1
    assert effect.n_contexts == 4
    for e in effects:
        want = changes(fits[0], NEURON, e.value)[e.targets]
        control = changes(fits[0], e.control, e.control_value)[e.targets]
        torch.testing.assert_close(e.change, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(e.control_change, control, atol=1e-5, rtol=0)
        assert want.abs().max() > 1e-3
        assert e.kl > 1e-6
        assert e.control_kl > 1e-6


def test_targets_are_neurons_whatever_rows_they_stand_in(tmp_path: Path) -> None:
    _, _, given = run("gpt2", tmp_path)
    whole = clamp(**given)
    rows = torch.tensor([2, 5, 7])
    some = given | {"next_core": given["next_core"][rows], "precursors": given["precursors"][rows]}
    for e, of_all in zip(clamp(**some, next_neurons=rows), whole, strict=True):
        assert e.targets.tolist() == [2, 7]
        torch.testing.assert_close(e.change, of_all.change[:2])
        torch.testing.assert_close(e.coherence, of_all.coherence[:2], equal_nan=True)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_holding_a_neuron_at_its_actual_value_changes_nothing(kind: str, tmp_path: Path) -> None:
    _, shards, _ = run(kind, tmp_path)
    part = contexts()
    where = part.rows == 7
    seen: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        plain = shards[0](part.tokens, part.mask, seen.__setitem__, [LAYER])
        actual = seen[LAYER][..., NEURON][where]
        held = shards[0](part.tokens, part.mask, holding(LAYER, NEURON, where, actual), [LAYER])
        moved = shards[0](part.tokens, part.mask, holding(LAYER, NEURON, where, actual + 1), [LAYER])
    assert where.any()
    assert torch.equal(held, plain)
    assert not torch.equal(moved[where], plain[where])
    assert torch.equal(moved[~where], plain[~where])  # the last block that is run: only the positions themselves


def test_a_constant_neuron_clamped_has_no_effect(tmp_path: Path) -> None:
    """A neuron whose quantiles are all its one value."""
    _, folder = saved("gpt2", tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[f"transformer.h.{LAYER}.mlp.c_fc.weight"][:, NEURON] = 0
    save_file(weights, path, metadata={"format": "pt"})
    model = LanguageModel(str(folder))
    _, _, given = run("llama", tmp_path)
    shards = [Shard(model, range(LAYERS), with_head=True)]
    distribution = measure(shards, contexts(), LAYER, SEED, model.w_out(LAYER), 6, 2)
    assert float(distribution.deviation[NEURON]) < 1e-7
    distribution = distribution._replace(scale=torch.ones(INNER, dtype=torch.float64))
    for effect in clamp(**given | {"shards": shards, "distribution": distribution}):
        assert effect.change.abs().max() < 1e-6
        assert effect.control_change.abs().max() > 1e-4
        assert abs(effect.kl) < 1e-10
        torch.testing.assert_close(
            torch.nan_to_num(effect.coherence_change), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_the_distribution_is_that_of_the_sample(tmp_path: Path) -> None:
    network, folder = saved("gpt2", tmp_path)
    model = LanguageModel(str(folder))
    shards = [Shard(model, range(LAYERS))]
    given = contexts()
    activations, _, _ = reference(network, given.tokens)
    values = activations[2][given.rows >= 0].double().numpy()
    quantiles = (0.0, 0.25, 0.99, 1.0)
    got = measure(shards, given, 2, SEED, model.w_out(2), 100, 4, quantiles)
    np.testing.assert_allclose(got.quantiles, np.quantile(values, quantiles, axis=0), atol=1e-5)
    np.testing.assert_allclose(got.deviation, values.std(0, ddof=1), atol=1e-5)
    length = np.linalg.norm(model.w_out(2).numpy(), axis=1)
    np.testing.assert_allclose(got.scale, values.std(0, ddof=1) * length, atol=1e-5)
    few = [measure(shards, given, 2, SEED, model.w_out(2), 2, size, quantiles) for size in (1, 2)]
    torch.testing.assert_close(few[0].quantiles, few[1].quantiles, atol=1e-5, rtol=0)
    assert not torch.allclose(few[0].quantiles, got.quantiles)
    nothing = given._replace(rows=torch.full_like(given.rows, -1))
    with pytest.raises(DataError, match="none of the contexts"):
        measure(shards, nothing, 2, SEED, model.w_out(2), 3, 2)


def test_the_cut_of_the_model_changes_nothing(tmp_path: Path) -> None:
    model, _, given = run("llama", tmp_path)
    cuts = [
        [Shard(model, range(LAYERS), with_head=True)],
        [Shard(model, range(i, i + 1), with_head=i == LAYERS - 1) for i in range(LAYERS)],
    ]
    first, second, third = (clamp(**given | changed) for changed in ({}, *({"shards": cut} for cut in cuts)))
    for effects in zip(first, second, third, strict=True):
        for field in fields(Effect):
            values = [torch.as_tensor(getattr(e, field.name)) for e in effects]
            assert torch.equal(torch.nan_to_num(values[0]), torch.nan_to_num(values[1]))
            assert torch.equal(torch.nan_to_num(values[0]), torch.nan_to_num(values[2]))


def test_without_a_head_and_after_the_last_layer(tmp_path: Path) -> None:
    model, shards, given = run("gpt2", tmp_path, head=False)
    for effect in clamp(**given):
        assert math.isnan(effect.kl)
        assert effect.change.abs().max() > 0
    whole = [Shard(model, range(LAYERS), with_head=True)]
    none = torch.full((0, 3), -1)
    last = {"layer": LAYERS - 1, "precursors": none, "next_core": none, "shards": whole}
    for effect in clamp(**given | last):
        assert len(effect.targets) == len(effect.change) == len(effect.coherence) == 0
        assert effect.kl > 0
    for effect in clamp(**given | {"layer": 0, "shards": shards}):
        assert effect.change.abs().max() > 0


def test_neurons_that_cannot_be_clamped(tmp_path: Path) -> None:
    _, _, given = run("gpt2", tmp_path)
    absent = given["core"].clone()
    absent[NEURON] = -1
    with pytest.raises(DataError, match="none of its core-tokens"):
        clamp(**given | {"core": absent})
    alone = given["distribution"]._replace(scale=torch.zeros(INNER, dtype=torch.float64))
    with pytest.raises(DataError, match="no other neuron"):
        clamp(**given | {"distribution": alone})


def test_the_control_is_one_of_the_nearest_in_scale_and_feeds_no_target() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(60, generator=generator, dtype=torch.float64) + 0.1
    scale[50:] = torch.nan
    barred = torch.arange(0, 40, 3)
    drawn = set()
    for seed in range(300):
        control = control_of(5, scale, barred, 1, seed)
        assert control == control_of(5, scale, barred, 1, seed)
        drawn.add(control)
    allowed = [n for n in range(50) if n != 5 and n not in barred.tolist()]
    nearest = sorted(allowed, key=lambda n: abs(math.log(float(scale[n]) / float(scale[5]))))[:N_NEAR]
    assert drawn == set(nearest)
    assert control_of(0, scale[:1], barred[:0], 1, 0) is None


def test_coherence_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(9, 5, generator=generator)
    rows = torch.randint(-1, 9, (3, 20), generator=generator)
    rows[rows == 6] = -1  # never seen
    activations = torch.randn(3, 20, generator=generator).double() + 0.5
    cluster = torch.tensor([1, 3, 6, 7, 8])
    mean = {t: max(0.0, float(activations[rows == t].mean())) if (rows == t).any() else 0.0 for t in cluster.tolist()}
    assert sum(m > 0 for m in mean.values()) >= 2
    over, under = 0.0, 0.0
    for s in cluster.tolist():
        for t in cluster.tolist():
            if s != t:
                cosine = float(torch.cosine_similarity(embeddings[s].double(), embeddings[t].double(), dim=0))
                over, under = over + mean[s] * mean[t] * cosine, under + mean[s] * mean[t]
    assert coherence_of(activations, rows, cluster, embeddings) == pytest.approx(over / under, abs=1e-12)
    assert math.isnan(coherence_of(activations, rows, cluster[:0], embeddings))
    assert math.isnan(coherence_of(-activations.abs(), rows, cluster, embeddings))
    assert math.isnan(coherence_of(activations, rows, torch.tensor([1]), embeddings))
