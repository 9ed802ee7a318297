"""OpenAI's Responses as DeepSeek speaks them, stateless: `/responses`, with what Codex needs.

    RESPONSES.read(body, rules) -> Call;  RESPONSES.stream(call, head) -> response.created … response.completed

Nothing is stored, so a client sends the whole conversation each time. Its reasoning comes back to it in the items of the
reply; a client that asks for `reasoning.encrypted_content` gets the text there too (as base64, nothing is secret), because
some send back only that field, and reasoning that is lost costs quality and the cached context.

Custom tools become functions with one string, `input`; the functions of a namespace are named `namespace__function`.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from longreach.chat.messages import AnswerFormat, Conversation, Message, Tool, ToolCall
from longreach.server.call import (
    Answer,
    ApiError,
    Call,
    Content,
    Event,
    Finish,
    Head,
    Reasoning,
    Rules,
    TokenLogprob,
    ToolArguments,
    ToolBegin,
    ToolEnd,
    Usage,
)
from longreach.server.fields import Fields, Unsupported, open_body, wrong_type
from longreach.server.openai import error_body, logprob_body
from longreach.server.request_rules import (
    EFFORTS,
    IMAGE_TEXT,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    ToolChoice,
    check_declared,
    check_format_with_tools,
    check_max_tokens,
    check_reasoning_came_back,
    check_tool_name,
    choose_thinking,
    function_object,
    hosted_sampling,
    json_schema_format,
    only_tools,
    read_max_tokens,
    read_sampling,
    read_user_id,
    settle_messages,
    settle_tool_choice,
)

HARMLESS: Mapping[str, str] = {
    "store": "nothing is stored",
    "metadata": "repeated in the reply",
    "user": "repeated in the reply; caches are isolated by `user_id`",
    "safety_identifier": "OpenAI's abuse checks",
    "service_tier": "there is one tier",
    "prompt_cache_key": "caching is automatic",
    "prompt_cache_retention": "caching is automatic",
    "prompt_cache_options": "caching is automatic",
    "truncation": "nothing is cut; what exceeds the context is refused",
    "max_tool_calls": "it counts tools that OpenAI's servers run",
    "include": "all but reasoning.encrypted_content and message.output_text.logprobs",
    "reasoning.summary": "the reasoning itself is shown",
    "stream_options.include_obfuscation": "padding against observers of an encrypted line",
    "tools[] of other types": "tools that a vendor's servers run (web_search, local_shell, mcp, …) are not shown to the model",
    "input[] of other types": "what such tools said is left out of the conversation",
}
"""Fields of `/responses` that are accepted and change nothing."""

UNSUPPORTED: Mapping[str, Unsupported] = {
    "previous_response_id": Unsupported("nothing is stored; send the whole conversation as `input`"),
    "conversation": Unsupported("nothing is stored; send the whole conversation as `input`"),
    "prompt": Unsupported("prompts are not stored; send `instructions` and `input`"),
    "background": Unsupported("ask with stream: true and read as it comes", (False,)),
}
"""Fields of `/responses` that would change the answer and are refused by name."""

_UNSUPPORTED_IN_TEXT: Mapping[str, Unsupported] = {
    "verbosity": Unsupported("say in `instructions` how long the answer shall be", ("medium",)),
}

_SEAL = "plain:"
"""What our `encrypted_content` begins with."""

_PATCH_FIELD = "input"


class Responses:
    """`/responses`."""

    keep_alive = b": keep-alive\n\n"

    def read(self, body: Mapping[str, Any], rules: Rules) -> Call:
        fields = open_body(body, rules)
        model = fields.required_text("model")
        instructions = fields.text("instructions")
        items = _read_input(fields)
        tools = _read_tools(fields)
        choice, tool_name, allowed = _read_tool_choice(fields)
        text = fields.object("text")
        form = _read_format(text)
        reasoning = fields.object("reasoning")
        effort_given = reasoning.word("effort", EFFORTS) if reasoning is not None else None
        summary = reasoning.text("summary") if reasoning is not None else None
        thinking, effort = choose_thinking(None, effort_given)
        numbers = {name: fields.number(name) for name in ("temperature", "top_p")}
        max_tokens = read_max_tokens(fields, "max_output_tokens")
        top_logprobs = fields.integer("top_logprobs", high=255)
        stream, user, user_id = fields.flag("stream"), fields.text("user"), read_user_id(fields)
        parallel = rules.hosted or fields.flag("parallel_tool_calls", True)
        included = fields.strings("include") if isinstance(fields.value.get("include"), list) else ()
        metadata = fields.any("metadata")

        # Rules are checked in the order of DeepSeek's service, so that of two mistakes the same one is named.
        for tool, place, _ in tools.declared:
            if place in tools.unsupported:
                raise ApiError(400, f"Unsupported custom tool: '{tool.name[:100]}'. Only 'apply_patch' is supported.")
            check_tool_name(tool.name, place)
        messages = _join_items(instructions, items, rules)
        check_reasoning_came_back(messages, thinking, bool(tools.declared), rules, "reasoning_text")
        declared = [(tool, schema) for tool, _, schema in tools.declared] if choice != "none" else []
        functions = check_declared(declared, rules)
        if allowed is not None:
            functions = only_tools(functions, allowed)
        choice, tool_name = settle_tool_choice(choice, tool_name, functions, thinking, rules)
        if tool_name is not None and rules.hosted:
            functions = only_tools(functions, [tool_name])
        forced = choice in ("required", "named")
        answer_format = _check_format(form, messages, rules)
        check_format_with_tools(answer_format, functions, rules)
        sampling = read_sampling(fields, numbers)
        if rules.hosted:
            sampling = hosted_sampling(model, thinking, bool(functions), sampling, numbers["top_p"])
        if top_logprobs is not None and top_logprobs > MAX_LOGPROBS:
            raise ApiError(
                400, f"Invalid top_logprobs value, the valid range of top_logprobs is [0, {MAX_LOGPROBS}].",
                param="top_logprobs",
            )  # fmt: skip
        if top_logprobs is None and "message.output_text.logprobs" in included and not rules.hosted:
            top_logprobs = 0
        check_max_tokens(max_tokens)
        if not rules.hosted:
            fields.refuse(UNSUPPORTED)
            if text is not None:
                text.refuse(_UNSUPPORTED_IN_TEXT)
        echo = {
            "fields": {
                "instructions": instructions,
                "max_output_tokens": max_tokens,
                "parallel_tool_calls": parallel,
                "reasoning": {"effort": effort_given, "summary": summary},
                "temperature": 1.0 if numbers["temperature"] is None else numbers["temperature"],
                "text": _text_echo(form, text),
                "tool_choice": fields.value.get("tool_choice") or "auto",
                "tools": tools.echo,
                "top_logprobs": top_logprobs or 0,
                "top_p": 1.0 if numbers["top_p"] is None else numbers["top_p"],
                "user": user,
                "metadata": metadata if isinstance(metadata, dict) else {},
            },
            "custom": tools.custom,
            "namespaces": tools.namespaces,
            "seals": "reasoning.encrypted_content" in included,
        }
        conversation = Conversation(
            settle_messages(messages, thinking), functions, answer_format, thinking, effort, must_call=forced
        )  # fmt: skip
        return Call(
            model=model, input=conversation,
            max_tokens=max_tokens, **asdict(sampling), logprobs=top_logprobs, tool_choice=choice, tool_name=tool_name,
            parallel_tool_calls=parallel, user_id=user_id, stream=stream, wants_usage=True, effort_given=effort_given,
            echo=echo, ignored=(*fields.unread(), *tools.dropped),
        )  # fmt: skip

    def whole(self, call: Call, head: Head, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        answer = answers[0]
        items = _Items(call, head)
        output: list[dict[str, Any]] = []
        is_cut = answer.finish.reason == "length"
        calls = answer.message.tool_calls
        if answer.message.reasoning:
            cut_here = is_cut and not answer.message.content and not calls
            output.append(items.reasoning(0, answer.message.reasoning, _status(cut_here)))
        if answer.message.content:
            phase = "commentary" if calls else "final_answer"
            status = _status(is_cut and not calls)
            output.append(
                items.message(len(output), answer.message.content, answer.content_logprobs, status, phase)
            )  # fmt: skip
        for i, tool_call in enumerate(calls):
            status = _status(is_cut and i + 1 == len(calls))
            output.append(items.call(len(output), tool_call.id, tool_call.name, tool_call.arguments, status))
        return items.response(_outcome(answer.finish), output, usage, answer.finish)

    def stream(self, call: Call, head: Head) -> ResponseStream:
        return ResponseStream(call, head)

    def error(self, error: ApiError) -> dict[str, Any]:
        return error_body(error)


# ---- reading: items -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """An item of the input, whatever its type.

    Attributes:
        kind: a role, or `reasoning`, `call`, `result`, `nothing`.
    """

    kind: str
    text: str = ""
    call: ToolCall | None = None
    id: str = ""


def _read_input(fields: Fields) -> list[_Item] | None:
    """The items as far as their types go; None where there are none."""
    given = fields.any("input")
    if given is None:
        return None
    if isinstance(given, str):
        return [_Item("user", given)]
    if not isinstance(given, list):
        wrong_type(fields.rules, "input", "a string or a list of items", given)
    if len(given) > MAX_MESSAGES:
        raise ApiError(400, f"{len(given)} items are given, at most {MAX_MESSAGES} are allowed", param="input")
    items = [_read_item(item) for item in fields.objects("input") or ()]
    return [item if item is not None else _NOTHING for item in items]


_NOTHING = _Item("nothing")
"""An item of a type that says nothing to the model."""


def _read_item(item: Fields) -> _Item | None:
    """An item; None for one of a type that says nothing to the model."""
    kind = item.text("type", "message")
    match kind:
        case "message":
            item.required("role")
            role = item.word("role", ("user", "assistant", "system", "developer"))
            if role is None:
                wrong_type(item.rules, item.at("role"), "user, assistant, system or developer", None)
            content = item.required("content")
            # The service shows a developer's words in the place of a user's.
            return _Item("user" if role == "developer" else role, _read_parts(item, "content", content))
        case "function_call":
            name, namespace = item.required_text("name"), item.text("namespace")
            name = f"{namespace}__{name}" if namespace else name
            return _Item("call", call=ToolCall(name, item.required_text("arguments"), item.required_text("call_id")))
        case "custom_tool_call":
            arguments = json.dumps({_PATCH_FIELD: item.required_text("input")}, ensure_ascii=False)
            call = ToolCall(item.required_text("name"), arguments, item.required_text("call_id"))
            return _Item("call", call=call)
        case "function_call_output" | "custom_tool_call_output":
            output = item.required("output")
            text = _read_parts(item, "output", output, is_result=True)
            return _Item("result", text, id=item.required_text("call_id"))
        case "reasoning":
            return _Item("reasoning", _read_reasoning(item))
        case "item_reference" if not item.rules.hosted:
            raise ApiError(
                400, f"{item.path}: item references are not supported; nothing is stored, send the items themselves",
                param=item.path,
            )  # fmt: skip
    return None


_TEXT_PARTS = ("input_text", "output_text")


def _read_parts(item: Fields, name: str, value: Any, is_result: bool = False) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        wrong_type(item.rules, item.at(name), "a string or a list of parts", value)
    hosted = item.rules.hosted
    texts = []
    for part in item.objects(name) or ():
        part.required("type")
        kind = part.text("type")
        if kind in _TEXT_PARTS or (kind == "text" and not hosted):
            texts.append(part.required_text("text"))
        elif kind == "refusal" and not hosted:
            texts.append(part.required_text("refusal"))
        elif kind in ("input_image", "input_file"):
            if not is_result and not hosted:
                raise ApiError(
                    400, f"{part.path}: parts of type {kind} are not supported; this model reads text only",
                    param=part.path,
                )  # fmt: skip
            texts.append(IMAGE_TEXT if kind == "input_image" else "[Unsupported Document]")
        else:
            wrong_type(item.rules, part.at("type"), "input_text or output_text", kind)
    return "\n\n".join(texts)


def _read_reasoning(item: Fields) -> str:
    """The text of earlier reasoning: its content, or what we sealed, or its summary."""
    texts = [part.required_text("text") for part in item.objects("content") or () if part.any("text") is not None]
    if not texts and not item.rules.hosted:
        sealed = item.text("encrypted_content")
        if sealed is not None and sealed.startswith(_SEAL):
            try:
                return base64.b64decode(sealed[len(_SEAL) :], validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                pass  # not ours after all, or cut on the way: the summary is next
        texts = [part.required_text("text") for part in item.objects("summary") or () if part.any("text") is not None]
    return "\n".join(texts)


def _join_items(instructions: str | None, items: list[_Item] | None, rules: Rules) -> tuple[Message, ...]:
    """Messages: what an assistant thought, said and called between two turns of others is one message.

    Raises:
        ApiError: nothing at all, a call without its output behind it, or an output without a call.
    """
    if items is None and not instructions:
        raise ApiError(400, "Either input or instructions must be provided", param="input")
    if items is not None and not items:
        raise ApiError(400, "Input items array must not be empty", param="input")
    if rules.hosted:
        _check_ids(items or [])
    messages: list[Message] = [Message("system", instructions)] if instructions is not None else []
    reasoning: list[str] = []
    contents: list[str] = []
    calls: dict[str, ToolCall] = {}
    results: dict[str, Message] = {}

    def flush() -> None:
        for call_id in calls:
            if call_id not in results:
                raise ApiError(400, f"No tool output found for tool call {call_id[:100]}.", param="input")
        if reasoning or contents or calls:
            thought = "\n".join(reasoning) if reasoning else None
            messages.append(Message("assistant", "\n\n".join(contents), thought, tuple(calls.values())))
        messages.extend(results[call_id] for call_id in calls)
        for part in (reasoning, contents, calls, results):
            part.clear()

    for item in items or ():
        if item is _NOTHING:
            continue
        if item.kind == "result":
            if item.id in results:
                raise ApiError(400, f"Duplicate tool output for call_id: {item.id[:100]}.", param="input")
            if item.id not in calls:
                raise ApiError(400, f"No tool call found for tool output with call_id {item.id[:100]}.", param="input")
            results[item.id] = Message("tool", item.text, tool_call_id=item.id)
            continue
        if item.kind == "call":
            assert item.call is not None
            if results:
                flush()
            if item.call.id in calls:
                raise ApiError(400, f"Duplicate 'call_id': {item.call.id[:100]}.", param="input")
            calls[item.call.id] = item.call
            continue
        if calls:
            flush()
        if item.kind == "reasoning":
            if contents:
                flush()
            reasoning.append(item.text)
        elif item.kind == "assistant":
            contents.append(item.text)
        else:
            flush()
            messages.append(Message("system" if item.kind == "system" else "user", item.text))
    flush()
    if not messages:
        raise ApiError(400, "Input items array must not be empty", param="input")
    return tuple(messages)


def _check_ids(items: list[_Item]) -> None:
    """The hosted rules want every call of a conversation to have an id of its own; otherwise every call of a turn."""
    seen: set[str] = set()
    for item in items:
        if item.call is not None:
            if item.call.id in seen:
                raise ApiError(400, f"Duplicate 'call_id': {item.call.id[:100]}.", param="input")
            seen.add(item.call.id)


# ---- reading: tools and format --------------------------------------------------------------------------------------


@dataclass
class _Tools:
    """What was declared.

    Attributes:
        declared: functions, each with the place of its name and its parameters as given.
        unsupported: places of custom tools that the hosted rules refuse.
        custom: names of custom tools. namespaces: full name to (namespace, local name).
        echo: the declarations as the reply repeats them.
        dropped: where a tool stood that only a vendor's servers can run.
    """

    declared: list[tuple[Tool, str, Any]] = field(default_factory=list)
    unsupported: set[str] = field(default_factory=set)
    custom: set[str] = field(default_factory=set)
    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    echo: list[Any] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def _read_tools(fields: Fields) -> _Tools:
    tools = _Tools()
    for i, tool in enumerate(fields.objects("tools") or ()):
        tool.required("type")
        kind = tool.text("type")
        match kind:
            case "function":
                tools.echo.append(_add_function(tools, tool, ""))
            case "custom":
                name = tool.required_text("name")
                if tool.rules.hosted and name != "apply_patch":
                    tools.unsupported.add(tool.at("name"))
                tools.custom.add(name)
                tools.declared.append((_custom_tool(tool, name), tool.at("name"), None))
                tools.echo.append(dict(tool.value))
            case "namespace":
                namespace = tool.required_text("name")
                for function in tool.objects("tools") or ():
                    local = function.required_text("name")
                    tools.namespaces[f"{namespace}__{local}"] = (namespace, local)
                    _add_function(tools, function, f"{namespace}__")
                tools.echo.append(dict(tool.value))
            case None:
                wrong_type(fields.rules, tool.at("type"), "a string", None)
            case _:
                tools.dropped.append(f"tools.{i}.type")
                tools.echo.append(dict(tool.value))
    tools.dropped = tools.dropped[:8]
    return tools


def _add_function(tools: _Tools, function: Fields, prefix: str) -> dict[str, Any]:
    name = prefix + function.required_text("name")
    description, schema = function.text("description"), function.any("parameters")
    strict = function.flag("strict")
    tools.declared.append((Tool(function_object(name, description, schema), strict), function.at("name"), schema))
    return {
        "type": "function",
        "name": name,
        "description": description,
        "parameters": schema if isinstance(schema, dict) else {},
        "strict": function.value.get("strict"),
    }


def _custom_tool(tool: Fields, name: str) -> Tool:
    """A tool of free text as a function with one string; the grammar it must follow is told, not enforced."""
    description = tool.text("description", "") or ""
    form = tool.object("format")
    definition = form.any("definition") if form is not None else None
    if isinstance(definition, str):
        syntax = form.any("syntax") if form is not None else None
        described = f" ({syntax})" if isinstance(syntax, str) else ""
        description = f"{description}\n\n`{_PATCH_FIELD}` must match this grammar{described}:\n{definition}".strip()
    schema = {
        "type": "object",
        "properties": {_PATCH_FIELD: {"type": "string", "description": f"The whole input of {name}, as plain text."}},
        "required": [_PATCH_FIELD],
        "additionalProperties": False,
    }
    return Tool(function_object(name, description, schema))


def _read_tool_choice(fields: Fields) -> tuple[ToolChoice, str | None, list[str] | None]:
    """The choice, the function it names, and the functions it allows (None: all)."""
    choice, rules = fields.any("tool_choice"), fields.rules
    if choice is None:
        return "auto", None, None
    if choice in ("none", "auto", "required"):
        return choice, None, None
    if not isinstance(choice, dict):
        wrong_type(rules, "tool_choice", "none, auto, required or a tool", choice)
    named = Fields(choice, rules, "tool_choice")
    named.required("type")
    kind = named.text("type")
    match kind:
        case "function" | "custom":
            return "named", named.required_text("name"), None
        case "web_search" | "web_search_2025_08_26":
            return "auto", None, None
        case "allowed_tools" if not rules.hosted:
            mode = named.word("mode", ("auto", "required"))
            names = [tool.required_text("name") for tool in named.objects("tools") or ()]
            return "required" if mode == "required" else "auto", None, names
    wrong_type(rules, "tool_choice.type", "function, custom or allowed_tools", kind)


def _read_format(text: Fields | None) -> Fields | None:
    if text is None:
        return None
    text.text("verbosity")
    form = text.object("format")
    if form is None:
        if "format" in text.value and text.rules.hosted:
            wrong_type(text.rules, text.at("format"), "an object", None)
        return None
    form.required("type")
    if form.word("type", ("text", "json_schema", "json_object")) is None:
        wrong_type(text.rules, form.at("type"), "text, json_schema or json_object", None)
    if form.value["type"] == "json_schema":
        if text.rules.hosted:
            form.required_text("name")
        form.required("schema")
        form.flag("strict")
    return form


def _check_format(form: Fields | None, messages: tuple[Message, ...], rules: Rules) -> AnswerFormat | None:
    if form is None or form.value["type"] == "text":
        return None
    if form.value["type"] == "json_schema":
        return json_schema_format(form.value["schema"], "text.format.schema")
    said = (message.content.lower() for message in messages)
    if rules.hosted and not any("json" in text for text in said):
        raise ApiError(
            400, "Response input messages must contain the word 'json' in some form to use 'text.format' of type"
            " 'json_object'.", param="text.format",
        )  # fmt: skip
    return AnswerFormat("json_object")


def _text_echo(form: Fields | None, text: Fields | None) -> dict[str, Any]:
    shape: dict[str, Any] = {"type": "text"}
    if form is not None:
        shape = {"type": form.value["type"]}
        if shape["type"] == "json_schema":
            shape |= {key: form.value.get(key) for key in ("name", "schema", "description", "strict")}
    return {"format": shape, "verbosity": text.value.get("verbosity") if text is not None else None}


# ---- writing --------------------------------------------------------------------------------------------------------


def _status(is_cut: bool) -> str:
    return "incomplete" if is_cut else "completed"


def _outcome(finish: Finish) -> str:
    if finish.reason == "length":
        return "incomplete"
    return "failed" if finish.reason == "insufficient_system_resource" else "completed"


class _Items:
    """The items of one reply as JSON, and the reply around them."""

    def __init__(self, call: Call, head: Head) -> None:
        self._call, self._head = call, head
        self.custom: set[str] = call.echo.get("custom", set())
        self.namespaces: dict[str, tuple[str, str]] = call.echo.get("namespaces", {})

    def id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self._head.id}_{index}"

    def reasoning(self, index: int, text: str, status: str) -> dict[str, Any]:
        sealed = f"{self._head.id}-{index}"
        if self._call.echo.get("seals") and status != "in_progress":
            sealed = _SEAL + base64.b64encode(text.encode("utf-8", "replace")).decode()
        return {
            "type": "reasoning",
            "id": self.id("rs", index),
            "status": status,
            "content": [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}],
            "summary": [],
            "encrypted_content": sealed,
        }

    def message(
        self, index: int, text: str, logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob], status: str, phase: str
    ) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.id("msg", index),
            "status": status,
            "role": "assistant",
            "phase": phase,
            "content": [] if status == "in_progress" else [_output_text(text, logprobs)],
        }

    def call(self, index: int, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
        if name in self.custom:
            return {
                "type": "custom_tool_call",
                "id": self.id("ctc", index),
                "status": status,
                "call_id": call_id,
                "name": name,
                "input": _free_text(arguments),
            }
        namespace, local = self.namespaces.get(name, (None, name))
        return {
            "type": "function_call",
            "id": self.id("fc", index),
            "status": status,
            "call_id": call_id,
            "name": local,
            **({"namespace": namespace} if namespace is not None else {}),
            "arguments": arguments,
        }

    def response(
        self,
        status: str,
        output: list[dict[str, Any]],
        usage: Usage | None = None,
        finish: Finish | None = None,
        error: ApiError | None = None,
    ) -> dict[str, Any]:
        """The reply as an object, with the settings of the request."""
        head, echo = self._head, self._call.echo.get("fields", {})
        failed = None
        if error is not None:
            failed = {
                "code": "rate_limit_exceeded" if error.status == 429 else "server_error",
                "message": error.message,
            }
        elif status == "failed":
            failed = {
                "code": "server_error",
                "message": "The server ran out of resources before the answer was complete.",
            }
        cut = {"reason": "max_output_tokens"} if finish is not None and finish.reason == "length" else None
        return {
            "id": f"resp_{head.id}",
            "object": "response",
            "created_at": head.created,
            "status": status,
            "background": False,
            "completed_at": None if status == "in_progress" else int(time.time()),
            "content_filters": None,
            "error": failed,
            "frequency_penalty": 0.0,
            "incomplete_details": cut,
            "instructions": echo.get("instructions"),
            "max_output_tokens": echo.get("max_output_tokens"),
            "max_tool_calls": None,
            "model": head.model,
            "moderation": None,
            "output": output,
            "parallel_tool_calls": echo.get("parallel_tool_calls", True),
            "presence_penalty": 0.0,
            "previous_response_id": None,
            "prompt_cache_key": None,
            "prompt_cache_retention": None,
            "reasoning": echo.get("reasoning"),
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "temperature": echo.get("temperature", 1.0),
            "text": echo.get("text"),
            "tool_choice": echo.get("tool_choice", "auto"),
            "tools": echo.get("tools", []),
            "top_logprobs": echo.get("top_logprobs", 0),
            "top_p": echo.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": echo.get("user"),
            "metadata": echo.get("metadata", {}),
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # The SDK's types want the second number; here nothing is charged for writing.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _output_text(text: str, logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> dict[str, Any]:
    return {
        "type": "output_text",
        "annotations": [],
        "logprobs": [logprob_body(token) for token in logprobs],
        "text": text,
    }


def _free_text(arguments: str) -> str:
    """The text of a custom tool's call; arguments that are not as asked are passed on as they are."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = value.get(_PATCH_FIELD) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


@dataclass
class _Open:
    """The item that is being written.

    Attributes:
        kind: reasoning, message or call. delta, rest: bytes of a delta before its text and behind it.
    """

    kind: str
    index: int
    item_id: str
    delta: bytes = b""
    rest: bytes = b""
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    call_id: str = ""
    name: str = ""


class ResponseStream:
    """A response as server-sent events with rising sequence numbers, and no `[DONE]`."""

    def __init__(self, call: Call, head: Head) -> None:
        self._items = _Items(call, head)
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._finish: Finish | None = None

    def begin(self) -> bytes:
        response = self._items.response("in_progress", [])
        created = self._frame("response.created", {"response": response})
        return created + self._frame("response.in_progress", {"response": response})

    def event(self, event: Event) -> bytes:
        if isinstance(event, Content):
            return self._text("message", event)
        if isinstance(event, Reasoning):
            return self._text("reasoning", event)
        if isinstance(event, ToolArguments):
            item = self._open
            assert item is not None, "arguments follow the beginning of their call"
            item.texts.append(event.text)
            # A custom tool's text stands inside a JSON string here: it is sent when it can be read, at the end.
            return b"" if item.name in self._items.custom else self._delta(item, event.text)
        if isinstance(event, ToolBegin):
            return self._begin_call(event)
        if isinstance(event, ToolEnd):
            return self._close("completed")
        self._finish = event
        return self._close(_status(event.reason == "length"))

    def end(self, usage: Usage) -> bytes:
        assert self._finish is not None, "a stream ends after its Finish"
        status = _outcome(self._finish)
        response = self._items.response(status, self._output, usage, self._finish)
        return self._frame(f"response.{status}", {"response": response})

    def error(self, error: ApiError) -> bytes:
        """Two frames: Codex looks for `response.failed`, the openai SDK raises on an object with `error`."""
        response = self._items.response("failed", self._output, error=error)
        failed = self._frame("response.failed", {"response": response})
        detail = {
            "code": error.code, "message": error.message, "param": error.param, **error_body(error),
        }  # fmt: skip
        return failed + self._frame("error", detail)

    def _frame(self, name: str, data: Mapping[str, Any]) -> bytes:
        body = orjson.dumps({"type": name, **data, "sequence_number": self._sequence})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), body)

    def _delta(self, item: _Open, text: str) -> bytes:
        self._sequence += 1
        return item.delta + orjson.dumps(text) + item.rest + b"%d}\n\n" % (self._sequence - 1)

    def _text(self, kind: str, event: Content | Reasoning) -> bytes:
        item = self._open
        opening = b""
        if item is None or item.kind != kind:
            opening = self._begin_text(kind)
            item = self._open
            assert item is not None
        item.texts.append(event.text)
        if event.logprobs and kind == "message":
            item.logprobs.extend(event.logprobs)
            logprobs = [logprob_body(token) for token in event.logprobs]
            data = {
                "content_index": 0, "delta": event.text, "item_id": item.item_id, "logprobs": logprobs,
                "output_index": item.index,
            }  # fmt: skip
            return opening + self._frame("response.output_text.delta", data)
        return opening + self._delta(item, event.text)

    def _begin_text(self, kind: str) -> bytes:
        closing = self._close("completed")
        index = len(self._output)
        if kind == "message":
            name, item_id = "response.output_text.delta", self._items.id("msg", index)
            shape = self._items.message(index, "", (), "in_progress", "final_answer")
            part, logprobs = _output_text("", ()), b'"logprobs":[],'
        else:
            name, item_id = "response.reasoning_text.delta", self._items.id("rs", index)
            shape = self._items.reasoning(index, "", "in_progress")
            part, logprobs = {"type": "reasoning_text", "text": ""}, b""
        delta = b'event: %b\ndata: {"type":"%b","content_index":0,"delta":' % (name.encode(), name.encode())
        rest = b',"item_id":"%b",%b"output_index":%d,"sequence_number":' % (item_id.encode(), logprobs, index)
        self._open = _Open(kind, index, item_id, delta, rest)
        added = self._frame("response.output_item.added", {"item": shape, "output_index": index})
        place = {"content_index": 0, "item_id": item_id, "output_index": index}
        return closing + added + self._frame("response.content_part.added", {**place, "part": part})

    def _begin_call(self, event: ToolBegin) -> bytes:
        closing = self._close("completed", followed_by_call=True)
        index = len(self._output)
        shape = self._items.call(index, event.id, event.name, "", "in_progress")
        item_id = shape["id"]
        name = b"response.function_call_arguments.delta"
        delta = b'event: %b\ndata: {"type":"%b","delta":' % (name, name)
        rest = b',"item_id":"%b","output_index":%d,"sequence_number":' % (item_id.encode(), index)
        self._open = _Open("call", index, item_id, delta, rest, call_id=event.id, name=event.name)
        return closing + self._frame("response.output_item.added", {"item": shape, "output_index": index})

    def _close(self, status: str, followed_by_call: bool = False) -> bytes:
        item = self._open
        if item is None:
            return b""
        self._open = None
        text = "".join(item.texts)
        place = {"item_id": item.item_id, "output_index": item.index}
        frames = []
        if item.kind == "call":
            shape = self._items.call(item.index, item.call_id, item.name, text, status)
            if item.name in self._items.custom:
                given = shape["input"]
                frames.append(self._frame("response.custom_tool_call_input.delta", {"delta": given, **place}))
                frames.append(self._frame("response.custom_tool_call_input.done", {"input": given, **place}))
            else:
                done = {"arguments": text, **place}
                frames.append(self._frame("response.function_call_arguments.done", done))
        else:
            if item.kind == "message":
                phase = "commentary" if followed_by_call else "final_answer"
                shape = self._items.message(item.index, text, item.logprobs, status, phase)
                part = _output_text(text, item.logprobs)
                done = {"content_index": 0, **place, "logprobs": part["logprobs"], "text": text}
                frames.append(self._frame("response.output_text.done", done))
            else:
                shape = self._items.reasoning(item.index, text, status)
                part = {"type": "reasoning_text", "text": text}
                frames.append(self._frame("response.reasoning_text.done", {"content_index": 0, **place, "text": text}))
            frames.append(self._frame("response.content_part.done", {"content_index": 0, **place, "part": part}))
        self._output.append(shape)
        frames.append(self._frame("response.output_item.done", {"item": shape, "output_index": item.index}))
        return b"".join(frames)


RESPONSES = Responses()
