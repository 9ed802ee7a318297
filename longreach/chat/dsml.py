"""DSML, the mark-up in which V4 is shown its tools and writes its calls: tags that carry the special token `｜DSML｜`.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

A string stands as it is (`string="true"`), every other value as JSON. Nothing is escaped: a value ends at its closing tag,
which no text can forge, because only the model's own `｜DSML｜` is the special token.
The fixed texts are data, spelled as in the published encoder and in the renderings of deepseek-recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from longreach.chat.messages import AnswerFormat, Tool, ToolCall
from longreach.errors import RequestError
from longreach.tokenizer.special import DSML, THINK_END, THINK_START

_TOOLS_BEFORE = f"""\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_JSON_OBJECT = """\
You are a helpful assistant designed to output JSON.
## Response Format:

Reply with JSON object ONLY."""
_JSON_SCHEMA = """\
## Response Format:

You MUST strictly adhere to the following schema to reply:
"""

BLOCK_OPENING = f"\n\n<{DSML}tool_calls>\n"
"""What stands before the first call of an answer; a prompt that demands a call ends with it."""

_BY_SPECIAL = re.compile(f"({DSML}|{THINK_START}|{THINK_END})")


@cache
def by_special(template: str) -> tuple[tuple[str, bool], ...]:
    """A text of ours, cut at the special tokens in it: parts and whether they are one. Never for text from outside."""
    return tuple((part, place % 2 == 1) for place, part in enumerate(_BY_SPECIAL.split(template)) if part)


def tool_parts(tools: Iterable[Tool]) -> list[tuple[str, bool]]:
    """How tools are announced to the model, as parts and whether each is a special token.

    Raises:
        RequestError: a tool is no JSON.
    """
    schemas = "\n".join(to_json(tool.function, f"tool {tool.name!r}") for tool in tools)
    return [*by_special(_TOOLS_BEFORE), (schemas + _TOOLS_AFTER, False)]


def schema_text(schema: Any) -> str:
    """How a JSON Schema for the answer is announced.

    Raises:
        RequestError: it is no JSON.
    """
    return _JSON_SCHEMA + to_json(schema, "the schema of the answer")


def format_text(answer_format: AnswerFormat | None) -> str:
    """How a form of the answer is announced; empty where the prompt says nothing of it.

    Raises:
        RequestError: its schema is no JSON.
    """
    if answer_format is None or not answer_format.is_shown or answer_format.kind == "regex":
        return ""
    return _JSON_OBJECT if answer_format.kind == "json_object" else schema_text(answer_format.schema)


def call_parts(calls: Iterable[ToolCall]) -> list[tuple[str, bool]]:
    """A block of calls, from the blank line before it to its closing tag, as parts and whether each is a special token.

    Arguments that are not a JSON object become one string parameter named `arguments`.
    """
    parts = [*by_special(BLOCK_OPENING)]
    for call in calls:
        parts += _tag(f'invoke name="{call.name}">\n')
        for name, value in read_arguments(call.arguments).items():
            is_string = isinstance(value, str)
            parts += _tag(f'parameter name="{name}" string="{"true" if is_string else "false"}">')
            parts.append((value if is_string else json.dumps(value, ensure_ascii=False), False))
            parts += _tag("parameter>\n", closes=True)
        parts += _tag("invoke>\n", closes=True)
    return [*parts, *_tag("tool_calls>", closes=True)]


def _tag(rest: str, closes: bool = False) -> list[tuple[str, bool]]:
    return [("</" if closes else "<", False), (DSML, True), (rest, False)]


def read_arguments(arguments: str) -> dict[str, Any]:
    """The arguments of a call by name. What is not a JSON object is one argument named `arguments`."""
    try:
        read = json.loads(arguments, parse_constant=_refused, parse_float=_finite)
        # A lone surrogate may be written in JSON, but no text can hold it.
        if isinstance(read, dict) and ("\\u" not in arguments or _is_text(read)):
            return read
    except (ValueError, RecursionError):
        pass
    return {"arguments": arguments}


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refused(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is beyond a double")
    return number


def to_json(value: Any, what: str) -> str:
    """JSON as Python writes it, characters beyond ASCII left as they are.

    Raises:
        RequestError: it is no JSON, or nested too deeply.
    """
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} cannot be written as JSON: {error}") from None
