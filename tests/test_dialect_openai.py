"""Chat Completions and Completions: against DeepSeek's own package, through the real openai SDK, and under mangled bodies."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import deepseek_recipe as recipe
import openai
import pytest
from dialects import (
    ANSWERS,
    HEAD,
    HOSTED,
    LENIENT,
    MODEL,
    answer_events,
    chat_tool,
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
from openai.types import Completion
from openai.types.chat import ChatCompletion

from longreach.server.call import (
    ApiError,
    Call,
    Content,
    Event,
    FillIn,
    Finish,
    Reasoning,
    Rules,
    TokenLogprob,
    ToolArguments,
    ToolBegin,
    ToolEnd,
    Usage,
    collect,
)
from longreach.server.openai import OPENAI_CHAT, OPENAI_COMPLETIONS, models_body
from longreach.server.openai_request import HARMLESS, UNSUPPORTED

USER = {"role": "user", "content": "hi"}
OFF = {"type": "disabled"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], **fields}


def read(rules: Rules = LENIENT, **fields: Any) -> Call:
    return OPENAI_CHAT.read(body(**fields), rules)


def refusal(rules: Rules = LENIENT, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        OPENAI_CHAT.read(body(**fields), rules)
    return caught.value


# ---- requests, against DeepSeek's package ---------------------------------------------------------------------------


def assistant_call(*ids: str, **extra: Any) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls, **extra}


def result(call_id: str, content: Any = "x") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def random_messages(rng: random.Random) -> list[dict[str, Any]]:
    def content() -> Any:
        words = rng.choice(("hi", "JSON please", "", "é\n", "two words"))
        return words if rng.random() < 0.7 else [{"type": "text", "text": words}] * rng.randint(0, 3)

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": content()})
    for turn in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": content()})
        if rng.random() < 0.4:
            ids = [f"c{turn}{i}" for i in range(rng.randint(1, 3))]
            extra = {"reasoning_content": rng.choice(("why", "", None))} if rng.random() < 0.7 else {}
            messages.append(assistant_call(*ids, **extra))
            rng.shuffle(ids)
            messages += [result(i, content()) for i in ids]
        if rng.random() < 0.6:
            messages.append({"role": "assistant", "content": rng.choice(("yes", "no", ""))})
            if rng.random() < 0.5:
                messages[-1]["reasoning_content"] = rng.choice(("thought", "", None))
    if rng.random() < 0.1:
        messages.append({"role": "latest_reminder", "content": "mind the gap"})
    elif rng.random() < 0.1:
        messages.append({"role": "assistant", "content": "and so", "prefix": True})
    return messages


def random_request(rng: random.Random) -> dict[str, Any]:
    """A request that is meant to be accepted."""
    request: dict[str, Any] = {"model": rng.choice((MODEL, "deepseek-flash")), "messages": random_messages(rng)}
    optional: dict[str, Any] = {
        "thinking": rng.choice((OFF, {"type": "enabled"}, {"type": "adaptive", "budget_tokens": 5}, None)),
        "reasoning_effort": rng.choice(("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra", None)),
        "temperature": rng.choice((0, 0.3, 1, 2, None)),
        "top_p": rng.choice((0.1, 0.97, 1, None)),
        "presence_penalty": rng.choice((-2, 0, 1.5)),
        "frequency_penalty": rng.choice((-2, 0, 1.5)),
        "max_tokens": rng.choice((1, 77, 393216, None)),
        "n": rng.choice((1, None)),
        "seed": rng.choice((0, 5, 2**63 - 1, None)),
        "stop": rng.choice(("x", ["x", "yy"], [], None)),
        "stream": rng.choice((True, False, None)),
        "logprobs": True,
        "response_format": rng.choice(({"type": "text"}, {"type": "json_object"}, None)),
        "tools": [chat_tool("f", description="d"), {"type": "function", "function": {"name": "g"}}],
        "tool_choice": rng.choice(("none", "auto", "required", None, {"type": "function", "function": {"name": "g"}})),
        "user": "me",
        "logit_bias": {"5": 1},
        "surprise": {"a": 1},
    }
    for name, value in optional.items():
        if rng.random() < 0.3:
            request[name] = value
    if request.get("logprobs") and rng.random() < 0.5:
        request["top_logprobs"] = rng.randint(0, 20)
    if request.get("stream") and rng.random() < 0.5:
        request["stream_options"] = {"include_usage": rng.random() < 0.5}
    return request


FAULTS: list[dict[str, Any]] = [
    {"messages": []}, {"messages": None}, {"messages": 3}, {"messages": [3]}, {"messages": [{}]}, {"model": 3},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": 3}]}, {"messages": [{"role": "bogus", "content": "x"}]},
    {"messages": [{"role": "developer", "content": "x"}]}, {"messages": [{"role": "system", "content": None}]},
    {"messages": [{"role": "assistant", "content": None}]}, {"messages": [{"role": "assistant"}]},
    {"messages": [USER, {"role": "tool", "content": "x"}]}, {"messages": [USER, result("a")]},
    {"messages": [USER, assistant_call("a")]}, {"messages": [USER, assistant_call("a"), result("b")]},
    {"messages": [USER, assistant_call("a", "b"), result("a")]},
    {"messages": [USER, assistant_call("a", "b"), result("a"), result("a")]},
    {"messages": [USER, assistant_call("a", "a"), result("a"), result("a")]},
    {"messages": [USER, assistant_call("a"), result("a"), result("a")]},
    {"messages": [USER, assistant_call("a"), USER, result("a")]},
    {"messages": [USER, assistant_call("a"), result("a", None)]},
    {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": []}]},
    {"messages": [USER, {"role": "assistant", "content": "x", "prefix": True}, USER]},
    {"messages": [USER, {"role": "assistant", "content": "x", "prefix": "y"}]},
    {"messages": [USER, {"role": "assistant", "content": "", "reasoning_content": 3}]},
    {"messages": [{"role": "user", "content": ["a"]}]}, {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
     "model": MODEL},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "file"}]}], "model": MODEL},
    {"thinking": True}, {"thinking": {}}, {"thinking": {"type": "zz"}}, {"thinking": {"type": 3}}, {"thinking": "enabled"},
    {"reasoning_effort": "zz"}, {"reasoning_effort": 3}, {"temperature": 3}, {"temperature": -0.1}, {"temperature": "1"},
    {"temperature": True}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": "x"}, {"presence_penalty": 5},
    {"presence_penalty": "x"}, {"frequency_penalty": -3}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 393217},
    {"max_tokens": 1.5}, {"max_tokens": 5.0}, {"max_tokens": "5"}, {"max_tokens": 10**12}, {"n": 2}, {"n": 0}, {"n": "1"},
    {"n": 300}, {"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"stop": ["a"] * 17}, {"stop": ""}, {"stop": ["a", ""]},
    {"stop": [3]}, {"stop": 3}, {"stream": "x"}, {"stream_options": {}}, {"stream": True, "stream_options": 3},
    {"stream": True, "stream_options": {"include_usage": 3}}, {"logprobs": 3}, {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}, {"logprobs": False, "top_logprobs": 0},
    {"tools": 3}, {"tools": [3]}, {"tools": [{}]}, {"tools": [{"type": "web_search"}]}, {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {}}]}, {"tools": [chat_tool("a b")]}, {"tools": [chat_tool("")]},
    {"tools": [chat_tool("f"), chat_tool("f")]}, {"tools": [chat_tool("x" * 129)]}, {"tools": [chat_tool("x" * 128)]},
    {"tools": [chat_tool("f", parameters={})]}, {"tools": [chat_tool("f", parameters=3)]},
    {"tools": [chat_tool("f", parameters={"type": "string"})]}, {"tools": [chat_tool("f", parameters=None)]},
    {"tools": [chat_tool("f", description=3)]}, {"tools": [chat_tool("f", strict="x")]},
    {"tools": [chat_tool("f")], "tool_choice": "zz"}, {"tools": [chat_tool("f")], "tool_choice": 3},
    {"tools": [chat_tool("f")], "tool_choice": "required"},
    {"tools": [chat_tool("f")], "tool_choice": "required", "thinking": OFF},
    {"tools": [chat_tool("f")], "tool_choice": {"type": "function", "function": {"name": "zzz"}}},
    {"tools": [chat_tool("f")], "tool_choice": {"type": "function"}}, {"tools": [chat_tool("f")], "tool_choice": {}},
    {"tools": [chat_tool("f")], "tool_choice": {"type": "allowed_tools"}}, {"tool_choice": "required"},
    {"tools": [chat_tool("f")], "tool_choice": "required", "thinking": OFF, "response_format": {"type": "json_object"},
     "messages": [{"role": "user", "content": "json"}]},
    {"tools": [chat_tool("f", strict=True)], "thinking": OFF, "response_format": {"type": "json_object"},
     "messages": [{"role": "user", "content": "json"}]},
    {"messages": [USER, {"role": "assistant", "content": "x", "prefix": True}], "tools": [chat_tool("f")]},
    {"messages": [{"role": "user", "content": "json"}, {"role": "assistant", "content": "x", "prefix": True}],
     "response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_object"}}, {"response_format": {"type": "zz"}}, {"response_format": {}},
    {"response_format": 3}, {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "regex"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
]  # fmt: skip


def requests_of_both_kinds(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    requests: list[dict[str, Any]] = []
    for _ in range(count):
        request = random_request(rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            request |= rng.choice(FAULTS)
        requests.append(request)
    return requests + [body(**fault) for fault in FAULTS] + [{"messages": [USER]}, {"model": MODEL}, {}]


@pytest.mark.parametrize("require_reasoning", [False, True])
def test_under_hosted_rules_the_same_requests_are_read_refused_and_worded_as_by_deepseeks_package(require_reasoning):
    rules = Rules(hosted=True, require_reasoning=require_reasoning)
    seen = {"read": 0, "rule": 0, "type": 0}
    for request in requests_of_both_kinds(1, 1200):
        theirs, what = judge(recipe.ChatCompletionRequest, request, require_reasoning)
        ours, call = verdict(OPENAI_CHAT, request, rules)
        assert ours == theirs, (request, what, call)
        seen[theirs] += 1
        if theirs == "read":
            assert plain(call) == conversation_of(what), request
            assert plain_options(call) == options_of(what), request
        else:
            assert call == what, request
    assert min(seen.values()) > 150, seen


def test_the_hosted_service_refuses_schemas_which_its_package_would_read():
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assert refusal(HOSTED, response_format=form).message == "This response_format type is unavailable now"
    assert judge(recipe.ChatCompletionRequest, body(response_format=form))[0] == "read"


# ---- requests, by our own rules -------------------------------------------------------------------------------------


def test_clients_habits_are_understood():
    call = read(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": "hi", "name": "bob"},
            assistant_call("a", reasoning="thought", content=None, tool_calls=[
                {"id": "a", "function": {"name": "f", "arguments": {"b": 1}}},
            ]),
            result("a", None),
            {"role": "assistant", "content": "x", "tool_calls": [], "reasoning_content": " ", "refusal": None},
        ],
        max_completion_tokens=5, n=16, seed=-1, top_k=-1, min_p=0.1, repetition_penalty=1.1, logit_bias={"7": -100},
        frequency_penalty=0.5, temperature=0.2, tools=[chat_tool("f", strict=True)], parallel_tool_calls=False,
        stop=["\n"], user_id="u1", top_logprobs=0, logprobs=False,
    )  # fmt: skip
    told = call.input.messages
    assert [message.role for message in told] == ["system", "user", "assistant", "tool", "assistant"]
    assert (told[2].reasoning, told[2].tool_calls[0].arguments, told[4].reasoning) == ("thought", '{"b": 1}', "")
    assert (call.max_tokens, call.n, call.seed, call.top_k, call.min_p) == (5, 16, 2**63 - 1, 0, 0.1)
    assert (call.temperature, call.frequency_penalty, call.repetition_penalty) == (0.2, 0.5, 1.1)
    assert (dict(call.logit_bias), call.parallel_tool_calls, call.user_id, call.logprobs) == (
        {7: -100.0},
        False,
        "u1",
        None,
    )
    assert call.input.tools[0].strict
    assert call.thinking and call.input.effort == "high"


@pytest.mark.parametrize(
    ("fields", "thinking", "effort"),
    [
        ({}, True, "high"),
        ({"thinking": OFF}, False, "high"),
        ({"reasoning_effort": "none"}, False, "high"),
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, True, "high"),
        ({"reasoning_effort": "ultra"}, True, "max"),
        ({"chat_template_kwargs": {"thinking": False}}, False, "high"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, "high"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, True, "low"),
        ({"chat_template_kwargs": {"thinking": False}, "thinking": {"type": "enabled"}}, True, "high"),
    ],
)
def test_thinking_and_effort_follow_whichever_word_the_client_uses(fields, thinking, effort):
    conversation = read(**fields).input
    assert (conversation.thinking, conversation.effort) == (thinking, effort)


def test_a_call_can_be_forced_while_thinking_unless_the_rules_are_the_hosted_ones():
    tools = [chat_tool("f"), chat_tool("g")]
    call = read(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})
    assert (call.tool_choice, call.tool_name, call.input.must_call, len(call.input.tools)) == ("named", "g", True, 2)
    error = refusal(HOSTED, tools=tools, tool_choice="required")
    assert error.message == "Thinking mode does not support this tool_choice"


def test_allowed_tools_hide_the_others():
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]},
    }
    call = read(tools=[chat_tool("f"), chat_tool("g")], tool_choice=choice)
    assert ([tool.name for tool in call.input.tools], call.tool_choice) == (["g"], "required")


def test_tool_choice_none_takes_the_tools_out_of_the_prompt():
    call = read(tools=[chat_tool("f")], tool_choice="none")
    assert (call.input.tools, call.tool_choice) == ((), "none")


def test_every_answer_format_is_read():
    assert read(response_format={"type": "text"}).input.answer_format is None
    assert read(response_format={"type": "json_object"}).input.answer_format.kind == "json_object"
    form = read(
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    ).input.answer_format
    assert (form.kind, form.schema) == ("json_schema", {"type": "object"})
    form = read(response_format={"type": "regex", "regex": "a+"}).input.answer_format
    assert (form.kind, form.regex) == ("regex", "a+")


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(name):
    error = refusal(**{name: "given"})
    assert error.status == 400
    assert name in error.message
    assert error.param == name
    assert read(HOSTED, **{name: "given"}).ignored == (name,)
    for neutral in UNSUPPORTED[name].neutral:
        assert read(**{name: neutral}).ignored == (name,)


def test_harmless_and_unknown_fields_are_ignored_and_reported():
    names = [name for name in HARMLESS if "." not in name]
    call = read(**dict.fromkeys(names, "given"), surprise=1, user_id="me", nothing=None, **{"bad\r\nname": 1, "é": 2})
    assert set(call.ignored) == {*names, "surprise"}


def test_a_refusal_names_the_field_what_was_given_and_what_is_allowed():
    error = refusal(temperature="hot" * 100)
    assert error.message.startswith('temperature must be a number, not "hothot')
    assert len(error.message) < 120
    assert (error.status, error.param) == (400, "temperature")
    hosted = refusal(HOSTED, temperature="hot")
    assert hosted.status == 422
    assert hosted.message.startswith("Failed to deserialize the JSON body into the target type: temperature")
    assert refusal(messages=[{"role": "user", "content": [{"type": "image_url"}]}]).message.startswith(
        "messages[0].content[0]: parts of type image_url are not supported"
    )
    assert refusal(n=17).message == "Invalid n value 17, the valid range of n is [1, 16]"
    assert "holds half of a surrogate pair" in refusal(user="\ud800").message
    assert "254 levels" in refusal(metadata=json.loads("[" * 300 + "]" * 300)).message


def test_only_the_models_name_is_beyond_this_module():
    assert read(model="anything at all").model == "anything at all"
    assert models_body(["a", "b"], created=5)["data"][1] == {
        "id": "b", "object": "model", "created": 5, "owned_by": "longreach",
    }  # fmt: skip


# ---- replies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks_for_usage", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
def test_chunks_and_whole_replies_equal_those_of_deepseeks_package_field_by_field(name, asks_for_usage):
    thinking, texts, finish = ANSWERS[name]
    request = body(tools=[chat_tool("f")], thinking={"type": "enabled" if thinking else "disabled"}, stream=True)
    if asks_for_usage:
        request["stream_options"] = {"include_usage": True}
    theirs, whole = package_stream(
        recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, request, texts, finish
    )  # fmt: skip
    call, events = OPENAI_CHAT.read(request, HOSTED), answer_events(name)
    stream = streamed(OPENAI_CHAT, call, events)
    # The package counts reasoning only where it sees token ids.
    varying = ("id", "created", "completion_tokens_details")
    assert without(frames(stream), *varying) == without(theirs, *varying)
    assert stream.endswith(b"data: [DONE]\n\n")
    ours = OPENAI_CHAT.whole(call, HEAD, collect(events), usage_of(events))
    assert without(ours, *varying) == without(whole, *varying)


def token(text: str, *others: str) -> TokenLogprob:
    top = tuple(TokenLogprob(other.encode(), -1.5) for other in others)
    return TokenLogprob(text.encode(), -0.5, top)


def test_log_probabilities_stand_beside_reasoning_and_content():
    call = read(logprobs=True, top_logprobs=1, stream=True)
    events = [
        Reasoning("r", (token("r", "q"),)),
        Content("é", (TokenLogprob(b"\xc3", -1.0), TokenLogprob(b"\xa9", -2.0))),
        Finish("stop", completion_tokens=3),
    ]
    chunks = [chunk["choices"][0]["logprobs"] for _, chunk in frames(streamed(OPENAI_CHAT, call, events))]
    entry = {
        "token": "r",
        "logprob": -0.5,
        "bytes": [114],
        "top_logprobs": [{"token": "q", "logprob": -1.5, "bytes": [113]}],
    }
    assert chunks[1] == {"reasoning_content": [entry]}
    assert [part["token"] for part in chunks[2]["content"]] == ["\\xc3", "\\xa9"]
    assert chunks[3] is None
    whole = OPENAI_CHAT.whole(call, HEAD, collect(events), Usage(1, 0, 3, 1))["choices"][0]["logprobs"]
    assert (len(whole["content"]), whole["reasoning_content"]) == (2, [entry])
    ChatCompletion.model_validate(OPENAI_CHAT.whole(call, HEAD, collect(events), Usage(1, 0, 3, 1)))


def test_with_several_answers_usage_comes_with_the_last_that_finishes():
    call = read(n=2, thinking=OFF, stream=True, stream_options={"include_usage": True})
    events: list[Event] = [
        Content("b", choice=1), Content("a", choice=0), Finish("stop", choice=1), Content("a"), Finish("length", choice=0),
    ]  # fmt: skip
    chunks = [chunk for _, chunk in frames(streamed(OPENAI_CHAT, call, events, Usage(3, 1, 4)))]
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 1, 0, 1, 0, 0]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * 6 + [False]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[4:]] == ["stop", None, "length"]
    whole = OPENAI_CHAT.whole(call, HEAD, collect(events, 2), Usage(3, 1, 4))
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["aa", "b"]


def test_a_chunk_of_text_takes_a_few_microseconds():
    writer = OPENAI_CHAT.stream(read(stream=True), HEAD)
    event = Content(" word")
    best = 1.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(2000):
            writer.event(event)
        best = min(best, (time.perf_counter() - started) / 2000)
    assert best < 6e-6


# ---- completions ----------------------------------------------------------------------------------------------------


def fim(rules: Rules = LENIENT, **fields: Any) -> Call:
    return OPENAI_COMPLETIONS.read({"model": MODEL, "prompt": "def f(", **fields}, rules)


def test_a_completion_is_read_as_editors_send_it():
    call = fim(suffix="\n", max_tokens=64, temperature=0.1, top_p=1, presence_penalty=0, stop=["\n\n"], stream=True)
    assert call.input == FillIn("def f(", "\n")
    assert (call.max_tokens, call.temperature, call.stop, call.stream, call.thinking) == (
        64,
        0.1,
        ("\n\n",),
        True,
        False,
    )
    assert fim(prompt=["one"], suffix="").input == FillIn("one")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ["a", "b"]}, "prompt holds 2 texts"),
        ({"prompt": [1, 2]}, "prompt holds token ids"),
        ({"prompt": [[1, 2]]}, "prompt holds token ids"),
        ({"prompt": None}, "prompt must be a string, not null"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported: use /chat/completions"),
        ({"logprobs": 3, "echo": True}, "logprobs together with echo"),
        ({"logprobs": 21}, "the valid range of logprobs is [0, 20]"),
    ],
)
def test_a_completion_that_cannot_be_served_is_refused_by_name(fields, words):
    with pytest.raises(ApiError) as caught:
        fim(**fields)
    assert words in caught.value.message


def test_a_completion_is_echoed_and_measured_in_the_older_form():
    events = [
        Content("né", (token("n", "m"), token("é"))),
        Content("w", (token("w"),)),
        Finish("length", completion_tokens=3),
    ]
    call = fim(logprobs=2, stream=True)
    chunks = [chunk for _, chunk in frames(streamed(OPENAI_COMPLETIONS, call, events))]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["né", "w", ""]
    assert chunks[0]["choices"][0]["logprobs"] == {
        "tokens": ["n", "é"], "token_logprobs": [-0.5, -0.5], "top_logprobs": [{"m": -1.5}, {}], "text_offset": [0, 1],
    }  # fmt: skip
    assert chunks[1]["choices"][0]["logprobs"]["text_offset"] == [2]
    assert chunks[2]["usage"]["total_tokens"] == 13
    echoed = fim(echo=True)
    whole = OPENAI_COMPLETIONS.whole(echoed, HEAD, collect(events), usage_of(events))
    assert whole["choices"][0]["text"] == "def f(néw"
    assert Completion.model_validate(whole).choices[0].finish_reason == "length"
    assert frames(OPENAI_COMPLETIONS.stream(echoed, HEAD).begin())[0][1]["choices"][0]["text"] == "def f("


# ---- the real SDK ---------------------------------------------------------------------------------------------------

CALLS: list[Event] = [
    Reasoning("look it up"), ToolBegin(0, "call_00_x", "weather"), ToolArguments(0, '{"city": '), ToolArguments(0, '"Oslo"}'),
    ToolEnd(0), Finish("tool_calls", completion_tokens=9),
]  # fmt: skip
SPEECH: list[Event] = [
    Reasoning("hm"),
    Reasoning("m"),
    Content("he"),
    Content("llo"),
    Finish("stop", completion_tokens=5),
]


def sdk(answer: list[Event] | ApiError, dialect: Any = OPENAI_CHAT) -> openai.OpenAI:
    client = transport(dialect, lambda call: answer)
    return openai.OpenAI(api_key="k", base_url="http://here/v1", http_client=client, max_retries=0)


def test_the_openai_sdk_reads_a_whole_reply():
    reply = sdk(SPEECH).chat.completions.create(
        model=MODEL, messages=[USER], extra_body={"thinking": {"type": "enabled"}}
    )
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content, reply.choices[0].finish_reason) == ("hello", "hmm", "stop")
    assert (reply.usage.prompt_tokens, reply.usage.prompt_cache_hit_tokens, reply.usage.prompt_cache_miss_tokens) == (
        10,
        4,
        6,
    )
    assert reply.usage.completion_tokens_details.reasoning_tokens == 1
    assert reply.usage.prompt_tokens_details.cached_tokens == 4


def test_the_openai_sdk_streams_chunks():
    chunks = list(
        sdk(SPEECH).chat.completions.create(
            model=MODEL, messages=[USER], stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hmm"
    assert "".join(delta.content or "" for delta in deltas) == "hello"
    assert [chunk.usage is None for chunk in chunks] == [True] * 5 + [False]


def test_the_openai_sdk_accumulates_a_tool_call_and_its_loop_goes_on():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False,
    }, "strict": True}}]  # fmt: skip
    with sdk(CALLS).chat.completions.stream(model=MODEL, messages=[USER], tools=tools) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Oslo"}
    history = [USER, message.to_dict(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    heard: list[Call] = []
    client = transport(OPENAI_CHAT, lambda call: heard.append(call) or SPEECH)
    openai.OpenAI(api_key="k", base_url="http://here", http_client=client).chat.completions.create(
        model=MODEL, messages=history, tools=tools
    )
    assistant = heard[0].input.messages[1]
    assert (assistant.reasoning, assistant.tool_calls[0].arguments) == ("look it up", '{"city": "Oslo"}')


def test_the_openai_sdk_parses_json_of_a_schema():
    events = [Content('{"city": "Oslo"}'), Finish("stop")]
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": {"type": "object"}, "strict": True}}
    reply = sdk(events).chat.completions.create(model=MODEL, messages=[USER], response_format=form)
    assert json.loads(reply.choices[0].message.content) == {"city": "Oslo"}


def test_the_openai_sdk_raises_what_was_refused():
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(SPEECH).chat.completions.create(model=MODEL, messages=[], stream=True)
    assert caught.value.body["message"] == "Empty input messages"
    assert caught.value.code == "invalid_request_error"
    with pytest.raises(openai.RateLimitError):
        sdk(ApiError(429, "slower")).chat.completions.create(model=MODEL, messages=[USER])
    poor = ApiError(402, "Insufficient Balance", type="unknown_error")
    with pytest.raises(openai.APIStatusError) as refused:
        sdk(poor).chat.completions.create(model=MODEL, messages=[USER])
    assert refused.value.status_code == 402


@pytest.mark.parametrize("dialect", [OPENAI_CHAT, OPENAI_COMPLETIONS])
def test_the_openai_sdk_raises_an_error_that_comes_after_the_stream_began(dialect):
    client = sdk(ApiError(503, "went away", type="server_error", code="overloaded"), dialect)
    if dialect is OPENAI_CHAT:
        stream: Any = client.chat.completions.create(model=MODEL, messages=[USER], stream=True)
    else:
        stream = client.completions.create(model=MODEL, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="went away"):
        list(stream)


def test_the_openai_sdk_completes_a_text():
    client = sdk([Content("x):"), Finish("stop", completion_tokens=1)], OPENAI_COMPLETIONS)
    reply = client.completions.create(model=MODEL, prompt="def f(", suffix="\n    return x")
    assert (reply.choices[0].text, reply.usage.total_tokens) == ("x):", 11)
    pieces = list(client.completions.create(model=MODEL, prompt="def f(", stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == "x):"


# ---- mangled bodies -------------------------------------------------------------------------------------------------


def test_two_thousand_mangled_chats_are_read_or_refused_and_nothing_else():
    rng = random.Random(3)
    rich = body(
        messages=[*random_messages(rng), USER, assistant_call("a"), result("a")], tools=[chat_tool("f", strict=True)],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        logit_bias={"5": 1}, stop=["a"], stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2,
        chat_template_kwargs={"thinking": True}, tool_choice={"type": "function", "function": {"name": "f"}}, user_id="u",
    )  # fmt: skip
    bodies = [rich, *(random_request(rng) for _ in range(30)), *(body(**fault) for fault in FAULTS)]
    read_count, refused = survives(OPENAI_CHAT, bodies, 5, 2000)
    assert min(read_count, refused) > 150


def test_two_thousand_mangled_completions_are_read_or_refused_and_nothing_else():
    request = {"model": MODEL, "prompt": "x", "suffix": "y", "logprobs": 2, "echo": False, "n": 2, "stop": ["a", "b"],
               "logit_bias": {"5": 1}, "stream": True, "stream_options": {"include_usage": True}, "top_k": 3}  # fmt: skip
    read_count, refused = survives(OPENAI_COMPLETIONS, [request], 7, 2000)
    assert min(read_count, refused) > 150
