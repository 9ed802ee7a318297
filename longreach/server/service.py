"""A request's way through the server, without HTTP: who asks, which model, may they, run, account.

    key = service.authenticate(headers)                      401
    call = dialect.read(body, rules)                         400, 422
    exchange = await service.open(key, call, dialect)        400, 402, 404, 429, 503
    ... replies.StreamReply(exchange) or replies.WholeReply(exchange) ...

Whatever happens to a request after `open`, `Exchange.close` is called for it once: it leaves the limits, the ledger gets its
row, the metrics their counts.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from longreach.runtime import log
from longreach.server.call import ApiError, Call, Dialect, Head, Rules, Usage
from longreach.server.database import LedgerError
from longreach.server.keys import NO_KEY, Key, KeyStore
from longreach.server.ledger import Ending, Ledger, Opening
from longreach.server.limits import Admitted, Busy, RateLimiter
from longreach.server.metrics import Metrics
from longreach.server.models import LocalModel, Model, Prepared, Reply, stopping
from longreach.server.prices import Price, PriceTable
from longreach.server.routing import Choice, Router, only_fit

AUTO = "auto"
RETIRED = {"deepseek-chat": False, "deepseek-reasoner": True}
"""Names the hosted API has retired, and whether they think."""

FLASH_NAMES = ("deepseek-v4-flash", "deepseek-flash", "deepseek-v4-flash-vision-exp")
PRO_NAMES = ("deepseek-v4-pro",)

LAST_WORDS_S = 3.0
"""Seconds that answers ended by a stopping server have to reach their clients."""


@dataclass(frozen=True)
class ServiceOptions:
    """What a server allows.

    Attributes:
        max_waiting: requests that may wait for a model; more are refused with 429.
        retired_names: answer `deepseek-chat` and `deepseek-reasoner`.
        log_prompts: write the text of requests into the log.
    """

    rules: Rules = field(default_factory=Rules)
    max_waiting: int = 256
    retired_names: bool = False
    log_prompts: bool = False


class Catalogue:
    """Names and models.

    Args:
        models: small before large where there are several; names are unique.
        aliases: other names. Official names that none of them has go to the smallest (Flash) and the largest (Pro).
        auto: whether `auto` chooses between the smallest and the largest.
    """

    def __init__(self, models: Sequence[Model], aliases: Mapping[str, str], auto: bool) -> None:
        self.models = list(models)
        self.by_name: dict[str, Model] = {model.name: model for model in models}
        self.aliases: dict[str, str] = dict(aliases)
        for names, model in ((FLASH_NAMES, self.small), (PRO_NAMES, self.large)):
            for name in names:
                if name not in self.by_name:
                    self.aliases.setdefault(name, model.name)
        self.has_auto = auto and len(self.models) > 1

    @property
    def small(self) -> Model:
        return self.models[0]

    @property
    def large(self) -> Model:
        return self.models[-1]

    def find(self, name: str) -> Model | None:
        return self.by_name.get(self.aliases.get(name, name))

    def names(self) -> list[str]:
        """All that may be asked for, own names first."""
        own = [model.name for model in self.models] + ([AUTO] if self.has_auto else [])
        return own + [name for name in self.aliases if name not in own]

    def aliases_of(self, model: Model) -> list[str]:
        return [alias for alias, name in self.aliases.items() if name == model.name]


class Service:
    """Everything a server has.

    Args:
        keys: None, or a store without keys: anyone may ask.
        prices: None: nothing costs anything.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        ledger: Ledger,
        keys: KeyStore | None = None,
        prices: PriceTable | None = None,
        router: Router | None = None,
        options: ServiceOptions | None = None,
    ) -> None:
        self.catalogue, self.ledger, self.keys, self.prices, self.router = catalogue, ledger, keys, prices, router
        self.options = options or ServiceOptions()
        if self.options.retired_names:
            for name in RETIRED:
                catalogue.aliases.setdefault(name, catalogue.small.name)
        self.limiter = RateLimiter()
        self.metrics = Metrics(self.model_status)
        self.started = time.monotonic()
        self.is_draining = False
        self._needs_keys = False
        self.exchanges: set[Exchange] = set()
        self._coming: Counter[str] = Counter()
        self._closing: set[asyncio.Future[Any]] = set()

    # ---- who --------------------------------------------------------------------------------------------------------

    @property
    def needs_keys(self) -> bool:
        """Whether nobody may ask without a key. For good once there was one: the last key's end must not let everybody in."""
        self._needs_keys = self._needs_keys or (self.keys is not None and len(self.keys) > 0)
        return self._needs_keys

    def authenticate(self, headers: Mapping[str, str]) -> Key:
        """The key of a request: `Authorization: Bearer`, or `x-api-key`.

        Raises:
            ApiError: 401, with nothing in it of what was given.
        """
        if not self.needs_keys:
            return NO_KEY
        assert self.keys is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        secret = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not secret:
            raise ApiError(
                401, "This server needs an API key: send it as Authorization: Bearer KEY.",
                type="authentication_error", code="invalid_api_key",
            )  # fmt: skip
        key = self.keys.lookup(secret)
        if key is None:
            raise ApiError(
                401, "Authentication Fails: the API key is unknown or revoked.", type="authentication_error",
                code="invalid_api_key",
            )  # fmt: skip
        return key

    # ---- which model ------------------------------------------------------------------------------------------------

    def names_for(self, key: Key) -> list[str]:
        return [name for name in self.catalogue.names() if key.allows(name)]

    def find(self, name: str, key: Key) -> Model:
        """The model of a name, for what is not a call.

        Raises:
            ApiError: 400, no such model.
        """
        model = self.catalogue.find(name) if name != AUTO or not self.catalogue.has_auto else self.catalogue.small
        if model is None or not key.allows(name):
            raise self._unknown(name, key)
        return model

    def _unknown(self, name: str, key: Key) -> ApiError:
        known = ", ".join(self.names_for(key)) or "none"
        shown = name if len(name) <= 100 else name[:97] + "..."
        return ApiError(400, f"The supported API model names are {known}, but you passed {shown}.", param="model")

    async def _route(self, call: Call, key: Key) -> tuple[Model, Call, Prepared, Choice | None]:
        """The model for a call, and the call ready for it."""
        name = call.model
        if not key.allows(call.model):
            raise self._unknown(call.model, key)
        if name == AUTO and self.catalogue.has_auto and self.router is not None:
            return await self._choose(call, key)
        model = self.catalogue.find(name)
        if model is None:
            raise self._unknown(call.model, key)
        return model, call, await model.prepare(call, tenant_of(key, call.user_id)), None

    async def _choose(self, call: Call, key: Key) -> tuple[Model, Call, Prepared, Choice | None]:
        assert self.router is not None
        small, large = self.catalogue.small, self.catalogue.large
        tenant = tenant_of(key, call.user_id)
        prepared: list[Prepared | ApiError] = []
        for model in (small, large):
            try:
                prepared.append(await model.prepare(call, tenant))
            except ApiError as error:
                prepared.append(error)
        first, second = prepared
        if isinstance(first, ApiError) or isinstance(second, ApiError):
            # What only one of them can hold goes there; what neither takes is refused in the large one's words.
            for model, ready in ((small, first), (large, second)):
                if not isinstance(ready, ApiError):
                    return self._sent(model, call, ready, only_fit(call, ready.prompt_tokens, model is large))
            assert isinstance(second, ApiError)
            raise second
        if first.max_tokens < second.max_tokens and first.max_tokens < (call.max_tokens or 0):
            return self._sent(large, call, second, only_fit(call, second.prompt_tokens, True))
        prices = tuple(self.price_values(model) for model in (small, large))
        choice = self.router.choose(
            call, second.prompt_tokens, (small.known(first, tenant), large.known(second, tenant)),
            (prices[0], prices[1]), (small.name, large.name),
        )  # fmt: skip
        model, ready = (large, second) if choice.is_large else (small, first)
        return self._sent(model, call, ready, choice)

    def _sent(self, model: Model, call: Call, ready: Prepared, choice: Choice) -> tuple[Model, Call, Prepared, Choice]:
        self.metrics.routed.labels(choice.kind, model.name).inc()
        return model, call, ready, choice

    # ---- prices -----------------------------------------------------------------------------------------------------

    def price_of(self, model: Model) -> Price | None:
        """The price of a model's tokens now: under its own name, or as the official model whose name it answers to."""
        if self.prices is None:
            return None
        now = datetime.now(UTC)
        aliases = self.catalogue.aliases_of(model)
        preferred = sorted(aliases, key=lambda name: name not in FLASH_NAMES + PRO_NAMES)
        for name in (model.name, *preferred):
            if (price := self.prices.price_of(name, now)) is not None:
                return price
        return None

    def price_values(self, model: Model) -> tuple[Decimal, Decimal, Decimal]:
        """Hit, miss and output per million tokens; zeros where nothing is charged."""
        price = self.price_of(model)
        nothing = Decimal(0)
        return (price.hit, price.miss, price.output) if price is not None else (nothing, nothing, nothing)

    # ---- run --------------------------------------------------------------------------------------------------------

    async def open(self, key: Key, call: Call, dialect: Dialect, dialect_name: str) -> Exchange:
        """Begin to answer a call.

        Raises:
            ApiError: it is refused.
        """
        if self.is_draining:
            raise stopping()
        model, call, prepared, choice = await self._route(call, key)
        self._coming[model.name] += call.n
        try:
            return await self._begin(key, call, dialect, dialect_name, model, prepared, choice)
        finally:
            self._coming[model.name] -= call.n

    async def _begin(
        self,
        key: Key,
        call: Call,
        dialect: Dialect,
        dialect_name: str,
        model: Model,
        prepared: Prepared,
        choice: Choice | None,
    ) -> Exchange:
        opening = Opening(
            secrets.token_hex(16), key, dialect_name, call.model, model.name, self.price_of(model),
            Usage(prepared.prompt_tokens, 0, _expected_output(prepared) * call.n), call.user_id, model.kind == "upstream",
        )  # fmt: skip
        admitted = self._full(model, call) or self.limiter.admit(key, prepared.prompt_tokens)
        if isinstance(admitted, Busy):
            self.ledger.refuse(opening, admitted.reason)
            self.metrics.requests.labels(model.name, dialect_name, "refused").inc()
            raise busy(admitted.message, admitted.retry_after_s)
        try:
            refusal = await _of_ledger(self.ledger.begin(opening))
            if refusal is not None:
                self.metrics.requests.labels(model.name, dialect_name, "refused").inc()
                raise ApiError(402, refusal.message, type="unknown_error")
            try:
                reply = await model.open(prepared, tenant_of(key, call.user_id))
            except BaseException as error:
                reason = error.message if isinstance(error, ApiError) else "cancelled"
                self.ledger.finish(opening.id, "failed", Usage(), reason=reason[:60])
                self.metrics.requests.labels(model.name, dialect_name, "failed").inc()
                raise
        except BaseException:
            # Where the client left while the row was being written it is open still.
            self.ledger.finish(opening.id, "cancelled", Usage())
            admitted.release(-prepared.prompt_tokens)  # nothing was read: back into the bucket
            raise
        if self.options.log_prompts:
            log.info("request %s: %s", opening.id, call.input)
        exchange = Exchange(self, opening, call, dialect, dialect_name, model, reply, admitted, choice)
        self.exchanges.add(exchange)
        return exchange

    def _full(self, model: Model, call: Call) -> Busy | None:
        """Why a model takes no more at the moment. `call` itself is among those that are on their way."""
        if not isinstance(model, LocalModel):
            return None
        # Those on their way count: a crowd that comes at once is checked before any of it has been submitted.
        most = model.engine.options.max_running
        waiting = len(model.engine.requests) + self._coming[model.name] - call.n - most
        if waiting < self.options.max_waiting:
            return None
        return Busy("queue", max(1, math.ceil(waiting / most)), "The server is at its limit; try again later.")

    def in_background(self, work: Awaitable[Any]) -> None:
        """Go on with something after the reply it belongs to has ended."""
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def finish(self, seconds: float, is_forced: Callable[[], bool] = lambda: False) -> None:
        """Take no new requests, and let the running ones finish; end those that have not after `seconds`.

        An answer that is ended keeps what it has: its finish reason says that the server could not go on, its client is
        billed for what it got, and its state stays in the cache.

        Args:
            is_forced: asked ten times a second whether to end them now.
        """
        self.is_draining = True
        until = time.monotonic() + seconds
        while self.exchanges and time.monotonic() < until and not is_forced():
            await asyncio.sleep(0.1)
        if self.exchanges:
            log.info("%d requests have not finished in time; they are ended", len(self.exchanges))
        for exchange in list(self.exchanges):
            await exchange.reply.cut()
        until = time.monotonic() + LAST_WORDS_S
        while self.exchanges and time.monotonic() < until:
            await asyncio.sleep(0.1)

    async def drain(self) -> None:
        """Wait for what replies left to do."""
        while self._closing:
            await asyncio.wait(set(self._closing))

    # ---- status -----------------------------------------------------------------------------------------------------

    def model_status(self) -> list[dict[str, Any]]:
        return [model.status() for model in self.catalogue.models]


@dataclass(eq=False)
class Exchange:
    """A call that is being answered."""

    service: Service
    opening: Opening
    call: Call
    dialect: Dialect
    dialect_name: str
    model: Model
    reply: Reply
    admitted: Admitted
    choice: Choice | None
    is_closed: bool = False

    def head(self, head: Head) -> Head:
        """The reply's head with this request's id: the one that the ledger has."""
        return replace(head, id=self.opening.id, routed=str(self.choice) if self.choice is not None else None)

    def headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.opening.id}
        if self.choice is not None:
            headers["x-longreach-routed"] = f"{self.model.name} ({self.choice})"
        if self.call.ignored:
            headers["x-longreach-ignored"] = ", ".join(self.call.ignored)
        return headers

    async def close(self, status: Ending, reason: str = "") -> None:
        """Account for the request; returns when that is on the disk. Only the first call does anything.

        Args:
            reason: why the answer ended, for the ledger.

        Raises:
            ApiError: the ledger cannot be written; the client must not believe that it was served.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self.service.exchanges.discard(self)
        usage, reply, service = self.reply.usage, self.reply, self.service
        self.admitted.release(usage.completion_tokens)
        written = service.ledger.finish(
            self.opening.id, status, usage, reason=reason, first_token_s=reply.first_token_s
        )
        self._measure(status, usage)
        if status != "completed":
            await reply.cancel()
        elif service.router is not None:
            service.router.learn(self.model.name, self.call, usage.completion_tokens / self.call.n)
        await _of_ledger(written)

    def leave(self) -> None:
        """The client has gone: end the request without waiting for anything."""
        if not self.is_closed:
            self.service.in_background(self._leave())

    async def _leave(self) -> None:
        try:
            await self.close("cancelled", "client left")
        except ApiError as error:
            log.warning("a cancelled request is not in the ledger: %s", error.message)

    def _measure(self, status: Ending, usage: Usage) -> None:
        metrics, name, first = self.service.metrics, self.model.name, self.reply.first_token_s
        metrics.requests.labels(name, self.dialect_name, status).inc()
        whole = time.monotonic() - self.reply.began
        metrics.request_s.labels(name).observe(whole)
        if first is not None:
            metrics.first_token_s.labels(name).observe(first)
            if usage.completion_tokens > 1:
                metrics.token_s.labels(name).observe((whole - first) / (usage.completion_tokens - 1))


def _expected_output(prepared: Prepared) -> int:
    """Tokens of an answer whose cost is reserved: what was asked for, and no more than 4,096 where nothing was."""
    return prepared.max_tokens if prepared.call.max_tokens is not None else min(prepared.max_tokens, 4096)


def tenant_of(key: Key, user_id: str) -> str:
    """Whose cache a request may use: each user of each key has one of its own."""
    return f"{key.id}/{user_id}"


def busy(message: str, retry_after_s: int) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


async def _of_ledger(future: Any) -> Any:
    """What the ledger's thread answers.

    Raises:
        ApiError: 503, it cannot be written.
    """
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except LedgerError as error:
        log.warning("%s", error)
        raise ApiError(
            503, "The server cannot keep its ledger at the moment; try again later.", type="server_error",
            code="server_error", retry_after_s=10,
        ) from None  # fmt: skip
