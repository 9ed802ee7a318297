"""Where a server keeps its keys and its ledger: SQLite in the server's directory, or PostgreSQL by URL.

    DIR/ledger.sqlite         by default in ~/.longreach/server
    --database postgresql://user@host/name

    with open_database(directory) as database:
        with database.write() as connection: ...     one transaction, committed when the block ends
        with database.read() as connection: ...      one consistent view, which waits for no writer

Every commit is on the disk when it returns (SQLite: write-ahead log, `synchronous = FULL`; PostgreSQL: its default), so
neither a killed process nor a power failure takes it back. All amounts are integers, see `prices.py`.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Connection, Engine, Index, Integer, MetaData, String, Table, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from longreach.errors import LongreachError, RequestError

DEFAULT_DIRECTORY = Path("~/.longreach/server")
FILE_NAME = "ledger.sqlite"

VERSION = 1
"""Of the tables below."""

MIGRATIONS: dict[int, Callable[[Connection], None]] = {}
"""By version: what turns tables of that version into those of the next, inside the transaction that opens them."""

_BUSY_S = 10.0
_LOCK = 0x6C6F6E67
"""PostgreSQL's advisory lock that one opener holds while it makes or changes the tables."""


class LedgerError(LongreachError, RuntimeError):
    """A database that cannot be opened, read or written."""


# ---- tables ---------------------------------------------------------------------------------------------------------

TABLES = MetaData()

META = Table(
    "longreach_meta", TABLES,
    Column("name", String(32), primary_key=True),  # version, currency, keys_changed
    Column("value", String(64), nullable=False),
)  # fmt: skip

KEYS = Table(
    "longreach_keys", TABLES,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("prefix", String(16), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the secret, hexadecimal
    Column("created_ms", BigInteger, nullable=False),           # all times: milliseconds since 1970, UTC
    Column("revoked_ms", BigInteger),
    Column("last_used_ms", BigInteger),
    Column("concurrency", BigInteger),                          # NULL: no limit, here and below
    Column("tokens_per_minute", BigInteger),
    Column("budget_day", BigInteger),                           # pico-units
    Column("budget_month", BigInteger),
    Column("is_prepaid", Boolean, nullable=False),              # limited by its balance
    Column("models", String, nullable=False),                   # JSON list; empty: all
)  # fmt: skip
# A name may be given again once its key is revoked.
Index("longreach_key_names", KEYS.c.name, unique=True, sqlite_where=KEYS.c.revoked_ms.is_(None),
      postgresql_where=KEYS.c.revoked_ms.is_(None))  # fmt: skip

CREDITS = Table(
    "longreach_credits", TABLES,
    Column("id", Integer, primary_key=True),
    Column("key_id", Integer, nullable=False, index=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("is_granted", Boolean, nullable=False),  # a gift, used up before what was paid in
    Column("amount", BigInteger, nullable=False),
)  # fmt: skip

SERVERS = Table(
    "longreach_servers", TABLES,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("process", String(32), nullable=False),         # another process that got the same number has another
    Column("alive_until_ms", BigInteger, nullable=False),  # a server that is alive moves this on
)  # fmt: skip

REQUESTS = Table(
    "longreach_requests", TABLES,
    Column("id", String(64), primary_key=True),
    Column("server_id", String(32), nullable=False),
    Column("key_id", Integer, nullable=False),               # 0: a server without keys
    Column("user_id", String(512), nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("day", String(10), nullable=False),               # of started_ms, UTC
    Column("dialect", String(32), nullable=False),
    Column("model", String(255), nullable=False),            # as it was asked for
    Column("answered_by", String(255), nullable=False),
    Column("is_upstream", Boolean, nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", String(64), nullable=False),            # how the answer ended, or why there is none
    Column("hit_tokens", BigInteger, nullable=False),
    Column("miss_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),  # among the completion tokens
    Column("duration_ms", BigInteger),
    Column("first_token_ms", BigInteger),                    # after the start
    Column("currency", String(3), nullable=False),
    Column("price_hit", BigInteger, nullable=False),         # pico-units per token
    Column("price_miss", BigInteger, nullable=False),
    Column("price_output", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),          # pico-units, counts while it runs
    Column("amount", BigInteger, nullable=False),            # pico-units, what was billed
)  # fmt: skip
Index("longreach_requests_by_time", REQUESTS.c.started_ms)
# Small however long the ledger grows: reservations and what a crash left are read from it.
Index("longreach_requests_running", REQUESTS.c.key_id, sqlite_where=REQUESTS.c.status == "running",
      postgresql_where=REQUESTS.c.status == "running")  # fmt: skip

SPENDING = Table(
    "longreach_spending", TABLES,  # always the sum of the requests' amounts; keeps the check of a budget short
    Column("key_id", Integer, primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("amount", BigInteger, nullable=False),
)  # fmt: skip


# ---- opening --------------------------------------------------------------------------------------------------------


class Database:
    """An open database of the current version. May be used from any thread, and by any number of processes at a time.

    Attributes:
        currency: of every amount in it.
        where: its path or URL without the password, for messages.
        engine, writing: SQLAlchemy's, for transactions that only read and for those that write.
    """

    def __init__(self, engine: Engine, where: str, currency: str) -> None:
        self.engine, self.where, self.currency = engine, where, currency
        self.writing = engine.execution_options(is_writing=True)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is on the disk when the block has ended, or has changed nothing when it raised.

        Raises:
            LedgerError: the database refuses.
        """
        try:
            with self.writing.begin() as connection:
                yield connection
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise LedgerError(f"{self.where} cannot be written: {reason_of(error)}") from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing. Raises LedgerError."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise LedgerError(f"{self.where} cannot be read: {reason_of(error)}") from error

    def insert(self, table: Table) -> Any:
        """An INSERT that knows `on_conflict_do_update`."""
        dialect = sqlite if self.engine.dialect.name == "sqlite" else postgresql
        return dialect.insert(table)

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_database(
    directory: str | Path | None = None, url: str | None = None, *, create: bool = True, currency: str | None = None
) -> Database:
    """Open a server's database, making it or bringing it to the current version where needed.

    Args:
        directory: of the server; None: `~/.longreach/server`. Not used with `url`.
        url: of a PostgreSQL database, or `sqlite:///path`.
        create: make what is not there.
        currency: three letters that the amounts must be in. A new database takes them, or USD.

    Raises:
        LedgerError: not there, not reachable, something else's, damaged, of a newer version, or in another currency.
        RequestError: a URL or a currency that is none, or a kind of database that is not supported.
    """
    if currency is not None and not re.fullmatch("[A-Z]{3}", currency):
        raise RequestError(f"--currency {currency!r} is not three capital letters, like USD or CNY")
    engine, where, file = _make_engine(directory, url)
    if file is not None and not create and not file.exists():
        raise LedgerError(f"{where} does not exist: no server has kept a ledger there; give --server or --database")
    try:
        if file is not None:
            _make_file(file, where)
        database = Database(engine, where, "")
        with _one_at_a_time(database) as connection:
            database.currency = _check_tables(connection, where, create, currency)
        return database
    except BaseException:
        engine.dispose()
        raise


def _make_engine(directory: str | Path | None, url: str | None) -> tuple[Engine, str, Path | None]:
    """The engine, its name for messages, and the file of an SQLite database."""
    if url is None:
        file = Path(directory or DEFAULT_DIRECTORY).expanduser() / FILE_NAME
        address = sa.URL.create("sqlite", database=str(file))
    else:
        try:
            address = sa.make_url(url)
        except ArgumentError:
            raise RequestError("--database is not a URL; give one like postgresql://user@host/name") from None
        kind = address.drivername.partition("+")[0]
        if kind in ("postgresql", "postgres"):
            address = address.set(drivername="postgresql+psycopg")
        elif kind != "sqlite" or not address.database or address.database == ":memory:":
            raise RequestError(
                f"--database {address.render_as_string()} is not supported; give postgresql://user@host/name "
                "or sqlite:///path"
            )
        file = Path(address.database or "") if kind == "sqlite" else None
    where = str(file) if file is not None else address.render_as_string(hide_password=True)
    if file is None:
        try:
            # A broken connection is noticed before it is given out, so that a restart of the database costs no request.
            return _engine(address, pool_pre_ping=True, connect_args={"connect_timeout": 10}), where, None
        except ImportError:
            raise RequestError("PostgreSQL needs psycopg: pip install 'longreach[postgres]'") from None
    engine = _engine(address, connect_args={"timeout": _BUSY_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine, where, file


def _engine(address: sa.URL, **options: Any) -> Engine:
    # Without the parameters in errors, which would carry people's labels into logs.
    return sa.create_engine(address, hide_parameters=True, **options)


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins; Python's module would do it late, and not for reads
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later can fail however long it waits; one that will write says so at once.
    is_writing = connection.get_execution_options().get("is_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _make_file(file: Path, where: str) -> None:
    """The directory, and an empty file that only its owner may read: it holds what people asked for and when."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise LedgerError(f"{where} cannot be opened for writing: {error.strerror or error}") from None


@contextmanager
def _one_at_a_time(database: Database) -> Iterator[Connection]:
    """The transaction that makes or changes tables; other openers wait."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            # The switch to a write-ahead log, once in the life of a file, does not wait for others by itself.
            database.engine.connect().close()
            break
        except (DBAPIError, sqlite3.Error) as error:
            if "database is locked" not in str(error) or time.monotonic() > deadline:
                raise LedgerError(f"{database.where} cannot be opened: {reason_of(error)}") from error
            time.sleep(0.02)
    with database.write() as connection:
        if database.engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        yield connection


def _check_tables(connection: Connection, where: str, create: bool, currency: str | None) -> str:
    """Make, check or migrate the tables; the currency."""
    names = set(sa.inspect(connection).get_table_names())
    if META.name not in names:
        if any(table in names for table in TABLES.tables):
            raise LedgerError(f"{where} is damaged: {META.name} is missing; restore it from a copy")
        # SQLite files belong to one program. A PostgreSQL database may be shared, our tables carry their own prefix.
        if names and connection.dialect.name == "sqlite":
            raise LedgerError(f"{where} is a database of something else; give another --server or --database")
        if not create:
            raise LedgerError(f"{where} holds no ledger: no server has kept one there; give --server or --database")
        TABLES.create_all(connection)
        values = {"version": str(VERSION), "currency": currency or "USD", "keys_changed": ""}
        connection.execute(META.insert(), [{"name": name, "value": value} for name, value in values.items()])
        return values["currency"]
    meta: dict[str, str] = {row.name: row.value for row in connection.execute(META.select())}
    try:
        version, has = int(meta["version"]), meta["currency"]
    except (KeyError, ValueError):
        raise LedgerError(f"{where} is damaged: its version is missing; restore it from a copy") from None
    if version > VERSION:
        raise LedgerError(
            f"{where} was written by a newer longreach (ledger version {version}, this one knows {VERSION}); upgrade"
        )
    for old in range(version, VERSION):
        MIGRATIONS[old](connection)
    if version < VERSION:
        connection.execute(META.update().where(META.c.name == "version").values(value=str(VERSION)))
    if currency is not None and currency != has:
        raise LedgerError(
            f"{where} is kept in {has}, not {currency}; use prices in {has}, or another --server directory"
        )
    return has


def mark_keys_changed(connection: Connection) -> None:
    """Tell every `KeyStore` on this database to read the keys again."""
    connection.execute(META.update().where(META.c.name == "keys_changed").values(value=uuid.uuid4().hex))


def reason_of(error: Exception) -> str:
    """The database's own words, in one line, without the statement that SQLAlchemy adds."""
    words = str(getattr(error, "orig", None) or error).strip().splitlines()
    return words[0] if words else type(error).__name__
