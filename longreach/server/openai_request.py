"""Requests of `/chat/completions` and `/completions`: what is accepted, ignored and refused.

    read_chat(body, rules) -> Call          read_completion(body, rules) -> Call

Under the hosted rules a request is accepted and refused as DeepSeek's own service does. The default rules are meant for
clients as they are: `developer` is a system message, `max_completion_tokens` is `max_tokens`, `n` goes to 16, a JSON schema
or a regex is honoured, a tool call can be forced while thinking, and what would change the answer but is not supported is
refused by name instead of ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from longreach.chat.messages import AnswerFormat, Conversation, Message, Tool, ToolCall
from longreach.server.call import ApiError, Call, FillIn, Rules
from longreach.server.fields import Fields, Unsupported, malformed, open_body, shown, wrong_type
from longreach.server.request_rules import (
    EFFORTS,
    IMAGE_TEXT,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    ToolChoice,
    check_declared,
    check_format_with_tools,
    check_max_tokens,
    check_n,
    check_reasoning_came_back,
    check_seed,
    check_stop,
    check_tool_name,
    check_tool_results,
    choose_thinking,
    function_object,
    hosted_sampling,
    json_schema_format,
    only_tools,
    read_logit_bias,
    read_max_tokens,
    read_sampling,
    read_seed,
    read_thinking,
    read_user_id,
    settle_messages,
    settle_tool_choice,
)

HARMLESS: Mapping[str, str] = {
    "user": "OpenAI's own account field; caches are isolated by `user_id`",
    "metadata": "labels for OpenAI's dashboard",
    "store": "nothing is stored",
    "service_tier": "there is one tier",
    "safety_identifier": "OpenAI's abuse checks",
    "prompt_cache_key": "caching is automatic",
    "prompt_cache_retention": "caching is automatic",
    "prompt_cache_options": "caching is automatic",
    "cache_control": "caching is automatic",
    "prediction": "saves the hosted API time; the answer is the same",
    "stream_options.include_obfuscation": "padding against observers of an encrypted line",
    "messages[].name": "not shown to the model",
    "thinking.budget_tokens": "the effort decides; `max_tokens` bounds reasoning and answer together",
}
"""Fields of `/chat/completions` that are accepted and change nothing. Unknown names are ignored as well; either way the
names that had no effect are reported (`Call.ignored`)."""

_ANSWER_FORMAT = 'use response_format: {"type": "json_schema" | "regex" | "json_object", …}'

UNSUPPORTED_SAMPLING: Mapping[str, Unsupported] = {
    "best_of": Unsupported("ask for `n` answers and choose among them", (1,)),
    "use_beam_search": Unsupported("answers are drawn; leave it out", (False,)),
    "length_penalty": Unsupported("it belongs to beam search; leave it out", (1, 1.0)),
    "min_tokens": Unsupported("leave it out", (0,)),
    "ignore_eos": Unsupported("leave it out", (False,)),
    "stop_token_ids": Unsupported("use `stop` with strings", ([],)),
    "bad_words": Unsupported("use `logit_bias`", ([],)),
    "allowed_token_ids": Unsupported("use `logit_bias` or a regex in `response_format`", ([],)),
    "include_stop_str_in_output": Unsupported("leave it out", (False,)),
    "skip_special_tokens": Unsupported("special tokens are never part of the text; leave it out", (True,)),
    "logits_processors": Unsupported("leave it out", ([],)),
    "prompt_logprobs": Unsupported("only the answer has log-probabilities; use `logprobs`", (0, False)),
    "typical_p": Unsupported("use `top_p` or `min_p`", (1, 1.0)),
    "mirostat": Unsupported("use `top_p` or `min_p`", (0,)),
    "grammar": Unsupported(_ANSWER_FORMAT),
    "guided_json": Unsupported(_ANSWER_FORMAT),
    "guided_regex": Unsupported(_ANSWER_FORMAT),
    "guided_choice": Unsupported(_ANSWER_FORMAT),
    "guided_grammar": Unsupported(_ANSWER_FORMAT),
    "structured_outputs": Unsupported(_ANSWER_FORMAT),
    "json_schema": Unsupported(_ANSWER_FORMAT),
}

UNSUPPORTED: Mapping[str, Unsupported] = {
    "functions": Unsupported("use `tools`", ([],)),
    "function_call": Unsupported("use `tool_choice`", ("auto", "none")),
    "audio": Unsupported("this model reads and writes text"),
    "modalities": Unsupported("this model reads and writes text", (["text"],)),
    "web_search_options": Unsupported("the server searches nothing; give the model a tool that does"),
    "verbosity": Unsupported("say in the system message how long the answer shall be", ("medium",)),
    "reasoning": Unsupported('use `reasoning_effort`, or `thinking: {"type": "disabled"}`'),
    "think": Unsupported('use `thinking: {"type": "enabled" | "disabled"}`'),
    "enable_thinking": Unsupported('use `thinking: {"type": "enabled" | "disabled"}`'),
    "thinking_budget": Unsupported("use `reasoning_effort`"),
    "continue_final_message": Unsupported("set `prefix: true` in the last assistant message", (False,)),
    "add_generation_prompt": Unsupported("an answer always follows; leave it out", (True,)),
    "chat_template": Unsupported("the layout belongs to the model; leave it out"),
    "documents": Unsupported("put them into a message", ([],)),
    "echo": Unsupported("leave it out", (False,)),
    **UNSUPPORTED_SAMPLING,
}
"""Fields of `/chat/completions`, here and in other servers, that would change the answer and are refused by name."""

_HOSTED_ROLES = ("system", "user", "assistant", "tool", "latest_reminder")
_ROLES = (*_HOSTED_ROLES, "developer")


def read_chat(body: Mapping[str, Any], rules: Rules) -> Call:
    """A body of `/chat/completions` as a call.

    Raises:
        ApiError: it breaks a rule.
    """
    fields = open_body(body, rules)
    model = fields.required_text("model")
    turns = [_read_message(turn, rules) for turn in _required_objects(fields, "messages")]
    tools = _read_tools(fields, rules)
    choice, tool_name, allowed = _read_tool_choice(fields)
    answer_format = _read_response_format(fields, rules)
    thinking, effort, effort_given = _read_modes(fields, rules)
    numbers = {name: fields.number(name) for name in _NUMBERS}
    max_tokens = read_max_tokens(fields, *(() if rules.hosted else ("max_completion_tokens",)), "max_tokens")
    stop, stop_is_list = fields.strings("stop"), isinstance(fields.value.get("stop"), list)
    stream, wants_usage, has_stream_options = read_stream(fields)
    n, seed = fields.integer("n", high=255), read_seed(fields)
    logprobs, top_logprobs = fields.flag("logprobs"), fields.integer("top_logprobs", high=255)
    user_id = read_user_id(fields)
    parallel = rules.hosted or fields.flag("parallel_tool_calls", True)

    # Rules are checked in the order of DeepSeek's service, so that of two mistakes the same one is named.
    for tool, given in tools:
        check_tool_name(tool.name, given.at("name"))
    messages = _check_messages(turns, rules)
    check_reasoning_came_back(messages, thinking, bool(tools), rules, "reasoning_content")
    answer_format = _check_answer_format(answer_format, messages, rules)
    declares_tools = bool(tools)
    declared = [(tool, given.any("parameters")) for tool, given in tools]
    tools = check_declared(declared, rules) if choice != "none" else ()
    if allowed is not None:
        tools = only_tools(tools, allowed)
    choice, tool_name = settle_tool_choice(choice, tool_name, tools, thinking, rules)
    if tool_name is not None and rules.hosted:
        tools = only_tools(tools, [tool_name])
    forced = choice in ("required", "named")
    if messages[-1].is_open:
        if answer_format is not None:
            raise ApiError(
                400, f"response_format {answer_format.kind} should not be used with prefix", param="response_format"
            )  # fmt: skip
        if forced or (rules.hosted and (declares_tools or any(message.tool_calls for message in messages))):
            raise ApiError(400, "Function call should not be used with prefix", param="tool_choice")
    check_stop(stop, stop_is_list)
    if has_stream_options and not stream:
        raise ApiError(400, "stream_options should be set along with stream = true", param="stream_options")
    check_format_with_tools(answer_format, tools, rules)
    n = check_n(n, rules)
    sampling = read_sampling(fields, numbers)
    if rules.hosted:
        sampling = hosted_sampling(model, thinking, bool(tools), sampling, numbers["top_p"])
    logprobs = _check_logprobs(logprobs, top_logprobs, rules)
    check_max_tokens(max_tokens)
    check_seed(seed)
    logit_bias = read_logit_bias(fields)
    if not rules.hosted:
        fields.refuse(UNSUPPORTED)
    conversation = Conversation(
        settle_messages(messages, thinking), tools, answer_format, thinking, effort, must_call=forced
    )
    return Call(
        model=model, input=conversation, max_tokens=max_tokens, **asdict(sampling), stop=stop, seed=seed,
        logprobs=logprobs, logit_bias=logit_bias, tool_choice=choice, tool_name=tool_name,
        parallel_tool_calls=parallel, n=n, user_id=user_id, stream=stream, wants_usage=wants_usage,
        effort_given=effort_given, ignored=fields.unread(),
    )  # fmt: skip


# ---- reading --------------------------------------------------------------------------------------------------------

_NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty")


def _required_objects(fields: Fields, name: str) -> list[Fields]:
    fields.required(name)
    items = fields.objects(name)
    if items is None:
        wrong_type(fields.rules, fields.at(name), "a list", None)
    if len(items) > MAX_MESSAGES:
        raise ApiError(400, f"{len(items)} {name} are given, at most {MAX_MESSAGES} are allowed", param=name)
    return items


def _read_message(turn: Fields, rules: Rules) -> tuple[Message, Fields]:
    """A message as far as its types go, with its fields for the rules."""
    turn.required("role")
    role = turn.word("role", _HOSTED_ROLES if rules.hosted else _ROLES)
    match role:
        case "assistant":
            if not rules.hosted:
                turn.refuse(_UNSUPPORTED_IN_MESSAGES)
            reasoning = turn.text("reasoning_content")
            if reasoning is None and not rules.hosted:
                reasoning = turn.text("reasoning")
            if reasoning is not None and not rules.hosted and not reasoning.strip():
                reasoning = ""  # litellm sends a blank to get past the check for reasoning
            message = Message(
                "assistant",
                _read_content(turn, nullable=True),
                reasoning,
                tuple(_read_tool_call(call, rules) for call in turn.objects("tool_calls") or ()),
                is_open=turn.flag("prefix"),
            )
        case "tool":
            content = _read_content(turn, nullable=not rules.hosted)
            message = Message("tool", content, tool_call_id=turn.required_text("tool_call_id"))
        case "system" | "developer":
            message = Message("system", _read_content(turn))
        case "user":
            message = Message("user", _read_content(turn))
        case "latest_reminder":
            message = Message("latest_reminder", _read_content(turn))
        case _:
            wrong_type(rules, turn.at("role"), "one of " + ", ".join(_ROLES), None)
    return message, turn


_UNSUPPORTED_IN_MESSAGES: Mapping[str, Unsupported] = {"function_call": Unsupported("use `tool_calls`")}


def _read_content(turn: Fields, nullable: bool = False) -> str:
    """The text of a message; text parts are joined by an empty line, as DeepSeek's service does."""
    content = turn.any("content") if nullable else turn.required("content")
    if isinstance(content, str):
        return content
    if content is None and nullable:
        return ""
    if not isinstance(content, list):
        wrong_type(turn.rules, turn.at("content"), "a string or a list of text parts", content)
    return "\n\n".join(_read_part(part) for part in turn.objects("content") or ())


def _read_part(part: Fields) -> str:
    part.required("type")
    kind = part.text("type")
    hosted = part.rules.hosted
    if kind == "text":
        return part.required_text("text")
    if kind == "refusal" and not hosted:
        return part.required_text("refusal")
    if kind in ("image_url", "file") and hosted:
        if kind == "image_url":
            part.required("image_url")
            image = part.object("image_url")
            if image is None:
                wrong_type(part.rules, part.at("image_url"), "an object", None)
            image.required_text("url")
            image.word("detail", ("low", "high", "original", "auto"))
        return IMAGE_TEXT
    if kind in ("image_url", "input_image", "file", "input_audio", "video_url", "audio_url") and not hosted:
        raise ApiError(
            400, f"{part.path}: parts of type {kind} are not supported; this model reads text only, send text parts",
            param=part.path,
        )  # fmt: skip
    wrong_type(part.rules, part.at("type"), "text", kind)


def _read_tool_call(call: Fields, rules: Rules) -> ToolCall:
    if rules.hosted:
        call.required("type")
    call.word("type", ("function",))
    call_id = call.required_text("id")
    call.required("function")
    function = call.object("function")
    if function is None:
        wrong_type(rules, call.at("function"), "an object", None)
    name = function.required_text("name")
    arguments = function.required("arguments")
    if isinstance(arguments, dict) and not rules.hosted:
        # Some clients keep arguments parsed. The separators are those the model writes.
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        wrong_type(rules, function.at("arguments"), "a string of JSON", arguments)
    return ToolCall(name, arguments, call_id)


def _check_messages(turns: list[tuple[Message, Fields]], rules: Rules) -> tuple[Message, ...]:
    if not turns:
        raise ApiError(400, "Empty input messages", param="messages")
    for i, (message, turn) in enumerate(turns):
        if message.role != "assistant":
            continue
        if rules.hosted and turn.value.get("tool_calls") == []:
            raise ApiError(
                400, f"Invalid 'messages[{i}].tool_calls': empty array. Expected an array with minimum length 1, but"
                " got an empty array instead.", param=turn.at("tool_calls"),
            )  # fmt: skip
        if rules.hosted and turn.value.get("content") is None and not message.tool_calls:
            raise ApiError(400, "Invalid assistant message: content or tool_calls must be set", param=turn.path)
        if message.is_open and i + 1 < len(turns):
            raise ApiError(
                400, "Invalid completion message: prefix set true with message which is not final message or message"
                " role is not assistant", param=turn.at("prefix"),
            )  # fmt: skip
    messages = tuple(message for message, _ in turns)
    check_tool_results(messages)
    return messages


def _read_tools(fields: Fields, rules: Rules) -> list[tuple[Tool, Fields]]:
    """Tools as far as their types go, each with its function as it was given."""
    tools = []
    for tool in fields.objects("tools") or ():
        tool.required("type")
        kind = tool.any("type")
        if kind != "function":
            malformed(
                rules,
                f"{tool.path}.type: unknown variant {_quoted(kind)}, expected `function`",
                tool.at("type"),
                f"{tool.at('type')} is {shown(kind)}; only tools of type function are supported",
            )
        tool.required("function")
        function = tool.object("function")
        if function is None:
            wrong_type(rules, tool.at("function"), "an object", None)
        name = function.required_text("name")
        shape = function_object(name, function.text("description"), function.any("parameters"))
        tools.append((Tool(shape, function.flag("strict")), function))
    return tools


def _quoted(value: Any) -> str:
    return f"`{value[:100]}`" if isinstance(value, str) else shown(value)


def _read_tool_choice(fields: Fields) -> tuple[ToolChoice, str | None, list[str] | None]:
    """The choice, the function it names, and the functions it allows (None: all)."""
    choice = fields.any("tool_choice")
    rules = fields.rules
    if choice is None:
        return "auto", None, None
    if choice in ("none", "auto", "required"):
        return choice, None, None
    expected = "none, auto, required or a tool"
    if not isinstance(choice, dict) or "type" not in choice:
        wrong_type(rules, "tool_choice", expected, choice)
    named = Fields(choice, rules, "tool_choice")
    if choice["type"] == "function":
        function = named.object("function")
        if function is None:
            wrong_type(rules, "tool_choice.function", "an object", None)
        return "named", function.required_text("name"), None
    if choice["type"] == "allowed_tools" and not rules.hosted:
        allowed = named.object("allowed_tools")
        if allowed is None:
            wrong_type(rules, "tool_choice.allowed_tools", "an object", None)
        mode = allowed.word("mode", ("auto", "required"))
        names = [
            function.required_text("name")
            for tool in allowed.objects("tools") or ()
            if (function := tool.object("function")) is not None
        ]
        return "required" if mode == "required" else "auto", None, names
    wrong_type(rules, "tool_choice.type", "function" if rules.hosted else "function or allowed_tools", choice["type"])


def _read_response_format(fields: Fields, rules: Rules) -> Fields | None:
    """The format with the types of its fields checked; None where absent."""
    form = fields.object("response_format")
    if form is None:
        return None
    form.required("type")
    kind = form.any("type")
    form.word("type", ("text", "json_object", "json_schema", "regex"))
    if kind is None:
        wrong_type(rules, form.at("type"), "text, json_object, json_schema or regex", None)
    if kind == "json_schema":
        form.required("json_schema")
        inner = form.object("json_schema")
        if inner is None:
            wrong_type(rules, form.at("json_schema"), "an object", None)
        inner.required("schema")
        inner.flag("strict")
    elif kind == "regex":
        form.required_text("regex")
    return form


def _check_answer_format(form: Fields | None, messages: tuple[Message, ...], rules: Rules) -> AnswerFormat | None:
    if form is None:
        return None
    match form.value["type"]:
        case "text":
            return None
        case "json_object":
            if rules.hosted and not any("json" in message.content.lower() for message in messages):
                raise ApiError(
                    400, "Prompt must contain the word 'json' in some form to use 'response_format' of type"
                    " 'json_object'.", param="response_format",
                )  # fmt: skip
            return AnswerFormat("json_object")
        case _ if rules.hosted:
            raise ApiError(400, "This response_format type is unavailable now", param="response_format")
        case "json_schema":
            return json_schema_format(form.value["json_schema"]["schema"], "response_format.json_schema.schema")
        case _:
            return AnswerFormat("regex", regex=form.value["regex"])


def _read_modes(fields: Fields, rules: Rules) -> tuple[bool, Any, str | None]:
    """Thinking, effort, and the word for the effort as given."""
    switch, effort = read_thinking(fields), fields.word("reasoning_effort", EFFORTS)
    if not rules.hosted:
        # vLLM's clients put both into the arguments of its template.
        template = fields.object("chat_template_kwargs")
        if template is not None:
            for name in ("thinking", "enable_thinking"):
                given = template.any(name)
                if given is not None:
                    given = template.flag(name)
                    switch = given if switch is None else switch
            in_template = template.word("reasoning_effort", EFFORTS)
            effort = in_template if effort is None else effort
            for name in template.unread():
                raise ApiError(
                    400, f"chat_template_kwargs.{name} is not supported: the layout belongs to the model; thinking,"
                    " enable_thinking and reasoning_effort are honoured", param=f"chat_template_kwargs.{name}",
                )  # fmt: skip
    return *choose_thinking(switch, effort), effort


def read_stream(fields: Fields) -> tuple[bool, bool, bool]:
    """Whether to stream, whether usage was asked for in every chunk, and whether there were options at all."""
    options = fields.object("stream_options")
    wants_usage = options.flag("include_usage") if options is not None else False
    return fields.flag("stream"), wants_usage, options is not None


def _check_logprobs(logprobs: bool, top: int | None, rules: Rules) -> int | None:
    if top is not None and not logprobs and (rules.hosted or top > 0):
        raise ApiError(
            400, "Invalid top_logprobs and logprobs value, logprobs must be set to true if top_logprobs is used.",
            param="top_logprobs",
        )  # fmt: skip
    if top is not None and top > MAX_LOGPROBS:
        raise ApiError(
            400, f"Invalid top_logprobs value, the valid range of top_logprobs is [0, {MAX_LOGPROBS}].",
            param="top_logprobs",
        )  # fmt: skip
    return (top or 0) if logprobs else None


# ---- completions ----------------------------------------------------------------------------------------------------

UNSUPPORTED_IN_COMPLETIONS: Mapping[str, Unsupported] = {
    "response_format": Unsupported("use /chat/completions"),
    "tools": Unsupported("use /chat/completions", ([],)),
    "messages": Unsupported("use /chat/completions"),
    "thinking": Unsupported("use /chat/completions", ({"type": "disabled"},)),
    "reasoning_effort": Unsupported("use /chat/completions", ("none",)),
    **UNSUPPORTED_SAMPLING,
}
"""Fields of `/completions` that would change the answer and are refused by name."""


def read_completion(body: Mapping[str, Any], rules: Rules) -> Call:
    """A body of `/completions` as a call.

    Raises:
        ApiError: it breaks a rule.
    """
    fields = open_body(body, rules)
    model = fields.required_text("model")
    prompt = _read_prompt(fields)
    suffix, echo = fields.text("suffix"), fields.flag("echo")
    numbers = {name: fields.number(name) for name in _NUMBERS}
    max_tokens = read_max_tokens(fields, "max_tokens")
    stop, stop_is_list = fields.strings("stop"), isinstance(fields.value.get("stop"), list)
    stream, wants_usage, has_stream_options = read_stream(fields)
    n, seed = fields.integer("n", high=255), read_seed(fields)
    logprobs = fields.integer("logprobs", high=255)
    user_id = read_user_id(fields)

    check_stop(stop, stop_is_list)
    if has_stream_options and not stream:
        raise ApiError(400, "stream_options should be set along with stream = true", param="stream_options")
    n = check_n(n, rules)
    sampling = read_sampling(fields, numbers)
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise ApiError(
            400, f"Invalid logprobs value, the valid range of logprobs is [0, {MAX_LOGPROBS}].", param="logprobs"
        )  # fmt: skip
    if logprobs is not None and echo:
        raise ApiError(
            400, "logprobs together with echo is not supported: only the answer has log-probabilities; leave echo out",
            param="logprobs",
        )  # fmt: skip
    check_max_tokens(max_tokens)
    check_seed(seed)
    logit_bias = read_logit_bias(fields)
    if not rules.hosted:
        fields.refuse(UNSUPPORTED_IN_COMPLETIONS)
    return Call(
        model=model, input=FillIn(prompt, suffix or None, echo), max_tokens=max_tokens, **asdict(sampling), stop=stop,
        seed=seed, logprobs=logprobs, logit_bias=logit_bias, n=n, user_id=user_id, stream=stream,
        wants_usage=wants_usage, ignored=fields.unread(),
    )  # fmt: skip


def _read_prompt(fields: Fields) -> str:
    """The prompt: a string, or a list of just one."""
    prompt = fields.required("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        return prompt[0]
    if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
        raise ApiError(400, f"prompt holds {len(prompt)} texts; send one request for each", param="prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int | list):
        raise ApiError(400, "prompt holds token ids, which are not supported; send the text", param="prompt")
    wrong_type(fields.rules, "prompt", "a string", prompt)
