"""The token: who is let in, by what, and what never holds it."""

import http.client
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from browser import Visits, grave_violations
from viewing import SCRIPT, Answer, Viewer, hostile, served

from polyray.errors import ConfigError
from polyray.report.catalog import Catalog
from polyray.serving.gate import COOKIE, SHORTEST, TOKEN, Credentials, Gate, is_loopback, names, token_of
from polyray.view.app import application
from polyray.view.serve import hosts, listening

SECRET = "a-token-of-some-length"
HTML = "text/html,application/xhtml+xml"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    sock = listening(0)
    catalog = Catalog(hostile(tmp_path_factory.mktemp("guarded") / "out"))
    app = application(catalog, hosts=hosts(sock.getsockname()[1]))
    app.add_middleware(Gate, credentials=Credentials.of(SECRET))
    with served(app, sock) as viewer:
        yield viewer


def post(viewer: Viewer, body: str, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=60)
    given = {"Content-Type": "application/x-www-form-urlencoded", "Accept": HTML}
    connection.request("POST", "/login", body, given | {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    connection.close()
    return found


@pytest.mark.parametrize("path", ["/", "/neurons", "/neurons.csv", "/neuron?layer=plain&neuron=0", "/swap", "/nothing"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {SECRET}x"},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff\xfe"},
        {"Cookie": f"{COOKIE}={SECRET}"},
        {"Cookie": f"{COOKIE}=" + "0" * 64},
    ],
)
def test_nothing_is_shown_without_the_token(guarded: Viewer, path: str, headers: dict[str, str]) -> None:
    found = guarded.get(path, **headers)
    assert found.status == 401
    assert found.headers["www-authenticate"].startswith("Bearer")
    assert found.body == b"A token is needed: Authorization: Bearer TOKEN.\n"
    assert guarded.get(f"{path}{'&' if '?' in path else '?'}token={SECRET}").status == 401


def test_a_program_sends_the_token_in_a_header(guarded: Viewer) -> None:
    assert guarded.get("/", Authorization=f"Bearer {SECRET}").status == 200
    assert guarded.get("/", Authorization=f"bearer   {SECRET}").status == 200
    # A name that is not the viewer's own is no better with it.
    assert guarded.get("/", Authorization=f"Bearer {SECRET}", Host="elsewhere:80").status == 421
    assert guarded.get("/static/view.css").status == 200
    assert guarded.get("/static/../../etc/passwd").status == 404


def test_a_person_types_it_once(guarded: Viewer) -> None:
    form = guarded.get("/neuron?layer=plain&neuron=0", Accept=HTML)
    assert form.status == 401
    assert 'name="then" value="/neuron?layer=plain&amp;neuron=0"' in form.text
    entered = post(guarded, urlencode({"token": SECRET, "then": "/neuron?layer=plain&neuron=0"}))
    assert (entered.status, entered.headers["location"]) == (303, "/neuron?layer=plain&neuron=0")
    cookie, *settings = entered.headers["set-cookie"].split("; ")
    assert {s.lower() for s in settings} == {"httponly", "samesite=strict", "path=/"}
    assert SECRET not in cookie
    assert guarded.get("/", Cookie=cookie).status == 200
    assert guarded.get("/", Cookie=cookie[:-1]).status == 401
    assert guarded.get("/", Cookie=cookie, Authorization="Bearer wrong").status == 401


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (urlencode({"token": "wrong"}), {}, 401),
        (urlencode({"token": SCRIPT}), {}, 401),
        ("", {}, 401),
        ("token=" + "x" * 5000, {}, 413),
        (urlencode({"token": SECRET}), {"Origin": "http://elsewhere"}, 403),
        (urlencode({"token": SECRET}), {"Origin": "null"}, 403),
        (urlencode({"token": SECRET}), {"Sec_Fetch_Site": "cross-site"}, 403),
    ],
)
def test_what_is_not_the_token_gives_no_cookie(
    guarded: Viewer, body: str, headers: dict[str, str], status: int
) -> None:
    found = post(guarded, body, **headers)
    assert found.status == status
    assert "set-cookie" not in found.headers
    assert SCRIPT not in found.text


@pytest.mark.parametrize(
    "then",
    ["//elsewhere", "https://elsewhere", "/\\elsewhere", "\\\\elsewhere", "/a\r\nX: y", "javascript:1", "", "/login"],
)
def test_the_form_leads_nowhere_else(guarded: Viewer, then: str) -> None:
    assert post(guarded, urlencode({"token": SECRET, "then": then})).headers["location"] == "/"


def test_a_page_cannot_be_changed_through_the_gate(guarded: Viewer) -> None:
    assert guarded.get("/", "POST", Authorization=f"Bearer {SECRET}").status == 405
    assert guarded.get("/login", "PUT").status == 405


def test_a_browser_gets_in(guarded: Viewer, visit: Visits) -> None:
    page = visit(f"{guarded.address}/login")
    assert grave_violations(page) == []
    page.keyboard.press("Tab")
    page.keyboard.type(SECRET)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{guarded.address}/")
    assert page.get_by_role("link", name="Neurons").is_visible()
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("link", name="Neurons").click()
    page.wait_for_url("**/neurons**")


def test_the_gate_holds_neither_token_nor_cookie() -> None:
    held = Credentials.of(SECRET)
    assert SECRET.encode() not in held.token + held.cookie
    assert held.is_token(SECRET)
    assert not held.is_token(SECRET.upper())
    assert not held.is_cookie(SECRET)
    assert not held.is_cookie(held.cookie.hex())


def test_a_token_is_made_where_one_is_needed_and_none_given(tmp_path: Path) -> None:
    assert token_of({}, None, is_needed=False) is None
    made = [token_of({}, None, is_needed=True) for _ in range(2)]
    assert all(t is not None and t.is_new and len(t.text) > 40 for t in made)
    assert made[0] != made[1]
    given = token_of({TOKEN: SECRET}, None, is_needed=False)
    assert given is not None
    assert (given.text, given.is_new) == (SECRET, False)


def test_a_token_from_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    found = token_of({}, path, is_needed=True)
    assert found is not None
    assert found.text == SECRET
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:o}"):
            token_of({}, path, is_needed=True)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not both"):
        token_of({TOKEN: SECRET}, path, is_needed=True)
    with pytest.raises(ConfigError, match="No such file"):
        token_of({}, tmp_path / "nothing", is_needed=True)
    os.truncate(path, 0)
    for bad in ("", "x" * (SHORTEST - 1), "two words of some length", "é" * 20):
        with pytest.raises(ConfigError):
            token_of({TOKEN: bad}, None, is_needed=True)
    with pytest.raises(ConfigError):
        token_of({}, path, is_needed=True)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no address"):
        is_loopback("no such host")


def test_host_headers_follow_the_address() -> None:
    assert names("127.0.0.1", 7871) == ["127.0.0.1:7871", "localhost:7871"]
    assert names("10.1.2.3", 80) == ["10.1.2.3", "10.1.2.3:80"]
    assert names("::1", 7871) == ["127.0.0.1:7871", "[::1]:7871", "localhost:7871"]
    assert names("0.0.0.0", 7871) is None
