"""Rollouts from other servers, spoken to as vLLM, SGLang or a plain completions API."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from episodes import Sums
from serving import ScriptedModel, live_server, make_engine, make_tokenizer

from longreach.engine.engine import Engine, EngineOptions
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate import server_source
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Job, Turn
from longreach.evaluate.judging import Judging
from longreach.evaluate.play import play
from longreach.evaluate.server_source import ServerSource
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.tasks.base import problem_at
from longreach.tokenizer.bpe import Tokenizer

KEY = "sk-of-this-test-alone"


class FakeServer:
    """What vLLM, SGLang and others answer, computed by an engine of ours.

    Attributes:
        requests: (path, body) of all that came.
        before: called with path and body before each answer; what it returns, status and object, is the answer instead.
        most: requests that were under way at once.
        stop_after: end each request after so many tokens as if it had been paused ("abort").
    """

    def __init__(self, kind: str, model: Transformer, tokenizer: Tokenizer) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        self.engine = Engine(model, tokenizer, EngineOptions(max_running=4, memory_gib=0.05))
        self.lock = threading.Lock()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.before: Callable[[str, dict[str, Any]], Any] = lambda path, body: None
        self.stop_after: int | None = None
        self.gives_ids = kind != "openai"
        self.delay_s = 0.0
        self.now = self.most = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def answer(self, body: dict[str, Any]) -> None:
                fake.headers.append(dict(self.headers))
                with fake.lock:
                    fake.now += 1
                    fake.most = max(fake.most, fake.now)
                time.sleep(fake.delay_s)
                status, told, *more = fake.before(self.path, body) or fake.answer(self.path, body)
                with fake.lock:
                    fake.now -= 1
                if status == 0:  # as a server that dies
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                data = json.dumps(told).encode() if not isinstance(told, bytes) else told
                self.send_response(status)
                for name, value in more:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, body))
                self.answer(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)
        self.engine.close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            entry = {"id": "student", "owned_by": self.kind}
            return 200, {"data": [entry | ({"max_model_len": 4096} if self.kind == "vllm" else {})]}
        if path == "/tokenize" and self.kind != "openai":
            return 200, {"tokens": self.tokenizer.encode(body["prompt"], allow_special=True)}
        if path == "/generate" and self.kind == "sglang":
            s = body["sampling_params"]
            tokens, logprobs, finish = self.generate(
                body["input_ids"], max_tokens=s["max_new_tokens"], temperature=s["temperature"], top_p=s["top_p"],
                seed=s["sampling_seed"], stop_token_ids=tuple(s["stop_token_ids"]),
            )  # fmt: skip
            rows = [[p, token, None] for p, token in zip(logprobs, tokens, strict=True)]
            return 200, {"meta_info": {"output_token_logprobs": rows, "finish_reason": {"type": finish}}}
        if path == "/v1/completions" and self.kind != "sglang":
            tokens, logprobs, finish = self.generate(
                body["prompt"], max_tokens=body["max_tokens"], temperature=body.get("temperature", 1.0),
                top_p=body.get("top_p", 1.0), seed=body.get("seed"), stop_token_ids=tuple(body.get("stop_token_ids", ())),
            )  # fmt: skip
            shown = tokens[:-1] if finish == "stop" else tokens
            choice: dict[str, Any] = {"text": self.tokenizer.decode(shown), "finish_reason": finish}
            if self.gives_ids:
                choice["token_ids"] = tokens
                choice["logprobs"] = {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs}
            return 200, {"choices": [choice]}
        return 404, {"detail": "Not Found"}

    def generate(self, prompt: list[int], **params: Any) -> tuple[list[int], list[float], str]:
        with self.lock:
            request = self.engine.submit(prompt, SamplingParams(logprobs=0, **params))
            made = []
            while not request.is_finished:
                for output in self.engine.step():
                    made += output.tokens
                if self.stop_after is not None and len(made) >= self.stop_after and not request.is_finished:
                    self.engine.cancel(request.id)
        finish = {"stop": "stop", "length": "length"}.get(str(request.finish_reason), "abort")
        return [token.token_id for token in made], [token.logprob for token in made], finish


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, arithmetic="invariant")
    return Transformer(config, seed=3)


@pytest.fixture
def fake(request, model, tokenizer):
    server = FakeServer(getattr(request, "param", "vllm"), model, tokenizer)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(server_source, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(server_source, "LONGEST_WAIT_S", 0.05)


def jobs_of(count: int = 5, **params: Any) -> list[Job]:
    task = Sums({})
    return [
        Job(str(i), task, problem_at(task, "train", 0, i), "non-think", 80, i, SamplingParams(**params))
        for i in range(count)
    ]


def played(source: Any, tokenizer: Tokenizer, jobs: list[Job]) -> list[tuple[list[int], Any, Any]]:
    with Judging(workers=1) as judging:
        samples = play(source, jobs, tokenizer, judging=judging)
    return [(sample.tokens, sample.logprobs, sample.finish) for sample in samples]


def by_engine(model: Transformer, tokenizer: Tokenizer, jobs: list[Job]) -> list[tuple[list[int], Any, Any]]:
    with EngineSource(model, tokenizer, max_running=4, memory_gib=0.05) as source:
        return played(source, tokenizer, jobs)


def drawn(source: ServerSource, turn: Turn) -> tuple[list[int], list[float], FinishReason]:
    """A single turn, to its end."""
    handle, tokens, logprobs = source.submit(turn), [], []
    while True:
        for piece in source.step():
            assert piece.turn is handle
            assert piece.error is None, piece.error
            tokens += piece.tokens
            logprobs += piece.logprobs or ()
            if piece.finish is not None:
                return tokens, logprobs, piece.finish


TURN = Turn([0, 2, 300, 301, 3], SamplingParams(max_tokens=60, seed=11, logprobs=0))


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_a_server_with_the_same_weights_draws_what_the_engine_draws(fake, model, tokenizer):
    jobs = jobs_of()
    with ServerSource(fake.url + "/v1/", "student", tokenizer, at_once=3) as source:
        assert source.kind == "vllm"
        assert source.most_tokens == 4096
        assert played(source, tokenizer, jobs) == by_engine(model, tokenizer, jobs)
    path, body = fake.requests[-1]
    assert path == "/v1/completions"
    assert (body["return_token_ids"], body["logprobs"], body["skip_special_tokens"]) == (True, 0, False)


def test_ids_are_also_read_from_the_tokens_of_log_probabilities(fake, model, tokenizer):
    """Servers of before vLLM 0.10.2 have no `token_ids`."""

    def older(path, body):
        status, told = fake.answer(path, body)
        for choice in told.get("choices", ()):
            del choice["token_ids"]
        return status, told

    fake.before = older
    jobs = jobs_of(2)
    with ServerSource(fake.url, "student", tokenizer) as source:
        assert played(source, tokenizer, jobs) == by_engine(model, tokenizer, jobs)


@pytest.mark.parametrize("fake", ["sglang"], indirect=True)
def test_sglang_is_asked_by_its_own_interface(fake, tokenizer):
    with ServerSource(fake.url, "student", tokenizer) as source:
        assert source.kind == "sglang"
        tokens, logprobs, finish = drawn(source, TURN)
    path, body = fake.requests[-1]
    assert path == "/generate"
    assert body["return_logprob"] is True
    made = fake.generate(TURN.prompt, max_tokens=60, seed=11, stop_token_ids=())
    assert (tokens, logprobs, str(finish)) == made


@pytest.mark.parametrize("fake", ["sglang"], indirect=True)
@pytest.mark.parametrize(("temperature", "is_told"), [(0.0, True), (1.0, True), (0.7, False)])
def test_sglangs_log_probabilities_are_used_only_where_they_are_those_of_the_model(
    fake, tokenizer, temperature, is_told
):
    with ServerSource(fake.url, "student", tokenizer) as source:
        for tokens, logprobs, _ in played(source, tokenizer, jobs_of(2, temperature=temperature)):
            assert tokens
            assert (logprobs is not None) == is_told


@pytest.mark.parametrize("fake", ["openai"], indirect=True)
def test_text_alone_is_encoded_again_and_has_no_log_probabilities(fake, model, tokenizer):
    jobs = jobs_of(3)
    with ServerSource(fake.url, "student", tokenizer) as source:
        assert source.kind == "openai"
        found = played(source, tokenizer, jobs)
    for (tokens, logprobs, finish), (true, _, true_finish) in zip(
        found, by_engine(model, tokenizer, jobs), strict=True
    ):
        assert logprobs is None
        assert finish is true_finish
        assert tokenizer.decode(tokens) == tokenizer.decode(true)
        assert (tokens[-1] == tokenizer.eos_id) == (true[-1] == tokenizer.eos_id)


def test_tokens_of_another_vocabulary_are_refused(fake, tokenizer):
    fake.before = lambda path, body: (
        (200, {"choices": [{"token_ids": [7, 99999], "finish_reason": "stop"}]}) if "prompt" in body
        and path == "/v1/completions" else None
    )  # fmt: skip
    with (
        ServerSource(fake.url, "student", tokenizer) as source,
        pytest.raises(RequestError, match="serves another model than the one trained"),
    ):
        played(source, tokenizer, jobs_of(1))


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", ["vllm", "sglang"], indirect=True)
def test_a_turn_taken_up_at_a_piece_goes_on_as_it_would_have(fake, tokenizer):
    with ServerSource(fake.url, "student", tokenizer, piece_tokens=7) as source:
        tokens, logprobs, finish = drawn(source, TURN)
        assert len(tokens) > 21
        asked = [body for path, body in fake.requests if path in ("/generate", "/v1/completions")]
        assert len(asked) == -(-len(tokens) // 7)
        begun = Turn(TURN.prompt, TURN.params, tuple(tokens[:14]), tuple(logprobs[:14]))
        assert drawn(source, begun) == (tokens[14:], logprobs[14:], finish)


def test_pieces_are_drawn_with_seeds_of_their_own(fake, tokenizer):
    with ServerSource(fake.url, "student", tokenizer, piece_tokens=7) as source:
        drawn(source, TURN)
    seeds = [body["seed"] for path, body in fake.requests if path == "/v1/completions"]
    assert seeds[0] == 11
    assert len(set(seeds)) == len(seeds) > 3


def test_a_request_that_is_paused_goes_on_behind_what_it_has(fake, tokenizer):
    fake.stop_after = 5
    with ServerSource(fake.url, "student", tokenizer, patience_s=5) as source:
        tokens, logprobs, _ = drawn(source, TURN)
    assert len(tokens) == len(logprobs) > 10
    prompts = [body["prompt"] for path, body in fake.requests if path == "/v1/completions"]
    assert prompts[1] == [*TURN.prompt, *tokens[: len(prompts[1]) - len(TURN.prompt)]]


def test_a_full_context_ends_a_turn(fake, tokenizer):
    fake.before = lambda path, body: (
        (200, {"data": [{"id": "student", "owned_by": "vllm", "max_model_len": 20}]}) if path == "/v1/models" else None
    )
    params = dataclasses.replace(TURN.params, ignore_eos=True, logit_bias={tokenizer.eos_id: -100.0})
    with ServerSource(fake.url, "student", tokenizer) as source:
        fake.before = lambda path, body: (
            (200, {"choices": [{"token_ids": [300] * body["max_tokens"], "finish_reason": "length"}]})
        )
        tokens, _, finish = drawn(source, Turn(TURN.prompt, params))
        assert (len(tokens), finish) == (15, FinishReason.LENGTH)
        assert drawn(source, Turn(TURN.prompt, params, tuple([300] * 15)))[::2] == ([], FinishReason.LENGTH)


# ---- many at once, and servers that stumble -------------------------------------------------------------------------


def test_no_more_requests_run_at_once_than_allowed(fake, tokenizer):
    fake.delay_s = 0.02
    with ServerSource(fake.url, "student", tokenizer, at_once=3) as source:
        played(source, tokenizer, jobs_of(12))
    assert fake.most == 3


@pytest.mark.parametrize(
    "failure",
    [(429, {"error": "busy"}, ("Retry-After", "0")), (503, {"error": "starting"}), (500, b"oops"), (0, b"")],
    ids=["busy", "unavailable", "broken", "disconnected"],
)
def test_a_server_that_stumbles_is_asked_again(fake, model, tokenizer, failure):
    left = [6]

    def stumble(path, body):
        if path == "/v1/completions" and left[0] > 0:
            left[0] -= 1
            return failure
        return None

    fake.before = stumble
    jobs = jobs_of(3)
    with ServerSource(fake.url, "student", tokenizer, at_once=2, patience_s=20) as source:
        assert played(source, tokenizer, jobs) == by_engine(model, tokenizer, jobs)
    assert left == [0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, {"error": {"message": "no room"}}), "given up after 0.2 seconds of attempts: .* 503: no room"),
        ((0, b""), "given up after 0.2 seconds of attempts"),
        ((400, {"object": "error", "message": "too long"}), "/v1/completions answers 400: too long"),
        ((401, {"detail": "who are you"}), "401: who are you; give the key of this server"),
        ((200, {"strange": 1}), "the answer of /v1/completions cannot be read"),
        ((200, {"choices": [{"text": "a", "finish_reason": "stop"}]}), "returns no token ids"),
        ((200, {"choices": [{"token_ids": [], "finish_reason": "stop"}]}), "ended an answer without a token"),
    ],
)
def test_a_server_that_cannot_go_on_is_one_clear_error(fake, tokenizer, answer, message):
    with ServerSource(fake.url, "student", tokenizer, patience_s=0.2) as source:
        fake.before = lambda path, body: answer
        with pytest.raises(RequestError, match=message) as error:
            played(source, tokenizer, jobs_of(1))
        assert fake.url in str(error.value)


def test_what_cannot_be_asked_of_a_server_is_refused(fake, tokenizer):
    with ServerSource(fake.url, "student", tokenizer) as source:
        for params in (SamplingParams(frequency_penalty=0.5), SamplingParams(presence_penalty=0.5)):
            with pytest.raises(RequestError, match="cannot be asked of a rollout server"):
                source.submit(Turn([0], params))
        assert source.step() == []


def test_turns_nobody_waits_for_leave_no_trace(fake, tokenizer):
    fake.delay_s = 0.05
    source = ServerSource(fake.url, "student", tokenizer, at_once=1)
    first, second = source.submit(TURN), source.submit(TURN)
    source.drop(first)
    pieces = source.step()
    assert {piece.turn for piece in pieces} == {second}
    source.close()
    source.close()


# ---- opening it -----------------------------------------------------------------------------------------------------


def test_a_key_goes_into_the_header_and_nowhere_else(fake, tokenizer, caplog):
    with caplog.at_level(logging.DEBUG), ServerSource(fake.url, "student", tokenizer, key=KEY) as source:
        drawn(source, TURN)
        fake.before = lambda path, body: (400, {"message": "no"})
        with pytest.raises(RequestError) as error:
            played(source, tokenizer, jobs_of(1))
    assert all(headers.get("Authorization") == f"Bearer {KEY}" for headers in fake.headers)
    assert KEY not in caplog.text + str(error.value) + json.dumps(fake.requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "teacher"}, "has no model 'teacher'; it has student"),
        ({"kind": "tgi"}, "kind 'tgi' of a rollout server is none of auto, vllm, sglang, openai"),
        ({"update": "ssh"}, "update 'ssh' of a rollout server is none of none, vllm, sglang"),
        ({"at_once": 0}, "at_once 0 must be at least 1"),
        ({"base_url": "10.0.0.5:8000"}, "must begin with http:// or https://"),
        ({"base_url": "http://127.0.0.1:9"}, "no server answers at http://127.0.0.1:9"),
    ],
)
def test_a_source_that_cannot_work_is_refused_at_once(fake, tokenizer, options, message):
    given = {"base_url": fake.url, "model": "student"} | options
    with pytest.raises(RequestError, match=message):
        ServerSource(given.pop("base_url"), given.pop("model"), tokenizer, **given)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/models", (401, {}), "refuses the key"),
        ("/v1/models", (404, {}), "gives no list of models"),
        ("/v1/models", (200, b"<html>"), "gives no list of models"),
        ("/tokenize", (200, {"tokens": [5, 6]}), "has another tokenizer: .* serve the model that is trained"),
    ],
)
def test_a_server_that_is_another_one_is_refused_at_once(fake, tokenizer, path, answer, message):
    fake.before = lambda asked, body: answer if asked == path else None
    with pytest.raises(RequestError, match=message):
        ServerSource(fake.url, "student", tokenizer)


def test_our_own_server_takes_no_token_ids_and_that_is_said_at_once(tmp_path, tokenizer):
    with (
        make_engine(tokenizer) as engine,
        live_server(tmp_path, ScriptedModel("student", engine)) as server,
        pytest.raises(RequestError, match=r"takes no prompt of token ids .* rollouts need vLLM, SGLang"),
    ):
        ServerSource(server.url, "student", tokenizer)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", ["sglang"], indirect=True)
def test_sglang_loads_new_weights_from_disk(fake, tokenizer):
    fake.before = lambda path, body: (200, {"success": True, "message": ""}) if "update" in path else None
    with ServerSource(fake.url, "student", tokenizer, update="sglang") as source:
        assert source.update_weights(Path("runs/rl/model"))
        told = {"model_path": str(Path("runs/rl/model").absolute()), "flush_cache": True}
        assert fake.requests[-1] == ("/update_weights_from_disk", told)
        fake.before = lambda path, body: (200, {"success": False, "message": "no such folder"})
        with pytest.raises(RequestError, match=r"did not load .*runs/rl/model: no such folder"):
            source.update_weights("runs/rl/model")


def test_vllm_reloads_weights_and_forgets_its_prefixes(fake, tokenizer):
    fake.before = lambda path, body: (200, {"results": [None]}) if path.startswith(("/coll", "/reset")) else None
    with ServerSource(fake.url, "student", tokenizer, update="vllm") as source:
        assert source.update_weights("runs/rl/model")
    path, body = fake.requests[-2]
    assert path == "/collective_rpc"
    assert (body["method"], body["kwargs"]) == (
        "reload_weights",
        {"weights_path": str(Path("runs/rl/model").absolute())},
    )
    assert fake.requests[-1] == ("/reset_prefix_cache", {})


@pytest.mark.parametrize(
    ("update", "answer", "message"),
    [
        ("vllm", (404, {"detail": "Not Found"}), "no /collective_rpc, .* VLLM_SERVER_DEV_MODE=1"),
        ("sglang", (404, {}), "no /update_weights_from_disk"),
        ("vllm", (500, {"error": {"message": "shape mismatch"}}), "answers 500: shape mismatch; the server must see"),
        ("sglang", (400, {"success": False, "message": "busy"}), "answers 400: busy"),
        ("sglang", (0, b""), "does not answer"),
    ],
)
def test_weights_that_could_not_be_updated_are_a_clear_error(fake, tokenizer, update, answer, message):
    with ServerSource(fake.url, "student", tokenizer, update=update) as source:
        fake.before = lambda path, body: answer
        with pytest.raises(RequestError, match=message):
            source.update_weights("runs/rl/model")


def test_without_an_update_the_server_is_left_alone(fake, tokenizer):
    with ServerSource(fake.url, "student", tokenizer) as source:
        count = len(fake.requests)
        assert not source.update_weights("runs/rl/model")
        assert len(fake.requests) == count
