"""The real server under litellm: as an OpenAI-compatible endpoint, as DeepSeek, and as Anthropic."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import LiveServer, ScriptedModel, calls_text, live_server, make_engine, make_tokenizer, wait_until

from longreach.server.call import Rules
from longreach.server.service import ServiceOptions

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing it asks the network for prices
import litellm

TOKENIZER = make_tokenizer()
OFF: Any = {"type": "disabled"}
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
SCRIPT = {
    "capital of France": "The user asks for a capital.</think>It is Paris.",
    "Paris, please": "I need the weather.</think>" + calls_text(("get_weather", {"city": "Paris", "days": 2})),
    "sunny in Paris": "The tool says sunny.</think>It will be sunny in Paris.",
    "def middle": "    return a + b\n",
    "no end of text": "word " * 2000,
}


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def scripted(name: str = "deepseek-v4-flash", **options: Any) -> ScriptedModel:
    model = ScriptedModel(name, make_engine(TOKENIZER), **options)
    model.script.update(SCRIPT)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    keys = ({"name": "rich"}, {"name": "poor", "balance": 1}, {"name": "narrow", "concurrency": 1})
    with live_server(tmp_path_factory.mktemp("litellm"), scripted(), keys=keys) as server:
        yield server


def ask(
    server: LiveServer, provider: str = "deepseek", *, call: Any = litellm.completion, key: int = 0, **body: Any
) -> Any:
    base = server.url + {"openai": "/v1", "deepseek": "/beta", "anthropic": "/anthropic"}[provider]
    given = {"model": f"{provider}/deepseek-v4-flash", "messages": say("What is the capital of France?")} | body
    return call(**given, api_base=base, api_key=server.secrets[key], num_retries=0, max_retries=0)


@pytest.mark.parametrize("provider", ["openai", "deepseek", "anthropic"])
def test_an_answer_and_its_reasoning_arrive_whole_and_streamed(server: LiveServer, provider: str) -> None:
    more: Any = {"max_tokens": 200} if provider == "anthropic" else {}
    message = ask(server, provider, **more).choices[0].message
    assert (message.content, message.reasoning_content) == ("It is Paris.", "The user asks for a capital.")
    chunks = list(ask(server, provider, stream=True, stream_options={"include_usage": True}, **more))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == "It is Paris."
    assert whole.choices[0].message.reasoning_content == "The user asks for a capital."
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens > 0


def test_the_asynchronous_call_streams(server: LiveServer) -> None:
    async def read() -> str:
        stream = await ask(server, call=litellm.acompletion, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(read()) == "It is Paris."


def test_thinking_is_switched_off(server: LiveServer) -> None:
    for way in ({"thinking": OFF}, {"reasoning_effort": "none"}):
        ask(server, messages=say("Talk"), max_tokens=2, **way)
        assert server.model.prompts[-1].endswith("<｜Assistant｜></think>")
    ask(server, messages=say("Talk"), max_tokens=2)
    assert server.model.prompts[-1].endswith("<｜Assistant｜><think>")


@pytest.mark.parametrize("provider", ["openai", "deepseek", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_goes_round(server: LiveServer, provider: str, stream: bool) -> None:
    messages, more = say("The weather in Paris, please."), {"max_tokens": 300} if provider == "anthropic" else {}
    reply = ask(server, provider, messages=messages, tools=[WEATHER], stream=stream, **more)
    if stream:
        reply = litellm.stream_chunk_builder(list(reply))
    choice = reply.choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris", "days": 2})
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny in Paris"},
    ]
    reply = ask(server, provider, messages=messages, tools=[WEATHER], **more)
    assert reply.choices[0].message.content == "It will be sunny in Paris."


def test_the_blank_it_sends_for_lost_reasoning_satisfies_a_strict_server(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *say("The weather in Paris?"), {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny in Paris"},
    ]  # fmt: skip
    for rules in (Rules(require_reasoning=True), Rules(hosted=True, require_reasoning=True)):
        model = scripted(hosted=rules.hosted)
        folder = tmp_path / ("hosted" if rules.hosted else "own")
        with live_server(folder, model, options=ServiceOptions(rules=rules), keys=({"name": "k"},)) as strict:
            reply = ask(strict, messages=messages, tools=[WEATHER], thinking={"type": "enabled"})
            assert reply.choices[0].message.content == "It will be sunny in Paris."
            with pytest.raises(litellm.BadRequestError, match="must be passed back to the API"):
                ask(strict, "openai", messages=messages, tools=[WEATHER])


@pytest.mark.parametrize("long", [False, True])
def test_its_costs_are_those_of_our_ledger(server: LiveServer, long: bool) -> None:
    question = "Tell me of France. " * (60 if long else 1) + "What is the capital of France?"
    for _ in range(2):
        reply = ask(server, messages=say(question))
        row = server.row(reply.id)
        assert row.amount > 0
        assert litellm.completion_cost(reply) == pytest.approx(row.amount / 1e12, rel=1e-9)
    assert reply.usage.prompt_tokens_details.cached_tokens == row.hit_tokens > 0


def test_json_schema_goes_through(server: LiveServer) -> None:
    schema = {
        "type": "object", "properties": {"name": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
        "required": ["name", "large"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    reply = ask(server, "openai", messages=say("A city"), response_format=form, max_tokens=100)
    assert set(json.loads(reply.choices[0].message.content)) == {"name", "large"}


def test_a_gap_is_filled(server: LiveServer) -> None:
    reply = litellm.text_completion(
        model="text-completion-openai/deepseek-v4-flash", prompt="def middle(a, b):\n", suffix="\n", max_tokens=40,
        api_base=server.url + "/beta", api_key=server.secrets[0],
    )  # fmt: skip
    assert reply.choices[0].text == "    return a + b\n"


def test_responses_go_through(server: LiveServer) -> None:
    reply = litellm.responses(
        model="openai/deepseek-v4-flash", input="What is the capital of France?", api_base=server.url + "/v1",
        api_key=server.secrets[0],
    )  # fmt: skip
    assert reply.output[-1].content[0].text == "It is Paris."


@pytest.mark.parametrize("provider", ["openai", "deepseek"])
def test_refusals_are_told_apart(server: LiveServer, provider: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError, match="maximum context length"):
        ask(server, provider, messages=say("word " * 5000))
    with pytest.raises(litellm.BadRequestError, match="valid range of temperature"):
        ask(server, provider, temperature=3)
    with pytest.raises(litellm.BadRequestError, match="but you passed nothing"):
        ask(server, provider, model=f"{provider}/nothing")
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(
            model=f"{provider}/deepseek-v4-flash", messages=say("Hi"), api_base=server.url + "/v1", api_key="sk-lr-no",
            num_retries=0, max_retries=0,
        )  # fmt: skip
    # For DeepSeek litellm goes by the error's code, which the hosted API sends with a 402, too.
    with pytest.raises(litellm.BadRequestError if provider == "deepseek" else litellm.APIError) as caught:
        ask(server, provider, key=1)
    assert "Insufficient Balance" in str(caught.value)


def test_a_busy_key_is_a_rate_limit(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.model, "delay_s", 0.02)
    held = ask(server, messages=say("no end of text"), key=2, stream=True, max_tokens=60)
    next(iter(held))
    with pytest.raises(litellm.RateLimitError):
        ask(server, key=2)
    wait_until(lambda: server.running == 0)


def test_an_abandoned_call_stops_decoding(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.model, "delay_s", 0.02)
    with pytest.raises(litellm.Timeout):
        ask(server, messages=say("no end of text"), max_tokens=1500, timeout=0.5)
    wait_until(lambda: server.running == 0, timeout_s=3)
    assert wait_until(lambda: server.rows()[-1].status == "cancelled")
