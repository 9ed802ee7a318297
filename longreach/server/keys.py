"""API keys: who may use a server, how much of it, and with which models.

    sk-lr-<43 characters of base62>          32 random bytes

    key, secret = keys.add("laptop", concurrency=4)     the secret is shown once and kept nowhere
    keys.lookup(secret) -> Key | None                    from memory, for every request

What is stored is the SHA-256 of a secret and its first characters, to recognise it by. A slow password hash would add
nothing: those protect short secrets that people choose and others guess, and nobody can guess 256 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from longreach.errors import RequestError
from longreach.server.database import CREDITS, KEYS, META, Database, LedgerError, mark_keys_changed
from longreach.server.prices import from_pico

log = logging.getLogger("longreach")

SECRET_START = "sk-lr-"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_NBYTES = 32
_SECRET_DIGITS = 43  # 62 ** 43 > 256 ** 32
_PREFIX_CHARS = len(SECRET_START) + 6
"""Shown in lists. Of 256 bits these characters tell 36."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MAX_LIMIT = 10**12
_MAX_CREDIT = 8 * 10**18
"""Pico-units: what a key may be given in all, so that sums fit 64-bit integers."""


@dataclass(frozen=True)
class Key:
    """A key as it was when it was read.

    Attributes:
        id: unlike the name never given again; 0: a server without keys.
        prefix: the first characters of the secret.
        created, revoked, last_used: UTC; `last_used` is exact to a minute.
        concurrency: requests at a time. tokens_per_minute: prompt and answer together. None: no limit, as below.
        budget_day, budget_month: pico-units of the database's currency, by UTC days and months.
        is_prepaid: spends a balance and stops when it is used up.
        models: names that may be asked for; empty: all.
    """

    id: int
    name: str
    prefix: str = ""
    created: datetime | None = None
    revoked: datetime | None = None
    last_used: datetime | None = None
    concurrency: int | None = None
    tokens_per_minute: int | None = None
    budget_day: int | None = None
    budget_month: int | None = None
    is_prepaid: bool = False
    models: tuple[str, ...] = ()

    @property
    def has_money_limit(self) -> bool:
        return self.is_prepaid or self.budget_day is not None or self.budget_month is not None

    def allows(self, model: str) -> bool:
        """Whether this name may be asked for."""
        return not self.models or model in self.models


NO_KEY = Key(0, "")
"""Everyone, on a server without keys: no limits."""


def new_secret() -> str:
    """A secret nobody has."""
    number, digits = int.from_bytes(secrets.token_bytes(_SECRET_NBYTES)), []
    for _ in range(_SECRET_DIGITS):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return SECRET_START + "".join(digits)


def digest_of(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyStore:
    """The keys of a database.

    `lookup` reads memory alone. With `watch()` a thread looks every `poll_s` seconds whether any process has added or
    revoked a key, so that a change holds everywhere within about that time. If the database cannot be reached for
    `forget_s` seconds, no key is accepted until it can: a revocation might have been missed.
    """

    def __init__(self, database: Database, poll_s: float = 1.0, forget_s: float = 60.0) -> None:
        self.database, self.poll_s, self.forget_s = database, poll_s, forget_s
        self._by_prefix: dict[str, list[tuple[str, Key]]] = {}
        self._seen: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._refreshing = threading.Lock()
        self.refresh()

    # ---- for every request

    def lookup(self, secret: str) -> Key | None:
        """The key of a secret; None if there is none or it is revoked. Touches no disk."""
        digest = digest_of(secret)
        found = None
        for stored, key in self._by_prefix.get(secret[:_PREFIX_CHARS], ()):
            # The time a comparison takes tells nothing about how much of a digest was right.
            if hmac.compare_digest(stored, digest):
                found = key
        return found

    def __len__(self) -> int:
        """Keys that are not revoked."""
        return sum(map(len, self._by_prefix.values()))

    def refresh(self) -> None:
        """Read the keys again if any has changed. Raises LedgerError."""
        with self._refreshing, self.database.read() as connection:
            seen = connection.scalar(sa.select(META.c.value).where(META.c.name == "keys_changed"))
            if seen == self._seen and self._by_prefix:
                return
            by_prefix: dict[str, list[tuple[str, Key]]] = {}
            for row in connection.execute(KEYS.select().where(KEYS.c.revoked_ms.is_(None))):
                by_prefix.setdefault(row.prefix, []).append((row.digest, _key_of(row)))
            self._by_prefix, self._seen = by_prefix, seen

    def watch(self) -> None:
        """Begin to look for changes."""
        assert self._thread is None, "watched already"
        self._thread = threading.Thread(target=self._watch, name="longreach-keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking for changes."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        last_read = time.monotonic()
        while not self._stop.wait(self.poll_s):
            try:
                self.refresh()
                last_read = time.monotonic()
            except LedgerError as error:
                if self._by_prefix and time.monotonic() - last_read > self.forget_s:
                    log.warning("keys cannot be read, none is accepted until they can: %s", error)
                    self._by_prefix = {}

    # ---- for whoever runs the server

    def add(
        self,
        name: str,
        *,
        concurrency: int | None = None,
        tokens_per_minute: int | None = None,
        budget_day: int | None = None,
        budget_month: int | None = None,
        balance: int | None = None,
        models: Sequence[str] = (),
    ) -> tuple[Key, str]:
        """Make a key; it and its secret, which cannot be had again.

        Args:
            budget_day, budget_month: pico-units. balance: the same, granted at once; None: not limited by a balance.

        Raises:
            RequestError: a name that is in use or not allowed, a limit that is none.
            LedgerError: the database refuses.
        """
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"key name {name!r} is not allowed; use 1 to 64 letters, digits, dots, dashes, underscores or @, "
                "beginning with a letter or digit"
            )
        for what, limit in (("concurrency", concurrency), ("tokens-per-minute", tokens_per_minute)):
            if limit is not None and not 1 <= limit <= _MAX_LIMIT:
                raise RequestError(f"--{what} {limit} is no limit; give a whole number of at least 1, or leave it out")
        secret = new_secret()
        row: dict[str, Any] = {
            "name": name, "prefix": secret[:_PREFIX_CHARS], "digest": digest_of(secret), "created_ms": _now_ms(),
            "revoked_ms": None, "last_used_ms": None, "concurrency": concurrency, "tokens_per_minute": tokens_per_minute,
            "budget_day": budget_day, "budget_month": budget_month, "is_prepaid": balance is not None,
            "models": json.dumps(list(models)),
        }  # fmt: skip
        with self.database.write() as connection:
            if _active(connection, name) is not None:
                raise RequestError(f"a key named {name!r} exists; choose another name, or revoke it first")
            key_id = connection.execute(KEYS.insert().returning(KEYS.c.id), row).scalar_one()
            if balance:
                _add_credit(connection, key_id, balance, is_granted=True)
            mark_keys_changed(connection)
            made = connection.execute(KEYS.select().where(KEYS.c.id == key_id)).one()
        self.refresh()
        return _key_of(made), secret

    def revoke(self, name: str) -> Key:
        """End a key for good; it as it was.

        Raises:
            RequestError: no such key.
        """
        with self.database.write() as connection:
            key = self._named(connection, name)
            connection.execute(KEYS.update().where(KEYS.c.id == key.id).values(revoked_ms=_now_ms()))
            mark_keys_changed(connection)
        self.refresh()
        return key

    def top_up(self, name: str, amount: int, is_granted: bool = False) -> Key:
        """Add pico-units to the balance of a key.

        Args:
            is_granted: a gift, which is used up before what was paid in.

        Raises:
            RequestError: no such key, nothing to add, or a key that spends no balance.
        """
        if amount <= 0:
            raise RequestError("a top-up of nothing changes nothing; give an amount above 0")
        with self.database.write() as connection:
            key = self._named(connection, name)
            if not key.is_prepaid:
                raise RequestError(f"key {name!r} is not limited by a balance; only keys made with --balance are")
            has = connection.scalar(sa.select(sa.func.sum(CREDITS.c.amount)).where(CREDITS.c.key_id == key.id))
            if int(has or 0) + amount > _MAX_CREDIT:
                raise RequestError(
                    f"key {name!r} was given {from_pico(int(has or 0)):,f} already; more cannot be counted"
                )
            _add_credit(connection, key.id, amount, is_granted)
        return key

    def all(self) -> list[Key]:
        """Every key there ever was, oldest first."""
        with self.database.read() as connection:
            return [_key_of(row) for row in connection.execute(KEYS.select().order_by(KEYS.c.id))]

    def _named(self, connection: sa.Connection, name: str) -> Key:
        row = _active(connection, name)
        if row is None:
            query = sa.select(KEYS.c.name).where(KEYS.c.revoked_ms.is_(None)).order_by(KEYS.c.id).limit(20)
            names = ", ".join(connection.scalars(query))
            raise RequestError(f"no key named {name!r} in use; {f'there are {names}' if names else 'there is none'}")
        return _key_of(row)


def _active(connection: sa.Connection, name: str) -> Any:
    return connection.execute(KEYS.select().where(KEYS.c.name == name, KEYS.c.revoked_ms.is_(None))).one_or_none()


def _add_credit(connection: sa.Connection, key_id: int, amount: int, is_granted: bool) -> None:
    values = {"key_id": key_id, "time_ms": _now_ms(), "is_granted": is_granted, "amount": amount}
    connection.execute(CREDITS.insert(), values)


def _key_of(row: Any) -> Key:
    return Key(
        row.id, row.name, row.prefix, _moment(row.created_ms), _moment(row.revoked_ms), _moment(row.last_used_ms),
        row.concurrency, row.tokens_per_minute, row.budget_day, row.budget_month, row.is_prepaid,
        tuple(json.loads(row.models)),
    )  # fmt: skip


def _moment(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
