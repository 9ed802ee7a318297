"""The engine: requests in, tokens out. A step is schedule → run → postprocess.

    engine = Engine(model, tokenizer, EngineOptions(max_running=16))
    request = engine.submit("def main", SamplingParams(max_tokens=64))
    while engine.has_work:
        for output in engine.step():
            print(output.text, end="")

`submit` and `cancel` may be called from any thread; `step` belongs to one. A request's tokens and log-probabilities do not
depend, in the invariant arithmetic, on what runs beside it, on how its prompt was cut, on a cache hit or on speculation.
"""

from __future__ import annotations

import itertools
import operator
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from longreach.engine.disk import DiskStore
from longreach.engine.guide import Guide
from longreach.engine.memory import POLICIES, Memory, Place, Policy, SetAside, fingerprint_text
from longreach.engine.request import Request, Status
from longreach.engine.runner import Rows, Runner
from longreach.engine.sampler import Sampled, Sampler, SampleRow, TokenCounts
from longreach.engine.sampling import FinishReason, SamplingParams, without_penalties
from longreach.engine.scheduler import Hooks, Plan, Scheduler
from longreach.engine.speculative import MTPDrafter, PromptLookup
from longreach.engine.stopping import TextStream, TokenReader
from longreach.errors import RequestError
from longreach.model.paged import page_nbytes, slot_nbytes
from longreach.model.stores import PRECISIONS, Precision
from longreach.model.transformer import Transformer
from longreach.native import status
from longreach.runtime import log
from longreach.tokenizer.bpe import Tokenizer

GIB = 1 << 30
SPECULATIONS = ("off", "lookup", "mtp")


@dataclass(frozen=True)
class EngineOptions:
    """How much memory an engine may take and what it does with it."""

    max_running: int = 16
    """Requests that run at once; others wait."""
    memory_gib: float = 1.0
    """For state blocks and pages together."""
    precision: Precision | None = None
    """How entries are kept: float32, bfloat16 or released (FP8 and 4 bits); None keeps the model's own data type."""
    step_tokens: int = 256
    """Prompt tokens read per step while others decode: smaller lets them wait less, larger reads prompts faster."""
    prefix_cache: bool = True
    """Remember texts and go on from them."""
    checkpoints: Policy = "ends"
    """Where window and tails are kept: ends (of prompts and outputs), periodic, full (every page), zero."""
    period: int = 4096
    """Tokens between checkpoints under `periodic`."""
    checkpoint_gib: float = 0.5
    """For checkpoints in memory; the least recently used go first."""
    swap_gib: float = 1.0
    """For requests set aside when memory is short. Beyond it they are computed again."""
    disk_cache: Path | None = None
    """Directory of the second tier of the prefix cache; None for none."""
    disk_gib: float = 10.0
    """Its size at most; the least recently used goes first."""
    speculation: Literal["off", "lookup", "mtp"] = "off"
    """Guess several tokens and check them in one pass: lookup (from the text itself), mtp (the model's own draft block)."""
    draft_tokens: int = 3
    """Tokens guessed at a time."""
    ageing_s: float = 10.0
    """Seconds of waiting that raise a request's priority by one."""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            RequestError: one line with the value and what is allowed.
        """
        for name, allowed in (("checkpoints", POLICIES), ("speculation", SPECULATIONS)):
            if getattr(self, name) not in allowed:
                raise RequestError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not isinstance(self.prefix_cache, bool):
            raise RequestError(f"prefix_cache must be True or False, not {self.prefix_cache!r}")
        for name in ("max_running", "step_tokens", "period", "draft_tokens"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise RequestError(f"{name} must be a whole number, not {value!r}")
        for name in ("memory_gib", "disk_gib", "ageing_s", "checkpoint_gib", "swap_gib"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise RequestError(f"{name} must be a number, not {value!r}")
        for name, least in (("max_running", 1), ("step_tokens", 1), ("period", 1), ("draft_tokens", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} {getattr(self, name)} must be {least} or more")
        for name in ("memory_gib", "disk_gib", "ageing_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RequestError(f"{name} {getattr(self, name)} must be above 0")
        for name in ("checkpoint_gib", "swap_gib"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(f"{name} {getattr(self, name)} must be 0 or above")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise RequestError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.draft_tokens > 32:
            raise RequestError(f"draft_tokens {self.draft_tokens} must be at most 32: a cache goes back by 64 tokens")


@dataclass(frozen=True)
class Output:
    """What a step made for one request.

    Attributes:
        tokens: new ones, with their log-probabilities where asked for.
        text: what they make certain.
        finish_reason: on the last output of a request.
    """

    request: Request
    tokens: tuple[Sampled, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass
class Work:
    """What the engine keeps with a request. `plain`: its parameters before `after` has come, without penalties."""

    place: Place | None = None
    aside: SetAside | None = None
    stream: TokenReader | None = None
    counts: TokenCounts | None = None
    guide: Guide | None = None
    plain: SamplingParams | None = None
    streams: torch.Tensor | None = None
    dropped: int = 0
    lookup: Any = None
    logprobs: list[Sampled] = field(default_factory=list)


@dataclass
class EngineStats:
    """Counts since the start.

    Attributes:
        step_s: seconds inside `step`; `Runner.forward_s` of them in the model.
        drafted, accepted: speculated tokens, and those that were right.
    """

    steps: int = 0
    generated_tokens: int = 0
    step_s: float = 0.0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """One model, many requests.

    Args:
        tokenizer: None serves token ids only (no text, no stop strings).
        clock: seconds; deadlines and waiting are measured with it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = o = options or EngineOptions()
        o.check()
        self.model, self.tokenizer, self.clock = model.eval(), tokenizer, clock
        self.vocab_size = tokenizer.vocab_size if tokenizer is not None else model.config.vocab_size
        self.precision: Precision = o.precision or ("bfloat16" if model.dtype == torch.bfloat16 else "float32")
        self.memory = self._new_memory()
        memory = self.memory
        hooks = Hooks(memory.admit, memory.would_admit, memory.reserve, memory.release)
        self.scheduler = Scheduler(
            hooks, max_running=o.max_running, step_tokens=o.step_tokens, idle_tokens=model.chunk_tokens,
            stop_at=self.memory.stop_at, ageing_s=o.ageing_s,
        )  # fmt: skip
        self.sampler = Sampler((tokenizer.eos_id,) if tokenizer is not None else ())
        self.drafter = self._new_drafter()
        self.runner = Runner(model, self.vocab_size, isinstance(self.drafter, MTPDrafter))
        self.stats = EngineStats()
        self.requests: dict[str, Request] = {}
        self._lock = threading.Lock()
        self._incoming: list[Request] = []
        self._cancelled: list[Request] = []
        self._is_closed = False
        self._ids = itertools.count()
        self._seeds = random.Random()

    def _new_memory(self) -> Memory:
        o, config = self.options, self.model.config
        slot, page = slot_nbytes(config, self.precision, self.model.dtype), page_nbytes(config, self.precision)
        room = int(o.memory_gib * GIB) - o.max_running * slot
        if room < page:
            raise RequestError(
                f"memory_gib {o.memory_gib:g} is too little for {o.max_running} state blocks of {slot / 2**20:.1f} MiB and a "
                f"page of {page / 2**20:.1f} MiB; give at least {(o.max_running * slot + page) / GIB:.3f}, or fewer max_running"
            )
        try:
            return self._memory_of(room // page)
        except RuntimeError as error:
            raise RequestError(f"memory_gib {o.memory_gib:g} cannot be had here; give less ({error})") from None

    def _memory_of(self, num_pages: int) -> Memory:
        o = self.options
        return Memory(
            self.model, num_slots=o.max_running, num_pages=num_pages, precision=self.precision, checkpoints=o.checkpoints,
            period=o.period, checkpoint_limit_bytes=int(o.checkpoint_gib * GIB), swap_limit_bytes=int(o.swap_gib * GIB),
            disk=self._open_disk(), prefix_cache=o.prefix_cache,
        )  # fmt: skip

    def _open_disk(self) -> DiskStore | None:
        o = self.options
        if o.disk_cache is None or not o.prefix_cache:
            return None
        text = fingerprint_text(self.model, self.precision, status())
        return DiskStore(o.disk_cache, fingerprint=text, limit_bytes=int(o.disk_gib * GIB))

    def _new_drafter(self) -> PromptLookup | MTPDrafter | None:
        if self.options.speculation == "lookup":
            return PromptLookup(self.options.draft_tokens)
        if self.options.speculation == "mtp":
            if not self.model.mtp:
                raise RequestError("speculation 'mtp' needs a model with an MTP block; this one has none, use 'lookup'")
            return MTPDrafter(self.model, self.sampler, self.vocab_size, self.options.draft_tokens)
        return None

    # ---- in ---------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        user: str = "",
        tenant: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
        request_id: str | None = None,
        stream: TokenReader | None = None,
        begun: Sequence[int] = (),
    ) -> Request:
        """Queue a request.

        Args:
            prompt: text (special tokens spelled out in it stay text; the begin mark is put before it), or token ids as
                they are.
            user: for fairness; tenant: whose cache may be used. Tenants share no entry.
            priority: higher goes first.
            deadline_s: seconds from now after which it ends with what it has.
            stream: reads the tokens in place of a `TextStream`, in the thread that steps: stop strings are its affair then.
            begun: tokens generated for this very request before it was interrupted, by this engine or another: it goes on
                behind them as if it had never stopped. They count for `max_tokens`, and no output reports them again.

        Raises:
            RequestError: an empty prompt, a token outside the vocabulary, a prompt beyond the context or the memory, wrong
                parameters, a grammar whose shortest text does not fit, or an id in use. The engine is as before.
        """
        if self._is_closed:
            raise RequestError("this engine is closed; make another one")
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be a SamplingParams, not {type(params).__name__}")
        params.check(self.vocab_size)
        tokens = self._tokens(prompt)
        limit = self._limit(len(tokens), params.max_tokens)
        guide = self._new_guide(params, limit - len(tokens))
        _check_names(user=user, tenant=tenant)
        for name, number in (("priority", priority), ("deadline_s", 1 if deadline_s is None else deadline_s)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < float("inf"):
                raise RequestError(f"{name} must be a number, not {number!r}")
        if deadline_s is not None and deadline_s <= 0:
            raise RequestError(f"deadline_s {deadline_s} must be above 0 seconds from now")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this engine has none; use stop_token_ids")
        now = self.clock()
        with self._lock:
            name = request_id or next(n for i in self._ids if (n := f"request-{i}") not in self.requests)
            if name in self.requests:
                raise RequestError(f"request id {name!r} is in use; choose another or leave it out")
            request = Request(
                name, tokens, params, len(tokens), limit, user=user, tenant=tenant, priority=priority, arrival=now,
                seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
                deadline=now + deadline_s if deadline_s is not None else None,
            )  # fmt: skip
            request.work = Work()
            if stream is not None:
                request.work.stream = stream
            elif self.tokenizer is not None:
                request.work.stream = TextStream(self.tokenizer, params)
            if params.needs_history:
                request.work.counts = TokenCounts(tokens)
                if params.after is not None:
                    request.work.plain = without_penalties(params)
            request.work.guide = guide
            self._take_up(request, begun)
            self.requests[name] = request
            self._incoming.append(request)
        return request

    def _take_up(self, request: Request, begun: Sequence[int]) -> None:
        """Stand behind tokens that were generated before; they are read again like those of a pre-empted request."""
        if not begun:
            return
        tokens, work = self._tokens(begun), request.work
        for place, token in enumerate(tokens):
            waits = work.guide is not None and work.guide.is_waiting
            ended = len(request.tokens) + 1 >= request.limit or (work.guide is not None and work.guide.is_finished)
            if (
                not ended
                and work.guide is not None
                and not work.guide.take(token, request.limit - len(request.tokens) - 1)
            ):
                raise RequestError(f"begun has token {token} at {place}, which the grammar does not allow there")
            if not ended and work.stream is not None:
                work.stream.push(token)
                ended = work.stream.finish_reason is not None
            elif token in request.params.stop_token_ids and request.num_generated + 1 >= request.params.min_tokens:
                ended = True
            if ended:
                raise RequestError(
                    f"the {len(tokens)} tokens begun with end the request at number {place + 1}; nothing is left to generate"
                )
            request.tokens.append(token)
            if work.counts is not None and not waits:
                work.counts.append(token)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("a text prompt needs a tokenizer, and this engine has none; give token ids")
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError:
            raise RequestError(f"the prompt must be a text or a list of token ids, not {_shown(prompt)}") from None
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token")
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                size = self.vocab_size
                raise RequestError(f"token id {token} is outside the vocabulary of {size} (0 to {size - 1})")
        return tokens

    def _limit(self, count: int, max_tokens: int) -> int:
        context, capacity = self.model.config.max_position_embeddings, self.memory.capacity
        if count >= context:
            raise RequestError(
                f"the prompt is {count} tokens long, the context of this model is {context} with at least one to generate; "
                "shorten the prompt"
            )
        if count >= capacity:
            raise RequestError(
                f"the prompt is {count} tokens long, the engine's memory holds {capacity} with at least one to generate; "
                "shorten the prompt or raise memory_gib"
            )
        return min(count + max_tokens, context, capacity)

    def _new_guide(self, params: SamplingParams, room: int) -> Guide | None:
        if params.grammar is None and (params.after is None or not params.needs_history):
            return None
        guide = Guide(params, self.sampler.eos_ids, self.vocab_size)
        if guide.needed > room:
            raise RequestError(
                f"the shortest text of the grammar takes {guide.needed} tokens, the mark that ends thinking and the end mark "
                f"included where there are such, but max_tokens {params.max_tokens} and the context leave {room}; allow at "
                f"least {guide.needed}"
            )
        return guide

    def cancel(self, request_id: str) -> None:
        """End a request at the next step with what it has; one that is unknown or over is left alone."""
        with self._lock:
            if (request := self.requests.get(request_id)) is not None:
                self._cancelled.append(request)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def has_work(self) -> bool:
        return bool(self._incoming or self._cancelled or self.scheduler.waiting or self.scheduler.running)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Do one step; returns what became of each request that moved."""
        if self._is_closed:
            raise RequestError("this engine is closed; make another one")
        begin = time.perf_counter()
        outputs = self._take_incoming()
        now = self.clock()
        outputs += [self._finish(request, FinishReason.DEADLINE) for request in self.scheduler.expired(now)]
        outputs += self._run(self.scheduler.schedule(now))
        self.stats.steps += 1
        self.stats.step_s += time.perf_counter() - begin
        return outputs

    def _take_incoming(self) -> list[Output]:
        with self._lock:
            incoming, self._incoming = self._incoming, []
            cancelled, self._cancelled = self._cancelled, []
        for request in incoming:
            self.scheduler.add(request)
        return [self._finish(r, FinishReason.CANCELLED) for r in dict.fromkeys(cancelled) if not r.is_finished]

    def _run(self, plan: Plan) -> list[Output]:
        outputs: list[Output] = []
        for requests, run in self.runner.passes(plan):
            try:
                outputs += self._postprocess(run())
            except (
                Exception
            ) as error:  # an edge like a server's: whatever went wrong ends the requests of this pass alone
                log.warning("a pass of %d requests failed: %s: %s", len(requests), type(error).__name__, error)
                why = f"the pass failed: {type(error).__name__}: {error}"
                outputs += [self._fail(request, why) for request in requests if not request.is_finished]
            except BaseException:  # interrupted: how far the sequences had got is unknown, so nothing goes on from them
                for request in requests:
                    if not request.is_finished:
                        self._fail(request, "interrupted")
                raise
        return outputs

    def _postprocess(self, rows: list[Rows]) -> list[Output]:
        """Remember what was read, draw tokens, check drafts, end what is over."""
        for row in rows:
            request = row.request
            if row.is_prefill:
                self.memory.after(request, is_end=request.computed == request.num_prompt)
        asking: list[tuple[Request, torch.Tensor]] = []
        questions: list[SampleRow] = []
        outputs: list[Output] = []
        for row in rows:
            if row.logits is None:
                continue
            try:
                questions += self._questions(row.request)
            except RequestError as error:  # a grammar too complex to follow ends its request alone
                outputs.append(self._fail(row.request, str(error)))
            else:
                asking.append((row.request, row.logits))
        if not asking:
            return outputs
        answers, at = self.sampler.sample(torch.cat([logits for _, logits in asking]), questions), 0
        for request, logits in asking:
            here = slice(at, at + len(logits))
            outputs.append(self._accept(request, answers[here], questions[here], logits))
            at += len(logits)
        going = [request for request, _ in asking if request.status is Status.RUNNING]
        if self.drafter is not None and going:
            try:
                self.drafter.propose(going)
            except (RuntimeError, MemoryError) as error:  # a guess is never needed
                log.warning("no drafts this time: %s", error)
                for request in going:
                    request.drafts = []
        return outputs

    def _questions(self, request: Request) -> list[SampleRow]:
        """What to draw: the next token, and after each draft the one behind it as if the draft were right."""
        work: Work = request.work
        rows, guide = [], work.guide
        followed = counted = 0
        for i in range(1 + len(request.drafts)):
            # A draft the grammar forbids cannot be drawn, so what is asked behind it no longer matters.
            mask = guide.mask() if guide is not None and followed == i else None
            counts = work.counts.copy() if work.counts is not None and request.drafts else work.counts
            waits = guide is not None and guide.is_waiting
            params = work.plain if waits and work.plain is not None else request.params
            rows.append(SampleRow(params, request.seed, request.num_generated + i, counts, mask))
            if i < len(request.drafts):
                if work.counts is not None and not waits:
                    work.counts.append(request.drafts[i])
                    counted += 1
                if guide is not None and followed == i:
                    followed += guide.advance(request.drafts[i])
        if work.counts is not None:
            work.counts.pop(counted)
        if guide is not None and followed:
            guide.rollback(followed)
        return rows

    def _accept(
        self, request: Request, answers: Sequence[Sampled], questions: Sequence[SampleRow], logits: torch.Tensor
    ) -> Output:
        """Take the drawn tokens as far as the drafts before them were right."""
        work: Work = request.work
        drafts, request.drafts = request.drafts, []
        taken: list[Sampled] = []
        text, reason = "", None
        for i, first in enumerate(answers):
            waits = work.guide is not None and work.guide.is_waiting
            answer = self._settled(request, first, questions[i], logits[i : i + 1])
            if answer.error is not None:
                return self._fail(request, answer.error, tuple(taken), text)
            taken.append(answer)
            text_more, reason = self._append(request, answer, is_counted=not waits)
            text += text_more
            if reason is not None or i == len(drafts) or drafts[i] != answer.token_id:
                break
        self.stats.drafted += len(drafts)
        self.stats.accepted += len(taken) - 1
        self.stats.generated_tokens += len(taken)
        sequence = work.place.sequence if work.place is not None else None
        assert sequence is not None
        work.dropped = sequence.length - (len(request.tokens) - 1)
        if work.dropped:
            sequence.truncate(len(request.tokens) - 1)
            request.computed = sequence.length
        if reason is not None:
            return self._finish(request, reason, tuple(taken), text)
        self.memory.after(request, is_end=False)
        return Output(request, tuple(taken), text)

    def _settled(self, request: Request, answer: Sampled, question: SampleRow, logits: torch.Tensor) -> Sampled:
        """The drawn token, or the one drawn instead of it where it would leave no room to complete the grammar's text."""
        guide: Guide | None = request.work.guide
        room = request.limit - len(request.tokens) - 1
        while guide is not None and answer.error is None and not guide.take(answer.token_id, room):
            question = question._replace(mask=guide.narrow(question.mask))
            [answer] = self.sampler.sample(logits, [question])
        return answer

    def _append(self, request: Request, answer: Sampled, is_counted: bool) -> tuple[str, FinishReason | None]:
        """One more token: returns the text it makes certain, and why the request ends, if it does."""
        work: Work = request.work
        token = answer.token_id
        request.tokens.append(token)
        if request.params.logprobs is not None:
            work.logprobs.append(answer)
        if work.counts is not None and is_counted:
            work.counts.append(token)
        text, reason = "", None
        if work.stream is not None:
            text = work.stream.push(token)
            reason, request.stop_reason = work.stream.finish_reason, work.stream.stop_reason
        elif token in request.params.stop_token_ids and request.num_generated >= request.params.min_tokens:
            reason, request.stop_reason = FinishReason.STOP, token
        if reason in (None, FinishReason.LENGTH) and work.guide is not None and work.guide.is_finished:
            reason = FinishReason.STOP  # the last token there was room for has completed the text
        if reason is None and len(request.tokens) >= request.limit:
            reason = FinishReason.LENGTH
        return text, reason

    # ---- out --------------------------------------------------------------------------------------------------------

    def _finish(
        self, request: Request, reason: FinishReason, tokens: tuple[Sampled, ...] = (), text: str = ""
    ) -> Output:
        """Take a request out of the queue, remember its state, free its memory."""
        if request.status is Status.RUNNING and reason is not FinishReason.ERROR:
            self.memory.after(request, is_end=True)
        if request in self.scheduler.waiting or request in self.scheduler.running:
            self.scheduler.finish(request)
        return self._ended(request, reason, tokens, text)

    def _ended(
        self, request: Request, reason: FinishReason, tokens: tuple[Sampled, ...] = (), text: str = ""
    ) -> Output:
        self.memory.free(request)
        request.finish_reason = reason
        if request.work.stream is not None:
            text += request.work.stream.finish()
        with self._lock:
            self.requests.pop(request.id, None)
        return Output(request, tokens, text, reason)

    def _fail(self, request: Request, why: str, tokens: tuple[Sampled, ...] = (), text: str = "") -> Output:
        request.error = why
        return self._finish(request, FinishReason.ERROR, tokens, text)

    def weights_changed(self) -> None:
        """Call after changing the model's weights: nothing computed with the old ones is used again.

        Requests under way are read again from their first token. The disk tier goes on under the new weights' fingerprint.
        """
        for request in list(self.scheduler.running):
            request.work.place.sequence.rewind_to_start()
            self.scheduler.preempt(request)
        for request in self.scheduler.waiting:
            self.memory.free(request)
            request.computed = 0
        self.memory.forget(self._open_disk())

    def close(self) -> None:
        """Finish writing the disk tier. The engine is not used afterwards."""
        if not self._is_closed:
            self._is_closed = True
            self.memory.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_names(**names: str) -> None:
    for name, value in names.items():
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a text, not {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{name} {value!r} is not valid Unicode") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
