"""Prefixes kept on disk: exactly the bytes put under a key by the same kind of engine, or nothing.

A record is one page or one state of a prompt. It is found by four things: the engine's fingerprint, the tenant, the kind
and a 32-byte key. A folder may be shared by engines, processes and models; each sees only its own fingerprint's records,
while the size bound and the order of eviction cover all of them. It must be on a local disk (file locks, SQLite's WAL).

    directory/
      opening.lock               held while a store is opened, so that two never repair the folder at once
      index-<8 hex>.sqlite       which records there are, their size and last use; -wal and -shm are SQLite's
      writing/<id>.lock          held for as long as one open store lives
      writing/<id>.<n>           a record that store is writing
      <folder>/fingerprint.txt   the fingerprint, for people; <folder> is the first 16 bytes, in hex, of its digest
      <folder>/<xx>/<name>.rec   one record; <name> is its name's 20 bytes in hex, <xx> the first two characters

Digest, name and bytes of a record: `disk_record.py`. The index: `disk_index.py`.

The files are the truth, the index a directory of them. `get` opens the file its name says and believes nothing that the
header and the checksum do not confirm. A record is written under `writing/`, renamed, then given its row. Nothing waits
for the disk (no fsync): after a power failure a torn record fails its checksum, a torn index is rebuilt from the files.
Opening a store compares files and rows and lets the files win.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longreach.engine.disk_index import BUSY_S, DiskIndex, Rows, cause_of, in_words, is_damage, remedy_for
from longreach.engine.disk_record import (
    FOLDER_NBYTES,
    NAME_NBYTES,
    Bytes,
    DamagedRecord,
    DiskRecord,
    Payload,
    encoded,
    fingerprint_digest,
    pack,
    record_name,
    unpack,
)
from longreach.errors import CacheError, ConfigError
from longreach.runtime import log

MIB = 1 << 20
OPENING_S = 60.0
"""How long opening waits for another process that is opening the same folder."""
USES_SAVED_EVERY_NS = 5_000_000_000
"""Last uses are kept in memory and saved with the next put, at the latest after this long (at the next get), and at close."""
REPORT_AGAIN_S = 3600.0
"""A cause of failure that lasts is reported once in this time."""


@dataclass(frozen=True)
class DiskStats:
    """The folder as a whole, and what this store did since it was opened."""

    records: int  # in the folder, of every fingerprint
    bytes: int  # sizes of their files
    own: int  # records of this store's fingerprint
    limit_bytes: int
    hits: int
    misses: int  # damaged records included
    written: int
    refused: int  # larger than the limit
    evicted: int
    damaged: int
    write_errors: int


_COUNTED = ("hits", "misses", "written", "refused", "evicted", "damaged", "write_errors")


class DiskStore:
    """Records of one fingerprint in a folder that others may use at the same time.

    Safe to share between threads and, each process with a store of its own, between processes. After it is open no file
    and no full, broken or vanished disk makes a method raise: the record is not there, or not kept. The files in the
    folder never exceed `limit_bytes` by more than the one record that each process may be writing (a file whose process was
    killed before it gave it a row counts from the next opening on). Opening logs one line about what is there.

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
        self._digest = fingerprint_digest(fingerprint)
        self._folder = self._digest[:FOLDER_NBYTES]

        self._index: DiskIndex | None = None
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
                f"the disk cache {self.directory} cannot be opened: {in_words(error)}; "
                "give a folder on a local disk that can be written"
            ) from error
        if news:
            self.on_damage(news)
        stats = self.stats()
        others = f"of other models or machines, left alone: {stats.records - stats.own}; "
        log.info(
            "disk cache %s: own records: %d; %s%.1f of %.1f MiB in use", self.directory, stats.own,
            others if stats.records > stats.own else "", stats.bytes / MIB, limit_bytes / MIB,
        )  # fmt: skip

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading

    def get(self, tenant: str, key: bytes, kind: str) -> DiskRecord | None:
        """The record put under these three, verified; None if there is none or it is damaged. Counts as a use."""
        assert not self._is_closed
        name = record_name(self._folder, tenant, key, kind)
        path = self._path(self._folder, name)
        try:
            with open(path, "rb", buffering=0) as file:
                record = file.read()
            found = unpack(record, self._digest, tenant, key, kind)
        except FileNotFoundError:
            self._note_absence(name)
            return None
        except OSError as error:
            self._count("misses")
            self._report(error, "a record cannot be read")
            return None
        except DamagedRecord as damage:
            self._drop_damaged(name, path, str(damage))
            return None
        self._note_use(name, "hits")
        return found

    def contains(self, tenant: str, keys: Sequence[bytes], kind: str) -> list[bool]:
        """For each key whether the index knows a record. Reads no file: `get` may still find it absent or damaged."""
        assert not self._is_closed
        names = [record_name(self._folder, tenant, key, kind) for key in keys]
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
        self._note_use(record_name(self._folder, tenant, key, kind), None)

    def stats(self) -> DiskStats:
        """Counters; the folder's are 0 while its index cannot be read. Reads all of it: 300,000 records take 35 ms."""
        records, nbytes, own = 0, 0, 0
        if self._index is not None and not self._is_closed:
            with suppress(sqlite3.Error):
                records, nbytes, own = self._index.totals(self._folder)
        with self._noting:
            return DiskStats(records=records, bytes=nbytes, own=own, limit_bytes=self.limit_bytes, **self._counts)

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
        name = record_name(self._folder, tenant, key, kind)
        pieces = pack(self._digest, tenant, key, kind, payload, meta)
        nbytes = sum(map(len, pieces))
        if nbytes > self.limit_bytes:
            self._count("refused")
            return False
        news = None
        try:
            with self._writing:
                news = self._reopen_if_needed()
                self._write(name, pieces, nbytes)
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
        name = record_name(self._folder, tenant, key, kind)
        try:
            with self._writing, self._transaction(BUSY_S) as rows:
                was_there = _unlinked(self._path(self._folder, name))
                rows.remove(name)
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
            write_new(temporary, pieces)
            with self._transaction(BUSY_S) as rows:
                old_nbytes, _ = rows.row(name) or (0, 0)
                self._evict(rows, room=nbytes - old_nbytes, keep=name)
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
                rows.put(name, self._folder, nbytes, now)
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

    def _evict(self, rows: Rows, room: int, keep: bytes | None = None) -> None:
        """Remove the least recently used records of any fingerprint, never `keep`, until `room` bytes more fit."""
        excess = rows.total_bytes() + room - self.limit_bytes
        oldest = rows.oldest(keep)
        while excess > 0 and (record := next(oldest, None)):
            name, folder, nbytes = record
            # The file first: killed in between, a row without a file is left, which takes no space.
            _unlinked(self._path(folder, name))
            rows.remove(name)
            excess -= nbytes
            self._count("evicted")

    def _make_folder(self, path: str) -> None:
        """The folder of a record, which another store may have removed as empty."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        text = self.directory / self._folder.hex() / "fingerprint.txt"
        content = encoded(self.fingerprint)
        if not text.exists() or text.read_bytes() != content:
            text.write_bytes(content)

    # -- what is noted now and written to the index later

    @contextmanager
    def _transaction(self, wait_s: float) -> Iterator[Rows]:
        """A transaction that begins by writing down what was noted since the last."""
        if self._index is None:
            raise sqlite3.OperationalError("the index is not open")
        with self._index.transaction(wait_s) as rows:
            with self._noting:
                uses, self._uses = self._uses, {}
                gone, self._gone = self._gone, set()
            rows.use(uses)
            for name in gone:  # another process may have put it again
                if not os.path.exists(self._path(self._folder, name)):
                    rows.remove(name)
            yield rows

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
            outcome = f"it cannot be removed ({in_words(error)}) and is ignored; remove it"
        self._note_absence(name)
        self._count("damaged")
        self.on_damage(f"disk cache: {path} is damaged: {what}; {outcome}")

    def _report(self, error: OSError | sqlite3.Error, what: str) -> None:
        """Tell of a failure, once per cause and hour."""
        if is_damage(error) and self._index is not None:
            self._damaged_index = self._index.path
        now = time.monotonic()
        cause = f"{what}: {cause_of(error)}"
        with self._noting:
            if now - self._reported.get(cause, -REPORT_AGAIN_S) < REPORT_AGAIN_S:
                return
            self._reported[cause] = now
        self.on_damage(
            f"disk cache {self.directory}: {what}: {in_words(error)}; everything else goes on. {remedy_for(error)}"
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
                self._make_folder(self._path(self._folder, bytes(NAME_NBYTES)))
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

    def _open_index(self, folders: Sequence[bytes]) -> tuple[DiskIndex, str | None]:
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
                    if not is_damage(error, also=(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)):
                        raise
                    why = f"damaged ({in_words(error)})"
            path.unlink(missing_ok=True)
        new = self.directory / f"index-{secrets.token_hex(4)}.sqlite"
        index, adopted = self._in_line(new, folders, create=True)
        if why == "missing" and not adopted:
            return index, None  # a new folder
        return index, f"disk cache {self.directory}: its index was {why}; rebuilt from the files of {adopted} records"

    def _in_line(self, path: Path, folders: Sequence[bytes], create: bool = False) -> tuple[DiskIndex, int]:
        """The index at `path` in line with the files and the limit, and how many files had no row."""
        index = DiskIndex(path, create)
        try:
            adopted = index.reconcile(
                lambda first: self._files(folders, first), lambda folder, name: os.stat(self._path(folder, name))
            )
            with index.transaction(BUSY_S) as rows:
                self._evict(rows, room=0)
        except BaseException:
            index.close()
            raise
        return index, adopted

    def _folders(self) -> list[bytes]:
        """Folders of records, of every fingerprint."""
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in entries if len(entry.name) == 2 * FOLDER_NBYTES and entry.is_dir()]
        return [folder for name in names if (folder := _from_hex(name)) is not None]

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
                    if name is None or len(name) != NAME_NBYTES or entry.name != f"{prefix}{name.hex()[2:]}.rec":
                        continue  # not ours
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found[name] = (folder, status.st_size)
        return found

    def _remove_leftovers(self, index: DiskIndex, foreign: Sequence[bytes]) -> None:
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

    def _path(self, folder: bytes, name: bytes) -> str:
        written = name.hex()
        return f"{self.directory}/{folder.hex()}/{written[:2]}/{written}.rec"


def write_new(path: str, pieces: Sequence[Bytes]) -> None:
    # Buffered, because a raw file's writelines takes a short write for a whole one. Large pieces are not copied.
    with open(path, "xb") as file:
        file.writelines(pieces)


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
