"""Who used how many tokens at which price: every request once, whatever happens to the server.

    refusal = await asyncio.wrap_future(ledger.begin(opening))       a row "running"; its expected cost is reserved
    ...                                                              the answer, all but its last frame
    await asyncio.wrap_future(ledger.finish(id, "completed", usage)) on the disk when this returns
    ...                                                              the last frame

A client that saw the end of an answer is therefore in the ledger. A request that was running when its server died is found
by the next `recover`, marked "lost" and not billed. A row is completed once: a repeated `finish` finds it closed and changes
nothing, and neither does a transaction that is tried again because nobody knows whether it was committed.

    running ──> completed   billed                     refused   never ran, not billed
            ──> cancelled   billed up to there
            ──> failed      not billed
            ──> lost        not billed; a `finish` that still comes wins over it

One thread writes. While one commit is under way the next requests gather and go into one transaction together, so that
200 requests at a time do not cost 200 waits for the disk.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from longreach.server.call import Usage
from longreach.server.database import CREDITS, KEYS, REQUESTS, SERVERS, SPENDING, Database, LedgerError, reason_of
from longreach.server.keys import Key
from longreach.server.prices import Price, cost_pico, from_pico

log = logging.getLogger("longreach")

Ending = Literal["completed", "failed", "cancelled"]
BILLED = frozenset({"completed", "cancelled"})

MAX_BATCH = 512
"""Requests in one transaction."""

HEARTBEAT_S = 5.0
DEAD_AFTER_S = 30.0
"""A server that has not said for so long that it is alive is dead, unless its process is seen to be gone before."""

RETRY_S = 15.0
"""How long a transaction is tried again while the database is busy or cannot be reached."""

_PROCESS = uuid.uuid4().hex
"""Tells this process from an earlier one that had its number."""

_LAST_USED_MS = 60_000
_TEXT_LIMIT = 255


@dataclass(frozen=True, slots=True)
class Opening:
    """A request as it begins.

    Attributes:
        id: unique over all servers of the database, such as 32 random hexadecimal digits.
        model, answered_by: the name as asked for, and the model that answers.
        price: None: nothing is charged.
        expected: tokens whose cost is reserved: the prompt as misses, and as many output tokens as may come.
        started: UTC; None: now. The price, the day of a report and the budget go by it.
    """

    id: str
    key: Key
    dialect: str
    model: str
    answered_by: str
    price: Price | None = None
    expected: Usage = field(default_factory=Usage)
    user_id: str = ""
    is_upstream: bool = False
    started: datetime | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request must not run: status 402.

    Attributes:
        message: one line for the client.
    """

    reason: Literal["balance", "budget_day", "budget_month"]
    message: str


@dataclass(frozen=True)
class Balance:
    """Of one key, in pico-units.

    Attributes:
        granted, topped_up: all that was ever given and paid in. spent: all that was ever billed.
        reserved: by requests that run.
        is_prepaid: False: not limited by a balance.
    """

    currency: str
    granted: int
    topped_up: int
    spent: int
    reserved: int
    is_prepaid: bool

    @property
    def left(self) -> int:
        return self.granted + self.topped_up - self.spent

    def body(self) -> dict[str, Any]:
        """As `GET /user/balance` answers: amounts with two decimals, rounded down; gifts are used up first.

        A key that spends no balance has zeros and is available.
        """
        granted_left = max(self.granted - self.spent, 0) if self.is_prepaid else 0
        left = self.left if self.is_prepaid else 0
        info = {
            "currency": self.currency,
            "total_balance": _cents(left),
            "granted_balance": _cents(granted_left),
            "topped_up_balance": _cents(left - granted_left),
        }
        return {"is_available": not self.is_prepaid or left > 0, "balance_infos": [info]}


def balance_of(database: Database, key: Key) -> Balance:
    """What a key has at this moment. Raises LedgerError."""
    with database.read() as connection:
        credits = connection.execute(
            sa.select(CREDITS.c.is_granted, sa.func.sum(CREDITS.c.amount))
            .where(CREDITS.c.key_id == key.id)
            .group_by(CREDITS.c.is_granted)
        )
        sums: dict[bool, int] = {bool(is_granted): int(amount) for is_granted, amount in credits}
        spent = connection.scalar(sa.select(sa.func.sum(SPENDING.c.amount)).where(SPENDING.c.key_id == key.id))
        held = sa.select(sa.func.sum(REQUESTS.c.reserved)).where(_IS_RUNNING, REQUESTS.c.key_id == key.id)
        reserved = connection.scalar(held)
    return Balance(
        database.currency, sums.get(True, 0), sums.get(False, 0), int(spent or 0), int(reserved or 0), key.is_prepaid
    )


def _cents(pico: int) -> str:
    return str(from_pico(pico).quantize(Decimal("0.01"), ROUND_FLOOR))


# ---- the ledger -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Begin:
    """A row to add."""

    row: dict[str, Any]
    key: Key
    future: Future[Any]


@dataclass(slots=True)
class _Finish:
    """A row to close."""

    row: dict[str, Any]
    future: Future[Any]


_Item = _Begin | _Finish


@dataclass(slots=True)
class _Running:
    """What closing a row needs to know of its beginning."""

    key_id: int
    day: str
    price: Price | None
    began_s: float


class Ledger:
    """The ledger of one server process, on a database that others may share.

    `begin` and `finish` may be called from any thread, cost it microseconds and give a future. The futures cannot be
    cancelled, so a client that goes away takes nothing with it: wrap and shield them as you like.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.id = uuid.uuid4().hex
        self._running: dict[str, _Running] = {}
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._last_used_ms: dict[int, int] = {}
        spend = database.insert(SPENDING)
        self._spend = spend.on_conflict_do_update(
            index_elements=["key_id", "day"], set_={"amount": SPENDING.c.amount + spend.excluded.amount}
        )
        self._is_closed, self._is_down = False, False
        self._putting = threading.Lock()
        self._beat_at = 0.0
        self._beat()
        self._thread = threading.Thread(target=self._write, name="longreach-ledger", daemon=True)
        self._thread.start()

    # ---- for every request

    def begin(self, opening: Opening) -> Future[Refusal | None]:
        """Add a request, if its key can pay for it.

        The future gives None once the row is on the disk, or why the request must not run, which is in the ledger too.
        It raises LedgerError if the database refuses; the request must not run then either.
        """
        row = self._row(opening)
        price, key = opening.price, opening.key
        if price is not None:
            assert price.currency == self.database.currency, f"{price.currency} price, {self.database.currency} ledger"
            row["price_hit"], row["price_miss"], row["price_output"] = price.per_token
            # At least something wherever tokens cost something: an empty account then refuses whatever was expected.
            row["reserved"] = max(cost_pico(opening.expected, price), int(any(price.per_token)))
        assert opening.id not in self._running, f"request {opening.id} began twice"
        self._running[opening.id] = _Running(key.id, row["day"], price, time.monotonic())
        return self._put(_Begin(row, key, Future()))

    def finish(
        self, id: str, status: Ending, usage: Usage, *, reason: str = "", first_token_s: float | None = None
    ) -> Future[bool]:
        """Close a request and bill it by `usage` if it was completed or cancelled.

        The future gives True once that is on the disk, False if the request was closed or refused before: then nothing
        has changed. It raises LedgerError if the database refuses; the request is then closed as failed and free, as
        soon as the database can be written again.

        Args:
            reason: the finish reason, or what failed.
            first_token_s: seconds from `begin` to the first token.
        """
        running = self._running.pop(id, None)
        if running is None:
            done: Future[bool] = Future()
            done.set_result(False)
            return done
        amount = cost_pico(usage, running.price) if running.price is not None and status in BILLED else 0
        return self._put(_Finish({
            "row_id": id, "key": running.key_id, "on": running.day, "new_status": status, "new_reason": _text(reason, 64),
            "hit": usage.cached_tokens, "miss": usage.missed_tokens, "completion": usage.completion_tokens,
            "reasoning": usage.reasoning_tokens, "duration": round((time.monotonic() - running.began_s) * 1000),
            "first": None if first_token_s is None else round(first_token_s * 1000), "billed": amount,
        }, Future()))  # fmt: skip

    def refuse(self, opening: Opening, reason: str) -> Future[None]:
        """Note a request that the server turned away itself, for instance with 429. Nobody needs to wait for it."""
        row = self._row(opening)
        row["status"], row["reason"] = "refused", _text(reason, 64)
        return self._put(_Begin(row, opening.key, Future()))

    def check(self, key: Key, when: datetime | None = None) -> Refusal | None:
        """Why a key can pay for nothing at the moment. Reads the database: not for the event loop. Raises LedgerError."""
        if not key.has_money_limit:
            return None
        with self.database.read() as connection:
            room = _Room.of(connection, {key.id}, when or datetime.now(UTC), lock=False).get(key.id)
        return room.refusal(1) if room is not None else None

    def balance(self, key: Key) -> Balance:
        """What a key has at this moment. Reads the database: not for the event loop. Raises LedgerError."""
        return balance_of(self.database, key)

    @property
    def running(self) -> int:
        """Requests of this process that began and have not ended."""
        return len(self._running)

    # ---- for the life of a server

    def recover(self) -> int:
        """Mark as lost what servers left running that are gone, which frees what was reserved; how many there were.

        Call it at the start; afterwards the ledger looks by itself every few seconds.
        Raises LedgerError.
        """
        with self.database.write() as connection:
            dead = [row.id for row in connection.execute(SERVERS.select()) if row.id != self.id and _is_dead(row)]
            if not dead:
                return 0
            lost = connection.execute(
                REQUESTS.update().where(_IS_RUNNING, REQUESTS.c.server_id.in_(dead))
                .values(status="lost", reason="server died")
            ).rowcount  # fmt: skip
            connection.execute(SERVERS.delete().where(SERVERS.c.id.in_(dead)))
        if lost:
            log.warning("%d requests were running when a server died; they are marked lost and not billed", lost)
        return lost

    def close(self) -> None:
        """Write what is waiting, close what still runs as failed, and stop. Calling it again does nothing."""
        if self._is_closed:
            return
        for id in list(self._running):
            self.finish(id, "failed", Usage(), reason="server stopped")
        with self._putting:
            self._is_closed = True
            self._items.put(None)
        self._thread.join()
        try:
            with self.database.write() as connection:
                connection.execute(SERVERS.delete().where(SERVERS.c.id == self.id))
        except LedgerError as error:
            log.warning("%s", error)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the writing thread

    def _row(self, opening: Opening) -> dict[str, Any]:
        when = opening.started or datetime.now(UTC)
        assert when.tzinfo is not None, "a start without its time zone"
        when = when.astimezone(UTC)
        return {
            "id": opening.id, "server_id": self.id, "key_id": opening.key.id, "user_id": _text(opening.user_id, 512),
            "started_ms": int(when.timestamp() * 1000), "day": when.date().isoformat(), "dialect": opening.dialect,
            "model": _text(opening.model), "answered_by": _text(opening.answered_by),
            "is_upstream": opening.is_upstream, "status": "running", "reason": "", "hit_tokens": 0, "miss_tokens": 0,
            "completion_tokens": 0, "reasoning_tokens": 0, "duration_ms": None, "first_token_ms": None,
            "currency": self.database.currency, "price_hit": 0, "price_miss": 0, "price_output": 0, "reserved": 0,
            "amount": 0,
        }  # fmt: skip

    def _put(self, item: _Item) -> Future[Any]:
        # Running: asyncio's cancelling of a wrapper can no longer reach it, and setting the result cannot fail.
        item.future.set_running_or_notify_cancel()
        with self._putting:
            if self._is_closed:
                item.future.set_exception(LedgerError("the ledger is closed: the server is stopping"))
            else:
                self._items.put(item)
        return item.future

    def _write(self) -> None:
        unwritten: list[_Finish] = []
        while True:
            try:
                first = self._items.get(timeout=max(0.0, self._beat_at - time.monotonic()))
            except queue.Empty:
                unwritten = self._housekeep(unwritten)
                continue
            items, is_last = [], first is None
            if first is not None:
                items.append(first)
            while len(items) < MAX_BATCH and not is_last:
                try:
                    item = self._items.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    is_last = True
                else:
                    items.append(item)
            if items:
                unwritten += self._write_batch(items)
            if time.monotonic() >= self._beat_at or is_last:
                unwritten = self._housekeep(unwritten)
            if is_last:
                return

    def _housekeep(self, unwritten: list[_Finish]) -> list[_Finish]:
        """Every few seconds: say that this server lives, look for dead ones, close what could not be closed before."""
        try:
            self._beat()
            self.recover()
            if unwritten:
                with self.database.writing.begin() as connection:
                    self._apply(connection, unwritten, is_retry=True)
            return []
        except Exception as error:  # the next beat tries again, whatever it was
            log.warning(
                "the ledger cannot be written: %s", error if isinstance(error, LedgerError) else reason_of(error)
            )
            return unwritten

    def _beat(self) -> None:
        self._beat_at = time.monotonic() + HEARTBEAT_S
        until = int((time.time() + DEAD_AFTER_S) * 1000)
        values = {
            "id": self.id, "host": _text(socket.gethostname()), "pid": os.getpid(), "process": _PROCESS,
            "alive_until_ms": until,
        }  # fmt: skip
        with self.database.write() as connection:
            insert = self.database.insert(SERVERS).values(values)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["id"], set_={"alive_until_ms": insert.excluded.alive_until_ms}
                )
            )

    def _write_batch(self, items: Sequence[_Item]) -> list[_Finish]:
        """Write items and resolve their futures; what of them has to be closed later because the database refused."""
        # Once it was waited for in vain, nobody waits again before the database has answered.
        deadline, is_retry = time.monotonic() + (0.0 if self._is_down else RETRY_S), False
        pause_s = 0.05
        while True:
            try:
                with self.database.writing.begin() as connection:
                    results = self._apply(connection, items, is_retry)
                break
            except _Unexpected:
                is_retry = True
            except Exception as error:  # even a bug of ours must not leave every later request waiting
                if not _may_pass(error):
                    if len(items) > 1:
                        # One of them cannot be written; the others shall not suffer for it.
                        return [late for item in items for late in self._write_batch([item])]
                    is_known = isinstance(error, DBAPIError)
                    log.error("not written into the ledger: %s", reason_of(error), exc_info=None if is_known else error)
                    return self._give_up(items, error)
                if time.monotonic() >= deadline:
                    self._is_down = True
                    return self._give_up(items, error)
                time.sleep(pause_s)
                pause_s, is_retry = min(2 * pause_s, 1.0), True
        self._is_down = False
        for item, result in zip(items, results, strict=True):
            if isinstance(result, Refusal):
                self._running.pop(item.row["id"], None)
            item.future.set_result(result)
        return []

    def _give_up(self, items: Iterable[_Item], error: Exception) -> list[_Finish]:
        late = []
        for item in items:
            id = item.row["id"] if isinstance(item, _Begin) else item.row["row_id"]
            self._running.pop(id, None)
            # Nobody knows whether a commit whose answer never came took place. If it did, the row is closed later.
            late.append(_Finish({
                "row_id": id, "key": 0, "on": "", "new_status": "failed", "new_reason": "ledger", "hit": 0, "miss": 0,
                "completion": 0, "reasoning": 0, "duration": None, "first": None, "billed": 0,
            }, Future()))  # fmt: skip
            item.future.set_exception(LedgerError(f"the ledger cannot be written: {reason_of(error)}"))
        return late

    def _apply(self, connection: sa.Connection, items: Sequence[_Item], is_retry: bool) -> list[Any]:
        """Do the work of a batch inside a transaction: beginnings first, then endings; the results of the futures."""
        begins = [item for item in items if isinstance(item, _Begin)]
        finishes = [item for item in items if isinstance(item, _Finish)]
        results: dict[int, Any] = {}
        if begins:
            results |= self._apply_begins(connection, begins, is_retry)
        if finishes:
            results |= self._apply_finishes(connection, finishes, is_retry)
        return [results[id(item)] for item in items]

    def _apply_begins(self, connection: sa.Connection, begins: Sequence[_Begin], is_retry: bool) -> dict[int, Any]:
        results: dict[int, Any] = {id(item): None for item in begins}
        if is_retry:
            # Of the first attempt, if it was committed after all: its rows stand, and their refusals with them.
            query = sa.select(REQUESTS.c.id, REQUESTS.c.status, REQUESTS.c.reason).where(
                REQUESTS.c.id.in_([item.row["id"] for item in begins]), REQUESTS.c.server_id == self.id
            )
            there = {row.id: row for row in connection.execute(query)}
            for item in begins:
                row = there.get(item.row["id"])
                if row is not None and row.status == "refused" and item.row["status"] == "running":
                    results[id(item)] = _refusal(row.reason)
            begins = [item for item in begins if item.row["id"] not in there]
            if not begins:
                return results
        limited = {item.key.id for item in begins if item.row["reserved"] and item.key.has_money_limit}
        rooms: dict[int, _Room] = {}
        if limited:
            rooms = _Room.of(connection, limited, datetime.now(UTC), lock=True)
        rows = []
        for item in begins:
            row = item.row
            room = rooms.get(item.key.id)
            refusal = room.refusal(row["reserved"]) if room is not None and row["status"] == "running" else None
            if refusal is not None:
                row = row | {"status": "refused", "reason": refusal.reason, "reserved": 0}
                results[id(item)] = refusal
            elif room is not None:
                room.take(row["reserved"])
            rows.append(row)
        connection.execute(_INSERT, rows)
        self._note_use(connection, rows)
        return results

    def _apply_finishes(self, connection: sa.Connection, finishes: Sequence[_Finish], is_retry: bool) -> dict[int, Any]:
        results: dict[int, Any] = {id(item): True for item in finishes}
        if is_retry:
            query = sa.select(REQUESTS.c.id, REQUESTS.c.status).where(
                REQUESTS.c.id.in_([item.row["row_id"] for item in finishes]), REQUESTS.c.server_id == self.id
            )
            statuses: dict[str, str] = {row.id: row.status for row in connection.execute(query)}
            for item in finishes:
                # Only this process closes its rows: one that is closed as it shall be was closed by the first attempt.
                results[id(item)] = statuses.get(item.row["row_id"]) in (*_OPEN, item.row["new_status"])
            finishes = [item for item in finishes if statuses.get(item.row["row_id"]) in _OPEN]
            if not finishes:
                return results
        closed = connection.execute(_CLOSE, [item.row for item in finishes]).rowcount
        if closed != len(finishes):
            assert not is_retry, "rows changed hands inside a transaction"
            raise _Unexpected  # rolls back; the second attempt looks at each row before it bills
        spending: dict[tuple[int, str], int] = {}
        for item in finishes:
            if item.row["billed"]:
                place = (item.row["key"], item.row["on"])
                spending[place] = spending.get(place, 0) + item.row["billed"]
        if spending:
            # Sorted, so that two servers lock rows in the same order and never wait for each other in a ring.
            rows = [{"key_id": key, "day": day, "amount": amount} for (key, day), amount in sorted(spending.items())]
            connection.execute(self._spend, rows)
        return results

    def _note_use(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """When keys were last used, to a minute."""
        for key_id in sorted({row["key_id"] for row in rows} - {0}):
            now = int(time.time() * 1000)
            if now - self._last_used_ms.get(key_id, 0) >= _LAST_USED_MS:
                self._last_used_ms[key_id] = now
                connection.execute(KEYS.update().where(KEYS.c.id == key_id).values(last_used_ms=now))


def _may_pass(error: Exception) -> bool:
    """Whether waiting can help: the database is busy, full, restarting or out of reach."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | sqlite3.OperationalError)


class _Unexpected(Exception):
    """Not every row of a batch was open."""


# ---- statements: built once, for building one takes longer than running it -------------------------------------------

_OPEN = ("running", "lost")
# Spelled out in the statement, or the index of running requests is not used.
_IS_RUNNING = REQUESTS.c.status == sa.literal_column("'running'")

_INSERT = REQUESTS.insert()
_CLOSE = (
    REQUESTS.update()
    .where(REQUESTS.c.id == sa.bindparam("row_id"), sa.or_(REQUESTS.c.status == "running", REQUESTS.c.status == "lost"))
    .values(
        status=sa.bindparam("new_status"), reason=sa.bindparam("new_reason"), hit_tokens=sa.bindparam("hit"),
        miss_tokens=sa.bindparam("miss"), completion_tokens=sa.bindparam("completion"),
        reasoning_tokens=sa.bindparam("reasoning"), duration_ms=sa.bindparam("duration"),
        first_token_ms=sa.bindparam("first"), amount=sa.bindparam("billed"),
    )
)  # fmt: skip

_ARE_KEYS = KEYS.c.id.in_(sa.bindparam("keys", expanding=True))
_LOCK_KEYS = sa.select(KEYS.c.id).where(_ARE_KEYS).order_by(KEYS.c.id).with_for_update()


def _sum(amount: Any, *conditions: Any) -> Any:
    """A sum for each key of a query over KEYS; NULL where there is nothing to add."""
    table = amount.table
    return sa.select(sa.func.sum(amount)).where(table.c.key_id == KEYS.c.id, *conditions).scalar_subquery()


_ROOM = sa.select(
    KEYS.c.id, KEYS.c.is_prepaid, KEYS.c.budget_day, KEYS.c.budget_month,
    _sum(CREDITS.c.amount).label("credited"),
    _sum(SPENDING.c.amount).label("in_all"),
    _sum(SPENDING.c.amount, SPENDING.c.day.like(sa.bindparam("month"))).label("in_month"),
    _sum(SPENDING.c.amount, SPENDING.c.day == sa.bindparam("day")).label("in_day"),
    _sum(REQUESTS.c.reserved, _IS_RUNNING).label("reserved"),
).where(_ARE_KEYS)  # fmt: skip


# ---- what a key can pay for -----------------------------------------------------------------------------------------


class _Room:
    """How much a key may still spend, by each of its limits, what running requests reserved already taken off."""

    def __init__(self, left: dict[str, int]) -> None:
        self._left = left

    @classmethod
    def of(cls, connection: sa.Connection, keys: set[int], now: datetime, lock: bool) -> dict[int, _Room]:
        """Of several keys, by id.

        Args:
            lock: keep other servers from answering the same question until this transaction ends.
        """
        if lock and connection.dialect.name != "sqlite":  # SQLite has one writer at a time anyway
            # A statement of its own: the sums below must be read after the lock is held, not in the view from before.
            connection.execute(_LOCK_KEYS, {"keys": sorted(keys)})
        day = now.date().isoformat()
        rooms = {}
        for row in connection.execute(_ROOM, {"keys": sorted(keys), "day": day, "month": f"{day[:7]}-%"}):
            left, held = {}, int(row.reserved or 0)
            if row.is_prepaid:
                left["balance"] = int(row.credited or 0) - int(row.in_all or 0) - held
            if row.budget_day is not None:
                left["budget_day"] = row.budget_day - int(row.in_day or 0) - held
            if row.budget_month is not None:
                left["budget_month"] = row.budget_month - int(row.in_month or 0) - held
            rooms[row.id] = cls(left)
        return rooms

    def refusal(self, amount: int) -> Refusal | None:
        """Why this much more may not be spent. What costs nothing is never refused."""
        for reason, left in self._left.items():
            if amount > 0 and amount > left:
                return _refusal(reason)
        return None

    def take(self, amount: int) -> None:
        for reason in self._left:
            self._left[reason] -= amount


_MESSAGES = {
    "balance": "Insufficient Balance",  # the hosted API's own words
    "budget_day": "Insufficient Balance: the budget of this key for today (UTC) does not cover this request.",
    "budget_month": "Insufficient Balance: the budget of this key for this month (UTC) does not cover this request.",
}


def _refusal(reason: str) -> Refusal:
    return Refusal(reason, _MESSAGES[reason])  # pyright: ignore[reportArgumentType]  # a key of the table above


def _is_dead(server: Any) -> bool:
    """Whether the process of a row of SERVERS is gone."""
    if server.alive_until_ms < time.time() * 1000:
        return True
    if server.host != _text(socket.gethostname()):
        return False
    if server.pid == os.getpid():
        # Its number may have been given to this process: a restarted container has the same ones again.
        return server.process != _PROCESS
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's process, so there is one
    return False


def _text(text: str, limit: int = _TEXT_LIMIT) -> str:
    """Text that every database takes: no lone surrogates, no zero characters, not longer than its column."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")[:limit]
