"""Conversations for tests: the published ones of the shared folder, and random ones that any client could send."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from longreach.chat.messages import AnswerFormat, Conversation, Message, Tool, ToolCall
from longreach.tokenizer.special import SPECIAL_TOKENS

FIXTURES = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "chat_encoding"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the shared chat-encoding fixtures are not here")

# ---- the published ones ---------------------------------------------------------------------------------------------


def read_case(path: str) -> Any:
    return json.loads((FIXTURES / path).read_text(encoding="utf-8"))


def read_text(path: str) -> str:
    return (FIXTURES / path).read_text(encoding="utf-8")


def conversation_of(case: Any, **settings: Any) -> Conversation:
    """A conversation out of messages as chat APIs have them, alone or with their tools."""
    messages, tools = (case, ()) if isinstance(case, list) else (case["messages"], case.get("tools") or ())
    return Conversation(tuple(map(_message, messages)), tuple(map(_tool, tools)), **settings)


def _tool(tool: dict[str, Any]) -> Tool:
    return Tool(tool["function"])


def _message(message: dict[str, Any]) -> Message:
    return Message(
        message["role"],
        message.get("content") or "",
        message.get("reasoning_content", message.get("reasoning")),
        tuple(
            ToolCall(call["function"]["name"], call["function"]["arguments"], call.get("id", ""))
            for call in message.get("tool_calls") or ()
        ),
        message.get("tool_call_id", ""),
        tuple(map(_tool, message.get("tools") or ())),
        task=message.get("task"),
        is_open=message.get("prefix", False),
    )


# ---- random ones ----------------------------------------------------------------------------------------------------

WORDS = [
    "", "a", "Hello", "x = 1\n", "\n", "\n\n", " ", "42", "<", "</", ">", '"', "\\", "{", "}", "é", "你好", "👩‍🚀", "\t", "-1.5",
    "the weather", "\u2028", "tool_calls>", "invoke name=", "<tool_result>", "｜", *SPECIAL_TOKENS,
]  # fmt: skip

TOOLS = tuple(
    Tool({"name": name, "description": description, "parameters": parameters})
    for name, description, parameters in [
        (
            "get_weather",
            "The weather <think> of a place",
            {"type": "object", "properties": {"city": {"type": "string"}}},
        ),
        ("search", "", {"type": "object", "properties": {"n": {"type": "integer", "default": 1.5}}, "required": ["n"]}),
        ("日本", "｜DSML｜", {}),
        ("f-1", "d", None),
    ]
)


def random_text(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 2 else 5)
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {random_text(rng, 2): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    number = rng.choice([0, 1, -7, 2**53, 0.5, -1.25, 1e20, 3.0])
    return [random_text(rng), random_text(rng), number, rng.choice([True, False, None]), rng.randrange(1000)][kind]


def random_arguments(rng: random.Random) -> dict[str, Any]:
    return {rng.choice(["city", "n", "日", "a b", "x-y", "q'"]): random_value(rng) for _ in range(rng.randrange(4))}


def random_calls(rng: random.Random, keep_json: bool = False) -> tuple[ToolCall, ...]:
    """Calls whose arguments are written as Python writes JSON, some of them no JSON unless `keep_json`."""
    calls = []
    for number in range(rng.randint(1, 3)):
        arguments = json.dumps(random_arguments(rng), ensure_ascii=False)
        if not keep_json and rng.random() < 0.1:
            arguments = rng.choice(
                ["", "not json", "[1]", '{"a": 1,}', '"s"', '{"a": NaN}', '{"a": 1e999}', '{"a":"\\ud800"}']
            )
        calls.append(ToolCall(rng.choice(TOOLS).name, arguments, f"call_{number}"))
    return tuple(calls)


def random_answer(rng: random.Random, with_calls: bool) -> Message:
    reasoning = rng.choice([None, "", random_text(rng)])
    calls = random_calls(rng) if with_calls and rng.random() < 0.6 else ()
    return Message("assistant", random_text(rng), reasoning, calls)


def random_conversation(rng: random.Random) -> Conversation:
    """Any conversation that the hosted API would take, all of whose tool calls are answered right behind them."""
    tools = TOOLS[: rng.randint(1, 4)] if rng.random() < 0.6 else ()
    thinking = rng.random() < 0.6
    messages: list[Message] = []
    while len(messages) < rng.choice([1, 2, 3, 5, 9]):
        kind = rng.random()
        if kind < 0.12:
            messages.append(Message("system", random_text(rng)))
        elif kind < 0.17:
            messages.append(Message("latest_reminder", random_text(rng)))
        elif kind < 0.55:
            messages.append(Message("user", random_text(rng)))
        else:
            answer = random_answer(rng, bool(tools))
            messages.append(answer)
            results = [Message("tool", random_text(rng), tool_call_id=call.id) for call in answer.tool_calls]
            rng.shuffle(results)
            messages += results
    if rng.random() < 0.15 and not messages[-1].tool_calls:
        messages.append(Message("assistant", "go on" + random_text(rng), rng.choice([None, "", "so"]), is_open=True))
    answer_format = rng.choice(
        [
            None,
            None,
            None,
            AnswerFormat("json_object"),
            AnswerFormat("json_schema", random_arguments(rng)),
            AnswerFormat("regex", regex="a+"),
        ]
    )
    must_call = bool(tools) and not thinking and rng.random() < 0.2
    effort = rng.choice(["low", "high", "max"])
    return Conversation(tuple(messages), tools, answer_format, thinking, effort, must_call)
