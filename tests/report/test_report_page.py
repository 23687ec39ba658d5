"""The report as a file: it opens offline, nothing of the dataset becomes markup, and anyone can read it."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import yaml
from browser import Visits, grave_violations
from click.testing import Result
from report import made
from sweeps import Finished, command, printed_json

import polyray
from polyray.files import put_if_absent
from polyray.report import cards
from polyray.report.cards import snippet
from polyray.report.catalog import Catalog
from polyray.report.command import write_report
from polyray.report.content import Snippet
from polyray.report.markdown import escaped
from polyray.report.source import Source
from polyray.report.story import tell
from polyray.schema import VERSION
from polyray.verify import verify

MOST_BYTES = 10_000_000
MAKERS = {
    "psi": lambda out: made.census(out, layers=("stem", made.HOSTILE, "mid.10"), name=made.HOSTILE),
    "categorical": lambda out: made.language(out, name=made.HOSTILE),
    "layer": lambda out: made.census(out, stop="layer"),
    "unsummarised": lambda out: made.census(out, stop="summarise"),
    "language unfinished": lambda out: made.language(out, finish=False),
    "no pictures": lambda out: made.census(out, pictures=False),
    "empty": lambda out: made.store_at(out),
}
"""Datasets of every shape: whole ones with hostile names, partial ones, and one with nothing but run.json."""


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for i, make in enumerate(MAKERS.values()):
        make(folder / f"out{i}")
    return {name: folder / f"out{i}" for i, name in enumerate(MAKERS)}


@pytest.fixture(scope="module")
def pages(outs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    made_of = {name: folder / f"{i}.html" for i, name in enumerate(outs)}
    for name, out in outs.items():
        write_report(str(out), made_of[name], False, None)
    return made_of


@pytest.fixture(params=list(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_page_holds_all_that_it_needs(pages: dict[str, Path], kind: str) -> None:
    data = pages[kind].read_bytes()
    assert len(data) < MOST_BYTES
    page = Page(data.decode())
    assert page.of("script") == page.of("link") == page.of("iframe") == page.of("object") == []
    addresses = [
        a for _, of in page.elements for n, a in of.items() if n in ("src", "href", "srcset", "data", "action")
    ]
    assert addresses
    ids = {of["id"] for _, of in page.elements if "id" in of}
    for address in addresses:
        assert address is not None
        assert address.startswith("data:image/jpeg;base64,") or (address[0] == "#" and address[1:] in ids), address
    assert not re.search(r"url\(|@import", data.decode())
    assert not [n for _, of in page.elements for n in of if n.startswith("on")]
    assert len(ids) == len([1 for _, of in page.elements if "id" in of])
    assert [of["content"] for of in page.of("meta") if of.get("http-equiv")] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]


def test_a_page_has_landmarks_headings_in_order_and_named_figures(pages: dict[str, Path], kind: str) -> None:
    page = Page(pages[kind].read_text())
    assert [len(page.of(t)) for t in ("header", "main", "nav", "h1", "footer")] == [1] * 5
    levels = [int(t[1]) for t, _ in page.elements if re.fullmatch("h[1-6]", t)]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert len(page.of("figure")) == len(page.of("figcaption"))
    for svg in page.of("svg"):
        assert svg["role"] == "img"
        assert len(str(svg["aria-label"])) > 20
    assert all(of["scope"] in ("col", "row") for of in page.of("th"))
    assert len(page.of("table")) == len(page.of("caption"))
    assert all(of["alt"] for of in page.of("img"))


def test_pages_open_without_errors_and_can_be_read_by_all(visit: Visits, pages: dict[str, Path]) -> None:
    for name in ("psi", "categorical", "layer", "empty"):
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = visit(pages[name].as_uri(), color_scheme=scheme, viewport={"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert grave_violations(page) == []
            assert page.evaluate("document.images.length") == page.evaluate(
                "[...document.images].filter(i => i.naturalWidth == 64).length"
            )


def test_print_shows_what_is_folded_on_white(visit: Visits, pages: dict[str, Path]) -> None:
    page = visit(pages["psi"].as_uri(), color_scheme="dark")
    table = page.locator("details table").first
    assert not table.is_visible()
    page.emulate_media(media="print")
    assert table.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()


def test_the_keyboard_reaches_the_report_and_its_tables(visit: Visits, pages: dict[str, Path]) -> None:
    page = visit(pages["psi"].as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.tagName + (document.activeElement.className || '')"))
    assert {"SUMMARY"} <= seen
    assert any(s.startswith("DIVscroll") for s in seen)


def test_hostile_names_are_shown_as_text(visit: Visits, pages: dict[str, Path]) -> None:
    for name in ("psi", "categorical"):
        text = Page(pages[name].read_text()).text
        assert "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`|*_[a]" in text
        assert "⟨U+202E⟩evil⟨U+2066⟩␀␇␊end" in text
        raw = pages[name].read_bytes().decode()
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", raw)
        page = visit(pages[name].as_uri())
        asked: list[str] = []
        page.on("dialog", lambda d, asked=asked: asked.append(d.message))
        page.reload()
        assert page.evaluate("document.scripts.length") == 0
        assert page.locator("svg script, svg img, a[href^=http], img[src=x]").count() == 0
        assert asked == []


def test_settings_can_be_copied_and_hide_nothing(outs: dict[str, Path], visit: Visits, pages: dict[str, Path]) -> None:
    page = visit(pages["psi"].as_uri())
    text = page.locator("pre[aria-label='census.yaml'] code").evaluate("e => e.textContent")
    assert text.isascii()
    assert yaml.safe_load(text) == {"science": polyray.open(outs["psi"]).run["config"]["science"]}
    command_line = page.locator("pre[aria-label='Command'] code").evaluate("e => e.textContent").splitlines()
    assert command_line[0] == "polyray run census.yaml --out OUT"
    assert len(command_line) == 3
    assert command_line[1].startswith("polyray sensitivity OUT --vary 'prompts=</script>")


# What is not there


def test_partial_failed_and_empty_runs_say_so(pages: dict[str, Path]) -> None:
    said = {name: Page(path.read_text()).text for name, path in pages.items()}
    assert "Not finished." not in said["psi"]
    assert "the rows committed so far" in said["layer"]
    assert "There is no AUROC yet" in said["layer"]
    assert "Diagnoses are made by the last stages" in said["unsummarised"]
    assert "Nothing is committed yet" in said["empty"]
    assert "no layer is known yet" in said["empty"].lower()
    assert "share of positive differences yet" in said["language unfinished"]
    assert "the order matter" not in said["language unfinished"]
    assert said["layer"].count("Not here.") > 3


def test_cards_without_pictures_say_so(pages: dict[str, Path]) -> None:
    page = Page(pages["no pictures"].read_text())
    assert page.of("img") == []
    assert page.text.count("No pictures or texts of this cluster are in the dataset.") == 48
    assert Page(pages["psi"].read_text()).text.count("being no JPEG of a thumbnail's size: 1.") == 48


def test_pictures_that_were_not_asked_for(tmp_path: Path) -> None:
    made.census(tmp_path / "out", layers=("one",), pictures=False, extract={"thumbnails": False})
    write_report(str(tmp_path / "out"), tmp_path / "r.html", False, None)
    text = Page((tmp_path / "r.html").read_text()).text
    assert "the sweep was asked to store none" in text
    assert "There is one layer only" in text


def test_the_page_stays_small_where_pictures_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = made.thumbnail(0) + bytes(np.random.default_rng(0).bytes(60_000))
    monkeypatch.setattr(made, "thumbnail", lambda seed: big)
    made.census(tmp_path / "out", layers=("one",))
    written = write_report(str(tmp_path / "out"), tmp_path / "r.html", False, None)
    assert written["bytes"] == (tmp_path / "r.html").stat().st_size < MOST_BYTES
    assert "no room left on this page" in (tmp_path / "r.html").read_text()
    assert cards.MOST_BYTES * 4 / 3 < MOST_BYTES / 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one «two» three", Snippet("one ", "two", " three")),
        ("no peak at all", Snippet("no peak at all", "", "")),
        ("« only a beginning", Snippet("« only a beginning", "", "")),
        ("a" * 200 + "«\x00»", Snippet("…" + "a" * 90, "␀", "")),
    ],
)
def test_snippets_are_cut_around_their_peak(text: str, found: Snippet) -> None:
    assert snippet(text) == found


# Markdown and SVG


def test_markdown_has_whole_tables_and_figures_beside_it(outs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("psi", "categorical"):
        path = tmp_path / f"the {name}.md"
        written = write_report(str(outs[name]), path, True, None)
        text = path.read_text()
        linked = re.findall(r"!\[.*\]\(([^)]*)\)", text)
        assert sorted(x.rpartition("/")[2] for x in linked) == sorted(Path(p).name for p in written["figures"])
        assert {x.partition("/")[0] for x in linked} == {f"the%20{name}-figures"}
        assert {str(Path(p).parent) for p in written["figures"]} == {str(tmp_path / f"the {name}-figures")}
        for figure in written["figures"]:
            root = ET.fromstring(Path(figure).read_text())
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert root.find("{http://www.w3.org/2000/svg}style") is not None
            assert root.findall(".//{http://www.w3.org/2000/svg}text")
        width = 0
        for line in text.splitlines():
            if not line.startswith("|"):
                width = 0
                continue
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert width in (0, cells)
            width = cells
        assert "\\<script\\>alert(1)\\</script\\>" in text
        assert "<script" not in re.sub(r"\\<", "", re.sub("(?s)```.*?```", "", text))
        assert "http\\://x.test" in text


def test_what_markdown_reads_as_its_own_is_escaped() -> None:
    assert escaped("a|b_c*[x](y)<i>`#~$&amp;!") == r"a\|b\_c\*\[x\](y)\<i\>\`\#\~\$\&amp;\!"
    assert escaped("www.a.b http://c a@b 1.5: x") == r"www\.a.b http\://c a\@b 1.5: x"


def test_figures_are_written_where_they_are_asked_for(outs: dict[str, Path], tmp_path: Path) -> None:
    result = command("report", outs["psi"], "--out", tmp_path / "r.html", "--svg", tmp_path / "deep" / "svg", "--json")
    written = printed_json(result)
    assert result.exit_code == 0
    assert written["figures"] == [str(p) for p in sorted((tmp_path / "deep/svg").iterdir(), key=_order(written))]
    assert len(written["figures"]) >= 15


def _order(written: dict[str, Any]) -> Any:
    return lambda path: written["figures"].index(str(path))


# The command


def test_a_real_sweep_is_told_whole_and_while_it_runs(finished: Finished, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    assert printed_json(command("report", finished.out, "--out", path, "--json"))["finished"] is True
    told = Page(path.read_text())
    assert "Not finished." not in told.text
    n_ok = polyray.open(finished.out)["neurons"].filter(pc.field("status") == "ok").count_rows()
    assert 0 < n_ok < 41
    assert f"41 neurons, {n_ok} of them scored, in 5 layers" in told.text
    assert len(told.of("figure")) == 6
    running = Path(shutil.copytree(finished.out, tmp_path / "out"))
    (running / "_SUCCESS").unlink()
    assert printed_json(command("report", running, "--out", path, "--json"))["finished"] is False
    told = Page(path.read_text())
    assert "How far the sweep is" in told.text
    assert "actor-hours" in told.text


def test_the_command_writes_into_the_dataset_and_says_where(outs: dict[str, Path]) -> None:
    out = outs["no pictures"]
    before = verify(out).ok
    result = command("report", out)
    assert result.exit_code == 0, result.output
    assert f"{out}/report.html (" in result.stdout
    assert "MB)" in result.stdout
    assert command("report", out, "--markdown").exit_code == 0
    assert {"report.html", "report.md", "report-figures"} <= {p.name for p in out.iterdir()}
    assert verify(out).ok == before is True, "a report is no part of the dataset"
    assert write_report(str(out), None, False, None)["finished"] is True


def test_the_command_says_that_a_sweep_is_not_finished(outs: dict[str, Path], tmp_path: Path) -> None:
    result = command("report", outs["layer"], "--out", tmp_path / "r.html")
    assert result.exit_code == 0
    assert "not finished" in result.stdout
    assert printed_json(command("report", outs["layer"], "--out", tmp_path / "r.html", "--json"))["finished"] is False


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    printed = printed_json(result)
    assert (printed["error"], printed["exit"]) == ("StoreError", 2)
    assert "Traceback" not in result.output
    return str(printed["message"])


def test_what_cannot_be_read_or_written_is_refused(outs: dict[str, Path], tmp_path: Path) -> None:
    out = outs["unsummarised"]
    assert "there is no folder" in refused(command("report", tmp_path / "nowhere", "--json"))
    assert "holds no run" in refused(command("report", tmp_path, "--json"))
    (tmp_path / "file").write_text("")
    said = refused(command("report", out, "--json", "--out", tmp_path / "file" / "r.html"))
    assert "cannot write" in said
    assert "it is a folder" in refused(command("report", out, "--json", "--out", tmp_path))
    said = refused(command("report", out, "--json", "--out", "/proc/1/nothing/r.html"))
    assert "cannot write '/proc/1/nothing/r.html'" in said
    assert not (out / "report.html").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_dataset_in_an_object_store_needs_a_place_for_the_report() -> None:
    assert "--out" in refused(command("report", "s3://bucket/out", "--json"))


def versioned(out: Path, version: object) -> Path:
    run = json.loads((out / "run.json").read_text())
    run["schema_version"] = version
    (out / "run.json").unlink()
    assert put_if_absent(out / "run.json", json.dumps(run).encode())
    return out


@pytest.mark.parametrize("version", [VERSION + 1, "new", None])
def test_a_newer_dataset_is_refused(outs: dict[str, Path], tmp_path: Path, version: object) -> None:
    out = versioned(Path(shutil.copytree(outs["layer"], tmp_path / "out")), version)
    said = refused(command("report", out, "--json"))
    assert f"version {version} of the tables" in said
    assert f"none after {VERSION}" in said
    assert not (out / "report.html").exists()
    for words in (("status", out), ("verify", out), ("sensitivity", out, "--vary", "K=22")):
        assert f"version {version} of the tables" in refused(command(*words, "--json"))


def test_an_older_dataset_is_told_and_its_version_said(outs: dict[str, Path], tmp_path: Path) -> None:
    out = versioned(Path(shutil.copytree(outs["layer"], tmp_path / "out")), VERSION - 1)
    assert command("report", out).exit_code == 0
    assert f"has version {VERSION - 1} of the tables" in Page((out / "report.html").read_text()).text


def test_a_part_that_is_gone_is_refused(outs: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(outs["no pictures"], tmp_path / "out"))
    next((out / "neurons").rglob("*.parquet")).unlink()
    assert "polyray verify" in refused(command("report", out, "--json"))


def test_parts_that_are_merged_meanwhile_are_read_anew(
    outs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyray.errors import StoreError

    calls = []
    table = Catalog.table

    def once_gone(self: Catalog, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 5:
            raise StoreError("gone")
        return table(self, *args)

    monkeypatch.setattr(Catalog, "table", once_gone)
    assert write_report(str(outs["layer"]), tmp_path / "r.html", False, None)["bytes"] > 1000
    assert len({id(c) for c in calls}) == 2
    calls.clear()
    with pytest.raises(StoreError, match="gone"):
        write_report(str(outs["psi"]), tmp_path / "r.html", False, None)


def test_the_same_dataset_gives_the_same_page(outs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(str(outs["psi"]), tmp_path / name, False, None)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert tell(Source(outs["psi"])) == tell(Source(outs["psi"]))


def test_templates_are_part_of_the_package() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert '"report/templates/*"' in pyproject.read_text()
    folder = resources.files("polyray.report") / "templates"
    assert {f.name for f in folder.iterdir()} >= {"report.html", "report.css", "chart.css"}
