"""A model served by another engine: vLLM, SGLang or anything else with an OpenAI-compatible `/chat/completions`.

    model = UpstreamModel("pro", "http://10.0.0.5:8000/v1", remote="deepseek-ai/DeepSeek-V4-Pro", key="…")

Keys, limits, metering, routing and the page stay in front of it. A call is written as a Chat Completions request, streamed
always, and what comes back is read into the same events as those of a local model. Both spellings of the reasoning field,
`reasoning_content` and `reasoning`, are understood.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from longreach.chat.messages import AnswerFormat, Conversation, Message
from longreach.server.call import (
    ApiError,
    Call,
    Content,
    Event,
    FillIn,
    Finish,
    Head,
    Reasoning,
    TokenLogprob,
    ToolArguments,
    ToolBegin,
    ToolEnd,
    Usage,
)
from longreach.server.models import DEFAULT_TOKENS, Prepared, stopping
from longreach.server.reader import new_call_id

CONNECT_S = 10.0
SILENCE_S = 600.0
"""Seconds without a byte after which an upstream is given up."""

_FINISH = ("stop", "length", "tool_calls", "insufficient_system_resource")


class UpstreamModel:
    """A name for a model that lives elsewhere.

    Args:
        base_url: up to and with `/v1`, where the engine has it. remote: its name there.
        key: its API key, or None.
        context: tokens it can hold; the engine there is the judge.
    """

    kind = "upstream"

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        remote: str,
        key: str | None = None,
        context: int = 1 << 20,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name, self.remote, self.context = name, remote, context
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/", headers=headers, transport=transport,
            timeout=httpx.Timeout(CONNECT_S, read=SILENCE_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )  # fmt: skip
        self.running = self.tokens = self.prompt_tokens = self.hits = 0

    async def prepare(self, call: Call, tenant: str = "") -> Prepared:
        """The call with a guess at its size: four characters a token, as English text has."""
        size = max(1, len(orjson.dumps(self.body(call, ""))) // 4)
        return Prepared(call, size, call.max_tokens or DEFAULT_TOKENS["thinking" if call.thinking else "plain"])

    async def count_tokens(self, call: Call) -> int:
        return (await self.prepare(call)).prompt_tokens

    def known(self, prepared: Prepared, tenant: str) -> int:
        return 0  # its cache cannot be asked

    async def open(self, prepared: Prepared, tenant: str) -> UpstreamReply:
        """The reply to the call, which is sent as soon as somebody waits for it."""
        call = prepared.call
        path = "completions" if isinstance(call.input, FillIn) else "chat/completions"
        request = self.client.build_request("POST", path, content=orjson.dumps(self.body(call, tenant)))
        request.headers["Content-Type"] = "application/json"
        self.running += 1
        return UpstreamReply(self, prepared, request)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request and wait for the head of its answer: an engine under load may keep it back for long.

        Raises:
            ApiError: the engine cannot be reached (503) or refuses (its own 400, 422 or 429; anything else is our 502).
        """
        try:
            response = await self.client.send(request, stream=True)
        except httpx.HTTPError:
            raise ApiError(
                503, f"The engine of {self.name} cannot be reached; try again later.", type="server_error",
                code="server_error", retry_after_s=5,
            ) from None  # fmt: skip
        if response.status_code != 200:
            raise await _refusal(response, self.name)
        return response

    def body(self, call: Call, tenant: str) -> dict[str, Any]:
        """The call as a Chat Completions (or Completions) request."""
        body: dict[str, Any] = {
            "model": self.remote, "stream": True, "stream_options": {"include_usage": True},
            "temperature": call.temperature, "top_p": call.top_p,
        }  # fmt: skip
        optional = {
            "max_tokens": call.max_tokens, "stop": list(call.stop) or None, "seed": call.seed,
            "frequency_penalty": call.frequency_penalty or None, "presence_penalty": call.presence_penalty or None,
            "top_k": call.top_k or None, "min_p": call.min_p or None, "n": call.n if call.n > 1 else None,
            "repetition_penalty": call.repetition_penalty if call.repetition_penalty != 1 else None,
            "logit_bias": {str(token): bias for token, bias in call.logit_bias.items()} or None,
            # The engine's cache must not mix what our keys keep apart: vLLM and SGLang go by the first name, DeepSeek's
            # own service and a server like this one by the second.
            "cache_salt": _salt(tenant), "user_id": _salt(tenant),
        }  # fmt: skip
        body.update({name: value for name, value in optional.items() if value is not None})
        if isinstance(call.input, FillIn):
            body["prompt"] = call.input.prompt
            if call.input.suffix is not None:
                body["suffix"] = call.input.suffix
            if call.logprobs is not None:
                body["logprobs"] = call.logprobs
            return body
        if call.logprobs is not None:
            body.update(logprobs=True, top_logprobs=call.logprobs)
        body.update(_conversation(call.input, call))
        return body

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "context": self.context, "thinking": True, "chat_trained": True}

    def status(self) -> dict[str, Any]:
        return {
            "id": self.name, "running": self.running, "waiting": 0, "cached_tokens_total": self.hits,
            "prompt_tokens_total": self.prompt_tokens, "generated_tokens_total": self.tokens,
            "hit_rate": self.hits / self.prompt_tokens if self.prompt_tokens else 0.0,
        }  # fmt: skip

    async def close(self) -> None:
        await self.client.aclose()


def _salt(tenant: str) -> str | None:
    """A name for a tenant that tells nothing of it, as long as any engine takes it."""
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32] if tenant else None


def _conversation(conversation: Conversation, call: Call) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": [_message(message) for message in conversation.messages],
        "thinking": {"type": "enabled" if conversation.thinking else "disabled"},
        # vLLM and SGLang hand these to the model's own chat encoder.
        "chat_template_kwargs": {"thinking": conversation.thinking, "enable_thinking": conversation.thinking},
    }
    if conversation.thinking:
        body["reasoning_effort"] = conversation.effort
    if conversation.tools:
        body["tools"] = [
            {"type": "function", "function": dict(tool.function) | ({"strict": True} if tool.strict else {})}
            for tool in conversation.tools
        ]
        body["tool_choice"] = (
            {"type": "function", "function": {"name": call.tool_name}}
            if call.tool_choice == "named"
            else call.tool_choice
        )
        if not call.parallel_tool_calls:
            body["parallel_tool_calls"] = False
    if conversation.answer_format is not None:
        body["response_format"] = _format(conversation.answer_format)
    return body


def _message(message: Message) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        written["reasoning_content"] = written["reasoning"] = message.reasoning
    if message.tool_calls:
        written["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.role == "tool":
        written["tool_call_id"] = message.tool_call_id
    if message.is_open:
        written["prefix"] = True
    return written


def _format(form: AnswerFormat) -> dict[str, Any]:
    if form.kind == "json_schema":
        return {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(form.schema or {}), "strict": True},
        }
    if form.kind == "regex":
        return {"type": "regex", "regex": form.regex}
    return {"type": "json_object"}


async def _refusal(response: httpx.Response, name: str) -> ApiError:
    """The upstream's refusal as ours. Its words are passed on only where they are about the request."""
    content = await response.aread()
    status = response.status_code
    message = _error_message(content)
    retry = response.headers.get("Retry-After", "")
    seconds = int(retry) if retry.isdigit() else None
    if status in (400, 413, 422):
        return ApiError(status, message or "The engine refused this request.")
    if status in (429, 503):
        return ApiError(
            status, f"The engine of {name} is busy; try again later.", type="rate_limit_error",
            code="rate_limit_exceeded", retry_after_s=seconds if seconds is not None else 5,
        )  # fmt: skip
    return ApiError(
        502, f"The engine of {name} answered with status {status}.", type="server_error", code="server_error"
    )


def _error_message(content: bytes) -> str | None:
    try:
        body = json.loads(content)
    except ValueError:
        return None
    error = body.get("error", body) if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message[:500] if isinstance(message, str) else None


@dataclass(eq=False)
class UpstreamReply:
    """The answer of an `UpstreamModel`, read off its stream.

    Until the engine says how many tokens the prompt has, which most do at the end alone, our estimate stands for it: an
    answer that its client leaves is billed by it.
    """

    model: UpstreamModel
    prepared: Prepared
    request: httpx.Request
    response: httpx.Response | None = None
    head: Head | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    _lines: AsyncIterator[bytes] | None = None
    _reading: Any = None
    _usage: Mapping[str, Any] = field(default_factory=dict)
    _early: list[Event] = field(default_factory=list)
    _finishes: dict[int, tuple[str, str | None]] = field(default_factory=dict)
    _calls: dict[int, dict[int, bool]] = field(default_factory=dict)
    _generated: int = 0
    _is_over: bool = False
    _is_cut: bool = False

    async def start(self, timeout_s: float | None = None) -> Head | None:
        if self.head is None:
            self._early += await self._read(timeout_s)
            if not self._early:
                return None
            self.first_token_s = time.monotonic() - self.began
            usage = self.usage
            self.head = Head(
                self.id, self.created, self.model.name, usage.prompt_tokens, usage.cached_tokens, "fp_upstream"
            )
        return self.head

    async def next(self, timeout_s: float | None = None) -> list[Event]:
        if self._early:
            events, self._early = self._early, []
            return events
        return await self._read(timeout_s)

    @property
    def is_over(self) -> bool:
        return self._is_over and not self._early

    @property
    def call(self) -> Call:
        return self.prepared.call

    @property
    def reason(self) -> str:
        return ",".join(reason for _, (reason, _) in sorted(self._finishes.items()))

    @property
    def usage(self) -> Usage:
        if not self._usage:
            return Usage(self.prepared.prompt_tokens, 0, self._generated)
        return read_usage(self._usage, self._generated)

    async def cut(self) -> None:
        self._is_cut = True
        if self._reading is not None:
            self._reading.cancel()

    async def cancel(self) -> None:
        self._end()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        await self._hang_up()

    async def _hang_up(self) -> None:
        if self.response is not None:
            await self.response.aclose()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self.model.running -= 1
            usage = self.usage
            self.model.tokens += usage.completion_tokens
            self.model.prompt_tokens += usage.prompt_tokens
            self.model.hits += usage.cached_tokens

    async def _read(self, timeout_s: float | None) -> list[Event]:
        """The events of the next chunks that have any; nothing after `timeout_s`."""
        if self._is_over:
            return []
        if self._is_cut:
            return await self._last_events()
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read_chunk())
        done, _ = await asyncio.wait({self._reading}, timeout=timeout_s)
        if not done:
            return []
        task, self._reading = self._reading, None
        return await self._last_events() if task.cancelled() else task.result()

    async def _last_events(self) -> list[Event]:
        """Of an answer that was cut."""
        await self.cancel()
        if self.head is None:
            raise stopping()
        return [Finish("insufficient_system_resource", choice=choice) for choice in range(self.call.n)]

    async def _read_chunk(self) -> list[Event]:
        lines = self._lines
        if lines is None:
            try:
                self.response = await self.model.send(self.request)
            except ApiError:
                self._end()
                raise
            lines = self._lines = _lines(self.response)
        try:
            async for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    break
                if events := self._events(orjson.loads(data)):
                    return events
        except (httpx.HTTPError, httpx.StreamError, ValueError, AttributeError, TypeError, KeyError):
            self._end()
            await self._hang_up()
            raise self._broken() from None
        return await self._complete()

    async def _complete(self) -> list[Event]:
        """The stream is over: now the counts are known, each choice gets its `Finish`."""
        await self._hang_up()
        if len(self._finishes) < self.call.n:
            self._end()
            raise self._broken()
        self._end()
        usage = self.usage
        share = usage.completion_tokens // max(1, len(self._finishes))
        thought = usage.reasoning_tokens // max(1, len(self._finishes))
        return [
            Finish(reason if reason in _FINISH else "stop", stop, share, thought, choice)  # type: ignore[arg-type]  # one of them, as was just checked
            for choice, (reason, stop) in sorted(self._finishes.items())
        ]

    def _broken(self) -> ApiError:
        return ApiError(
            502, f"The engine of {self.model.name} broke off its answer.", type="server_error", code="server_error"
        )

    def _events(self, chunk: dict[str, Any]) -> list[Event]:
        if isinstance(chunk.get("error"), dict):
            raise TypeError("an error inside the stream")
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        events: list[Event] = []
        for choice in chunk.get("choices") or ():
            index = int(choice.get("index") or 0)
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            text = choice.get("text") if "text" in choice else delta.get("content")
            if thought or text or delta.get("tool_calls"):
                self._generated += 1
            probabilities = choice.get("logprobs") or {}
            # A token that is no whole character yet has a log-probability and no text.
            reasoned, said = _logprobs(probabilities.get("reasoning_content")), _logprobs(probabilities.get("content"))
            said = said or _legacy_logprobs(probabilities)
            if thought or reasoned:
                events.append(Reasoning(thought or "", reasoned, index))
            if text or said:
                events.append(Content(text or "", said, index))
            for call in delta.get("tool_calls") or ():
                events += self._call_events(index, call)
            if choice.get("finish_reason"):
                stop = choice.get("stop_reason")  # as vLLM names it
                self._finishes[index] = (choice["finish_reason"], stop if isinstance(stop, str) else None)
                calls = self._calls.get(index, {})
                events += [ToolEnd(number, index) for number, is_open in calls.items() if is_open]
                calls.clear()
        return events

    def _call_events(self, choice: int, call: dict[str, Any]) -> list[Event]:
        number = int(call.get("index") or 0)
        function = call.get("function") or {}
        known = self._calls.setdefault(choice, {})
        events: list[Event] = []
        if number not in known:
            events += [ToolEnd(other, choice) for other, is_open in known.items() if is_open]
            known.update(dict.fromkeys(known, False))
            known[number] = True
            events.append(ToolBegin(number, call.get("id") or new_call_id(number), function.get("name") or "", choice))
        if function.get("arguments"):
            events.append(ToolArguments(number, function["arguments"], choice))
        return events


def read_usage(usage: Mapping[str, Any], generated: int) -> Usage:
    """An OpenAI-like usage object, in DeepSeek's or OpenAI's spelling; missing counts are 0."""

    def count(*path: str) -> int:
        value: Any = usage
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, int) else 0

    prompt = count("prompt_tokens")
    hits = count("prompt_cache_hit_tokens") or count("prompt_tokens_details", "cached_tokens")
    return Usage(
        prompt, min(hits, prompt), count("completion_tokens") or generated,
        count("completion_tokens_details", "reasoning_tokens"),
    )  # fmt: skip


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of a stream of events. httpx's own also end at U+2028 and the like, which JSON may hold as they are."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _logprobs(entries: Any) -> tuple[TokenLogprob, ...]:
    if not isinstance(entries, list):
        return ()

    def one(entry: Mapping[str, Any]) -> TokenLogprob:
        spelled = entry.get("bytes")
        content = bytes(spelled) if isinstance(spelled, list) else str(entry.get("token", "")).encode()
        return TokenLogprob(
            content, float(entry["logprob"]), tuple(one(top) for top in entry.get("top_logprobs") or ())
        )

    return tuple(one(entry) for entry in entries)


def _legacy_logprobs(lists: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """The parallel lists of `/completions`, which have texts and no bytes."""
    tokens, values = lists.get("tokens"), lists.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        return ()
    tops = lists.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        TokenLogprob(
            token.encode(),
            float(value or 0.0),
            tuple(TokenLogprob(t.encode(), float(p)) for t, p in (top or {}).items()),
        )
        for token, value, top in zip(tokens, values, tops, strict=False)
    )
