"""Every view in a real browser: without an error, open to everyone, and from the map to a swap by mouse and by keys."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import Visits, grave_violations
from censuses import census, put_rows
from playwright.sync_api import Page, expect
from viewing import LAYER, Viewer, begun, hostile, language, scored, viewing

from polyray.store import Store
from polyray.view import site

HIDDEN = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    out = census(tmp_path_factory.mktemp("pages") / "out", n_neurons=300, n_layers=3, n_detailed=4)
    with viewing(out, probe=True) as found:
        yield found


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    with viewing(language(tmp_path_factory.mktemp("language") / "out")) as found:
        yield found


@pytest.fixture(scope="module")
def harmful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    with viewing(hostile(tmp_path_factory.mktemp("hostile") / "out")) as found:
        yield found


VIEWS = {
    "viewer": [
        "/",
        "/?preset=paper",
        "/neurons",
        "/neurons?status=failed&status=excluded&min_k=2&name=zebra&layer=blocks.1",
        "/neurons?status=excluded",
        "/neuron?layer=blocks.1&neuron=1",
        "/search",
        "/search?q=zebra",
        "/search?q=nobody+is+called+so",
        "/help",
    ],
    "spoken": ["/", "/neurons", "/neuron?layer=h.1&neuron=0", "/neuron?layer=h.0&neuron=2", "/search?q=zebra", "/help"],
    "harmful": ["/", "/neurons", f"/neuron?layer={quote(LAYER, safe='')}&neuron=1", "/search?q=script"],
}
ALL = [(name, path) for name, paths in VIEWS.items() for path in paths]


def settled(page: Page) -> Page:
    """Pictures that load when they are seen are seen."""
    page.evaluate("() => document.querySelectorAll('img[loading]').forEach((i) => { i.loading = 'eager'; })")
    page.wait_for_load_state("networkidle")
    return page


@pytest.mark.parametrize(("which", "path"), ALL)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_view_has_no_error_and_no_grave_violation(
    request: pytest.FixtureRequest, visit: Visits, which: str, path: str, scheme: str
) -> None:
    viewer: Viewer = request.getfixturevalue(which)
    page = settled(visit(viewer.address + path, color_scheme=scheme))
    assert grave_violations(page) == []
    assert page.locator("h1").count() == 1
    levels = [int(e.evaluate("e => e.tagName[1]")) for e in page.locator("main :is(h1, h2, h3)").all()]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.evaluate("() => window.harmed") is None
    broken = page.evaluate("() => [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)")
    assert broken == []


@pytest.mark.parametrize(("which", "path"), ALL)
def test_no_view_is_wider_than_a_phone(request: pytest.FixtureRequest, visit: Visits, which: str, path: str) -> None:
    viewer: Viewer = request.getfixturevalue(which)
    page = visit(viewer.address + path, viewport={"width": 390, "height": 800})
    assert page.evaluate(HIDDEN) == 0
    assert grave_violations(page) == []


@pytest.mark.parametrize("script", [True, False])
def test_from_the_map_to_a_swap(viewer: Viewer, visit: Visits, script: bool) -> None:
    page = visit(viewer.address, java_script_enabled=script)
    page.get_by_role("link", name="blocks.2", exact=True).click()
    expect(page).to_have_url(re.compile(r"/neurons\?layer=blocks\.2$"))
    expect(page.get_by_role("status")).to_contain_text("of 100 neurons")
    page.get_by_role("link", name=re.compile("^causal")).click()
    page.get_by_label("causal").select_option("yes")
    page.get_by_role("button", name="Apply").click()
    rows = page.get_by_role("region", name="Neurons").get_by_role("rowheader")
    first = rows.first.inner_text()
    rows.first.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(first)
    page.get_by_role("link", name="patch swaps").click()
    expect(page).to_have_url(re.compile("#swaps$"))
    expect(page.get_by_text("causal", exact=True)).to_be_visible()
    expect(page.get_by_role("img", name="aligned", exact=True).first).to_be_visible()
    expect(page.get_by_role("rowheader", name="aligned − random")).to_be_visible()


def test_the_same_by_keys_alone(viewer: Viewer, visit: Visits) -> None:
    page = visit(viewer.address)

    def press(key: str) -> None:
        page.wait_for_load_state()  # before that no script listens
        page.keyboard.press(key)

    press("j")
    press("j")
    focused = page.locator(":focus")
    expect(focused).to_have_text("blocks.1")
    press("k")
    expect(focused).to_have_text("blocks.0")
    press("ArrowDown")
    expect(focused).to_have_text("blocks.1")
    press("Enter")
    expect(page).to_have_url(re.compile(r"layer=blocks\.1"))
    press("n")
    expect(page).to_have_url(re.compile("page=2"))
    press("p")
    expect(page.get_by_text("page 1 of 2")).to_be_visible()
    press("j")
    name = focused.inner_text()
    press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(name)
    press("/")
    expect(focused).to_have_attribute("id", "q")
    page.keyboard.type("zebra jkn?")  # while one types, keys are letters
    expect(focused).to_have_value("zebra jkn?")
    press("Escape")
    press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    press("?")
    expect(page.get_by_role("dialog")).to_have_count(0)
    press("m")
    expect(page).to_have_url(viewer.address + "/")
    press("t")
    expect(page.get_by_role("heading", name="Neurons", level=1)).to_be_visible()


def test_a_search_by_concept_and_its_address(viewer: Viewer, visit: Visits) -> None:
    page = visit(viewer.address)
    page.keyboard.press("/")
    page.keyboard.type("zebra")
    page.keyboard.press("Enter")
    expect(page).to_have_url(viewer.address + "/search?q=zebra")
    expect(page.get_by_role("heading", level=1)).to_have_text("“zebra”")
    page.get_by_role("link", name="names", exact=True).click()
    table = page.get_by_role("region", name="What was found")
    expect(table.get_by_role("cell", name="zebra", exact=True).first).to_be_visible()
    shared = visit(page.url)
    assert shared.locator("main").inner_text() == page.locator("main").inner_text()


def test_filters_make_short_addresses_and_show_what_they_were(viewer: Viewer, visit: Visits) -> None:
    page = visit(viewer.address + "/neurons")
    page.get_by_text("Ranges").click()
    page.get_by_label("S at least").fill("0.1")
    page.get_by_label("excluded").uncheck()
    page.get_by_role("button", name="Apply").click()
    expect(page).to_have_url(viewer.address + "/neurons?per=50&min_S=0.1")
    expect(page.get_by_label("S at least")).to_have_value("0.1")
    page.get_by_role("link", name="S", exact=True).click()
    expect(page.locator("th[aria-sort=descending]")).to_have_text("S ↓")
    page.get_by_role("link", name="S", exact=True).click()
    expect(page.locator("th[aria-sort=ascending]")).to_have_text("S ↑")
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert download.value.suggested_filename == "neurons.csv"
    page.get_by_role("link", name="clear all filters").click()
    expect(page.get_by_role("status")).to_contain_text("of 300 neurons")


def test_a_running_sweep_is_followed_without_losing_the_focus(
    visit: Visits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "REFRESH_S", 0.05)
    store: Store = begun(tmp_path / "out", {"a": 2, "b": 2})
    put_rows(store, "one", "calibrate", {"neurons": [scored(0)]}, "a")
    with viewing(tmp_path / "out") as viewer:
        page = visit(viewer.address)
        page.evaluate("() => { window.sameDocument = true; }")
        row = page.get_by_role("row", name=re.compile("^b "))
        expect(row).to_contain_text("0 of 2")
        page.keyboard.press("j")
        page.keyboard.press("j")
        expect(page.locator(":focus")).to_have_text("b")
        put_rows(store, "two", "calibrate", {"neurons": [scored(0), scored(1)]}, "b")
        expect(row.get_by_role("cell").first).to_have_text("2", timeout=30_000)
        expect(page.locator(":focus")).to_have_text("b")
        assert page.evaluate("() => window.sameDocument") is True
        assert grave_violations(page) == []
        store.finish()
        expect(page.locator("body")).to_have_attribute("data-running", "no", timeout=30_000)
