"""OpenAI's Responses as DeepSeek speaks them, stateless: `/responses`, with what Codex needs.

    RESPONSES.read(body, rules) -> Call;  RESPONSES.stream(call, head) -> response.created … response.completed

Nothing is stored, so a client sends the whole conversation each time. Its reasoning comes back to it in the items of the
reply; a client that asks for `reasoning.encrypted_content` gets the text there too (as base64, nothing is secret), because
some send back only that field, and reasoning that is lost costs quality and the cached context.

What is accepted is in `responses_request.py`; this is what is answered.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

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
from longreach.server.openai import error_body, logprob_body
from longreach.server.responses_request import FREE_TEXT, SEAL, read_response


class Responses:
    """`/responses`."""

    keep_alive = b": keep-alive\n\n"

    def read(self, body: Mapping[str, Any], rules: Rules) -> Call:
        return read_response(body, rules)

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
            sealed = SEAL + base64.b64encode(text.encode("utf-8", "replace")).decode()
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
    text = value.get(FREE_TEXT) if isinstance(value, dict) else None
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
