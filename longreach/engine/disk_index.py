"""The index of the disk cache: which records there are, their sizes and last uses, in an SQLite database.

    index = DiskIndex(path, create=False)
    index.known(names)                       reading, which never waits for a writer
    with index.transaction(wait_s) as rows:  the right to change files and their rows together
        rows.put(name, folder, nbytes, last_used)

The files of the records are the truth (`disk.py`) and this a directory of them. So nothing is saved from a power failure:
an index that is found torn is removed and made again.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from longreach.engine.disk_record import FOLDER_NBYTES, NAME_NBYTES

BUSY_S = 2.0
"""How long a write waits for another process's; those take milliseconds."""

_SCHEMA = f"""
    CREATE TABLE records (
        name BLOB PRIMARY KEY CHECK (typeof(name) = 'blob' AND length(name) = {NAME_NBYTES}),
        folder BLOB NOT NULL CHECK (typeof(folder) = 'blob' AND length(folder) = {FOLDER_NBYTES}),
        nbytes INTEGER NOT NULL CHECK (typeof(nbytes) = 'integer' AND nbytes >= 0),
        last_used INTEGER NOT NULL CHECK (typeof(last_used) = 'integer')
    ) WITHOUT ROWID;
    CREATE INDEX by_last_use ON records (last_used);
    CREATE TABLE totals (records INTEGER NOT NULL, bytes INTEGER NOT NULL);
    INSERT INTO totals VALUES (0, 0);
    CREATE TRIGGER added AFTER INSERT ON records BEGIN
        UPDATE totals SET records = records + 1, bytes = bytes + new.nbytes; END;
    CREATE TRIGGER removed AFTER DELETE ON records BEGIN
        UPDATE totals SET records = records - 1, bytes = bytes - old.nbytes; END;
    CREATE TRIGGER resized AFTER UPDATE OF nbytes ON records BEGIN
        UPDATE totals SET bytes = bytes + new.nbytes - old.nbytes; END;
"""
_SCHEMA_VERSION = 1

_UPSERT = """
    INSERT INTO records VALUES (?, ?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET folder = excluded.folder, nbytes = excluded.nbytes, last_used = excluded.last_used
"""


class _WrongIndex(sqlite3.DatabaseError):
    """A database that SQLite can read and that is not a whole index."""


class DiskIndex:
    """The database: one connection that writes, one that reads and never waits for it.

    Every method raises sqlite3.Error; `is_damage` tells a damaged database from one that is busy or cannot grow.

    Args:
        create: make a database that is not there, instead of raising.
    """

    def __init__(self, path: Path, create: bool) -> None:
        self.path = path
        try:
            self._writer = _connect(path, create)
            try:
                self._check_or_create()
                self._reader = _connect(path, create=False)
            except BaseException:
                self._writer.close()
                raise
        except UnicodeDecodeError:  # Python's module, of SQLite's complaint about a damaged schema
            raise _WrongIndex("its schema is damaged") from None
        self._reading = threading.Lock()
        self._max_names = self._reader.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)

    def _check_or_create(self) -> None:
        db = self._writer
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if tables == 0 and version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
            return
        if version != _SCHEMA_VERSION:
            raise _WrongIndex(f"schema version {version} where {_SCHEMA_VERSION} belongs")
        complaint = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if complaint != "ok":
            raise _WrongIndex(complaint)
        if len(db.execute("SELECT records, bytes FROM totals").fetchall()) != 1:
            raise _WrongIndex("totals are missing")
        db.execute("SELECT name, folder, nbytes, last_used FROM records LIMIT 1")

    @contextmanager
    def transaction(self, wait_s: float) -> Iterator[Rows]:
        """The right to change files and their rows together, held by one process at a time.

        When a file refuses (OSError) the rows changed so far stay, as the files did change; when the index itself
        refuses they are as before. The caller lets one thread in at a time.
        """
        db = self._writer
        db.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
        db.execute("BEGIN IMMEDIATE")
        try:
            try:
                yield Rows(db)
            except OSError:
                db.execute("COMMIT")
                raise
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def known(self, names: Sequence[bytes]) -> set[bytes]:
        """Those of `names` that have a row."""
        found: set[bytes] = set()
        for start in range(0, len(names), self._max_names):
            some = names[start : start + self._max_names]
            question = f"SELECT name FROM records WHERE name IN ({', '.join('?' * len(some))})"
            with self._reading:
                found.update(name for (name,) in self._reader.execute(question, some))
        return found

    def totals(self, folder: bytes) -> tuple[int, int, int]:
        """Records, their bytes, and how many of them are in `folder`; the last reads the whole index."""
        question = "SELECT records, bytes, (SELECT count(*) FROM records WHERE folder = ?) FROM totals"
        with self._reading:
            return self._reader.execute(question, (folder,)).fetchone()

    def sizes(self, first: int) -> dict[bytes, tuple[bytes, int]]:
        """Folder and size of every record whose name begins with the byte `first`."""
        low, high = bytes([first]), bytes([first]) + b"\xff" * NAME_NBYTES
        question = "SELECT name, folder, nbytes FROM records WHERE name BETWEEN ? AND ?"
        with self._reading:
            return {name: (folder, nbytes) for name, folder, nbytes in self._reader.execute(question, (low, high))}

    def reconcile(
        self,
        files_of: Callable[[int], Mapping[bytes, tuple[bytes, int]]],
        status_of: Callable[[bytes, bytes], os.stat_result],
    ) -> int:
        """Give every file its row and remove rows without a file.

        Other processes go on meanwhile: whatever differs is looked at again with the right to write.

        Args:
            files_of: like `sizes`, of the files.
            status_of: of the file of a folder and a name; raises FileNotFoundError if there is none.

        Returns:
            The number of files that had no row.
        """
        adopted = 0
        for first in range(256):
            known, files = self.sizes(first), files_of(first)
            differing = [name for name in known.keys() | files.keys() if known.get(name) != files.get(name)]
            if not differing:
                continue
            with self.transaction(BUSY_S) as rows:
                for name in differing:
                    folder, _ = files.get(name) or known[name]
                    try:
                        status = status_of(folder, name)
                    except FileNotFoundError:
                        rows.remove(name)
                        continue
                    row = rows.row(name)
                    adopted += row is None
                    rows.put(name, folder, status.st_size, row[1] if row else status.st_mtime_ns)
        with self.transaction(BUSY_S) as rows:
            rows.settle(time.time_ns())
        return adopted

    def close(self) -> None:
        with self._reading:
            self._reader.close()
        self._writer.close()


class Rows:
    """The rows, in the hands of who may change them: valid inside one `DiskIndex.transaction`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def total_bytes(self) -> int:
        """Of all records."""
        return self._db.execute("SELECT bytes FROM totals").fetchone()[0]

    def row(self, name: bytes) -> tuple[int, int] | None:
        """Size and last use of a record."""
        return self._db.execute("SELECT nbytes, last_used FROM records WHERE name = ?", (name,)).fetchone()

    def oldest(self, keep: bytes | None) -> Iterator[tuple[bytes, bytes, int]]:
        """Name, folder and size, the least recently used first, `keep` never. Remove each before asking for the next."""
        question = "SELECT name, folder, nbytes FROM records WHERE name IS NOT ? ORDER BY last_used LIMIT 64"
        while some := self._db.execute(question, (keep,)).fetchall():
            yield from some

    def put(self, name: bytes, folder: bytes, nbytes: int, last_used: int) -> None:
        """Add a row, or replace it."""
        self._db.execute(_UPSERT, (name, folder, nbytes, last_used))

    def remove(self, name: bytes) -> None:
        """Remove a row, if there is one."""
        self._db.execute("DELETE FROM records WHERE name = ?", (name,))

    def use(self, uses: Mapping[bytes, int]) -> None:
        """Set the last use of the names that have a row, never to an earlier one."""
        self._db.executemany(
            "UPDATE records SET last_used = ?1 WHERE name = ?2 AND last_used < ?1",
            [(last_used, name) for name, last_used in uses.items()],
        )

    def settle(self, now: int) -> None:
        """Add the totals up again, and let no last use lie in the future.

        A clock that was ahead, or a flipped bit, would keep a record for ever.
        """
        self._db.execute("UPDATE records SET last_used = ?1 WHERE last_used > ?1", (now,))
        self._db.execute(
            "UPDATE totals SET records = (SELECT count(*) FROM records),"
            " bytes = (SELECT coalesce(sum(nbytes), 0) FROM records)"
        )


def _connect(path: Path, create: bool) -> sqlite3.Connection:
    uri = f"{path.as_uri()}?mode={'rwc' if create else 'rw'}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")  # what a power failure tears is rebuilt from the files
    except BaseException:
        db.close()
        raise
    return db


# ---- what an error of the index or of a file means --------------------------------------------------------------------

_NOT_DAMAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_MISUSE,
}  # fmt: skip


def is_damage(error: Exception, also: Sequence[int] = ()) -> bool:
    """Whether the index itself is wrong, rather than the moment or the disk. Codes in `also` count as damage."""
    code = getattr(error, "sqlite_errorcode", None)  # absent if Python's module refused, not SQLite
    if code is None:
        return isinstance(error, _WrongIndex)
    return code & 0xFF in also or code & 0xFF not in _NOT_DAMAGE


def cause_of(error: OSError | sqlite3.Error) -> str:
    """The name of the system's or SQLite's code: ENOSPC, SQLITE_BUSY."""
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return getattr(error, "sqlite_errorname", type(error).__name__)


def in_words(error: OSError | sqlite3.Error) -> str:
    """What happened and where, in one line."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    name = getattr(error, "sqlite_errorname", None)
    return " ".join(f"index: {error}".split()) + (f" ({name})" if name else "")


def remedy_for(error: OSError | sqlite3.Error) -> str:
    """What to do about it: a sentence."""
    cause = cause_of(error)
    if cause in ("ENOSPC", "EDQUOT", "SQLITE_FULL"):
        return "Free some space there, or give the disk cache a smaller limit."
    if cause in ("EACCES", "EPERM", "EROFS") or cause.startswith("SQLITE_READONLY"):
        return "Make the folder writable."
    if cause.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "Another process holds the index; if it hangs, end it."
    return "Look at the disk, or give another folder."
