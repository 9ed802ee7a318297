"""Conversations out of a JSONL file, as other tools write them, laid out for training.

    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5", "reasoning_content": "…"}],
     "tools": […], "response_format": {…}, "mode": "think-high"}                  OpenAI's format, and what it leaves unsaid
    {"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]}                       ShareGPT
    {"prompt": "2+3?", "completion": "5"}                                          texts, or two lists of messages

What a message may hold is what the server accepts and sends: reasoning as `reasoning_content`, `reasoning` or a leading
`<think>…</think>`; `tool_calls` whose arguments are JSON text or an object; text parts, joined by an empty line as the
server joins them; `developer` as a system message. `"weight": 0` on an assistant's message keeps it from being learned. The
older `functions`, `function_call` and role `function` are read as tools. Other fields of a record are left alone.

The mode is the one that the record says (`mode`, or `thinking` and `effort`), else thinking if the last answer has
reasoning. A lone conversation may become several examples: without tools the layout drops the reasoning of earlier turns,
so each of those answers is learned from an example that ends with it, and every answer is learned exactly once.

A line that cannot be used is never skipped: all are counted, the first three are named, and nothing is learned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from longreach.chat.messages import AnswerFormat, Conversation, Effort, Message, Role, Tool, ToolCall
from longreach.chat.modes import MODES, in_mode
from longreach.chat.renderer import Prompt, render
from longreach.data.split import unit_hash
from longreach.errors import RequestError
from longreach.tokenizer.special import EOS, THINK_END, THINK_START

NAMED_PROBLEMS = 3
"""Lines named in the error of a file with several that cannot be used."""

ALLOWED = 'give {"messages": […]}, {"conversations": […]} or {"prompt": …, "completion": …}'

_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "assistant": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
_ROLES = (*get_args(Role), "function")


class Chat(NamedTuple):
    """One line of a file.

    Attributes:
        prompts: what is learned from it, laid out; mostly one.
        place: from 0 to 1, by the hash of its text: decides whether it is held out.
    """

    prompts: tuple[Prompt, ...]
    place: float


def read_chats(path: Path) -> Iterator[Chat]:
    """The conversations of a file, in its order.

    Raises:
        RequestError: the file cannot be read; or, at its end, lines that cannot be used.
    """
    problems: list[str] = []
    count = lines = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        lines += 1
        try:
            chat = _chat(line)
        except RequestError as error:
            count += 1
            if len(problems) < NAMED_PROBLEMS:
                problems.append(f"line {number}: {error}")
            continue
        yield chat
    if count:
        more = f"; and {count - len(problems)} more" if count > len(problems) else ""
        raise RequestError(f"{path}: {count} of {lines} lines cannot be used; {'; '.join(problems)}{more}")


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        raise RequestError(f"--data {path} is a folder; give .jsonl files of conversations")
    try:
        with path.open("rb") as file:
            # Only "\n" ends a line: JSON strings may hold U+2028 and its like.
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except OSError as error:
        raise RequestError(f"--data {path} cannot be read: {error.strerror or error}") from error


def _chat(line: bytes) -> Chat:
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise RequestError("holds half a surrogate pair; no text has that") from None
    except json.JSONDecodeError as error:
        hint = "; write one object per line" if line.strip() in (b"[", b"{") else ""
        raise RequestError(f"is not JSON ({error.msg} at character {error.pos}){hint}") from None
    except RecursionError:
        raise RequestError("is nested too deeply") from None
    prompts = prompts_of(record)
    return Chat(prompts, unit_hash(prompts[-1].text))


# ---- a record -------------------------------------------------------------------------------------------------------


def prompts_of(record: Any) -> tuple[Prompt, ...]:
    """What is learned from a record, laid out; the last is the whole conversation.

    Raises:
        RequestError: it cannot be used; the text says why.
    """
    conversation, learned = conversation_of(record)
    if not any(learned):
        raise RequestError("has no message of an assistant to learn from")
    answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    is_wanted = dict(zip(answers, learned, strict=True))
    prompts = []
    for stop in _ends_of_rounds(conversation):
        part = dataclasses.replace(conversation, messages=conversation.messages[:stop])
        # Of a part, only the answers behind its last question: the others are learned elsewhere.
        first = 0 if stop == len(conversation.messages) else _last_question(part.messages) + 1
        inside = [index for index in answers if index < stop]
        wanted = [index >= first and is_wanted[index] for index in inside]
        prompt = learned_where(
            render(part, texts="preview", for_training=True), lambda n, w=wanted: n < len(w) and w[n]
        )
        if any(piece.is_learned for piece in prompt.pieces):
            prompts.append(prompt)
    if not prompts:
        raise RequestError(
            "has no message of an assistant to learn from: the layout drops what was thought in all of them"
        )
    return tuple(prompts)


def _ends_of_rounds(conversation: Conversation) -> list[int]:
    """Where examples end: after each round whose reasoning the whole conversation drops, and at its end."""
    messages = conversation.messages
    whole = [len(messages)]
    if not conversation.thinking or conversation.has_tools:
        return whole
    questions = [index for index, message in enumerate(messages) if message.role != "assistant" and index > 0]
    rounds = zip([0, *questions], [*questions, len(messages)], strict=True)
    dropped = [stop for start, stop in rounds
               if stop <= _last_question(messages) and any(message.reasoning for message in messages[start:stop])]  # fmt: skip
    return dropped + whole


def _last_question(messages: Sequence[Message]) -> int:
    return max((index for index, message in enumerate(messages) if message.role in ("user", "tool")), default=-1)


def learned_where(prompt: Prompt, wanted: Callable[[int], bool]) -> Prompt:
    """The prompt, with only those answers learned whose number is wanted.

    Args:
        wanted: number of an assistant's message, from 0 → whether the model learns it.
    """
    answer, pieces = 0, []
    for piece in prompt.pieces:
        pieces.append(piece if wanted(answer) else piece._replace(is_learned=False))
        if piece.is_special and piece.text == EOS:  # ends every finished answer and nothing else
            answer += 1
    return dataclasses.replace(prompt, pieces=tuple(pieces))


def conversation_of(record: Any) -> tuple[Conversation, list[bool]]:
    """A record as a conversation, and for each message of an assistant whether it is to be learned.

    Raises:
        RequestError: it cannot be used.
    """
    if not isinstance(record, dict):
        raise RequestError(f"is {_kind(record)}, not an object; {ALLOWED}")
    if "messages" in record:
        turns = _turns(record["messages"], "messages")
    elif "conversations" in record:
        turns = _sharegpt(record)
    elif "prompt" in record and "completion" in record:
        turns = _pair(record["prompt"], record["completion"])
    else:
        raise RequestError(f"has {_named(record)}; {ALLOWED}")
    read = [_message(turn, f"{where}[{place}]") for place, (turn, where) in enumerate(turns)]
    read = [pair for pair in read if pair[0].role != "system" or pair[0].content]  # as the server leaves them out
    if not read:
        raise RequestError("has no messages")
    messages = tuple(message for message, _ in read)
    _check_results(messages)
    conversation = Conversation(messages, _tools(record), _answer_format(record.get("response_format")))
    return _in_its_mode(conversation, record), [learned for message, learned in read if message.role == "assistant"]


def _in_its_mode(conversation: Conversation, record: Mapping[str, Any]) -> Conversation:
    mode, thinking = record.get("mode"), record.get("thinking")
    effort = record.get("effort", record.get("reasoning_effort"))
    if mode is not None:
        if thinking is not None or effort is not None:
            raise RequestError("has mode beside thinking or effort; give mode alone")
        if mode not in MODES:
            raise RequestError(f"has the unknown mode {_shown(mode)}; modes are {', '.join(MODES)}")
        return in_mode(conversation, mode)
    if isinstance(thinking, dict):
        thinking = {"enabled": True, "disabled": False}.get(str(thinking.get("type")), "unknown")
    if thinking not in (True, False, None):
        raise RequestError('has a thinking that is neither true, false nor {"type": "enabled" | "disabled"}')
    if effort is not None and effort not in get_args(Effort):
        raise RequestError(f"has the unknown effort {_shown(effort)}; there are {', '.join(get_args(Effort))}")
    if effort is not None and thinking is False:
        raise RequestError("has an effort, but thinking is off")
    if thinking is None:
        last = next((m for m in reversed(conversation.messages) if m.role == "assistant"), None)
        thinking = effort is not None or (last is not None and bool(last.reasoning))
    return dataclasses.replace(conversation, thinking=thinking, effort=effort or "high")


def _turns(messages: Any, where: str, is_learned: bool = True) -> list[tuple[dict[str, Any], str]]:
    """Messages as objects, each with the name of its list."""
    if not isinstance(messages, list):
        raise RequestError(f"{where} is {_kind(messages)}, not a list")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(f"{where}[{place}] is {_kind(message)}, not an object")
    if is_learned:
        return [(message, where) for message in messages]
    return [(message | {"weight": 0} if message.get("role") == "assistant" else message, where) for message in messages]


def _sharegpt(record: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    turns: list[tuple[dict[str, Any], str]] = []
    if record.get("system"):
        turns.append(({"role": "system", "content": record["system"]}, "system"))
    for place, (turn, where) in enumerate(_turns(record["conversations"], "conversations")):
        if "from" not in turn or "value" not in turn:
            raise RequestError(f'{where}[{place}] has {_named(turn)}; it needs "from" and "value"')
        speaker, value = turn["from"], turn["value"]
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RequestError(f"{where}[{place}] is from {_shown(speaker)}; allowed are {', '.join(_SHAREGPT_ROLES)}")
        message = {"role": role, "content": value} | ({"weight": turn["weight"]} if "weight" in turn else {})
        if speaker == "function_call":
            calls = _parsed(value, f"{where}[{place}].value")
            message |= {
                "content": None,
                "tool_calls": [{"function": c} for c in (calls if isinstance(calls, list) else [calls])],
            }
        turns.append((message, where))
    return turns


def _pair(prompt: Any, completion: Any) -> list[tuple[dict[str, Any], str]]:
    """A prompt and what is to be learned behind it: answers inside the prompt are not."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return _turns(prompt, "prompt", is_learned=False) + _turns(completion, "completion")


# ---- a message ------------------------------------------------------------------------------------------------------


def _message(turn: Mapping[str, Any], where: str) -> tuple[Message, bool]:
    """A message, and whether it is learned."""
    role = turn.get("role")
    if role not in _ROLES:
        raise RequestError(f"{where}.role is {_shown(role)}; roles are {', '.join(_ROLES)}")
    content = _text(turn.get("content"), f"{where}.content", nullable=role == "assistant")
    weight = turn.get("weight", 1)
    if weight not in (0, 1) or (role != "assistant" and "weight" in turn):
        raise RequestError(f"{where}.weight is {_shown(weight)}; it may be 0 or 1, on messages of the assistant")
    if turn.get("prefix"):
        raise RequestError(f"{where} has a prefix: an open message is no example; give the whole answer")
    if role == "assistant":
        return _answer(turn, content, where), weight == 1
    for name in ("tool_calls", "function_call", "reasoning_content", "reasoning"):
        if turn.get(name):
            raise RequestError(f"{where} has {name}, which only an assistant's message can")
    if role in ("tool", "function"):
        call_id = turn.get("tool_call_id") or ""
        if not isinstance(call_id, str):
            raise RequestError(f"{where}.tool_call_id is {_kind(call_id)}, not a string")
        return Message("tool", content, tool_call_id=call_id), False
    kept: Role = "system" if role == "developer" else cast(Role, role)
    return Message(kept, content), False


def _answer(turn: Mapping[str, Any], content: str, where: str) -> Message:
    reasoning = turn.get("reasoning_content")
    if reasoning is None:
        reasoning = turn.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RequestError(f"{where}.reasoning_content is {_kind(reasoning)}, not a string")
    if content.lstrip().startswith(THINK_START):
        inside, end, after = content.lstrip().removeprefix(THINK_START).partition(THINK_END)
        if not end:
            raise RequestError(f"{where}.content opens {THINK_START} and never closes it")
        if reasoning:
            raise RequestError(f"{where} has reasoning twice: in a field and in {THINK_START}; leave one out")
        reasoning, content = inside.strip("\n"), after.lstrip("\n")
    given = turn.get("tool_calls")
    if given is None:
        given = []
    if not isinstance(given, list):
        raise RequestError(f"{where}.tool_calls is {_kind(given)}, not a list")
    calls = [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(given)]
    if turn.get("function_call") is not None:
        calls.append(_call({"function": turn["function_call"]}, f"{where}.function_call"))
    if not content and not calls:
        raise RequestError(f"{where} says nothing; an assistant's message needs content or tool_calls")
    return Message("assistant", content, reasoning, tuple(calls))


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f'{where} must be {{"function": {{"name": …, "arguments": …}}}}')
    if call.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {_shown(call['type'])}; only functions can be called")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        read = _parsed(arguments or "{}", f"{where}.function.arguments")
    else:
        read, arguments = arguments, json.dumps(arguments, ensure_ascii=False)
    if not isinstance(read, dict):
        raise RequestError(f"{where}.function.arguments is {_kind(read)}, not an object")
    call_id = call.get("id") or ""
    if not isinstance(call_id, str):
        raise RequestError(f"{where}.id is {_kind(call_id)}, not a string")
    return ToolCall(function["name"], arguments or "{}", call_id)


def _text(content: Any, where: str, nullable: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and nullable:
        return ""
    if not isinstance(content, list):
        raise RequestError(f"{where} is {_kind(content)}, not a string or a list of text parts")
    texts = []
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = _shown(part.get("type")) if isinstance(part, dict) else _kind(part)
            raise RequestError(f"{where}[{place}] is {kind}; only text parts can be learned from")
        texts.append(part["text"])
    return "\n\n".join(texts)


def _check_results(messages: Sequence[Message]) -> None:
    """Every call that something follows has its result right behind it, as the server demands."""
    for index, message in enumerate(messages):
        if not message.tool_calls or index == len(messages) - 1:
            continue
        results = 0
        while index + 1 + results < len(messages) and messages[index + 1 + results].role == "tool":
            results += 1
        if results != len(message.tool_calls):
            raise RequestError(
                f"message {index} calls {len(message.tool_calls)} tools and {results} results follow; "
                "every call needs one right behind it"
            )


# ---- what stands beside the messages --------------------------------------------------------------------------------


def _tools(record: Mapping[str, Any]) -> tuple[Tool, ...]:
    given = record.get("tools")
    if isinstance(given, str):
        given = _parsed(given or "[]", "tools")
    if given is None:
        given = record.get("functions")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise RequestError(f"tools is {_kind(given)}, not a list")
    tools = []
    for place, tool in enumerate(given):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f'tools[{place}] must be {{"type": "function", "function": {{"name": …}}}}')
        description, parameters = function.get("description") or "", function.get("parameters")
        if not isinstance(description, str) or not isinstance(parameters, dict | None):
            raise RequestError(f"tools[{place}] needs a description that is a string and parameters that are an object")
        # The three keys that the server shows, in its order: what is served must be what was learned.
        shape = {"name": function["name"], "description": description, "parameters": parameters or {}}
        tools.append(Tool(shape, function.get("strict") is True))
    return tuple(tools)


def _answer_format(given: Any) -> AnswerFormat | None:
    kind = given.get("type") if isinstance(given, dict) else None
    match kind:
        case "json_object":
            return AnswerFormat("json_object")
        case "json_schema" if isinstance(schema := (given["json_schema"] or {}).get("schema"), dict):
            return AnswerFormat("json_schema", schema=schema)
        case _ if given is None or kind == "text":
            return None
    raise RequestError(
        f'response_format is {_shown(given)}; types are text, json_object and json_schema with a "schema"'
    )


# ---- words ----------------------------------------------------------------------------------------------------------


def _parsed(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise RequestError(f"{where} is not JSON: {_shown(text)}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"


def _named(record: Mapping[str, Any]) -> str:
    names = ", ".join(list(record)[:6])
    if "chosen" in record or "rejected" in record:
        return f"{names}, which is preference data"
    if "text" in record:
        return f"{names}: bare text is for longreach pretrain"
    return f"the fields {names}" if names else "no fields"
