"""The command `longreach serve`, in a process of its own: what it says, what it refuses, how it stops and starts again."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ServerProcess, make_tokenizer, save_run, wait_until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "server"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The ledger, read past the server."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("SELECT * FROM longreach_requests ORDER BY started_ms")]
    finally:
        connection.close()


NO_END = {str(make_tokenizer().eos_id): -100}


def body(prompt: str = "def add(a, b):", tokens: int = 8, **more: Any) -> dict[str, Any]:
    """A completion that goes on to its last token."""
    return {"model": "model", "prompt": prompt, "max_tokens": tokens, "logit_bias": NO_END, "seed": 1} | more


LONG = "def add(a, b):\n    return a + b\n" * 40
"""Several blocks of tokens."""


class Background:
    """A streamed request in a thread."""

    def __init__(self, url: str, sent: dict[str, Any]) -> None:
        self.status, self.lines, self.error = 0, [], None
        self._thread = threading.Thread(target=self._run, args=(url, sent), daemon=True)
        self._thread.start()

    def _run(self, url: str, sent: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url + "/v1/completions", json=sent | {"stream": True}, timeout=60) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        self.lines.append(line)
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    @property
    def reason(self) -> str | None:
        """Of the last chunk that has one."""
        found = [json.loads(line[5:])["choices"] for line in self.lines if line != "data: [DONE]"]
        return next((c[0]["finish_reason"] for c in reversed(found) if c and c[0]["finish_reason"]), None)


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_the_greeting_has_a_line_to_copy_for_every_client_and_they_work(run, folder):
    with ServerProcess(run, "--port", 0, "--server", folder) as server:
        for client in ("page", "OpenAI SDK", "Anthropic SDK", "Claude Code", "Codex", "Open WebUI", "curl"):
            assert any(line.startswith(client) and server.url in line for line in server.lines), client
        found = re.search(r"-d '(\{.*\})'", server.text)
        assert found is not None
        answer = httpx.post(server.url + "/v1/chat/completions", json=json.loads(found[1]), timeout=60)
        assert answer.status_code == 200
        assert httpx.get(server.url + "/").status_code == 200
        names = re.search(r"^names +(.*)$", server.text, re.MULTILINE)
        listed = [entry["id"] for entry in httpx.get(server.url + "/v1/models").json()["data"]]
        assert names is not None
        assert names[1].split(", ") == listed
        assert server.stop() == 0
        assert "Traceback" not in server.text


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no model to serve"),
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "RUN"], "two models are named"),
        (["auto=RUN"], "router's name"),
        (["RUN", "--port", "70000"], "from 0 to 65535"),
        (["RUN", "--drain-s", "-1"], "--drain-s"),
        (["RUN", "--alias", "x"], "NAME=VALUE"),
        (["RUN", "--alias", "x=y"], "no model 'y'"),
        (["RUN", "--prices", "nowhere.json"], "nowhere.json"),
        (["RUN", "--memory-gib", "0.000001"], "memory_gib"),
        (["RUN", "--upstream-key", "z=HOME"], "'z'"),
        (["RUN", "--effort-texts", "loud"], "loud"),
        (["RUN", "--host", "0.0.0.0"], "no keys"),
        (["RUN", "--host", "::"], "no keys"),
        (["RUN", "--host", "no.such.host.invalid"], "no keys"),
        (["RUN", "--disk-cache", "FILE/x"], "cannot be"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line_and_status_2(
    run, folder, tmp_path, longreach_command, arguments, expected
):
    (tmp_path / "FILE").touch()
    given = [a.replace("RUN", str(run)).replace("FILE", str(tmp_path / "FILE")) for a in arguments]
    answer = longreach_command("serve", *given, "--server", folder, *([] if "--port" in given else ["--port", 0]))
    assert answer.code == 2
    assert answer.out == ""
    said = [line for line in answer.err.splitlines() if line.startswith("longreach")]
    assert said == answer.err.splitlines()[-1:]
    assert expected in said[0]


def test_a_port_in_use_is_one_line_before_any_model_is_read(run, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with ServerProcess(run, "--port", port, "--server", folder, wait=False) as server:
            assert server.wait(60) == 2
            assert f"127.0.0.1:{port}" in server.lines[-1]
            assert "--port" in server.lines[-1]
            assert "device" not in server.text


def test_with_a_key_it_listens_for_others_and_answers_nobody_without_one(run, folder, longreach_command):
    made = longreach_command("keys", "add", "laptop", "--server", folder)
    assert made.code == 0
    found = re.search(r"sk-lr-\w+", made.out)
    assert found is not None
    with ServerProcess(run, "--host", "0.0.0.0", "--port", 0, "--server", folder) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert httpx.get(url + "/v1/models").status_code == 401
        answer = httpx.get(url + "/v1/models", headers={"Authorization": f"Bearer {found[0]}"})
        assert answer.status_code == 200
        assert found[0] not in server.text
        # Somebody revokes the last key while it runs: it must not become a server that needs none.
        assert longreach_command("keys", "revoke", "laptop", "--server", folder).code == 0
        headers = {"Authorization": f"Bearer {found[0]}"}
        wait_until(lambda: httpx.get(url + "/v1/models", headers=headers).status_code == 401)
        assert httpx.get(url + "/v1/models").status_code == 401
        assert server.stop() == 0


# ---- how it stops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_finishes_what_runs_and_sends_new_requests_away(run, folder, number):
    with ServerProcess(run, "--port", 0, "--server", folder, "--drain-s", 60) as server:
        running = [Background(server.url, body(f"def f{i}():", 600)) for i in range(3)]
        wait_until(lambda: all(len(r.lines) > 5 for r in running))
        server.signal(number)
        wait_until(lambda: httpx.get(server.url + "/ready").status_code == 503)
        refused = httpx.post(server.url + "/v1/completions", json=body())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "error" in refused.json()
        assert server.process.poll() is None
        for each in running:
            each.join()
            assert each.error is None
            assert each.lines[-1] == "data: [DONE]"
            assert each.reason == "length"
        assert server.wait() == 0
        assert "Traceback" not in server.text
    rows = rows_of(folder)
    assert [row["status"] for row in rows] == ["completed"] * 3
    assert not any(row["reserved"] and row["status"] == "running" for row in rows)


def test_what_does_not_finish_in_time_ends_properly_and_a_restart_goes_on_from_the_disk_cache(run, folder, tmp_path):
    options = (
        "--port",
        0,
        "--server",
        folder,
        "--disk-cache",
        tmp_path / "cache",
        "--drain-s",
        0.3,
        "--max-running",
        2,
    )
    with ServerProcess(run, *options) as server:
        running = [Background(server.url, body(LONG + f"def f{i}():", 3000)) for i in range(2)]
        wait_until(lambda: all(len(r.lines) > 5 for r in running))
        waiting = Background(server.url, body(LONG + "waits", 3000))
        wait_until(lambda: httpx.get(server.url + "/status").json()["models"][0]["waiting"] == 1)
        began = time.monotonic()
        server.signal()
        for each in running:
            each.join()
            assert each.error is None
            assert each.lines[-1] == "data: [DONE]"
            assert each.reason == "insufficient_system_resource"
        waiting.join()
        assert waiting.status == 503 or "stopping" in waiting.lines[-1]
        assert server.wait() == 0
        assert time.monotonic() - began < 10
        assert "Traceback" not in server.text
    rows = rows_of(folder)
    assert sorted(row["status"] for row in rows) == ["completed", "completed", "failed"]
    assert all(row["completion_tokens"] > 5 and row["amount"] > 0 for row in rows if row["status"] == "completed")
    with ServerProcess(run, *options) as server:
        again = httpx.post(server.url + "/v1/completions", json=body(LONG + "def f0():"), timeout=60).json()
        assert again["usage"]["prompt_cache_hit_tokens"] >= again["usage"]["prompt_tokens"] - 1
        assert "lost" not in server.text
        assert server.stop() == 0


def test_a_second_interrupt_stops_at_once(run, folder):
    with ServerProcess(run, "--port", 0, "--server", folder, "--drain-s", 600) as server:
        running = Background(server.url, body(tokens=3500))
        wait_until(lambda: len(running.lines) > 5)
        began = time.monotonic()
        server.signal(signal.SIGINT)
        time.sleep(0.5)
        server.signal(signal.SIGINT)
        server.wait(20)
        assert time.monotonic() - began < 15
        assert "Traceback" not in server.text
        running.join()
    assert [row["status"] for row in rows_of(folder)] != ["running"]


# ---- what it writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [(), ("--log-prompts",)])
def test_prompts_are_in_the_log_only_when_asked_for(run, folder, option):
    with ServerProcess(run, "--port", 0, "--server", folder, *option) as server:
        sent = {"model": "model", "messages": [{"role": "user", "content": "xyzzy-secret"}], "max_tokens": 4}
        for path in ("/v1/chat/completions", "/anthropic/v1/messages"):
            assert httpx.post(server.url + path, json=sent, timeout=60).status_code == 200
        assert httpx.post(server.url + "/v1/chat/completions", json=sent | {"temperature": 9}).status_code == 400
        assert httpx.post(server.url + "/v1/chat/completions", content=b'{"xyzzy-secret').status_code == 400
        assert server.stop() == 0
        assert ("xyzzy-secret" in server.text) == bool(option)
