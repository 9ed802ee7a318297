"""The ledger: every request once, through crashes, retries and competing servers; budgets; reports. On both databases."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from longreach.cli import main
from longreach.errors import RequestError
from longreach.server import database as database_module
from longreach.server import ledger as ledger_module
from longreach.server.call import Usage
from longreach.server.database import FILE_NAME, META, REQUESTS, SERVERS, SPENDING, LedgerError, open_database
from longreach.server.keys import NO_KEY, KeyStore
from longreach.server.ledger import Ledger, Opening, Refusal
from longreach.server.prices import Price, cost_pico, find_table, to_pico
from longreach.server.usage import report

ROOT = Path(__file__).parent.parent
PRICE = Price(Decimal("0.003"), Decimal("0.15"), Decimal("0.60"))
USAGE = Usage(1000, 600, 200, 50)
COST = 600 * 3_000 + 400 * 150_000 + 200 * 600_000  # pico-units, by hand


# ---- two databases --------------------------------------------------------------------------------------------------


def _postgres_binaries() -> Path | None:
    found = shutil.which("pg_ctl")
    if found:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[4]))
    return versions[-1].parent if versions else None


@pytest.fixture(scope="session")
def postgres():
    """URL of a PostgreSQL server made for these tests; it listens on a Unix socket alone."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server binaries here (pg_ctl)")
    # A socket's path must be short, which pytest's own folders are not.
    folder = Path(tempfile.mkdtemp(prefix="lrpg"))
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("running as root, and there is no unprivileged user to run PostgreSQL as")
        shutil.chown(folder, user)

    def run(program: str, *words: str) -> None:
        # Not into a pipe: the server inherits it, and reading until its end would wait for the server's.
        subprocess.run(
            [binaries / program, *words], user=user, cwd=folder, check=True, timeout=60, env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    data = str(folder / "data")
    try:
        run("initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C")
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -c listen_addresses=", "start")
        try:
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """The URL of a new, empty database of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / FILE_NAME}"
        return
    server, name = request.getfixturevalue("postgres"), f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(server.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield server.replace("/postgres?", f"/{name}?")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


@pytest.fixture
def database(url):
    with open_database(url=url) as database:
        yield database


@pytest.fixture
def ledger(database):
    with Ledger(database) as ledger:
        yield ledger


@pytest.fixture
def quick_beat(monkeypatch):
    monkeypatch.setattr(ledger_module, "HEARTBEAT_S", 0.1)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def opening(id: str = "", key=NO_KEY, price: Price | None = PRICE, expected: Usage = USAGE, **changes) -> Opening:
    return Opening(id or uuid.uuid4().hex, key, "openai", "auto", "small", price, expected, **changes)


def rows(database) -> dict[str, sa.Row]:
    with database.read() as connection:
        return {row.id: row for row in connection.execute(REQUESTS.select())}


def spending(database) -> int:
    with database.read() as connection:
        return int(connection.scalar(sa.select(sa.func.sum(SPENDING.c.amount))) or 0)


def assert_sums_agree(database) -> None:
    """What is kept of each key and day is the sum of its requests, and only billed requests cost anything."""
    with database.read() as connection:
        query = sa.select(REQUESTS.c.key_id, REQUESTS.c.day, sa.func.sum(REQUESTS.c.amount)).where(
            REQUESTS.c.amount > 0
        )
        of_requests = {
            tuple(row[:2]): int(row[2]) for row in connection.execute(query.group_by(*query.selected_columns[:2]))
        }
        kept = {(row.key_id, row.day): row.amount for row in connection.execute(SPENDING.select())}
        billed = {row.status for row in connection.execute(REQUESTS.select().where(REQUESTS.c.amount > 0))}
    assert kept == of_requests
    assert billed <= {"completed", "cancelled"}


# ---- a request ------------------------------------------------------------------------------------------------------


def test_a_completed_request_is_kept_with_all_that_was_known_of_it(database, ledger):
    start = datetime(2026, 11, 24, 23, 59, 59, 250_000, tzinfo=UTC)
    assert ledger.begin(opening("a", user_id="anna", is_upstream=True, started=start)).result(10) is None
    assert rows(database)["a"].status == "running"
    assert ledger.finish("a", "completed", USAGE, reason="stop", first_token_s=0.25).result(10) is True
    row = rows(database)["a"]
    assert (row.status, row.reason, row.amount, row.day) == ("completed", "stop", COST, "2026-11-24")
    assert (row.hit_tokens, row.miss_tokens, row.completion_tokens, row.reasoning_tokens) == (600, 400, 200, 50)
    assert (row.model, row.answered_by, row.dialect, row.user_id) == ("auto", "small", "openai", "anna")
    assert (row.first_token_ms, row.is_upstream, row.key_id) == (250, True, 0)
    assert (row.currency, row.price_hit, row.price_miss, row.price_output) == ("USD", 3_000, 150_000, 600_000)
    assert row.started_ms == 1795564799250 and 0 <= row.duration_ms < 10_000
    assert spending(database) == COST


@pytest.mark.parametrize(("ending", "amount"), [("completed", COST), ("cancelled", COST), ("failed", 0)])
def test_what_was_answered_is_billed_and_a_failure_of_ours_is_not(database, ledger, ending, amount):
    ledger.begin(opening("a")).result(10)
    ledger.finish("a", ending, USAGE).result(10)
    row = rows(database)["a"]
    assert (row.status, row.amount, row.completion_tokens) == (ending, amount, 200)
    assert_sums_agree(database)


def test_a_request_is_closed_once_however_often_it_is_finished(database, ledger):
    ledger.begin(opening("a")).result(10)
    results = [ledger.finish("a", "completed", USAGE) for _ in range(3)]
    assert [result.result(10) for result in results] == [True, False, False]
    assert ledger.finish("never begun", "completed", USAGE).result(10) is False
    assert len(rows(database)) == 1 and spending(database) == COST


def test_a_model_without_a_price_costs_nothing(database, ledger):
    key, _ = KeyStore(database).add("a", balance=0)
    assert ledger.begin(opening("a", key, price=None)).result(10) is None
    ledger.finish("a", "completed", USAGE).result(10)
    assert rows(database)["a"].amount == 0 and spending(database) == 0


def test_a_request_turned_away_by_the_server_is_kept_and_costs_nothing(database, ledger):
    ledger.refuse(opening("a"), "tokens_per_minute").result(10)
    row = rows(database)["a"]
    assert (row.status, row.reason, row.amount, row.reserved) == ("refused", "tokens_per_minute", 0, 0)


def test_text_that_a_database_cannot_store_does_not_cost_the_request(database, ledger):
    bad = "\0\ud800" + "ü" * 600
    ledger.begin(replace(opening("a", user_id=bad), model=bad)).result(10)
    assert ledger.finish("a", "failed", Usage(), reason=bad).result(10)
    row = rows(database)["a"]
    assert row.user_id.startswith("\ufffd?ü") and len(row.user_id) <= 512


def test_a_number_that_does_not_fit_fails_alone(database, quick_beat, ledger):
    for id in "abc":
        ledger.begin(opening(id)).result(10)
    with database.write():  # as below
        futures = [ledger.finish(id, "completed", Usage(tokens)) for id, tokens in (("a", 1), ("b", 10**30), ("c", 1))]
    assert futures[0].result(10) and futures[2].result(10)
    with pytest.raises(LedgerError):
        futures[1].result(10)
    wait_until(lambda: rows(database)["b"].status != "running")
    assert [rows(database)[id].status for id in "abc"] == ["completed", "failed", "completed"]
    assert_sums_agree(database)


def test_a_duplicate_id_fails_alone(database, quick_beat, ledger):
    with open_database(url=str(database.engine.url.render_as_string(False))) as second, Ledger(second) as other:
        other.begin(opening("a")).result(10)
        with database.write():  # while nothing can be written, requests gather into one transaction (SQLite)
            futures = [ledger.begin(opening(id)) for id in ("b", "a", "c")]
        assert futures[0].result(10) is None and futures[2].result(10) is None
        with pytest.raises(LedgerError):
            futures[1].result(10)
        time.sleep(0.3)  # in which what failed here is closed, which must not be the other one's
        assert rows(database)["a"].status == "running"
        assert other.finish("a", "completed", USAGE).result(10) is True
        assert rows(database)["a"].status == "completed"


def test_a_client_that_goes_away_while_it_waits_loses_no_entry(database, ledger):
    async def serve():
        await asyncio.wrap_future(ledger.begin(opening("a")))
        waiting = asyncio.ensure_future(asyncio.wrap_future(ledger.finish("a", "completed", USAGE)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(serve())
    ledger.close()
    assert rows(database)["a"].status == "completed"


def test_many_requests_at_a_time_share_commits_and_are_all_kept(database, ledger):
    commits = []
    sa.event.listen(database.writing, "commit", lambda _: commits.append(1))

    async def client(number: int):
        for turn in range(5):
            id = f"{number}-{turn}"
            assert await asyncio.wrap_future(ledger.begin(opening(id))) is None
            assert await asyncio.wrap_future(ledger.finish(id, "completed", USAGE))

    async def all_clients():
        await asyncio.gather(*map(client, range(100)))

    asyncio.run(all_clients())
    assert Counter(row.status for row in rows(database).values()) == {"completed": 500}
    assert spending(database) == 500 * COST
    assert len(commits) < 500  # of 1,000 writes


def test_closing_the_ledger_writes_what_waits_and_fails_what_still_runs(database):
    ledger = Ledger(database)
    done = ledger.begin(opening("a"))
    late = ledger.begin(opening("b"))
    finished = ledger.finish("a", "completed", USAGE)
    ledger.close()
    ledger.close()
    assert (done.result(0), late.result(0), finished.result(0)) == (None, None, True)
    assert {id: row.status for id, row in rows(database).items()} == {"a": "completed", "b": "failed"}
    with pytest.raises(LedgerError, match="closed"):
        ledger.begin(opening("c")).result(0)
    with database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(SERVERS)) == 0


# ---- when the database misbehaves -----------------------------------------------------------------------------------


class Shaky:
    """Stands in for the engine that writes; `fail` decides what a transaction meets: nothing, "before" or "after"."""

    def __init__(self, engine, fail) -> None:
        self.engine, self.fail = engine, fail

    @contextmanager
    def begin(self):
        how = self.fail()
        lost = sa.exc.OperationalError("COMMIT", {}, Exception("server closed the connection"))
        if how == "before":
            raise lost
        with self.engine.begin() as connection:
            yield connection
        if how == "after":
            raise lost


def test_a_commit_that_nobody_confirmed_is_not_done_twice(database):
    key, _ = KeyStore(database).add("a", balance=10 * COST)
    ledger = Ledger(database)
    r = random.Random(3)
    database.writing = Shaky(database.writing, lambda: r.choice(["before", "after", None, None, None]))
    accepted = 0
    for number in range(30):
        refusal = ledger.begin(opening(str(number), key)).result(20)
        if refusal is None:
            assert ledger.finish(str(number), "completed", USAGE).result(20) is True
            accepted += 1
        else:
            assert refusal.reason == "balance"
    database.writing = database.writing.engine
    ledger.close()
    assert accepted == 10
    assert Counter(row.status for row in rows(database).values()) == {"completed": 10, "refused": 20}
    assert spending(database) == 10 * COST
    assert_sums_agree(database)


def test_while_the_database_is_away_requests_fail_soon_and_are_closed_when_it_is_back(
    database, quick_beat, monkeypatch
):
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.1)
    ledger = Ledger(database)
    ledger.begin(opening("a")).result(10)
    whole = database.writing
    database.writing = Shaky(whole, lambda: "before")
    start = time.monotonic()
    finished, begun = ledger.finish("a", "completed", USAGE), ledger.begin(opening("b"))
    for future in (finished, begun):
        with pytest.raises(LedgerError, match="cannot be written"):
            future.result(10)
    assert time.monotonic() - start < 2
    assert rows(database)["a"].status == "running"
    database.writing = whole
    wait_until(lambda: rows(database)["a"].status != "running")
    assert (rows(database)["a"].status, rows(database)["a"].reason, set(rows(database))) == ("failed", "ledger", {"a"})
    assert ledger.begin(opening("c")).result(10) is None
    assert ledger.running == 1
    ledger.close()
    assert spending(database) == 0


# ---- crashes --------------------------------------------------------------------------------------------------------

SERVER = """
import asyncio, os, sys, uuid
from decimal import Decimal
from longreach.server.call import Usage
from longreach.server.database import open_database
from longreach.server.keys import KeyStore, NO_KEY
from longreach.server.ledger import Ledger, Opening
from longreach.server.prices import Price

url, secret, clients = sys.argv[1], sys.argv[2], int(sys.argv[3])
price = Price(Decimal("0.003"), Decimal("0.15"), Decimal("0.60"))
usage = Usage(1000, 600, 200, 50)
database = open_database(url=url)
key = KeyStore(database).lookup(secret) if secret else NO_KEY
ledger = Ledger(database)
ledger.recover()

def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())

async def client():
    while True:
        id = uuid.uuid4().hex
        if await asyncio.wrap_future(ledger.begin(Opening(id, key, "openai", "m", "m", price, usage))):
            return
        say("began", id)
        await asyncio.sleep(0.001)
        await asyncio.wrap_future(ledger.finish(id, "completed", usage, reason="stop"))
        say("done", id)

async def main():
    await asyncio.gather(*[client() for _ in range(clients)])

say("ready", "now")
asyncio.run(main())
ledger.close()
"""


def start_server(url: str, secret: str = "", clients: int = 30) -> subprocess.Popen:
    words = [sys.executable, "-c", SERVER, url, secret, str(clients)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill_often(url: str, times: int, seed: int) -> None:
    r, said = random.Random(seed), Counter()
    began, done = set(), set()
    for _ in range(times):
        process = start_server(url)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("done"):
                done.add(line.split()[1])
                break
            began.update(line.split()[1:] if line.startswith("began") else ())
        time.sleep(r.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        for line in process.stdout.read().splitlines(keepends=True):
            word, _, id = line.partition(" ")
            said[word] += 1
            if line.endswith("\n"):  # the last one may be cut off
                {"began": began, "done": done}.get(word, set()).add(id.strip())
        assert process.wait(10) == -signal.SIGKILL
    assert len(done) > 20 * times / 2, "the servers were hardly under load"
    with open_database(url=url) as database:
        with Ledger(database) as ledger:
            ledger.recover()
        found = rows(database)
        completed = {id for id, row in found.items() if row.status == "completed"}
        assert done <= completed
        assert began <= set(found)
        assert set(Counter(row.status for row in found.values())) <= {"completed", "lost"}
        assert all(row.amount == (COST if row.status == "completed" else 0) for row in found.values())
        # The last words of a killed server may not have been heard, but only of what ran at that moment.
        assert len(completed - done) <= 30 * times
        assert spending(database) == COST * len(completed)
        assert_sums_agree(database)


def test_killed_under_load_five_times_the_ledger_holds_every_completed_request_once(url, tmp_path):
    kill_often(url, 5 if url.startswith("sqlite") else 2, seed=1)
    if url.startswith("sqlite"):
        with sqlite3.connect(tmp_path / FILE_NAME) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_killed_under_load_twenty_times_the_ledger_holds_every_completed_request_once(url):
    kill_often(url, 20, seed=2)


def test_what_a_dead_server_reserved_is_free_after_the_next_start(url):
    with open_database(url=url) as database:
        keys = KeyStore(database)
        key, secret = keys.add("a", balance=3 * COST)
        program = SERVER.replace("await asyncio.sleep(0.001)", "await asyncio.sleep(600)")
        process = subprocess.Popen(
            [sys.executable, "-c", program, url, secret, "3"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert [process.stdout.readline().split()[0] for _ in range(4)] == ["ready", "began", "began", "began"]
        with Ledger(database) as ledger:
            assert ledger.recover() == 0  # that server lives
            assert ledger.balance(key).reserved == 3 * COST
            refusal = ledger.begin(opening("x", key)).result(10)
            assert refusal is not None and refusal.message == "Insufficient Balance"
            process.kill()
            process.wait(10)
            assert ledger.recover() == 3
            assert ledger.recover() == 0
            assert ledger.balance(key).reserved == 0
            assert ledger.begin(opening("y", key)).result(10) is None


def test_a_server_restarted_under_the_same_process_number_finds_what_it_left(database):
    asleep = Ledger(database)
    asleep.begin(opening("a")).result(10)
    with Ledger(database) as other:
        assert other.recover() == 0  # both live in this process
        with database.write() as connection:
            connection.execute(SERVERS.update().where(SERVERS.c.id == asleep.id).values(process="an earlier one"))
        assert other.recover() == 1
    asleep.close()


def test_a_server_that_was_only_asleep_still_completes_what_was_thought_lost(database, ledger):
    key, _ = KeyStore(database).add("a", balance=10 * COST)
    ledger.begin(opening("a", key)).result(10)
    with open_database(url=database.engine.url.render_as_string(False)) as second:
        with second.write() as connection:
            connection.execute(SERVERS.update().where(SERVERS.c.id == ledger.id).values(alive_until_ms=0))
        with Ledger(second) as other:
            assert other.recover() == 1
    assert rows(database)["a"].status == "lost"
    assert ledger.finish("a", "completed", USAGE).result(10) is True
    assert rows(database)["a"].status == "completed" and spending(database) == COST
    assert_sums_agree(database)


def test_two_server_processes_together_never_spend_more_than_a_balance(url):
    with open_database(url=url) as database:
        key, secret = KeyStore(database).add("a", balance=100 * COST)
        servers = [start_server(url, secret, clients=10) for _ in range(2)]
        said = [server.communicate(timeout=60)[0].split("\n") for server in servers]
        assert [server.returncode for server in servers] == [0, 0]
        done = [sum(line.startswith("done") for line in lines) for lines in said]
        assert sum(done) == 100 and spending(database) == 100 * COST
        statuses = Counter(row.status for row in rows(database).values())
        assert statuses == {"completed": 100, "refused": 20}
        with Ledger(database) as ledger:
            balance = ledger.balance(key)
        assert (balance.left, balance.reserved) == (0, 0)
        assert balance.body()["is_available"] is False


# ---- money ----------------------------------------------------------------------------------------------------------


def test_a_request_is_refused_when_what_it_may_cost_is_not_there(database, ledger):
    key, _ = KeyStore(database).add("a", balance=COST + 5)
    assert ledger.check(key) is None
    assert ledger.begin(opening("a", key)).result(10) is None
    assert ledger.begin(opening("b", key)).result(10) == Refusal("balance", "Insufficient Balance")
    ledger.finish("a", "completed", Usage(10, 10, 0)).result(10)  # cheaper than expected: the rest is free again
    assert ledger.begin(opening("c", key, expected=Usage(1000, 600, 100))).result(10) is None
    ledger.finish("c", "completed", USAGE).result(10)  # dearer than expected: billed all the same
    assert ledger.balance(key).left == 5 - 30_000
    assert ledger.check(key) is not None
    assert ledger.begin(opening("d", key, expected=Usage())).result(10) is not None
    assert ledger.finish("d", "cancelled", Usage()).result(10) is False
    statuses = {id: row.status for id, row in rows(database).items()}
    assert statuses == {"a": "completed", "b": "refused", "c": "completed", "d": "refused"}
    assert ledger.running == 0


def test_requests_of_one_batch_count_against_each_other(database, ledger):
    key, _ = KeyStore(database).add("a", balance=7 * COST)
    futures = [ledger.begin(opening(str(number), key)) for number in range(20)]
    assert [future.result(10) is None for future in futures] == [True] * 7 + [False] * 13


def test_budgets_hold_for_utc_days_and_months(database, ledger):
    keys = KeyStore(database)
    day, _ = keys.add("day", budget_day=COST)
    month, _ = keys.add("month", budget_month=COST)
    for key in (day, month):
        ledger.begin(opening(f"{key.name}", key, started=datetime(2026, 5, 31, 23, 59, tzinfo=UTC))).result(10)
        ledger.finish(key.name, "completed", USAGE).result(10)

    def reason(key, *when):
        refusal = ledger.check(key, datetime(*when, tzinfo=UTC))
        return refusal and refusal.reason

    assert reason(day, 2026, 5, 31, 23, 59) == "budget_day"
    assert reason(day, 2026, 6, 1) is None
    assert reason(month, 2026, 5, 1) == "budget_month"
    assert reason(month, 2026, 6, 1) is None
    assert reason(month, 2027, 5, 31) is None
    for key in (day, month):
        assert ledger.begin(opening(f"{key.name} 1", key)).result(10) is None
        refused = ledger.begin(opening(f"{key.name} 2", key)).result(10)
        assert refused is not None and refused.reason == f"budget_{key.name}" and "this request" in refused.message


def test_the_balance_is_told_as_the_hosted_api_tells_it(database, ledger):
    keys = KeyStore(database)
    key, _ = keys.add("a", balance=to_pico(Decimal(10)))
    keys.top_up("a", to_pico(Decimal(100)))
    assert ledger.balance(key).body() == {
        "is_available": True,
        "balance_infos": [
            {"currency": "USD", "total_balance": "110.00", "granted_balance": "10.00", "topped_up_balance": "100.00"}
        ],
    }
    big = Price(Decimal(0), Decimal("12.345678"), Decimal(0))
    ledger.begin(opening("r", key, price=big)).result(10)
    ledger.finish("r", "completed", Usage(1_000_000, 0, 0)).result(10)
    info = ledger.balance(key).body()["balance_infos"][0]
    assert (info["total_balance"], info["granted_balance"], info["topped_up_balance"]) == ("97.65", "0.00", "97.65")
    free, _ = keys.add("free")
    assert ledger.balance(free).body()["is_available"] is True


# ---- opening --------------------------------------------------------------------------------------------------------


def test_a_newer_ledger_is_refused(url):
    with open_database(url=url) as database, database.write() as connection:
        connection.execute(META.update().where(META.c.name == "version").values(value="2"))
    with pytest.raises(LedgerError, match="newer longreach"):
        open_database(url=url)


def test_an_older_ledger_is_brought_to_the_current_version_once(url, monkeypatch):
    def migrate(connection):
        connection.execute(sa.text("ALTER TABLE longreach_requests ADD COLUMN region VARCHAR(8)"))

    with open_database(url=url) as database, Ledger(database) as ledger:
        ledger.begin(opening("a")).result(10)
    monkeypatch.setattr(database_module, "VERSION", 2)
    monkeypatch.setitem(database_module.MIGRATIONS, 1, migrate)
    for _ in range(2):
        with open_database(url=url) as database, database.read() as connection:
            assert connection.scalar(sa.select(META.c.value).where(META.c.name == "version")) == "2"
            assert connection.execute(sa.text("SELECT id, region FROM longreach_requests")).all() == [("a", None)]


def test_a_migration_that_fails_changes_nothing(url, monkeypatch):
    open_database(url=url).close()

    def migrate(connection):
        connection.execute(sa.text("ALTER TABLE longreach_keys ADD COLUMN half VARCHAR(8)"))
        connection.execute(sa.text("SELECT no_such_column FROM longreach_keys"))

    with monkeypatch.context() as patch:
        patch.setattr(database_module, "VERSION", 2)
        patch.setitem(database_module.MIGRATIONS, 1, migrate)
        with pytest.raises(LedgerError, match="no_such_column"):
            open_database(url=url)
    with open_database(url=url) as database:
        assert "half" not in {column["name"] for column in sa.inspect(database.engine).get_columns("longreach_keys")}


def test_processes_that_open_a_new_database_at_once_make_it_once(url):
    program = "import sys; from longreach.server.database import open_database; open_database(url=sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", program, url], cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]


def test_what_is_no_ledger_is_refused_in_one_line(tmp_path, postgres):
    text = tmp_path / "text"
    text.mkdir()
    (text / FILE_NAME).write_text("this is not a database, and long enough to be seen as none\n" * 20)
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / FILE_NAME) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    (tmp_path / "file").touch()
    for place, said in (
        ((text,), "not a database"),
        ((other,), "something else"),
        ((tmp_path / "file",), "cannot be opened"),
        ((None, "no url"), "not a URL"),
        ((None, "mysql://root:secret@host/name"), "not supported"),
        ((None, "sqlite://"), "not supported"),
        ((None, postgres.replace("/postgres?", "/absent?")), "absent"),
        ((None, "postgresql://u:secret@127.0.0.1:1/name"), "cannot be opened"),
    ):
        with pytest.raises((LedgerError, RequestError), match=said) as caught:
            open_database(*place)
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert (text / FILE_NAME).read_text().startswith("this is not")
    with pytest.raises(LedgerError, match="does not exist"):
        open_database(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(LedgerError, match="holds no ledger"):
        open_database(url=postgres, create=False)


def test_a_ledger_counts_in_one_currency(url):
    open_database(url=url, currency="CNY").close()
    with pytest.raises(LedgerError, match="kept in CNY"):
        open_database(url=url, currency="USD")
    with open_database(url=url) as database:
        assert database.currency == "CNY"


# ---- reports --------------------------------------------------------------------------------------------------------

PRO = "deepseek-v4-pro"


@pytest.fixture
def traffic(database):
    """Four requests of two keys, with prices of 1, 10 and 100 per million."""
    keys = KeyStore(database)
    anna, _ = keys.add("anna")
    bob, _ = keys.add("bob")
    price = Price(Decimal(1), Decimal(10), Decimal(100))
    with Ledger(database) as ledger:
        for id, key, model, when, ending in (
            ("1", anna, PRO, "2026-05-20T02:00:30Z", "completed"),
            ("2", anna, "small", "2026-11-24T02:00:30Z", "completed"),  # a Tuesday's peak
            ("3", bob, PRO, "2026-11-24T05:00:00Z", "cancelled"),
            ("4", bob, PRO, "2026-11-24T05:00:00Z", "failed"),
        ):
            start = datetime.fromisoformat(when)
            ledger.begin(Opening(id, key, "openai", "auto", model, price, Usage(), f"user of {key.name}", False, start))
            ledger.finish(id, ending, Usage(1_000_000, 400_000, 10_000, 5_000))
    return database


EACH = Decimal("0.4") + 6 + 1  # 400,000 hits, 600,000 misses, 10,000 tokens of output


def test_a_report_sums_by_what_was_asked_for(traffic):
    found = report(traffic, ["key"])
    assert [(line.group, line.requests, line.amount) for line in found.lines] == [
        (("anna",), 2, to_pico(2 * EACH)), (("bob",), 2, to_pico(EACH)),
    ]  # fmt: skip
    assert found.total.statuses == {"completed": 2, "cancelled": 1, "failed": 1}
    assert (found.total.prompt_tokens, found.total.hit_tokens, found.total.reasoning_tokens) == (
        4_000_000,
        1_600_000,
        20_000,
    )
    assert found.total.saved == to_pico(Decimal("3.6") * 3)  # 400,000 tokens at 10 instead of 1, three times
    by = {line.group: line.requests for line in report(traffic, ["day", "model", "user"]).lines}
    assert by == {
        ("2026-05-20", PRO, "user of anna"): 1, ("2026-11-24", PRO, "user of bob"): 2,
        ("2026-11-24", "small", "user of anna"): 1,
    }  # fmt: skip
    since, until = datetime(2026, 11, 24, 2, 0, 30, tzinfo=UTC), datetime(2026, 11, 24, 5, tzinfo=UTC)
    assert report(traffic, ["key"], since=since, until=until).total.requests == 1


def test_what_if_prices_every_billed_request_at_its_own_time_or_at_one_moment(traffic):
    hosted = find_table("hosted")
    own = report(traffic, ["day"], what_if=[hosted]).total.what_if[0]
    # May: 0.4 * 0.003625 + 0.6 * 0.435 + 0.01 * 0.87; November off-peak: 0.4 * 0.022 + 0.6 * 0.66 + 0.01 * 1.98
    assert own.cost == to_pico(Decimal("0.27115") + Decimal("0.4246"))
    assert own.saved == to_pico(
        Decimal("0.4") * (Decimal("0.435") - Decimal("0.003625") + Decimal("0.66") - Decimal("0.022"))
    )
    assert own.unpriced == 1  # "small" is nothing DeepSeek sells
    as_pro = report(traffic, ["day"], what_if=[hosted], priced_as={"small": PRO}).total.what_if[0]
    assert (as_pro.cost - own.cost, as_pro.unpriced) == (
        to_pico(Decimal("0.0176") + Decimal("0.792") + Decimal("0.0396")),
        0,
    )
    may = report(traffic, ["day"], what_if=[hosted], at=datetime(2026, 5, 20, tzinfo=UTC)).total.what_if[0]
    assert may.cost == to_pico(2 * Decimal("0.27115"))


def test_a_report_of_random_traffic_equals_a_plain_loop(database):
    r, table = random.Random(5), find_table("hosted")
    expected_cost, expected_amount = Counter(), Counter()
    with Ledger(database) as ledger:
        for number in range(300):
            start = datetime.fromtimestamp(r.randrange(1_776_990_000, 1_795_000_000), UTC)
            model = r.choice([PRO, "deepseek-v4-flash"])
            hit, miss, out = r.randrange(10**6), r.randrange(10**6), r.randrange(10**5)
            usage = Usage(hit + miss, hit, out)
            ledger.begin(Opening(str(number), NO_KEY, "openai", model, model, PRICE, usage, started=start))
            ledger.finish(str(number), "completed", usage)
            price = table.price_of(model, start)
            expected_cost[model] += cost_pico(usage, price) if price else 0
            expected_amount[model] += cost_pico(usage, PRICE)
    found = report(database, ["model"], what_if=[table])
    assert {line.group[0]: line.what_if[0].cost for line in found.lines} == expected_cost
    assert {line.group[0]: line.amount for line in found.lines} == expected_amount


def test_a_key_name_given_twice_is_told_apart(database):
    keys = KeyStore(database)
    first, _ = keys.add("laptop")
    keys.revoke("laptop")
    second, _ = keys.add("laptop")
    with Ledger(database) as ledger:
        for key in (first, second, NO_KEY):
            ledger.begin(opening(key=key)).result(10)
    groups = [line.group[0] for line in report(database, ["key"]).lines]
    assert groups == ["(no key)", f"laptop #{first.id}", f"laptop #{second.id}"]


@pytest.fixture
def longreach(capsys):
    def run(*words: str):
        code = main(["usage", *words])
        return code, *capsys.readouterr()

    return run


def test_the_usage_command_prints_a_table_or_json(longreach, traffic, url):
    code, out, _ = longreach("--database", url, "--by", "key", "--what-if", "hosted", "launch")
    assert code == 0
    line = next(line for line in out.splitlines() if "anna" in line)
    assert "14.800000" in line and "40.0%" in line and "2,000,000" in line
    assert "1 cancelled, 1 failed" in out and "hosted has no price for 1 of them" in out
    code, out, _ = longreach("--database", url, "--by", "model", "--json", "--what-if", "hosted", "--at", "2026-05-20")
    told = json.loads(out)
    assert (told["currency"], told["by"], told["total"]["amount"]) == ("USD", ["model"], "22.20")
    assert told["lines"][0]["what_if"][0] == {
        "table": "hosted", "currency": "USD", "cost": "0.5423", "saved_by_cache": "0.3451", "requests_without_price": 0,
    }  # fmt: skip


def test_labels_that_look_like_markup_are_shown_as_they_are(longreach, url):
    with open_database(url=url) as database, Ledger(database) as ledger:
        ledger.begin(opening(user_id="[red]x[/]")).result(10)
    assert "[red]x[/]" in longreach("--database", url, "--by", "user")[1]


def test_a_report_of_nothing_says_so(longreach, url, database):
    code, out, _ = longreach("--database", url, "--since", "2026-11-01")
    assert code == 0 and out.startswith("no requests since 2026-11-01 00:00 UTC in ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "hour"], "--by 'hour' is unknown; allowed are day, key, model, user"),
        (["--by", "day,day"], "different names"),
        (["--by", ""], "different names"),
        (["--since", "yesterday"], "is no date"),
        (["--what-if", "cheap"], "no price table 'cheap'"),
        (["--at", "2026-05-20"], "--what-if"),
        (["--what-if", "hosted", "--priced-as", "small"], "OURS=THEIRS"),
        (["--server", "no/such/directory"], "does not exist"),
    ],
)
def test_a_wrong_report_is_refused_in_one_line(longreach, tmp_path, words, said):
    if "--server" not in words:
        open_database(tmp_path).close()
        words = [*words, "--server", str(tmp_path)]
    code, out, err = longreach(*words)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1
