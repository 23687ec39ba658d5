"""The report's numbers are the dataset's: each against a naive loop over its rows."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report import made

import polyray
from polyray.report import swaps as console
from polyray.report.charts import Series
from polyray.report.content import Cards, Facts, Figure, Missing, Prose, Section, Story, Table
from polyray.report.plain import interval, network_name, number, p_value, percent, visible
from polyray.report.scores import N_ACROSS, _hexes, _limits
from polyray.report.source import Source
from polyray.report.story import tell
from polyray.schema import NULL_KINDS, PRESETS

Row = dict[str, Any]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.census(tmp_path_factory.mktemp("numbers") / "out")


@pytest.fixture(scope="module")
def story(out: Path) -> Story:
    return tell(Source(out))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.language(tmp_path_factory.mktemp("words") / "out")


@pytest.fixture(scope="module")
def tale(words: Path) -> Story:
    return tell(Source(words))


def section(story: Story, slug: str) -> Section:
    return next(s for s in story.sections if s.slug == slug)


def tables(story: Story) -> list[Table]:
    found: list[Table] = []
    for part in story.sections:
        for block in part.blocks:
            found += [block] if isinstance(block, Table) else list(block.tables) if isinstance(block, Figure) else []
    return found


def table(story: Story, caption: str) -> list[Row]:
    """Rows of the one table whose caption begins so, by head."""
    (found,) = [t for t in tables(story) if t.caption.startswith(caption)]
    assert all(len(row) == len(found.heads) for row in found.rows)
    return [dict(zip(found.heads, row, strict=True)) for row in found.rows]


def rows_of(out: Path, name: str) -> list[Row]:
    return polyray.open(out)[name].to_table().to_pylist()


def ok(out: Path) -> list[Row]:
    return [r for r in rows_of(out, "neurons") if r["status"] == "ok"]


def test_the_story_is_told_in_order(story: Story, tale: Story) -> None:
    assert [s.slug for s in story.sections] == [
        "swept", "headline", "log-psi", "auroc", "depth", "components", "swaps", "sensitivity", "cards", "left-out",
        "provenance",
    ]  # fmt: skip
    assert [s.slug for s in tale.sections] == [
        "swept", "headline", "deciles", "controls", "components", "cards", "left-out", "provenance",
    ]  # fmt: skip
    assert story.state == tale.state == ""


def test_every_table_is_rectangular_and_every_figure_has_a_caption_and_numbers(story: Story, tale: Story) -> None:
    for told in (story, tale):
        for found in tables(told):
            assert found.rows
            assert {len(r) for r in found.rows} == {len(found.heads)}
        figures = [b for s in told.sections for b in s.blocks if isinstance(b, Figure)]
        assert len({f.name for f in figures}) == len(figures) >= 3
        for figure in figures:
            assert len(figure.caption) > 80
            assert figure.tables
            assert all(p.label and p.svg.startswith("<svg") for p in figure.panels)


def test_layers_stand_in_order_of_depth_with_their_counts(out: Path, story: Story) -> None:
    found = table(story, "Layers")
    assert [r["layer"] for r in found] == [*made.LAYERS, "whole sweep"]
    status = Counter((r["layer"], r["status"]) for r in rows_of(out, "neurons"))
    for row in found[:-1]:
        assert [row[c] for c in ("scored", "excluded", "failed")] == [
            str(status[row["layer"], s]) for s in ("ok", "excluded", "failed")
        ]
    assert [found[-1][c] for c in ("neurons", "scored", "excluded", "failed")] == ["270", "261", "6", "3"]


@pytest.mark.parametrize("preset", PRESETS)
def test_densities_count_every_neuron_once(out: Path, story: Story, preset: str) -> None:
    values = {"real neurons": [r[f"{preset}_log_psi"] for r in ok(out)]}
    for kind in NULL_KINDS:
        found = [r[f"{preset}_log_psi"] for r in rows_of(out, "null_neurons") if r["kind"] == kind]
        values[f"null: {kind.replace('_', ' ')}"] = found
    known = {k: np.array([x for x in v if x is not None]) for k, v in values.items()}
    low = min(0.99 * 3 * math.log(0.5), *(np.quantile(v, 0.005) for v in known.values()))
    binned = table(story, f"Neurons by log ψ, {preset}")
    n_bins = len(binned) - 1
    edges = [low * (1 - i / n_bins) for i in range(n_bins + 1)]
    for name, v in known.items():
        expected = [sum(x < low for x in v)] + [0] * n_bins
        for x in v:
            for i in range(n_bins):
                if edges[i] <= x and (x < edges[i + 1] or i == n_bins - 1):
                    expected[i + 1] += 1
        assert [int(r[name]) for r in binned] == expected
        (row,) = [r for r in table(story, "log ψ by preset") if r["preset and kind"] == f"{preset}, {name}"]
        assert row["neurons"] == str(len(v))
        for head, q in (("lower quartile", 25), ("median", 50), ("upper quartile", 75)):
            assert row[head] == number(float(np.percentile(v, q)))


def test_aurocs_are_the_rows_of_the_summary(out: Path, story: Story) -> None:
    rows = [r for r in rows_of(out, "layer_summary") if r["metric"] == "auroc"]
    of = {(r["layer"], r["preset"], r["null_kind"], r["score"]): r for r in rows}
    own = {"paper": "rotation", "selective": "pool", "specific": "one_concept"}
    found = table(story, "AUROC of log ψ, real")
    assert [r["layer"] for r in found] == [*made.LAYERS, "whole sweep"]
    for row in found:
        layer = None if row["layer"] == "whole sweep" else row["layer"]
        for preset, kind in own.items():
            r = of[layer, preset, kind, "log_psi"]
            assert row[f"{preset}, against {kind.replace('_', ' ')}"] == interval(r["value"], r["low"], r["high"])
    every = table(story, "AUROC of every score")
    assert len(every) == 3 * 3 * 5 + 3 * 3 * 5, "the sweep against all kinds, three layers against their own"
    head = table(story, "Headline")[0]
    whole = of[None, "paper", "rotation", "log_psi"]
    assert head["here (95 % interval)"] == interval(whole["value"], whole["low"], whole["high"])
    assert head["the paper"].startswith("0.987")


def test_quartiles_by_depth(out: Path, story: Story) -> None:
    for row in table(story, "Median log ψ by layer"):
        for preset in PRESETS:
            of = [r[f"{preset}_log_psi"] for r in ok(out) if r["layer"] == row["layer"]]
            q = np.percentile([x for x in of if x is not None], [25, 50, 75])
            assert row[preset] == f"{number(q[1], 2)} ({number(q[0], 2)} to {number(q[2], 2)})"


def test_trends_are_the_rows_of_the_summary(out: Path, story: Story) -> None:
    of = {(r["layer"], r["metric"], r["preset"], r["score"]): r for r in rows_of(out, "layer_summary")}
    found = {r["score"]: r for r in table(story, "Do scores rise")}
    tau = of[None, "depth_tau", "specific", "log_psi"]
    assert found["specific, log ψ"]["tau (95 % interval)"] == interval(tau["value"], tau["low"], tau["high"])
    assert found["specific, log ψ"]["p"] == p_value(of[None, "depth_tau_p", "specific", "log_psi"]["value"])
    steps = table(story, "Median log ψ of a layer less")
    assert [r["layer"] for r in steps] == ["mid.9"] * 3 + ["mid.10"] * 3
    step = of["mid.10", "step_median", "paper", "log_psi"]
    assert steps[3]["difference (95 % interval)"] == interval(step["value"], step["low"], step["high"])


def test_patterns_and_diagnoses_are_counted(out: Path, story: Story) -> None:
    calibrated = [r for r in ok(out) if r["specific_p"] is not None]
    expected = Counter(tuple(r[f"specific_{c}_p"] < 0.05 for c in "SQD") for r in calibrated)
    found = {
        tuple(r[f"{c} beyond chance"] == "yes" for c in "SQD"): int(r["neurons"])
        for r in table(story, "Which components")
    }
    assert found == dict(expected)
    said = Counter(d for r in rows_of(out, "neuron_summary") if r["diagnosis"] for d in r["diagnosis"].split("; "))
    diagnoses = {r["diagnosis"]: r for r in table(story, "Diagnoses")}
    assert {name: int(r["neurons"]) for name, r in diagnoses.items()} == dict(said)
    assert len(said) >= 2


def test_what_rests_on_p_has_the_null_neurons_beside_it(out: Path, story: Story) -> None:
    nulls = [r for r in rows_of(out, "null_neurons") if r["kind"] == "one_concept" and r["specific_p"] is not None]
    beyond = [tuple(r[f"specific_{c}_p"] < 0.05 for c in "SQD") for r in nulls]
    assert 0 < sum(s for s, _, _ in beyond) < len(beyond)
    for r in table(story, "Which components"):
        same = tuple(r[f"{c} beyond chance"] == "yes" for c in "SQD")
        assert r["null neurons"] == percent(beyond.count(same) / len(beyond))
    split, concept = (
        sum(s and not q and not d for s, q, d in beyond) / len(beyond),
        sum(q and not d for _, q, d in beyond) / len(beyond),
    )
    diagnoses = {r["diagnosis"]: r["null neurons"] for r in table(story, "Diagnoses")}
    expected = {"low-level split": percent(split), "same concept, two classes": percent(concept)}
    assert diagnoses == {name: expected.get(name, "–") for name in diagnoses}
    assert expected.keys() & diagnoses.keys()
    (share,) = [r for r in table(story, "Headline") if r["figure"].startswith("neurons with p < 0.05")]
    small = sum(r["specific_p"] < 0.05 for r in nulls) / len(nulls)
    assert share["beside it, as a control"] == f"null neurons of one concept: {percent(small)} of {len(nulls)}"


def test_hexagons_hold_every_neuron_once_with_its_patterns(out: Path, story: Story) -> None:
    calibrated = [r for r in ok(out) if r["specific_p"] is not None]
    found = table(story, "Neurons of every hexagon")
    for plane in ("S, Q", "S, D", "Q, D"):
        of = [r for r in found if r["plane"] == plane]
        assert sum(int(r["neurons"]) for r in of) == len(calibrated)
        assert sum(int(r["all three"]) for r in of) == sum(r["specific_p"] < 0.05 for r in calibrated)
        split = sum("low-level split" in (r["diagnosis"] or "") for r in rows_of(out, "neurons"))
        assert sum(int(r["low-level split"]) for r in of) == split


def test_a_neuron_is_in_the_hexagon_whose_centre_is_nearest() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 2, 400), rng.normal(1, 5, 400)
    limits = _limits(x, y)
    found = _hexes(x, y, {"all three": x > 1, "same concept, two classes": y > 9, "low-level split": y < 0}, limits)
    x0, x1, y0, y1 = limits
    counts = Counter[tuple[float, float]]()
    for a, b in zip(x.clip(x0, x1), y.clip(y0, y1), strict=True):
        counts[
            min(((c[0], c[1]) for c in found), key=lambda c: math.hypot((c[0] - a) / (x1 - x0), (c[1] - b) / (y1 - y0)))
        ] += 1
    assert {(c[0], c[1]): c[2] for c in found} == dict(counts)
    across = sorted({round((c[0] - x0) / (x1 - x0) * 2 * (N_ACROSS + 1)) for c in found})
    assert across[0] >= 0
    assert across[-1] <= 2 * N_ACROSS + 2
    signs = {c[3] for c in found}
    assert signs == {None, "dot", "ring", "vee"}
    for _, _, n, sign, of in found:
        most = [p for p, k in of.items() if 2 * k > n]
        assert (sign is None) == (not most)


def test_contrasts_are_the_console_tables(out: Path, story: Story) -> None:
    records = console.records(polyray.open(out))
    found = table(story, "Every contrast")
    assert len(found) == 6 * len(records)
    assert [r["where"] for r in found[:6]] == ["whole sweep"] * 6
    assert [r["where"] for r in found[-6:]] == [[r["layer"] for r in records if r["layer"] is not None][-1]] * 6
    first = next(r for r in records if r["layer"] is None and r["split"] == "all")["contrasts"]["aligned-random"]
    assert found[0]["in sd (95 % interval)"] == interval(first["mean_sd"], first["low_sd"], first["high_sd"], 2)
    assert found[0]["raw response (95 % interval)"] == interval(first["mean"], first["low"], first["high"], 2)
    whole = next(r for r in records if r["layer"] is None and r["split"] == "all")
    causal = table(story, "Causally polysemantic")[-1]
    assert causal["causally polysemantic"].startswith(percent(whole["causal"]["mean"]))
    assert causal["null neurons, aligned − non-aligned, p < 0.05"] == percent(whole["null_p05"]["mean"])
    share = next(r for r in table(story, "Headline") if r["figure"].startswith("causally"))
    assert share["here (95 % interval)"].startswith(percent(whole["causal_specific"]["mean"]))
    judged = [r["causal"] for r in rows_of(out, "effects") if r["scope"] == "neuron" and r["kind"] == "real"
              and r["contrast"] == "aligned-random" and r["causal"] is not None]  # fmt: skip
    assert whole["causal"]["mean"] == pytest.approx(sum(judged) / len(judged))


def test_the_neurons_of_smallest_p_come_first(out: Path, story: Story) -> None:
    calibrated = [r for r in ok(out) if r["specific_p"] is not None]
    best = sorted(calibrated, key=lambda r: (r["specific_p"], -r["specific_log_psi"], r["layer"], r["neuron"]))[:24]
    said, cards = section(story, "cards").blocks
    assert isinstance(said, Prose)
    assert isinstance(cards, Cards)
    assert said.text.endswith(f"Called at q < 0.05 are {sum(r['called'] for r in best)} of them.")
    assert [c.title for c in cards.cards] == [f"{r['layer']} · {r['neuron']}" for r in best]
    for card, r in zip(cards.cards, best, strict=True):
        facts = dict(card.facts)
        assert (facts["log ψ"], facts["p"]) == (number(r["specific_log_psi"], 2), p_value(r["specific_p"]))
        assert (facts["q"], facts["diagnosis"]) == (p_value(r["q"]), visible(r["diagnosis"]))
        assert facts["S, Q, D"] == ", ".join(number(r[c], 2) for c in "SQD")
        assert [g.name for g in card.groups] == ["zebra 0", "zebra 1"]
        assert all(len(g.pictures) == 2 and "no JPEG" in g.missing for g in card.groups)
    verdicts = {(r["layer"], r["neuron"]) for r in rows_of(out, "effects") if r["scope"] == "neuron"}
    for card, r in zip(cards.cards, best, strict=True):
        assert (dict(card.facts)["causal"] == "not swapped") == ((r["layer"], r["neuron"]) not in verdicts)


def test_what_was_left_out_is_grouped_by_reason(out: Path, story: Story) -> None:
    found = {(r["reason"], r["status"]): r["neurons"] for r in table(story, "Neurons by reason")}
    assert found["dead", "excluded"] == "6"
    assert sum(map(int, found.values())) == sum(r["status"] != "ok" for r in rows_of(out, "neurons"))
    assert [(r["reason"], r["neurons"]) for r in table(story, "Scored, but")] == [("no pool of its size", "3")]
    assert [(r["reason"], r["images"]) for r in table(story, "Images left out")] == [("cannot be read", "1")]
    assert [r["pictures"] for r in table(story, "Patch swaps that")] == ["18"]
    (failure,) = table(story, "Failures")
    assert (failure["stage"], failure["items"]) == ("mine", "2")


def test_variants_are_told(out: Path, story: Story) -> None:
    found = table(story, "Sensitivity")
    assert [r["variant"] for r in found] == ["prompts = zebra.txt", "seed = 1"]
    assert found[0]["log ψ specific"] == "0.21 (0.10 to 0.30)"
    assert found[0]["called"] == "3 → 3"
    head = [r for r in table(story, "Headline") if r["figure"].startswith("Spearman")]
    assert [(r["here (95 % interval)"], r["beside it, as a control"]) for r in head] == [
        ("0.20 (0.10 to 0.30)", "another seed: 0.20")
    ]


def test_provenance_names_the_run_its_digests_and_the_command(out: Path, story: Story) -> None:
    part = section(story, "provenance")
    facts = dict(next(b for b in part.blocks if isinstance(b, Facts)).rows)
    assert facts["run_id"] == polyray.open(out).run["run_id"]
    assert facts["digest of subject"] == "ab12"
    assert facts["seeds"] == "seed 0, swap.seed 3"
    digests = {r["table"]: r["digest"] for r in table(story, "Digest of every table")}
    assert set(digests) == set(polyray.open(out).tables)
    assert all(len(d) == 64 for d in digests.values())


def test_planted_neurons_are_told_where_they_were_planted(tmp_path: Path, story: Story) -> None:
    out = tmp_path / "out"
    store = made.store_at(out, {"plant": {"n": 3}})
    about = {"layer": "last", "n": 20, "low": 0.1, "high": 0.9}
    figures = [("p05_frac", "order2", "specific", "S", 0.8), ("p05_frac", "order2", "specific", "p", 0.5),
               ("auroc", "order2", "specific", "log_psi", 0.75), ("auroc", "order2", None, "two_means", 0.7),
               ("p05_frac", "mono", "specific", "S", 0.05)]  # fmt: skip
    rows = [about | {"metric": m, "kind": k, "min_purity": 0.95, "preset": p, "score": s, "value": v}
            for m, k, p, s, v in figures]  # fmt: skip
    rows.append(about | {"metric": "purity", "kind": "order2", "min_purity": 0.0, "value": 0.97})
    made.put(store, "recover", [("layers", [{"layer": "last", "depth": 0}], None), ("planted_summary", rows, None)])
    told = tell(Source(out))
    found = {r["kind"]: r for r in table(told, "Planted neurons")}
    assert (found["order2"]["purity"], found["order2"]["p_S < 0.05"]) == ("0.97", "0.800 [0.10, 0.90]")
    assert found["order2"]["AUROC log ψ"] == "0.750 [0.10, 0.90]"
    assert found["mono"]["AUROC log ψ"] == ""
    power = [r for r in table(told, "Significance by purity") if r["kind"] == "order2"][-1]
    assert power["share with p of S < 0.05"] == "80.0\u00a0% (10.0 to 90.0)"
    figure = section(told, "planted").blocks[0]
    assert isinstance(figure, Figure)
    assert figure.panels[0].title == "last: size (mono) and power"
    assert "planted" not in [s.slug for s in story.sections]
    made.store_at(tmp_path / "asked", {"plant": {"n": 3}})
    (said,) = section(tell(Source(tmp_path / "asked")), "planted").blocks
    assert isinstance(said, Missing)


# A categorical sweep


def test_deciles_are_means_over_neurons(words: Path, tale: Story) -> None:
    neurons = [r for r in rows_of(words, "proximity") if r["difference"] is not None]
    found = {r["where"]: r for r in table(tale, "Mean dimensional proximity")}
    for where, of in (("h.1", [r for r in neurons if r["layer"] == "h.1"]), ("whole sweep", neurons)):
        mean = np.mean([r["deciles"] for r in of], axis=0)
        assert found[where]["neurons"] == str(len(of))
        assert [found[where][str(d + 1)] for d in range(10)] == [number(x) for x in mean]
    for control, label in (("order", "order permuted"), ("precursors_random", "random precursors")):
        drawn = [r["deciles"] for r in rows_of(words, "proximity_controls") if r["control"] == control]
        mean = np.mean([np.mean(np.reshape(d, (-1, 10)), axis=0) for d in drawn], axis=0)
        assert [found[label][str(d + 1)] for d in range(10)] == [number(x) for x in mean]
    assert "h.0" not in found, "nobody qualifies there"


def test_every_condition_stands_beside_the_actual_one(words: Path, tale: Story) -> None:
    found = table(tale, "Every condition")
    assert [(r["where"], r["condition"]) for r in found[:3]] == [
        ("whole sweep", "as it is"), ("whole sweep", "order permuted"), ("whole sweep", "other precursors, matched"),
    ]  # fmt: skip
    assert len(found) == 2 * len(made.CONDITIONS)
    assert {"unheard_of"} < {r["condition"] for r in found}
    head = {r["figure"]: r for r in table(tale, "Headline")}
    share = head["share with a positive difference"]
    assert share["here (95 % interval)"] == "90.0\u00a0% (80.0 to 95.0)"
    assert "order permuted: 85.0\u00a0%" in share["beside it, as a control"]
    assert share["the paper"] == "78.01 %"
    (said,) = [b.text for b in section(tale, "headline").blocks if isinstance(b, Prose)]
    assert (
        "Of 5 controls, 2 leave more than half of the share's excess over one half, 3 leave less than half of it"
        in said
    )


def test_signatures_and_clamps(words: Path, tale: Story) -> None:
    said = Counter(d for r in rows_of(words, "proximity") if r["diagnosis"] for d in r["diagnosis"].split("; "))
    found = {r["signature"].replace(" ", "_"): int(r["neurons"]) for r in table(tale, "Failure signatures")}
    assert found == dict(said)
    held = rows_of(words, "clamps")
    for row, quantile in zip(table(tale, "Clamps"), (0.0, 0.99), strict=True):
        of = [r for r in held if r["quantile"] == quantile]
        assert row["fed neurons move, sd"] == number((0.1 / 1.0 + 0.3 / 0.5) / 2), "one target has no spread"
        assert row["KL, nats"] == number(float(np.mean([r["kl"] for r in of])), 5)
        assert row["KL above control's"] == percent(sum(r["kl"] > r["control_kl"] for r in of) / len(of))


def test_language_cards_show_tokens_of_the_surest_neurons(words: Path, tale: Story) -> None:
    neurons = [r for r in rows_of(words, "proximity") if r["difference"] is not None]
    best = sorted(neurons, key=lambda r: (r["p"], -r["difference"], r["layer"], r["neuron"]))[:24]
    (cards,) = [b for b in section(tale, "cards").blocks if isinstance(b, Cards)]
    assert [c.title for c in cards.cards] == [f"{r['layer']} · {r['neuron']}" for r in best]
    n = best[0]["neuron"]
    groups = cards.cards[0].groups
    assert list(groups[0].tokens) == [f" w{i}" for i in range(n, n + 12)]
    assert groups[1].name == "shared with precursor 0"
    assert groups[2].name == "shared with precursor 14", "one that does not count is left out"
    assert groups[-1].name == "and 2 further"
    token = n + 40
    assert groups[1].tokens[-1] == (f" w{token}" if token < 50 else f"#{token}")


# Values


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/models/of mine/gpt2-small/", "gpt2-small"),
        ("models/a/b.safetensors", "b.safetensors"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("torchvision:resnet50", "torchvision:resnet50"),
        (None, None),
    ],
)
def test_a_network_goes_by_the_last_part_of_a_path(name: str | None, shown: str | None) -> None:
    for key in ("subject", "model"):
        assert network_name({"provenance": {key: {"name": name}}}) == shown
    assert network_name({}) is None


def test_missing_numbers_are_dashes_and_never_zeros() -> None:
    assert [number(None), number(math.nan), percent(None), p_value(None), interval(None, 0.0, 1.0)] == ["–"] * 5
    assert interval(0.5, None, None) == "0.500"
    assert number(-0.0001, 2) == "0.00"
    assert number(-1.5, 1) == "−1.5"
    assert Series("", [math.inf, None]).at(0) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b\x1fc\x7f", "a␀b␟c␡"),
        ("\u202eabc\u2066", "⟨U+202E⟩abc⟨U+2066⟩"),
        ("\x85", "⟨U+0085⟩"),
        ("שלום", "שלום"),
        (None, "–"),
        ("x" * 999, "x" * 239 + "…"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str | None, shown: str) -> None:
    assert visible(text) == shown


def test_empty_sections_say_why(tmp_path: Path) -> None:
    made.store_at(tmp_path / "out")
    story = tell(Source(tmp_path / "out"))
    for slug in ("log-psi", "auroc", "depth", "components", "swaps", "cards"):
        (said,) = section(story, slug).blocks
        assert isinstance(said, Missing)
        assert len(said.text) > 20
