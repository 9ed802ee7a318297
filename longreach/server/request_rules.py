"""What the dialects read alike: modes of thinking, sampling parameters, tools, answer formats, and what must follow what.

Quoted messages are DeepSeek's own, so that clients which look for them find them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from longreach.chat.messages import AnswerFormat, Effort, Message, Tool
from longreach.server.call import ApiError, Rules
from longreach.server.fields import Fields, shown, wrong_type

MAX_OUTPUT_TOKENS = 393_216
MAX_STOPS = 16
MAX_ANSWERS = 16
MAX_LOGPROBS = 20
MAX_TOOLS = 1_024
MAX_MESSAGES = 65_536
MAX_BIASES = 4_096
MAX_USER_ID_BYTES = 512

IMAGE_TEXT = "[Unsupported Image]"
"""What DeepSeek's text models are shown in place of an image."""

EFFORTS: Mapping[str, Effort | None] = {
    "none": None, "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max",
    "ultra": "max",
}  # fmt: skip
"""Words for the effort; None: no thinking."""

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_UNSIGNED_32 = (1 << 32) - 1


# ---- sampling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Parameters of drawing tokens, already checked; the names of `Call`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


def read_sampling(fields: Fields, given: Mapping[str, float | None]) -> Sampling:
    """Check the values of `given` (`temperature`, `top_p` and the penalties) and read our extensions beside them.

    Raises:
        ApiError: a value outside its range.
    """
    rules = fields.rules
    for name, low, high in (
        ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2), ("temperature", 0, 2),
    ):  # fmt: skip
        value = given.get(name)
        if value is not None and not low <= value <= high:
            raise ApiError(400, f"Invalid {name} value, the valid range of {name} is [{low}, {high}]", param=name)
    top_p = given.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise ApiError(400, "Invalid top_p value, the valid range of top_p is (0, 1.0]", param="top_p")
    sampling = dict(temperature=_or(given.get("temperature"), 1.0), top_p=_or(top_p, 1.0))
    if rules.hosted:
        return Sampling(**sampling)
    top_k = _or(fields.integer("top_k", low=-1), 0)
    min_p, repetition = _or(fields.number("min_p"), 0.0), _or(fields.number("repetition_penalty"), 1.0)
    if not 0 <= min_p <= 1:
        raise ApiError(400, f"Invalid min_p value {min_p}, the valid range of min_p is [0, 1]", param="min_p")
    if not 0 < repetition <= 10:
        raise ApiError(
            400, "Invalid repetition_penalty value, the valid range of repetition_penalty is (0, 10]",
            param="repetition_penalty",
        )  # fmt: skip
    return Sampling(
        **sampling,
        top_k=0 if top_k < 0 else min(top_k, _UNSIGNED_32),  # -1 is vLLM's word for "all"
        min_p=min_p,
        frequency_penalty=_or(given.get("frequency_penalty"), 0.0),
        presence_penalty=_or(given.get("presence_penalty"), 0.0),
        repetition_penalty=repetition,
    )


def hosted_sampling(model: str, thinking: bool, has_tools: bool, sampling: Sampling, top_p: float | None) -> Sampling:
    """What DeepSeek's service makes of temperature and top_p: while thinking, both are mostly its own choice.

    Args:
        top_p: as sent; None: not sent.
    """
    is_flash = "flash" in model
    if not thinking:
        return Sampling(sampling.temperature, 1.0 if is_flash else sampling.top_p)
    if is_flash:
        return Sampling(1.0, 1.0 if top_p is None else max(top_p, 0.95))
    return Sampling(1.0, 0.95 if has_tools else 1.0)


def read_max_tokens(fields: Fields, *names: str) -> int | None:
    """The output limit under the first of `names` that is given. Its range is checked by `check_max_tokens`."""
    values = [fields.integer(name, high=_UNSIGNED_32) for name in names]
    return next((value for value in values if value is not None), None)


def check_max_tokens(value: int | None, name: str = "max_tokens") -> None:
    if value is not None and not 1 <= value <= MAX_OUTPUT_TOKENS:
        raise ApiError(400, f"Invalid {name} value, the valid range of {name} is [1, {MAX_OUTPUT_TOKENS}]", param=name)


def check_stop(stop: tuple[str, ...], is_list: bool, name: str = "stop") -> None:
    if len(stop) > MAX_STOPS:
        raise ApiError(400, f"Stop string array too long: {len(stop)}", param=name)
    for i, text in enumerate(stop):
        if not text:
            where = f"{name}[{i}]" if is_list else name
            raise ApiError(
                400, f"Invalid '{where}': empty string. Expected a string with minimum length 1, but got an empty"
                " string instead.", param=name,
            )  # fmt: skip


def read_seed(fields: Fields) -> int | None:
    """A seed below 2**63. Outside the hosted rules a negative one is taken too, modulo 2**63."""
    if not fields.rules.hosted:
        seed = fields.integer("seed", low=-(1 << 63))
        return None if seed is None else seed & ((1 << 63) - 1)
    return fields.integer("seed")


def check_seed(seed: int | None) -> None:
    if seed is not None and seed >= 1 << 63:
        raise ApiError(400, "Invalid seed value, the valid range of seed is [0, 2^63)", param="seed")


def check_n(n: int | None, rules: Rules) -> int:
    n = 1 if n is None else n
    if rules.hosted and n != 1:
        raise ApiError(400, "Invalid n value (currently only n = 1 is supported)", param="n")
    if not 1 <= n <= MAX_ANSWERS:
        raise ApiError(400, f"Invalid n value {shown(n)}, the valid range of n is [1, {MAX_ANSWERS}]", param="n")
    return n


def read_logit_bias(fields: Fields) -> dict[int, float]:
    """Token ids, as strings of digits, with a bias from -100 to 100. The hosted rules ignore it.

    Raises:
        ApiError: a key that is no token id, a bias outside the range, or more than 4,096 of them.
    """
    if fields.rules.hosted:
        return {}
    biases = fields.object("logit_bias")
    if biases is None:
        return {}
    if len(biases.value) > MAX_BIASES:
        raise ApiError(400, f"logit_bias has {len(biases.value)} entries, at most {MAX_BIASES} are allowed")
    result = {}
    for key in biases.value:
        if not isinstance(key, str) or not key.isascii() or not key.isdigit() or len(key) > 9:
            raise ApiError(400, f"logit_bias: {shown(key)} is not a token id; keys are token ids as decimal digits")
        bias = biases.number(key)
        if bias is None or not -100 <= bias <= 100:
            raise ApiError(400, f"logit_bias[{key}] is {shown(biases.value[key])}, the valid range is [-100, 100]")
        result[int(key)] = bias
    return result


def read_user_id(fields: Fields, name: str = "user_id") -> str:
    user_id = fields.text(name, "") or ""
    if len(user_id.encode()) > MAX_USER_ID_BYTES:
        raise ApiError(400, f"{fields.at(name)} is longer than {MAX_USER_ID_BYTES} bytes", param=fields.at(name))
    return user_id


# ---- thinking -------------------------------------------------------------------------------------------------------


def choose_thinking(switch: bool | None, effort: str | None) -> tuple[bool, Effort]:
    """Whether to think and how thoroughly. An explicit switch outweighs the effort `none`; the default is on, high."""
    level = EFFORTS[effort] if effort is not None else "high"
    thinking = switch if switch is not None else level is not None
    return thinking, level or "high"


def read_thinking(fields: Fields) -> bool | None:
    """The object `thinking`: enabled, adaptive (the same) or disabled; None where absent."""
    thinking = fields.object("thinking")
    if thinking is None:
        return None
    thinking.required("type")
    word = thinking.word("type", ("adaptive", "enabled", "disabled"))
    if word is None:
        wrong_type(fields.rules, thinking.at("type"), "adaptive, enabled or disabled", None)
    return word != "disabled"


# ---- tools ----------------------------------------------------------------------------------------------------------


def function_object(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    """A function as the model is shown it: the three keys that DeepSeek's service shows, in its order."""
    return {"name": name, "description": description or "", "parameters": {} if parameters is None else parameters}


def check_tool_name(name: str, where: str) -> None:
    """
    Raises:
        ApiError: empty, longer than 128 characters, or anything but letters, digits, `_` and `-`.
    """
    if not name:
        raise ApiError(
            400, f"Invalid '{where}': empty string. Expected a string with minimum length 1, but got an empty string"
            " instead.", param=where,
        )  # fmt: skip
    if len(name) > 128:
        raise ApiError(
            400, f"Invalid '{where}': string too long. Expected a string with maximum length 128, but got a string with"
            f" length {len(name)} instead.", param=where,
        )  # fmt: skip
    if not _TOOL_NAME.fullmatch(name):
        raise ApiError(
            400, f"Invalid '{where}': string does not match pattern. Expected a string that matches the pattern"
            " '^[a-zA-Z0-9_-]+$'.", param=where,
        )  # fmt: skip


def check_declared(tools: Sequence[tuple[Tool, Any]], rules: Rules, needs_schema: bool = False) -> tuple[Tool, ...]:
    """The tools, once their names and schemas have been checked.

    Args:
        tools: each with its schema as it was given: one that was left out is shown to the model as {}, but {} itself is a
            mistake to the hosted service.
        needs_schema: whether the hosted rules refuse a tool without one.

    Raises:
        ApiError: too many tools, a name twice, or a schema that is none of an object.
    """
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"{len(tools)} tools are given, at most {MAX_TOOLS} are allowed", param="tools")
    seen: set[str] = set()
    for tool, schema in tools:
        if tool.name in seen:
            raise ApiError(400, "Tool names must be unique.", param="tools")
        seen.add(tool.name)
        _check_schema(tool.name, schema, rules, needs_schema)
    return tuple(tool for tool, _ in tools)


def _check_schema(name: str, schema: Any, rules: Rules, is_needed: bool) -> None:
    if schema is None and not (is_needed and rules.hosted):
        return
    if not rules.hosted and isinstance(schema, dict) and not schema:
        return
    if not isinstance(schema, dict | bool):
        given = shown(schema)
        raise ApiError(400, f'Invalid schema for function \'{name}\': {given} is not of types "boolean", "object"')
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind != "object" and (rules.hosted or kind is not None or not isinstance(schema, dict)):
        raise ApiError(
            400, f"Invalid schema for function '{name}': schema must be a JSON Schema of 'type: \"object\"', got"
            f" 'type: {shown(kind)}'.",
        )  # fmt: skip


ToolChoice = Literal["none", "auto", "required", "named"]


def settle_tool_choice(
    choice: ToolChoice, name: str | None, tools: Sequence[Tool], thinking: bool, rules: Rules
) -> tuple[ToolChoice, str | None]:
    """The choice that holds: without tools there is none.

    Raises:
        ApiError: the named function is not among the tools, or the hosted rules forbid to force a call while thinking.
    """
    if not tools:
        return "none" if choice == "none" else "auto", None
    if choice == "named" and name not in {tool.name for tool in tools}:
        raise ApiError(
            400, f"Invalid value for 'tool_call': no function named '{(name or '')[:100]}' was specified in the 'tools'"
            " parameter.", param="tool_choice",
        )  # fmt: skip
    if rules.hosted and thinking and choice in ("required", "named"):
        raise ApiError(400, "Thinking mode does not support this tool_choice", param="tool_choice")
    return choice, name if choice == "named" else None


def only_tools(tools: Sequence[Tool], names: Sequence[str]) -> tuple[Tool, ...]:
    """
    Raises:
        ApiError: a name that is not among the tools.
    """
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            raise ApiError(400, f"tool_choice allows {shown(name)}, which is not among the tools", param="tool_choice")
    return tuple(tool for tool in tools if tool.name in names)


def check_format_with_tools(answer_format: AnswerFormat | None, tools: Sequence[Tool], rules: Rules) -> None:
    """
    Raises:
        ApiError: the hosted rules know no answer format beside strict tools.
    """
    if rules.hosted and answer_format is not None and any(tool.strict for tool in tools):
        raise ApiError(400, "response_format should not be used with tools", param="response_format")


# ---- answer formats -------------------------------------------------------------------------------------------------


def json_schema_format(schema: Any, where: str) -> AnswerFormat:
    if not isinstance(schema, dict | bool):
        raise ApiError(400, f'Invalid json schema: {shown(schema)} is not of types "boolean", "object"', param=where)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return AnswerFormat("json_schema", schema=schema)


# ---- conversations --------------------------------------------------------------------------------------------------


def check_tool_results(messages: Sequence[Message]) -> None:
    """Every call must be answered by a tool message right behind it, and every tool message must answer one.

    Raises:
        ApiError: with DeepSeek's text for each case.
    """
    i = 0
    while i < len(messages):
        message = messages[i]
        if message.role == "tool":
            raise ApiError(400, "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'")
        i += 1
        open_ids: set[str] = set()
        for call in message.tool_calls:
            if call.id in open_ids:
                raise ApiError(400, f"Duplicate value for 'tool_call_id' of {call.id[:100]} in message[{i - 1}]")
            open_ids.add(call.id)
        answered: set[str] = set()
        for _ in message.tool_calls:
            if i == len(messages) or messages[i].role != "tool":
                raise ApiError(
                    400, "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
                    " 'tool_call_id'. (insufficient tool messages following tool_calls message)",
                )  # fmt: skip
            call_id = messages[i].tool_call_id
            if call_id in answered:
                raise ApiError(400, f"Duplicate value for 'tool_call_id' of {call_id[:100]} in message[{i}]")
            if call_id not in open_ids:
                raise ApiError(
                    400, "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
                    " 'tool_call_id', The following tool_call_ids did not have response messages: " + call_id[:100],
                )  # fmt: skip
            answered.add(call_id)
            i += 1


def settle_messages(messages: tuple[Message, ...], thinking: bool) -> tuple[Message, ...]:
    """The conversation as the model is shown it: no empty system message, and no earlier reasoning without thinking."""
    if not thinking:
        messages = tuple(replace(m, reasoning=None) if m.reasoning is not None else m for m in messages)
    told = tuple(message for message in messages if message.role != "system" or message.content)
    return told or messages


def check_reasoning_came_back(
    messages: Sequence[Message], thinking: bool, has_tools: bool, rules: Rules, field: str
) -> None:
    """Where the rules ask for it, reasoning since the last user message must be given back while thinking: of every turn
    with tool calls, and where the request has tools of the others as well.

    Raises:
        ApiError: reasoning is missing; `field` names it in the dialect's words.
    """
    if not (rules.require_reasoning and thinking):
        return
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    for message in messages[last_user + 1 :]:
        is_needed = message.role == "assistant" and (has_tools or bool(message.tool_calls))
        if is_needed and message.reasoning is None:
            raise ApiError(400, f"The `{field}` in the thinking mode must be passed back to the API.")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
