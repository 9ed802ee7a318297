"""The real server under the real anthropic SDK, used as its users and Claude Code use it: Messages, tokens, errors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel
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
from longreach.server.app import AppOptions
from longreach.server.call import Rules
from longreach.server.service import ServiceOptions

TOKENIZER = make_tokenizer()
OFF: Any = {"type": "disabled"}
STRIPPED = "The `content[].thinking` in the thinking mode must be passed back to the API."

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CLOCK: Any = {"name": "get_time", "input_schema": {"type": "object", "properties": {}}}

SCRIPT = {
    "capital of France": "The user asks for a capital.</think>It is Paris.",
    "Paris, please": "I need the weather.</think>Let me look."
    + calls_text(("get_weather", {"city": "Paris", "days": 2})),
    "sunny in Paris": "The tool says sunny.</think>It will be sunny in Paris.",
    "Paris and Rome": "Two cities.</think>"
    + calls_text(("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "days": 3}), ("get_time", {})),
    "rain in Rome": "Both are known.</think>Sunny in Paris, rain in Rome.",
    "count to five": "1 2 3 4 5 END</think>1 2 3 4 5 END 6 7 8",
    "go on from here": "blue.",
    "no end of text": "word " * 2000,
}


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def client_of(server: LiveServer, base: str = "/anthropic", **options: Any) -> Anthropic:
    return Anthropic(
        base_url=server.url + base, **({"api_key": "not needed", "max_retries": 0, "timeout": 60} | options)
    )


def scripted(name: str = "small", **options: Any) -> ScriptedModel:
    model = ScriptedModel(name, make_engine(TOKENIZER, **options))
    model.script.update(SCRIPT)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("anthropic"), scripted()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Anthropic:
    return client_of(server)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_message_has_a_sealed_thinking_block_a_text_block_and_usage(server: LiveServer, client: Anthropic) -> None:
    message = client.messages.create(model="small", max_tokens=200, messages=say("What is the capital of France?"))
    thinking, text = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "The user asks for a capital.") and thinking.signature
    assert (text.type, text.text) == ("text", "It is Paris.")
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        "small",
        "end_turn",
    )
    usage, row = message.usage, server.row(message.id)
    assert usage.cache_creation_input_tokens == 0 and usage.service_tier == "standard"
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (
        row.miss_tokens, row.hit_tokens, row.completion_tokens
    )  # fmt: skip


def test_a_stream_has_anthropics_events_in_order_and_the_sdk_gathers_them(client: Anthropic) -> None:
    with client.messages.stream(
        model="small", max_tokens=200, messages=say("What is the capital of France?"),
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream if event.type not in ("thinking", "text", "signature")]
    message = stream.get_final_message()
    order = [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]
    assert order == [
        "message_start",
        "content_block_start", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "The user asks for a capital." and message.content[0].signature
    assert stream.get_final_text() == "It is Paris."
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0


def test_every_frame_of_a_stream_is_named_and_none_is_done(server: LiveServer) -> None:
    body = {"model": "small", "max_tokens": 200, "messages": say("What is the capital of France?"), "stream": True}
    reply = httpx.post(f"{server.url}/v1/messages", json=body, timeout=30)
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = reply.text.strip().split("\n\n")
    for frame in frames:
        name, data = frame.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert "event: ping" in reply.text and "[DONE]" not in reply.text


def test_text_arrives_piece_by_piece(client: Anthropic) -> None:
    with client.messages.stream(
        model="small", max_tokens=200, messages=say("What is the capital of France?")
    ) as stream:
        pieces = list(stream.text_stream)
    assert len(pieces) > 1 and "".join(pieces) == "It is Paris."


def test_without_thinking_there_is_no_thinking_block(server: LiveServer, client: Anthropic) -> None:
    message = client.messages.create(model="small", max_tokens=5, messages=say("Talk"), thinking=OFF)
    assert {block.type for block in message.content} <= {"text"}
    assert server.model.prompts[-1].endswith("<｜Assistant｜></think>")


def test_stop_sequences_and_the_limit_are_told_as_reasons(client: Anthropic) -> None:
    message = client.messages.create(
        model="small", max_tokens=200, messages=say("count to five"), stop_sequences=["4 5 E", " END"]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "4 5 E")
    assert message.content[0].thinking == "1 2 3 4 5 END" and message.content[1].text == "1 2 3 "
    message = client.messages.create(model="small", max_tokens=5, messages=say("no end of text"))
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)


def test_a_last_assistant_message_is_gone_on_from(server: LiveServer, client: Anthropic) -> None:
    messages = [*say("go on from here"), {"role": "assistant", "content": "The sky is "}]
    message = client.messages.create(model="small", max_tokens=50, messages=messages, thinking=OFF)
    assert message.content[0].text == "blue."
    assert server.model.prompts[-1].endswith("</think>The sky is ")


def test_the_asynchronous_client_streams(server: LiveServer) -> None:
    async def ask() -> str:
        async with (
            AsyncAnthropic(base_url=server.url, api_key="x", max_retries=0) as client,
            client.messages.stream(
                model="small", max_tokens=200, messages=say("What is the capital of France?")
            ) as stream,
        ):
            return await stream.get_final_text()

    assert asyncio.run(ask()) == "It is Paris."


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    large: bool


@pytest.mark.parametrize("stream", [False, True])
def test_an_untrained_model_fills_a_pydantic_model(client: Anthropic, stream: bool) -> None:
    options: Any = dict(model="small", max_tokens=120, messages=say("A city"), output_format=City)
    if stream:
        with client.messages.stream(**options) as events:
            message = events.get_final_message()
    else:
        message = client.messages.parse(**options)
    assert isinstance(message.parsed_output, City)


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_a_streamed_tool_loop_goes_round_with_its_thinking(server: LiveServer, client: Anthropic) -> None:
    messages = say("The weather in Paris, please.")
    with client.messages.stream(model="small", max_tokens=300, messages=messages, tools=[WEATHER]) as stream:
        partial = "".join(event.partial_json for event in stream if event.type == "input_json")
    message = stream.get_final_message()
    thinking, text, use = message.content
    assert (thinking.thinking, text.text) == ("I need the weather.", "Let me look.")
    assert (use.type, use.name, use.input) == ("tool_use", "get_weather", {"city": "Paris", "days": 2})
    assert json.loads(partial) == use.input and message.stop_reason == "tool_use"
    messages += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny in Paris"}]},
    ]
    final = client.messages.create(model="small", max_tokens=300, messages=messages, tools=[WEATHER])
    assert final.content[-1].text == "It will be sunny in Paris."
    prompt = server.model.prompts[-1]
    assert "<think>I need the weather.</think>Let me look.\n\n<｜DSML｜tool_calls>" in prompt
    assert "<tool_result>sunny in Paris</tool_result>" in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_several_calls_come_at_once_and_their_results_may_come_in_any_order(
    server: LiveServer, client: Anthropic, stream: bool
) -> None:
    options: Any = dict(
        model="small",
        max_tokens=400,
        messages=say("The weather in Paris and Rome, and the time."),
        tools=[WEATHER, CLOCK],
    )
    if stream:
        with client.messages.stream(**options) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**options)
    uses = [block for block in message.content if block.type == "tool_use"]
    assert [(use.name, use.input) for use in uses] == [
        ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "days": 3}), ("get_time", {}),
    ]  # fmt: skip
    results = [
        {"type": "tool_result", "tool_use_id": uses[2].id, "content": [{"type": "text", "text": "noon"}]},
        {"type": "tool_result", "tool_use_id": uses[1].id, "content": "rain in Rome"},
        {"type": "tool_result", "tool_use_id": uses[0].id, "content": "no such city", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    options["messages"] += [
        {"role": "assistant", "content": message.content}, {"role": "user", "content": results},
    ]  # fmt: skip
    final = client.messages.create(**options)
    assert final.content[-1].text == "Sunny in Paris, rain in Rome."
    prompt = server.model.prompts[-1]
    assert (
        prompt.index("no such city</tool_result>") < prompt.index("rain in Rome</tool_result>") < prompt.index("noon</")
    )


def stripped_loop() -> list[Any]:
    return [
        *say("The weather in Paris?"),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sunny in Paris"}]},
    ]  # fmt: skip


def test_a_tool_loop_without_its_thinking_goes_on_unless_it_is_required(client: Anthropic, tmp_path: Path) -> None:
    message = client.messages.create(model="small", max_tokens=200, messages=stripped_loop(), tools=[WEATHER])
    assert message.content[-1].text == "It will be sunny in Paris."
    with live_server(tmp_path, scripted(), options=ServiceOptions(rules=Rules(require_reasoning=True))) as strict:
        with pytest.raises(anthropic.BadRequestError) as caught:
            client_of(strict).messages.create(model="small", max_tokens=9, messages=stripped_loop(), tools=[WEATHER])
        assert caught.value.body["error"]["message"] == STRIPPED
        off = client_of(strict).messages.create(
            model="small", max_tokens=1, messages=stripped_loop(), tools=[WEATHER], thinking=OFF
        )
        assert off.stop_reason == "max_tokens"


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_time"}])
def test_an_untrained_model_must_call_a_tool(client: Anthropic, thinking: str, choice: Any) -> None:
    how: Any = {"type": thinking} | ({"budget_tokens": 1024} if thinking == "enabled" else {})
    message = client.messages.create(
        model="small", max_tokens=160, messages=say("Anything"), tools=[CLOCK], tool_choice=choice, thinking=how
    )
    uses = [block for block in message.content if block.type == "tool_use"]
    assert uses and {use.name for use in uses} == {"get_time"} and message.stop_reason == "tool_use"


def test_with_tool_choice_none_the_model_is_not_shown_the_tools(server: LiveServer, client: Anthropic) -> None:
    client.messages.create(
        model="small", max_tokens=1, messages=say("Just talk"), tools=[WEATHER], tool_choice={"type": "none"}
    )
    assert "get_weather" not in server.model.prompts[-1]


def test_hosted_rules_refuse_a_named_tool_while_thinking_and_server_tools(tmp_path: Path) -> None:
    model = ScriptedModel("deepseek-v4-flash", make_engine(TOKENIZER), hosted=True)
    with live_server(tmp_path, model, options=ServiceOptions(rules=Rules(hosted=True))) as server:
        client = client_of(server)
        refused: list[tuple[dict[str, Any], str]] = [
            (
                {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}},
                "Thinking mode does not support this tool_choice",
            ),
            (
                {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
                "tools[0]: server tools are not supported",
            ),
            ({"messages": []}, "messages: at least one message is required"),
        ]
        for change, text in refused:
            body = {"model": "deepseek-v4-flash", "max_tokens": 9, "messages": say("Hi")} | change
            with pytest.raises(anthropic.BadRequestError) as caught:
                client.messages.create(**body)
            assert caught.value.body["error"]["message"] == text


# ---- Claude Code ----------------------------------------------------------------------------------------------------


def test_claude_codes_first_request_is_served_with_pings_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.3)
    model = ScriptedModel("small", make_engine(TOKENIZER, context=32768, memory_gib=0.2))
    model.script["What is in this repository?"] = "Many files.</think>A language model."
    instructions = "You are an agent. " * 2000
    size = len(TOKENIZER.encode(instructions))
    assert 14_000 < size < 32_000
    request: Any = dict(
        model="claude-opus-4-8[1m]", max_tokens=3000,
        system=[
            {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": instructions, "cache_control": {"type": "ephemeral"}},
        ],
        messages=[{"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>\nToday is Friday.\n</system-reminder>"},
            {"type": "text", "text": "What is in this repository?", "cache_control": {"type": "ephemeral"}},
        ]}],
        tools=[WEATHER | {"cache_control": {"type": "ephemeral"}}, CLOCK],
        metadata={"user_id": "user_abc_account__session_1"}, thinking={"type": "adaptive"},
        output_config={"effort": "high"},
    )  # fmt: skip
    headers = {"anthropic-beta": "claude-code-20250219,context-1m-2025-08-07"}
    with live_server(tmp_path, model, keys=({"name": "me"},)) as server:
        client = Anthropic(base_url=server.url + "/anthropic", auth_token=server.secrets[0], max_retries=0, timeout=60)
        counted = client.messages.count_tokens(
            **{name: request[name] for name in ("model", "system", "messages", "tools", "thinking")}
        )
        assert counted.input_tokens > size
        began = time.monotonic()
        first_byte_s, pings = 0.0, 0
        with client.messages.with_streaming_response.create(stream=True, extra_headers=headers, **request) as raw:
            for line in raw.iter_lines():
                first_byte_s = first_byte_s or time.monotonic() - began
                pings += line == "event: ping"
        assert first_byte_s < 1.0 and pings >= 2
        with client.messages.stream(extra_headers=headers, **request) as stream:
            message = stream.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[1].text == "A language model."
        usage = message.usage
        # count_tokens was asked without the effort and the user, which change nothing here.
        assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
        assert usage.cache_read_input_tokens > counted.input_tokens - 128
        row = server.row(message.id)
        assert (row.model, row.answered_by, row.user_id) == ("deepseek-v4-pro", "small", "user_abc_account__session_1")


def test_claude_names_go_to_deepseeks_models_and_other_names_are_refused(tmp_path: Path) -> None:
    small, large = scripted("deepseek-v4-flash"), scripted("deepseek-v4-pro", seed=2)
    small.script["capital of France"] = "small</think>small says Paris."
    large.script["capital of France"] = "large</think>large says Paris."
    with live_server(tmp_path, small, large) as server:
        client = client_of(server)
        for name, text in (
            ("claude-opus-4-8", "large says Paris."), ("claude-sonnet-5", "small says Paris."),
            ("claude-haiku-4-5-20251001", "small says Paris."), ("deepseek-v4-pro[1m]", "large says Paris."),
        ):  # fmt: skip
            message = client.messages.create(model=name, max_tokens=99, messages=say("The capital of France?"))
            assert message.content[1].text == text
        with pytest.raises(anthropic.BadRequestError, match="but you passed gpt-9"):
            client.messages.create(model="gpt-9", max_tokens=9, messages=say("Hi"))
        with pytest.raises(anthropic.BadRequestError, match="but you passed gpt-9"):
            client.messages.count_tokens(model="gpt-9", messages=say("Hi"))


def test_the_users_of_one_key_have_caches_of_their_own(client: Anthropic) -> None:
    def hits(user: str) -> int:
        return client.messages.create(
            model="small", max_tokens=1, messages=say("A long letter. " * 30), metadata={"user_id": user}
        ).usage.cache_read_input_tokens  # fmt: skip

    assert hits("first") == 0
    assert hits("first") > 100
    assert hits("second") == 0


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 3}, "Invalid temperature value, the valid range of temperature is [0, 2]"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": say("word " * 5000)}, "maximum context length is 4096 tokens"),
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "picture"}]}]}, "must be one of text"),
        ({"tools": [WEATHER, WEATHER]}, "Tool names must be unique."),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}]},
            "unexpected `messages.0.content.0: tool_use_id` found in `tool_result` blocks: x. Each `tool_result` block must "
            "have a corresponding `tool_use` block in the previous message.",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_with_the_reason(client: Anthropic, change: Any, text: str, stream: bool) -> None:
    given = {"model": "small", "max_tokens": 9, "messages": say("Hi"), "stream": stream} | change
    extra = {name: given.pop(name) for name in list(given) if name in ("mcp_servers", "temperature")}
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**given, extra_body=extra)
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert text in body["error"]["message"]


def test_keys_money_and_limits_raise_the_class_each_has_in_the_sdk(tmp_path: Path) -> None:
    keys = ({"name": "rich"}, {"name": "poor", "balance": 1}, {"name": "narrow", "concurrency": 1})
    model = scripted()
    with live_server(tmp_path, model, keys=keys, app=AppOptions(max_body_bytes=50_000)) as server:
        rich, poor, narrow = server.secrets
        ask: Any = dict(model="small", max_tokens=200, messages=say("What is the capital of France?"))
        for key in ({"api_key": rich}, {"auth_token": rich, "api_key": None}):
            assert client_of(server, **key).messages.create(**ask).content[1].text == "It is Paris."
        header = httpx.post(f"{server.url}/v1/messages", json=ask, headers={"x-api-key": rich}, timeout=30)
        assert header.status_code == 200 and header.json()["content"][1]["text"] == "It is Paris."
        with pytest.raises(anthropic.AuthenticationError) as wrong:
            client_of(server, api_key="sk-lr-nobody").messages.create(**ask)
        assert wrong.value.body["error"]["type"] == "authentication_error" and "nobody" not in str(wrong.value.body)
        with pytest.raises(anthropic.AuthenticationError):
            client_of(server, api_key="sk-lr-nobody").messages.count_tokens(model="small", messages=say("Hi"))
        with pytest.raises(anthropic.PaymentRequiredError) as unpaid:
            client_of(server, api_key=poor).messages.create(**ask)
        assert unpaid.value.body["error"]["message"] == "Insufficient Balance"
        with pytest.raises(anthropic.ContentTooLargeError) as large:
            client_of(server, api_key=rich).messages.create(**ask | {"messages": say("x" * 50_001)})
        assert large.value.body["error"]["type"] == "request_too_large"
        with pytest.raises(anthropic.NotFoundError) as lost:
            client_of(server, "/anthropic/elsewhere", api_key=rich).messages.create(**ask)
        assert lost.value.body["error"]["type"] == "not_found_error"
        model.delay_s = 0.02
        client = client_of(server, api_key=narrow)
        with client.messages.stream(model="small", max_tokens=50, messages=say("no end of text")) as held:
            next(iter(held))
            with pytest.raises(anthropic.RateLimitError) as busy:
                client.messages.create(**ask)
            assert busy.value.response.headers["retry-after"] == "1"
            assert busy.value.body["error"]["type"] == "rate_limit_error"
        model.delay_s = 0.0
        server.service.is_draining = True
        with pytest.raises(anthropic.ServiceUnavailableError) as stopping:
            client_of(server, api_key=rich).messages.create(**ask)
        assert stopping.value.body["error"]["type"] == "overloaded_error"
        server.service.is_draining = False


def test_an_answer_that_fails_midway_raises_and_tells_nothing(
    server: LiveServer, client: Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_answers(server.model, monkeypatch, 5, "/home/somebody: my secret")
    monkeypatch.setattr(server.model, "delay_s", 0.01)

    def read() -> None:
        with client.messages.stream(model="small", max_tokens=50, messages=say("no end of text")) as stream:
            stream.until_done()

    with pytest.raises(anthropic.APIStatusError) as caught:
        read()
    assert "could not finish this request" in str(caught.value)
    assert "secret" not in str(caught.value) and "/home" not in str(caught.value)


# ---- leaving and waiting --------------------------------------------------------------------------------------------


def test_leaving_a_stream_stops_decoding(
    server: LiveServer, client: Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.model, "delay_s", 0.01)
    with client.messages.stream(model="small", max_tokens=1500, messages=say("no end of text")) as stream:
        for event in stream:
            if event.type == "message_start":
                reply_id = event.message.id
            if event.type == "thinking":
                break
    wait_until(lambda: server.running == 0, timeout_s=2)
    row = wait_until(lambda: (row := server.row(reply_id)).status != "running" and row)
    assert row.status == "cancelled" and row.completion_tokens < 200


def test_a_queued_request_is_pinged_and_both_forms_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.2)
    model = scripted(max_running=1)
    model.delay_s = 0.02
    with live_server(tmp_path, model) as server:
        client = client_of(server)
        ask: Any = dict(model="small", max_tokens=200, messages=say("What is the capital of France?"))

        def occupy() -> Any:
            held = client.messages.create(model="small", max_tokens=45, messages=say("no end of text"), stream=True)
            next(iter(held))
            return held

        held = occupy()
        began = time.monotonic()
        with client.messages.with_streaming_response.create(**ask, stream=True) as raw:
            lines = raw.iter_lines()
            assert next(lines) == "event: ping" and time.monotonic() - began < 1.0
            rest = list(lines)
        assert "event: ping" in rest and "event: message_stop" in rest
        held = occupy()
        with client.messages.stream(**ask) as stream:
            assert stream.get_final_text() == "It is Paris."
        held = occupy()
        raw = client.messages.with_raw_response.create(**ask)
        assert raw.text().startswith("\n") and raw.parse().content[1].text == "It is Paris."
        held.close()
