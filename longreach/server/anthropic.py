"""Anthropic's Messages as DeepSeek speaks them: `/v1/messages` and `/v1/messages/count_tokens`.

    ANTHROPIC.read(body, rules) -> Call;  ANTHROPIC.stream(call, head) -> message_start … message_stop

Under the hosted rules a request is accepted and refused as DeepSeek's service does. By default more is understood: a forced
call while thinking, a JSON schema (`output_config.format`), `strict` tools, `top_k`, documents of plain text, results in any
order, and, with thinking off, a last assistant message that the answer goes on from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    ToolArguments,
    ToolBegin,
    Usage,
)
from longreach.server.fields import Fields, Unsupported, open_body, wrong_type
from longreach.server.request_rules import (
    EFFORTS,
    IMAGE_TEXT,
    MAX_MESSAGES,
    MAX_OUTPUT_TOKENS,
    ToolChoice,
    check_declared,
    check_max_tokens,
    check_reasoning_came_back,
    check_stop,
    check_tool_name,
    choose_thinking,
    function_object,
    hosted_sampling,
    json_schema_format,
    only_tools,
    read_max_tokens,
    read_sampling,
    read_thinking,
    read_user_id,
    settle_messages,
    settle_tool_choice,
)

HARMLESS: Mapping[str, str] = {
    "cache_control": "caching is automatic; here and in every block and tool",
    "container": "code is not executed here",
    "context_management": "the client's context is left as it is",
    "service_tier": "there is one tier",
    "inference_geo": "there is one place",
    "speed": "there is one speed",
    "betas": "no feature here needs one",
    "anthropic_version": "one version is served",
    "thinking.budget_tokens": "the effort decides; `max_tokens` bounds reasoning and answer together",
    "thinking.display": "reasoning is always shown",
    "messages[].content[].citations": "answers carry none",
    "messages[].content[].signature": "reasoning needs no seal to be accepted",
    "messages[].content[].is_error": "the text of the result says so",
    "metadata": "all but `user_id`",
}
"""Fields of `/v1/messages` that are accepted and change nothing."""

UNSUPPORTED: Mapping[str, Unsupported] = {
    "mcp_servers": Unsupported("the server calls no tools; give them to the model as `tools`", ([],)),
}
"""Fields of `/v1/messages` that would change the answer and are refused by name."""

_LARGE = "[1m]"
"""What Claude Code appends to a model's name to ask for a long context; every model here has one."""

_BLOCKS = ("text", "image", "document", "thinking", "redacted_thinking", "tool_use", "tool_result", "server_tool_use",
           "web_search_tool_result")  # fmt: skip


_SOURCES = {"base64": ("media_type", "data"), "url": ("url",), "file": ("file_id",)}


def hosted_model(name: str) -> str:
    """The model that DeepSeek's service answers with for a Claude name; other names stay as they are."""
    if name.startswith("claude-opus"):
        return "deepseek-v4-pro"
    return "deepseek-flash" if name.startswith("claude") else name


def count_body(num_tokens: int) -> dict[str, Any]:
    """The body of a reply to `count_tokens`, whose request `ANTHROPIC.read` reads like any other."""
    return {"input_tokens": num_tokens}


class Anthropic:
    """`/v1/messages`."""

    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def read(self, body: Mapping[str, Any], rules: Rules) -> Call:
        fields = open_body(body, rules)
        model = fields.required_text("model")
        turns = _read_turns(fields)
        system = _read_system(fields)
        tools = [_read_tool(tool) for tool in fields.objects("tools") or ()]
        choice, tool_name, parallel = _read_tool_choice(fields)
        thinking, effort, effort_given, answer_format = _read_modes(fields)
        numbers = {name: fields.number(name) for name in ("temperature", "top_p")}
        max_tokens = read_max_tokens(fields, "max_tokens")
        stop = _read_stop(fields)
        metadata = fields.object("metadata")
        user_id = read_user_id(metadata) if metadata is not None else ""
        stream = fields.flag("stream")

        # Rules are checked in the order of DeepSeek's service, so that of two mistakes the same one is named.
        for i, (tool, kind, _) in enumerate(tools):
            _check_kind(kind, i, rules)
            check_tool_name(tool.name, f"tools[{i}].name")
        messages = _check_turns(turns, rules)
        check_reasoning_came_back(messages, thinking, bool(tools), rules, "content[].thinking")
        declared = [(tool, schema) for tool, _, schema in tools] if choice != "none" else []
        tools = check_declared(declared, rules, needs_schema=True)
        choice, tool_name = settle_tool_choice(choice, tool_name, tools, thinking, rules)
        if tool_name is not None and rules.hosted:
            tools = only_tools(tools, [tool_name])
        check_stop(stop, is_list=True)
        sampling = read_sampling(fields, numbers)
        if rules.hosted:
            sampling = hosted_sampling(model, thinking, bool(tools), sampling, numbers["top_p"])
        else:
            fields.refuse(UNSUPPORTED)
            messages = _open_last(messages, thinking)
        max_tokens = None if max_tokens is None else min(max_tokens, MAX_OUTPUT_TOKENS)
        check_max_tokens(max_tokens)
        if system:
            messages = (Message("system", system), *messages)
        forced = choice in ("required", "named")
        if forced and messages[-1].is_open:
            raise ApiError(400, "tool_choice cannot force a call that a last assistant message has begun to answer")
        return Call(
            model=model.removesuffix(_LARGE),
            input=Conversation(settle_messages(messages, thinking), tools, answer_format, thinking, effort, must_call=forced),
            max_tokens=max_tokens, **asdict(sampling), stop=stop, tool_choice=choice, tool_name=tool_name,
            parallel_tool_calls=parallel, user_id=user_id, stream=stream, wants_usage=True, effort_given=effort_given,
            ignored=fields.unread(),
        )  # fmt: skip

    def whole(self, call: Call, head: Head, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        answer = answers[0]
        content: list[dict[str, Any]] = []
        if answer.message.reasoning is not None or call.thinking:
            content.append(
                {"type": "thinking", "thinking": answer.message.reasoning or "", "signature": _reply_id(head)}
            )  # fmt: skip
        if answer.message.content:
            content.append({"type": "text", "text": answer.message.content})
        content += [
            {"type": "tool_use", "id": c.id, "name": c.name, "input": _input(c.arguments)}
            for c in answer.message.tool_calls
        ]
        return {
            **_message(head),
            "content": content,
            **_stop(answer.finish),
            "usage": _usage(usage.missed_tokens, usage.cached_tokens, usage.completion_tokens),
        }

    def stream(self, call: Call, head: Head) -> MessageStream:
        return MessageStream(call, head)

    def error(self, error: ApiError) -> dict[str, Any]:
        return error_body(error)


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A block of content. `text` of a thinking block is its reasoning, of a tool result its content."""

    kind: Literal["text", "thinking", "tool_use", "tool_result", "server_tool"]
    text: str = ""
    call: ToolCall | None = None
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class _Turn:
    role: str
    blocks: tuple[_Block, ...]


def _read_turns(fields: Fields) -> list[_Turn]:
    fields.required("messages")
    turns = fields.objects("messages")
    if turns is None:
        wrong_type(fields.rules, "messages", "a list", None)
    if len(turns) > MAX_MESSAGES:
        raise ApiError(400, f"{len(turns)} messages are given, at most {MAX_MESSAGES} are allowed", param="messages")
    return [_read_turn(turn) for turn in turns]


def _read_turn(turn: Fields) -> _Turn:
    turn.required("role")
    role = turn.word("role", ("user", "assistant", "system"))
    if role is None:
        wrong_type(turn.rules, turn.at("role"), "user, assistant or system", None)
    content = turn.required("content")
    if isinstance(content, str):
        return _Turn(role, (_Block("text", content),))
    if not isinstance(content, list):
        wrong_type(turn.rules, turn.at("content"), "a string or a list of blocks", content)
    blocks = [_read_block(block) for block in turn.objects("content") or ()]
    return _Turn(role, tuple(block for block in blocks if block is not None))


def _read_block(block: Fields) -> _Block | None:
    """A block; None for one that is dropped."""
    rules = block.rules
    block.required("type")
    kind = block.text("type")
    match kind:
        case "text":
            return _Block("text", block.required_text("text"))
        case "thinking":
            return _Block("thinking", block.required_text("thinking"))
        case "redacted_thinking" if not rules.hosted:
            return None
        case "tool_use":
            name, call_id = block.required_text("name"), block.required_text("id")
            # The separators are those the model writes.
            arguments = json.dumps(block.required("input"), ensure_ascii=False)
            return _Block("tool_use", call=ToolCall(name, arguments, call_id), id=call_id)
        case "tool_result":
            return _Block("tool_result", _read_result(block), id=block.required_text("tool_use_id"))
        case "server_tool_use" | "web_search_tool_result":
            return _Block("server_tool", name=kind)
        case "image" | "document":
            return _Block("text", _read_attachment(block, kind, is_result=False))
    allowed = [name for name in _BLOCKS if name != "redacted_thinking" or not rules.hosted]
    wrong_type(rules, block.at("type"), "one of " + ", ".join(allowed), kind)


def _read_attachment(block: Fields, kind: str, is_result: bool) -> str:
    """What the model is shown in place of an image or a document.

    A tool that returns an image must not end the conversation, so there the model is told that it cannot see it; an image
    from a user is refused by name, but under the hosted rules.
    """
    rules = block.rules
    block.required("source")
    source = block.object("source")
    if source is None:
        wrong_type(rules, block.at("source"), "an object", None)
    source.required("type")
    if kind == "image":
        of_kind = source.word("type", tuple(_SOURCES))
        if of_kind is None:
            wrong_type(rules, source.at("type"), "base64, url or file", None)
        for name in _SOURCES[of_kind]:
            source.required_text(name)
        if is_result or rules.hosted:
            return IMAGE_TEXT
        raise ApiError(400, f"{block.path}: image blocks are not supported; this model reads text only, send text")
    if source.any("type") == "text" and not rules.hosted:
        return source.required_text("data")
    if is_result or rules.hosted:
        media_type = source.any("media_type")
        return f"[Unsupported document type: {media_type if isinstance(media_type, str) else 'unknown'}]"
    raise ApiError(400, f"{block.path}: only documents of plain text are supported; send the text")


def _read_result(block: Fields) -> str:
    content = block.any("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(block.rules, block.at("content"), "a string or a list of blocks", content)
    parts = []
    for part in block.objects("content") or ():
        part.required("type")
        kind = part.text("type")
        if kind == "text":
            parts.append(part.required_text("text"))
        elif kind in ("image", "document"):
            parts.append(_read_attachment(part, kind, is_result=True))
        else:
            wrong_type(block.rules, part.at("type"), "one of text, image, document", kind)
    return "\n\n".join(parts)


def _read_system(fields: Fields) -> str:
    system = fields.any("system")
    if system is None or isinstance(system, str):
        return system or ""
    if not isinstance(system, list):
        wrong_type(fields.rules, "system", "a string or a list of text blocks", system)
    parts = []
    for block in fields.objects("system") or ():
        block.required("type")
        if block.word("type", ("text",)) is None:
            wrong_type(fields.rules, block.at("type"), "text", None)
        parts.append(block.required_text("text"))
    return "\n\n".join(parts)


def _read_tool(tool: Fields) -> tuple[Tool, str | None, Any]:
    """A tool, the type it claims, and its schema as given."""
    kind = tool.text("type")
    if "type" in tool.value and kind is None:
        wrong_type(tool.rules, tool.at("type"), "a string", None)
    is_ours = kind is None or (kind == "custom" and not tool.rules.hosted)
    name = tool.required_text("name") if is_ours else tool.text("name", "") or ""
    schema = tool.any("input_schema")
    strict = not tool.rules.hosted and tool.flag("strict")
    return Tool(function_object(name, tool.text("description"), schema), strict), kind, schema


def _check_kind(kind: str | None, index: int, rules: Rules) -> None:
    if kind is None or (kind == "custom" and not rules.hosted):
        return
    raise ApiError(400, f"tools[{index}]: server tools are not supported", param=f"tools[{index}].type")


def _read_tool_choice(fields: Fields) -> tuple[ToolChoice, str | None, bool]:
    """The choice, the tool it names, and whether several calls at once are welcome."""
    choice = fields.object("tool_choice")
    if choice is None:
        return "auto", None, True
    choice.required("type")
    kind = choice.word("type", ("auto", "any", "tool", "none"))
    parallel = fields.rules.hosted or not choice.flag("disable_parallel_tool_use")
    match kind:
        case "tool":
            return "named", choice.required_text("name"), parallel
        case "none":
            return "none", None, parallel
        case "any":
            # DeepSeek's service takes it for auto.
            return "auto" if fields.rules.hosted else "required", None, parallel
        case "auto":
            return "auto", None, parallel
    wrong_type(fields.rules, choice.at("type"), "auto, any, tool or none", None)


def _read_modes(fields: Fields) -> tuple[bool, Any, str | None, AnswerFormat | None]:
    """Thinking, effort, the word for the effort as given, and the format of the answer."""
    switch = read_thinking(fields)
    thinking = fields.value.get("thinking")
    if thinking is not None:
        Fields(thinking, fields.rules, "thinking").integer("budget_tokens")
    config = fields.object("output_config")
    effort = config.word("effort", EFFORTS) if config is not None else None
    answer_format = None
    if not fields.rules.hosted:
        form = config.object("format") if config is not None else None
        form = form or fields.object("output_format")
        if form is not None:
            form.required("type")
            form.word("type", ("json_schema",))
            answer_format = json_schema_format(form.required("schema"), form.at("schema"))
    return *choose_thinking(switch, effort), effort, answer_format


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.list("stop_sequences")
    return fields.strings("stop_sequences") if stop is not None else ()


# ---- rules of a conversation ----------------------------------------------------------------------------------------


def _check_turns(turns: list[_Turn], rules: Rules) -> tuple[Message, ...]:
    """The conversation, once every call has its result.

    Raises:
        ApiError: with the text of DeepSeek's service.
    """
    if not turns:
        raise ApiError(400, "messages: at least one message is required", param="messages")
    _check_places(turns, rules)
    _check_results(turns, rules)
    messages: list[Message] = []
    results: list[Message] = []
    texts: list[Message] = []
    for turn in turns:
        if turn.role == "assistant":
            messages += results + texts
            results, texts = [], []
            messages.append(_assistant(turn))
            continue
        results += [Message("tool", b.text, tool_call_id=b.id) for b in turn.blocks if b.kind == "tool_result"]
        parts = [block.text for block in turn.blocks if block.kind == "text"]
        if turn.role == "system":
            reminder = "\n\n".join(parts)
            parts = [f"<system-reminder>\n{reminder}\n</system-reminder>"] if parts else []
        if parts:
            texts.append(Message("user", "\n\n".join(parts)))
    told = (*messages, *results, *texts)
    if not told:
        raise ApiError(400, "messages: at least one message must have content", param="messages")
    return told


def _assistant(turn: _Turn) -> Message:
    reasoning = [block.text for block in turn.blocks if block.kind == "thinking"]
    return Message(
        "assistant",
        "\n\n".join(block.text for block in turn.blocks if block.kind == "text"),
        "\n\n".join(reasoning) if reasoning else None,
        tuple(block.call for block in turn.blocks if block.call is not None),
    )


def _check_places(turns: list[_Turn], rules: Rules) -> None:
    """Every kind of block in the role it belongs to."""
    for i, turn in enumerate(turns):
        if not turn.blocks and rules.hosted and turn.role != "system":
            raise ApiError(400, f"messages.{i}: all messages must have non-empty content")
        for block in turn.blocks:
            is_assistant = turn.role == "assistant"
            if block.kind == "thinking" and not is_assistant:
                raise ApiError(400, f"messages.{i}.content: thinking blocks may only be in `assistant` messages")
            if block.kind == "tool_use" and not is_assistant:
                raise ApiError(400, f"messages.{i}: `tool_use` blocks can only be in `assistant` messages")
            if block.kind == "tool_result" and turn.role != "user":
                raise ApiError(400, f"messages.{i}: `tool_result` blocks can only be in `user` messages")
            if block.kind == "server_tool":
                if not is_assistant:
                    name = "tool_use" if block.name == "server_tool_use" else block.name
                    raise ApiError(400, f"messages.{i}: `{name}` blocks can only be in `assistant` messages")
                raise ApiError(400, "Unsupported content block: server tools are not supported")


def _check_results(turns: list[_Turn], rules: Rules) -> None:
    """Every call has one result, in the messages before the next assistant's.

    The hosted rules want all results at the head of the very next message; otherwise texts may stand between them.
    """
    pending: dict[str, None] = {}
    answered: set[str] = set()
    owner = 0
    strict = rules.hosted
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            if pending:
                raise _unanswered(f"messages.{i}: " if strict else f"messages.{owner}: ", pending)
            answered, owner = set(), i
        elif strict:
            answered = set()
        for j, block in enumerate(turn.blocks):
            if block.kind == "tool_use":
                if block.id in pending:
                    raise ApiError(400, f"messages.{i}.content.{j}: `tool_use` ids must be unique")
                pending[block.id] = None
            elif block.kind == "tool_result":
                if block.id in pending:
                    del pending[block.id]
                    answered.add(block.id)
                elif block.id in answered:
                    raise ApiError(
                        400, f"messages.{i}.content.{j}: each tool_use must have a single result. Found multiple"
                        f" `tool_result` blocks with id: {block.id[:100]}",
                    )  # fmt: skip
                else:
                    raise ApiError(
                        400, f"unexpected `messages.{i}.content.{j}: tool_use_id` found in `tool_result` blocks:"
                        f" {block.id[:100]}. Each `tool_result` block must have a corresponding `tool_use` block in the"
                        " previous message.",
                    )  # fmt: skip
            elif strict and pending and block.kind == "text":
                raise _unanswered(f"messages.{i}.{j}: " if turn.role == "assistant" else f"messages.{i}: ", pending)
        if strict and pending and turn.role != "assistant":
            raise _unanswered(f"messages.{owner}:", pending)
    if pending:
        raise _unanswered(f"messages.{owner}:" if strict else f"messages.{owner}: ", pending)


def _unanswered(where: str, pending: Mapping[str, None]) -> ApiError:
    ids = ", ".join(pending)
    ids = ids if len(ids) <= 200 else ids[:199] + "…"
    return ApiError(
        400, f"{where}`tool_use` ids were found without `tool_result` blocks immediately after: {ids}. Each `tool_use`"
        " block must have a corresponding `tool_result` block in the next message.",
    )  # fmt: skip


def _open_last(messages: tuple[Message, ...], thinking: bool) -> tuple[Message, ...]:
    """Without thinking, a last message of the assistant is the beginning of the answer."""
    last = messages[-1]
    if thinking or last.role != "assistant" or last.tool_calls:
        return messages
    return (*messages[:-1], Message("assistant", last.content, is_open=True))


# ---- writing --------------------------------------------------------------------------------------------------------

_ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """A refusal that clients of both kinds read: Anthropic's frame, with the fields of DeepSeek's error inside."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message, "param": error.param, "code": error.code},
    }


def _reply_id(head: Head) -> str:
    return f"msg_{head.id}"


def _message(head: Head) -> dict[str, Any]:
    return {"id": _reply_id(head), "type": "message", "role": "assistant", "model": head.model}


def _usage(missed: int, cached: int, output: int) -> dict[str, Any]:
    return {
        "input_tokens": missed,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
        "service_tier": "standard",
    }


def _stop(finish: Finish) -> dict[str, Any]:
    if finish.reason == "tool_calls":
        reason = "tool_use"
    elif finish.reason == "stop":
        reason = "end_turn" if finish.stop is None else "stop_sequence"
    else:
        reason = "max_tokens"  # also where the server ran short: the answer is cut, and Anthropic has no other word
    return {"stop_reason": reason, "stop_sequence": finish.stop if reason == "stop_sequence" else None}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object; text that is none is kept under a name of its own."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _frame(name: str, data: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **data}))


class MessageStream:
    """A message as server-sent events: one block after another, each opened by the first of its events."""

    def __init__(self, call: Call, head: Head) -> None:
        self._head, self._thinking = head, call.thinking
        self._num_blocks = 0
        self._open: str | None = None  # "thinking", "text" or "tool_use": the block that is being written
        self._delta = b""
        self._pinged = False
        self._finish: Finish | None = None

    def begin(self) -> bytes:
        head = self._head
        usage = _usage(head.prompt_tokens - head.cached_tokens, head.cached_tokens, 0)
        message = {**_message(head), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        start = _frame("message_start", {"message": message})
        return start + self._block("thinking", {"thinking": "", "signature": ""}) if self._thinking else start

    def event(self, event: Event) -> bytes:
        if isinstance(event, Content):
            opening = b"" if self._open == "text" else self._block("text", {"text": ""})
            return opening + self._delta + orjson.dumps(event.text) + b"}}\n\n"
        if isinstance(event, Reasoning):
            opening = b"" if self._open == "thinking" else self._block("thinking", {"thinking": "", "signature": ""})
            return opening + self._delta + orjson.dumps(event.text) + b"}}\n\n"
        if isinstance(event, ToolArguments):
            return self._delta + orjson.dumps(event.text) + b"}}\n\n"
        if isinstance(event, ToolBegin):
            return self._block("tool_use", {"id": event.id, "name": event.name, "input": {}})
        if isinstance(event, Finish):
            self._finish = event
            return self._close()
        return self._close()

    def end(self, usage: Usage) -> bytes:
        assert self._finish is not None, "a stream ends after its Finish"
        total = _usage(usage.missed_tokens, usage.cached_tokens, usage.completion_tokens)
        return _frame("message_delta", {"delta": _stop(self._finish), "usage": total}) + _frame("message_stop", {})

    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % orjson.dumps(error_body(error))

    def _block(self, kind: str, block: Mapping[str, Any]) -> bytes:
        """Open a block, after closing the one before."""
        closing = self._close()
        self._open = kind
        delta, field = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
                        "tool_use": ("input_json_delta", "partial_json")}[kind]  # fmt: skip
        self._delta = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (self._num_blocks, delta.encode(), field.encode())
        )
        start = {"index": self._num_blocks, "content_block": {"type": kind, **block}}
        ping = b"" if self._pinged else self._ping()
        return closing + _frame("content_block_start", start) + ping

    def _ping(self) -> bytes:
        self._pinged = True
        return Anthropic.keep_alive

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        seal = b""
        if self._open == "thinking":
            signature = {"type": "signature_delta", "signature": _reply_id(self._head)}
            seal = _frame("content_block_delta", {"index": self._num_blocks, "delta": signature})
        stop = _frame("content_block_stop", {"index": self._num_blocks})
        self._open, self._num_blocks = None, self._num_blocks + 1
        return seal + stop


ANTHROPIC = Anthropic()
