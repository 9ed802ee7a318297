"""The real server under the real openai SDK, used as its users use it: Chat Completions, Completions, models, errors."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from serving import (
    CONTEXT,
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
from longreach.server.upstream import UpstreamModel

TOKENIZER = make_tokenizer()
OFF = {"thinking": {"type": "disabled"}}
STRIPPED = "The `reasoning_content` in the thinking mode must be passed back to the API."

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}

SCRIPT = {
    "capital of France": "The user asks for a capital.</think>It is Paris.",
    "Paris, please": "I need the weather.</think>Let me look."
    + calls_text(("get_weather", {"city": "Paris", "days": 2})),
    "sunny in Paris": "The tool says sunny.</think>It will be sunny in Paris.",
    "Paris and Rome": "Two cities.</think>"
    + calls_text(("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "days": 3}), ("get_time", {})),
    "rain in Rome": "Both are known.</think>Sunny in Paris, rain in Rome.",
    "capital of Italy": "It is Rome.",
    "count to five": "1 2 3 4 5 END</think>1 2 3 4 5 END 6 7 8",
    "def middle": "    return a + b\n",
    "no end of text": "word " * 2000,
}


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def client_of(server: LiveServer, base: str = "/v1", **options: Any) -> OpenAI:
    return OpenAI(base_url=server.url + base, **({"api_key": "not needed", "max_retries": 0, "timeout": 60} | options))


def async_client_of(server: LiveServer, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=server.url + "/v1", **({"api_key": "not needed", "max_retries": 0, "timeout": 60} | options)
    )


def scripted(name: str = "small", **options: Any) -> ScriptedModel:
    model = ScriptedModel(name, make_engine(TOKENIZER, **options))
    model.script.update(SCRIPT)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("openai"), scripted()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return client_of(server)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_comes_with_its_reasoning_and_its_usage(server: LiveServer, client: OpenAI) -> None:
    reply = client.chat.completions.create(model="small", messages=say("What is the capital of France?"))
    message, usage = reply.choices[0].message, reply.usage
    assert message.content == "It is Paris."
    assert message.reasoning_content == "The user asks for a capital."
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.object, reply.model, message.role) == ("chat.completion", "small", "assistant")
    assert reply.system_fingerprint.startswith("fp_")
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens
    assert usage.completion_tokens_details.reasoning_tokens == len(TOKENIZER.encode("The user asks for a capital."))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    row = server.row(reply.id)
    assert (row.status, row.hit_tokens + row.miss_tokens) == ("completed", usage.prompt_tokens)
    assert (row.completion_tokens, row.reasoning_tokens) == (
        usage.completion_tokens,
        usage.completion_tokens_details.reasoning_tokens,
    )


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_brings_reasoning_then_content_then_the_reason_with_the_usage(
    server: LiveServer, client: OpenAI, include_usage: bool
) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    stream = client.chat.completions.create(
        model="small", messages=say("What is the capital of France?"), stream=True, **options
    )
    chunks = list(stream)
    reasoning = [getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks]
    content = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(reasoning) == "The user asks for a capital." and "".join(content) == "It is Paris."
    assert max(i for i, text in enumerate(reasoning) if text) < min(i for i, text in enumerate(content) if text)
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert server.row(chunks[0].id).status == "completed"


def test_thinking_can_be_switched_off_in_each_way_clients_know(client: OpenAI) -> None:
    ways: list[dict[str, Any]] = [
        {"extra_body": OFF}, {"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"thinking": False}}},
    ]  # fmt: skip
    for way in ways:
        reply = client.chat.completions.create(model="small", messages=say("Say it"), max_tokens=3, **way)
        assert not hasattr(reply.choices[0].message, "reasoning_content")
        assert reply.usage.completion_tokens_details is None


def test_the_sdk_gathers_a_stream_into_the_whole_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(model="small", messages=say("What is the capital of France?")) as stream:
        kinds = [event.type for event in stream]
    final = stream.get_final_completion()
    assert final.choices[0].message.content == "It is Paris."
    assert final.choices[0].message.reasoning_content == "The user asks for a capital."
    assert final.usage.total_tokens > 0
    assert kinds[-1] == "content.done"


def test_the_asynchronous_client_runs_many_requests_at_once(server: LiveServer) -> None:
    async def ask_all() -> list[str]:
        async with async_client_of(server) as client:
            replies = await asyncio.gather(*(
                client.chat.completions.create(model="small", messages=say(f"{i}: what is the capital of France?"))
                for i in range(10)
            ))  # fmt: skip
        return [reply.choices[0].message.content or "" for reply in replies]

    assert asyncio.run(ask_all()) == ["It is Paris."] * 10


@pytest.mark.parametrize("base", ["", "/v1", "/beta", "/beta/v1", "/v1/"])
def test_every_base_url_that_users_have_in_their_settings_works(server: LiveServer, base: str) -> None:
    client = client_of(server, base)
    reply = client.chat.completions.create(model="small", messages=say("What is the capital of France?"))
    assert reply.choices[0].message.content == "It is Paris."
    assert "small" in [model.id for model in client.models.list()]


def test_the_length_limit_ends_an_answer_under_either_name(client: OpenAI) -> None:
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        reply = client.chat.completions.create(model="small", messages=say("no end of text"), **limit)
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 5)


def test_a_developer_message_and_text_parts_are_read(server: LiveServer, client: OpenAI) -> None:
    client.chat.completions.create(
        model="small", max_tokens=1,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ],
    )  # fmt: skip
    assert "Be brief.<｜User｜>one\n\ntwo<｜Assistant｜><think>" in server.model.prompts[-1]


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_a_common_beginning_is_found_in_the_cache_and_every_token_is_a_hit_or_a_miss(client: OpenAI) -> None:
    def ask(question: str, **extra: Any) -> tuple[int, int]:
        usage = client.chat.completions.create(
            model="small", max_tokens=2, extra_body=OFF | extra,
            messages=[{"role": "system", "content": "A long contract. " * 40}, {"role": "user", "content": question}],
        ).usage  # fmt: skip
        assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
        return usage.prompt_cache_hit_tokens, usage.prompt_tokens

    common = len(TOKENIZER.encode("A long contract. " * 40)) + 2  # a mark before it, a mark behind it
    nothing = 3  # marks and a letter, which prompts of other tests begin with too
    assert ask("Who signs?")[0] < nothing
    ask("When does it end?")
    hits, _ = ask("Is there a fee?")
    assert common - 128 <= hits <= common
    hits, prompt = ask("Who signs?")
    assert hits >= prompt - 128
    assert ask("Who signs?", user_id="another user")[0] < nothing
    hits, prompt = ask("Who signs?", user_id="another user")
    assert hits >= prompt - 128


def test_the_next_turn_finds_the_whole_last_turn_in_the_cache(client: OpenAI) -> None:
    history = say("Tell me more. " * 60 + "What is the capital of Italy?")
    first = client.chat.completions.create(model="small", messages=history, extra_body=OFF)
    history += [{"role": "assistant", "content": first.choices[0].message.content}, *say("And of Spain?")]
    second = client.chat.completions.create(model="small", messages=history, extra_body=OFF, max_tokens=2).usage
    assert second.prompt_cache_hit_tokens >= first.usage.total_tokens - 1


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_a_tool_loop_goes_round_and_the_model_sees_its_reasoning_and_the_result(
    server: LiveServer, client: OpenAI
) -> None:
    messages = say("The weather in Paris, please.")
    reply = client.chat.completions.create(model="small", messages=messages, tools=[WEATHER])
    choice = reply.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
    assert call.id.startswith("call_00_") and call.type == "function"
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny in Paris"}]
    reply = client.chat.completions.create(model="small", messages=messages, tools=[WEATHER])
    assert reply.choices[0].message.content == "It will be sunny in Paris."
    prompt = server.model.prompts[-1]
    assert "<think>I need the weather.</think>Let me look.\n\n<｜DSML｜tool_calls>" in prompt
    assert "<tool_result>sunny in Paris</tool_result>" in prompt


def test_several_calls_streamed_are_gathered_and_their_results_go_back_in_the_order_of_the_calls(
    server: LiveServer, client: OpenAI
) -> None:
    messages = say("The weather in Paris and Rome, and the time.")
    with client.chat.completions.stream(model="small", messages=messages, tools=[WEATHER, CLOCK]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    message = stream.get_final_completion().choices[0].message
    names = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    paris, rome, now = message.tool_calls
    assert names == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "days": 3}), ("get_time", {})]
    assert [event.name for event in done] == ["get_weather", "get_weather", "get_time"]
    assert len({paris.id, rome.id, now.id}) == 3
    results = [(now, "noon"), (rome, "rain in Rome"), (paris, "sunny")]
    assistant: Any = message.model_dump(exclude_none=True, exclude={"parsed", "refusal"})
    for call in assistant["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    messages += [assistant, *({"role": "tool", "tool_call_id": c.id, "content": text} for c, text in results)]
    reply = client.chat.completions.create(model="small", messages=messages, tools=[WEATHER, CLOCK])
    assert reply.choices[0].message.content == "Sunny in Paris, rain in Rome."
    prompt = server.model.prompts[-1]
    assert (
        prompt.index("sunny</tool_result>")
        < prompt.index("rain in Rome</tool_result>")
        < prompt.index("noon</tool_result>")
    )


def stripped_loop() -> list[Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    return [
        *say("The weather in Paris?"), {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny in Paris"},
    ]  # fmt: skip


def test_a_tool_loop_whose_reasoning_the_client_dropped_goes_on(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="small", messages=stripped_loop(), tools=[WEATHER])
    assert reply.choices[0].message.content == "It will be sunny in Paris."


class Weather(BaseModel):
    """The weather in a city."""

    city: str
    unit: Literal["celsius", "fahrenheit"]
    days: int = Field(ge=1, le=9)


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_an_untrained_model_calls_a_strict_tool_with_arguments_of_its_type(client: OpenAI, thinking: str) -> None:
    reply = client.chat.completions.parse(
        model="small", messages=say("Anything at all"), tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required", max_tokens=120, extra_body={"thinking": {"type": thinking}}, parallel_tool_calls=False,
    )  # fmt: skip
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert not reply.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_once_and_no_other(client: OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_time"}}
    options: Any = dict(
        model="small", messages=say("Anything at all"), tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=150,
        extra_body=OFF,
    )  # fmt: skip
    if stream:
        with client.chat.completions.stream(**options) as events:
            events.until_done()
        message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**options).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_time" and isinstance(json.loads(call.function.arguments), dict)


def test_with_tool_choice_none_the_model_is_not_shown_the_tools(server: LiveServer, client: OpenAI) -> None:
    client.chat.completions.create(
        model="small", messages=say("Just talk"), tools=[WEATHER], tool_choice="none", max_tokens=1
    )
    assert "get_weather" not in server.model.prompts[-1]


# ---- structured output ----------------------------------------------------------------------------------------------


class Step(BaseModel):
    done: bool
    note: Literal["yes", "no", "perhaps"] | None


class Plan(BaseModel):
    title: Literal["short", "long"]
    count: int = Field(ge=0, le=99)
    steps: list[Step] = Field(max_length=3)


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_an_untrained_model_fills_a_pydantic_model(client: OpenAI, thinking: str) -> None:
    reply = client.chat.completions.parse(
        model="small", messages=say("Make a plan"), response_format=Plan, max_tokens=150,
        extra_body={"thinking": {"type": thinking}},
    )  # fmt: skip
    assert isinstance(reply.choices[0].message.parsed, Plan)
    assert reply.choices[0].finish_reason == "stop"


def test_a_streamed_answer_of_a_schema_parses(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="small", messages=say("Make a plan"), response_format=Plan, max_tokens=150, extra_body=OFF
    ) as stream:
        stream.until_done()
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, Plan)


def test_json_object_and_regex_are_kept(client: OpenAI) -> None:
    for seed in range(3):
        reply = client.chat.completions.create(
            model="small", messages=say("Some json"), response_format={"type": "json_object"}, max_tokens=60, seed=seed,
            extra_body=OFF,
        )  # fmt: skip
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    form: Any = {"type": "regex", "regex": r"[A-C]{2}-\d{3}"}
    reply = client.chat.completions.create(model="small", messages=say("A code"), response_format=form, max_tokens=40)
    text = reply.choices[0].message.content
    assert len(text) == 6 and set(text[:2]) <= set("ABC") and text[2] == "-" and text[3:].isdigit()


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_cover_every_token_of_reasoning_and_content(client: OpenAI, stream: bool) -> None:
    options: Any = dict(model="small", messages=say("What is the capital of France?"), logprobs=True, top_logprobs=3)
    if stream:
        content: list[Any] = []
        reasoning: list[Any] = []
        for chunk in client.chat.completions.create(stream=True, **options):
            probabilities = chunk.choices[0].logprobs
            content += (probabilities and probabilities.content) or []
            reasoning += (probabilities and getattr(probabilities, "reasoning_content", None)) or []
        reasoning = [entry if isinstance(entry, dict) else entry.model_dump() for entry in reasoning]
    else:
        probabilities = client.chat.completions.create(**options).choices[0].logprobs
        content, reasoning = probabilities.content, probabilities.reasoning_content
    assert b"".join(bytes(entry.bytes) for entry in content) == b"It is Paris."
    assert b"".join(bytes(entry["bytes"]) for entry in reasoning) == b"The user asks for a capital."
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True) and sum(map(math.exp, tops)) <= 1 + 1e-5


def test_two_answers_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        reply = client.chat.completions.create(
            model="small", messages=say("Dream"), n=2, seed=seed, max_tokens=12, extra_body=OFF
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage.completion_tokens == 24
        return [choice.message.content for choice in reply.choices]

    first, second = ask(7)
    assert first != second
    assert ask(7) == [first, second]
    assert ask(8) != [first, second]


def test_two_answers_in_one_stream_are_told_apart(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="small", messages=say("Dream"), n=2, seed=7, max_tokens=12, extra_body=OFF
    )
    texts, ends = ["", ""], [0, 0]
    usages = []
    for chunk in client.chat.completions.create(
        model="small", messages=say("Dream"), n=2, seed=7, max_tokens=12, extra_body=OFF, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason is not None
        usages += [chunk.usage] if chunk.usage else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [1, 1]
    assert [usage.completion_tokens for usage in usages] == [24]


@pytest.mark.parametrize("stop", [" END", ["never", "4 5 E", " END"]])
def test_a_stop_string_ends_the_content_and_not_the_reasoning(client: OpenAI, stop: Any) -> None:
    message = client.chat.completions.create(model="small", messages=say("count to five"), stop=stop).choices[0].message
    assert message.reasoning_content == "1 2 3 4 5 END"
    assert message.content == ("1 2 3 4 5" if stop == " END" else "1 2 3 ")


def test_a_logit_bias_forces_and_forbids_tokens(server: LiveServer, client: OpenAI) -> None:
    letter = httpx.post(f"{server.url}/tokenize", json={"model": "small", "content": "H"}).json()["tokens"]
    assert len(letter) == 1
    options: Any = dict(model="small", messages=say("Spell"), max_tokens=8, seed=1, extra_body=OFF)
    forced = client.chat.completions.create(logit_bias={str(letter[0]): 100}, **options)
    assert forced.choices[0].message.content == "H" * 8
    free = client.chat.completions.create(logprobs=True, **options).choices[0]
    first = TOKENIZER.encode(free.logprobs.content[0].token)[0]
    banned = client.chat.completions.create(logit_bias={str(first): -100}, **options)
    assert not banned.choices[0].message.content.startswith(free.logprobs.content[0].token)


def test_a_prefix_is_continued_and_not_repeated(server: LiveServer) -> None:
    client = client_of(server, "/beta")
    message: Any = {"role": "assistant", "content": "```python\n", "prefix": True}
    server.model.script["continue this"] = "print(1)\n```"
    reply = client.chat.completions.create(
        model="small", messages=[*say("continue this"), message], stop=["```"], extra_body=OFF
    )
    assert reply.choices[0].message.content == "print(1)\n"
    assert server.model.prompts[-1].endswith("</think>```python\n")


# ---- completions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/beta", "/v1", ""])
def test_a_gap_in_code_is_filled(server: LiveServer, base: str) -> None:
    reply = client_of(server, base).completions.create(
        model="small", prompt="def middle(a, b):\n", suffix="\nprint(middle(1, 2))\n", max_tokens=64
    )
    assert reply.choices[0].text == "    return a + b\n"
    assert (reply.object, reply.choices[0].finish_reason) == ("text_completion", "stop")
    assert reply.usage.prompt_cache_hit_tokens + reply.usage.prompt_cache_miss_tokens == reply.usage.prompt_tokens
    assert server.model.prompts[-1] == "<｜begin▁of▁sentence｜>" + (
        "<｜fim▁begin｜>def middle(a, b):\n<｜fim▁hole｜>\nprint(middle(1, 2))\n<｜fim▁end｜>"
    )


def test_a_gap_is_filled_in_a_stream_as_the_continue_extension_asks(server: LiveServer) -> None:
    body = {
        "model": "small", "prompt": "def middle(a, b):\n", "suffix": "\n", "max_tokens": 64, "temperature": 0.01, "top_p": 1,
        "frequency_penalty": 0, "presence_penalty": 0, "stop": ["<fim>", "\n\n"], "stream": True,
    }  # fmt: skip
    text = ""
    with httpx.stream(
        "POST", f"{server.url}/beta/completions", json=body, headers={"Authorization": "Bearer x"}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        text += json.loads(line[6:])["choices"][0]["text"]
    assert text == "    return a + b\n"


def test_a_completion_echoes_its_prompt_stops_at_a_string_and_has_logprobs(client: OpenAI) -> None:
    reply = client.completions.create(model="small", prompt="def middle(a, b):\n", echo=True, stop="+", max_tokens=20)
    assert reply.choices[0].text == "def middle(a, b):\n    return a "
    reply = client.completions.create(model="small", prompt="def middle(a, b):\n", logprobs=2, max_tokens=20)
    probabilities = reply.choices[0].logprobs
    assert "".join(probabilities.tokens) == reply.choices[0].text
    assert probabilities.text_offset[0] == 0
    assert [len(top) for top in probabilities.top_logprobs] == [2] * len(probabilities.tokens)


# ---- refusals -------------------------------------------------------------------------------------------------------

OVERFLOW = "maximum context length is 4096 tokens"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 3}, "Invalid temperature value, the valid range of temperature is [0, 2]"),
        ({"top_p": 0}, "Invalid top_p value, the valid range of top_p is (0, 1.0]"),
        ({"max_tokens": 0}, "Invalid max_tokens value, the valid range of max_tokens is [1, 393216]"),
        ({"messages": []}, "Empty input messages"),
        ({"model": "gpt-9"}, "but you passed gpt-9."),
        ({"messages": "hi"}, "messages must be a list"),
        ({"logit_bias": {"100000": 1}}, "100000"),
        ({"stop": ["x"] * 17}, "Stop string array too long: 17"),
        ({"top_logprobs": 3}, "logprobs must be set to true if top_logprobs is used."),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex is not supported"),
        ({"extra_body": {"thinking": True}}, "thinking must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "schema"),
        ({"response_format": {"type": "regex", "regex": "("}}, "reg"),
        ({"tools": [WEATHER, WEATHER]}, "Tool names must be unique."),
        ({"messages": say("word " * 5000)}, OVERFLOW),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_with_the_reason(client: OpenAI, change: Any, text: str, stream: bool) -> None:
    body: Any = dict(model="small", messages=say("Hi"), max_tokens=4, stream=stream) | change
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**body)
    error = caught.value
    assert text in error.message
    assert (error.type, error.code) == ("invalid_request_error", "invalid_request_error")
    assert set(error.body) == {"message", "type", "param", "code"}


def test_an_unknown_tool_name_in_tool_choice_is_refused_in_deepseeks_words(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="small", messages=say("Hi"), tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "zzz"}},
        )  # fmt: skip
    assert (
        "Invalid value for 'tool_call': no function named 'zzz' was specified in the 'tools' parameter."
        in caught.value.message
    )


def test_what_changes_nothing_is_ignored_and_named_in_a_header(client: OpenAI) -> None:
    reply = client.chat.completions.with_raw_response.create(
        model="small", messages=say("Hi"), max_tokens=1, user="me", store=False, extra_body={"new_thing": 1}
    )
    assert set(reply.headers["x-longreach-ignored"].split(", ")) == {"user", "store", "new_thing"}
    assert reply.parse().id.endswith(reply.headers["x-request-id"])


def test_models_are_listed_and_an_unknown_one_is_not_found(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "small" and {"deepseek-v4-pro", "deepseek-v4-flash", "deepseek-flash"} <= set(names)
    assert client.models.retrieve("deepseek-v4-pro").id == "deepseek-v4-pro"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing/like-it")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v4-flash", "deepseek-flash"])
def test_deepseeks_names_are_answered(client: OpenAI, name: str) -> None:
    reply = client.chat.completions.create(model=name, messages=say("What is the capital of France?"))
    assert reply.choices[0].message.content == "It is Paris."


@pytest.mark.parametrize("name", ["deepseek-chat", "deepseek-reasoner"])
def test_retired_names_are_refused_as_the_hosted_api_refuses_them(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"The supported API model names are .*, but you passed {name}."):
        client.chat.completions.create(model=name, messages=say("Hi"))


def test_retired_names_answer_in_their_old_modes_when_switched_on(tmp_path: Path) -> None:
    model = scripted()
    with live_server(tmp_path, model, options=ServiceOptions(retired_names=True)) as server:
        client = client_of(server)
        chat = client.chat.completions.create(model="deepseek-chat", messages=say("Hi"), max_tokens=2)
        assert not hasattr(chat.choices[0].message, "reasoning_content")
        assert model.prompts[-1].endswith("<｜Assistant｜></think>")
        client.chat.completions.create(model="deepseek-reasoner", messages=say("Hi"), max_tokens=2)
        assert model.prompts[-1].endswith("<｜Assistant｜><think>")


def test_hosted_rules_are_as_strict_as_the_hosted_api(tmp_path: Path) -> None:
    rules = Rules(hosted=True, require_reasoning=True)
    model = ScriptedModel("deepseek-v4-flash", make_engine(TOKENIZER), hosted=True)
    with live_server(tmp_path, model, options=ServiceOptions(rules=rules)) as server:
        client = client_of(server)
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        developer: Any = [{"role": "developer", "content": "x"}]
        refused: list[tuple[dict[str, Any], str]] = [
            ({"tools": [WEATHER], "tool_choice": "required"}, "Thinking mode does not support this tool_choice"),
            ({"tools": [WEATHER], "tool_choice": named}, "Thinking mode does not support this tool_choice"),
            ({"messages": stripped_loop(), "tools": [WEATHER]}, STRIPPED),
            ({"n": 2}, "Invalid n value (currently only n = 1 is supported)"),
        ]
        for change, text in refused:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**({"model": "deepseek-v4-flash", "messages": say("Hi")} | change))
            assert caught.value.body["message"] == text
        with pytest.raises(openai.BadRequestError, match=OVERFLOW):
            client.chat.completions.create(model="deepseek-v4-flash", messages=say("Hi"), max_tokens=CONTEXT)
        for body in ({"messages": developer}, {"messages": "hi"}, {"messages": say("Hi"), "seed": -1}):
            with pytest.raises(openai.UnprocessableEntityError) as bad:
                client.chat.completions.create(model="deepseek-v4-flash", **body)
            assert bad.value.body["message"].startswith("Failed to deserialize the JSON body into the target type: ")
        call = client.chat.completions.create(
            model="deepseek-v4-flash", messages=say("Hi"), tools=[WEATHER], tool_choice="required", max_tokens=150,
            extra_body=OFF,
        )  # fmt: skip
        assert call.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_required_reasoning_is_asked_for_in_the_exact_words_and_an_empty_one_satisfies(tmp_path: Path) -> None:
    with live_server(tmp_path, scripted(), options=ServiceOptions(rules=Rules(require_reasoning=True))) as server:
        client = client_of(server)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="small", messages=stripped_loop(), tools=[WEATHER])
        body = caught.value.body
        assert (body["message"], body["type"], body["code"]) == (
            STRIPPED,
            "invalid_request_error",
            "invalid_request_error",
        )
        for reasoning in ("", " "):
            loop = stripped_loop()
            loop[1]["reasoning_content"] = reasoning
            reply = client.chat.completions.create(model="small", messages=loop, tools=[WEATHER])
            assert reply.choices[0].message.content == "It will be sunny in Paris."
        off = client.chat.completions.create(
            model="small", messages=stripped_loop(), tools=[WEATHER], extra_body=OFF, max_tokens=1
        )
        assert off.choices[0].finish_reason == "length"


# ---- keys, money, limits --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with keys: rich (no limits), poor (nothing left), narrow (one request at a time), slow (tokens)."""
    keys = (
        {"name": "rich", "balance": 50 * 10**12}, {"name": "poor", "balance": 1},
        {"name": "narrow", "concurrency": 1}, {"name": "slow", "tokens_per_minute": 60},
        {"name": "bound", "models": ("deepseek-v4-pro",)},
    )  # fmt: skip
    with live_server(
        tmp_path_factory.mktemp("guarded"), scripted(), keys=keys, app=AppOptions(max_body_bytes=100_000)
    ) as server:
        yield server


def test_a_missing_or_wrong_key_is_an_authentication_error_that_repeats_nothing(guarded: LiveServer) -> None:
    secret = "sk-lr-" + "wrong" * 8
    for key, text in ((secret, "unknown or revoked"), (guarded.secrets[0][:-1], "unknown or revoked")):
        with pytest.raises(openai.AuthenticationError) as caught:
            client_of(guarded, api_key=key).chat.completions.create(model="small", messages=say("Hi"))
        assert text in caught.value.message and key not in str(caught.value.body)
        assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client_of(guarded, api_key=secret).models.list()
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401


def test_an_empty_balance_is_status_402_with_deepseeks_text(guarded: LiveServer) -> None:
    client = client_of(guarded, api_key=guarded.secrets[1])
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="small", messages=say("Hi"), stream=stream)
        error = caught.value
        assert type(error) is openai.APIStatusError and error.status_code == 402
        assert error.body == {
            "message": "Insufficient Balance", "type": "unknown_error", "param": None, "code": "invalid_request_error",
        }  # fmt: skip


def test_the_balance_falls_by_what_a_request_costs(guarded: LiveServer) -> None:
    client = client_of(guarded, api_key=guarded.secrets[0])

    def balance() -> Any:
        return json.loads(client.get("/user/balance", cast_to=httpx.Response).text)

    before = balance()
    assert before["is_available"] is True
    info = before["balance_infos"][0]
    assert set(info) == {"currency", "total_balance", "granted_balance", "topped_up_balance"}
    assert (info["currency"], float(info["granted_balance"])) == ("USD", float(info["total_balance"]))
    reply = client.chat.completions.create(model="small", messages=say("What is the capital of France?"))
    row = guarded.row(reply.id)
    price = guarded.service.price_of(guarded.model)
    hit, miss, output = price.per_token
    usage = reply.usage
    cost = (
        usage.prompt_cache_hit_tokens * hit + usage.prompt_cache_miss_tokens * miss + usage.completion_tokens * output
    )
    assert row.amount == cost > 0
    assert float(balance()["balance_infos"][0]["total_balance"]) <= float(info["total_balance"])


def test_a_key_with_one_request_at_a_time_gets_429_and_the_sdk_tries_again_when_told(guarded: LiveServer) -> None:
    model, secret = guarded.model, guarded.secrets[2]
    model.delay_s = 0.02
    try:
        running = client_of(guarded, api_key=secret).chat.completions.create(
            model="small", messages=say("no end of text"), stream=True, max_tokens=60
        )
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as caught:
            client_of(guarded, api_key=secret).chat.completions.create(model="small", messages=say("Hi"), max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        began = time.monotonic()
        patient = client_of(guarded, api_key=secret, max_retries=5)
        reply = patient.chat.completions.create(model="small", messages=say("What is the capital of France?"))
        assert reply.choices[0].message.content == "It is Paris." and time.monotonic() - began >= 1.0
        running.close()
    finally:
        model.delay_s = 0.0


def test_tokens_per_minute_are_429_with_the_time_to_wait(guarded: LiveServer) -> None:
    client = client_of(guarded, api_key=guarded.secrets[3])
    client.chat.completions.create(model="small", messages=say("no end of text"), max_tokens=60)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="small", messages=say("Hi"), max_tokens=1)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    refused = [row for row in guarded.rows() if row.status == "refused"]
    assert refused and refused[-1].amount == 0


def test_a_key_bound_to_models_sees_and_asks_no_other(guarded: LiveServer) -> None:
    client = client_of(guarded, api_key=guarded.secrets[4])
    assert [model.id for model in client.models.list()] == ["deepseek-v4-pro"]
    client.chat.completions.create(model="deepseek-v4-pro", messages=say("Hi"), max_tokens=1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="small", messages=say("Hi"), max_tokens=1)
    assert "The supported API model names are deepseek-v4-pro, but you passed small." in caught.value.message


def test_a_body_beyond_the_limit_is_413(guarded: LiveServer) -> None:
    client = client_of(guarded, api_key=guarded.secrets[0])
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="small", messages=say("x" * 100_001))
    assert caught.value.status_code == 413
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_another_key_finds_nothing_of_a_cached_prompt(guarded: LiveServer) -> None:
    question = "The secret plan is as follows. " * 20

    def hits(secret: str) -> int:
        reply = client_of(guarded, api_key=secret).chat.completions.create(
            model="small", messages=say(question), max_tokens=1, extra_body=OFF
        )
        return reply.usage.prompt_cache_hit_tokens

    assert hits(guarded.secrets[0]) < 3  # marks that this key's other prompts begin with too
    assert hits(guarded.secrets[0]) > 100
    assert hits(guarded.secrets[2]) < 3


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_bug_is_a_500_that_tells_nothing(server: LiveServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(call: Any, tenant: str = "") -> Any:
        raise RuntimeError("/home/somebody/model: the prompt was: my secret")

    monkeypatch.setattr(server.model, "prepare", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="small", messages=say("Hi"))
    assert caught.value.body["message"] == "The server failed to answer this request."
    assert "secret" not in caught.value.response.text and "/home" not in caught.value.response.text


def test_after_a_bug_the_connection_still_serves(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(call: Any, tenant: str = "") -> Any:
        raise RuntimeError("a bug")

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = json.dumps({"model": "small", "messages": say("What is the capital of France?")})
    with monkeypatch.context() as patch:
        patch.setattr(server.model, "prepare", broken)
        connection.request("POST", "/v1/chat/completions", body)
        reply = connection.getresponse()
        assert reply.status == 500 and reply.read()
    time.sleep(0.2)
    connection.request("POST", "/v1/chat/completions", body)
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_fails_midway_is_an_error_to_the_sdk_and_tells_nothing(
    server: LiveServer, client: OpenAI, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_answers(server.model, monkeypatch, 5, "/home/somebody: my secret")

    def ask() -> None:
        reply = client.chat.completions.create(
            model="small", messages=say("no end of text"), stream=stream, max_tokens=50
        )
        if stream:
            list(reply)

    with pytest.raises(openai.APIError) as caught:
        ask()
    assert "secret" not in str(caught.value) and "/home" not in str(caught.value)
    assert "could not finish this request" in caught.value.message
    monkeypatch.undo()
    wait_until(lambda: server.running == 0)
    assert wait_until(lambda: [row for row in server.rows() if row.status == "failed"])[-1].amount == 0
    reply = client.chat.completions.create(model="small", messages=say("What is the capital of France?"))
    assert reply.choices[0].message.content == "It is Paris."


# ---- leaving and waiting --------------------------------------------------------------------------------------------


def test_closing_a_stream_early_stops_decoding_and_is_billed_as_far_as_it_came(
    server: LiveServer, client: OpenAI
) -> None:
    server.model.delay_s = 0.01
    try:
        stream = client.chat.completions.create(
            model="small", messages=say("no end of text"), stream=True, max_tokens=1500
        )
        seen = [chunk for chunk, _ in zip(stream, range(10), strict=False)]
        stream.close()
        wait_until(lambda: server.running == 0, timeout_s=2)
    finally:
        server.model.delay_s = 0.0
    row = wait_until(lambda: (row := server.row(seen[0].id)).status != "running" and row)
    assert row.status == "cancelled" and 8 <= row.completion_tokens < 200


def test_a_client_that_gives_up_waiting_stops_the_request(server: LiveServer) -> None:
    server.model.delay_s = 0.02
    try:
        with pytest.raises(openai.APITimeoutError):
            client_of(server, timeout=0.3).chat.completions.create(
                model="small", messages=say("no end of text"), max_tokens=1500
            )
        wait_until(lambda: server.running == 0, timeout_s=2)
    finally:
        server.model.delay_s = 0.0
    assert wait_until(lambda: server.rows()[-1].status == "cancelled")


def test_cancelling_an_asynchronous_request_stops_it(server: LiveServer) -> None:
    async def ask() -> None:
        async with async_client_of(server) as client:
            task = asyncio.create_task(
                client.chat.completions.create(model="small", messages=say("no end of text"), max_tokens=1500)
            )
            await asyncio.to_thread(wait_until, lambda: server.running > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    server.model.delay_s = 0.02
    try:
        asyncio.run(ask())
        wait_until(lambda: server.running == 0, timeout_s=2)
    finally:
        server.model.delay_s = 0.0


def test_a_queued_request_is_kept_alive_and_both_forms_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.2)
    model = scripted(max_running=1)
    model.delay_s = 0.03
    with live_server(tmp_path, model) as server:
        client = client_of(server)

        def occupied(seconds: float) -> Any:
            return client.chat.completions.create(
                model="small", messages=say("no end of text"), stream=True, max_tokens=int(seconds / model.delay_s)
            )

        question = {"model": "small", "messages": say("What is the capital of France?"), "stream": True}
        held = occupied(1.2)
        next(iter(held))
        began = time.monotonic()
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=question, timeout=30) as reply:
            parts = reply.iter_bytes()
            first = next(parts)
            first_byte_s = time.monotonic() - began
            rest = first + b"".join(parts)
        assert first_byte_s < 1.0 and first == b": keep-alive\n\n"
        assert rest.count(b": keep-alive\n\n") >= 2 and rest.endswith(b"data: [DONE]\n\n")

        held = occupied(0.9)
        next(iter(held))
        chunks = list(client.chat.completions.create(**question))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It is Paris."

        held = occupied(0.9)
        next(iter(held))
        raw = client.chat.completions.with_raw_response.create(**(question | {"stream": False}))
        assert raw.text.startswith("\n\n")
        assert raw.parse().choices[0].message.content == "It is Paris."


def test_a_long_answer_that_is_not_streamed_keeps_its_connection_alive(
    server: LiveServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setattr(server.model, "delay_s", 0.02)
    raw = client.chat.completions.with_raw_response.create(
        model="small", messages=say("no end of text"), max_tokens=50, extra_body=OFF
    )
    assert raw.text.startswith("\n\n") and raw.parse().choices[0].message.content.startswith("word word")


def test_beyond_the_longest_queue_requests_are_refused_with_429(tmp_path: Path) -> None:
    model = scripted(max_running=1)
    model.delay_s = 0.02
    with live_server(tmp_path, model, options=ServiceOptions(max_waiting=1)) as server:
        client = client_of(server)
        held = [
            client.chat.completions.create(model="small", messages=say("no end of text"), stream=True, max_tokens=100)
        ]
        next(iter(held[0]))

        async def crowd() -> list[Any]:
            async with async_client_of(server) as many:
                return await asyncio.gather(
                    *(many.chat.completions.create(model="small", messages=say("capital of France")) for _ in range(6)),
                    return_exceptions=True,
                )

        outcomes = asyncio.run(crowd())
        refused = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
        answered = [o for o in outcomes if not isinstance(o, Exception)]
        assert (len(refused), len(answered)) == (5, 1)
        assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)


# ---- several models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    small, large = scripted("small"), scripted("large", seed=2)
    small.script["capital of France"] = "small</think>small says Paris."
    large.script["capital of France"] = "large</think>large says Paris."
    with live_server(tmp_path_factory.mktemp("pair"), small, large) as server:
        yield server


def test_deepseeks_names_go_to_the_small_and_the_large_model(pair: LiveServer) -> None:
    client = client_of(pair)
    for name, text in (("deepseek-v4-flash", "small says Paris."), ("deepseek-v4-pro", "large says Paris.")):
        reply = client.chat.completions.create(model=name, messages=say("the capital of France"))
        assert reply.choices[0].message.content == text


def test_auto_chooses_a_model_and_says_which_and_why(pair: LiveServer) -> None:
    client = client_of(pair)
    assert "auto" in [model.id for model in client.models.list()]
    seen = {}
    for kind, question in {"facts": "Who is the capital of France?", "mathematics": "Prove 1 + 1 = 2."}.items():
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=say(question), max_tokens=20, extra_body=OFF
        )
        reply, routed = raw.parse(), raw.headers["x-longreach-routed"]
        assert routed.startswith(f"{reply.model} ({kind}: gain ")
        seen[kind] = reply.model
        row = pair.row(reply.id)
        assert (row.model, row.answered_by) == ("auto", reply.model)
    # Pro knows far more facts (0.450 against 0.231); without thinking it is no better at mathematics.
    assert seen == {"facts": "large", "mathematics": "small"}


def test_auto_streams_too(pair: LiveServer) -> None:
    chunks = list(client_of(pair).chat.completions.create(
        model="auto", messages=say("Who is the capital of France?"), stream=True
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == f"{chunks[0].model} says Paris."


# ---- upstream -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, LiveServer]]:
    """A server in front of another one: (front, back)."""
    with live_server(tmp_path_factory.mktemp("back"), scripted("remote-name"), keys=({"name": "front"},)) as back:
        upstream = UpstreamModel("big", f"{back.url}/v1", remote="remote-name", key=back.secrets[0])
        with live_server(tmp_path_factory.mktemp("front"), upstream) as front:
            yield front, back


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_model_answers_under_our_name_with_its_own_usage(
    chain: tuple[LiveServer, LiveServer], stream: bool
) -> None:
    front, back = chain
    client = client_of(front)
    options: Any = dict(model="big", messages=say("What is the capital of France?"))
    if stream:
        with client.chat.completions.stream(**options) as events:
            events.until_done()
        reply = events.get_final_completion()
    else:
        reply = client.chat.completions.create(**options)
    message = reply.choices[0].message
    assert (reply.model, message.content) == ("big", "It is Paris.")
    assert message.reasoning_content == "The user asks for a capital."
    row, behind = front.row(reply.id), back.rows()[-1]
    assert row.is_upstream and row.status == behind.status == "completed"
    assert (row.hit_tokens, row.miss_tokens, row.completion_tokens, row.reasoning_tokens) == (
        behind.hit_tokens, behind.miss_tokens, behind.completion_tokens, behind.reasoning_tokens
    )  # fmt: skip
    assert reply.usage.total_tokens == behind.hit_tokens + behind.miss_tokens + behind.completion_tokens


def test_an_upstream_tool_loop_and_its_logprobs_and_choices_pass_through(chain: tuple[LiveServer, LiveServer]) -> None:
    client = client_of(chain[0])
    messages = say("The weather in Paris and Rome, and the time.")
    with client.chat.completions.stream(model="big", messages=messages, tools=[WEATHER, CLOCK]) as stream:
        stream.until_done()
    final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert [call.function.name for call in final.message.tool_calls] == ["get_weather", "get_weather", "get_time"]
    reply = client.chat.completions.create(model="big", messages=stripped_loop(), tools=[WEATHER])
    assert reply.choices[0].message.content == "It will be sunny in Paris."
    several = client.chat.completions.create(
        model="big", messages=say("Dream"), n=2, max_tokens=4, logprobs=True, top_logprobs=1, extra_body=OFF, seed=3
    )
    for choice in several.choices:
        text = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert text.decode("utf-8", "replace") == choice.message.content
    filled = client.completions.create(model="big", prompt="def middle(a, b):\n", suffix="\n", max_tokens=30)
    assert filled.choices[0].text == "    return a + b\n"
    echoed = client.completions.create(model="big", prompt="def middle(a, b):\n", echo=True, max_tokens=30)
    assert echoed.choices[0].text == "def middle(a, b):\n    return a + b\n"
    likely = client.completions.create(model="big", prompt="def middle(a, b):\n", logprobs=2, max_tokens=30).choices[0]
    assert "".join(likely.logprobs.tokens) == likely.text and len(likely.logprobs.top_logprobs[0]) == 2
    plan = client.chat.completions.parse(
        model="big", messages=say("Make a plan"), response_format=Plan, max_tokens=150, extra_body=OFF
    )
    assert isinstance(plan.choices[0].message.parsed, Plan)


def test_what_two_keys_ask_of_an_upstream_is_kept_apart_there(tmp_path: Path) -> None:
    with live_server(tmp_path / "back", scripted("remote-name")) as back:
        upstream = UpstreamModel("big", f"{back.url}/v1", remote="remote-name")
        with live_server(tmp_path / "front", upstream, keys=({"name": "one"}, {"name": "two"})) as front:

            def hits(place: int) -> int:
                reply = client_of(front, api_key=front.secrets[place]).chat.completions.create(
                    model="big", messages=say("The secret plan. " * 30), max_tokens=1, extra_body=OFF
                )
                return reply.usage.prompt_cache_hit_tokens

            assert hits(0) == 0
            assert hits(0) > 100
            assert hits(1) == 0


def test_an_upstream_refusal_about_the_request_is_passed_on(chain: tuple[LiveServer, LiveServer]) -> None:
    client = client_of(chain[0])
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=OVERFLOW):
            client.chat.completions.create(model="big", messages=say("word " * 5000), stream=stream)
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(model="big", messages=say("Hi"), logit_bias={"100000": 1})


def test_a_request_that_waits_at_the_upstream_is_kept_alive_and_can_be_left(tmp_path: Path) -> None:
    model = scripted("remote-name", max_running=1)
    model.delay_s = 0.02
    with live_server(tmp_path / "back", model) as back:
        upstream = UpstreamModel("big", f"{back.url}/v1", remote="remote-name")
        with live_server(tmp_path / "front", upstream) as front:
            client = client_of(front)
            held = client.chat.completions.create(
                model="big", messages=say("no end of text"), stream=True, max_tokens=1500
            )
            next(iter(held))
            body = {"model": "big", "messages": say("What is the capital of France?"), "stream": True}
            began = time.monotonic()
            with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body, timeout=30) as reply:
                assert next(reply.iter_bytes()) == b": keep-alive\n\n"
                assert time.monotonic() - began < 1.0
                assert back.running == 2
            wait_until(lambda: back.running == 1, timeout_s=2)
            held.close()
            wait_until(lambda: back.running == 0, timeout_s=2)


def test_leaving_a_stream_reaches_the_upstream(chain: tuple[LiveServer, LiveServer]) -> None:
    front, back = chain
    back.model.delay_s = 0.01
    try:
        stream = client_of(front).chat.completions.create(
            model="big", messages=say("no end of text"), stream=True, max_tokens=1500
        )
        seen = [chunk for chunk, _ in zip(stream, range(10), strict=False)]
        assert back.running == 1
        stream.close()
        wait_until(lambda: back.running == 0, timeout_s=2)
    finally:
        back.model.delay_s = 0.0
    row = wait_until(lambda: (row := front.row(seen[0].id)).status != "running" and row)
    assert row.status == "cancelled" and row.miss_tokens > 0
    assert wait_until(lambda: back.rows()[-1].status == "cancelled")


def test_an_unreachable_upstream_is_503_and_a_wrong_key_there_is_502(
    chain: tuple[LiveServer, LiveServer], tmp_path: Path
) -> None:
    _, back = chain
    nowhere = UpstreamModel("nowhere", "http://127.0.0.1:9/v1", remote="x")
    locked = UpstreamModel("locked", f"{back.url}/v1", remote="remote-name", key="sk-lr-wrong")
    with live_server(tmp_path, nowhere, locked) as server:
        client = client_of(server)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="nowhere", messages=say("Hi"))
        assert caught.value.status_code == 503 and "127.0.0.1" not in caught.value.response.text
        assert caught.value.response.headers["retry-after"]
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="locked", messages=say("Hi"))
        assert caught.value.status_code == 502 and "key" not in caught.value.body["message"]
        wait_until(lambda: [row.status for row in server.rows()] == ["failed", "failed"])
