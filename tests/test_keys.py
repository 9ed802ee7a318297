"""API keys: secrets, what is stored of them, revocation across processes, limits, and the `longreach keys` commands."""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longreach.cli import main
from longreach.errors import RequestError
from longreach.server.database import FILE_NAME, LedgerError, open_database
from longreach.server.keys import NO_KEY, Key, KeyStore, digest_of, new_secret
from longreach.server.ledger import Ledger, Opening
from longreach.server.limits import Admitted, Busy, RateLimiter

ROOT = Path(__file__).parent.parent


@pytest.fixture
def database(tmp_path):
    with open_database(tmp_path) as database:
        yield database


@pytest.fixture
def keys(database):
    return KeyStore(database)


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_a_secret_is_256_random_bits_in_base62_behind_a_fixed_beginning():
    secrets = {new_secret() for _ in range(200)}
    assert len(secrets) == 200
    assert all(re.fullmatch(r"sk-lr-[0-9A-Za-z]{43}", secret) for secret in secrets)


def test_a_key_is_found_by_its_secret_and_by_nothing_near_it(keys):
    key, secret = keys.add("laptop")
    other, other_secret = keys.add("phone")
    assert keys.lookup(secret) == key
    assert keys.lookup(other_secret) == other
    last = "a" if secret[-1] != "a" else "b"
    for wrong in (
        "",
        "sk-lr-",
        secret[:-1],
        secret + "x",
        secret[:-1] + last,
        secret.lower(),
        key.prefix,
        "\ud800",
        "ü",
    ):
        assert keys.lookup(wrong) is None


def test_the_database_holds_no_secret(tmp_path, keys):
    _, secret = keys.add("laptop")
    keys.database.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert digest_of(secret).encode() in stored
    assert secret.encode() not in stored
    assert secret[-20:].encode() not in stored


def test_only_the_owner_can_read_the_database(tmp_path):
    with open_database(tmp_path / "server") as database:
        KeyStore(database).add("laptop")
    assert stat.S_IMODE((tmp_path / "server").stat().st_mode) == 0o700
    for path in (tmp_path / "server").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_looking_up_a_key_touches_no_database(keys):
    _, secret = keys.add("laptop")
    keys.database.close()
    os.rename(keys.database.where, keys.database.where + ".away")
    assert keys.lookup(secret) is not None


def test_a_key_keeps_what_it_was_made_with(keys):
    key, secret = keys.add(
        "ci", concurrency=2, tokens_per_minute=1000, budget_day=10**12, budget_month=2 * 10**12, balance=3 * 10**12,
        models=("small", "auto"),
    )  # fmt: skip
    again = KeyStore(keys.database).lookup(secret)
    assert again == key
    assert (key.concurrency, key.tokens_per_minute, key.budget_day, key.budget_month) == (2, 1000, 10**12, 2 * 10**12)
    assert key.is_prepaid and key.has_money_limit
    assert key.allows("auto") and not key.allows("large")
    assert NO_KEY.allows("large") and not NO_KEY.has_money_limit


@pytest.mark.parametrize("name", ["", "-x", "two words", "a" * 65, "ü", "a\n", "[red]"])
def test_a_name_that_would_be_hard_to_type_is_refused(keys, name):
    with pytest.raises(RequestError, match="key name"):
        keys.add(name)


@pytest.mark.parametrize("limits", [{"concurrency": 0}, {"tokens_per_minute": -1}, {"concurrency": 10**13}])
def test_a_limit_that_is_none_is_refused(keys, limits):
    with pytest.raises(RequestError, match="is no limit"):
        keys.add("x", **limits)


def test_a_name_is_in_use_until_its_key_is_revoked(keys):
    first, first_secret = keys.add("laptop")
    with pytest.raises(RequestError, match="exists"):
        keys.add("laptop")
    keys.revoke("laptop")
    second, second_secret = keys.add("laptop")
    assert keys.lookup(first_secret) is None
    assert keys.lookup(second_secret) == second
    assert first.id != second.id
    assert [key.revoked is None for key in keys.all()] == [False, True]


def test_what_is_not_there_cannot_be_revoked(keys):
    with pytest.raises(RequestError, match="there is none"):
        keys.revoke("laptop")
    keys.add("phone")
    with pytest.raises(RequestError, match="there are phone"):
        keys.revoke("laptop")


def test_only_prepaid_keys_are_topped_up(keys):
    keys.add("free")
    keys.add("paid", balance=0)
    with pytest.raises(RequestError, match="not limited by a balance"):
        keys.top_up("free", 1)
    with pytest.raises(RequestError, match="nothing"):
        keys.top_up("paid", 0)
    for _ in range(8):
        keys.top_up("paid", 10**18)
    with pytest.raises(RequestError, match="more cannot be counted"):
        keys.top_up("paid", 1)


# ---- changes by another process -------------------------------------------------------------------------------------

OTHER = """
import sys
from longreach.server.database import open_database
from longreach.server.keys import KeyStore
with open_database(sys.argv[1]) as database:
    if sys.argv[2] == "add":
        print(KeyStore(database).add(sys.argv[3])[1])
    else:
        KeyStore(database).revoke(sys.argv[3])
"""


def in_another_process(*words: str) -> str:
    done = subprocess.run([sys.executable, "-c", OTHER, *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def wait_until(condition, limit_s: float = 5.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - start


def test_a_running_server_notices_keys_added_and_revoked_by_another_process(tmp_path, keys):
    keys.watch()
    try:
        secret = in_another_process(str(tmp_path), "add", "laptop")
        wait_until(lambda: keys.lookup(secret) is not None)
        in_another_process(str(tmp_path), "revoke", "laptop")
        assert wait_until(lambda: keys.lookup(secret) is None) < 2.5
    finally:
        keys.close()


def test_when_the_keys_cannot_be_read_none_is_accepted_for_long(database, monkeypatch):
    keys = KeyStore(database, poll_s=0.02, forget_s=0.2)
    _, secret = keys.add("laptop")
    keys.watch()
    refresh = keys.refresh

    def unreadable():
        raise LedgerError("gone")

    monkeypatch.setattr(keys, "refresh", unreadable)
    assert keys.lookup(secret) is not None
    assert wait_until(lambda: keys.lookup(secret) is None) > 0.1
    monkeypatch.setattr(keys, "refresh", refresh)
    wait_until(lambda: keys.lookup(secret) is not None)
    keys.close()


def test_the_last_use_of_a_key_is_kept(database, keys):
    key, _ = keys.add("laptop")
    assert keys.all()[0].last_used is None
    with Ledger(database) as ledger:
        assert ledger.begin(Opening("r1", key, "openai", "m", "m")).result(10) is None
    used = keys.all()[0].last_used
    assert used is not None and abs(used.timestamp() - time.time()) < 30


# ---- limits ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_more_requests_of_a_key_run_at_a_time_than_it_may_have():
    limiter, key = RateLimiter(), Key(1, "a", concurrency=2)
    first, second = limiter.admit(key, 10), limiter.admit(key, 10)
    busy = limiter.admit(key, 10)
    assert isinstance(busy, Busy) and (busy.reason, busy.retry_after_s) == ("concurrency", 1)
    assert isinstance(limiter.admit(Key(2, "b", concurrency=1), 10), Admitted)
    assert isinstance(first, Admitted) and isinstance(second, Admitted)
    first.release(5)
    assert limiter.running(key) == 1
    assert isinstance(limiter.admit(key, 10), Admitted)


def test_tokens_per_minute_are_a_bucket_and_retry_after_says_when_it_is_full_enough():
    clock = Clock()
    limiter, key = RateLimiter(clock), Key(1, "a", tokens_per_minute=600)  # ten a second
    request = limiter.admit(key, 500)
    assert isinstance(request, Admitted)
    request.release(200)  # level: 100 - 200 = -100
    busy = limiter.admit(key, 50)
    assert isinstance(busy, Busy) and (busy.reason, busy.retry_after_s) == ("tokens_per_minute", 15)
    clock.now += 14.9
    assert isinstance(limiter.admit(key, 50), Busy)
    clock.now += 0.1
    assert isinstance(limiter.admit(key, 50), Admitted)


def test_a_prompt_larger_than_a_minute_passes_when_nothing_was_used_for_a_minute():
    clock = Clock()
    limiter, key = RateLimiter(clock), Key(1, "a", tokens_per_minute=60)
    request = limiter.admit(key, 300)
    assert isinstance(request, Admitted)
    request.release()
    busy = limiter.admit(key, 300)
    assert isinstance(busy, Busy) and busy.retry_after_s == 300  # 240 of debt, then 60 for a full bucket
    clock.now += 300
    assert isinstance(limiter.admit(key, 300), Admitted)


def test_an_empty_prompt_does_not_run_up_debt_without_end():
    limiter, key = RateLimiter(Clock()), Key(1, "a", tokens_per_minute=60)
    request = limiter.admit(key, 0)
    assert isinstance(request, Admitted)
    request.release(1000)
    assert isinstance(limiter.admit(key, 0), Busy)


def test_keys_at_rest_take_no_memory():
    clock = Clock()
    limiter = RateLimiter(clock)
    for number in range(1000):
        request = limiter.admit(Key(number, "k", tokens_per_minute=60 if number % 2 else None), 10)
        assert isinstance(request, Admitted)
        request.release(1)
    clock.now += 200
    limiter.admit(Key(5000, "k"), 1)
    assert len(limiter._states) == 1


def test_a_random_walk_of_the_limiter_agrees_with_a_plain_model():
    r, clock = random.Random(1), Clock()
    limiter, key = RateLimiter(clock), Key(1, "a", concurrency=3, tokens_per_minute=120)
    level, running, admitted = 120.0, [], 0
    for _ in range(5000):
        if r.random() < 0.5:
            step = r.choice([0.0, 0.5, 1.0, 4.0])
            clock.now += step
            level = min(120.0, level + 2 * step)
        elif running and r.random() < 0.5:
            tokens = r.randrange(30)
            running.pop(r.randrange(len(running))).release(tokens)
            level -= tokens
        else:
            prompt = r.randrange(150)
            result = limiter.admit(key, prompt)
            may = len(running) < 3 and level >= max(1, min(prompt, 120))
            assert isinstance(result, Admitted) == may
            if isinstance(result, Admitted):
                running.append(result)
                level -= prompt
                admitted += 1
    assert admitted > 200


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def longreach(capsys, tmp_path):
    """The command line on a server directory of its own: exit code, stdout, stderr."""

    def run(*words: str):
        code = main([*words, "--server", str(tmp_path / "server")])
        return code, *capsys.readouterr()

    return run


def test_keys_are_made_listed_topped_up_and_revoked_from_the_command_line(longreach, tmp_path):
    code, out, err = longreach(
        "keys", "add", "laptop", "--concurrency", "4", "--balance", "5", "--models", "small", "auto"
    )
    assert code == 0 and "shown once" in err
    secret = out.strip()
    assert re.fullmatch(r"sk-lr-[0-9A-Za-z]{43}", secret)
    assert longreach("keys", "add", "ci", "--budget-month", "2.50", "--tokens-per-minute", "1000")[0] == 0
    code, out, _ = longreach("keys", "topup", "laptop", "1.25")
    assert (code, out) == (0, "'laptop' has 6.25 USD now\n")
    code, out, _ = longreach("keys", "list")
    assert code == 0 and "laptop" in out and "2.50" in out and "6.25" in out and secret not in out
    listed = json.loads(longreach("keys", "list", "--json")[1])
    assert [(key["name"], key["balance"], key["budget_month"]) for key in listed["keys"]] == [
        ("laptop", "6.25", None), ("ci", None, "2.50"),
    ]  # fmt: skip
    assert listed["keys"][0]["models"] == ["small", "auto"]
    assert longreach("keys", "revoke", "laptop")[0] == 0
    assert "laptop" not in longreach("keys", "list")[1]
    assert "laptop" in longreach("keys", "list", "--all")[1]
    with open_database(tmp_path / "server") as database:
        assert KeyStore(database).lookup(secret) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "x", "--balance", "five"), "--balance 'five' is no amount of money"),
        (("add", "x", "--budget-month", "-1"), "--budget-month"),
        (("add", "two words"), "key name 'two words' is not allowed"),
        (("add", "x", "--concurrency", "0"), "--concurrency 0 is no limit"),
        (("add", "x", "--currency", "dollars"), "--currency 'dollars' is not three capital letters"),
        (("list",), "does not exist"),
        (("revoke", "x"), "does not exist"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_in_one_line(longreach, words, said):
    code, out, err = longreach("keys", *words)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1


def test_a_ledger_is_kept_in_one_currency(longreach):
    assert longreach("keys", "add", "a", "--currency", "CNY")[0] == 0
    code, _, err = longreach("keys", "add", "b", "--currency", "USD")
    assert code == 2 and "is kept in CNY, not USD" in err


def test_a_list_without_keys_says_how_to_make_one(longreach, tmp_path):
    open_database(tmp_path / "server").close()
    assert "longreach keys add NAME" in longreach("keys", "list")[1]


def test_a_key_file_damaged_by_hand_is_one_line_and_no_traceback(longreach, tmp_path):
    longreach("keys", "add", "a")
    with sqlite3.connect(tmp_path / "server" / FILE_NAME) as connection:
        connection.execute("DELETE FROM longreach_meta WHERE name = 'version'")
    code, _, err = longreach("keys", "list")
    assert code == 2 and "is damaged" in err and err.count("\n") == 1
