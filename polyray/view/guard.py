"""Guard: who may ask, and what a browser may do with the answer.

Place in the flow: around the application, before any page. Reading is all that can be asked for. The name that a
browser asks for must be one that the viewer was given, since a page elsewhere may have its own name point to this
machine; and no other page gets to read, frame or embed an answer, though a link from one may lead here.
"""

from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Middleware that turns away what is not meant for the viewer.

    Args:
        app: what is guarded.
        hosts: values of the Host header that are answered, with the port where it is not the usual one; None where
            something in front of the viewer sees to that.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app = app
        self._hosts = None if hosts is None else {h.lower() for h in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, guarded)

    def _refusal(self, scope: MutableMapping[str, Any]) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The viewer only reads: GET or HEAD.\n", 405, {"Allow": "GET, HEAD"})
        host = headers.get("host", "").lower()
        if self._hosts is not None and host not in self._hosts:
            return PlainTextResponse(f"This viewer answers {' and '.join(sorted(self._hosts))} alone.\n", 421)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host:
            return PlainTextResponse("Pages of another origin get no answer.\n", 403)
        is_followed = headers.get("sec-fetch-mode", "navigate") == "navigate"
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and not is_followed:
            return PlainTextResponse("Pages of another origin get no answer.\n", 403)
        return None
