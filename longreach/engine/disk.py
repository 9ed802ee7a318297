"""Prefixes kept on disk: exactly the bytes put under a key by the same kind of engine, or nothing.

A record is one page or one state of a prompt. It is found by four things: the engine's fingerprint, the tenant, the kind
and a 32-byte key. A folder may be shared by engines, processes and models; each sees only its own fingerprint's records,
while the size bound and the order of eviction cover all of them. It must be on a local disk (file locks, SQLite's WAL).

    directory/
      opening.lock               held while a store is opened, so that two never repair the folder at once
      index-<8 hex>.sqlite       which records there are, their size and last use; -wal and -shm are SQLite's
      writing/<id>.lock          held for as long as one open store lives
      writing/<id>.<n>           a record that store is writing
      <folder>/fingerprint.txt   the fingerprint, for people; <folder> is the first 16 bytes, in hex, of the
                                 blake2b-256 digest of "longreach prefix record 1" + newline + the fingerprint
      <folder>/<xx>/<name>.rec   one record; <name> is 20 bytes in hex, the blake2b-160 digest of <folder> (16 bytes),
                                 key (32), kind (12, padded with zeros) and tenant; <xx> its first two characters

A record, all numbers unsigned and little-endian:

    bytes 0-7      "lrprefix"
          8-11     format version, 1
          12-15    t, length of the tenant          16-19   m, length of the meta
          20-27    p, length of the payload
          28-39    kind, ASCII padded with zeros
          40-71    blake2b-256 digest of the fingerprint, as above
          72-103   key
          104-     tenant (t bytes of UTF-8), meta (m bytes of JSON), payload (p bytes), and
                   SHA-256 of everything before it (32 bytes)

SHA-256, as it is the fastest of hashlib's digests on processors with instructions for it (75 KiB: 43 µs; blake2b: 82 µs).

The files are the truth, the index a directory of them. `get` opens the file its name says and believes nothing that the
header and the checksum do not confirm. A record is written under `writing/`, renamed, then given its row. Nothing waits
for the disk (no fsync): after a power failure a torn record fails its checksum, a torn index is rebuilt from the files.
Opening a store compares files and rows and lets the files win.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import sqlite3
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longreach.errors import CacheError, ConfigError
from longreach.runtime import log

KINDS = ("page", "state")
KEY_NBYTES = 32

MAGIC = b"lrprefix"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<8sIIIQ12s32s32s")
_CHECKSUM_NBYTES = 32
_FOLDER_NBYTES, _NAME_NBYTES = 16, 20

BUSY_S = 2.0
"""How long a write waits for another process's; those take milliseconds."""
OPENING_S = 60.0
"""How long opening waits for another process that is opening the same folder."""
USES_SAVED_EVERY_NS = 5_000_000_000
"""Last uses are kept in memory and saved with the next put, at the latest after this long (at the next get), and at close."""
REPORT_AGAIN_S = 3600.0
"""A cause of failure that lasts is reported once in this time."""

Bytes = bytes | bytearray | memoryview
Payload = Bytes | Sequence[Bytes]


@dataclass(frozen=True)
class DiskRecord:
    """What was put: `payload` as one piece, `meta` as JSON gives it back."""

    kind: str
    payload: bytes
    meta: dict[str, Any]


@dataclass(frozen=True)
class DiskStats:
    """The folder as a whole, and what this store did since it was opened."""

    records: int  # in the folder, of every fingerprint
    bytes: int  # sizes of their files
    limit_bytes: int
    hits: int
    misses: int  # damaged records included
    written: int
    refused: int  # larger than the limit
    evicted: int
    damaged: int
    write_errors: int


_COUNTED = ("hits", "misses", "written", "refused", "evicted", "damaged", "write_errors")


# ---- one record as bytes ----------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """What is wrong with a record, in words."""


def _header(fingerprint: bytes, tenant: bytes, kind: str, key: bytes, meta: bytes, payload_nbytes: int) -> bytes:
    """Everything before the payload."""
    fixed = _HEADER.pack(
        MAGIC, FORMAT_VERSION, len(tenant), len(meta), payload_nbytes, kind.encode("ascii"), fingerprint, key
    )
    return fixed + tenant + meta


def _unpacked(record: bytes, fingerprint: bytes, tenant: bytes, kind: str, key: bytes) -> DiskRecord:
    """The record in the bytes of a file, if they are whole and are the record asked for; raises _Damaged."""
    if len(record) < _HEADER.size + _CHECKSUM_NBYTES:
        raise _Damaged(f"it ends after {len(record)} bytes, before its header does")
    magic, version, tenant_nbytes, meta_nbytes, payload_nbytes, *identity = _HEADER.unpack_from(record)
    if magic != MAGIC:
        raise _Damaged("it does not begin like a record")
    nbytes = _HEADER.size + tenant_nbytes + meta_nbytes + payload_nbytes + _CHECKSUM_NBYTES
    if len(record) != nbytes:
        raise _Damaged(f"it has {len(record)} bytes where its header says {nbytes}")
    if hashlib.sha256(memoryview(record)[:-_CHECKSUM_NBYTES]).digest() != record[-_CHECKSUM_NBYTES:]:
        raise _Damaged("its checksum does not fit its contents")
    if version != FORMAT_VERSION:
        raise _Damaged(f"it has format version {version} where {FORMAT_VERSION} belongs")
    meta_at = _HEADER.size + tenant_nbytes
    payload_at = meta_at + meta_nbytes
    expected = [kind.encode("ascii").ljust(12, b"\0"), fingerprint, key, tenant]
    if [*identity, record[_HEADER.size : meta_at]] != expected:
        raise _Damaged("it is the record of another engine, tenant, kind or key")
    try:
        meta = json.loads(record[meta_at:payload_at]) if meta_nbytes else {}
    except ValueError:
        raise _Damaged("its meta is not JSON") from None
    return DiskRecord(kind, record[payload_at:-_CHECKSUM_NBYTES], meta)


def _pieces(payload: Payload) -> list[memoryview]:
    """The payload as flat views of its bytes, in order, without copying."""
    parts = [payload] if isinstance(payload, Bytes) else payload
    return [view.cast("B") for view in map(memoryview, parts) if view.nbytes]


def _write_new(path: str, pieces: Sequence[Bytes]) -> None:
    # Buffered, because a raw file's writelines takes a short write for a whole one. Large pieces are not copied.
    with open(path, "xb") as file:
        file.writelines(pieces)


# ---- the index --------------------------------------------------------------------------------------------------------

_SCHEMA = f"""
    CREATE TABLE records (
        name BLOB PRIMARY KEY CHECK (typeof(name) = 'blob' AND length(name) = {_NAME_NBYTES}),
        folder BLOB NOT NULL CHECK (typeof(folder) = 'blob' AND length(folder) = {_FOLDER_NBYTES}),
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


class _Index:
    """The SQLite database: one connection that writes, one that reads and never waits for it.

    Raises sqlite3.Error; `_is_damage` tells a damaged database from one that is busy or cannot grow.
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
    def transaction(self, wait_s: float) -> Iterator[sqlite3.Connection]:
        """The right to change files and their rows together, held by one process at a time.

        When a file refuses (OSError) the rows changed so far stay, as the files did change; when the index itself
        refuses they are as before. The caller lets one thread in at a time.
        """
        db = self._writer
        db.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
        db.execute("BEGIN IMMEDIATE")
        try:
            try:
                yield db
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

    def totals(self) -> tuple[int, int]:
        """Records and their bytes."""
        with self._reading:
            return self._reader.execute("SELECT records, bytes FROM totals").fetchone()

    def rows(self, first: int) -> dict[bytes, tuple[bytes, int]]:
        """Folder and size of every record whose name begins with the byte `first`."""
        low, high = bytes([first]), bytes([first]) + b"\xff" * _NAME_NBYTES
        with self._reading:
            found = self._reader.execute(
                "SELECT name, folder, nbytes FROM records WHERE name BETWEEN ? AND ?", (low, high)
            )
            return {name: (folder, nbytes) for name, folder, nbytes in found}

    def close(self) -> None:
        with self._reading:
            self._reader.close()
        self._writer.close()


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


_NOT_DAMAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_MISUSE,
}  # fmt: skip


def _is_damage(error: Exception, also: Sequence[int] = ()) -> bool:
    """Whether the index itself is wrong, rather than the moment or the disk. Codes in `also` count as damage."""
    code = getattr(error, "sqlite_errorcode", None)  # absent if Python's module refused, not SQLite
    if code is None:
        return isinstance(error, _WrongIndex)
    return code & 0xFF in also or code & 0xFF not in _NOT_DAMAGE


# ---- the store --------------------------------------------------------------------------------------------------------


class DiskStore:
    """Records of one fingerprint in a folder that others may use at the same time.

    Safe to share between threads and, each process with a store of its own, between processes. After it is open no file
    and no full, broken or vanished disk makes a method raise: the record is not there, or not kept. The files in the
    folder never exceed `limit_bytes` by more than the one record that each process may be writing (a file whose process was
    killed before it gave it a row counts from the next opening on).

    Args:
        directory: on a local disk; made, for its owner's eyes only, if absent.
        fingerprint: everything on which the bytes of a record depend, in any readable form.
        limit_bytes: for all files of records in the folder, headers included, whichever engine wrote them. Enforced
            when a store opens and before every put; 0 keeps nothing.
        on_damage: called with one line for each damaged record and each new cause of failure, on whichever thread met it.

    Raises:
        CacheError: the folder cannot be made, written or locked.
        ConfigError: a negative limit.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        fingerprint: str,
        limit_bytes: int,
        on_damage: Callable[[str], None] = log.warning,
    ) -> None:
        if limit_bytes < 0:
            raise ConfigError(f"limit_bytes={limit_bytes} of a disk cache is negative; give 0 (nothing) or more")
        self.directory = Path(directory).absolute()
        self.fingerprint, self.limit_bytes, self.on_damage = fingerprint, limit_bytes, on_damage
        seed = f"longreach prefix record {FORMAT_VERSION}\n{fingerprint}".encode("utf-8", "surrogatepass")
        self._fingerprint_digest = hashlib.blake2b(seed, digest_size=32).digest()
        self._folder = self._fingerprint_digest[:_FOLDER_NBYTES]

        self._index: _Index | None = None
        self._damaged_index: Path | None = None  # to be given up at the next put
        self._is_closed = False
        self._writing = threading.Lock()  # puts, deletes and anything else that changes rows: one at a time
        self._writer_lock: IO[bytes] | None = None
        self._writer_id = ""
        self._serial = itertools.count()

        # What is known but not yet written to the index, guarded by `_noting` together with the counters.
        self._noting = threading.Lock()
        self._uses: dict[bytes, int] = {}
        self._gone: set[bytes] = set()  # had no file, or a damaged one; may still have a row
        self._unremovable: set[bytes] = set()  # damaged, reported, and impossible to remove
        self._clock = 0
        self._uses_due = time.time_ns() + USES_SAVED_EVERY_NS
        self._counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self._reported: dict[str, float] = {}

        try:
            with self._writing:
                news = self._open()
        except (OSError, sqlite3.Error) as error:
            raise CacheError(
                f"the disk cache {self.directory} cannot be opened: {_words(error)}; "
                "give a folder on a local disk that can be written"
            ) from error
        if news:
            self.on_damage(news)

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading

    def get(self, tenant: str, key: bytes, kind: str) -> DiskRecord | None:
        """The record put under these three, verified; None if there is none or it is damaged. Counts as a use."""
        assert not self._is_closed
        who = tenant.encode("utf-8", "surrogatepass")
        name = self._name(who, key, kind)
        path = self._path(self._folder, name)
        try:
            with open(path, "rb", buffering=0) as file:
                record = file.read()
            found = _unpacked(record, self._fingerprint_digest, who, kind, key)
        except FileNotFoundError:
            self._note_absence(name)
            return None
        except OSError as error:
            self._count("misses")
            self._report(error, "a record cannot be read")
            return None
        except _Damaged as damage:
            self._drop_damaged(name, path, str(damage))
            return None
        self._note_use(name, "hits")
        return found

    def contains(self, tenant: str, keys: Sequence[bytes], kind: str) -> list[bool]:
        """For each key whether the index knows a record. Reads no file: `get` may still find it absent or damaged."""
        assert not self._is_closed
        who = tenant.encode("utf-8", "surrogatepass")
        names = [self._name(who, key, kind) for key in keys]
        index = self._index
        if index is None or not names:
            return [False] * len(names)
        try:
            known = index.known(names)
        except sqlite3.Error as error:
            if self._index is index:  # else a put has just opened another
                self._report(error, "the index cannot be read")
            return [False] * len(names)
        with self._noting:
            known -= self._gone
            known -= self._unremovable
        return [name in known for name in names]

    def touch(self, tenant: str, key: bytes, kind: str) -> None:
        """Count a use of the record, if there is one, without reading it."""
        assert not self._is_closed
        self._note_use(self._name(tenant.encode("utf-8", "surrogatepass"), key, kind), None)

    def stats(self) -> DiskStats:
        """Counters; the folder's records and bytes are 0 while its index cannot be read."""
        records, nbytes = 0, 0
        if self._index is not None and not self._is_closed:
            with suppress(sqlite3.Error):
                records, nbytes = self._index.totals()
        with self._noting:
            return DiskStats(records=records, bytes=nbytes, limit_bytes=self.limit_bytes, **self._counts)

    # -- writing

    def put(self, tenant: str, key: bytes, kind: str, payload: Payload, meta: dict[str, Any] | None = None) -> bool:
        """Keep a record, in place of any under the same three; first makes room by removing those unused for longest.

        Args:
            payload: bytes, or buffers to be stored end to end; each C-contiguous.
            meta: what JSON can hold; small, as it is parsed at every get.

        Returns:
            Whether it was kept. Not if it is larger than the limit or the disk refused, which is reported.
        """
        assert not self._is_closed
        who = tenant.encode("utf-8", "surrogatepass")
        name = self._name(who, key, kind)
        pieces = _pieces(payload)
        meta_json = json.dumps(meta, separators=(",", ":")).encode() if meta else b""
        header = _header(self._fingerprint_digest, who, kind, key, meta_json, sum(piece.nbytes for piece in pieces))
        nbytes = len(header) + sum(piece.nbytes for piece in pieces) + _CHECKSUM_NBYTES
        if nbytes > self.limit_bytes:
            self._count("refused")
            return False
        checksum = hashlib.sha256(header)
        for piece in pieces:
            checksum.update(piece)

        news = None
        try:
            with self._writing:
                news = self._reopen_if_needed()
                self._write(name, [header, *pieces, checksum.digest()], nbytes)
        except (OSError, sqlite3.Error) as error:
            self._count("write_errors")
            self._report(error, "a record was not kept")
            return False
        finally:
            if news:
                self.on_damage(news)
        self._count("written")
        return True

    def delete(self, tenant: str, key: bytes, kind: str) -> bool:
        """Remove the record. Returns whether there was one; False also if the disk refused, which is reported."""
        assert not self._is_closed
        name = self._name(tenant.encode("utf-8", "surrogatepass"), key, kind)
        try:
            with self._writing, self._transaction(BUSY_S) as db:
                was_there = _unlinked(self._path(self._folder, name))
                db.execute("DELETE FROM records WHERE name = ?", (name,))
        except (OSError, sqlite3.Error) as error:
            self._count("write_errors")
            self._report(error, "a record was not removed")
            return False
        return was_there

    def close(self) -> None:
        """Save the last uses and let go of the folder. The store cannot be used any more; closing twice does nothing."""
        if self._is_closed:
            return
        self._save_notes(wait_s=BUSY_S)
        with self._writing:
            self._is_closed = True
            self._let_go()

    def _write(self, name: bytes, pieces: Sequence[Bytes], nbytes: int) -> None:
        temporary = str(self.directory / "writing" / f"{self._writer_id}.{next(self._serial)}")
        path = self._path(self._folder, name)
        is_published = False
        try:
            _write_new(temporary, pieces)
            with self._transaction(BUSY_S) as db:
                old = db.execute("SELECT nbytes FROM records WHERE name = ?", (name,)).fetchone()
                self._evict(db, room=nbytes - (old[0] if old else 0), keep=name)
                try:
                    os.replace(temporary, path)
                except FileNotFoundError:
                    self._make_folder(path)
                    os.replace(temporary, path)
                is_published = True
                with self._noting:
                    now = self._now()
                    self._uses.pop(name, None)
                    self._gone.discard(name)
                    self._unremovable.discard(name)
                db.execute(_UPSERT, (name, self._folder, nbytes, now))
        except sqlite3.Error:
            if is_published:  # without its row it would not count against the limit
                with suppress(OSError):
                    os.unlink(path)
                with self._noting:
                    self._gone.add(name)
            raise
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    def _evict(self, db: sqlite3.Connection, room: int, keep: bytes | None = None) -> None:
        """Remove the least recently used records of any fingerprint, never `keep`, until `room` bytes more fit."""
        total = db.execute("SELECT bytes FROM totals").fetchone()[0]
        while total + room > self.limit_bytes:
            oldest = db.execute(
                "SELECT name, folder, nbytes FROM records WHERE name IS NOT ? ORDER BY last_used LIMIT 64", (keep,)
            ).fetchall()
            if not oldest:
                return
            for name, folder, nbytes in oldest:
                if total + room <= self.limit_bytes:
                    return
                # The file first: killed in between, a row without a file is left, which takes no space.
                _unlinked(self._path(folder, name))
                db.execute("DELETE FROM records WHERE name = ?", (name,))
                total -= nbytes
                self._count("evicted")

    def _make_folder(self, path: str) -> None:
        """The folder of a record, which another store may have removed as empty."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        text = self.directory / self._folder.hex() / "fingerprint.txt"
        content = self.fingerprint.encode("utf-8", "surrogatepass")
        if not text.exists() or text.read_bytes() != content:
            text.write_bytes(content)

    # -- what is noted now and written to the index later

    @contextmanager
    def _transaction(self, wait_s: float) -> Iterator[sqlite3.Connection]:
        """A transaction that begins by writing down what was noted since the last."""
        if self._index is None:
            raise sqlite3.OperationalError("the index is not open")
        with self._index.transaction(wait_s) as db:
            with self._noting:
                uses, self._uses = self._uses, {}
                gone, self._gone = self._gone, set()
            db.executemany(
                "UPDATE records SET last_used = ?1 WHERE name = ?2 AND last_used < ?1",
                [(last_used, name) for name, last_used in uses.items()],
            )
            for name in gone:  # another process may have put it again
                if not os.path.exists(self._path(self._folder, name)):
                    db.execute("DELETE FROM records WHERE name = ?", (name,))
            yield db

    def _save_notes(self, wait_s: float) -> None:
        """Write down what was noted, unless somebody else is writing for longer than `wait_s`."""
        if not self._writing.acquire(timeout=wait_s):
            return
        try:
            if self._index is None or not (self._uses or self._gone):
                return
            with self._transaction(wait_s):
                pass
        except sqlite3.Error as error:
            if wait_s:
                self._report(error, "the last uses of records were not saved")
        finally:
            self._writing.release()

    def _note_use(self, name: bytes, count: str | None) -> None:
        with self._noting:
            now = self._now()
            self._uses[name] = now
            if count:
                self._counts[count] += 1
            is_due = now >= self._uses_due
            if is_due:
                self._uses_due = now + USES_SAVED_EVERY_NS
        if is_due:
            self._save_notes(wait_s=0.0)

    def _note_absence(self, name: bytes) -> None:
        with self._noting:
            self._counts["misses"] += 1
            if len(self._gone) < 10_000:  # enough; a row left over is noticed at the next start
                self._gone.add(name)

    def _now(self) -> int:
        """Nanoseconds since 1970, later than every earlier answer."""
        self._clock = max(self._clock + 1, time.time_ns())
        return self._clock

    def _count(self, what: str) -> None:
        with self._noting:
            self._counts[what] += 1

    # -- what goes wrong

    def _drop_damaged(self, name: bytes, path: str, what: str) -> None:
        """Remove a damaged record and report it, once however many threads and processes met it."""
        outcome = "removed; it will be computed again"
        try:
            if not _unlinked(path):
                self._note_absence(name)  # somebody else removed and reported it
                return
        except OSError as error:
            with self._noting:
                is_reported = name in self._unremovable
                self._unremovable.add(name)
            if is_reported:
                self._count("misses")
                return
            outcome = f"it cannot be removed ({_words(error)}) and is ignored; remove it"
        self._note_absence(name)
        self._count("damaged")
        self.on_damage(f"disk cache: {path} is damaged: {what}; {outcome}")

    def _report(self, error: OSError | sqlite3.Error, what: str) -> None:
        """Tell of a failure, once per cause and hour."""
        if _is_damage(error) and self._index is not None:
            self._damaged_index = self._index.path
        now = time.monotonic()
        cause = f"{what}: {_cause(error)}"
        with self._noting:
            if now - self._reported.get(cause, -REPORT_AGAIN_S) < REPORT_AGAIN_S:
                return
            self._reported[cause] = now
        self.on_damage(
            f"disk cache {self.directory}: {what}: {_words(error)}; everything else goes on. {_remedy(error)}"
        )

    # -- opening

    def _reopen_if_needed(self) -> str | None:
        """Open again if the index was found damaged or somebody removed it, perhaps with the whole folder."""
        if self._index is None or self._writer_lock is None or self._index.path == self._damaged_index:
            return self._open()
        if os.path.exists(self._index.path) and os.path.exists(self._writer_lock.name):
            return None
        return self._open()

    def _open(self) -> str | None:
        """Take part in the folder: repair what dead processes left, bring the index in line with the files.

        Returns:
            One line if the index had to be rebuilt.
        """
        self._let_go()
        writing = self.directory / "writing"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            writing.mkdir(exist_ok=True)
            with _locked(self.directory / "opening.lock", OPENING_S):
                self._writer_id = secrets.token_hex(8)
                self._writer_lock = (writing / f"{self._writer_id}.lock").open("xb")
                fcntl.flock(self._writer_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove_orphans(writing)
                self._make_folder(self._path(self._folder, bytes(_NAME_NBYTES)))
                folders = self._folders()
                self._index, news = self._open_index(folders)
                self._remove_leftovers(self._index, [folder for folder in folders if folder != self._folder])
        except BaseException:
            self._let_go()
            raise
        return news

    def _let_go(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            with suppress(sqlite3.Error):
                index.close()
        if self._writer_lock is not None:
            with suppress(OSError):
                os.unlink(self._writer_lock.name)
            self._writer_lock.close()
            self._writer_lock = None

    def _remove_orphans(self, writing: Path) -> None:
        """Remove what processes that no longer live were writing: their locks are free, whatever became of their ids."""
        with os.scandir(writing) as entries:
            ids = {entry.name.split(".")[0] for entry in entries if entry.is_file()} - {self._writer_id}
        for writer_id in ids:
            if len(writer_id) != len(self._writer_id) or _from_hex(writer_id) is None:
                continue  # not ours
            try:
                with (writing / f"{writer_id}.lock").open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                pass
            except BlockingIOError:
                continue
            for path in writing.glob(f"{writer_id}.*"):
                path.unlink(missing_ok=True)

    def _open_index(self, folders: Sequence[bytes]) -> tuple[_Index, str | None]:
        """The folder's index in line with the files and the limit, and one line if it had to be rebuilt.

        A new index gets a new name: SQLite removes its -wal by name when a process closes a database, so a process that
        still holds an old one under the same name would take the new one's.
        """
        why = "missing"
        for path in sorted(self.directory.glob("index-*.sqlite")):
            why = "damaged"
            if path != self._damaged_index:
                try:
                    return self._in_line(path, folders)[0], None
                except sqlite3.Error as error:
                    # If the disk is to blame for the last two, a new index will fail as well.
                    if not _is_damage(error, also=(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)):
                        raise
                    why = f"damaged ({_words(error)})"
            path.unlink(missing_ok=True)
        new = self.directory / f"index-{secrets.token_hex(4)}.sqlite"
        index, adopted = self._in_line(new, folders, create=True)
        if why == "missing" and not adopted:
            return index, None  # a new folder
        return index, f"disk cache {self.directory}: its index was {why}; rebuilt from the files of {adopted} records"

    def _in_line(self, path: Path, folders: Sequence[bytes], create: bool = False) -> tuple[_Index, int]:
        """The index at `path` after `_reconcile` and eviction, and how many files had no row."""
        index = _Index(path, create)
        try:
            adopted = self._reconcile(index, folders)
            with index.transaction(BUSY_S) as db:
                self._evict(db, room=0)
        except BaseException:
            index.close()
            raise
        return index, adopted

    def _folders(self) -> list[bytes]:
        """Folders of records, of every fingerprint."""
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in entries if len(entry.name) == 2 * _FOLDER_NBYTES and entry.is_dir()]
        return [folder for name in names if (folder := _from_hex(name)) is not None]

    def _reconcile(self, index: _Index, folders: Sequence[bytes]) -> int:
        """Give every file its row and remove rows without a file. Returns the number of files that had no row.

        Other processes go on meanwhile: whatever differs is looked at again with the right to write.
        """
        adopted = 0
        for first in range(256):
            rows, files = index.rows(first), self._files(folders, first)
            differing = [name for name in rows.keys() | files.keys() if rows.get(name) != files.get(name)]
            if not differing:
                continue
            with index.transaction(BUSY_S) as db:
                for name in differing:
                    folder = (files.get(name) or rows[name])[0]
                    try:
                        found = os.stat(self._path(folder, name))
                    except FileNotFoundError:
                        db.execute("DELETE FROM records WHERE name = ?", (name,))
                        continue
                    row = db.execute("SELECT last_used FROM records WHERE name = ?", (name,)).fetchone()
                    adopted += row is None
                    last_used = row[0] if row else found.st_mtime_ns
                    db.execute(_UPSERT, (name, folder, found.st_size, last_used))
        with index.transaction(BUSY_S) as db:
            # A clock that was ahead, or a flipped bit, would keep a record for ever.
            db.execute("UPDATE records SET last_used = ?1 WHERE last_used > ?1", (time.time_ns(),))
            db.execute(
                "UPDATE totals SET records = (SELECT count(*) FROM records),"
                " bytes = (SELECT coalesce(sum(nbytes), 0) FROM records)"
            )
        return adopted

    def _files(self, folders: Sequence[bytes], first: int) -> dict[bytes, tuple[bytes, int]]:
        """Folder and size of every file whose name begins with the byte `first`."""
        found, prefix = {}, f"{first:02x}"
        for folder in folders:
            try:
                entries = os.scandir(self.directory / folder.hex() / prefix)
            except (FileNotFoundError, NotADirectoryError):
                continue
            with entries:
                for entry in entries:
                    name = _from_hex(entry.name.removesuffix(".rec"))
                    if name is None or len(name) != _NAME_NBYTES or entry.name != f"{prefix}{name.hex()[2:]}.rec":
                        continue  # not ours
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found[name] = (folder, status.st_size)
        return found

    def _remove_leftovers(self, index: _Index, foreign: Sequence[bytes]) -> None:
        """Remove what belongs to an index that was removed, and folders of other fingerprints that hold no record.

        A store that lives in such a folder makes it again; the transaction keeps it from publishing meanwhile.
        """
        for path in self.directory.glob("index-*.sqlite-*"):
            if not path.with_name(path.name.rpartition("-")[0]).exists():
                path.unlink(missing_ok=True)
        for folder in foreign:
            path = self.directory / folder.hex()
            with index.transaction(BUSY_S), suppress(OSError):
                for first in range(256):
                    with suppress(FileNotFoundError):
                        os.rmdir(path / f"{first:02x}")
                if os.listdir(path) == ["fingerprint.txt"]:
                    os.unlink(path / "fingerprint.txt")
                os.rmdir(path)

    # -- names

    def _name(self, tenant: bytes, key: bytes, kind: str) -> bytes:
        assert len(key) == KEY_NBYTES, f"a key has {KEY_NBYTES} bytes, not {len(key)}"
        assert kind in KINDS, f"kind {kind!r} is none of {KINDS}"
        identity = b"".join((self._folder, key, kind.encode("ascii").ljust(12, b"\0"), tenant))
        return hashlib.blake2b(identity, digest_size=_NAME_NBYTES).digest()

    def _path(self, folder: bytes, name: bytes) -> str:
        written = name.hex()
        return f"{self.directory}/{folder.hex()}/{written[:2]}/{written}.rec"


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file `path`; TimeoutError if others hold it for longer than `wait_s`."""
    deadline = time.monotonic() + wait_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT, f"another process opens it for more than {wait_s:g} s"
                    ) from None
                time.sleep(0.005)
        yield


def _unlinked(path: str) -> bool:
    """Remove a file; whether it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _from_hex(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def _cause(error: OSError | sqlite3.Error) -> str:
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return getattr(error, "sqlite_errorname", type(error).__name__)


def _words(error: OSError | sqlite3.Error) -> str:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    name = getattr(error, "sqlite_errorname", None)
    return " ".join(f"index: {error}".split()) + (f" ({name})" if name else "")


def _remedy(error: OSError | sqlite3.Error) -> str:
    cause = _cause(error)
    if cause in ("ENOSPC", "EDQUOT", "SQLITE_FULL"):
        return "Free some space there, or give the disk cache a smaller limit."
    if cause in ("EACCES", "EPERM", "EROFS") or cause.startswith("SQLITE_READONLY"):
        return "Make the folder writable."
    if cause.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "Another process holds the index; if it hangs, end it."
    return "Look at the disk, or give another folder."


# ---- writing in the background ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    tenant: str
    key: bytes
    kind: str
    buffers: Payload
    meta: dict[str, Any] | None
    nbytes: int


class BackgroundWriter:
    """Puts records on a thread of its own, so that the engine never waits for the disk.

    At most `max_pending_bytes` wait; what does not fit is dropped and counted in `dropped`. A record that the index
    already knows is not written again; that counts as a use. The thread does not keep the process alive: `close`, then
    close the store.
    """

    def __init__(self, store: DiskStore, max_pending_bytes: int) -> None:
        self.store, self.max_pending_bytes = store, max_pending_bytes
        self.dropped = 0
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._pending_bytes = 0  # of those in the queue and the one being written
        self._is_closing = self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="longreach-disk-writer", daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Payload bytes not yet written."""
        return self._pending_bytes

    def submit(self, tenant: str, key: bytes, kind: str, buffers: Payload, meta: dict[str, Any] | None = None) -> bool:
        """Have a record put soon. Returns False if it was dropped: too much waits already, or the writer is closed.

        The buffers are kept, not copied: nobody may change them any more.
        """
        nbytes = sum(piece.nbytes for piece in _pieces(buffers))
        with self._changed:
            if self._is_closing or self._pending_bytes + nbytes > self.max_pending_bytes:
                self.dropped += 1
                return False
            self._jobs.append(_Job(tenant, key, kind, buffers, meta, nbytes))
            self._pending_bytes += nbytes
            self._changed.notify_all()
        return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is waiting to be written; False if that took longer than `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._is_ended, timeout_s)
            return not self._jobs

    def close(self) -> None:
        """Write what is waiting and end the thread. Closing twice does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                if self.store.contains(job.tenant, [job.key], job.kind)[0]:
                    self.store.touch(job.tenant, job.key, job.kind)
                else:
                    self.store.put(job.tenant, job.key, job.kind, job.buffers, job.meta)
                with self._changed:
                    self._jobs.popleft()
                    self._pending_bytes -= job.nbytes
                    self._changed.notify_all()
        finally:
            with self._changed:  # by a bug of ours, perhaps: nobody shall wait for this thread
                self._is_closing = self._is_ended = True
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        """The next record to write, None when closing. It stays in the queue so that `flush` waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing)
            return self._jobs[0] if self._jobs else None
