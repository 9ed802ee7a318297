"""The server and the network: who may call, how long a body may take, clients that leave at every stage or never read,
many at once, and that nobody's request is lost or counted twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import LiveServer, ScriptedModel, live_server, make_engine, make_tokenizer, wait_until

from longreach.server import replies
from longreach.server.app import AppOptions
from longreach.server.service import ServiceOptions

TOKENIZER = make_tokenizer()
NO_END = {str(TOKENIZER.eos_id): -100}
PREFIXES = ("", "/v1", "/beta", "/anthropic", "/anthropic/v1", "/beta/v1")
PAUSE_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = ScriptedModel("tiny", make_engine(TOKENIZER, memory_gib=0.05))
    options = AppOptions(("https://allowed.example",), max_body_bytes=1 << 20, body_pause_s=PAUSE_S, body_s=4 * PAUSE_S)
    keys = ({"name": "a", "concurrency": 8},)
    with live_server(tmp_path_factory.mktemp("server"), model, app=options, keys=keys) as live:
        yield live


def auth(server: LiveServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.secrets[0]}"}


def body(tokens: int = 4, prompt: str = "def", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "logit_bias": NO_END} | more


def raw_request(server: LiveServer, sent: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(sent).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.secrets[0]}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


@contextlib.contextmanager
def connection(server: LiveServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as made:
        yield made


def read_until(peer: socket.socket, mark: bytes, limit: int = 1 << 20) -> bytes:
    """What comes up to a mark, or up to the end."""
    got = b""
    while mark not in got and len(got) < limit:
        part = peer.recv(65536)
        if not part:
            break
        got += part
    return got


def check_idle(server: LiveServer) -> None:
    """Nothing runs, no slot is taken, no row is open."""
    key, service = server.service.authenticate(httpx.Headers(auth(server))), server.service
    wait_until(lambda: not (server.running or service.exchanges or service.limiter.running(key)), 20)
    wait_until(lambda: all(row.status != "running" for row in server.rows()), 10)


def check_works(server: LiveServer) -> None:
    answer = httpx.post(server.url + "/v1/completions", json=body(), headers=auth(server), timeout=20)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4


def check_shape(path: str, answer: httpx.Response) -> None:
    error = answer.json()["error"]
    assert error["message"]
    if "/messages" in path or path.startswith("/anthropic"):
        assert answer.json()["type"] == "error"
        assert error["type"].endswith(("_error", "_large"))
    else:
        assert set(error) == {"message", "type", "param", "code"}


# ---- who may call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_page_of_another_origin_may_not_call_unless_it_was_allowed(server, path):
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"https://127.0.0.1:{server.port}.evil.example",
    ):
        for method in ("POST", "OPTIONS"):
            answer = httpx.request(method, server.url + path, headers=auth(server) | {"Origin": origin}, json={})
            assert answer.status_code == 403, origin
            check_shape(path, answer)
            assert "access-control-allow-origin" not in answer.headers
    own = httpx.post(server.url + path, headers=auth(server) | {"Origin": server.url}, json={})
    assert own.status_code == 400


def test_an_allowed_origin_gets_its_preflight_and_the_headers_to_read_the_answer(server):
    origin = {"Origin": "https://allowed.example"}
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-lang",
    }
    preflight = httpx.options(server.url + "/v1/completions", headers=origin | asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://allowed.example"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
    answer = httpx.post(server.url + "/v1/completions", headers=auth(server) | origin, json=body())
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://allowed.example"
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", "0.0.0.0", "[", "a b"]
)
def test_a_foreign_name_pointed_at_this_machine_reaches_nothing(server, host):
    for path in ("/v1/models", "/v1/messages", "/"):
        answer = httpx.get(server.url + path, headers=auth(server) | {"Host": host})
        assert answer.status_code == 421, host
        check_shape(path, answer)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_unknown_paths_and_methods_are_refused_in_the_dialect_of_their_prefix(server, prefix):
    for path in (
        prefix + "/nothing",
        prefix + "/chat",
        prefix + "/messages/x",
        prefix + "/%00%ff",
        prefix + "/" + "x" * 3000,
    ):
        for method in ("GET", "POST", "DELETE", "OPTIONS", "PATCH"):
            answer = httpx.request(method, server.url + path, headers=auth(server))
            assert answer.status_code in (404, 405), path
            check_shape(path, answer)
    known = prefix + ("/messages" if "anthropic" in prefix else "/models")
    for method in ("DELETE", "PUT", "PATCH", "OPTIONS"):
        answer = httpx.request(method, server.url + known, headers=auth(server))
        assert answer.status_code == 405
        assert answer.headers["allow"]
        check_shape(known, answer)
    head = httpx.head(server.url + prefix + "/nothing")
    assert head.status_code in (404, 405)
    assert head.content == b""


def test_files_beside_the_page_cannot_be_read(server):
    for path in (
        "/web/../serve.py",
        "/web/%2e%2e/serve.py",
        "/web/..%2fserve.py",
        "/web/%00",
        "/web/",
        "/web/a%00b.js",
        "/web//etc/passwd",
    ):
        with connection(server) as peer:
            peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = read_until(peer, b"\0\0\0")
        assert answer.startswith(b"HTTP/1.1 404"), (path, answer[:200])
        assert b"import" not in answer


def test_what_is_no_http_is_refused_and_closes_its_connection_alone(server):
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\0c\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\r\n" * 1000, b"G" * 200_000,
    ):  # fmt: skip
        with connection(server) as peer:
            peer.settimeout(3)
            with contextlib.suppress(OSError):
                peer.sendall(sent)
                peer.shutdown(socket.SHUT_WR)
                read_until(peer, b"\0\0\0")
    check_works(server)


# ---- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("kind", ["stated", "chunked"])
def test_a_body_beyond_the_limit_is_refused_however_it_comes(server, path, kind):
    content = b"x" * (2 << 20)
    sent: Any = content if kind == "stated" else (content[i : i + 65536] for i in range(0, len(content), 65536))
    answer = httpx.post(server.url + path, content=sent, headers=auth(server))
    assert answer.status_code == 413
    check_shape(path, answer)
    check_works(server)


def test_a_body_that_stops_coming_is_given_up_and_holds_up_nobody(server):
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connection(server)) for _ in range(20)]
        for peer in peers:
            peer.sendall(raw_request(server, body())[:-5])
        check_works(server)
        for peer in peers:
            assert read_until(peer, b"\0\0\0").startswith(b"HTTP/1.1 408")  # and the connection is closed
    assert PAUSE_S * 0.9 < time.monotonic() - started < PAUSE_S + 5
    check_idle(server)


def test_a_body_that_comes_a_byte_at_a_time_is_given_up_as_well(server):
    with connection(server) as peer:
        request = raw_request(server, body(prompt="x" * 500))
        peer.sendall(request[:-400])
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for i in range(len(request) - 400, len(request)):
                peer.sendall(request[i : i + 1])
                time.sleep(PAUSE_S / 10)
                if time.monotonic() - began > 5 * PAUSE_S:
                    break
        with contextlib.suppress(OSError):
            assert read_until(peer, b"\0\0\0").startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 8 * PAUSE_S
    check_idle(server)


def test_a_long_body_of_small_parts_stops_nobody_elses_stream(tmp_path):
    """Half a million empty messages take seconds to read; streams go on meanwhile, a little slower."""
    model = ScriptedModel("tiny", make_engine(TOKENIZER))
    with live_server(tmp_path, model) as live, concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = {"model": "tiny", "messages": [{"role": "user", "content": ""}] * 400_000}
        content = json.dumps(sent).encode()
        longest, last, began, answer = 0.0, 0.0, 0.0, None
        with httpx.stream("POST", live.url + "/v1/completions", json=body(3500, stream=True), timeout=30) as stream:
            for _ in stream.iter_bytes():
                now = time.monotonic()
                if answer is None:
                    began = now
                    answer = pool.submit(httpx.post, live.url + "/v1/chat/completions", content=content, timeout=60)
                else:
                    longest = max(longest, now - last)
                last = now
                if answer.done():
                    break
        assert answer is not None
        assert answer.result().status_code == 400
        # Read in the event loop it would stand still for nearly all of that time, however slow the machine is.
        assert longest < 0.6 * (last - began), f"a stream stood still for {longest:.1f} of {last - began:.1f} s"


# ---- connections ----------------------------------------------------------------------------------------------------


def test_three_hundred_idle_connections_hold_up_nobody(server):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connection(server)) for _ in range(300)]
        for peer in peers[::2]:
            peer.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        check_works(server)
        assert httpx.get(server.url + "/health").status_code == 200
    check_idle(server)


def test_requests_that_are_sent_before_the_last_was_answered_are_answered_in_order(server):
    with connection(server) as peer:
        peer.sendall(b"".join(raw_request(server, body(count)) for count in (3, 1, 5)))
        got = b""
        while got.count(b'completion_tokens":') < 3:
            part = peer.recv(65536)
            assert part, "closed too early"
            got += part
        counts = [int(piece.split(b",")[0].split(b"}")[0]) for piece in got.split(b'completion_tokens":')[1:]]
    assert counts == [3, 1, 5]
    check_idle(server)


def test_a_client_that_ends_its_side_after_the_request_leaves_nothing_running(server):
    with connection(server) as peer:
        peer.sendall(raw_request(server, body(2000)))
        peer.shutdown(socket.SHUT_WR)
        read_until(peer, b"\0\0\0")
    check_idle(server)
    check_works(server)


STAGES = ["body", "queued", "prefill", "first token", "streaming", "whole"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_leaves_frees_what_it_had_whenever_it_leaves(server, stage, caplog, monkeypatch):
    monkeypatch.setattr(server.model, "delay_s", 0.0)
    before = {row.id for row in server.rows()}
    holders = []
    if stage == "queued":
        holders = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        for holder in holders:
            holder.sendall(raw_request(server, body(3500, stream=True)))
        wait_until(lambda: server.running == 4)
    with connection(server) as peer:
        if stage == "body":
            peer.sendall(raw_request(server, body(100))[:-3])
            time.sleep(0.1)
        elif stage == "prefill":
            peer.sendall(raw_request(server, body(100, "def add(a, b): " * 400, stream=True)))
            wait_until(lambda: server.running == 1)
        elif stage == "whole":
            peer.sendall(raw_request(server, body(3500)))
            wait_until(lambda: server.running == 1)
            time.sleep(0.8)  # the first blank line has been sent
        else:
            peer.sendall(raw_request(server, body(3500, stream=True)))
            if stage == "queued":
                wait_until(lambda: server.running == 5)
            else:
                read_until(peer, b"data:")
                if stage == "streaming":
                    for _ in range(20):
                        read_until(peer, b"data:")
    if stage == "queued":
        wait_until(lambda: server.running == 4)
    for holder in holders:
        holder.close()
    check_idle(server)
    rows = [row for row in server.rows() if row.id not in before]
    assert {row.status for row in rows} <= {"cancelled"}
    assert len(rows) == (0 if stage == "body" else 1 + len(holders))
    assert all(row.completion_tokens < 3500 for row in rows)
    assert "Exception in ASGI" not in caplog.text  # somebody who leaves is no error of the server
    check_works(server)


def test_a_client_that_never_reads_holds_up_nobody_and_is_given_up(server, monkeypatch):
    monkeypatch.setattr(replies, "UNREAD_LIMIT_S", 1.0)
    # Connections inherit small buffers, so that they are full long before the answer's end.
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    before = {row.id for row in server.rows()}
    peers = []
    for _ in range(3):
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", server.port))
        # Log-probabilities make each chunk a few kilobytes.
        peer.sendall(raw_request(server, body(400, stream=True, logprobs=20)))
        peers.append(peer)
    wait_until(lambda: server.running == 3)
    began = time.monotonic()
    check_works(server)
    assert time.monotonic() - began < 5
    wait_until(lambda: not server.running, 60)  # the engine waits for no client: what it made waits in memory
    check_idle(server)
    rows = [row for row in server.rows() if row.id not in before]
    assert Counter(row.status for row in rows) == {"cancelled": 3, "completed": 1}
    for peer in peers:
        peer.close()
    check_works(server)


# ---- load -----------------------------------------------------------------------------------------------------------


def test_of_sixty_clients_at_once_each_is_answered_or_sent_away_and_none_is_lost_or_counted_twice(tmp_path):
    model = ScriptedModel("tiny", make_engine(TOKENIZER, memory_gib=0.05))
    with live_server(tmp_path, model, options=ServiceOptions(max_waiting=20)) as live:
        together = threading.Barrier(60)

        def ask(number: int) -> tuple[int, str, int, float]:
            sent = body(24, f"def f{number}():", stream=True, stream_options={"include_usage": True})
            together.wait()
            began = time.monotonic()
            with httpx.stream("POST", live.url + "/v1/completions", json=sent, timeout=120) as answer:
                if answer.status_code != 200:
                    answer.read()
                    assert answer.status_code == 429, answer.text
                    assert int(answer.headers["retry-after"]) >= 1
                    check_shape("/v1/completions", answer)
                    return 429, "", 0, time.monotonic() - began
                pieces = answer.iter_bytes()
                got = next(pieces)
                first_s = time.monotonic() - began
                lines = (got + b"".join(pieces)).decode().split("\n\n")
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert "data: [DONE]" in lines
            assert len({chunk["id"] for chunk in chunks}) == 1
            return 200, chunks[-1]["id"], chunks[-1]["usage"]["completion_tokens"], first_s

        with concurrent.futures.ThreadPoolExecutor(60) as pool:
            answers = list(pool.map(ask, range(60)))
        statuses = Counter(status for status, *_ in answers)
        assert set(statuses) == {200, 429}
        assert 24 <= statuses[200] < 60
        seen = {id.removeprefix("cmpl-"): tokens for status, id, tokens, _ in answers if status == 200}
        assert len(seen) == statuses[200], "two clients got the same answer"
        assert set(seen.values()) == {24}
        rows = live.rows()
        assert {row.id: row.completion_tokens for row in rows if row.status == "completed"} == seen
        assert {row.status for row in rows} <= {"completed", "refused"}
        # Sixty clients of this process and the server share its threads; alone, the first byte comes within half a second.
        assert max(first_s for *_, first_s in answers) < 5


def test_a_queued_request_gets_its_first_byte_within_a_second(tmp_path):
    model = ScriptedModel("tiny", make_engine(TOKENIZER, max_running=1))
    with live_server(tmp_path, model) as live, connection(live) as holder:
        live.secrets = ["none"]
        holder.sendall(raw_request(live, body(3500, stream=True)))
        wait_until(lambda: live.running == 1)
        for stream in (True, False):
            with connection(live) as peer:
                began = time.monotonic()
                peer.sendall(raw_request(live, body(stream=stream)))
                assert peer.recv(15).startswith(b"HTTP/1.1 200")
                assert time.monotonic() - began < 1
