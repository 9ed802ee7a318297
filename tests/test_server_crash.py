"""A server that is killed under load: the ledger has every answer that a client saw the end of exactly once, and the next
start is clean."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ServerProcess, make_tokenizer, save_run, wait_until

NO_END = {str(make_tokenizer().eos_id): -100}
PROMPTS = [f"def f{i}(a, b):\n    return a + b\n" * 12 for i in range(6)]
"""Each longer than a block, so that the disk cache keeps them."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The ledger, read past the server."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("SELECT * FROM longreach_requests")]
    finally:
        connection.close()


class Load:
    """Clients that ask again and again until the server is gone.

    Attributes:
        completed: by id, tokens of the answers whose end was seen.
        begun: ids of all that were seen at all.
    """

    def __init__(self, url: str, clients: int, seed: int) -> None:
        self.url, self.is_over = url, False
        self.completed: dict[str, int] = {}
        self.begun: set[str] = set()
        self.answers: dict[int, str] = {}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(seed * 100 + i,), daemon=True) for i in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        r = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.is_over:
                try:
                    (self._stream if r.random() < 0.6 else self._whole)(client, r)
                except (httpx.HTTPError, ValueError):
                    return  # the server is gone

    def _body(self, r: random.Random) -> dict[str, Any]:
        which = r.randrange(len(PROMPTS))
        return {
            "model": "model", "prompt": PROMPTS[which], "max_tokens": r.choice([1, 4, 16, 60]), "seed": 1, "temperature": 0,
            "logit_bias": NO_END,
        }  # fmt: skip

    def _whole(self, client: httpx.Client, r: random.Random) -> None:
        response = client.post("/v1/completions", json=self._body(r))
        body = response.json()
        with self._lock:
            self.begun.add(response.headers["x-request-id"])
            self.completed[body["id"].removeprefix("cmpl-")] = body["usage"]["completion_tokens"]

    def _stream(self, client: httpx.Client, r: random.Random) -> None:
        sent = self._body(r) | {"stream": True, "stream_options": {"include_usage": True}}
        last: dict[str, Any] = {}
        with client.stream("POST", "/v1/completions", json=sent) as response:
            with self._lock:
                self.begun.add(response.headers["x-request-id"])
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    with self._lock:
                        self.completed[last["id"].removeprefix("cmpl-")] = last["usage"]["completion_tokens"]
                elif line.startswith("data:"):
                    last = json.loads(line[5:])

    def stop(self) -> None:
        self.is_over = True
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"


def answer(url: str, which: int) -> tuple[str, int]:
    """The first tokens after a prompt, and how much of it came from the cache."""
    sent = {
        "model": "model", "prompt": PROMPTS[which], "max_tokens": 12, "seed": 1, "temperature": 0, "logit_bias": NO_END,
    }  # fmt: skip
    body = httpx.post(url + "/v1/completions", json=sent, timeout=60).json()
    return body["choices"][0]["text"], body["usage"]["prompt_cache_hit_tokens"]


def kill_again_and_again(tmp_path: Path, times: int) -> None:
    run = save_run(tmp_path)
    folder = tmp_path / "server"
    # Invariant, so that an answer that goes on from the disk cache must be the same to the last token.
    options = (
        run, "--port", 0, "--server", folder, "--disk-cache", tmp_path / "cache", "--max-running", 4, "--memory-gib", 0.05,
        "--arithmetic", "invariant",
    )  # fmt: skip
    completed: dict[str, int] = {}
    begun: set[str] = set()
    expected: dict[int, str] = {}
    lost = hits = 0
    for start_number in range(times + 1):
        with ServerProcess(*options) as server:
            # The start says how many it found, and nothing else that would trouble anybody.
            said = server.text.splitlines()
            if start_number:
                assert sum("marked lost" in line for line in said) in (0, 1, 2)
            for word in ("Traceback", "ERROR", "error", "damaged", "cannot"):
                assert word not in server.text, server.text
            running = [row for row in rows_of(folder) if row["status"] == "running"]
            assert not running, f"{len(running)} rows of a dead server are still running"
            for which in range(len(PROMPTS)):
                text, hit = answer(server.url, which)
                assert expected.setdefault(which, text) == text, f"prompt {which} is answered otherwise after a crash"
                hits += hit
            if start_number == times:
                assert server.stop() == 0
                break
            load = Load(server.url, 8, start_number)
            wait_until(lambda load=load: len(load.completed) > 10, 60)
            time.sleep(random.Random(start_number).uniform(0, 0.4))
            server.kill()
            load.stop()
            completed |= load.completed
            begun |= load.begun
            lost += sum(row["status"] == "running" for row in rows_of(folder))
    rows = {row["id"]: row for row in rows_of(folder)}
    statuses = Counter(row["status"] for row in rows.values())
    assert len(rows) == len(rows_of(folder)), "a request stands twice"
    for id, tokens in completed.items():
        assert rows[id]["status"] == "completed", f"{id} was seen to end and is {rows[id]['status']}"
        assert rows[id]["completion_tokens"] == tokens
    assert begun <= set(rows), "a request that was answered is not there"
    assert statuses["running"] == 0
    assert statuses["lost"] == lost > 0
    assert not any(row["amount"] for row in rows.values() if row["status"] == "lost")
    assert hits > 0, "nothing came from the disk cache"
    assert sum(row["amount"] for row in rows.values()) == spent(folder)
    print(f"{times} kills: {dict(statuses)}, {len(completed)} seen to end, {hits} tokens from the cache after a crash")


def spent(folder: Path) -> int:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    try:
        return connection.execute("SELECT coalesce(sum(amount), 0) FROM longreach_spending").fetchone()[0]
    finally:
        connection.close()


def test_a_killed_server_has_every_finished_request_in_its_ledger_once_and_starts_again(tmp_path):
    kill_again_and_again(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_under_load_lose_and_double_nothing(tmp_path):
    kill_again_and_again(tmp_path, 20)
