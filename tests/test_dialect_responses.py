"""Responses: against DeepSeek's own package, through the real openai SDK, as Codex speaks, and under mangled bodies."""

from __future__ import annotations

import random
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
    TWO_CALLS,
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
from openai.types.responses import Response

from longreach.server.call import (
    ApiError,
    Call,
    Content,
    Event,
    Finish,
    Reasoning,
    Rules,
    TokenLogprob,
    ToolArguments,
    ToolBegin,
    ToolEnd,
    collect,
)
from longreach.server.responses import HARMLESS, RESPONSES, UNSUPPORTED

PATCH = {
    "type": "custom", "name": "apply_patch", "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
}  # fmt: skip


def message(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


def said(*texts: str) -> dict[str, Any]:
    return message("assistant", [{"type": "output_text", "text": text, "annotations": []} for text in texts])


def call_item(call_id: str = "a", **extra: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": '{"a": 1}', **extra}


def output(call_id: str = "a", **extra: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": "x", **extra}


def thought(*texts: str, **extra: Any) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content, **extra}


def tool(name: str = "f", **extra: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, **extra}


USER = message("user", "hi")
OFF = {"effort": "none"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hi", **fields}


def read(rules: Rules = LENIENT, **fields: Any) -> Call:
    return RESPONSES.read(body(**fields), rules)


def refusal(rules: Rules = LENIENT, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        RESPONSES.read(body(**fields), rules)
    return caught.value


# ---- requests, against DeepSeek's package ---------------------------------------------------------------------------


def random_request(rng: random.Random) -> dict[str, Any]:
    """A request that is meant to be accepted."""
    items: list[dict[str, Any]] = []
    for turn in range(rng.randint(1, 3)):
        items.append(rng.choice((
            USER, {"role": "user", "content": [{"type": "input_text", "text": "JSON"}, {"type": "input_text", "text": "b"}]},
            message("developer", "do"), message("system", "be"),
        )))  # fmt: skip
        if rng.random() < 0.5:
            items += [thought("one", "two")] * rng.randint(0, 2)
            items += [said("so", "and"), said("b")][: rng.randint(0, 2)]
            ids = [f"c{turn}{i}" for i in range(rng.randint(0, 3))]
            items += [call_item(i) for i in ids]
            rng.shuffle(ids)
            items += [output(i, output=rng.choice(("x", [{"type": "input_text", "text": "1"}] * 2))) for i in ids]
    request: dict[str, Any] = {"model": MODEL, "input": rng.choice((items, items, items, "json"))}
    optional: dict[str, Any] = {
        "instructions": rng.choice(("be brief", "", None)),
        "reasoning": {"effort": rng.choice(("none", "minimal", "low", "medium", "high", "xhigh", "max", None)), "summary": "auto"},
        "text": rng.choice((
            {"format": {"type": "text"}}, {"format": {"type": "json_object"}}, None, {"verbosity": "medium"},
            {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        )),
        "max_output_tokens": rng.choice((1, 500, None)),
        "temperature": rng.choice((0, 0.4, 2, None)),
        "top_p": rng.choice((0.2, 1, None)),
        "top_logprobs": rng.choice((0, 3, None)),
        "stream": rng.choice((True, False, None)),
        "tools": rng.choice((
            [tool("f", description="d"), {"type": "function", "name": "g"}], [{"type": "web_search"}, {"type": "local_shell"}],
            [{"type": "namespace", "name": "ns", "tools": [tool("f"), tool("g")]}], [],
        )),
        "tool_choice": rng.choice(("auto", "none", "required", {"type": "web_search"}, None)),
        "store": True, "background": False, "include": ["reasoning.encrypted_content"], "truncation": "auto",
        "metadata": {"a": "b"}, "user": "me", "parallel_tool_calls": False, "previous_response_id": "x", "surprise": 1,
    }  # fmt: skip
    for name, value in optional.items():
        if rng.random() < 0.3:
            request[name] = value
    return request


FAULTS: list[dict[str, Any]] = [
    {"input": None}, {"input": []}, {"input": 3}, {"instructions": 3}, {"input": [3]}, {"input": [message("bogus", "x")]},
    {"input": [{"type": "message", "content": "x"}]}, {"input": [message("user", 3)]}, {"input": [{"role": "user"}]},
    {"input": [message("user", [{"type": "text", "text": "x"}])]}, {"input": [message("user", [{"type": "input_text"}])]},
    {"input": [message("user", [{"type": "input_image", "image_url": "http://x"}])]},
    {"input": [message("user", [{"type": "input_file", "file_id": "x"}])]},
    {"input": [message("assistant", [{"type": "refusal", "refusal": "no"}]), USER]},
    {"input": [USER, call_item()]}, {"input": [USER, output()]}, {"input": [USER, call_item(), output("z")]},
    {"input": [USER, call_item(), USER, output()]}, {"input": [USER, call_item(), output(), output()]},
    {"input": [USER, call_item(), call_item(), output()]}, {"input": [USER, call_item(), thought("r"), output()]},
    {"input": [USER, call_item(), output(), call_item("b"), output("b")]}, {"input": [USER, call_item("a"), call_item("b")]},
    {"input": [USER, call_item(), output(output=None)]}, {"input": [USER, call_item(), output(output=3)]},
    {"input": [USER, call_item(), output(output=[{"type": "input_image", "image_url": "x"}])]},
    {"input": [USER, {"type": "function_call", "call_id": "a"}]}, {"input": [USER, call_item(arguments={})]},
    {"input": [{"type": "web_search_call", "id": "x", "status": "completed"}, USER]}, {"input": [thought("r"), USER]},
    {"input": [USER, {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "P"},
               {"type": "custom_tool_call_output", "call_id": "a", "output": "ok"}]},
    {"reasoning": {"effort": "zz"}}, {"reasoning": 3}, {"reasoning": {"summary": 3}},
    {"text": 3}, {"text": {"format": None}}, {"text": {"format": {"type": "zz"}}}, {"text": {"verbosity": 3}},
    {"text": {"format": {"type": "json_schema"}}}, {"text": {"format": {"type": "json_object"}}},
    {"max_output_tokens": 0}, {"max_output_tokens": 10**6}, {"max_output_tokens": "x"}, {"temperature": 3},
    {"temperature": "x"}, {"top_p": 0}, {"top_logprobs": 21}, {"top_logprobs": "x"}, {"stream": "x"}, {"user": 3},
    {"tools": 3}, {"tools": [{}]}, {"tools": [tool("a b")]}, {"tools": [tool(), tool()]}, {"tools": [tool(parameters={})]},
    {"tools": [tool(parameters=3)]}, {"tools": [tool(parameters=None)]}, {"tools": [tool(strict="x")]},
    {"tools": [{"type": "custom", "name": "zz"}]}, {"tools": [{"type": "mcp"}]},
    {"tools": [tool()], "tool_choice": "required"}, {"tools": [tool()], "tool_choice": "required", "reasoning": OFF},
    {"tools": [tool(), tool("g")], "tool_choice": {"type": "function", "name": "g"}, "reasoning": OFF},
    {"tools": [tool()], "tool_choice": {"type": "function", "name": "zz"}}, {"tools": [tool()], "tool_choice": {"type": "zz"}},
    {"tools": [tool()], "tool_choice": "zz"}, {"tools": [tool()], "tool_choice": {"type": "function"}},
    {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, {"tool_choice": "required"},
    {"tools": [tool()], "tool_choice": "required", "reasoning": OFF,
     "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}},
]  # fmt: skip


def requests_of_both_kinds(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        request = random_request(rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            request |= rng.choice(FAULTS)
        requests.append(request)
    return requests + [body(**fault) for fault in FAULTS] + [{"input": "hi"}, {"model": MODEL}]


@pytest.mark.parametrize("require_reasoning", [False, True])
def test_under_hosted_rules_the_same_requests_are_read_refused_and_worded_as_by_deepseeks_package(require_reasoning):
    rules = Rules(hosted=True, require_reasoning=require_reasoning)
    seen = {"read": 0, "rule": 0, "type": 0}
    for request in requests_of_both_kinds(1, 1200):
        theirs, what = judge(recipe.ResponsesRequest, request, require_reasoning)
        ours, call = verdict(RESPONSES, request, rules)
        assert ours == theirs, (request, what, call)
        seen[theirs] += 1
        if theirs == "read":
            assert plain(call) == conversation_of(what), request
            assert plain_options(call) == options_of(what), request
        else:
            assert call == what, request
    assert min(seen.values()) > 150, seen
