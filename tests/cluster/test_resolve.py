"""What a reader is told before a sweep: floors of p, and pools that are too small."""

from collections import Counter
from pathlib import Path

import pytest
from sweeps import tiny

from polyray.cluster.resolve import floor_note, mined_labels, pool_notes, swap_notes
from polyray.config import Config, parse_config
from polyray.errors import ConfigError


def config(B: int, n_pool: int, K: int = 24) -> Config:
    raw = tiny(Path())
    raw["science"]["calibrate"]["B"] = B
    raw["science"]["embed"]["n_pool"] = n_pool
    raw["science"]["mine"] |= {"K": K, "K_keep": K}
    return parse_config(raw)


@pytest.mark.parametrize(
    ("B", "n_pool", "n_images", "n_draws", "remedy"),
    [
        (100, 5000, 9000, 100, "raise calibrate.B"),
        (100_000, 300, 9000, 150, "raise embed.n_pool"),
        (100_000, 5000, 301, 151, "larger probe set"),
        (100, 199, 9000, 100, "raise embed.n_pool"),
        (100, 202, 9000, 100, "raise calibrate.B"),
        (100_000, 5000, 9000, 2500, None),
        (2500, 5000, 9000, 2500, None),
    ],
)
def test_the_floor_of_p_follows_from_draws_and_anchors(
    B: int, n_pool: int, n_images: int, n_draws: int, remedy: str | None
) -> None:
    notes = floor_note(config(B, n_pool), 1000, n_images)
    assert len(notes) == (remedy is not None)
    for note in notes:
        n_tied = -(-1000 / (0.05 * (n_draws + 1)) // 1)
        assert f"with {n_draws} draws of one_concept the smallest p is {1 / (n_draws + 1):.1e}" in note
        assert f"needs {n_tied:.0f} of 1000 neurons" in note
        assert remedy is not None
        assert remedy in note


def told(n_pool: int, n_images: int, K: int = 24, B: int = 10) -> str:
    return " ".join(pool_notes(config(B, n_pool, K), ["a"] * n_images))


def test_a_pool_of_fewer_than_4_k_makes_selective_too_bold() -> None:
    assert "fewer than 4 K = 96" in told(95, 1000)
    assert "p under `selective` is too small" in told(1000, 95)
    assert "`selective`" not in told(96, 1000)


def test_too_few_anchors_are_told() -> None:
    assert "one_concept has 51 draws, not B = 52" in told(101, 1000, B=52)
    assert "one_concept has" not in told(103, 1000, B=52)


def planted(K: int, per_kind: int) -> Config:
    raw = tiny(Path())
    raw["science"]["mine"] |= {"K": K, "K_keep": K, "k_min": min(K, 20)}
    raw["science"]["plant"] = {"per_kind": per_kind}
    return parse_config(raw)


def test_a_planted_sweep_mines_half_of_every_class() -> None:
    labels = ["a"] * 81 + ["b"] * 80
    assert mined_labels(config(10, 100), labels) == labels
    assert Counter(mined_labels(planted(20, 2), labels)) == {"a": 41, "b": 40}


def test_what_cannot_be_planted_is_refused_before_anything_is_read() -> None:
    labels = ["a"] * 80 + ["b"] * 80
    with pytest.raises(ConfigError, match="per_kind 3 is more than the probe set's 2 classes"):
        mined_labels(planted(20, 3), labels)
    with pytest.raises(ConfigError, match="K 21 is more than half of the 40 images of a class"):
        mined_labels(planted(21, 2), labels)


def test_too_few_hosts_for_a_verdict_are_told() -> None:
    """Of up to 4 clusters each has n_hosts // 4 hosts, as far as K has two examples for each."""

    def notes(n_hosts: int, K: int) -> list[str]:
        raw = tiny(Path())
        raw["science"]["mine"] |= {"K": K, "K_keep": K}
        raw["science"]["swap"] = {"n_hosts": n_hosts}
        return swap_notes(parse_config(raw))

    (note,) = notes(19, 100)
    assert "a neuron with 4 clusters has about 4 hosts in each" in note
    assert "from 4 clusters on" in note
    assert notes(20, 100) == []
    (note,) = notes(100, 24)
    assert "a neuron with 3 clusters has about 4 hosts in each" in note
    without = tiny(Path())
    without["science"]["swap"] = None
    assert swap_notes(parse_config(without)) == []
