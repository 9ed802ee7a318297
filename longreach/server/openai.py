"""OpenAI's Chat Completions and Completions as DeepSeek speaks them, and the list of models.

    POST /chat/completions     OPENAI_CHAT.read(body, rules) -> Call;  OPENAI_CHAT.stream(call, head) -> frames
    POST /completions          OPENAI_COMPLETIONS, the same for a text to continue or a gap to fill

What is accepted is in `openai_request.py`; this is what is answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from longreach.server.call import (
    Answer,
    ApiError,
    Call,
    Content,
    Event,
    FillIn,
    Finish,
    Head,
    Reasoning,
    Rules,
    TokenLogprob,
    ToolArguments,
    ToolBegin,
    Usage,
)
from longreach.server.openai_request import read_chat, read_completion


def error_body(error: ApiError) -> dict[str, Any]:
    """A refusal as OpenAI's clients read it."""
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


def usage_body(usage: Usage, thinking: bool) -> dict[str, Any]:
    """Usage with the context cache's hits and misses; reasoning tokens only of a request that thinks."""
    details = {"completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}} if thinking else {}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **details,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.missed_tokens,
    }


def model_body(name: str, created: int = 0, owned_by: str = "longreach") -> dict[str, Any]:
    """One entry of the list of models, also the body of `/models/{id}`."""
    return {"id": name, "object": "model", "created": created, "owned_by": owned_by}


def models_body(names: Iterable[str], created: int = 0, owned_by: str = "longreach") -> dict[str, Any]:
    """The body of `/models`."""
    return {"object": "list", "data": [model_body(name, created, owned_by) for name in names]}


def token_text(token: TokenLogprob) -> str:
    """A token's text; bytes that are no UTF-8 on their own are spelled out: `\\xc3`."""
    return token.bytes.decode("utf-8", errors="backslashreplace")


def logprob_body(token: TokenLogprob) -> dict[str, Any]:
    """A token with its alternatives."""
    return {**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": token.logprob, "bytes": list(token.bytes)}


# ---- chat completions -----------------------------------------------------------------------------------------------


class OpenAIChat:
    """`/chat/completions`."""

    keep_alive = b": keep-alive\n\n"

    def read(self, body: Mapping[str, Any], rules: Rules) -> Call:
        return read_chat(body, rules)

    def whole(self, call: Call, head: Head, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        return {
            "id": _reply_id(head),
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [_choice(call, i, answer) for i, answer in enumerate(answers)],
            "usage": usage_body(usage, call.thinking),
            "system_fingerprint": head.fingerprint,
        }

    def stream(self, call: Call, head: Head) -> ChatStream:
        return ChatStream(call, head)

    def error(self, error: ApiError) -> dict[str, Any]:
        return error_body(error)


def _reply_id(head: Head) -> str:
    return f"chatcmpl-{head.id}"


def _choice(call: Call, index: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.message.content}
    if call.thinking:
        message["reasoning_content"] = answer.message.reasoning or ""
    if answer.message.tool_calls:
        message["tool_calls"] = [
            {"index": i, "id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for i, c in enumerate(answer.message.tool_calls)
        ]
    logprobs = None
    if call.logprobs is not None:
        logprobs = {"content": [logprob_body(token) for token in answer.content_logprobs]}
        if call.thinking:
            logprobs["reasoning_content"] = [logprob_body(token) for token in answer.reasoning_logprobs]
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish.reason}


def _chunk_end(call: Call) -> bytes:
    """What closes a chunk before the last, behind its log-probabilities."""
    return b',"finish_reason":null}]%b}\n\n' % (b',"usage":null' if call.wants_usage else b"")


class ChatStream:
    """A chat completion as server-sent events.

    Everything that does not change from chunk to chunk is laid out once, so that a chunk of text costs one encoding of
    this text and one joining of bytes.
    """

    def __init__(self, call: Call, head: Head) -> None:
        self._thinking, self._wants_usage, self._unfinished = call.thinking, call.wants_usage, call.n
        base = orjson.dumps({
            "id": _reply_id(head), "object": "chat.completion.chunk", "created": head.created, "model": head.model,
            "system_fingerprint": head.fingerprint,
        })  # fmt: skip
        starts = [b"data: " + base[:-1] + b',"choices":[{"index":%d,"delta":{' % i for i in range(call.n)]
        self._starts = starts
        self._content = [start + b'"content":' for start in starts]
        self._reasoning = [start + b'"content":null,"reasoning_content":' for start in starts]
        self._tools = [start + b'"tool_calls":[{"index":' for start in starts]
        self._chunk_end = _chunk_end(call)
        self._end = b'},"logprobs":null' + self._chunk_end
        self._tool_end = b"}}]" + self._end
        self._content_delta_end = b',"reasoning_content":null' if call.thinking else b""
        self._content_end = self._content_delta_end + self._end
        self._last: Finish | None = None

    def begin(self) -> bytes:
        opening = b'"content":null,"reasoning_content":""' if self._thinking else b'"content":""'
        return b"".join(start + b'"role":"assistant",' + opening + self._end for start in self._starts)

    def event(self, event: Event) -> bytes:
        if isinstance(event, Content):
            if not event.logprobs:
                return self._content[event.choice] + orjson.dumps(event.text) + self._content_end
            text = orjson.dumps(event.text) + self._content_delta_end
            return self._content[event.choice] + text + self._logprobs("content", event.logprobs)
        if isinstance(event, Reasoning):
            if not event.logprobs:
                return self._reasoning[event.choice] + orjson.dumps(event.text) + self._end
            text = orjson.dumps(event.text)
            return self._reasoning[event.choice] + text + self._logprobs("reasoning_content", event.logprobs)
        if isinstance(event, ToolArguments):
            arguments = b'%d,"function":{"arguments":' % event.index + orjson.dumps(event.text)
            return self._tools[event.choice] + arguments + self._tool_end
        if isinstance(event, ToolBegin):
            return (
                self._tools[event.choice]
                + b'%d,"id":%b,"type":"function","function":{"name":%b,"arguments":""'
                % (event.index, orjson.dumps(event.id), orjson.dumps(event.name))
                + self._tool_end
            )
        if isinstance(event, Finish):
            self._unfinished -= 1
            if self._unfinished:
                return self._finish(event, None)
            self._last = event  # its chunk carries the usage, which is known at the end
        return b""

    def end(self, usage: Usage) -> bytes:
        assert self._last is not None, "a stream ends after its last Finish"
        return self._finish(self._last, usage_body(usage, self._thinking)) + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"

    def _logprobs(self, part: str, tokens: Iterable[TokenLogprob]) -> bytes:
        return b'},"logprobs":%b' % orjson.dumps({part: [logprob_body(token) for token in tokens]}) + self._chunk_end

    def _finish(self, finish: Finish, usage: Mapping[str, Any] | None) -> bytes:
        delta = self._content[finish.choice] + b'""' + self._content_delta_end
        return delta + b'},"logprobs":null' + _finish_end(finish, usage, self._wants_usage)


def _finish_end(finish: Finish, usage: Mapping[str, Any] | None, wants_usage: bool) -> bytes:
    """What closes the chunk that finishes an answer; the last one has the usage, asked for or not."""
    told = b',"usage":%b' % orjson.dumps(usage) if usage is not None or wants_usage else b""
    return b',"finish_reason":"%b"}]%b}\n\n' % (finish.reason.encode(), told)


# ---- completions ----------------------------------------------------------------------------------------------------


class OpenAICompletions:
    """`/completions`: a text to continue, or with `suffix` a gap to fill (FIM)."""

    keep_alive = OpenAIChat.keep_alive

    def read(self, body: Mapping[str, Any], rules: Rules) -> Call:
        return read_completion(body, rules)

    def whole(self, call: Call, head: Head, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        echoed = _echoed(call)
        choices = []
        for i, answer in enumerate(answers):
            text = echoed + answer.message.content
            logprobs = None if call.logprobs is None else _legacy_logprobs(answer.content_logprobs, len(echoed))
            choices.append({"index": i, "text": text, "logprobs": logprobs, "finish_reason": answer.finish.reason})
        return {
            "id": f"cmpl-{head.id}",
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": choices,
            "usage": usage_body(usage, thinking=False),
            "system_fingerprint": head.fingerprint,
        }

    def stream(self, call: Call, head: Head) -> CompletionStream:
        return CompletionStream(call, head)

    def error(self, error: ApiError) -> dict[str, Any]:
        return error_body(error)


def _echoed(call: Call) -> str:
    assert isinstance(call.input, FillIn)
    return call.input.prompt if call.input.echo else ""


def _legacy_logprobs(tokens: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
    """The four parallel lists of the older API. `offset`: characters of the text before the first token."""
    tokens = tuple(tokens)
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += _num_characters(token)
    return {
        "tokens": [token_text(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{token_text(other): other.logprob for other in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _num_characters(token: TokenLogprob) -> int:
    """Characters that begin in a token: one that is spread over several tokens counts where it begins."""
    return sum(byte & 0xC0 != 0x80 for byte in token.bytes)


class CompletionStream:
    """A completion as server-sent events, with the usage in the chunk that finishes the last answer."""

    def __init__(self, call: Call, head: Head) -> None:
        self._wants_usage, self._unfinished = call.wants_usage, call.n
        self._chunk_end = _chunk_end(call)
        self._end = b',"logprobs":null' + self._chunk_end
        self._echoed = _echoed(call)
        self._offsets = [len(self._echoed)] * call.n
        base = orjson.dumps({
            "id": f"cmpl-{head.id}", "object": "text_completion", "created": head.created, "model": head.model,
            "system_fingerprint": head.fingerprint,
        })  # fmt: skip
        self._text = [b"data: " + base[:-1] + b',"choices":[{"index":%d,"text":' % i for i in range(call.n)]
        self._last: Finish | None = None

    def begin(self) -> bytes:
        if not self._echoed:
            return b""
        text = orjson.dumps(self._echoed)
        return b"".join(start + text + self._end for start in self._text)

    def event(self, event: Event) -> bytes:
        if isinstance(event, Content):
            start = self._text[event.choice] + orjson.dumps(event.text)
            if not event.logprobs:
                return start + self._end
            logprobs = orjson.dumps(_legacy_logprobs(event.logprobs, self._offsets[event.choice]))
            self._offsets[event.choice] += sum(map(_num_characters, event.logprobs))
            return start + b',"logprobs":' + logprobs + self._chunk_end
        if isinstance(event, Finish):
            self._unfinished -= 1
            if self._unfinished:
                return self._finish(event, None)
            self._last = event
        return b""

    def end(self, usage: Usage) -> bytes:
        assert self._last is not None, "a stream ends after its last Finish"
        return self._finish(self._last, usage_body(usage, thinking=False)) + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"

    def _finish(self, finish: Finish, usage: Mapping[str, Any] | None) -> bytes:
        return self._text[finish.choice] + b'"","logprobs":null' + _finish_end(finish, usage, self._wants_usage)


OPENAI_CHAT = OpenAIChat()
OPENAI_COMPLETIONS = OpenAICompletions()
