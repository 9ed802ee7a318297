"""An engine in a thread of its own, answering into the event loop.

    loop = EngineLoop(engine, "small")
    mailbox = Mailbox()
    ticket = loop.submit(prompt_ids, params, reader, mailbox, tenant="key/user")
    events = await mailbox.get()                 everything since the last call; the last event is a `Finish`

The thread steps while there is work and sleeps otherwise. What a step made for all requests crosses to the event loop in
one call, so that a step of sixteen requests costs one wake-up and not sixteen.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from longreach.engine.engine import Engine, Output
from longreach.engine.request import Request
from longreach.engine.sampler import Sampled
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.runtime import log
from longreach.server.call import ApiError, Content, Event, Reasoning, TokenLogprob
from longreach.server.reader import Reader


class Mailbox:
    """Where the events of one reply arrive. Belongs to the event loop; only `put` and `get` touch it."""

    def __init__(self) -> None:
        self._items: list[Event | ApiError] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, items: Sequence[Event | ApiError]) -> None:
        self._items += items
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, timeout_s: float | None = None) -> list[Event]:
        """All that has come since the last call, at least one event; or nothing, where that took too long.

        Raises:
            ApiError: the reply failed. Events before it have been given out.
        """
        if not self._items:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _release, waiter) if timeout_s is not None else None
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        items, self._items = self._items, []
        events = [item for item in items if not isinstance(item, ApiError)]
        errors = [item for item in items if isinstance(item, ApiError)]
        if errors:
            if events:
                self._items = [errors[0]]
            else:
                raise errors[0]
        return events


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


@dataclass(eq=False)
class Ticket:
    """A submitted answer: the engine's request, who reads its tokens, where its events go."""

    id: str
    reader: Reader
    mailbox: Mailbox
    choice: int
    submitted: float
    request: Request | None = None
    """None until the engine has taken it."""
    first_token_s: float | None = None
    """Seconds from submission to the first token."""


class EngineLoop:
    """Runs an engine.

    Attributes:
        cpu_s: CPU seconds of the thread inside `Engine.step`, without reading answers (`Reader.push`), which are the
            server's work; outside_s: the rest.
        tokens, prompt_tokens: generated and read since the start; hits: prompt tokens that came from the cache.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self.cpu_s = self.outside_s = 0.0
        self.tokens = self.prompt_tokens = self.hits = 0
        self.failed: str | None = None
        self._tickets: dict[str, Ticket] = {}
        self._wake = threading.Condition()
        self._is_stopping = False
        self._events: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    def start(self, events: asyncio.AbstractEventLoop) -> None:
        """Begin to step; answers go to `events`."""
        self._events = events
        self.thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        reader: Reader,
        mailbox: Mailbox,
        *,
        tenant: str,
        choice: int = 0,
    ) -> Ticket:
        """Queue an answer. Call it in the event loop.

        Raises:
            RequestError: the engine refuses it.
            ApiError: the engine has failed.
        """
        ticket = Ticket(secrets.token_hex(16), reader, mailbox, choice, time.monotonic())
        with self._wake:
            if self.failed is not None:
                raise _stopped(503)
            self._tickets[ticket.id] = ticket  # before the engine knows it: a step may be under way
            try:
                ticket.request = self.engine.submit(
                    prompt, params, user=_sharer(tenant), tenant=tenant, request_id=ticket.id, stream=reader
                )
            except RequestError:
                del self._tickets[ticket.id]
                raise
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End an answer that nobody waits for. What was computed stays in the cache."""
        with self._wake:
            self.engine.cancel(ticket.id)
            self._wake.notify()

    def stop(self) -> None:
        """End what still runs, keeping its state in the cache, and finish writing the disk tier."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self.thread.ident is not None:
            self.thread.join()
        self.engine.close()

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        spent = time.thread_time()
        while True:
            with self._wake:
                while not self.engine.has_work and not self._is_stopping:
                    self._wake.wait()
                if self._is_stopping:
                    for request in list(self.engine.requests.values()):
                        self.engine.cancel(request.id)
            began = time.thread_time()
            try:
                outputs = self.engine.step()
                ended = time.thread_time()
                reading = sum(ticket.reader.take_cpu_s() for ticket in self._moved(outputs))
                self._deliver(outputs)
            except Exception as error:  # the edge: one engine failing must not leave its clients waiting for ever
                log.exception("the engine of %s failed", self.name)
                self._fail_all(type(error).__name__)
                return
            self.cpu_s += ended - began - reading
            now = time.thread_time()
            self.outside_s += now - spent - (ended - began - reading)
            spent = now
            if self._is_stopping and not self.engine.has_work:
                return

    def _moved(self, outputs: list[Output]) -> list[Ticket]:
        return [ticket for output in outputs if (ticket := self._tickets.get(output.request.id)) is not None]

    def _deliver(self, outputs: list[Output]) -> None:
        batch: list[tuple[Mailbox, list[Event | ApiError]]] = []
        for output in outputs:
            ticket = self._tickets.get(output.request.id)
            if ticket is None:
                continue
            items = self._items(ticket, output)
            if items:
                batch.append((ticket.mailbox, items))
        if batch:
            self._send(batch)

    def _items(self, ticket: Ticket, output: Output) -> list[Event | ApiError]:
        request, reader = output.request, ticket.reader
        if output.tokens and ticket.first_token_s is None:
            ticket.first_token_s = time.monotonic() - ticket.submitted
            self.prompt_tokens += request.num_prompt
            self.hits += request.cached
        self.tokens += len(output.tokens)
        items: list[Event | ApiError] = list(reader.take())
        if request.params.logprobs is not None and output.tokens:
            items = _with_logprobs(items, output.tokens, reader, ticket.choice, self.engine)
        reason = output.finish_reason
        if reason is None:
            return items
        with self._wake:
            self._tickets.pop(request.id, None)
        if reason is FinishReason.ERROR:
            log.warning("a request on %s failed: %s", self.name, request.error)
            items.append(_unfinished())
        elif reader.is_broken:
            items.append(_unfinished())
        else:
            items.append(reader.finish_event(reason, request.num_generated))
        return items

    def _fail_all(self, why: str) -> None:
        with self._wake:
            self.failed = why
            tickets = list(self._tickets.values())
            self._tickets.clear()
        error = _stopped(500)
        self._send([(ticket.mailbox, [error]) for ticket in tickets])

    def _send(self, batch: Sequence[tuple[Mailbox, Sequence[Event | ApiError]]]) -> None:
        assert self._events is not None
        if not self._events.is_closed():
            self._events.call_soon_threadsafe(_put_all, batch)


def _unfinished() -> ApiError:
    return ApiError(500, "The model could not finish this request.", type="server_error", code="server_error")


def _stopped(status: int) -> ApiError:
    return ApiError(status, "The model stopped working; restart the server.", type="server_error", code="server_error")


def _sharer(tenant: str) -> str:
    """Who takes turns with others: a key, whatever users it names; without keys each user."""
    key = tenant.partition("/")[0]
    return tenant if key == "0" else key


def _put_all(batch: Sequence[tuple[Mailbox, Sequence[Event | ApiError]]]) -> None:
    for mailbox, items in batch:
        mailbox.put(items)


def _with_logprobs(
    items: list[Event | ApiError], tokens: Sequence[Sampled], reader: Reader, choice: int, engine: Engine
) -> list[Event | ApiError]:
    """Add each token's log-probability to an event of the part it belongs to; tokens of tool calls have none."""
    assert engine.tokenizer is not None
    table = engine.tokenizer.token_bytes

    def entry(token_id: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        return TokenLogprob(
            table[token_id], logprob if logprob is not None else 0.0, tuple(entry(*pair) for pair in top)
        )

    found: dict[str, list[TokenLogprob]] = {"reasoning": [], "content": []}
    for sampled, part in zip(tokens, reader.take_parts(), strict=True):
        if part in found:
            found[part].append(entry(sampled.token_id, sampled.logprob, sampled.top or ()))
    for part, kind in (("reasoning", Reasoning), ("content", Content)):
        if not (logprobs := tuple(found[part])):
            continue
        place = next((i for i, item in enumerate(items) if isinstance(item, kind)), None)
        if place is None:
            items.append(kind("", logprobs, choice))
        else:
            event = items[place]
            assert isinstance(event, kind)
            items[place] = kind(event.text, logprobs, choice)
    return items
