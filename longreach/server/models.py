"""The models a server holds, behind one small protocol: in this process, or upstream on another engine.

model = LocalModel("small", llm_engine, ...)
reply = await model.open(call, tenant="key/user")
head = await reply.start()                     once inference has begun
async for events in reply: ...                 until each choice has its `Finish`
reply.usage                                    then
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import orjson

from longreach import __version__
from longreach.chat.messages import AnswerFormat, Conversation, Tool
from longreach.chat.parser import AnswerParser
from longreach.chat.renderer import LIMITS, EffortTexts, Layout, Prompt, fim, render
from longreach.engine.engine import Engine
from longreach.engine.memory import fingerprint_text
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.native import status as native_status
from longreach.server.call import ApiError, Call, Event, FillIn, Finish, Head, Usage
from longreach.server.engine_loop import EngineLoop, Mailbox, Ticket
from longreach.server.reader import ChatReader, Reader, TextReader
from longreach.server.replay import Replay
from longreach.server.tool_grammar import answer_grammar, strict_schema
from longreach.tokenizer.special import THINK_END

DEFAULT_TOKENS = {"plain": 8192, "thinking": 65536, "max": 131072}
"""Output tokens where a request names none, as the hosted API has them; cut to the context left."""

AT_ONCE = 16_000
"""Characters up to which a prompt is rendered and encoded in the event loop; a longer one goes to a thread."""


class Reply(Protocol):
    """An answer under way.

    Attributes:
        head: known once `start` has returned.
        began: when it was opened, on the monotonic clock.
    """

    head: Head | None
    began: float

    async def start(self, timeout_s: float | None = None) -> Head | None:
        """Wait until inference has begun; None where that takes longer.

        Raises:
            ApiError: it will not begin.
        """
        ...

    async def next(self, timeout_s: float | None = None) -> list[Event]:
        """The next events; none where they take longer.

        Raises:
            ApiError: the answer failed.
        """
        ...

    @property
    def is_over(self) -> bool:
        """Whether every choice has its `Finish`."""
        ...

    @property
    def usage(self) -> Usage:
        """As far as it is known; complete when over."""
        ...

    @property
    def reason(self) -> str:
        """Why it ended: the finish reasons of its choices."""
        ...

    @property
    def first_token_s(self) -> float | None: ...

    async def cut(self) -> None:
        """End the answer with what it has: its `Finish` follows, or an error where it has not begun. Harmless when over."""
        ...

    async def cancel(self) -> None:
        """Nobody waits any more. Harmless when over."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A call, ready to run.

    Attributes:
        prompt: token ids; empty where another engine encodes. layout: what they were made of.
        prompt_tokens: how many; estimated where another engine counts.
        max_tokens: of each answer. params: for the engine here.
    """

    call: Call
    prompt_tokens: int
    max_tokens: int
    prompt: list[int] = field(default_factory=list)
    params: SamplingParams | None = None
    layout: Prompt | None = None


class Model(Protocol):
    """Something that answers calls under a name."""

    name: str
    kind: str
    context: int

    async def prepare(self, call: Call, tenant: str = "") -> Prepared:
        """Read a call, without running anything.

        Args:
            tenant: whose earlier answers its history may repeat.

        Raises:
            ApiError: it cannot be served.
        """
        ...

    async def open(self, prepared: Prepared, tenant: str) -> Reply:
        """Run what was prepared.

        Raises:
            ApiError: it cannot be served now.
        """
        ...

    async def count_tokens(self, call: Call) -> int:
        """Tokens of the prompt that `call` would have; estimated where another engine counts."""
        ...

    def known(self, prepared: Prepared, tenant: str) -> int:
        """Prompt tokens that a cache holds already, as far as can be told without running."""
        ...

    async def close(self) -> None:
        """End what runs, and keep what a later start can use."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the list of models."""
        ...

    def status(self) -> dict[str, Any]:
        """Load and cache, for the page and the metrics."""
        ...


@dataclass(frozen=True)
class ChatSetup:
    """How conversations are laid out for a model.

    Attributes:
        texts: whose effort paragraphs the weights were trained with.
    """

    texts: EffortTexts = "0731"
    layout: Layout = "encoder"
    is_trained: bool = False
    """Whether the model has learned to chat. A model that has not continues the text of the conversation."""


class LocalModel:
    """A model in this process.

    Attributes:
        loop: the engine and its thread.
    """

    kind = "local"

    def __init__(self, name: str, engine: Engine, setup: ChatSetup, *, hosted: bool = False) -> None:
        assert engine.tokenizer is not None
        self.name, self.engine, self.setup, self.hosted = name, engine, setup, hosted
        self.tokenizer = engine.tokenizer
        self.loop = EngineLoop(engine, name)
        self.context = min(engine.model.config.max_position_embeddings, engine.memory.capacity)
        fingerprint = fingerprint_text(engine.model, engine.precision, native_status()) + __version__
        self.fingerprint = "fp_" + hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
        self.replay = Replay(self.tokenizer)
        self.limits = {self.tokenizer.special_ids[mark] for mark in LIMITS if mark in self.tokenizer.special_ids}
        self.rate = _Rate(self.loop)
        self._disk_looked, self._disk_known = float("-inf"), 0

    # ---- a call -----------------------------------------------------------------------------------------------------

    async def prepare(self, call: Call, tenant: str = "") -> Prepared:
        layout, prompt = await self._encode(call, tenant)
        limit = self._limit(call, len(prompt))
        return Prepared(call, len(prompt), limit, prompt, await self._params(call, layout, limit), layout)

    async def open(self, prepared: Prepared, tenant: str) -> LocalReply:
        call, params = prepared.call, prepared.params
        assert params is not None
        reply = LocalReply(self, prepared, tenant)
        try:
            for choice in range(call.n):
                one = params
                if call.n > 1 and params.seed is not None:
                    one = replace(params, seed=(params.seed + choice) % 2**63)
                reader = self._reader(prepared, one, choice)
                reply.tickets.append(
                    self.loop.submit(prepared.prompt, one, reader, reply.mailbox, tenant=tenant, choice=choice)
                )
        except RequestError as error:
            await reply.cancel()
            raise ApiError(400, str(error)) from None
        except ApiError:
            await reply.cancel()
            raise
        return reply

    def known(self, prepared: Prepared, tenant: str) -> int:
        return self.engine.memory.known(tenant, prepared.prompt)

    def render(self, call: Call) -> Prompt:
        """The prompt of a call.

        Raises:
            ApiError: the conversation cannot be laid out.
        """
        try:
            if isinstance(call.input, FillIn):
                return fim(call.input.prompt, call.input.suffix)
            conversation = _as_enforced(call.input) if self.hosted else call.input
            return render(conversation, texts=self.setup.texts, layout=self.setup.layout)
        except RequestError as error:
            raise ApiError(400, str(error)) from None

    async def count_tokens(self, call: Call) -> int:
        return len(await self.encode(call))

    async def encode(self, call: Call) -> list[int]:
        """The token ids of a call's prompt.

        Raises:
            ApiError: it cannot be laid out.
        """
        return (await self._encode(call, ""))[1]

    async def _encode(self, call: Call, tenant: str) -> tuple[Prompt, list[int]]:
        if _size(call) <= AT_ONCE:
            return self._encode_now(call, tenant)
        return await asyncio.to_thread(self._encode_now, call, tenant)

    def _encode_now(self, call: Call, tenant: str) -> tuple[Prompt, list[int]]:
        layout = self.render(call)
        try:
            return layout, layout.encode(self.tokenizer, self.replay.of(tenant) if tenant else None)
        except RequestError as error:
            raise ApiError(400, str(error)) from None

    def _limit(self, call: Call, prompt_tokens: int) -> int:
        """Tokens the answer may have."""
        left = self.context - prompt_tokens
        if call.max_tokens is None:
            wanted = min(DEFAULT_TOKENS[_mode(call)], max(left, 1))
        elif self.hosted:
            wanted = call.max_tokens
        else:
            wanted = min(call.max_tokens, max(left, 1))
        if wanted > left:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context} tokens. However, you requested "
                f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the messages, {wanted} in the completion). "
                "Please reduce the length of the messages or completion.",
            )
        return wanted

    async def _params(self, call: Call, layout: Prompt, max_tokens: int) -> SamplingParams:
        try:
            grammar = await asyncio.to_thread(self._grammar, call, layout) if _is_constrained(call) else None
            after = self.tokenizer.special_id(THINK_END) if layout.begins_thinking else None
            bias = dict(call.logit_bias)
            if grammar is not None and after is not None:
                # A mark of another turn would end the reasoning, and with it the answer before it has its form.
                bias |= dict.fromkeys(self.limits - {after}, -100.0)
            params = SamplingParams(
                max_tokens=max_tokens, temperature=call.temperature, top_p=call.top_p, top_k=call.top_k, min_p=call.min_p,
                frequency_penalty=call.frequency_penalty, presence_penalty=call.presence_penalty,
                repetition_penalty=call.repetition_penalty, seed=call.seed, logprobs=call.logprobs,
                stop=call.stop if isinstance(call.input, FillIn) else (), logit_bias=bias,
                grammar=grammar, after=after,
            )  # fmt: skip
            params.check(self.engine.vocab_size)
        except RequestError as error:
            raise ApiError(400, str(error)) from None
        return params

    def _grammar(self, call: Call, layout: Prompt):
        assert isinstance(call.input, Conversation)
        return answer_grammar(
            self.tokenizer, call.input.answer_format, call.input.tools, choice=call.tool_choice, name=call.tool_name,
            parallel=call.parallel_tool_calls, is_open=layout.begins_call, hosted=self.hosted,
        )  # fmt: skip

    def _reader(self, prepared: Prepared, params: SamplingParams, choice: int) -> Reader:
        call, layout = prepared.call, prepared.layout
        if isinstance(call.input, FillIn):
            return TextReader(self.tokenizer, params, choice)
        assert layout is not None
        parser = AnswerParser(
            self.tokenizer, thinking=layout.begins_thinking, must_call=layout.begins_call, tools=_all_tools(call.input),
            stop=call.stop,
        )  # fmt: skip
        return ChatReader(parser, choice)

    async def close(self) -> None:
        await asyncio.to_thread(self.loop.stop)

    # ---- about it ---------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.engine.model.parameters())
        return {
            "kind": self.kind, "context": self.context, "parameters": parameters, "thinking": True,
            "chat_trained": self.setup.is_trained,
        }  # fmt: skip

    def status(self) -> dict[str, Any]:
        memory, scheduler, o = self.engine.memory, self.engine.scheduler, self.engine.options
        pages = memory.pages.count - memory.pages.free_count
        slots = memory.slots.count - memory.slots.free_count
        arena, loop = memory.arena, self.loop
        rates = self.rate.measure()
        return {
            "id": self.name,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "max_running": o.max_running,
            "tokens_per_s": rates[0],
            "prompt_tokens_per_s": rates[1],
            "kv_cache_bytes": pages * arena.page_nbytes + slots * arena.slot_nbytes,
            "kv_cache_capacity_bytes": arena.nbytes,
            "v32_kv_cache_bytes": pages * memory.block * v32_token_nbytes(self.engine),
            "cached_tokens_total": loop.hits,
            "prompt_tokens_total": loop.prompt_tokens,
            "generated_tokens_total": loop.tokens,
            "hit_rate": loop.hits / loop.prompt_tokens if loop.prompt_tokens else 0.0,
            "disk_cache_bytes": self._disk_bytes(),
            "engine_cpu_s": loop.cpu_s,
            "failed": loop.failed is not None,
        }

    def _disk_bytes(self) -> int:
        """Of the second tier, as of at most ten seconds ago: counting it reads its whole index."""
        disk, now = self.engine.memory.disk, time.monotonic()
        if disk is not None and not self.engine.is_closed and now - self._disk_looked > 10:
            self._disk_looked, self._disk_known = now, disk.stats().bytes
        return self._disk_known


def v32_token_nbytes(engine: Engine) -> float:
    """What a token costs in the cache of a V3.2 of as many layers and this head width, in this engine's number format.

    V3.2 keeps, in every layer and for every token, a latent of 512 with 64 rotated values and an indexer key of 128: 1.375
    values for each of V4's head width of 512.
    """
    config = engine.model.config
    # Kept as this engine keeps its entries: 4, 2, or 576 + 128 bytes and their scales in the released formats.
    per_value = {"float32": 4.0, "bfloat16": 2.0, "released": 1.0}[engine.precision]
    return config.num_hidden_layers * config.head_dim * (512 + 64 + 128) / 512 * per_value


class _Rate:
    """Tokens per second between two looks at the counters, at least a second apart."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._then = (time.monotonic(), 0, 0)
        self._last = (0.0, 0.0)

    def measure(self) -> tuple[float, float]:
        """Generated and read tokens per second."""
        now, tokens, read = time.monotonic(), self._loop.tokens, self._loop.prompt_tokens
        then = self._then
        if now - then[0] >= 0.9:
            self._last = ((tokens - then[1]) / (now - then[0]), (read - then[2]) / (now - then[0]))
            self._then = (now, tokens, read)
        return self._last


@dataclass(eq=False)
class LocalReply:
    """The answer of a `LocalModel`: one ticket for each choice, one mailbox for all."""

    model: LocalModel
    prepared: Prepared
    tenant: str
    mailbox: Mailbox = field(default_factory=Mailbox)
    tickets: list[Ticket] = field(default_factory=list)
    head: Head | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    _early: list[Event] = field(default_factory=list)
    _finishes: dict[int, Finish] = field(default_factory=dict)

    async def start(self, timeout_s: float | None = None) -> Head | None:
        if self.head is None:
            self._early += await self._take(timeout_s)
            if not self._early:
                return None
            usage = self.usage
            self.head = Head(
                self.id, self.created, self.model.name, usage.prompt_tokens, usage.cached_tokens, self.model.fingerprint
            )
        return self.head

    async def next(self, timeout_s: float | None = None) -> list[Event]:
        if self._early:
            events, self._early = self._early, []
            return events
        return await self._take(timeout_s)

    async def _take(self, timeout_s: float | None) -> list[Event]:
        events = await self.mailbox.get(timeout_s)
        for event in events:
            if type(event) is Finish:
                self._finishes[event.choice] = event
                self._learn(self.tickets[event.choice])
        return events

    def _learn(self, ticket: Ticket) -> None:
        """Keep the tokens of an answer for the next turn's prompt."""
        request, reader, prompt = ticket.request, ticket.reader, self.prepared.prompt
        # A text cut at a stop string, or read with trouble, comes back as another text.
        if not isinstance(reader, ChatReader) or reader.parser.problems or reader.stop or request is None:
            return
        layout, conversation = self.prepared.layout, self.prepared.call.input
        assert layout is not None and isinstance(conversation, Conversation)
        if conversation.messages[-1].is_open:
            return  # the client puts its own beginning before the answer, in its own way
        began: list[int] = []
        if layout.begins_call:
            began = prompt[next(i for i in range(len(prompt), 0, -1) if prompt[i - 1] in self.model.limits) :]
        generated = request.tokens[request.num_prompt :]
        learn = partial(
            self.model.replay.learn,
            self.tenant,
            reader.message(),
            generated,
            thinks=layout.begins_thinking,
            began=began,
        )
        if len(generated) > 2000:  # encoding the text again takes milliseconds
            asyncio.get_running_loop().run_in_executor(None, learn)
        else:
            learn()

    @property
    def is_over(self) -> bool:
        return len(self._finishes) == self.prepared.call.n and not self._early

    @property
    def reason(self) -> str:
        return ",".join(self._finishes[choice].reason for choice in sorted(self._finishes))

    @property
    def usage(self) -> Usage:
        requests = [ticket.request for ticket in self.tickets if ticket.request is not None]
        if not requests:
            return Usage()
        done = self._finishes.values()
        # The prompt counts once: the other choices find it in the cache.
        first = requests[0]
        generated = sum(request.num_generated for request in requests)
        reasoning = sum(finish.reasoning_tokens for finish in done)
        return Usage(first.num_prompt, min(first.cached, first.num_prompt), generated, reasoning)

    @property
    def first_token_s(self) -> float | None:
        times = [ticket.first_token_s for ticket in self.tickets if ticket.first_token_s is not None]
        return min(times) if times else None

    async def cut(self) -> None:
        if self.first_token_s is None:
            self.mailbox.put([stopping()])
        await self.cancel()

    async def cancel(self) -> None:
        for ticket in self.tickets:
            self.model.loop.cancel(ticket)


def stopping() -> ApiError:
    return ApiError(
        503, "The server is stopping; try again in a moment.", type="server_error", code="server_error", retry_after_s=5
    )


def _size(call: Call) -> int:
    """About how many characters a prompt has. Every part counts at least a few: 60,000 empty messages are long too."""
    if isinstance(call.input, FillIn):
        return len(call.input.prompt) + len(call.input.suffix or "")
    told, form = call.input, call.input.answer_format
    size = sum(
        20 + len(m.content) + len(m.reasoning or "") + sum(len(c.name) + len(c.arguments) + 50 for c in m.tool_calls)
        for m in told.messages
    )
    if told.tools or form is not None:
        shapes = [tool.function for tool in told.tools], form.schema if form is not None else None
        size += len(orjson.dumps(shapes, default=dict))
    return size


def _as_enforced(conversation: Conversation) -> Conversation:
    """Strict tools with the schema that they are held to, which is what the hosted service shows the model."""
    tools = tuple(
        replace(tool, function={**tool.function, "parameters": strict_schema(tool.parameters, hosted=True)})
        if tool.strict
        else tool
        for tool in conversation.tools
    )
    return replace(conversation, tools=tools)


def _all_tools(conversation: Conversation) -> list[Tool]:
    return [*conversation.tools, *(tool for message in conversation.messages for tool in message.tools)]


def _mode(call: Call) -> str:
    if not call.thinking:
        return "plain"
    assert isinstance(call.input, Conversation)
    return "max" if call.input.effort == "max" else "thinking"


def _is_constrained(call: Call) -> bool:
    if not isinstance(call.input, Conversation):
        return False
    form: AnswerFormat | None = call.input.answer_format
    tools = call.input.tools if call.tool_choice != "none" else ()
    held = any(tool.strict for tool in tools) or (bool(tools) and not call.parallel_tool_calls)
    return form is not None or call.tool_choice in ("required", "named") or held
