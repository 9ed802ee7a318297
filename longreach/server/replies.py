"""Replies on the wire: a stream of server-sent events, or one JSON body; both kept alive while a request waits.

Nothing is sent for half a second, so that whatever goes wrong by then has its proper status. After that the status is
200 and the reply is kept alive: comments (or pings) in a stream, blank lines before a JSON body. What goes wrong later is
told inside: as an error event, or by a body that breaks off, which no client takes for an answer.
The last frame waits until the ledger has the request on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from longreach.server.call import ApiError, Dialect, Event, collect

if TYPE_CHECKING:
    from longreach.server.service import Exchange

FIRST_BYTE_S = 0.5
"""Seconds for a proper status."""
KEEP_ALIVE_S = 5.0
WAIT_LIMIT_S = 600.0
"""Seconds a request may wait for its first token."""
UNREAD_LIMIT_S = 120.0
"""Seconds a client may leave a full connection unread before it counts as gone."""


class JsonReply(Response):
    """A JSON body, made at once."""

    media_type = "application/json"

    def __init__(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(orjson.dumps(body), status, dict(headers or {}))


def error_reply(error: ApiError, dialect: Dialect, headers: Mapping[str, str] | None = None) -> JsonReply:
    """A refusal in its dialect."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status in (408, 413):
        # The rest of the body may still come; nothing behind it on this connection would be understood.
        headers["Connection"] = "close"
    return JsonReply(dialect.error(error), error.status, headers)


class LiveReply(Response):
    """The common part of both: waiting, keeping alive, watching for the client to leave."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.dialect = exchange, exchange.dialect
        self.background = None
        self.status_code = 200
        self.has_begun = False
        self._is_alone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = watcher = asyncio.ensure_future(self._watch(receive))
        try:
            await self._answer()
        except ApiError as error:
            await self.exchange.close("failed", error.message)
            await self._fail(error, scope, receive)
        except BaseException as error:
            # The client left, the server is stopping, or a bug of ours. What was computed stays in the cache, and is in
            # the ledger.
            self.exchange.leave()
            if not (self._is_alone and isinstance(error, asyncio.CancelledError)):
                raise
        finally:
            watcher.cancel()

    async def _answer(self) -> None:
        raise NotImplementedError

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if not self.has_begun:
            await error_reply(error, self.dialect, self.exchange.headers())(scope, receive, self._send)
        else:
            await self._fail_inside(error)

    async def _fail_inside(self, error: ApiError) -> None:
        raise NotImplementedError

    async def _wait_for_start(self, alive: bytes) -> None:
        """Return once inference has begun; keep the connection alive meanwhile."""
        reply = self.exchange.reply
        waited = FIRST_BYTE_S
        head = await reply.start(FIRST_BYTE_S)
        while head is None:
            if waited > WAIT_LIMIT_S:
                await reply.cancel()
                raise ApiError(
                    503,
                    "The server is overloaded; try again later.",
                    type="server_error",
                    code="server_error",
                    retry_after_s=30,
                )
            await self._write(alive)
            waited += KEEP_ALIVE_S
            head = await reply.start(KEEP_ALIVE_S)

    async def _write(self, content: bytes, is_last: bool = False) -> None:
        if not self.has_begun:
            self.has_begun = True
            headers = [(b"content-type", self._content_type), (b"cache-control", b"no-cache")]
            headers += [
                (name.encode(), value.encode("latin-1", "replace")) for name, value in self.exchange.headers().items()
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if is_last:
            self._watcher.cancel()  # a connection that ends after this is no client that left
        # `send` waits where the client reads nothing and the connection is full; what is not sent yet waits in the mailbox.
        timer = asyncio.get_running_loop().call_later(UNREAD_LIMIT_S, self._leave)
        try:
            await self._send({"type": "http.response.body", "body": content, "more_body": not is_last})
        finally:
            timer.cancel()

    async def _watch(self, receive: Receive) -> None:
        """End the reply when the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self._is_alone = True
        self._task.cancel()

    _content_type = b"application/json"


class StreamReply(LiveReply):
    """Server-sent events."""

    _content_type = b"text/event-stream; charset=utf-8"

    async def _answer(self) -> None:
        exchange, reply = self.exchange, self.exchange.reply
        alive = self.dialect.keep_alive
        await self._wait_for_start(alive)
        assert reply.head is not None
        writer = self._writer = self.dialect.stream(exchange.call, exchange.head(reply.head))
        frames = writer.begin()
        while not reply.is_over:
            events = await reply.next(KEEP_ALIVE_S)
            for event in events:
                frames += writer.event(event)
            if reply.is_over:
                await exchange.close("completed", reply.reason)
                await self._write(frames + writer.end(reply.usage), is_last=True)
            else:
                await self._write(frames or alive)
            frames = b""

    async def _fail_inside(self, error: ApiError) -> None:
        writer = getattr(self, "_writer", None)
        if writer is not None:
            frame = writer.error(error)
        else:
            frame = b"event: error\ndata: " + orjson.dumps(self.dialect.error(error)) + b"\n\n"
        await self._write(frame, is_last=True)


class WholeReply(LiveReply):
    """One JSON body at the end."""

    async def _answer(self) -> None:
        exchange, reply = self.exchange, self.exchange.reply
        await self._wait_for_start(b"\n")
        events: list[Event] = []
        loop = asyncio.get_running_loop()
        quiet_since = loop.time()
        while not reply.is_over:
            events += await reply.next(KEEP_ALIVE_S)
            # A long answer is as silent as a long wait.
            if loop.time() - quiet_since >= 2 * KEEP_ALIVE_S and not reply.is_over:
                await self._write(b"\n")
                quiet_since = loop.time()
        assert reply.head is not None
        await exchange.close("completed", reply.reason)
        answers = collect(events, exchange.call.n)
        body = self.dialect.whole(exchange.call, exchange.head(reply.head), answers, reply.usage)
        await self._write(orjson.dumps(body), is_last=True)

    async def _fail_inside(self, error: ApiError) -> None:
        # The status said 200. A body that breaks off is an error to every client; one that ends would look like an answer.
        await self._write(orjson.dumps(self.dialect.error(error)))
