"""The real server under the real openai SDK's Responses, and under the requests that Codex sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from serving import (
    LiveServer,
    ScriptedModel,
    break_answers,
    calls_text,
    live_server,
    make_engine,
    make_tokenizer,
    wait_until,
)

from longreach.server import replies
from longreach.server.call import Rules
from longreach.server.service import ServiceOptions
from longreach.server.upstream import UpstreamModel

TOKENIZER = make_tokenizer()
NONE: Any = {"effort": "none"}
PATCH = "*** Begin Patch\n*** Add File: hello.py\n+print('hello')\n*** End Patch"

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}
CLOCK: Any = {
    "type": "function",
    "name": "get_time",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
SHELL: Any = {
    "type": "function", "name": "shell", "description": "Runs a command.", "strict": False,
    "parameters": {
        "type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}},
        "required": ["command"], "additionalProperties": False,
    },
}  # fmt: skip
APPLY_PATCH: Any = {
    "type": "custom", "name": "apply_patch", "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" /(.|\\n)*/'},
}  # fmt: skip

SCRIPT = {
    "capital of France": "The user asks for a capital.</think>It is Paris.",
    "Paris, please": "I need the weather.</think>Let me look."
    + calls_text(("get_weather", {"city": "Paris", "days": 2})),
    "sunny in Paris": "The tool says sunny.</think>It will be sunny in Paris.",
    "Paris and Rome": "Two cities.</think>"
    + calls_text(("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "days": 3}), ("get_time", {})),
    "Write hello.py": "A patch.</think>I add the file." + calls_text(("apply_patch", {"input": PATCH})),
    "Success. Updated": "It worked.</think>" + calls_text(("shell", {"command": ["python", "hello.py"]})),
    '"exit_code": 0': "It runs.</think>Done.",
    "no end of text": "word " * 2000,
}


def client_of(server: LiveServer, base: str = "/v1", **options: Any) -> OpenAI:
    return OpenAI(base_url=server.url + base, **({"api_key": "not needed", "max_retries": 0, "timeout": 60} | options))


def scripted(name: str = "small", **options: Any) -> ScriptedModel:
    model = ScriptedModel(name, make_engine(TOKENIZER, **options))
    model.script.update(SCRIPT)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("responses"), scripted()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return client_of(server)


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["", "/v1"])
def test_a_response_has_a_reasoning_item_a_message_and_usage(server: LiveServer, base: str) -> None:
    response = client_of(server, base).responses.create(model="small", input="What is the capital of France?")
    reasoning, message = response.output
    assert response.output_text == "It is Paris."
    assert reasoning.type == "reasoning" and reasoning.content[0].text == "The user asks for a capital."
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (response.object, response.status, response.model) == ("response", "completed", "small")
    usage, row = response.usage, server.row(response.id)
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (
        row.hit_tokens + row.miss_tokens, row.hit_tokens
    )  # fmt: skip
    assert (usage.output_tokens, usage.output_tokens_details.reasoning_tokens) == (
        row.completion_tokens, row.reasoning_tokens
    )  # fmt: skip
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_stream_has_openais_events_with_rising_numbers_and_the_sdk_gathers_them(client: OpenAI) -> None:
    with client.responses.stream(model="small", input="What is the capital of France?") as stream:
        events = list(stream)
    response = stream.get_final_response()
    kinds = [event.type for event in events]
    order = [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]
    assert order == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
        "response.reasoning_text.delta", "response.reasoning_text.done",
        "response.content_part.done", "response.output_item.done",
        "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert response.output_text == "It is Paris." and response.usage.output_tokens > 0
    texts = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert texts == "It is Paris."


def test_effort_none_switches_thinking_off_and_instructions_come_first(server: LiveServer, client: OpenAI) -> None:
    response = client.responses.create(
        model="small", instructions="Be brief.", input="Say it", reasoning=NONE, max_output_tokens=4
    )
    assert {item.type for item in response.output} <= {"message"}
    assert server.model.prompts[-1] == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Say it<｜Assistant｜></think>"
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.instructions, response.max_output_tokens, response.reasoning.effort) == ("Be brief.", 4, "none")


def test_the_length_limit_makes_a_stream_incomplete(client: OpenAI) -> None:
    events = list(client.responses.create(model="small", input="no end of text", max_output_tokens=6, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert events[-1].response.usage.output_tokens == 6


def test_the_asynchronous_client_streams(server: LiveServer) -> None:
    async def ask() -> str:
        async with (
            AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client,
            client.responses.stream(model="small", input="What is the capital of France?") as stream,
        ):
            return (await stream.get_final_response()).output_text

    assert asyncio.run(ask()) == "It is Paris."


def test_logprobs_come_when_they_are_included(client: OpenAI) -> None:
    response = client.responses.create(
        model="small", input="What is the capital of France?", include=["message.output_text.logprobs"], top_logprobs=2
    )
    entries = response.output[-1].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries) == b"It is Paris."
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    inhabitants: int = Field(ge=0, le=99)


@pytest.mark.parametrize("reasoning", [{"effort": "none"}, {"effort": "high"}])
def test_an_untrained_model_fills_a_pydantic_model(client: OpenAI, reasoning: Any) -> None:
    response = client.responses.parse(
        model="small", input="A city", text_format=City, reasoning=reasoning, max_output_tokens=120
    )
    assert isinstance(response.output_parsed, City)


def test_json_mode_is_kept(client: OpenAI) -> None:
    response = client.responses.create(
        model="small", input="Some json", text={"format": {"type": "json_object"}}, reasoning=NONE, max_output_tokens=60
    )
    assert isinstance(json.loads(response.output_text), dict)


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_a_tool_loop_goes_round_when_the_output_is_sent_back(server: LiveServer, client: OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": "The weather in Paris, please."}]
    response = client.responses.create(model="small", input=items, tools=[WEATHER])
    call = response.output[-1]
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris", "days": 2})
    items += [*response.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny in Paris"}]
    response = client.responses.create(model="small", input=items, tools=[WEATHER])
    assert response.output_text == "It will be sunny in Paris."
    prompt = server.model.prompts[-1]
    assert "<think>I need the weather.</think>Let me look.\n\n<｜DSML｜tool_calls>" in prompt
    assert "<tool_result>sunny in Paris</tool_result>" in prompt


def test_several_streamed_calls_are_gathered(client: OpenAI) -> None:
    with client.responses.stream(
        model="small", input="The weather in Paris and Rome, and the time.", tools=[WEATHER, CLOCK]
    ) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
    calls = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "days": 3}), ("get_time", {}),
    ]  # fmt: skip
    assert [event.arguments for event in done] == [call.arguments for call in calls]
    assert len({call.call_id for call in calls}) == 3


@pytest.mark.parametrize("reasoning", [{"effort": "none"}, {"effort": "low"}])
def test_an_untrained_model_must_call_a_tool(client: OpenAI, reasoning: Any) -> None:
    response = client.responses.create(
        model="small", input="Anything", tools=[WEATHER, CLOCK], tool_choice={"type": "function", "name": "get_time"},
        reasoning=reasoning, max_output_tokens=160,
    )  # fmt: skip
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_time" and isinstance(json.loads(call.arguments), dict)


def test_hosted_rules_refuse_a_forced_call_while_thinking_and_take_it_without(tmp_path: Path) -> None:
    model = ScriptedModel("deepseek-v4-flash", make_engine(TOKENIZER), hosted=True)
    with live_server(tmp_path, model, options=ServiceOptions(rules=Rules(hosted=True))) as server:
        client = client_of(server)
        ask: Any = dict(model="deepseek-v4-flash", input="Hi", tools=[WEATHER], tool_choice="required")
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**ask)
        assert caught.value.body["message"] == "Thinking mode does not support this tool_choice"
        response = client.responses.create(**ask, reasoning=NONE, max_output_tokens=150)
        assert response.output[-1].type == "function_call"


# ---- Codex ----------------------------------------------------------------------------------------------------------


def codex(server: LiveServer, items: list[Any], **more: Any) -> list[dict[str, Any]]:
    """One request in the shape that Codex sends; the events that came back."""
    body = {
        "model": "small", "instructions": "You are a coding agent.", "input": items, "tools": [SHELL, APPLY_PATCH,
        {"type": "web_search"}, {"type": "local_shell"}], "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"}, "store": False, "stream": True,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "b7f6", "text": {"verbosity": "medium"},
    } | more  # fmt: skip
    headers = {"Authorization": "Bearer x", "Accept": "text/event-stream", "originator": "codex_cli_rs"}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        frames = [frame for frame in reply.read().decode().split("\n\n") if frame and not frame.startswith(":")]
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def items_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert events[-1]["type"] == "response.completed"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    return done


def test_codex_patches_runs_and_finishes(server: LiveServer) -> None:
    items: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: read-only."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Write hello.py"}]},
    ]
    events = codex(server, items)
    reasoning, message, patch = items_of(events)
    assert "[DONE]" not in json.dumps(events)
    assert (message["phase"], message["content"][0]["text"]) == ("commentary", "I add the file.")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    deltas = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == PATCH
    # Codex sends back the reasoning without its text, only sealed.
    items += [
        {key: value for key, value in reasoning.items() if key not in ("content", "id", "status")}, message, patch,
        {"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "Success. Updated hello.py"},
    ]  # fmt: skip
    events = codex(server, items)
    assert "<think>A patch.</think>I add the file.\n\n<｜DSML｜tool_calls>" in server.model.prompts[-1]
    reasoning, call = items_of(events)
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call", "shell", {"command": ["python", "hello.py"]},
    )  # fmt: skip
    items += [
        reasoning, call, {"type": "function_call_output", "call_id": call["call_id"], "output": '{"exit_code": 0}'},
    ]  # fmt: skip
    final = items_of(codex(server, items))
    assert (final[-1]["phase"], final[-1]["content"][0]["text"]) == ("final_answer", "Done.")
    assert "web_search" not in server.model.prompts[-1]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported: nothing is stored"),
        ({"background": True}, "background is not supported"),
        ({"input": []}, "Input items array must not be empty"),
        ({"model": "gpt-9"}, "but you passed gpt-9."),
        ({"temperature": 9}, "Invalid temperature value"),
        ({"input": "word " * 5000}, "maximum context length is 4096 tokens"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "No tool call found for tool output"),
        (
            {"tools": [{"type": "function", "name": "g", "parameters": {"type": "null"}}]},
            "Invalid schema for function 'g': schema must be a JSON Schema of 'type: \"object\"'",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_with_the_reason(client: OpenAI, change: Any, text: str, stream: bool) -> None:
    body: Any = dict(model="small", input="Hi", max_output_tokens=4, stream=stream) | change
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**body)
    assert text in caught.value.message and caught.value.type == "invalid_request_error"


def test_keys_and_money_raise_the_sdks_classes(tmp_path: Path) -> None:
    with live_server(tmp_path, scripted(), keys=({"name": "rich"}, {"name": "poor", "balance": 1})) as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server).responses.create(model="small", input="Hi")
        with pytest.raises(openai.APIStatusError) as caught:
            client_of(server, api_key=server.secrets[1]).responses.create(model="small", input="Hi", stream=True)
        assert (caught.value.status_code, caught.value.body["message"]) == (402, "Insufficient Balance")
        rich = client_of(server, api_key=server.secrets[0])
        assert rich.responses.create(model="small", input="The capital of France?").output_text == "It is Paris."


def test_an_answer_that_fails_midway_is_a_failed_response_and_raises(
    server: LiveServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_answers(server.model, monkeypatch, 5, "/home/somebody: my secret")
    monkeypatch.setattr(server.model, "delay_s", 0.01)
    seen: list[str] = []

    def read() -> None:
        for event in client.responses.create(model="small", input="no end of text", max_output_tokens=50, stream=True):
            seen.append(event.type)

    with pytest.raises(openai.APIError) as caught:
        read()
    assert "response.failed" in seen
    assert "could not finish this request" in str(caught.value)
    assert "secret" not in str(caught.value) and "/home" not in str(caught.value)


# ---- leaving, waiting, upstream -------------------------------------------------------------------------------------


def test_leaving_a_stream_stops_decoding(server: LiveServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.model, "delay_s", 0.01)
    stream = client.responses.create(model="small", input="no end of text", max_output_tokens=1500, stream=True)
    seen = [event for event, _ in zip(stream, range(10), strict=False)]
    stream.close()
    wait_until(lambda: server.running == 0, timeout_s=2)
    row = wait_until(lambda: (row := server.row(seen[0].response.id)).status != "running" and row)
    assert (row.status, row.dialect) == ("cancelled", "responses")


def test_a_queued_response_is_kept_alive_and_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.2)
    model = scripted(max_running=1)
    model.delay_s = 0.02
    with live_server(tmp_path, model) as server:
        client = client_of(server)
        for stream in (True, False):
            held = client.responses.create(model="small", input="no end of text", max_output_tokens=45, stream=True)
            next(iter(held))
            if stream:
                with client.responses.stream(model="small", input="The capital of France?") as events:
                    assert events.get_final_response().output_text == "It is Paris."
            else:
                raw = client.responses.with_raw_response.create(model="small", input="The capital of France?")
                assert raw.text.startswith("\n") and raw.parse().output_text == "It is Paris."
            held.close()


def test_responses_and_their_tools_work_through_an_upstream(server: LiveServer, tmp_path: Path) -> None:
    with live_server(tmp_path, UpstreamModel("big", f"{server.url}/v1", remote="small")) as front:
        client = client_of(front)
        items: list[Any] = [{"role": "user", "content": "The weather in Paris, please."}]
        with client.responses.stream(model="big", input=items, tools=[WEATHER]) as stream:
            response = stream.get_final_response()
        call = response.output[-1]
        assert (response.model, call.name) == ("big", "get_weather")
        items += [
            *(item.model_dump(exclude={"parsed_arguments"}) for item in response.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny in Paris"},
        ]
        assert (
            client.responses.create(model="big", input=items, tools=[WEATHER]).output_text
            == "It will be sunny in Paris."
        )
        patch = items_of(codex(front, [{"role": "user", "content": "Write hello.py"}], model="big"))[-1]
        assert (patch["type"], patch["input"]) == ("custom_tool_call", PATCH)
