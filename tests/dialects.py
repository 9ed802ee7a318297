"""What the tests of the API dialects share: DeepSeek's own package as oracle, the real SDKs on our bytes, mangled bodies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import deepseek_recipe as recipe
import httpx2

from longreach.server.call import (
    ApiError,
    Call,
    Content,
    Dialect,
    Event,
    Finish,
    Head,
    Reasoning,
    Rules,
    ToolArguments,
    ToolBegin,
    ToolEnd,
    Usage,
    collect,
)

HOSTED, LENIENT = Rules(hosted=True), Rules()
MODEL = "deepseek-v4-pro"
HEAD = Head("0123456789abcdef0123456789abcdef", 1_770_000_000, MODEL, 10, 4, "fp_1")
_OPTIONS = recipe.ConversionOptions().with_model_versions_by_name({
    "deepseek-v4-pro": recipe.ModelVersion.DeepseekV4Pro, "deepseek-flash": recipe.ModelVersion.DeepseekV41Flash,
})  # fmt: skip

DSML = "｜DSML｜"
TWO_CALLS = (
    f"\n\n<{DSML}tool_calls>\n"
    f'<{DSML}invoke name="f">\n<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>\n'
    f'<{DSML}parameter name="n" string="false">2</{DSML}parameter>\n</{DSML}invoke>\n'
    f'<{DSML}invoke name="f">\n</{DSML}invoke>\n</{DSML}tool_calls>'
)

ANSWERS: dict[str, tuple[bool, list[str], str]] = {
    "reasoning and text": (True, ["thin", "king", "</think>", "ans", "wer é \"quoted\"\n"], "stop"),
    "text": (False, ["ans", "wer"], "stop"),
    "text cut short": (False, ["ans"], "length"),
    "reasoning cut short": (True, ["abc"], "length"),
    "reasoning, text and calls": (True, ["thin", "</think>", "ok", TWO_CALLS], "stop"),
    "reasoning and calls": (True, ["thin", "</think>", TWO_CALLS], "stop"),
    "calls": (False, [TWO_CALLS], "stop"),
    "nothing": (False, [], "stop"),
}  # fmt: skip
"""Whether the answer thinks, what the model writes, how it ends."""


# ---- the oracle -----------------------------------------------------------------------------------------------------


def judge(kind: type, body: Any, require_reasoning: bool = False) -> tuple[str, Any]:
    """What DeepSeek's package makes of a body: `read` with its request, `rule` with its words, or `type`."""
    behaviour = recipe.ReasoningContentBehavior
    options = _OPTIONS.with_reasoning_content_behavior(
        behaviour.Reject if require_reasoning else behaviour.FillEmpty
    )  # fmt: skip
    try:
        return "read", kind(json.dumps(body)).convert(options)
    except recipe._native.ConversionError as error:
        return "rule", json.loads(error.body)["error"]["message"]
    except ValueError:
        return "type", None


def verdict(dialect: Dialect, body: Any, rules: Rules) -> tuple[str, Any]:
    """The same of ours."""
    try:
        return "read", dialect.read(body, rules)
    except ApiError as error:
        return ("type", None) if error.status == 422 else ("rule", error.message)


def conversation_of(request: Any) -> tuple[Any, ...]:
    """A conversation of the package as plain data, comparable with `plain`."""
    conversation, thinking = request.conversation, request.conversation.thinking_mode
    messages = []
    for message in conversation.messages:
        calls = tuple((call.id, call.name, _parsed(call.arguments)) for call in message.tool_calls or ())
        reasoning = (message.reasoning_content or "") if message.role == "assistant" else ""
        messages.append((message.role, message.content, reasoning, calls, message.tool_call_id or "", message.prefix))
    tools = [] if conversation.tool_choice == "none" else [
        (tool.name, tool.description or "", tool.parameters or {}) for tool in conversation.tools
    ]  # fmt: skip
    effort = {"xhigh": "high"}.get(conversation.reasoning_effort, conversation.reasoning_effort)
    return (
        _as_shown(messages), tuple(tools), thinking, effort if thinking else None, conversation.response_format,
        conversation.response_schema, conversation.tool_choice == "required",
    )  # fmt: skip


def _parsed(arguments: str) -> Any:
    """Arguments without their spaces, which the model is not shown."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _as_shown(messages: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Messages with those merged or left out that both sides show to the model as one, or not at all."""
    result: list[tuple[Any, ...]] = []
    for message in messages:
        if message[0] == "system" and not message[1]:
            continue
        if message[0] == "user" and result and result[-1][0] == "user":
            message = ("user", f"{result.pop()[1]}\n\n{message[1]}", *message[2:])
        result.append(message)
    return tuple(result)


def plain(call: Call) -> tuple[Any, ...]:
    conversation: Any = call.input
    messages = _as_shown([
        (m.role, m.content, m.reasoning or "", tuple((c.id, c.name, _parsed(c.arguments)) for c in m.tool_calls), m.tool_call_id,
         m.is_open)
        for m in conversation.messages
    ])  # fmt: skip
    tools = tuple((t.name, t.function["description"], t.parameters) for t in conversation.tools)
    form = conversation.answer_format
    return (
        messages, tools, conversation.thinking, conversation.effort if conversation.thinking else None,
        form.kind if form else "text", form.schema if form else None, conversation.must_call,
    )  # fmt: skip


def options_of(request: Any) -> tuple[Any, ...]:
    options = request.inference_options
    return (
        options.max_tokens, round(options.temperature, 5), round(options.top_p, 5),
        (options.top_logprobs or 0) if options.logprobs else None, options.seed,
        tuple(request.parsing_options.stop_sequences), request.stream,
    )  # fmt: skip


def plain_options(call: Call) -> tuple[Any, ...]:
    return (
        call.max_tokens, round(call.temperature, 5), round(call.top_p, 5), call.logprobs, call.seed, call.stop,
        call.stream,
    )  # fmt: skip


def package_stream(kind: type, response: type, body: Any, texts: list[str], finish: str) -> tuple[list[Any], Any]:
    """The package's events for an answer, as (event name, object), and its whole reply."""
    request = kind(json.dumps(body))
    echo = request.echo() if kind is recipe.ResponsesRequest else None
    converted = request.convert(_OPTIONS)
    generator = kind.chunk_generator(converted, "ID", MODEL)
    if echo is not None:
        generator = generator.with_echo(echo)
    processor = recipe.StreamProcessor(generator, converted.parsing_options)
    usage = recipe.PromptUsage(prompt_tokens=10, prompt_cache_hit_tokens=4)
    chunks = processor.push(recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint="fp_1"))
    for text in texts:
        chunks += processor.push(recipe.InferenceChunk.text(text, 1))
    if not processor.finished:
        reason = recipe.InferenceFinishReason.Length if finish == "length" else recipe.InferenceFinishReason.Stop
        chunks += processor.push(recipe.InferenceChunk.finish(reason))
    chunks += processor.finish()
    whole = response("ID", MODEL, 1, 10, 4)
    events = [(response.sse_event_name(chunk), json.loads(chunk.to_json())) for chunk in chunks]
    for chunk in chunks:
        whole.accumulate(chunk)
    return events, json.loads(whole.to_json())


def answer_events(name: str) -> list[Event]:
    """One of `ANSWERS` as events, taken from the chunks that the package makes of it."""
    thinking, texts, finish = ANSWERS[name]
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": [chat_tool("f")],
        "thinking": {"type": "enabled" if thinking else "disabled"},
    }  # fmt: skip
    chunks, _ = package_stream(recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, body, texts, finish)
    events: list[Event] = []
    open_call: int | None = None
    for _, chunk in chunks[1:]:
        choice = chunk["choices"][0]
        delta = choice["delta"]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                if open_call is not None:
                    events.append(ToolEnd(open_call))
                open_call = call["index"]
                events.append(ToolBegin(open_call, call["id"], call["function"]["name"]))
            else:
                events.append(ToolArguments(call["index"], call["function"]["arguments"]))
        if choice["finish_reason"] is not None:
            if open_call is not None:
                events.append(ToolEnd(open_call))
            events.append(Finish(choice["finish_reason"], completion_tokens=len(texts)))
        elif delta.get("reasoning_content"):
            events.append(Reasoning(delta["reasoning_content"]))
        elif delta.get("content"):
            events.append(Content(delta["content"]))
    return events


def chat_tool(name: str, **extra: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}, **extra}}


def usage_of(events: Iterable[Event]) -> Usage:
    return Usage(10, 4, sum(e.completion_tokens for e in events if isinstance(e, Finish)))


def streamed(dialect: Dialect, call: Call, events: list[Event], usage: Usage | None = None) -> bytes:
    writer = dialect.stream(call, HEAD)
    return writer.begin() + b"".join(map(writer.event, events)) + writer.end(usage or usage_of(events))


def frames(stream: bytes) -> list[tuple[str | None, Any]]:
    """Server-sent events as (event name, object), `[DONE]` left out."""
    result = []
    for frame in stream.decode().split("\n\n"):
        lines = [line for line in frame.split("\n") if line and not line.startswith(":")]
        if not lines or lines == ["data: [DONE]"]:
            continue
        name = next((line.removeprefix("event: ") for line in lines if line.startswith("event: ")), None)
        (data,) = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
        result.append((name, json.loads(data)))
    return result


def without(value: Any, *names: str) -> Any:
    """Equal but for some keys at any depth."""
    if isinstance(value, dict):
        return {key: without(item, *names) for key, item in value.items() if key not in names}
    return [without(item, *names) for item in value] if isinstance(value, list | tuple) else value


# ---- the real SDKs --------------------------------------------------------------------------------------------------


def transport(dialect: Dialect, answer: Callable[[Call], list[Event] | ApiError]) -> httpx2.Client:
    """An HTTP client whose other end is the dialect: reads, answers with events, writes, as the server does."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        try:
            call = dialect.read(body, LENIENT)
        except ApiError as error:
            return httpx2.Response(error.status, json=dialect.error(error))
        events = answer(call)
        if isinstance(events, ApiError):
            if not call.stream:
                return httpx2.Response(events.status, json=dialect.error(events))
            writer = dialect.stream(call, HEAD)
            sent = dialect.keep_alive + writer.begin() + writer.event(Content("so f")) + writer.error(events)
            return httpx2.Response(200, content=sent, headers={"content-type": "text/event-stream"})
        usage = Usage(
            10, 4, sum(e.completion_tokens for e in events if isinstance(e, Finish)), 1 if call.thinking else 0
        )
        if call.stream:
            content = dialect.keep_alive * 2 + streamed(dialect, call, events, usage)
            return httpx2.Response(200, content=content, headers={"content-type": "text/event-stream"})
        whole = dialect.whole(call, HEAD, collect(events, call.n), usage)
        # A reply that is not streamed is kept alive by empty lines.
        content = b"\n\n" + json.dumps(whole).encode()
        return httpx2.Response(200, content=content, headers={"content-type": "application/json"})

    return httpx2.Client(transport=httpx2.MockTransport(handle))


# ---- mangling -------------------------------------------------------------------------------------------------------

_JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "\ud800", "\x00", "a" * 3000, "none", "auto", [], {}, [[]], [None], [{}], {"type": None}, {"type": "text"},
    {"": {}}, [1, "x", {}], {"x": [{"y": None}]}, {"role": "assistant"}, {"type": "function"},
]  # fmt: skip


def _deep(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


_JUNK.append(_deep(400))


def mangle(value: Any, rng: random.Random, names: list[str]) -> Any:
    """One random change somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value = dict(value)
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.35:
            del value[key]
        elif kind < 0.45:
            value[rng.choice(names)] = rng.choice(_JUNK)
        elif kind < 0.6:
            value[key] = rng.choice(_JUNK)
        else:
            value[key] = mangle(value[key], rng, names)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        value = list(value)
        i = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            del value[i]
        elif kind < 0.3:
            value.insert(i, value[rng.randrange(len(value))])
        elif kind < 0.45:
            value[i] = rng.choice(_JUNK)
        else:
            value[i] = mangle(value[i], rng, names)
        return value
    return rng.choice(_JUNK)


def survives(dialect: Dialect, bodies: list[Any], seed: int, count: int) -> tuple[int, int]:
    """How many mangled bodies were read, and how many refused. Anything else is raised.

    A refusal must fit its error body and repeat no more than a little of what was sent; what was read must be answered.
    """
    rng = random.Random(seed)
    names = sorted(
        {name for body in bodies for name in body} | {"n", "seed", "stop", "thinking", "echo", "suffix", "type"}
    )
    read = refused = 0
    for _ in range(count):
        body = rng.choice(bodies)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            body = mangle(body, rng, names)
        rules = rng.choice((HOSTED, LENIENT, Rules(hosted=True, require_reasoning=True)))
        refusal = None
        try:
            call = dialect.read(body, rules)
        except ApiError as error:
            refused += 1
            refusal = error
        else:
            read += 1
            events: list[Event] = [
                event
                for i in range(call.n)
                for event in (Reasoning("r", choice=i), Content("c", choice=i), Finish("stop", choice=i))
            ]
            streamed(dialect, call, events)
            json.dumps(dialect.whole(call, HEAD, collect(events, call.n), Usage(1, 0, 1)))
        if refusal is not None:
            assert 400 <= refusal.status < 500
            assert len(refusal.message) < 700
            json.dumps(dialect.error(refusal)).encode()
    return read, refused
