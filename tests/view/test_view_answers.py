"""What the viewer shows is what the dataset holds: every answer against a naive loop over the tables."""

import csv
import io
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from censuses import census, put_rows
from sweeps import Finished
from viewing import Viewer, begun, language, scored, viewing

import polyray
from polyray.errors import DataError
from polyray.report.catalog import Catalog
from polyray.view import asked, charts, layers, neurons, words
from polyray.view.index import Index
from polyray.view.pictures import Pictures

Row = dict[str, Any]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return census(tmp_path_factory.mktemp("census") / "out", n_neurons=1500, n_layers=4, n_detailed=3)


@pytest.fixture(scope="module")
def viewer(out: Path) -> Iterator[Viewer]:
    with viewing(out) as found:
        yield found


@pytest.fixture(scope="module")
def index(out: Path) -> Index:
    return Index(Catalog(out))


@pytest.fixture(scope="module")
def rows(out: Path) -> list[Row]:
    """Every neuron with the names of its clusters, in order of depth and number."""
    dataset = polyray.open(out)
    names: dict[tuple[str, int], list[Row]] = {}
    for c in dataset["clusters"].to_table(["layer", "neuron", "cluster", "name", "label"]).to_pylist():
        names.setdefault((c["layer"], c["neuron"]), []).append(c)
    causal = {}
    for e in dataset["effects"].to_table().to_pylist():
        if e["contrast"] == "aligned-random" and e["scope"] == "neuron":
            causal[e["layer"], e["neuron"]] = e["causal"]
    found = dataset["neurons"].to_table().to_pylist()
    for r in found:
        key = r["layer"], r["neuron"]
        r["clusters"] = sorted(names.get(key, []), key=lambda c: c["cluster"])
        r["causal"] = causal.get(key)
    return sorted(found, key=lambda r: (int(r["layer"].split(".")[1]), r["neuron"]))


class Links(HTMLParser):
    """The rows' links of a page, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and "data-row" in given:
            self.found.append(given["href"] or "")


def shown(page: str) -> list[tuple[str, int]]:
    """The neurons that a page's rows lead to."""
    matches = [re.fullmatch(r"/neuron\?layer=([^&]+)&neuron=(\d+).*", link) for link in Links(page).found]
    return [(m[1], int(m[2])) for m in matches if m]


def descending(rows: list[Row], key: str) -> list[Row]:
    """Largest first, nulls last, equal ones as they were."""
    return sorted(rows, key=lambda r: -math.inf if r[key] is None else r[key], reverse=True)


@pytest.mark.parametrize(
    ("query", "keep", "key"),
    [
        ("", lambda r: True, "specific_log_psi"),
        ("preset=paper", lambda r: True, "paper_log_psi"),
        ("layer=blocks.2", lambda r: r["layer"] == "blocks.2", "specific_log_psi"),
        ("layer=blocks.1&layer=blocks.3", lambda r: r["layer"] in ("blocks.1", "blocks.3"), "specific_log_psi"),
        ("status=excluded&status=failed", lambda r: r["status"] != "ok", "specific_log_psi"),
        ("called=yes", lambda r: r["called"], "specific_log_psi"),
        ("called=no&sort=-Q", lambda r: r["called"] is False, "Q"),
        ("causal=yes", lambda r: r["causal"], "specific_log_psi"),
        ("min_S=0.15&max_S=0.2&sort=-S", lambda r: r["S"] is not None and 0.15 <= r["S"] <= 0.2, "S"),
        ("min_k=5&sort=-k", lambda r: r["k"] is not None and r["k"] >= 5, "k"),
        ("max_p=0.3&preset=selective", lambda r: (r["selective_p"] or 2) <= 0.3, "selective_log_psi"),
        ("max_fdr_q=0.5&sort=-fdr_q", lambda r: (r["q"] or 2) <= 0.5, "q"),
        ("diagnosis=one+label", lambda r: "one label" in (r["diagnosis"] or "").split("; "), "specific_log_psi"),
        ("name=zebra", lambda r: any("zebra" in c["name"] for c in r["clusters"]), "specific_log_psi"),
        ("name=ZÉBRA&sort=-D", lambda r: any("zebra" in c["name"] for c in r["clusters"]), "D"),
    ],
)
def test_the_table_is_filtered_and_sorted_as_a_loop_does(
    viewer: Viewer, rows: list[Row], query: str, keep: Any, key: str
) -> None:
    expected = descending([r for r in rows if keep(r)], key)
    assert expected
    got: list[tuple[str, int]] = []
    for page in range(1, -(-len(expected) // 200) + 1):
        html = viewer.page(f"/neurons?{query.replace('É', '%C3%89')}&per=200&page={page}")
        got += shown(html)
    assert got == [(r["layer"], r["neuron"]) for r in expected]
    assert f"of {len(expected):,} neurons" in html


def test_ascending_comes_with_nulls_last_and_the_order_of_the_network(viewer: Viewer, rows: list[Row]) -> None:
    got = shown(viewer.page("/neurons?sort=p&per=200"))
    expected = sorted(rows, key=lambda r: math.inf if r["specific_p"] is None else r["specific_p"])[:200]
    assert got == [(r["layer"], r["neuron"]) for r in expected]
    assert shown(viewer.page("/neurons?sort=neuron&per=25")) == [(r["layer"], r["neuron"]) for r in rows[:25]]
    assert shown(viewer.page("/neurons?sort=-neuron&per=25")) == [(r["layer"], r["neuron"]) for r in rows[:-26:-1]]


def test_a_page_past_the_end_is_the_last_one(viewer: Viewer, rows: list[Row]) -> None:
    assert viewer.page("/neurons?page=9999") == viewer.page(f"/neurons?page={-(-len(rows) // 50)}").replace(
        f"page={-(-len(rows) // 50)}", "page=9999"
    )


def test_a_row_shows_the_neurons_numbers(index: Index, rows: list[Row]) -> None:
    found = neurons.page(index, asked.parse([("per", "200"), ("preset", "paper")], index)).rows
    of = {(r["layer"], r["neuron"]): r for r in rows}
    for r in found:
        expected = of[r["layer"], r["neuron"]]
        assert r["log_psi"] == expected["paper_log_psi"]
        assert (r["p"], r["fdr_q"]) == (expected["paper_p"], expected["q"])
        for key in ("S", "Q", "D", "k", "called", "causal", "status", "reason", "diagnosis"):
            assert r[key] == expected[key]
        assert r["names"] == [c["name"] for c in expected["clusters"]]


def test_the_map_counts_as_a_loop_does(index: Index, out: Path, rows: list[Row]) -> None:
    found = layers.overview(index, Catalog(out), "selective")
    for r in [*found["layers"], found["total"]]:
        of = [x for x in rows if r.get("layer") in (None, x["layer"])]
        values = [x["selective_log_psi"] for x in of if x["selective_log_psi"] is not None]
        tested = [x for x in of if x["q"] is not None]
        counts = {s: sum(x["status"] == s for x in of) for s in ("ok", "excluded", "failed")}
        assert (r["n"], r["n_ok"], r["n_excluded"], r["n_failed"]) == (len(of), *counts.values())
        assert (r["n_tested"], r["n_called"]) == (len(tested), sum(x["called"] for x in tested))
        assert r["median"] == pytest.approx(np.median(values), abs=0)
        if "layer" in r:
            edges = np.linspace(found["low"], found["high"], layers.N_BINS + 1)
            inside = np.clip(np.floor((np.array(values) - edges[0]) / (edges[1] - edges[0])), 0, layers.N_BINS - 1)
            assert r["counts"] == np.bincount(inside.astype(int), minlength=layers.N_BINS).tolist()
            null = polyray.open(out)["null_neurons"].to_table().to_pylist()
            null = [n for n in null if n["kind"] == "pool"]
            assert sum(r["null_counts"]) == sum(n["layer"] == r["layer"] for n in null)
            scores = [n["selective_log_psi"] for n in null if math.isfinite(n["selective_log_psi"] or math.nan)]
            assert found["low"] <= np.quantile(scores, 0.005) + 1e-9


def test_what_is_called_by_mistake_is_of_the_null_that_is_called_against(finished: Finished) -> None:
    out = finished.out
    index = Index(Catalog(out))
    (called,) = [
        r["value"]
        for r in polyray.open(out)["layer_summary"].to_table().to_pylist()
        if (r["layer"], r["metric"], r["preset"], r["null_kind"])
        == (None, "null_called_frac", "specific", "one_concept")
    ]
    for preset in ("paper", "selective", "specific"):
        assert layers.overview(index, Catalog(out), preset)["total"]["null_called"] == called


def test_neurons_that_were_only_read_are_no_neurons_of_the_sweep(tmp_path: Path) -> None:
    out = language(tmp_path / "out", only_read=4)
    index = Index(Catalog(out))
    found = {r["layer"]: r for r in layers.overview(index, Catalog(out), "")["layers"]}
    assert (found["h.0"]["planned"], found["h.0"]["n"], found["h.0"]["n_ok"]) == (None, 1, 0)  # the one that failed
    assert (found["h.1"]["planned"], found["h.1"]["n"], found["h.1"]["n_ok"]) == (3, 3, 1)
    with viewing(out) as viewer:
        page = viewer.page("/neurons?status=mined")
        assert set(shown(page)) == {("h.0", 0), ("h.0", 1), *(("h.1", i) for i in range(3, 7))}
        assert 'value="mined"' in page


def test_the_search_ranks_whole_names_before_beginnings_and_parts(index: Index, out: Path) -> None:
    found = neurons.search(index, "zebra", "name", 1, 10_000, "specific")
    clusters = polyray.open(out)["clusters"].to_table().to_pylist()
    matching = [c for c in clusters if "zebra" in c["name"]]

    def key(c: Row) -> tuple[int, float, int, int, int]:
        how = 0 if c["name"] == "zebra" else 1
        return how, -np.float32(c["name_score"]), int(c["layer"].split(".")[1]), c["neuron"], c["cluster"]

    expected = [(c["layer"], c["neuron"], c["cluster"], c["name"], c["size"]) for c in sorted(matching, key=key)]
    assert [(r["layer"], r["neuron"], r["cluster"], r["name"], r["size"]) for r in found.rows] == expected
    assert found.n == len(matching)
    assert found.n_neurons == len({(c["layer"], c["neuron"]) for c in matching})
    assert {r["how"] for r in neurons.search(index, "ebra", "name", 1, 50, "specific").rows} == {2}


def test_the_search_finds_labels_too_and_a_cluster_once(index: Index, out: Path) -> None:
    clusters = polyray.open(out)["clusters"].to_table().to_pylist()
    by_label = neurons.search(index, "class 7", "label", 1, 10_000, "specific")
    assert by_label.n == sum(c["label"] == "class 7" for c in clusters)
    shares = [r["label_frac"] for r in by_label.rows]
    assert shares == sorted(shares, reverse=True)
    either = neurons.search(index, "a", "any", 1, 10_000, "specific")
    keys = [(r["layer"], r["neuron"], r["cluster"]) for r in either.rows]
    assert len(keys) == len(set(keys)) == sum("a" in c["name"].lower() or "a" in c["label"] for c in clusters)


def test_neighbours_share_most_names_first(index: Index, rows: list[Row]) -> None:
    at = next(i for i, r in enumerate(rows) if r["clusters"])
    own = {c["name"] for c in rows[at]["clusters"]}
    shared = {i: own & {c["name"] for c in r["clusters"]} for i, r in enumerate(rows) if i != at}
    found = neurons.neighbours(index, at, "specific")
    assert found
    most = sorted((len(s) for s in shared.values()), reverse=True)[: neurons.N_NEIGHBOURS]
    assert [len(r["shared"]) for r in found] == [n for n in most if n]
    assert all(set(r["shared"]) == shared[r["row"]] for r in found)


def test_neurons_stand_beside_each_other_over_layers(index: Index, rows: list[Row]) -> None:
    border = next(i for i in range(len(rows)) if rows[i]["layer"] != rows[i + 1]["layer"])
    before, after = neurons.beside(index, border)
    assert before
    assert after
    assert (before["layer"], before["neuron"]) == (rows[border - 1]["layer"], rows[border - 1]["neuron"])
    assert (after["layer"], after["neuron"]) == (rows[border + 1]["layer"], 0)
    assert neurons.beside(index, 0)[0] is None
    assert neurons.beside(index, len(rows) - 1)[1] is None


def test_exports_hold_all_that_is_shown_in_its_order(viewer: Viewer, rows: list[Row]) -> None:
    query = "min_S=0.1&sort=-D&preset=paper&page=2"
    expected = descending([r for r in rows if r["S"] is not None and r["S"] >= 0.1], "D")
    told = list(csv.DictReader(io.StringIO(viewer.page(f"/neurons.csv?{query}"))))
    table = pq.read_table(io.BytesIO(viewer.get(f"/neurons.parquet?{query}").body))
    assert table.column_names == list(told[0])
    assert len(told) == table.num_rows == len(expected) > 200
    for line, got, r in zip(told, table.to_pylist(), expected, strict=True):
        assert (got["layer"], got["neuron"], got["status"], got["reason"]) == tuple(
            r[c] for c in ("layer", "neuron", "status", "reason")
        )
        for column in ("paper_log_psi", "paper_p", "S", "Q", "D"):
            assert got[column] == r[column] == float(line[column])
        assert got["fdr_q"] == r["q"]
        assert (got["k"], got["called"], got["causal"], got["diagnosis"]) == tuple(
            r[c] for c in ("k", "called", "causal", "diagnosis")
        )
        assert got["clusters"] == [c["name"] for c in r["clusters"]]
        assert line["clusters"] == "; ".join(got["clusters"])
        assert line["called"] == str(r["called"]).lower()


def test_exports_of_everything_and_of_nothing(viewer: Viewer, rows: list[Row]) -> None:
    every = pq.read_table(io.BytesIO(viewer.get("/neurons.parquet").body))
    assert every.num_rows == len(rows)
    assert every["reason"].null_count == sum(r["reason"] is None for r in rows)
    nothing = viewer.get("/neurons.parquet?min_S=0.9999")
    assert pq.read_table(io.BytesIO(nothing.body)).num_rows == 0
    assert len(viewer.page("/neurons.csv?min_S=0.9999").splitlines()) == 1


def test_a_neurons_page_has_its_numbers_clusters_and_nulls(viewer: Viewer, rows: list[Row], out: Path) -> None:
    r = next(r for r in rows if r["neuron"] == 1 and r["status"] == "ok")
    page = viewer.page(f"/neuron?layer={r['layer']}&neuron=1")
    for value in (r["S"], r["Q"], r["D"], r["specific_log_psi"], r["paper_log_psi"]):
        assert words.number(value, 3) in page
    for c in r["clusters"]:
        assert f"<h3><bdi>{c['name']}</bdi></h3>" in page
    assert page.count('src="data:image/jpeg;base64,') >= 4 * len(r["clusters"])
    pool = [
        d["S"]
        for d in polyray.open(out)["nulls"].to_table().to_pylist()
        if d["layer"] == r["layer"] and d["kind"] == "pool" and d["k"] > 1
    ]
    n_above = sum(s >= r["S"] for s in pool)
    assert f"{n_above} of {len(pool)} draws of random patches as high" in page
    assert f"<h3>Cluster 0: <bdi>{r['clusters'][0]['name']}</bdi></h3>" in page


def test_a_histogram_counts_every_draw_once_and_marks_the_value() -> None:
    draws = [0.0, 0.1, 0.1, 0.5, None, math.nan, 1.0]
    found = charts.histogram(draws, 0.5)
    assert found is not None
    heights = [b["h"] for b in found["bars"]]
    assert sum(heights) / charts.HEIGHT * 2 == pytest.approx(5, abs=0.01)  # two draws make the highest bar
    assert (found["n"], found["n_above"]) == (5, 2)
    assert found["at"] == pytest.approx((0.5 - found["low"]) / (found["high"] - found["low"]) * charts.WIDTH, abs=0.01)
    assert charts.histogram([None], 0.5) is None


def test_the_language_page_tells_tokens_precursors_and_the_curve(tmp_path: Path) -> None:
    with viewing(language(tmp_path / "out")) as viewer:
        page = viewer.page("/neuron?layer=h.1&neuron=0")
        assert page.index("<bdi>zebra</bdi>") < page.index("<bdi>zebras</bdi>") < page.index("<bdi>␣the</bdi>")
        assert 'href="/neuron?layer=h.0&amp;neuron=1"' in page
        assert "h.0</bdi> · 1" in page
        assert "<td>yes</td>" in page
        assert page.count("<polyline") == 4  # the neuron's and one control's, and both in the legend
        assert "rank deficient" in page
        assert "weak first component" in page
        assert "<mark><bdi>zebra</bdi></mark> <bdi>zebras</bdi>" in page
        assert "0.0100" in page
        assert "0.0020" in page
        below = viewer.page("/neuron?layer=h.0&neuron=0")
        assert 'href="/neuron?layer=h.1&amp;neuron=0"' in below  # what it feeds
        assert "no layer stands before it" in below
        found = viewer.page("/search?q=zebra")
        assert shown(found) == [("h.0", 0), ("h.1", 0), ("h.0", 1), ("h.1", 1), ("h.0", 0), ("h.1", 0)]
        assert "6 core-tokens of 4 neurons" in found
        assert shown(viewer.page("/neurons?min_tau=0.5")) == [("h.1", 0)]


def test_the_language_map_has_its_controls_beside_it(tmp_path: Path) -> None:
    with viewing(language(tmp_path / "out")) as viewer:
        page = " ".join(re.sub(r"<[^>]*>", " ", viewer.page("/")).split()).replace(" ;", ";")
    assert "positive difference 100.0 % 1 of 1; random precursors 75.0 %; tokens replaced 25.0 %" in page
    first, second = page[page.index(" h.0 ") :].split(" h.1 ", 1)
    assert "100.0 % 62.5 % 50.0 % 1 " in second
    assert "– – – – 0 0 1" in first  # median, positive and both controls; none qualifies, none excluded, one failed


def test_words_say_what_is_missing_and_never_round_to_nothing() -> None:
    assert [words.number(x) for x in (None, 0, -0.5, 1234.5, 0.0001, math.nan)] == [
        "–", "0.000", "−0.500", "1,234.500", "1.0e−04", "nan"
    ]  # fmt: skip
    assert [words.probability(x) for x in (None, 1.0, 0.25, 0.05, 0.003, 2e-7, 0)] == [
        "–", "1.00", "0.25", "0.050", "0.003", "2.0e−07", "0.000"
    ]  # fmt: skip
    assert [words.share(x, 1) for x in (None, 0, 0.5, 0.0001)] == ["–", "0.0 %", "50.0 %", "<0.1 %"]


def test_the_page_of_a_neuron_over_documents_has_its_snippets(tmp_path: Path) -> None:
    store = begun(tmp_path / "out", {"h.1": 1}, "psi_text")
    cluster = {"neuron": 0, "cluster": 0, "size": 5, "name": "letters", "name_score": 0.5, "names": ["letters", "mail"]}
    cluster |= {"label": "news", "label_frac": 0.4, "snippets": ["she wrote a «letter»", None, "no peak <b>here</b>"]}
    example = {"neuron": 0, "rank": 0, "example": 7, "activation": 1.5, "position": 3, "label": "news", "patch_id": 1}
    example |= {"x0": 1000, "y0": 0, "x1": 1024, "y1": 1, "cluster": 0}
    tables = {"neurons": [scored(0)], "clusters": [cluster], "examples": [example]}
    put_rows(store, "all", "calibrate", tables, "h.1")
    store.finish()
    with viewing(tmp_path / "out") as viewer:
        page = viewer.page("/neuron?layer=h.1&neuron=0")
        assert "<bdi>she wrote a <mark>letter</mark></bdi>" in page
        assert "<bdi>no peak &lt;b&gt;here&lt;/b&gt;</bdi>" in page
        assert "also near: <bdi>mail</bdi>" in page
        assert "1,000 – 1,024" in page
        assert "thumbnail" not in page
        with pytest.raises(DataError, match="only sweeps over images"):
            Pictures(Catalog(tmp_path / "out"))
