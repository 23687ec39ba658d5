"""Precursors against the formula, one weight at a time."""

import math

import pytest
import torch

from polyray.categorical.connect import connect, largest
from polyray.errors import ModelError
from polyray.kernels import random


def weights(M: int = 7, d: int = 5, N: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(M, d, generator=g), torch.rand(d, generator=g) + 0.5, torch.randn(d, N, generator=g),
        torch.randn(d, N, generator=g),
    )  # fmt: skip


def test_weights_are_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    w_out, gain, w_in, w_gate = weights()
    found = connect(w_out, gain, w_in, 4, 0, 1, w_gate)
    for j in range(3):
        full = [sum(float(w_out[i, k]) * float(gain[k]) * float(w_in[k, j]) for k in range(5)) for i in range(7)]
        expected = [i for i in sorted(range(7), key=lambda i: -full[i]) if full[i] > 0][:4]
        n = len(expected)
        assert found.precursor[j].tolist() == expected + [-1] * (4 - n)
        assert found.weight[j, :n].tolist() == pytest.approx([full[i] for i in expected], abs=1e-12)
        assert found.weight[j, n:].isnan().all()
        by_gate = [sum(float(w_out[i, k] * gain[k]) * float(w_gate[k, j]) for k in range(5)) for i in expected]
        assert found.gate[j, :n].tolist() == pytest.approx(by_gate, abs=1e-6)
    monkeypatch.setattr("polyray.categorical.connect._CHUNK", 7)
    cut = connect(w_out, gain, w_in, 4, 0, 1, w_gate)
    assert torch.equal(cut.precursor, found.precursor)
    assert torch.allclose(cut.weight, found.weight, rtol=1e-13, equal_nan=True)
    assert connect(w_out, gain, w_in, 4, 0, 1).gate.isnan().all()


def test_some_neurons_have_what_they_have_among_all() -> None:
    """Ties too: with neurons of equal weight in the layer before, all that decides is a hash of both indices."""
    w_out, gain, w_in, w_gate = weights()
    w_out = w_out.repeat(2, 1)
    some = torch.tensor([0, 2])
    whole = connect(w_out, gain, w_in, 3, 0, 1, w_gate)
    found = connect(w_out, gain, w_in[:, some], 3, 0, 1, w_gate[:, some], some)
    assert torch.equal(found.precursor, whole.precursor[some])
    assert not torch.equal(connect(w_out, gain, w_in[:, some], 3, 0, 1).precursor, whole.precursor[some])
    assert torch.allclose(found.gate, whole.gate[some], rtol=1e-13, equal_nan=True)


def test_a_neuron_that_nothing_drives_has_no_precursor() -> None:
    w_out, gain, w_in, _ = weights()
    w_in[:, 1] = 0.0
    found = connect(w_out, gain, w_in, 4, 0, 1)
    assert (found.precursor[1] == -1).all()
    assert found.weight[1].isnan().all()
    assert (found.precursor[0] >= 0).any()
    assert connect(torch.zeros(0, 5), gain, w_in, 4, 0, 1).precursor.eq(-1).all(), "no layer before"
    few = connect(w_out.abs()[:2], gain, w_in.abs() + 0.1, 4, 0, 1).precursor
    assert (few[:, :2] >= 0).all()
    assert (few[:, 2:] == -1).all()


def test_ties_go_by_hash_and_float64_decides() -> None:
    values = torch.zeros(2, 50, dtype=torch.float64)
    values[1, 7], values[1, 9] = 1e-14, 2e-14  # alike in float32 beside 1
    values += 1.0
    neurons = torch.tensor([3, 4])
    found = largest(values, 5, 0, 11, neurons)
    hashed = random.tie_hash(0, 11, neurons[:, None], torch.arange(50)[None, :])
    assert found[0].tolist() == hashed[0].argsort()[:5].tolist()
    assert found[1, :2].tolist() == [9, 7]
    others = [i for i in hashed[1].argsort().tolist() if i not in (7, 9)]
    assert found[1, 2:].tolist() == others[:3]
    assert found[0].tolist() != [0, 1, 2, 3, 4]


def test_weights_that_do_not_fit_or_are_damaged_are_refused() -> None:
    w_out, gain, w_in, w_gate = weights()
    with pytest.raises(ModelError, match=r"\(7, 5\), \(4,\), \(5, 3\)"):
        connect(w_out, gain[:4], w_in, 4, 0, 1)
    with pytest.raises(ModelError, match="do not fit"):
        connect(w_out, gain, w_in, 4, 0, 1, w_gate[:, :2])
    w_out[2, 2] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        connect(w_out, gain, w_in, 4, 0, 1)
