"""Messages: against DeepSeek's own package, through the real anthropic SDK, and under mangled bodies."""

from __future__ import annotations

import random
from typing import Any

import anthropic
import deepseek_recipe as recipe
import pytest
from anthropic.types import Message
from dialects import (
    ANSWERS,
    HEAD,
    HOSTED,
    LENIENT,
    MODEL,
    answer_events,
    conversation_of,
    frames,
    judge,
    options_of,
    package_stream,
    plain,
    plain_options,
    streamed,
    survives,
    transport,
    usage_of,
    verdict,
    without,
)

from longreach.server.anthropic import ANTHROPIC, HARMLESS, count_body, hosted_model
from longreach.server.call import (
    ApiError,
    Call,
    Content,
    Event,
    Finish,
    Reasoning,
    Rules,
    ToolArguments,
    ToolBegin,
    ToolEnd,
    collect,
)

USER = {"role": "user", "content": "hi"}
OFF = {"type": "disabled"}


def text(words: str = "t", **extra: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **extra}


def thought(words: str = "why") -> dict[str, Any]:
    return {"type": "thinking", "thinking": words, "signature": "s"}


def use(call_id: str = "a", **extra: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {"x": [1, "é"]}, **extra}


def result(call_id: str = "a", **extra: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": "x", **extra}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def tool(name: str = "f", **extra: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object", "properties": {}}, **extra}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], "max_tokens": 100, **fields}


def read(rules: Rules = LENIENT, **fields: Any) -> Call:
    return ANTHROPIC.read(body(**fields), rules)


def refusal(rules: Rules = LENIENT, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ANTHROPIC.read(body(**fields), rules)
    return caught.value


# ---- requests, against DeepSeek's package ---------------------------------------------------------------------------


def random_request(rng: random.Random) -> dict[str, Any]:
    """A request that is meant to be accepted."""
    messages: list[dict[str, Any]] = []
    for turn in range(rng.randint(1, 3)):
        messages.append(rng.choice((USER, user(text("a"), text("b", cache_control={"type": "ephemeral"})))))
        if rng.random() < 0.4:
            ids = [f"c{turn}{i}" for i in range(rng.randint(1, 3))]
            before = [block for block in (thought(), text("so"), thought("more")) if rng.random() < 0.5]
            messages.append(assistant(*before, *(use(i) for i in ids)))
            rng.shuffle(ids)
            contents = rng.choice(
                ("r", None, [], [text("1"), text("2")], [{"type": "image", "source": {"type": "url", "url": "x"}}])
            )
            messages.append(user(*(result(i, content=contents) for i in ids)))
            if rng.random() < 0.5:
                messages[-1]["content"].append(text("and?"))
        if rng.random() < 0.5:
            messages.append(assistant(thought(rng.choice(("", "t"))), text("yes")) if rng.random() < 0.5 else
                            {"role": "assistant", "content": rng.choice(("yes", ""))})  # fmt: skip
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(("remember", [text("a"), text("b")], []))})
    request: dict[str, Any] = {"model": MODEL, "messages": messages}
    optional: dict[str, Any] = {
        "max_tokens": rng.choice((1, 500, 10**6, None)),
        "system": rng.choice(("s", "", [text("a"), text("b")], [text("c", cache_control={"type": "ephemeral"})], [], None)),
        "thinking": rng.choice((OFF, {"type": "enabled", "budget_tokens": 5}, {"type": "adaptive"}, None)),
        "output_config": {"effort": rng.choice(("none", "low", "medium", "high", "xhigh", "max", None))},
        "temperature": rng.choice((0, 0.4, 2, None)),
        "top_p": rng.choice((0.2, 1, None)),
        "top_k": 5,
        "stop_sequences": rng.choice((["x"], [], None)),
        "stream": rng.choice((True, False, None)),
        "metadata": rng.choice(({"user_id": "u"}, {}, None)),
        "tools": [tool("f", description="d", cache_control={"type": "ephemeral"}), tool("g")],
        "tool_choice": rng.choice(({"type": "auto"}, {"type": "any"}, {"type": "none"}, {"type": "tool", "name": "g"}, None)),
        "service_tier": "auto", "container": "c", "context_management": {"edits": []}, "surprise": 1,
    }  # fmt: skip
    for name, value in optional.items():
        if rng.random() < 0.3:
            request[name] = value
    return request


FAULTS: list[dict[str, Any]] = [
    {"messages": []}, {"messages": 3}, {"messages": [3]}, {"messages": [{"role": "bogus", "content": "s"}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": None}]}, {"messages": [user()]},
    {"messages": [USER, assistant()]}, {"messages": [user("x")]}, {"messages": [user({"type": "bogus"})]},
    {"messages": [user({"type": "text"})]}, {"messages": [user(thought())]}, {"messages": [assistant(result())]},
    {"messages": [user(use())]}, {"messages": [USER, assistant({"type": "redacted_thinking", "data": "x"}), USER]},
    {"messages": [USER, assistant(use()), USER]}, {"messages": [USER, assistant(use())]}, {"messages": [user(result("x"))]},
    {"messages": [USER, assistant(use(), use("b")), user(result())]},
    {"messages": [USER, assistant(use(), use("b"), use("c")), USER]},
    {"messages": [USER, assistant(use(), use("b")), user(result("b")), user(result())]},
    {"messages": [USER, assistant(use(), use()), user(result())]},
    {"messages": [USER, assistant(use()), user(result(), result())]},
    {"messages": [USER, assistant(use()), user(result(), text(), result())]},
    {"messages": [USER, assistant(use()), user(result(), result("zz"))]},
    {"messages": [USER, assistant(use()), user(result()), user(result())]},
    {"messages": [USER, assistant(use()), user(text("first"), result())]},
    {"messages": [USER, assistant(use(), text("after")), user(result())]},
    {"messages": [USER, assistant(use()), assistant(text())]}, {"messages": [USER, assistant(use()), assistant(use("b"))]},
    {"messages": [USER, assistant(use()), {"role": "system", "content": "s"}, user(result())]},
    {"messages": [USER, assistant(use(input="x")), user(result())]}, {"messages": [USER, assistant({"type": "tool_use"})]},
    {"messages": [USER, assistant(use()), user(result(content=3))]},
    {"messages": [USER, assistant(use()), user(result(content=[{"type": "bogus"}]))]},
    {"messages": [USER, assistant({"type": "server_tool_use", "id": "x", "name": "w", "input": {}}), USER]},
    {"messages": [user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}})]},
    {"messages": [user({"type": "image"})]}, {"messages": [user({"type": "image", "source": {"type": "zz"}})]},
    {"messages": [user({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}})]},
    {"messages": [user({"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}})]},
    {"max_tokens": 0}, {"max_tokens": "x"}, {"max_tokens": -1}, {"system": 3}, {"system": ["x"]},
    {"system": [{"type": "image"}]}, {"thinking": {"type": "zz"}}, {"thinking": {}}, {"thinking": True},
    {"thinking": {"type": "enabled", "budget_tokens": "x"}}, {"output_config": {"effort": "zz"}}, {"output_config": 3},
    {"temperature": 3}, {"temperature": "x"}, {"top_p": 0}, {"stop_sequences": "a"}, {"stop_sequences": ["a"] * 17},
    {"stop_sequences": ["a", ""]}, {"stream": "x"}, {"metadata": {"user_id": 3}}, {"metadata": 3},
    {"tools": 3}, {"tools": [3]}, {"tools": [{}]}, {"tools": [tool("a b")]}, {"tools": [tool("")]}, {"tools": [tool(), tool()]},
    {"tools": [{"name": "f"}]}, {"tools": [{"name": "f", "input_schema": {}}]}, {"tools": [{"name": "f", "input_schema": 3}]},
    {"tools": [tool(type="custom")]}, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"tools": [tool(type=None)]}, {"tools": [tool(type=3)]}, {"tools": [tool(description=3)]}, {"tools": [tool("x" * 129)]},
    {"tools": [tool()], "tool_choice": {"type": "tool", "name": "f"}},
    {"tools": [tool()], "tool_choice": {"type": "tool", "name": "zz"}}, {"tools": [tool()], "tool_choice": {"type": "tool"}},
    {"tools": [tool()], "tool_choice": {"type": "zz"}}, {"tools": [tool()], "tool_choice": "auto"},
    {"tools": [tool()], "tool_choice": {"type": "any"}, "thinking": OFF}, {"tool_choice": {"type": "any"}},
]  # fmt: skip


def requests_of_both_kinds(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        request = random_request(rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            request |= rng.choice(FAULTS)
        requests.append(request)
    return requests + [body(**fault) for fault in FAULTS] + [{"messages": [USER]}, {"model": MODEL}]


@pytest.mark.parametrize("require_reasoning", [False, True])
def test_under_hosted_rules_the_same_requests_are_read_refused_and_worded_as_by_deepseeks_package(require_reasoning):
    rules = Rules(hosted=True, require_reasoning=require_reasoning)
    seen = {"read": 0, "rule": 0, "type": 0}
    for request in requests_of_both_kinds(1, 1200):
        theirs, what = judge(recipe.MessagesRequest, request, require_reasoning)
        ours, call = verdict(ANTHROPIC, request, rules)
        assert ours == theirs, (request, what, call)
        seen[theirs] += 1
        if theirs == "read":
            assert plain(call) == conversation_of(what), request
            assert plain_options(call) == options_of(what), request
        else:
            assert call == what, request
    assert min(seen.values()) > 150, seen


# ---- requests, by our own rules -------------------------------------------------------------------------------------


def test_what_claude_code_sends_is_understood():
    call = read(
        model="claude-opus-5[1m]",
        system=[text("You are", cache_control={"type": "ephemeral"}), text("an agent.")],
        messages=[
            user(text("hi", cache_control={"type": "ephemeral"})),
            assistant(thought("look"), {"type": "redacted_thinking", "data": "x"}, text("let me"), use("a"), use("b")),
            user(text("by the way"), result("b", content=[text("2")], is_error=True)), user(result("a")),
        ],
        tools=[tool(type="custom", strict=True)], tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 9000}, output_config={"effort": "max"}, top_k=40,
        metadata={"user_id": "me"}, context_management={"edits": []}, stream=True,
    )  # fmt: skip
    roles = [message.role for message in call.input.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "user"]
    assert call.input.messages[0].content == "You are\n\nan agent."
    assert call.input.messages[2].reasoning == "look"
    assert (call.model, call.input.effort, call.top_k, call.user_id) == ("claude-opus-5", "max", 40, "me")
    assert (call.tool_choice, call.parallel_tool_calls, call.input.must_call) == ("required", False, True)
    assert call.input.tools[0].strict


def test_count_tokens_needs_no_limit_and_answers_a_number():
    call = ANTHROPIC.read({"model": "m", "messages": [USER], "system": "s", "tools": [tool()]}, LENIENT)
    assert call.max_tokens is None
    assert count_body(12) == {"input_tokens": 12}


def test_claude_names_stand_for_models_of_the_hosted_service():
    names = ["claude-opus-4-8", "claude-sonnet-4", "deepseek-v4-pro", "mine"]
    assert [hosted_model(name) for name in names] == ["deepseek-v4-pro", "deepseek-flash", "deepseek-v4-pro", "mine"]


def test_without_thinking_the_answer_goes_on_from_a_last_assistant_message():
    messages = [USER, {"role": "assistant", "content": "Well,"}]
    assert read(messages=messages, thinking=OFF).input.messages[-1].is_open
    assert not read(messages=messages).input.messages[-1].is_open
    assert not read(HOSTED, messages=messages, thinking=OFF).input.messages[-1].is_open


def test_a_schema_for_the_answer_is_honoured_in_both_places_it_is_sent():
    form = {"type": "json_schema", "schema": {"type": "object"}}
    assert read(output_config={"format": form}).input.answer_format.schema == {"type": "object"}
    assert read(output_format=form).input.answer_format.kind == "json_schema"
    assert read(HOSTED, output_config={"format": form}).input.answer_format is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"messages": [user({"type": "image", "source": {"type": "url", "url": "x"}})]},
            "image blocks are not supported",
        ),
        ({"messages": [user({"type": "document", "source": {"type": "url"}})]}, "only documents of plain text"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported: the server calls no tools"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]: server tools are not supported"),
        (
            {"output_config": {"format": {"type": "xml"}}},
            'output_config.format.type must be one of json_schema, not "xml"',
        ),
        ({"messages": [USER, assistant(use()), assistant(text())]}, "messages.1: `tool_use` ids were found without"),
        ({"messages": [user()]}, "at least one message must have content"),
        ({"metadata": {"user_id": "x" * 600}}, "metadata.user_id is longer than 512 bytes"),
        ({"max_tokens": -3}, "max_tokens must be an integer of at least 0, not -3"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields, words):
    assert words in refusal(**fields).message


def test_an_image_that_a_tool_returned_does_not_end_the_conversation():
    image = {"type": "image", "source": {"type": "url", "url": "x"}}
    call = read(messages=[USER, assistant(use()), user(result(content=[text("see"), image]))])
    assert call.input.messages[-1].content == "see\n\n[Unsupported Image]"
    plain_text = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "the text"}}
    assert read(messages=[user(plain_text)]).input.messages[0].content == "the text"


def test_harmless_and_unknown_fields_are_ignored_and_reported():
    names = [name for name in HARMLESS if "." not in name and name != "metadata"]
    call = read(**dict.fromkeys(names, "given"), surprise=1)
    assert set(call.ignored) == {*names, "surprise"}


def test_a_refusal_has_the_frame_of_one_api_and_the_fields_of_the_other():
    error = ApiError(402, "Insufficient Balance", type="unknown_error")
    assert ANTHROPIC.error(error) == {
        "type": "error",
        "error": {
            "type": "billing_error", "message": "Insufficient Balance", "param": None, "code": "invalid_request_error",
        },
    }  # fmt: skip
    kinds = {400: "invalid_request_error", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"}
    for status, kind in kinds.items():
        assert ANTHROPIC.error(ApiError(status, "x"))["error"]["type"] == kind


# ---- replies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANSWERS)
def test_events_and_whole_replies_equal_those_of_deepseeks_package_field_by_field(name):
    thinking, texts, finish = ANSWERS[name]
    request = body(tools=[tool()], thinking={"type": "enabled" if thinking else "disabled"}, stream=True)
    theirs, whole = package_stream(recipe.MessagesRequest, recipe.MessagesResponse, request, texts, finish)
    call, events = ANTHROPIC.read(request, HOSTED), answer_events(name)
    assert without(frames(streamed(ANTHROPIC, call, events)), "id", "signature") == without(theirs, "id", "signature")
    ours = ANTHROPIC.whole(call, HEAD, collect(events), usage_of(events))
    assert without(ours, "id", "signature") == without(whole, "id", "signature")


def test_a_stop_sequence_is_named():
    call = read(stop_sequences=["w"], thinking=OFF, stream=True)
    events: list[Event] = [Content("ans"), Finish("stop", "w", 2)]
    theirs, whole = package_stream(
        recipe.MessagesRequest,
        recipe.MessagesResponse,
        body(stop_sequences=["w"], thinking=OFF),
        ["ans", "wer"],
        "stop",
    )
    assert without(frames(streamed(ANTHROPIC, call, events)), "id") == without(theirs, "id")
    assert (
        ANTHROPIC.whole(call, HEAD, collect(events), usage_of(events))["stop_sequence"] == whole["stop_sequence"] == "w"
    )


def test_arguments_that_are_no_object_are_not_lost():
    events: list[Event] = [ToolBegin(0, "c", "f"), ToolArguments(0, '{"a": '), Finish("length")]
    content = ANTHROPIC.whole(read(thinking=OFF), HEAD, collect(events), usage_of(events))["content"]
    assert content == [{"type": "tool_use", "id": "c", "name": "f", "input": {"arguments": '{"a": '}}]


# ---- the real SDK ---------------------------------------------------------------------------------------------------

CALLS: list[Event] = [
    Reasoning("look it "), Reasoning("up"), Content("I will"), ToolBegin(0, "call_00_x", "weather"),
    ToolArguments(0, '{"city": '), ToolArguments(0, '"Oslo"}'), ToolEnd(0), Finish("tool_calls", completion_tokens=9),
]  # fmt: skip


def sdk(answer: list[Event] | ApiError) -> anthropic.Anthropic:
    client = transport(ANTHROPIC, lambda call: answer)
    return anthropic.Anthropic(api_key="k", base_url="http://here/anthropic", http_client=client, max_retries=0)


def test_the_anthropic_sdk_reads_a_whole_reply():
    reply = sdk(CALLS).messages.create(model=MODEL, messages=[USER], max_tokens=50)
    assert [block.type for block in reply.content] == ["thinking", "text", "tool_use"]
    assert reply.content[2].input == {"city": "Oslo"}
    assert (reply.stop_reason, reply.usage.input_tokens, reply.usage.cache_read_input_tokens) == ("tool_use", 6, 4)
    call = read()
    Message.model_validate(ANTHROPIC.whole(call, HEAD, collect(CALLS), usage_of(CALLS)))


def test_the_anthropic_sdk_accumulates_a_stream_and_its_loop_goes_on():
    with sdk(CALLS).messages.stream(model=MODEL, messages=[USER], max_tokens=50) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json", "content_block_stop", "message_stop"} <= set(kinds)
    assert (message.content[0].thinking, message.content[1].text) == ("look it up", "I will")
    assert message.content[2].input == {"city": "Oslo"}
    assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", 9)
    back = [block.to_dict() for block in message.content]
    call = read(messages=[USER, assistant(*back), user(result("call_00_x"))])
    turn = call.input.messages[1]
    assert (turn.reasoning, turn.content, turn.tool_calls[0].arguments) == ("look it up", "I will", '{"city": "Oslo"}')


def test_the_anthropic_sdk_raises_the_class_of_what_was_refused():
    with pytest.raises(anthropic.BadRequestError, match="at least one message is required"):
        sdk(CALLS).messages.create(model=MODEL, messages=[], max_tokens=5)
    with pytest.raises(anthropic.RateLimitError):
        sdk(ApiError(429, "slower")).messages.create(model=MODEL, messages=[USER], max_tokens=5)
    with pytest.raises(anthropic.APIStatusError) as caught:
        sdk(ApiError(402, "Insufficient Balance")).messages.create(model=MODEL, messages=[USER], max_tokens=5)
    assert caught.value.status_code == 402


def test_the_anthropic_sdk_raises_an_error_that_comes_after_the_stream_began():
    client = sdk(ApiError(503, "went away", type="server_error", code="overloaded"))
    stream = client.messages.create(model=MODEL, messages=[USER], max_tokens=5, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="went away"):
        list(stream)


# ---- mangled bodies -------------------------------------------------------------------------------------------------


def test_two_thousand_mangled_bodies_are_read_or_refused_and_nothing_else():
    rng = random.Random(3)
    rich = body(
        messages=[USER, assistant(thought(), text(), use()), user(result(content=[text()]), text())], system=[text()],
        tools=[tool(strict=True)], output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
        thinking={"type": "enabled", "budget_tokens": 5}, stop_sequences=["a"], metadata={"user_id": "u"}, top_k=5,
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, stream=True,
    )  # fmt: skip
    bodies = [rich, *(random_request(rng) for _ in range(30)), *(body(**fault) for fault in FAULTS)]
    read_count, refused = survives(ANTHROPIC, bodies, 5, 2000)
    assert min(read_count, refused) > 150
