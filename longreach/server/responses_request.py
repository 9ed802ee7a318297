"""Requests of `/responses`: what is accepted, ignored and refused, and how items become a conversation.

    read_response(body, rules) -> Call

Custom tools become functions with one string, `input`; the functions of a namespace are named `namespace__function`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from longreach.chat.messages import AnswerFormat, Conversation, Message, Tool, ToolCall
from longreach.server.call import (
    ApiError,
    Call,
    Rules,
)
from longreach.server.fields import Fields, Unsupported, open_body, wrong_type
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

SEAL = "plain:"
"""What our `encrypted_content` begins with."""

FREE_TEXT = "input"
"""The one parameter of a custom tool."""


def read_response(body: Mapping[str, Any], rules: Rules) -> Call:
    """A body of `/responses` as a call. What the reply repeats is in its `echo`.

    Raises:
        ApiError: it breaks a rule.
    """
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
            arguments = json.dumps({FREE_TEXT: item.required_text("input")}, ensure_ascii=False)
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
        if sealed is not None and sealed.startswith(SEAL):
            try:
                return base64.b64decode(sealed[len(SEAL) :], validate=True).decode()
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
        description = f"{description}\n\n`{FREE_TEXT}` must match this grammar{described}:\n{definition}".strip()
    schema = {
        "type": "object",
        "properties": {FREE_TEXT: {"type": "string", "description": f"The whole input of {name}, as plain text."}},
        "required": [FREE_TEXT],
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
