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
from longreach.server.responses import RESPONSES
from longreach.server.responses_request import HARMLESS, UNSUPPORTED

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
        "reasoning": {"effort": rng.choice(("none", "minimal", "medium", "high", "xhigh", "max", None)), "summary": "auto"},
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
    {"input": [USER, call_item(), output(), USER, call_item()]},
    {"input": [USER, call_item(), output(), call_item("b"), output("b")]},
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
    {"tools": [tool(strict=True)], "reasoning": OFF,
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


# ---- requests, by our own rules -------------------------------------------------------------------------------------


def test_what_codex_sends_is_understood():
    call = read(
        instructions="You are Codex.",
        input=[
            message("developer", [{"type": "input_text", "text": "sandboxed"}]), USER,
            thought(id="rs_2", content=None, encrypted_content="opaque", summary=[{"type": "summary_text", "text": "why"}]),
            call_item("a", id="fc_1", status="completed"),
            {"type": "custom_tool_call", "call_id": "b", "name": "apply_patch", "input": "*** Begin Patch\n+é"},
            output("b", type="custom_tool_call_output"), output("a"),
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        ],
        tools=[tool(strict=False), PATCH, {"type": "local_shell"}, {"type": "web_search"},
               {"type": "namespace", "name": "ns", "tools": [tool("g")]}],
        reasoning={"effort": "low", "summary": "auto"}, store=False, stream=True, include=["reasoning.encrypted_content"],
        prompt_cache_key="k", parallel_tool_calls=False, client_metadata={}, tool_choice="auto",
    )  # fmt: skip
    told = call.input.messages
    assert [m.role for m in told] == ["system", "user", "user", "assistant", "tool", "tool"]
    assert told[3].reasoning == "why"
    assert [c.arguments for c in told[3].tool_calls] == ['{"a": 1}', '{"input": "*** Begin Patch\\n+é"}']
    assert [m.tool_call_id for m in told[4:]] == ["a", "b"]
    assert [t.name for t in call.input.tools] == ["f", "apply_patch", "ns__g"]
    patch = call.input.tools[1].function
    assert "Edits files." in patch["description"]
    assert "*** Begin Patch" in patch["description"]
    assert patch["parameters"]["required"] == ["input"]
    assert (call.input.effort, call.parallel_tool_calls, call.stream) == ("low", False, True)
    assert set(call.ignored) >= {"store", "prompt_cache_key", "client_metadata", "tools.2.type", "tools.3.type"}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(name):
    error = refusal(**{name: "given"})
    assert (error.status, error.param) == (400, name)
    assert error.message.startswith(f"{name} is not supported: ")
    assert name in read(HOSTED, **{name: "given"}).ignored


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": {"verbosity": "low"}}, "text.verbosity is not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]: item references are not supported"),
        ({"input": [message("user", [{"type": "input_image"}])]}, "parts of type input_image are not supported"),
        ({"input": [{"type": "web_search_call"}]}, "Input items array must not be empty"),
        ({"input": None}, "Either input or instructions must be provided"),
        ({"input": [USER, call_item()]}, "No tool output found for tool call a."),
        (
            {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "tools": [{"name": "z"}]}},
            'tool_choice allows "z"',
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields, words):
    assert words in refusal(**fields).message


def test_harmless_and_unknown_fields_are_ignored_and_reported():
    names = [
        name for name in HARMLESS if "." not in name and "[" not in name and name not in ("metadata", "user", "include")
    ]
    assert set(read(**dict.fromkeys(names, "given"), surprise=1).ignored) == {*names, "surprise"}


def test_any_custom_tool_and_allowed_tools_are_taken():
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "sql"}]}
    call = read(tools=[tool(), {"type": "custom", "name": "sql"}], tool_choice=choice)
    assert ([t.name for t in call.input.tools], call.tool_choice, call.input.must_call) == (["sql"], "required", True)


def test_an_image_that_a_tool_returned_does_not_end_the_conversation():
    call = read(input=[USER, call_item(), output(output=[{"type": "input_image", "image_url": "x"}])])
    assert call.input.messages[-1].content == "[Unsupported Image]"


# ---- replies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANSWERS)
def test_events_and_whole_replies_equal_those_of_deepseeks_package_field_by_field(name):
    thinking, texts, finish = ANSWERS[name]
    request = body(
        tools=[tool("f", description="d"), {"type": "web_search", "search_context_size": None, "user_location": None}],
        reasoning={"effort": "high" if thinking else "none", "summary": "auto"}, instructions="be", max_output_tokens=50,
        temperature=0.5, top_p=0.5, user="me", text={"format": {"type": "text"}, "verbosity": "low"}, stream=True,
    )  # fmt: skip
    theirs, whole = package_stream(recipe.ResponsesRequest, recipe.ResponsesResponse, request, texts, finish)
    call, events = RESPONSES.read(request, HOSTED), answer_events(name)
    varying = ("id", "item_id", "call_id", "created_at", "completed_at", "encrypted_content", "cache_write_tokens")
    stream = streamed(RESPONSES, call, events)
    ours = frames(stream)
    assert without(ours, *varying) == without(theirs, *varying)
    assert [event["sequence_number"] for _, event in ours] == list(range(len(ours)))
    assert b"[DONE]" not in stream
    replied = RESPONSES.whole(call, HEAD, collect(events), usage_of(events))
    assert without(replied, *varying) == without(whole, *varying)
    assert without(ours[-1][1]["response"], "completed_at") == without(replied, "completed_at")


def test_a_custom_tools_text_is_sent_as_text():
    call = read(tools=[PATCH], reasoning=OFF, stream=True)
    events: list[Event] = [
        ToolBegin(0, "call_00_x", "apply_patch"), ToolArguments(0, '{"input": "*** Be'), ToolArguments(0, 'gin\\n+\\"x\\""}'),
        ToolEnd(0), Finish("tool_calls"),
    ]  # fmt: skip
    dsml = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="apply_patch">\n<｜DSML｜parameter name="input" string="true">'
        '*** Begin\n+"x"</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    request = body(tools=[PATCH], reasoning=OFF)
    theirs, _ = package_stream(recipe.ResponsesRequest, recipe.ResponsesResponse, request, [dsml], "stop")
    kinds = ("response.output_item.added", "response.custom_tool_call_input.delta", "response.custom_tool_call_input.done",
             "response.output_item.done")  # fmt: skip
    varying = ("id", "item_id", "call_id")

    def of_the_call(stream: list[Any]) -> Any:
        return without([event for kind, event in stream if kind in kinds], *varying)

    ours = frames(streamed(RESPONSES, call, events))
    assert of_the_call(ours) == of_the_call(theirs)
    item = RESPONSES.whole(call, HEAD, collect(events), usage_of(events))["output"][0]
    assert (item["type"], item["input"]) == ("custom_tool_call", '*** Begin\n+"x"')
    unfinished: list[Event] = [
        ToolBegin(0, "c", "apply_patch"),
        ToolArguments(0, '{"input": "*** Be'),
        Finish("length"),
    ]
    assert frames(streamed(RESPONSES, call, unfinished))[-1][1]["response"]["output"][0]["input"] == '{"input": "*** Be'


def test_a_function_of_a_namespace_keeps_both_names():
    call = read(tools=[{"type": "namespace", "name": "ns", "tools": [tool("g")]}], reasoning=OFF)
    events: list[Event] = [ToolBegin(0, "c", "ns__g"), ToolArguments(0, "{}"), ToolEnd(0), Finish("tool_calls")]
    item = RESPONSES.whole(call, HEAD, collect(events), usage_of(events))["output"][0]
    assert (item["namespace"], item["name"]) == ("ns", "g")
    back = read(input=[USER, item, output("c")]).input.messages[1].tool_calls[0]
    assert (back.name, back.id) == ("ns__g", "c")


def test_reasoning_survives_a_client_that_sends_back_only_encrypted_content():
    call = read(include=["reasoning.encrypted_content"], stream=True)
    events: list[Event] = [Reasoning("hm, é"), Content("yes"), Finish("stop")]
    item = frames(streamed(RESPONSES, call, events))[-1][1]["response"]["output"][0]
    item["content"], item["summary"] = None, []
    assert read(input=[USER, item, said("yes"), USER]).input.messages[1].reasoning == "hm, é"
    item["encrypted_content"] = "plain:!!!"
    assert read(input=[USER, item, said("yes"), USER]).input.messages[1].reasoning == ""


def test_log_probabilities_stand_beside_the_text():
    call = read(top_logprobs=1, stream=True, reasoning=OFF)
    token = TokenLogprob(b"a", -0.5, (TokenLogprob(b"b", -1.0),))
    events: list[Event] = [Content("a", (token,)), Content("a", (token,)), Finish("stop")]
    stream = frames(streamed(RESPONSES, call, events))
    entry = {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "b", "logprob": -1.0, "bytes": [98]}],
    }
    deltas = [event for name, event in stream if name == "response.output_text.delta"]
    assert [delta["logprobs"] for delta in deltas] == [[entry], [entry]]
    assert stream[-1][1]["response"]["output"][0]["content"][0]["logprobs"] == [entry, entry]
    assert read(include=["message.output_text.logprobs"]).logprobs == 0


def test_an_answer_the_server_could_not_finish_has_failed():
    events: list[Event] = [Content("so f"), Finish("insufficient_system_resource")]
    call = read(reasoning=OFF, stream=True)
    name, event = frames(streamed(RESPONSES, call, events))[-1]
    assert (name, event["response"]["status"], event["response"]["error"]["code"]) == (
        "response.failed", "failed", "server_error",
    )  # fmt: skip


# ---- the real SDK ---------------------------------------------------------------------------------------------------

CALLS: list[Event] = [
    Reasoning("look it "), Reasoning("up"), Content("I will"), ToolBegin(0, "call_00_x", "weather"),
    ToolArguments(0, '{"city": '), ToolArguments(0, '"Oslo"}'), ToolEnd(0), Finish("tool_calls", completion_tokens=9),
]  # fmt: skip


def sdk(answer: list[Event] | ApiError) -> openai.OpenAI:
    client = transport(RESPONSES, lambda call: answer)
    return openai.OpenAI(api_key="k", base_url="http://here/v1", http_client=client, max_retries=0)


def test_the_openai_sdk_reads_a_whole_reply():
    reply = sdk([Reasoning("hm"), Content("hello"), Finish("stop", completion_tokens=3)]).responses.create(
        model=MODEL, input="hi", instructions="be kind", metadata={"a": "b"}
    )
    assert (reply.output_text, reply.status, reply.instructions, reply.metadata) == (
        "hello", "completed", "be kind", {"a": "b"},
    )  # fmt: skip
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    usage = reply.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.total_tokens) == (10, 4, 13)
    call = read()
    Response.model_validate(RESPONSES.whole(call, HEAD, collect(CALLS), usage_of(CALLS)))


def test_the_openai_sdk_accumulates_a_stream_and_its_loop_goes_on():
    weather = {"type": "function", "name": "weather", "strict": True, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False,
    }}  # fmt: skip
    with sdk(CALLS).responses.stream(model=MODEL, input="hi", tools=[weather]) as stream:
        kinds = [event.type for event in stream]
        reply = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.reasoning_text.delta") == 2
    assert [item.type for item in reply.output] == ["reasoning", "message", "function_call"]
    assert reply.output[2].parsed_arguments == {"city": "Oslo"}
    assert reply.output[1].phase == "commentary"
    back = [item.to_dict() for item in reply.output]
    for item in back:
        item.pop("parsed_arguments", None)
    turn = read(input=[USER, *back, output("call_00_x")]).input.messages[1]
    assert (turn.reasoning, turn.content, turn.tool_calls[0].arguments) == ("look it up", "I will", '{"city": "Oslo"}')


def test_the_openai_sdk_raises_what_was_refused_and_what_fails_later():
    with pytest.raises(openai.BadRequestError, match="must not be empty"):
        sdk(CALLS).responses.create(model=MODEL, input=[])
    with pytest.raises(openai.RateLimitError):
        sdk(ApiError(429, "slower")).responses.create(model=MODEL, input="hi")
    late = ApiError(503, "went away", type="server_error", code="overloaded")
    stream = sdk(late).responses.create(model=MODEL, input="hi", stream=True)
    seen: list[str] = []
    with pytest.raises(openai.APIError, match="went away"):
        seen.extend(event.type for event in stream)
    assert seen[-1] == "response.failed"


# ---- mangled bodies -------------------------------------------------------------------------------------------------


def test_two_thousand_mangled_bodies_are_read_or_refused_and_nothing_else():
    rng = random.Random(3)
    rich = body(
        input=[USER, thought("r", encrypted_content="plain:aGk="), said("b"), call_item(), output()], tools=[tool(), PATCH],
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}, instructions="i",
        reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"], stream=True, top_k=5,
        tool_choice={"type": "function", "name": "f"}, metadata={"a": "b"}, top_logprobs=2, user_id="u",
    )  # fmt: skip
    bodies = [rich, *(random_request(rng) for _ in range(30)), *(body(**fault) for fault in FAULTS)]
    read_count, refused = survives(RESPONSES, bodies, 5, 2000)
    assert min(read_count, refused) > 150
