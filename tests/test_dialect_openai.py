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
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
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
