"""Who gets an answer, and what can be in it: no other origin, no other file, no markup out of a dataset."""

import csv
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from viewing import CONTROL, FORMULA, HOSTILE, LAYER, QUOTES, SCRIPT, TURNED, Viewer, hostile, language, served, viewing

from polyray.report.catalog import Catalog
from polyray.view import words
from polyray.view.app import application
from polyray.view.guard import HEADERS
from polyray.view.serve import listening

ESCAPED = quote(LAYER, safe="")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile(tmp_path_factory.mktemp("hostile") / "out")


@pytest.fixture(scope="module")
def viewer(out: Path) -> Iterator[Viewer]:
    with viewing(out, probe=True) as found:
        yield found


PATHS = [
    "/",
    "/neurons",
    "/neurons.csv",
    "/neurons.parquet",
    "/search?q=a",
    "/help",
    f"/neuron?layer={ESCAPED}&neuron=0",
    "/image?example=3",
    f"/thumbnail?layer={ESCAPED}&neuron=0&cluster=0&i=0",
    "/static/view.css",
    "/nothing",
    "/neurons?min_S=x",
]


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_fenced_in(viewer: Viewer, path: str) -> None:
    found = viewer.get(path)
    for name, value in HEADERS.items():
        assert found.headers[name.lower()] == value
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert not any(name.startswith("access-control") for name in found.headers)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_there_answers_head_without_a_body(viewer: Viewer, path: str) -> None:
    found = viewer.get(path, "HEAD")
    assert found.status == viewer.get(path).status
    assert found.body == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_nothing_but_reading_can_be_asked_for(viewer: Viewer, method: str) -> None:
    found = viewer.get("/", method)
    assert (found.status, found.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("host", ["elsewhere.org", "127.0.0.1", "localhost:1", "127.0.0.1.elsewhere.org:{port}", ""])
def test_a_name_that_was_pointed_here_gets_no_answer(viewer: Viewer, host: str) -> None:
    found = viewer.get("/", Host=host.format(port=viewer.port))
    assert found.status == 421
    assert b"<html" not in found.body


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}"])
def test_the_viewers_own_names_are_answered(viewer: Viewer, host: str) -> None:
    assert viewer.get("/", Host=host.format(port=viewer.port)).status == 200


def test_pages_of_another_origin_get_nothing_but_may_link_here(viewer: Viewer) -> None:
    own = f"http://127.0.0.1:{viewer.port}"
    assert viewer.get("/", Origin="https://elsewhere.org").status == 403
    assert viewer.get("/", Origin="null").status == 403
    assert viewer.get("/", Origin=f"http://localhost:{viewer.port + 1}").status == 403
    assert viewer.get("/", Origin=own).status == 200
    for site in ("cross-site", "same-site"):
        assert viewer.get("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
        assert viewer.get("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 200
    assert viewer.get("/", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors").status == 200


ESCAPES = [
    "../run.json",
    "../../../../../../etc/passwd",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "..%252f..%252fetc%252fpasswd",
    "..%5c..%5cetc%5cpasswd",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "//etc/passwd",
    "....//....//etc/passwd",
    "view.css/../../__init__.py",
    "view.css%00.js",
    "..%c0%af..%c0%afetc/passwd",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("below", ["/static/", "/", "/image/", "/thumbnail/", "/neuron/"])
def test_no_path_reaches_a_file(viewer: Viewer, below: str, escape: str) -> None:
    found = viewer.get(below + escape)
    assert found.status in (400, 404)
    assert b"root:" not in found.body
    assert b"run_id" not in found.body
    assert b"import" not in found.body


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize(
    "path",
    [
        "/image?example={}",
        "/thumbnail?layer={}&neuron=0&cluster=0&i=0",
        f"/thumbnail?layer={ESCAPED}&neuron={{}}&cluster=0&i=0",
        f"/thumbnail?layer={ESCAPED}&neuron=0&cluster=0&i={{}}",
        "/neuron?layer={}&neuron=0",
        "/neurons?layer={}",
        "/neurons.csv?sort={}",
    ],
)
def test_no_parameter_reaches_a_file(viewer: Viewer, path: str, escape: str) -> None:
    for written in (escape, quote(escape, safe="")):
        found = viewer.get(path.format(written))
        assert found.status in (400, 404)
        assert b"root:" not in found.body


def test_only_what_belongs_to_the_viewer_is_static(viewer: Viewer) -> None:
    folder = resources.files("polyray.view") / "static"
    names = sorted(f.name for f in folder.iterdir())
    assert names == ["icon.svg", "view.css", "view.js"]
    for name in names:
        assert viewer.get(f"/static/{name}").body == (folder / name).read_bytes()
    assert (resources.files("polyray.view") / "templates" / "base.html").is_file()


@pytest.mark.parametrize(
    "value", ["' OR '1'='1", "x'; DROP TABLE neurons_0; --", "S) FROM read_text('/etc/passwd') --", "rowid; SELECT 1"]
)
def test_values_are_bound_and_columns_come_from_a_list(viewer: Viewer, value: str) -> None:
    written = quote(value, safe="")
    before = viewer.page("/neurons")
    for key in ("layer", "status", "sort", "preset", "min_S", "diagnosis", "called", "page", "per", value):
        assert viewer.get(f"/neurons?{quote(key, safe='')}={written}").status == 400
    assert "No neuron is like this" in viewer.page(f"/neurons?name={written}")
    assert "No cluster is called" in viewer.page(f"/search?q={written}")
    assert viewer.page("/neurons") == before


KNOWN_TAGS = set(
    """html head meta title link script body a header nav ul ol li form label input button main h1 h2 h3 p div dl dt
    dd small table caption thead tbody tr th td span svg rect line polygon polyline text bdi details summary
    footer code kbd dialog section select option fieldset legend figure figcaption img b br mark""".split()
)


class Attributes(HTMLParser):
    """Tags and attributes of a page, as a parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names += [name for name, _ in attrs]


@pytest.mark.parametrize("path", ["/", "/neurons", "/search?q=e", f"/neuron?layer={ESCAPED}&neuron=0"])
def test_texts_of_the_dataset_are_never_markup(viewer: Viewer, path: str) -> None:
    page = viewer.page(path)
    assert page.count("<script") == 1  # the viewer's own
    seen = re.sub(r' value="[^"]*"', "", page)  # what a form sends back is as it was
    for raw in (
        SCRIPT,
        QUOTES,
        "<img src=x",
        "\u202e",
        "\u2066",
        "\ufeff",
        "\x07",
        "\x00",
        "<b>&",
        "style=",
        "javascript:",
    ):
        assert raw not in seen
    assert "&lt;script&gt;window.harmed = 1&lt;/script&gt;" in page
    parsed = Attributes(page)
    assert [name for name in parsed.names if name.startswith("on")] == []
    assert set(parsed.tags) <= KNOWN_TAGS


def test_every_hostile_name_can_be_read(viewer: Viewer) -> None:
    page = viewer.page("/neurons")
    assert "<bdi>evil⟨U+202E⟩gnp.exe</bdi>" in page
    assert "bell␇ line␊null␀" in page
    assert "<bdi>{{ 7*7 }}</bdi>" in page
    assert "<bdi>../../../etc/passwd</bdi>" in page
    for i in range(len(HOSTILE)):
        assert viewer.get(f"/neuron?layer={ESCAPED}&neuron={i}").status == 200


def test_what_a_person_types_is_no_markup_either(viewer: Viewer) -> None:
    written = quote(f"{SCRIPT}{QUOTES}{TURNED}", safe="")
    for path in (
        f"/search?q={written}",
        f"/neurons?name={written}",
        f"/neurons?layer={written}",
        f"/neurons?{written}=1",
    ):
        page = viewer.get(path).text
        assert page.count("<script") == 1
        assert "<img" not in page


def test_language_tokens_are_no_markup(tmp_path: Path) -> None:
    with viewing(language(tmp_path / "out")) as viewer:
        for path in ("/", "/neurons", "/neuron?layer=h.1&neuron=0", "/search?q=script"):
            page = viewer.page(path)
            assert page.count("<script") == 1
            assert "\u202e" not in page


def test_only_jpegs_are_pictures(viewer: Viewer) -> None:
    page = viewer.page(f"/neuron?layer={ESCAPED}&neuron=0")
    assert page.count('src="data:image/jpeg;base64,/9j/') == page.count('src="data:') == 2
    assert "the stored picture is no JPEG" in page
    assert "onload" not in page
    at = f"/thumbnail?layer={ESCAPED}&neuron=0&cluster=0&i="
    assert viewer.get(at + "0").headers["content-type"] == "image/jpeg"
    for i in (1, 2, 3):
        found = viewer.get(f"{at}{i}")
        assert found.headers["content-type"] == "image/svg+xml"
        assert b"no picture" in found.body
        assert b"onload" not in found.body


def test_no_cell_of_a_csv_is_a_formula(viewer: Viewer, tmp_path: Path) -> None:
    lines = list(csv.reader(io.StringIO(viewer.get("/neurons.csv").text)))
    numeric = {4, 5, 6, 8, 9, 10, 11}
    for line in lines[1:]:
        for i, cell in enumerate(line):
            assert i in numeric or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert lines[3][-1] == "'" + FORMULA
    assert [words.cell(x) for x in ("-1", "+1", "@a", "=a", "\t=a", " =a", "a=b", "", "−")] == [
        "'-1", "'+1", "'@a", "'=a", "'\t=a", "' =a", "a=b", "", "−"
    ]  # fmt: skip


def test_control_characters_are_seen() -> None:
    assert words.clean(CONTROL) == "bell␇ line␊null␀"
    assert words.clean("a\u200bb\u2028c\x7f\x9b\U000e0041") == "a⟨U+200B⟩b⟨U+2028⟩c␡⟨U+009B⟩⟨U+E0041⟩"
    assert words.clean("zébra 斑馬 שלום 🦓") == "zébra 斑馬 שלום 🦓"
    assert words.said("<b>\u202e") == "<bdi>&lt;b&gt;⟨U+202E⟩</bdi>"
    assert words.peak("a <b>«c»</b>") == "<bdi>a &lt;b&gt;<mark>c</mark>&lt;/b&gt;</bdi>"


def test_two_viewers_in_one_process_and_below_a_path(out: Path, tmp_path: Path) -> None:
    other = language(tmp_path / "other")
    both = Starlette(routes=[Mount("/one", application(Catalog(out))), Mount("/two", application(Catalog(other)))])
    with served(both, listening(0)) as viewer:
        first, second = viewer.page("/one/neurons"), viewer.page("/two/neurons")
        assert 'href="/one/neuron?layer=' in first
        assert 'href="/two/neuron?layer=' in second
        for page, root in ((first, "/one/"), (second, "/two/")):
            links = [part.split('"')[0] for part in page.split('href="')[1:]]
            assert [x for x in links if not x.startswith((root, "#"))] == []
        assert viewer.get("/one/static/view.css").status == 200
        assert 'href="/one/neurons?preset=paper"' in first
