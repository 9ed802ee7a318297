"""What one key can learn of another: nothing. Caches, timing, ledger, names and errors, and the log."""

from __future__ import annotations

import concurrent.futures
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import LiveServer, ScriptedModel, live_server, make_engine, make_tokenizer, wait_until

from longreach.chat.messages import Conversation
from longreach.server.models import Prepared
from longreach.server.service import ServiceOptions

TOKENIZER = make_tokenizer()
NO_END = {str(token): -100 for token in TOKENIZER.special_ids.values()}
LONG = "".join(f"def f{i}(a, b):\n    return a + b * {i}\n" for i in range(60))
"""Several blocks of tokens, no two alike."""
KEYS = ({"name": "a"}, {"name": "b"}, {"name": "small-only", "models": ["tiny"]}, {"name": "poor", "balance": 0})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tiny = ScriptedModel("tiny", make_engine(TOKENIZER, 1, memory_gib=0.006))
    hidden = ScriptedModel("hidden-model", make_engine(TOKENIZER, 2, memory_gib=0.006))
    with live_server(tmp_path_factory.mktemp("server"), tiny, hidden, keys=KEYS) as live:
        yield live


class Client:
    """One key."""

    def __init__(self, server: LiveServer, number: int) -> None:
        self.server, self.headers = server, {"Authorization": f"Bearer {server.secrets[number]}"}
        self.http = httpx.Client(base_url=server.url, headers=self.headers, timeout=60)

    def ask(self, prompt: str, **more: Any) -> httpx.Response:
        sent = {
            "model": "tiny", "prompt": prompt, "max_tokens": 2, "seed": 1, "temperature": 0, "logit_bias": NO_END,
        }  # fmt: skip
        return self.http.post("/v1/completions", json=sent | more)

    def hits(self, prompt: str, **more: Any) -> int:
        return self.ask(prompt, **more).json()["usage"]["prompt_cache_hit_tokens"]


@pytest.fixture
def a(server: LiveServer) -> Client:
    return Client(server, 0)


@pytest.fixture
def b(server: LiveServer) -> Client:
    return Client(server, 1)


# ---- caches ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_one_key_has_in_the_cache_is_new_to_another(a, b):
    prompt = "own " + LONG
    a.hits(prompt)
    assert a.hits(prompt) > 500
    assert b.hits(prompt) == 0
    assert b.hits(prompt) > 500  # now it has its own


def test_a_prompt_that_one_user_has_in_the_cache_is_new_to_another_of_the_same_key(a):
    prompt = "user " + LONG
    a.hits(prompt, user_id="one")
    assert a.hits(prompt, user_id="one") > 500
    assert a.hits(prompt, user_id="two") == 0
    assert a.hits(prompt) == 0


def test_no_name_of_a_user_reaches_another_keys_cache(a, b, server):
    prompt = "names " + LONG
    a.hits(prompt, user_id="one")
    key = server.service.authenticate(httpx.Headers(a.headers)).id
    for name in ("one", f"{key}/one", f"../{key}/one", f"{key}", f"\0{key}/one", "one\0", " one", "one/"):
        assert b.hits(prompt, user_id=name) == 0, name
        assert name == "one" or a.hits(prompt, user_id=name) == 0, name


def test_two_keys_share_no_page_and_no_state_of_the_same_text(a, b, server):
    prompt = "pages " + LONG
    for client in (a, b):
        client.hits(prompt)
    index = server.model.engine.memory.index
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    paths = []
    for client in (a, b):
        key = server.service.authenticate(httpx.Headers(client.headers)).id
        paths.append(index.match(f"{key}/", tokens).node.path())
    first, second = ({node.page for node in path} for path in paths)
    assert len(first) == len(second) > 3
    assert not first & second
    assert not {node.digest for node in paths[0]} & {node.digest for node in paths[1]}


def test_the_time_of_an_answer_tells_a_key_of_its_own_cache_and_of_no_other(a, b):
    """The owner's hits are far faster than the other's first look, which is as slow as for a text that nobody has sent."""
    owned, others, unknown = [], [], []
    for i in range(5):
        prompt = f"time {i} " + LONG
        a.ask(prompt)
        for times, client, text in ((owned, a, prompt), (others, b, prompt), (unknown, b, f"never {i} " + LONG)):
            began = time.perf_counter()
            assert client.ask(text, max_tokens=1).status_code == 200
            times.append(time.perf_counter() - began)
    owned_s, others_s, unknown_s = (statistics.median(times) for times in (owned, others, unknown))
    assert owned_s < 0.5 * others_s
    assert others_s > 0.6 * unknown_s


def test_a_key_that_floods_the_cache_makes_another_slower_and_nothing_else(a, b, server):
    prompt = "flood " + LONG
    expected = a.ask(prompt, max_tokens=12).json()["choices"][0]["text"]
    capacity = server.model.engine.memory.capacity
    before = server.model.engine.memory.index.evicted_pages
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        flood = [pool.submit(b.ask, f"{i} " + LONG) for i in range(2 * capacity // len(TOKENIZER.encode(LONG)))]
        during = [a.ask(prompt, max_tokens=12) for _ in range(3)]
        assert all(future.result().status_code == 200 for future in flood)
    assert server.model.engine.memory.index.evicted_pages > before
    for answer in (*during, a.ask(prompt, max_tokens=12)):
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"] == expected


def test_tenants_that_come_once_leave_nothing_in_the_index(a, server):
    for i in range(50):
        a.ask("x", user_id=f"once-{i}")
    for i in range(3):
        a.ask(f"{i} " + LONG, user_id="evicts the others")
    index = server.model.engine.memory.index
    index.limit, kept = 0, index.limit
    try:
        # Without room for states, a short text leaves nothing at all.
        for i in range(50):
            a.ask("x", user_id=f"twice-{i}")
        assert not [name for name in index.roots if "twice" in name]
    finally:
        index.limit = kept


# ---- ledger, money, names -------------------------------------------------------------------------------------------


def test_balance_and_budget_of_a_key_are_its_own(server):
    poor, rich = Client(server, 3), Client(server, 0)
    assert poor.ask("def").status_code == 402
    assert rich.ask("def", model="deepseek-v4-flash").status_code == 200
    for client, is_prepaid in ((poor, True), (rich, False)):
        balance = client.http.get("/user/balance").json()
        assert balance["is_available"] == (not is_prepaid)
        assert balance["balance_infos"][0]["total_balance"] == "0.00"


def test_a_model_that_a_key_may_not_use_is_not_named_to_it(server):
    limited = Client(server, 2)
    seen = [
        limited.ask("x", model="hidden-model"), limited.ask("x", model="deepseek-v4-pro"), limited.ask("x", model="auto"),
        limited.ask("x", model="nothing"), limited.http.get("/v1/models"), limited.http.get("/v1/models/hidden-model"),
        limited.http.get("/v1/models/tiny"), limited.http.get("/v1/models/deepseek-v4-pro"), limited.http.get("/v1/prices"),
        limited.http.get("/status"), limited.http.post("/tokenize", json={"content": "x", "model": "hidden-model"}),
        limited.http.post("/v1/messages", json={"model": "hidden-model", "max_tokens": 1, "messages": []}),
        limited.http.post("/v1/messages/count_tokens", json={"model": "x", "messages": [{"role": "user", "content": "x"}]}),
        limited.http.post("/v1/responses", json={"model": "hidden-model", "input": "x", "max_output_tokens": 1}),
    ]  # fmt: skip
    asked = ("hidden-model", "deepseek-v4-pro", "auto")
    for response in seen:
        # What was asked for is repeated; what was not is not told.
        text = response.text.replace("but you passed hidden-model", "").replace("/models/hidden-model", "")
        told = [name for name in asked if name in text and f"passed {name}" not in text]
        told = [
            name for name in told if f"model {name} does not exist" not in text and f"/{name}" not in response.url.path
        ]
        assert not told, (response.url, text)
    assert [entry["id"] for entry in seen[4].json()["data"]] == ["tiny"]
    assert seen[5].status_code == 404
    assert seen[6].json()["longreach"]["aliases"] == []
    assert [m["id"] for m in seen[9].json()["models"]] == ["tiny"]


def test_no_route_tells_anything_to_somebody_without_a_key(server):
    for path in ("/v1/models", "/v1/models/tiny", "/user/balance", "/v1/prices", "/status", "/metrics"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 401, path
        assert "tiny" not in answer.text
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    ):
        for headers in ({}, {"Authorization": "Bearer sk-lr-" + "0" * 43}, {"x-api-key": "' OR 1=1 --"}):
            answer = httpx.post(server.url + path, json={}, headers=headers)
            assert answer.status_code == 401, path
            assert "0000" not in answer.text
    for path in ("/tokenize", "/detokenize", "/apply-template"):
        assert httpx.post(server.url + path, json={"content": "x"}).status_code == 401
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


# ---- errors and logs ------------------------------------------------------------------------------------------------


def test_a_bug_in_one_answer_ends_that_one_alone_and_tells_its_client_nothing(a, b, server, monkeypatch, caplog):
    """A parser that raises on one request's tokens: the others, which are computed in the same passes, go on."""
    monkeypatch.setattr(logging.getLogger("longreach"), "propagate", True)
    make = server.model._reader

    def make_broken(prepared: Prepared, *rest: Any) -> Any:
        reader, told = make(prepared, *rest), prepared.call.input
        if isinstance(told, Conversation) and told.tools:
            read, count = reader._read, iter(range(9))

            def fail(token_id: int) -> None:
                # Not at the first token: that comes from a pass of its own, the later ones from passes with the others.
                if next(count) == 8:
                    raise KeyError("secret/path/inside")
                read(token_id)

            reader._read = fail
        return reader

    monkeypatch.setattr(server.model, "_reader", make_broken)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    sent = {
        "model": "tiny", "messages": [{"role": "user", "content": "Look"}], "max_tokens": 40, "logit_bias": NO_END,
        "thinking": {"type": "disabled"},
    }  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        long = sent | {"max_tokens": 600}
        good = [pool.submit(b.http.post, "/v1/chat/completions", json=long) for _ in range(2)]
        wait_until(lambda: server.running == 2)
        bad = a.http.post("/v1/chat/completions", json=sent | {"tools": [tool]})
        assert bad.status_code == 500
        assert set(bad.json()["error"]) == {"message", "type", "param", "code"}
        begun = a.http.post("/v1/chat/completions", json=sent | {"tools": [tool], "stream": True})
        assert "could not finish this request" in begun.text
        assert "[DONE]" not in begun.text
        assert "secret" not in bad.text + begun.text
        assert server.running == 2  # so they were computed together
        assert [future.result().status_code for future in good] == [200, 200]
    assert all(future.result().json()["usage"]["completion_tokens"] == 600 for future in good)
    assert not server.model.loop.failed
    assert "secret/path/inside" in caplog.text  # for whoever runs the server


def test_an_engine_that_fails_is_told_as_such_and_nobody_waits_for_ever(tmp_path):
    model = ScriptedModel("tiny", make_engine(TOKENIZER))
    with live_server(tmp_path, model) as live:
        sent = {"model": "tiny", "prompt": "def", "max_tokens": 3000, "logit_bias": NO_END}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(httpx.post, live.url + "/v1/completions", json=sent, timeout=30) for _ in range(4)]
            wait_until(lambda: live.running == 4)

            def explode(*_: Any) -> None:
                raise ZeroDivisionError("/secret/path")

            model.engine.scheduler.schedule = explode
            for future in running:
                answer = future.result()
                assert answer.status_code == 500
                assert "secret" not in answer.text
        after = httpx.post(live.url + "/v1/completions", json=sent)
        assert after.status_code == 503
        assert httpx.get(live.url + "/health").status_code == 500
        assert httpx.get(live.url + "/ready").status_code == 503
        assert {row.status for row in live.rows()} == {"failed"}


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_no_word_of_a_prompt_unless_asked_to(tmp_path, caplog, monkeypatch, log_prompts):
    monkeypatch.setattr(logging.getLogger("longreach"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    model = ScriptedModel("tiny", make_engine(TOKENIZER))
    with live_server(tmp_path, model, options=ServiceOptions(log_prompts=log_prompts)) as live:
        http = httpx.Client(base_url=live.url, timeout=60)
        message = {"role": "user", "content": "xyzzy plugh"}
        for path in ("/v1/chat/completions", "/v1/messages"):
            for more in ({}, {"stream": True}, {"temperature": 99}, {"max_tokens": "xyzzy"}, {"tools": "xyzzy"}):
                http.post(path, json={"model": "tiny", "messages": [message], "max_tokens": 2} | more)
        http.post("/v1/responses", json={"model": "tiny", "input": "xyzzy", "max_output_tokens": 2})
        http.post("/v1/completions", json={"model": "tiny", "prompt": "xyzzy " * 5000, "max_tokens": 2})
        http.post("/v1/completions", content=b'{"prompt": "xyzzy"')
        http.get("/v1/models/xyzzy")
        with http.stream(
            "POST", "/v1/completions", json={"model": "tiny", "prompt": "xyzzy", "stream": True}
        ) as stream:
            next(stream.iter_bytes())  # and leaves
        wait_until(lambda: not live.running)
        records = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "asyncio"))]
        said = "\n".join(f"{r.name} {r.getMessage()} {r.exc_text or ''}" for r in records)
    assert ("xyzzy" in said) == log_prompts
    assert "Exception" not in said


def test_an_error_of_the_server_shows_no_path_and_no_prompt(a, server, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/home/someone/secret.py: the prompt was xyzzy")

    monkeypatch.setattr(server.service, "open", broken)
    quiet = httpx.Client(base_url=server.url, headers=a.headers)
    for path, sent in (
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "xyzzy"}]}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "xyzzy"}]}),
    ):
        answer = quiet.post(path, json=sent)
        assert answer.status_code == 500
        assert "xyzzy" not in answer.text
        assert "home" not in answer.text
        assert answer.json()["error"]["message"] == "The server failed to answer this request."
        assert ("type" in answer.json()) == ("messages" in path)


def test_the_ledger_of_a_directory_is_for_its_owner_alone(server, tmp_path_factory):
    where = Path(server.service.ledger.database.where)
    assert where.stat().st_mode & 0o077 == 0
