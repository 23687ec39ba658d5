"""Gate: who may look, where more than the one who started it could.

Which question it answers: *does whoever asks know the token?* Place in the flow: before everything of `view/`, where
the service listens beyond its own machine or was given a token. A program sends the token as `Authorization: Bearer`;
a person types it once, into a form, and gets a cookie in return from which the token cannot be told. It is never part
of an address, since addresses end up in logs and histories.
"""

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from polyray.errors import ConfigError
from polyray.view.guard import HEADERS

TOKEN = "POLYRAY_VIEW_TOKEN"
"""Environment variable with the token."""
SHORTEST = 16
"""Letters that a token has at least."""
COOKIE = "polyray"
_MOST_BYTES = 4096
"""Of what the form sends."""


@dataclass(frozen=True)
class Credentials:
    """What the gate holds: neither the token nor the cookie can be told from it."""

    token: bytes
    """SHA-256 of the token."""
    cookie: bytes
    """SHA-256 of the cookie."""

    @classmethod
    def of(cls, token: str) -> "Credentials":
        """Those of a token."""
        return cls(_sha256(token), _sha256(_cookie(token)))

    def is_token(self, given: str) -> bool:
        """Whether this is the token, in a time that does not say how nearly."""
        return hmac.compare_digest(_sha256(given), self.token)

    def is_cookie(self, given: str) -> bool:
        """Whether this is the cookie that the token was changed for."""
        return hmac.compare_digest(_sha256(given), self.cookie)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _cookie(token: str) -> str:
    return hmac.new(token.encode("utf-8", "surrogateescape"), b"polyray view", hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Token:
    """The token of a service."""

    text: str
    is_new: bool
    """It was made just now, and nobody has it yet."""


def is_loopback(host: str) -> bool:
    """Whether a host's addresses all lead back to its own machine.

    Raises:
        ConfigError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise ConfigError(f"host {host!r} has no address: {e}. Give one of this machine's, such as 127.0.0.1.") from e
    return all(ipaddress.ip_address(str(info[4][0]).partition("%")[0]).is_loopback for info in found)


def token_of(environment: Mapping[str, str], path: Path | None, is_needed: bool) -> Token | None:
    """The token that was given; where there is none and one is needed, a new one.

    Args:
        environment: with `POLYRAY_VIEW_TOKEN`, perhaps.
        path: a file with the token, which nobody but its owner may read.
        is_needed: whether there has to be one.

    Returns:
        The token; None where none was given and none is needed.

    Raises:
        ConfigError: both were given, the file cannot be read or others may read it, or the token is too short or holds
            what no header can.
    """
    given, source = environment.get(TOKEN), TOKEN
    if path is not None:
        if given is not None:
            raise ConfigError(f"give a token by {TOKEN} or by --token-file, not both.")
        given, source = _read(path), str(path)
    if given is None:
        return Token(secrets.token_urlsafe(32), is_new=True) if is_needed else None
    given = given.strip()
    if len(given) < SHORTEST or not (given.isascii() and given.isprintable()) or " " in given:
        raise ConfigError(
            f"the token of {source} must have at least {SHORTEST} letters, digits or signs and no space. Leave it away "
            "to have one made."
        )
    return Token(given, is_new=False)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if (mode := stat.S_IMODE(os.fstat(file.fileno()).st_mode)) & 0o077:
                raise ConfigError(f"others may read or write {str(path)!r} (mode {mode:o}): chmod 600 it.")
            return file.read(_MOST_BYTES).decode("ascii")
    except OSError as e:
        raise ConfigError(f"cannot read the token's file {str(path)!r}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"the token's file {str(path)!r} holds what no header can.") from e


def names(host: str, port: int) -> Collection[str] | None:
    """Host headers that are answered: those of the address that is listened on.

    Returns:
        None for all, where the service listens on every address: by which names those are known it cannot tell. There
        a token is needed, which no page elsewhere has, so that another name for this machine gains it nothing.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        found = {host, *(["127.0.0.1", "localhost"] if is_loopback(host) else [])}
    else:
        if address.is_unspecified:
            return None
        written = f"[{address}]" if address.version == 6 else str(address)
        found = {written, *(["localhost", "127.0.0.1"] if address.is_loopback else [])}
    return sorted({f"{name}:{port}" for name in found} | (found if port == 80 else set()))


class Gate:
    """Middleware that lets in who knows the token.

    Args:
        app: what lies behind it.
        credentials: of the token.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials) -> None:
        self._app, self._credentials = app, credentials
        loader = PackageLoader("polyray.view")
        self._form = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("login.html")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            # Websockets are turned away behind this, and none is opened here.
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        path = _path(request)
        if path == "/login":
            await (await self._login(request))(scope, receive, send)
        elif path.startswith("/static/") or self._may(Headers(scope=scope), request):
            await self._app(scope, receive, send)
        else:
            await self._refused(request, "")(scope, receive, send)

    def _may(self, headers: Headers, request: Request) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._credentials.is_token(given.strip())
        return self._credentials.is_cookie(request.cookies.get(COOKIE, ""))

    async def _login(self, request: Request) -> Response:
        if request.method in ("GET", "HEAD"):
            return self._page(request, 200, "", "/")
        if request.method != "POST":
            return _plain("GET or POST.\n", 405, {"Allow": "GET, HEAD, POST"})
        if not _is_own(request):
            return _plain("Pages of another origin get no answer.\n", 403)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return _plain("That is no token.\n", 413)
        sent = parse_qs(body.decode("utf-8", "replace"))
        token, then = (sent.get(key, [""])[0].strip() for key in ("token", "then"))
        if not self._credentials.is_token(token):
            return self._refused(request, "That is not the token.", then)
        answer = RedirectResponse(_root(request) + _own_path(then), 303, {**HEADERS, "Cache-Control": "no-store"})
        is_tls = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE, _cookie(token), path=_root(request) or "/", httponly=True, samesite="strict", secure=is_tls
        )
        return answer

    def _refused(self, request: Request, why: str, then: str | None = None) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return _plain(
                "A token is needed: Authorization: Bearer TOKEN.\n", 401, {"WWW-Authenticate": 'Bearer realm="polyray"'}
            )
        wanted = _path(request) + (f"?{request.url.query}" if request.url.query else "")
        answer = self._page(request, 401, why, wanted if then is None else then)
        answer.headers["WWW-Authenticate"] = 'Bearer realm="polyray"'
        return answer

    def _page(self, request: Request, status: int, why: str, then: str) -> Response:
        html = self._form.render(root=_root(request), why=why, then=_own_path(then))
        # With no-referrer a browser would say of the form that it comes from nowhere.
        headers = {**HEADERS, "Referrer-Policy": "same-origin", "Cache-Control": "no-store"}
        return HTMLResponse(html, status, headers)


def _plain(text: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return PlainTextResponse(text, status, {**HEADERS, "Cache-Control": "no-store", **(headers or {})})


def _root(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def _path(request: Request) -> str:
    path: str = request.scope["path"]
    return path.removeprefix(_root(request)) or "/"


def _is_own(request: Request) -> bool:
    """Whether a form was sent from a page of the service's own, as far as the browser says."""
    origin = request.headers.get("origin")
    is_here = origin is None or origin.partition("://")[2].lower() == request.headers.get("host", "").lower()
    return is_here and request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


def _own_path(then: str) -> str:
    """Where to go after the form: a path of the service's own, else its first page."""
    is_own = then.startswith("/") and not then.startswith(("//", "/login", "/\\")) and "\\" not in then
    return then if is_own and then.isprintable() and then.isascii() else "/"
