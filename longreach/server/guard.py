"""What stands before every route: size of bodies, where browsers may call from, and CORS for those who may.

A page from elsewhere can make a browser send requests to a server on the same machine. Without keys nothing else would
stop it, so a request with an `Origin` is refused unless that origin is this server's own or was allowed; and a server that
listens on the loopback interface answers only under loopback names, so that no foreign name can be pointed at it.
Written on bare ASGI: it costs a streamed chunk nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longreach.server.anthropic import ANTHROPIC
from longreach.server.call import ApiError, Dialect
from longreach.server.openai import OPENAI_CHAT

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}

_CORS_METHODS = b"GET, POST, OPTIONS"
_SECURITY = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def dialect_of(path: str) -> Dialect:
    """In whose words a request to a path is refused."""
    return ANTHROPIC if "/messages" in path or path.startswith("/anthropic") else OPENAI_CHAT


class Guard:
    """The outermost layer of the app.

    Args:
        origins: allowed besides the server's own; "*" allows all.
        is_loopback: whether the server listens on the loopback interface alone.
        max_body_bytes: a longer body is refused with 413.
    """

    def __init__(self, app: ASGIApp, *, origins: Iterable[str], is_loopback: bool, max_body_bytes: int) -> None:
        self.app, self.is_loopback, self.limit = app, is_loopback, max_body_bytes
        self.origins = {origin.rstrip("/").lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self.is_loopback and host and _name(host) not in LOOPBACK_NAMES:
            await _refuse(scope, send, 421, "This server answers only under the names localhost, 127.0.0.1 and [::1].")
            return
        is_foreign = bool(origin) and _authority(origin) != host.lower()
        if is_foreign and not self._allows(origin):
            await _refuse(
                scope, send, 403, "Pages of other origins may not call this server; start it with --cors ORIGIN."
            )
            return
        if is_foreign and scope["method"] == "OPTIONS":
            await _preflight(send, origin, headers)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.limit:
            await _refuse(scope, send, 413, f"The body is {int(length)} bytes long; at most {self.limit} are accepted.")
            return
        extra = _SECURITY + (_cors(origin) if is_foreign else [])

        is_answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            # Starlette raises on after it has answered with a 500, and uvicorn would then cut the connection, on which the
            # client's next request may be on its way.
            if not is_answered:
                raise

    def _allows(self, origin: str) -> bool:
        return "*" in self.origins or origin.rstrip("/").lower() in self.origins


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:  # a bracket too many or too few
        return ""


def _authority(origin: str) -> str:
    """`localhost:8000` of `http://localhost:8000`."""
    return origin.partition("://")[2].lower()


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"x-request-id, x-longreach-routed, x-longreach-ignored, retry-after"),
        (b"vary", b"Origin"),
    ]


async def _preflight(send: Send, origin: str, headers: dict[bytes, bytes]) -> None:
    asked = headers.get(b"access-control-request-headers", b"authorization, content-type")
    allow = [(b"access-control-allow-methods", _CORS_METHODS), (b"access-control-allow-headers", asked)]
    await send({"type": "http.response.start", "status": 204, "headers": [*_cors(origin), *allow]})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    body = orjson.dumps(dialect_of(scope["path"]).error(ApiError(status, message)))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # A body that nobody has read may follow; nothing behind it on this connection would be understood.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
