"""Another server as a source of episodes' tokens: vLLM, SGLang, or what else completes prompts given as token ids.

    source = ServerSource("http://10.0.0.5:8000", "student", tokenizer, update="vllm")
    samples = play(source, jobs, tokenizer, judging=judging)
    source.update_weights(run / "model")                    between two steps

Prompts go there as ids, and the very ids that were drawn come back, each with its log-probability:

    vLLM      POST /v1/completions    prompt=[ids], return_token_ids, logprobs=0
    SGLang    POST /generate          input_ids=[ids], return_logprob; its log-probabilities are those after the temperature,
                                      so they are used where that is 1 or 0 and count as not told elsewhere
    others    POST /v1/completions    prompt=[ids]; ids from the answer where it has them, else from its text

A turn is asked for in pieces of `piece_tokens`, each behind all that is there; the server finds what precedes in its prefix
cache. So a journal knows a long answer piece by piece, and a server that is restarted or paused costs one piece and not the
answer. The seed of a piece is a function of the turn's seed and its place: where the server repeats itself exactly
(`VLLM_BATCH_INVARIANT=1`, `--enable-deterministic-inference`) a turn that is taken up goes on as it would have. Other servers
promise no such thing, and then an interrupted run is as good as an uninterrupted one but not equal to it.

Where ids have to be made from the text, log-probabilities are not told, and whoever learns from the sample computes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.episode import Piece, Turn
from longreach.runtime import log
from longreach.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    import httpx

Kind = Literal["auto", "vllm", "sglang", "openai"]
KINDS: tuple[Kind, ...] = ("auto", "vllm", "sglang", "openai")
Update = Literal["none", "vllm", "sglang"]
UPDATES: tuple[Update, ...] = ("none", "vllm", "sglang")

PROBE = "Héllo 12+34, x_1 = [3.5]\n"
"""Text whose ids a server is asked for, to see whether it has the same tokenizer."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
"""Between attempts; doubled each time."""


@dataclass(eq=False)
class _Asked:
    """A turn under way; its pieces carry it."""

    turn: Turn
    is_dropped: bool = False


@dataclass(frozen=True)
class _Drawn:
    """One answer of the server. `logprobs` None: not told; `finish` is "stop", "length" or what else it says."""

    tokens: list[int]
    logprobs: list[float] | None
    finish: str


class _Refused(Exception):
    """The server will not do this, however often it is asked; the text says why."""


class ServerSource:
    """Implements `evaluate.episode.Source`. Turns run in threads, one request each.

    Args:
        base_url: with or without `/v1`.
        model: its name there.
        tokenizer: must be the server's; checked where it has `/tokenize`.
        key: of its API, or "". It is put into the header and nowhere else.
        kind: what is spoken there; "auto" looks at `/v1/models`.
        update: how `update_weights` tells the server of new weights.
        at_once: requests under way at most.
        piece_tokens: asked for in one request; servers of kind "openai" are asked for whole turns, as ids made from a text
            cannot be gone on from.
        timeout_s: for one request.
        patience_s: how long a request is repeated that meets no server, a busy one, or one that fails.

    Raises:
        RequestError: unreachable, the key is refused, the model is unknown there, or the tokenizer is another one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        key: str = "",
        kind: Kind = "auto",
        update: Update = "none",
        at_once: int = 64,
        piece_tokens: int = 512,
        timeout_s: float = 600.0,
        patience_s: float = 300.0,
    ) -> None:
        for name, value, allowed in (("kind", kind, KINDS), ("update", update, UPDATES)):
            if value not in allowed:
                raise RequestError(f"{name} {value!r} of a rollout server is none of {', '.join(allowed)}")
        for name, number in (("at_once", at_once), ("piece_tokens", piece_tokens)):
            if number < 1:
                raise RequestError(f"{name} {number} must be at least 1")
        if not base_url.startswith(("http://", "https://")):
            raise RequestError(f"the address of a rollout server, {base_url!r}, must begin with http:// or https://")
        self.url = base_url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model, self.tokenizer, self.update = model, tokenizer, update
        self.piece_tokens, self.timeout_s, self.patience_s = piece_tokens, timeout_s, patience_s
        self._client = _open_client(self.url, key, timeout_s, at_once)
        self._context: int | None = None
        self._waiting: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._under_way: set[_Asked] = set()
        self._is_closed = threading.Event()
        try:
            self.kind = self._look(kind)
            self._check_ids()
            self._check_tokenizer()
        except BaseException:
            self._client.close()
            raise
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()
        log.info("%-10s %s at %s (%s, up to %d requests at once)", "rollouts", model, self.url, self.kind, at_once)

    # ---- what is there --------------------------------------------------------------------------------------------------

    def _look(self, kind: Kind) -> Literal["vllm", "sglang", "openai"]:
        """Which server this is, whether it has the model, and how long its context is."""
        try:
            response = self._client.get("/v1/models")
        except _transport_errors() as error:
            raise RequestError(
                f"no server answers at {self.url} ({_said(error)}); start it, or correct the address"
            ) from None
        if response.status_code in (401, 403):
            raise RequestError(f"{self.url} refuses the key ({response.status_code}); give the key of this server")
        found = _json(response).get("data")
        if response.status_code != 200 or not isinstance(found, list):
            raise RequestError(
                f"{self.url}/v1/models gives no list of models ({response.status_code}); give the address of an "
                "OpenAI-compatible server"
            )
        models = {str(entry.get("id")): entry for entry in found if isinstance(entry, Mapping)}
        if self.model not in models:
            raise RequestError(
                f"{self.url} has no model {self.model!r}; it has {', '.join(sorted(models)) or 'none at all'}"
            )
        entry = models[self.model]
        if isinstance(length := entry.get("max_model_len"), int):
            self._context = length
        if kind != "auto":
            return kind
        owner = entry.get("owned_by")
        return owner if owner in ("vllm", "sglang") else "openai"

    def _check_tokenizer(self) -> None:
        # These two read special tokens spelled in a text as such; others may take them for text.
        specials = [] if self.kind == "openai" else sorted(self.tokenizer.special_ids)[:2]
        text = "".join([PROBE, *specials])
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            response = self._client.post("/tokenize", json=body)
        except _transport_errors() as error:
            raise RequestError(f"{self.url} does not answer ({_said(error)})") from None
        answer = _json(response)
        if response.status_code != 200 or not isinstance(answer.get("tokens"), list):
            log.info("%s has no /tokenize, so its tokenizer could not be compared with this model's", self.url)
            return
        theirs, ours = answer["tokens"], self.tokenizer.encode(text, allow_special=True)
        if theirs != ours:
            raise RequestError(
                f"{self.url} has another tokenizer: {text!r} is {theirs} there and {ours} here; serve the model that is trained"
            )

    def _check_ids(self) -> None:
        """vLLM and SGLang take prompts as token ids; ask others for one token to see whether they do."""
        if self.kind != "openai":
            return
        body = {"model": self.model, "prompt": [self.tokenizer.bos_id], "max_tokens": 1}
        try:
            response = self._client.post("/v1/completions", json=body)
        except _transport_errors() as error:
            raise RequestError(f"{self.url} does not answer ({_said(error)})") from None
        if response.status_code in (400, 404, 415, 422):
            raise RequestError(
                f"{self.url} takes no prompt of token ids ({_reason(response)}); rollouts need vLLM, SGLang or another server "
                "that does"
            )

    @property
    def most_tokens(self) -> int | None:
        """Of a prompt and what follows it; None where the server does not say."""
        return self._context

    # ---- turns ----------------------------------------------------------------------------------------------------------

    def submit(self, turn: Turn) -> object:
        """Begin a turn; returns what its pieces carry.

        Raises:
            RequestError: parameters that cannot be asked of a server piece by piece.
        """
        params = turn.params
        if params.grammar is not None or params.frequency_penalty or params.presence_penalty:
            raise RequestError(
                "grammars and penalties for repeated tokens cannot be asked of a rollout server; use the engine of this process"
            )
        asked = _Asked(turn)
        self._under_way.add(asked)
        self._waiting.put(asked)
        return asked

    def step(self) -> Sequence[Piece]:
        """Wait for more of any turn; nothing at all where none is under way."""
        pieces: list[Piece] = []
        while self._under_way and not pieces:
            pieces = self._kept([self._pieces.get()])
        while not self._pieces.empty():
            pieces += self._kept([self._pieces.get()])
        return pieces

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if piece.finish is not None:
                self._under_way.discard(piece.turn)
        return [piece for piece in pieces if not piece.turn.is_dropped]

    def drop(self, turn: object) -> None:
        """Nobody waits for this turn any more; the request that is under way is not interrupted."""
        if isinstance(turn, _Asked):
            turn.is_dropped = True
            self._under_way.discard(turn)

    def close(self) -> None:
        """End the threads once their requests are over, without waiting for them."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            for _ in self._threads:
                self._waiting.put(None)
            self._client.close()

    def __enter__(self) -> ServerSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- in the threads -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None and not self._is_closed.is_set():
            if asked.is_dropped:
                continue
            try:
                self._draw(asked)
            except Exception as error:  # whatever it was, whoever waits for this turn must hear of it
                why = str(error) if isinstance(error, _Refused) else f"{type(error).__name__}: {error}"
                self._pieces.put(Piece(asked, (), None, FinishReason.ERROR, f"{self.url}: {why}"))

    def _draw(self, asked: _Asked) -> None:
        """Ask for the turn piece by piece."""
        turn, params = asked.turn, asked.turn.params
        ends = {self.tokenizer.eos_id, *params.stop_token_ids}
        made = list(turn.begun)
        patience = _Patience(self.patience_s)
        while not asked.is_dropped:
            room = params.max_tokens - len(made)
            if self._context is not None:
                room = min(room, self._context - len(turn.prompt) - len(made))
            if room <= 0:
                return self._pieces.put(Piece(asked, (), None, FinishReason.LENGTH))
            count = room if self.kind == "openai" else min(room, self.piece_tokens)
            drawn = self._ask([*turn.prompt, *made], _piece_params(params, len(made), count), patience)
            if any(not 0 <= token < self.tokenizer.vocab_size for token in drawn.tokens):
                raise _Refused(
                    "it answered with tokens outside the vocabulary; it serves another model than the one trained"
                )
            drawn = _cut(drawn, ends)
            made += drawn.tokens
            finish: FinishReason | None = None
            if drawn.finish == "stop":
                if not made:
                    raise _Refused("it ended an answer without a token, not even the end mark")
                finish = FinishReason.STOP
            elif drawn.finish == "length":
                # Fewer than asked for: its context is full.
                finish = FinishReason.LENGTH if count == room or len(drawn.tokens) < count else None
            elif not drawn.tokens:  # paused, or ended from outside
                patience.wait(f"it ended the request ({drawn.finish})", self._is_closed)
            if drawn.tokens or finish is not None:
                told = None if drawn.logprobs is None else tuple(drawn.logprobs)
                self._pieces.put(Piece(asked, tuple(drawn.tokens), told, finish))
            if finish is not None:
                return None
            if drawn.tokens:
                patience = _Patience(self.patience_s)
        return None

    def _ask(self, prompt: list[int], params: SamplingParams, patience: _Patience) -> _Drawn:
        """One request, repeated while there is hope."""
        path, body = self._question(prompt, params)
        while True:
            try:
                response = self._client.post(path, json=body)
            except _transport_errors() as error:
                patience.wait(_said(error), self._is_closed)
                continue
            if response.status_code == 200:
                try:
                    return self._answer(response.json(), params)
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise _Refused(f"the answer of {path} cannot be read ({type(error).__name__}: {error})") from error
            why = f"{path} answers {response.status_code}: {_reason(response)}"
            if response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                if response.status_code in (401, 403):
                    why += "; give the key of this server"
                raise _Refused(why)
            patience.wait(why, self._is_closed, response.headers.get("retry-after"))

    def _question(self, prompt: list[int], params: SamplingParams) -> tuple[str, dict[str, Any]]:
        """Path and body of a request in the server's own words."""
        bias = {str(token): value for token, value in params.logit_bias.items()}
        if self.kind == "sglang":
            sampling = {
                "max_new_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
                "top_k": params.top_k if params.top_k > 0 else -1, "min_p": params.min_p,
                "repetition_penalty": params.repetition_penalty, "stop_token_ids": list(params.stop_token_ids),
                "min_new_tokens": params.min_tokens, "skip_special_tokens": False, "ignore_eos": params.ignore_eos,
            }  # fmt: skip
            if params.seed is not None:
                sampling["sampling_seed"] = params.seed & 0x7FFFFFFF
            if bias:
                sampling["logit_bias"] = bias
            return "/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        body: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": params.max_tokens, "temperature": params.temperature,
            "top_p": params.top_p, "seed": params.seed,
        }  # fmt: skip
        if bias:
            body["logit_bias"] = bias
        if self.kind == "vllm":
            body |= {
                "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
                "top_k": max(0, params.top_k), "min_p": params.min_p, "repetition_penalty": params.repetition_penalty,
                "stop_token_ids": list(params.stop_token_ids), "min_tokens": params.min_tokens,
                "ignore_eos": params.ignore_eos, "add_special_tokens": False,
            }  # fmt: skip
        elif params.top_k > 0 or params.min_p or params.repetition_penalty != 1 or params.min_tokens:
            raise _Refused("top_k, min_p, repetition_penalty and min_tokens are not part of this API; leave them out")
        return "/v1/completions", body

    def _answer(self, answer: dict[str, Any], params: SamplingParams) -> _Drawn:
        """What an answer says."""
        if self.kind == "sglang":
            meta = answer["meta_info"]
            rows = meta["output_token_logprobs"]
            tokens, logprobs = [int(row[1]) for row in rows], [float(row[0]) for row in rows]
            reason = meta["finish_reason"]
            is_ours = params.temperature in (0, 1) and not params.logit_bias and params.repetition_penalty == 1
            return _Drawn(tokens, logprobs if is_ours else None, reason["type"] if reason else "abort")
        choice = answer["choices"][0]
        finish, told = choice.get("finish_reason") or "abort", choice.get("logprobs") or {}
        spelled = told.get("tokens") or []
        if isinstance(ids := choice.get("token_ids"), list):
            tokens = [int(token) for token in ids]
        elif spelled and all(str(text).startswith("token_id:") for text in spelled):
            tokens = [int(text.removeprefix("token_id:")) for text in spelled]
        elif self.kind == "vllm":
            raise _Refused("it returns no token ids; it needs a vLLM of 0.10.2 or later")
        else:
            tokens = self.tokenizer.encode(choice["text"], allow_special=True)
            ended = [self.tokenizer.eos_id] if finish == "stop" and self.tokenizer.eos_id not in tokens[-1:] else []
            return _Drawn(tokens + ended, None, finish)
        logprobs = told.get("token_logprobs")
        if not isinstance(logprobs, list) or len(logprobs) != len(tokens) or None in logprobs:
            return _Drawn(tokens, None, finish)
        return _Drawn(tokens, [float(value) for value in logprobs], finish)

    # ---- weights --------------------------------------------------------------------------------------------------------

    def update_weights(self, folder: Path | str) -> bool:
        """Make the server load the weights of a checkpoint directory, which it must see under the same path. Call it while no
        turn is under way. Whether it was told; with update "none" it goes on with the weights it has.

        Raises:
            RequestError: it cannot, or did not.
        """
        assert not self._under_way, "weights are changed between steps"
        path = str(Path(folder).absolute())
        if self.update == "sglang":
            answer = self._tell("/update_weights_from_disk", {"model_path": path, "flush_cache": True})
            if answer.get("success") is not True:
                raise RequestError(f"{self.url} did not load {path}: {answer.get('message') or 'it does not say why'}")
        elif self.update == "vllm":
            self._tell(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self.timeout_s},
            )
            self._tell("/reset_prefix_cache", {})
        return self.update != "none"

    def _tell(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self._client.post(path, json=body)
        except _transport_errors() as error:
            raise RequestError(
                f"{self.url}{path} does not answer ({_said(error)}); is the server still there?"
            ) from None
        if response.status_code == 404:
            hint = {
                "vllm": "start vLLM with VLLM_SERVER_DEV_MODE=1",
                "sglang": "is this an SGLang server, and not its router?",
            }[self.update]
            raise RequestError(f"{self.url} has no {path}, so its weights cannot be updated; {hint}")
        if response.status_code >= 300:
            raise RequestError(
                f"{self.url}{path} answers {response.status_code}: {_reason(response)}; the server must see the weights under "
                "the same path"
            )
        return _json(response)


def _cut(drawn: _Drawn, ends: set[int]) -> _Drawn:
    """Nothing behind the first end mark: a server that was not told of all of them writes on."""
    at = next((place for place, token in enumerate(drawn.tokens, 1) if token in ends), None)
    if at is None:
        return drawn
    return _Drawn(drawn.tokens[:at], None if drawn.logprobs is None else drawn.logprobs[:at], "stop")


# ---- patience and answers -------------------------------------------------------------------------------------------


class _Patience:
    """How long one more attempt is worth it. Begins anew with every piece that came."""

    def __init__(self, seconds: float) -> None:
        self._until, self._seconds, self._wait_s = time.monotonic() + seconds, seconds, FIRST_WAIT_S

    def wait(self, why: str, is_closed: threading.Event, retry_after: str | None = None) -> None:
        """Wait a little longer than the last time, or as long as the server asks.

        Raises:
            _Refused: the time is over, or nobody waits any more.
        """
        wait_s = self._wait_s
        if retry_after is not None and retry_after.strip().isdecimal():
            wait_s = max(wait_s, min(float(retry_after), LONGEST_WAIT_S))
        if time.monotonic() + wait_s > self._until:
            raise _Refused(f"given up after {self._seconds:g} seconds of attempts: {why}")
        if is_closed.wait(wait_s):
            raise _Refused("the source was closed")
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)


def _piece_params(params: SamplingParams, place: int, count: int) -> SamplingParams:
    """For `count` tokens behind the first `place` of a turn. A seed of their own: the same one for each piece would draw every
    piece with the same random numbers."""
    seed = params.seed
    if seed is not None and place:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8], "big") >> 1
    least = min(count, max(0, params.min_tokens - place))
    return dataclasses.replace(params, max_tokens=count, min_tokens=least, seed=seed)


def _open_client(url: str, key: str, timeout_s: float, at_once: int) -> httpx.Client:
    try:
        import httpx
    except ImportError:
        raise RequestError("a rollout server needs httpx: pip install 'longreach[post]'") from None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=at_once + 1, max_keepalive_connections=at_once + 1)
    timeout = httpx.Timeout(timeout_s, connect=10.0)
    return httpx.Client(base_url=url, headers=headers, timeout=timeout, limits=limits)


def _transport_errors() -> type[Exception]:
    import httpx

    return httpx.TransportError


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _json(response: httpx.Response) -> dict[str, Any]:
    """The object of an answer; empty where it is none."""
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _reason(response: httpx.Response) -> str:
    """Why a server refused, from any of the forms in use, in one line."""
    answer = _json(response)
    told = answer.get("error") or answer.get("message") or answer.get("detail") or response.text
    if isinstance(told, Mapping):
        told = told.get("message") or told
    return " ".join(str(told).split())[:300] or "no reason given"
