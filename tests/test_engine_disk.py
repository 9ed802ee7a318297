"""The disk tier of the prefix cache: exactly what was put, or nothing, whatever happens to files and processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import os
import random
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from longreach.engine import disk
from longreach.engine.disk import DiskStore
from longreach.engine.disk_record import DiskRecord
from longreach.engine.disk_writer import BackgroundWriter
from longreach.errors import CacheError, ConfigError

LARGE = 1 << 30
OVERHEAD = 104 + 32
"""Bytes of a record beside tenant, meta and payload: header and checksum."""


def key(i: int) -> bytes:
    return hashlib.blake2b(b"key %d" % i, digest_size=32).digest()


def payload(i: int) -> bytes:
    """What every test and every process puts under key(i): 3,000 to 6,600 bytes."""
    return hashlib.shake_128(b"payload %d" % i).digest(3000 + 60 * (i % 61))


class Reports(list):
    """Collects the lines a store reports; also the callable to give it."""

    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


def opened(
    directory: Path, limit_bytes: int = LARGE, fingerprint: str = "f", reports: Reports | None = None
) -> DiskStore:
    """A store that may report nothing, unless `reports` collects it."""
    on_damage = pytest.fail if reports is None else reports
    return DiskStore(directory, fingerprint=fingerprint, limit_bytes=limit_bytes, on_damage=on_damage)


def record_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.rec"))


def file_of(directory: Path, *records: tuple[str, bytes, str]) -> list[Path]:
    """The file of each record, found by the key in its header."""
    by_header = {}
    for path in record_files(directory):
        data = path.read_bytes()
        tenant_nbytes = struct.unpack_from("<I", data, 12)[0]
        kind = data[28:40].rstrip(b"\0").decode()
        by_header[data[104 : 104 + tenant_nbytes].decode(), data[72:104], kind] = path
    return [by_header[record] for record in records]


def disk_bytes(directory: Path) -> int:
    """Sizes of all records and of those being written, as far as they hold still."""
    total = 0
    for path in [*directory.rglob("*.rec"), *directory.glob("writing/*")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def run_script(script: str, *arguments: object) -> subprocess.Popen:
    source = "import hashlib\n" + inspect.getsource(key) + inspect.getsource(payload) + script
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# ---- what is put comes back -------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_put_and_under_nothing_else(tmp_path):
    with opened(tmp_path) as store:
        assert store.get("ada", key(1), "page") is None
        assert store.put("ada", key(1), "page", b"twelve bytes", {"length": 128})
        assert store.get("ada", key(1), "page") == DiskRecord("page", b"twelve bytes", {"length": 128})
        assert store.get("ada", key(2), "page") is None
        assert store.get("ada", key(1), "state") is None
        assert store.get("bob", key(1), "page") is None


def test_a_file_is_byte_for_byte_what_the_modules_say(tmp_path):
    with opened(tmp_path, fingerprint="model A") as store:
        store.put("ada", bytes(range(32)), "state", b"\xff\x00payload", {"n": 7})
    fingerprint = hashlib.blake2b(b"longreach prefix record 1\nmodel A", digest_size=32).digest()
    expected = (
        b"lrprefix" + struct.pack("<IIIQ", 1, 3, 7, 9) + b"state\0\0\0\0\0\0\0" + fingerprint + bytes(range(32))
        + b"ada" + b'{"n":7}' + b"\xff\x00payload"
    )  # fmt: skip
    expected += hashlib.sha256(expected).digest()
    folder = fingerprint[:16]
    name = hashlib.blake2b(folder + bytes(range(32)) + b"state".ljust(12, b"\0") + b"ada", digest_size=20).hexdigest()
    assert (tmp_path / folder.hex() / name[:2] / f"{name}.rec").read_bytes() == expected
    assert (tmp_path / folder.hex() / "fingerprint.txt").read_text() == "model A"
    assert len(expected) == OVERHEAD + 3 + 7 + 9


def test_buffers_are_stored_end_to_end_whatever_their_shape(tmp_path):
    grid = memoryview(bytearray(range(24))).cast("B", (4, 6))
    words = memoryview(bytearray(16)).cast("I")
    with opened(tmp_path) as store:
        assert store.put("t", key(1), "page", [b"begin", grid, b"", bytearray(b"middle"), words])
        found = store.get("t", key(1), "page")
        assert found == DiskRecord("page", b"begin" + bytes(range(24)) + b"middle" + bytes(16), {})
        assert store.put("t", key(2), "page", [])
        assert store.get("t", key(2), "page") == DiskRecord("page", b"", {})


def test_a_second_put_replaces_the_first_and_counts_once(tmp_path):
    with opened(tmp_path) as store:
        store.put("t", key(1), "page", b"long" * 100)
        store.put("t", key(1), "page", b"short")
        assert store.get("t", key(1), "page") == DiskRecord("page", b"short", {})
        assert (store.stats().records, store.stats().bytes) == (1, OVERHEAD + 1 + 5)


def test_contains_answers_for_thousands_of_keys_in_order(tmp_path):
    with opened(tmp_path) as store:
        for i in range(0, 50, 2):
            store.put("ada", key(i), "page", b"x")
        assert store.contains("ada", [key(i) for i in range(3000)], "page") == [
            i < 50 and i % 2 == 0 for i in range(3000)
        ]
        assert not any(store.contains("bob", [key(i) for i in range(50)], "page"))
        assert not any(store.contains("ada", [key(i) for i in range(50)], "state"))
        assert store.contains("ada", [], "page") == []


def test_a_deleted_record_is_gone_with_its_file(tmp_path):
    with opened(tmp_path) as store:
        store.put("t", key(1), "page", b"x")
        assert store.delete("t", key(1), "page")
        assert not store.delete("t", key(1), "page")
        assert store.get("t", key(1), "page") is None
        assert store.contains("t", [key(1)], "page") == [False]
        assert record_files(tmp_path) == [] and store.stats().records == 0


def test_any_text_names_a_tenant(tmp_path):
    tenants = ["", "a", "a\0", "ä", "\udcff", "../../escape", "x" * 100_000]
    with opened(tmp_path / "cache") as store:
        for i, tenant in enumerate(tenants):
            store.put(tenant, key(0), "page", payload(i))
        for i, tenant in enumerate(tenants):
            found = store.get(tenant, key(0), "page")
            assert found is not None and found.payload == payload(i)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_modules_do_not_load_torch():
    script = "import sys, longreach.engine.disk_writer  # which imports the others\nassert 'torch' not in sys.modules"
    finished(
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )


# ---- a random walk against a dictionary ------------------------------------------------------------------------------


class Model:
    """The same promises in a dictionary: oldest use first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.records: OrderedDict[tuple[str, int, str], tuple[bytes, int]] = OrderedDict()

    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.records.values())

    def put(self, name: tuple[str, int, str], content: bytes) -> bool:
        nbytes = OVERHEAD + len(name[0]) + len(content)
        if nbytes > self.limit_bytes:
            return False
        self.records.pop(name, None)
        while self.total() + nbytes > self.limit_bytes:
            self.records.popitem(last=False)
        self.records[name] = content, nbytes
        return True

    def get(self, name: tuple[str, int, str]) -> bytes | None:
        if name not in self.records:
            return None
        self.records.move_to_end(name)
        return self.records[name][0]


@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_of_two_tenants_with_restarts_and_evictions_matches_a_dictionary(tmp_path, seed):
    r, model, limit_bytes = random.Random(seed), Model(40_000), 40_000
    store = opened(tmp_path, limit_bytes)
    for step in range(2500):
        name = r.choice(["ada", "bob"]), r.randrange(40), r.choice(["page", "state"])
        tenant, i, kind = name
        act = r.random()
        if act < 0.4:
            content = r.randbytes(r.choice([0, 10, 800, 2000, 4000, 50_000]))
            assert store.put(tenant, key(i), kind, content) == model.put(name, content), step
        elif act < 0.8:
            found, expected = store.get(tenant, key(i), kind), model.get(name)
            assert (found and found.payload) == expected, step
        elif act < 0.88:
            assert store.delete(tenant, key(i), kind) == (model.records.pop(name, None) is not None), step
        elif act < 0.96:
            store.touch(tenant, key(i), kind)
            model.get(name)
        elif act < 0.98:
            known = store.contains(tenant, [key(j) for j in range(40)], kind)
            assert known == [(tenant, j, kind) in model.records for j in range(40)], step
        else:
            store.close()
            store = opened(tmp_path, limit_bytes)
        assert store.stats().bytes == model.total() <= limit_bytes
    assert disk_bytes(tmp_path) == model.total()
    store.close()


# ---- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_200_of_300_files_costs_those_records_and_no_other(tmp_path):
    r, reports = random.Random(0), Reports()
    with opened(tmp_path, reports=reports) as store:
        for i in range(300):
            store.put("t", key(i), "page", payload(i), {"i": i})
        damaged = set(r.sample(range(300), 200))
        paths = file_of(tmp_path, *(("t", key(i), "page") for i in range(300)))
        for i in damaged:
            flip(paths[i], r.randrange(8 * paths[i].stat().st_size))
        for _ in range(2):
            for i in range(300):
                expected = None if i in damaged else DiskRecord("page", payload(i), {"i": i})
                assert store.get("t", key(i), "page") == expected
        assert len(reports) == 200 == store.stats().damaged
        for i in damaged:
            assert sum(str(paths[i]) in line for line in reports) == 1 and not paths[i].exists()
        assert store.contains("t", [key(i) for i in range(300)], "page") == [i not in damaged for i in range(300)]
        assert store.put("t", key(min(damaged)), "page", payload(0))  # and there is room for them again
        assert store.stats().records == 101


def test_every_byte_of_a_record_is_guarded(tmp_path):
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        store.put("t", key(1), "page", b"payload", {"n": 1})
        (path,) = record_files(tmp_path)
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole)
            flip(path, 8 * place + place % 8)
            assert store.get("t", key(1), "page") is None
        assert len(reports) == len(whole)
        path.write_bytes(whole)
        assert store.get("t", key(1), "page") == DiskRecord("page", b"payload", {"n": 1})


def test_a_record_cut_anywhere_or_continued_is_damaged(tmp_path):
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        store.put("t", key(1), "page", b"payload", {"n": 1})
        (path,) = record_files(tmp_path)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert store.get("t", key(1), "page") is None
        path.write_bytes(whole + b"\0")
        assert store.get("t", key(1), "page") is None
        assert len(reports) == len(whole) + 1


@pytest.mark.parametrize("other", ["tenant", "key", "kind", "fingerprint"])
def test_the_whole_record_of_another_in_its_place_is_not_believed(tmp_path, other):
    reports = Reports()
    with opened(tmp_path, reports=reports) as store, opened(tmp_path, fingerprint="g") as foreign:
        store.put("t", key(1), "page", b"mine")
        (mine,) = record_files(tmp_path)
        {
            "tenant": lambda: store.put("u", key(1), "page", b"theirs"),
            "key": lambda: store.put("t", key(2), "page", b"theirs"),
            "kind": lambda: store.put("t", key(1), "state", b"theirs"),
            "fingerprint": lambda: foreign.put("t", key(1), "page", b"theirs"),
        }[other]()
        (theirs,) = set(record_files(tmp_path)) - {mine}
        shutil.copyfile(theirs, mine)
        assert store.get("t", key(1), "page") is None
        assert len(reports) == 1 and "another" in reports[0] and str(mine) in reports[0]


@pytest.mark.parametrize("field", ["version", "payload length"])
def test_a_header_that_lies_under_a_right_checksum_is_not_believed(tmp_path, field):
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        store.put("t", key(1), "page", b"payload")
        (path,) = record_files(tmp_path)
        data = bytearray(path.read_bytes()[:-32])
        data[{"version": 8, "payload length": 20}[field]] += 1
        path.write_bytes(data + hashlib.sha256(data).digest())
        assert store.get("t", key(1), "page") is None
        assert len(reports) == 1


def test_many_threads_that_meet_one_damaged_record_report_it_once(tmp_path):
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        for i in range(20):
            store.put("t", key(i), "page", payload(i))
        for path in record_files(tmp_path):
            flip(path, 999)
        threads = [
            threading.Thread(target=lambda: [store.get("t", key(i), "page") for i in range(20)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(reports) == 20


def test_a_damaged_record_that_cannot_be_removed_is_reported_once_and_never_served(tmp_path, monkeypatch):
    reports = Reports()
    unlink = os.unlink

    def refuse(path, **kwargs):
        if str(path).endswith(".rec"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        unlink(path, **kwargs)

    with opened(tmp_path, reports=reports) as store:
        store.put("t", key(1), "page", payload(1))
        flip(record_files(tmp_path)[0], 999)
        monkeypatch.setattr(os, "unlink", refuse)
        assert [store.get("t", key(1), "page") for _ in range(3)] == [None] * 3
        assert store.contains("t", [key(1)], "page") == [False]
        assert len(reports) == 1 and "cannot be removed" in reports[0]
        monkeypatch.undo()
        assert store.put("t", key(1), "page", payload(1))
        assert store.get("t", key(1), "page") is not None


# ---- the index --------------------------------------------------------------------------------------------------------


def index_of(directory: Path) -> Path:
    (path,) = directory.glob("index-*.sqlite")
    return path


def filled(directory: Path, count: int = 300) -> None:
    with opened(directory) as store:
        for i in range(count):
            store.put("t", key(i), "page", payload(i))


def assert_all_there(store: DiskStore, directory: Path, count: int = 300) -> None:
    assert all(store.contains("t", [key(i) for i in range(count)], "page"))
    for i in range(count):
        found = store.get("t", key(i), "page")
        assert found is not None and found.payload == payload(i)
    assert (store.stats().records, store.stats().bytes) == (count, disk_bytes(directory))


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"no database" * 1000),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "pages overwritten": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\x5a" * 20_000),
    "no table": lambda path: (
        sqlite3.connect(path, isolation_level=None).execute("DROP TABLE records").connection.close()
    ),
    "no totals": lambda path: (
        sqlite3.connect(path, isolation_level=None).execute("DELETE FROM totals").connection.close()
    ),
    "of a later version": lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 9").connection.close(),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_lost_index_is_rebuilt_from_the_files_and_reported_once(tmp_path, damage):
    filled(tmp_path)
    DAMAGES[damage](index_of(tmp_path))
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        assert len(reports) == 1 and "rebuilt from the files of 300 records" in reports[0]
        assert_all_there(store, tmp_path)
    with opened(tmp_path) as store:
        assert_all_there(store, tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_in_the_index_never_cost_a_record(tmp_path, seed):
    filled(tmp_path)
    r, path = random.Random(seed), index_of(tmp_path)
    data = bytearray(path.read_bytes())
    for _ in range(r.choice([1, 10, 100])):
        data[r.randrange(len(data))] = r.randrange(256)
    path.write_bytes(data)
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        for i in range(300):
            found = store.get("t", key(i), "page")
            assert found is not None and found.payload == payload(i)
        # A wrong byte in the middle of a row may be noticed only when it is used; then the next put rebuilds the index.
        for i in range(300, 310):
            store.contains("t", [key(j) for j in range(310)], "page")
            store.put("t", key(i), "page", payload(i))
        assert store.put("t", key(310), "page", payload(310))
        assert store.get("t", key(310), "page") is not None
    with opened(tmp_path, reports=reports) as store:
        assert (store.stats().records, store.stats().bytes) == (len(record_files(tmp_path)), disk_bytes(tmp_path))


def test_an_index_removed_under_an_open_store_is_rebuilt_at_the_next_put(tmp_path):
    filled(tmp_path, 20)
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        index_of(tmp_path).unlink()
        assert store.put("t", key(20), "page", payload(20))
        assert len(reports) == 1 and "rebuilt" in reports[0]
        assert_all_there(store, tmp_path, 21)
        # and nothing of the old one stays
        assert {path.name.partition("-")[2][:8] for path in tmp_path.glob("index-*")} == {index_of(tmp_path).stem[6:]}


def test_opening_drops_rows_without_files_and_adopts_files_without_rows(tmp_path):
    filled(tmp_path, 20)
    lost, strange, kept = file_of(tmp_path, *(("t", key(i), "page") for i in (0, 1, 2)))
    lost.unlink()
    db = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    db.execute("DELETE FROM records WHERE name = ?", (bytes.fromhex(strange.stem),))
    db.execute("UPDATE records SET nbytes = 5 WHERE name = ?", (bytes.fromhex(kept.stem),))
    db.close()
    (strange.parent / "notes.txt").write_text("of somebody else")
    with opened(tmp_path) as store:
        assert store.contains("t", [key(i) for i in range(20)], "page") == [False] + [True] * 19
        assert (store.stats().records, store.stats().bytes) == (19, disk_bytes(tmp_path))
        assert (strange.parent / "notes.txt").exists()


def test_a_record_that_vanished_under_an_open_store_is_no_longer_known_once_missed(tmp_path):
    filled(tmp_path, 3)
    with opened(tmp_path) as store:
        file_of(tmp_path, ("t", key(1), "page"))[0].unlink()
        assert store.get("t", key(1), "page") is None
        assert store.contains("t", [key(i) for i in range(3)], "page") == [True, False, True]
        store.put("t", key(3), "page", payload(3))
        assert (store.stats().records, store.stats().bytes) == (3, disk_bytes(tmp_path))


# ---- the size bound ---------------------------------------------------------------------------------------------------


def test_what_is_larger_than_the_limit_is_refused_and_evicts_nothing(tmp_path):
    with opened(tmp_path, 1000) as store:
        assert store.put("t", key(1), "page", b"x")
        assert not store.put("t", key(2), "page", bytes(1000))
        assert store.get("t", key(1), "page") is not None
        assert store.put("t", key(3), "page", bytes(1000 - OVERHEAD - 1))  # exactly the limit
        assert store.get("t", key(1), "page") is None
        assert (store.stats().refused, store.stats().evicted) == (1, 1)
    with opened(tmp_path / "none", 0) as store:
        assert not store.put("t", key(1), "page", b"")
    with pytest.raises(ConfigError, match="limit_bytes=-1"):
        opened(tmp_path, -1)


def test_a_smaller_limit_is_enforced_when_the_store_opens(tmp_path):
    filled(tmp_path, 30)
    with opened(tmp_path, 40_000) as store:
        assert disk_bytes(tmp_path) == store.stats().bytes <= 40_000
        kept = store.contains("t", [key(i) for i in range(30)], "page")
        assert kept == sorted(kept) and any(kept)  # the newest


def test_the_bound_holds_at_every_moment_under_load(tmp_path):
    limit_bytes, largest = 60_000, OVERHEAD + 1 + 6600
    seen, is_done = [], threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            seen.append(disk_bytes(tmp_path))

    with opened(tmp_path, limit_bytes) as store:
        watcher = threading.Thread(target=watch)
        writers = [
            threading.Thread(target=lambda n=n: [store.put("t", key(i), "page", payload(i)) for i in range(n, 600, 3)])
            for n in range(3)
        ]
        for thread in (watcher, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        is_done.set()
        watcher.join()
        assert len(seen) > 5 and max(seen) <= limit_bytes + largest
        assert disk_bytes(tmp_path) == store.stats().bytes <= limit_bytes
        assert store.stats().written == 600 == store.stats().evicted + store.stats().records


# ---- several engines --------------------------------------------------------------------------------------------------


def test_another_fingerprint_sees_nothing_but_shares_the_bound_and_goes_first_when_unused(tmp_path):
    with opened(tmp_path, 30_000, "old model") as old:
        for i in range(4):
            old.put("t", key(i), "page", payload(60))
    with opened(tmp_path, 30_000, "new model") as new:
        assert not any(new.contains("t", [key(i) for i in range(4)], "page"))
        assert all(new.get("t", key(i), "page") is None for i in range(4))
        assert new.stats().records == 4
        for i in range(10, 14):
            assert new.put("t", key(i), "page", payload(60))
        assert new.stats().records == 4 and new.stats().evicted == 4
        assert all(new.contains("t", [key(i) for i in range(10, 14)], "page"))
    assert sorted(path.read_text() for path in tmp_path.glob("*/fingerprint.txt")) == ["new model", "old model"]
    with opened(tmp_path, 30_000, "new model"):  # the old model's empty folder goes with the next start
        assert [path.read_text() for path in tmp_path.glob("*/fingerprint.txt")] == ["new model"]


def test_a_store_counts_its_own_records_among_those_of_all(tmp_path):
    with opened(tmp_path, fingerprint="a") as a, opened(tmp_path, fingerprint="b") as b:
        for i in range(5):
            a.put("t", key(i), "page", payload(i))
        for i in range(3):
            b.put(f"tenant {i}", key(0), "state", payload(i))
        assert [(store.stats().own, store.stats().records) for store in (a, b)] == [(5, 8), (3, 8)]
        a.delete("t", key(0), "page")
        assert [(store.stats().own, store.stats().records) for store in (a, b)] == [(4, 7), (3, 7)]


def test_opening_says_in_one_line_what_is_there_for_this_model_and_what_is_not(tmp_path, monkeypatch):
    lines, mib = [], 1 << 20
    monkeypatch.setattr(disk.log, "info", lambda line, *values: lines.append(line % values))
    with opened(tmp_path, 8 * mib, "old model") as old:
        for i in range(2):
            old.put("t", key(i), "page", bytes(mib))
    opened(tmp_path, 8 * mib, "old model").close()
    with opened(tmp_path, 8 * mib, "new model") as new:
        new.put("t", key(0), "page", bytes(mib))
    opened(tmp_path, 8 * mib, "new model").close()
    assert lines == [
        f"disk cache {tmp_path}: own records: 0; 0.0 of 8.0 MiB in use",
        f"disk cache {tmp_path}: own records: 2; 2.0 of 8.0 MiB in use",
        f"disk cache {tmp_path}: own records: 0; of other models or machines, left alone: 2; 2.0 of 8.0 MiB in use",
        f"disk cache {tmp_path}: own records: 1; of other models or machines, left alone: 2; 3.0 of 8.0 MiB in use",
    ]


def test_a_store_whose_empty_folder_was_removed_makes_it_again(tmp_path):
    with opened(tmp_path, fingerprint="a") as a, opened(tmp_path, fingerprint="b") as b:
        assert [path.read_text() for path in tmp_path.glob("*/fingerprint.txt")] == ["b"]
        assert a.put("t", key(1), "page", b"of a") and b.put("t", key(1), "page", b"of b")
        assert a.get("t", key(1), "page") == DiskRecord("page", b"of a", {})
        assert b.get("t", key(1), "page") == DiskRecord("page", b"of b", {})
        assert len(list(tmp_path.glob("*/fingerprint.txt"))) == 2


def test_two_stores_see_and_replace_and_evict_each_others_records(tmp_path):
    with opened(tmp_path, 20_000) as one, opened(tmp_path, 20_000) as two:
        one.put("t", key(1), "page", b"first")
        assert two.contains("t", [key(1)], "page") == [True]
        two.put("t", key(1), "page", b"second")
        assert one.get("t", key(1), "page") == DiskRecord("page", b"second", {})
        for i in range(2, 7):
            two.put("t", key(i), "page", payload(40))
        assert one.get("t", key(1), "page") is None
        assert one.stats().bytes == two.stats().bytes == disk_bytes(tmp_path) <= 20_000


BUSY_SCRIPT = """
import random, sys
from longreach.engine.disk import DiskStore
directory, seed = sys.argv[1], int(sys.argv[2])
r, reports, hits = random.Random(seed), [], 0
with DiskStore(directory, fingerprint="f", limit_bytes=120_000, on_damage=reports.append) as store:
    for _ in range(600):
        i = r.randrange(60)
        if r.random() < 0.5:
            assert store.put("t", key(i), "page", payload(i), {"i": i})
        elif r.random() < 0.9:
            found = store.get("t", key(i), "page")
            assert found is None or (found.payload == payload(i) and found.meta == {"i": i})
            hits += found is not None
        else:
            store.delete("t", key(i), "page")
assert not reports, reports
print(hits)
"""


def test_two_processes_on_one_folder_serve_each_other_and_keep_the_bound(tmp_path):
    processes = [run_script(BUSY_SCRIPT, tmp_path, seed) for seed in range(2)]
    assert all(int(finished(process)) > 20 for process in processes)
    with opened(tmp_path, 120_000) as store:
        assert disk_bytes(tmp_path) == store.stats().bytes <= 120_000
        assert len(record_files(tmp_path)) == store.stats().records > 10


def test_reading_while_another_thread_replaces_gives_one_or_the_other(tmp_path):
    with opened(tmp_path) as store:
        store.put("t", key(0), "page", payload(0))
        is_done = threading.Event()

        def replace() -> None:
            for i in range(300):
                store.put("t", key(0), "page", payload(i % 2))
            is_done.set()

        writer = threading.Thread(target=replace)
        writer.start()
        while not is_done.is_set():
            found = store.get("t", key(0), "page")
            assert found is not None and found.payload in (payload(0), payload(1))
        writer.join()


# ---- processes that die -----------------------------------------------------------------------------------------------

DOOMED_SCRIPT = """
import random, sys
from longreach.engine.disk import DiskStore
directory, seed = sys.argv[1], int(sys.argv[2])
r = random.Random(seed)
print("ready", flush=True)
with DiskStore(directory, fingerprint="f", limit_bytes=120_000) as store:
    while True:
        i = r.randrange(60)
        store.put("t", key(i), "page", [payload(i)[:1000], payload(i)[1000:]], {"i": i})
        store.get("t", key(r.randrange(60)), "page")
        if r.random() < 0.1:
            store.delete("t", key(r.randrange(60)), "page")
"""


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_instant_leaves_a_usable_store(tmp_path, kills):
    r, served = random.Random(kills), 0
    for kill in range(kills):
        process = run_script(DOOMED_SCRIPT, tmp_path, kill)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(r.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with opened(tmp_path, 120_000) as store:
            assert [path.suffix for path in (tmp_path / "writing").iterdir()] == [".lock"]
            assert disk_bytes(tmp_path) == store.stats().bytes <= 120_000
            known = store.contains("t", [key(i) for i in range(60)], "page")
            for i in range(60):
                found = store.get("t", key(i), "page")
                assert known[i] == (found is not None)
                assert found is None or (found.payload == payload(i) and found.meta == {"i": i})
                served += found is not None
    assert served > kills
    assert list((tmp_path / "writing").iterdir()) == []


def test_what_a_dead_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    with opened(tmp_path) as living:
        writing = tmp_path / "writing"
        (own,) = writing.iterdir()
        being_written = writing / f"{own.stem}.7"
        being_written.write_bytes(b"half a rec")
        (writing / "00112233445566aa.lock").touch()  # nobody holds it
        (writing / "00112233445566aa.3").write_bytes(b"half a rec")
        (writing / "00112233445566bb.0").write_bytes(b"half a rec")
        with opened(tmp_path):
            left = {path.name for path in writing.iterdir()}
            assert {own.name, being_written.name} < left and len(left) == 3
        assert living.put("t", key(1), "page", b"x")


# ---- disks that refuse ------------------------------------------------------------------------------------------------


def write_half(path: str, pieces) -> None:
    """The disk is full before the record ends."""
    data = b"".join(pieces)
    Path(path).write_bytes(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_refuses_records_is_reported_once_and_serves_what_it_has(tmp_path, monkeypatch):
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        store.put("t", key(0), "page", payload(0))
        before = disk_bytes(tmp_path)
        monkeypatch.setattr(disk, "write_new", write_half)
        assert not any(store.put("t", key(i), "page", payload(i)) for i in range(1, 6))
        assert len(reports) == 1 and "No space left" in reports[0] and "Free some space" in reports[0]
        assert store.stats().write_errors == 5
        assert disk_bytes(tmp_path) == before
        assert store.get("t", key(0), "page") is not None
        monkeypatch.undo()
        assert store.put("t", key(1), "page", payload(1))
        assert store.get("t", key(1), "page") is not None


LIMITED_SCRIPT = """
import resource, sys
from longreach.engine.disk import DiskStore
reports = []
with DiskStore(sys.argv[1], fingerprint="f", limit_bytes=1 << 30, on_damage=reports.append) as store:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel writes the first part and refuses the rest
    assert store.put("t", key(0), "page", payload(0))
    for i in range(1, 4):
        assert not store.put("t", key(i), "page", [payload(i), bytes(200_000)])
    assert len(reports) == 1 and "File too large" in reports[0], reports
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # now the index cannot grow either
    assert not store.put("t", key(4), "page", b"small")
    assert store.get("t", key(0), "page").payload == payload(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.put("t", key(5), "page", [payload(5), bytes(200_000)])
    assert store.put("t", key(6), "page", payload(6))
print(len(reports))
"""


def test_a_real_short_write_is_refused_and_later_puts_work(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    assert int(finished(run_script(LIMITED_SCRIPT, tmp_path))) == 2  # the file, the index
    with opened(tmp_path) as store:
        assert store.contains("t", [key(i) for i in range(7)], "page") == [True, False, False, False, False, True, True]
        assert (store.stats().records, store.stats().bytes) == (3, disk_bytes(tmp_path))


def test_a_disk_that_turns_read_only_refuses_and_recovers(tmp_path, monkeypatch):
    reports = Reports()

    def refuse(old, new):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), old)

    with opened(tmp_path, reports=reports) as store:
        monkeypatch.setattr(os, "replace", refuse)
        assert not any(store.put("t", key(i), "page", payload(i)) for i in range(3))
        assert len(reports) == 1 and "Make the folder writable" in reports[0]
        monkeypatch.undo()
        assert store.put("t", key(0), "page", payload(0))
        assert (store.stats().records, store.stats().bytes) == (1, disk_bytes(tmp_path))


def test_an_index_locked_by_another_process_refuses_puts_and_stops_no_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "USES_SAVED_EVERY_NS", 0)  # every get would like to write
    reports = Reports()
    with opened(tmp_path, reports=reports) as store:
        store.put("t", key(0), "page", payload(0))
        monkeypatch.setattr(disk, "BUSY_S", 0.05)
        other = sqlite3.connect(index_of(tmp_path), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert not any(store.put("t", key(i), "page", payload(i)) for i in range(1, 4))
        assert store.get("t", key(0), "page") is not None
        assert store.contains("t", [key(0), key(1)], "page") == [True, False]
        assert len(reports) == 1 and "locked" in reports[0]
        assert record_files(tmp_path) == file_of(tmp_path, ("t", key(0), "page"))
        other.execute("ROLLBACK")
        other.close()
        assert store.put("t", key(1), "page", payload(1))


def test_a_folder_that_vanishes_is_made_again_when_it_can_be(tmp_path):
    reports, directory = Reports(), tmp_path / "cache"
    with opened(directory, reports=reports) as store:
        store.put("t", key(0), "page", payload(0))
        assert directory.stat().st_mode & 0o077 == 0  # what users wrote can be read from it
        shutil.rmtree(directory)
        directory.write_text("in the way")
        assert store.get("t", key(0), "page") is None
        assert not any(store.put("t", key(i), "page", payload(i)) for i in range(3))
        assert store.contains("t", [key(0)], "page") == [False]
        writes = [line for line in reports if "not kept" in line]
        assert len(writes) == 1 and len(reports) <= 2
        directory.unlink()
        assert store.put("t", key(1), "page", payload(1))
        assert store.contains("t", [key(0), key(1)], "page") == [False, True]
        shutil.rmtree(directory / "writing")
        assert store.put("t", key(2), "page", payload(2))
        assert (store.stats().records, store.stats().bytes) == (2, disk_bytes(directory))


def test_a_folder_that_cannot_be_used_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match="cannot be opened") as caught:
            opened(directory)
        assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(disk, "OPENING_S", 0.02)
    filled(tmp_path / "cache", 1)
    with (tmp_path / "cache" / "opening.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="another process"):
            opened(tmp_path / "cache")


# ---- the background writer --------------------------------------------------------------------------------------------


def test_the_background_writer_writes_what_is_new_and_touches_what_is_known(tmp_path):
    with opened(tmp_path, 4 * (OVERHEAD + 1 + len('{"n":1}') + 4000)) as store:
        writer = BackgroundWriter(store, max_pending_bytes=LARGE)
        for i in range(4):
            assert writer.submit("t", key(i), "page", [bytes([i]) * 1000] * 4, {"n": i})
        assert writer.flush(timeout_s=10)
        for i in (1, 2, 3, 0):
            assert store.get("t", key(i), "page") == DiskRecord("page", bytes([i]) * 4000, {"n": i})
        writer.submit("t", key(1), "page", [bytes([1]) * 4000], {"n": 1})  # known: a use, not a write
        writer.submit("t", key(4), "page", [bytes([4]) * 4000], {"n": 4})  # so this evicts 2, not 1
        writer.close()
        assert store.contains("t", [key(i) for i in range(5)], "page") == [True, True, False, True, True]
        assert (store.stats().written, store.stats().evicted) == (5, 1)
        assert not writer.submit("t", key(5), "page", b"too late") and writer.dropped == 1
        writer.close()


def test_a_full_queue_drops_and_never_waits(tmp_path, monkeypatch):
    with opened(tmp_path) as store:
        may_write, put = threading.Event(), store.put
        monkeypatch.setattr(store, "put", lambda *record: may_write.wait(30) and put(*record))
        writer = BackgroundWriter(store, max_pending_bytes=1000)
        accepted = [writer.submit("t", key(i), "page", bytes(400)) for i in range(5)]
        assert accepted == [True, True, False, False, False]
        assert writer.dropped == 3 and writer.pending_bytes == 800
        assert not writer.submit("t", key(9), "page", bytes(1001))
        assert not writer.flush(timeout_s=0.01)
        may_write.set()
        assert writer.flush(timeout_s=10)
        assert writer.pending_bytes == 0 and writer.submit("t", key(2), "page", bytes(400))
        writer.close()
        assert store.contains("t", [key(i) for i in range(5)], "page") == [True, True, True, False, False]
