"""What /openapi.json says of the routes: the shape of the bodies, in words and JSON Schema.

The dialects read bodies themselves (`openai_request.py` and its siblings), because their rules and error texts are part of
what clients rely on; these descriptions are for people and for tools that generate requests.
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_FLAG = {"type": "boolean"}


def _object(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _operation(
    summary: str,
    body: dict[str, Any] | None,
    answer: dict[str, Any],
    *statuses: int,
    kind: str = "application/json",
    is_streamed: bool = False,
) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "Done", "content": {kind: {"schema": answer}}}}
    if is_streamed:
        answers["200"]["content"]["text/event-stream"] = {"schema": _object({"data": _TEXT}, ("data",))}  # of one event
    for status in statuses:
        answers[str(status)] = {"description": _MEANINGS[status], "content": {"application/json": {"schema": _ERROR}}}
    about: dict[str, Any] = {"summary": summary, "responses": answers}
    if body is not None:
        about["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return about


_ERROR = _object({"error": _object({"message": _TEXT}, ("message",))}, ("error",))
_MEANINGS = {
    400: "The request breaks a rule; the message says which", 401: "No key, or one that is unknown or revoked",
    402: "The key's balance or budget does not cover it", 404: "No such thing", 408: "The body did not arrive in time",
    413: "The body is too long",
    422: "A value of the wrong type, under --hosted-rules", 429: "Too much at the moment; see Retry-After",
    500: "The model or the server failed", 502: "The engine behind this server failed", 503: "Not now; see Retry-After",
}  # fmt: skip
_READING = (400, 401, 408, 413, 422)
_REFUSALS = (*_READING, 402, 429, 500, 502, 503)

_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_cache_hit_tokens")
_USAGE = _object(
    dict.fromkeys(_COUNTS, _WHOLE),
    _COUNTS,
)
_CHOICE = _object({"index": _WHOLE, "finish_reason": _TEXT}, ("index", "finish_reason"))


def _completion(kind: str) -> dict[str, Any]:
    """A body of the OpenAI-like endpoints."""
    properties = {"id": _TEXT, "object": {"const": kind}, "model": _TEXT, "choices": _list(_CHOICE), "usage": _USAGE}
    return _object(properties, tuple(properties))


_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "longreach": {"type": "object"}}, ("id", "object"))

_SAMPLING = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 393216},
    "stream": _FLAG,
}
_MORE_SAMPLING = _SAMPLING | {
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}]},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "user_id": {"type": "string", "maxLength": 512},
    "stream_options": _object({"include_usage": _FLAG}),
}
_TOOL = _object(
    {
        "type": {"const": "function"},
        "function": _object(
            {"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}, "strict": _FLAG}, ("name",)
        ),
    },
    ("type", "function"),
)
_MESSAGE = _object(
    {
        "role": {"enum": ["system", "user", "assistant", "tool", "developer"]},
        "content": {"anyOf": [_TEXT, _list(_object({"type": {"const": "text"}, "text": _TEXT}, ("type", "text")))]},
        "reasoning_content": _TEXT, "tool_call_id": _TEXT, "prefix": _FLAG,
    },
    ("role", "content"),
)  # fmt: skip

CHAT = _operation(
    "A chat completion; with `stream` as server-sent events",
    _object(
        {
            "model": _TEXT, "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
            "thinking": _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}}, ("type",)),
            "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]},
            "response_format": {"anyOf": [
                _object({"type": {"enum": ["text", "json_object"]}}, ("type",)),
                _object({"type": {"const": "json_schema"}, "json_schema": _object({"name": _TEXT, "schema": {"type": "object"}})},
                        ("type", "json_schema")),
                _object({"type": {"const": "regex"}, "regex": _TEXT}, ("type", "regex")),
            ]},
            "tools": {"type": "array", "items": _TOOL},
            "tool_choice": {"anyOf": [
                {"enum": ["none", "auto", "required"]},
                _object({"type": {"const": "function"}, "function": _object({"name": _TEXT}, ("name",))}, ("type", "function")),
            ]},
            "logprobs": _FLAG, "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        } | _MORE_SAMPLING,
        ("model", "messages"),
    ),
    _completion("chat.completion"),
    *_REFUSALS,
    is_streamed=True,
)  # fmt: skip
COMPLETIONS = _operation(
    "A text continued, or with `suffix` a gap filled; with `stream` as server-sent events",
    _object(
        {"model": _TEXT, "prompt": _TEXT, "suffix": _TEXT, "echo": _FLAG}
        | {"logprobs": {"type": "integer", "minimum": 0, "maximum": 20}}
        | _MORE_SAMPLING,
        ("model", "prompt"),
    ),
    _completion("text_completion"),
    *_REFUSALS,
    is_streamed=True,
)  # fmt: skip
RESPONSES = _operation(
    "OpenAI's Responses API, stateless; with `stream` as server-sent events",
    _object(
        {
            "model": _TEXT,
            "input": {"anyOf": [_TEXT, {"type": "array", "items": _object(
                {"type": {"const": "message"}, "role": {"enum": ["user", "assistant", "system", "developer"]}, "content": _TEXT},
                ("role", "content"))}]},
            "instructions": _TEXT, "reasoning": _object({"effort": {"enum": ["none", "low", "medium", "high", "max"]}}),
            "max_output_tokens": {"type": "integer", "minimum": 1},
        } | {name: rule for name, rule in _SAMPLING.items() if name != "max_tokens"},
        ("model", "input"),
    ),
    _object({"id": _TEXT, "object": {"const": "response"}, "status": _TEXT, "output": _list({"type": "object"})},
            ("id", "object", "status", "output")),
    *_REFUSALS,
    is_streamed=True,
)  # fmt: skip
_BLOCK = _object({"type": {"const": "text"}, "text": _TEXT}, ("type", "text"))
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _BLOCK}]}
_CLAUDE_BODY = {
    "model": _TEXT, "system": _CONTENT,
    "messages": {"type": "array", "minItems": 1, "items": _object({"role": {"enum": ["user", "assistant"]}, "content": _CONTENT},
                                                                  ("role", "content"))},
    "thinking": _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}, "budget_tokens": _WHOLE}, ("type",)),
}  # fmt: skip
MESSAGES = _operation(
    "Anthropic's Messages; with `stream` as server-sent events",
    _object(
        _CLAUDE_BODY | _SAMPLING | {"stop_sequences": {"type": "array", "items": _TEXT}},
        ("model", "messages", "max_tokens"),
    ),
    _object({"id": _TEXT, "type": {"const": "message"}, "content": _list({"type": "object"}), "usage": {"type": "object"}},
            ("id", "type", "content", "usage")),
    *_REFUSALS,
    is_streamed=True,
)  # fmt: skip
COUNT_TOKENS = _operation(
    "Tokens of a Messages request", _object(_CLAUDE_BODY, ("model", "messages")),
    _object({"input_tokens": _WHOLE}, ("input_tokens",)), *_READING,
)  # fmt: skip
MODELS = _operation("The names that may be asked for", None, _object({"data": _list(_MODEL)}, ("data",)), 401)
MODEL = _operation("One of them", None, _MODEL, 401, 404) | {
    "parameters": [
        {"name": "name", "in": "path", "required": True, "schema": _TEXT, "description": "It may hold slashes"}
    ]
}
BALANCE = _operation(
    "What the key has left", None,
    _object({"is_available": _FLAG, "balance_infos": _list({"type": "object"})}, ("is_available", "balance_infos")), 401,
)  # fmt: skip
PRICES = _operation(
    "What a million tokens cost at this moment", None, _object({"currency": _TEXT, "models": {"type": "object"}}, ("models",)),
    401,
)  # fmt: skip
TOKENIZE = _operation(
    "Token ids of a text, or with `messages` of a chat's prompt",
    {"anyOf": [
        _object({"model": _TEXT, "content": _TEXT, "with_pieces": _FLAG, "count_only": _FLAG}, ("content",)),
        _object({"model": _TEXT, "messages": _list(_MESSAGE), "with_pieces": _FLAG, "count_only": _FLAG}, ("model", "messages")),
    ]},
    _object({"tokens": _list(_WHOLE), "count": _WHOLE, "max_model_len": _WHOLE}, ("count", "max_model_len")),
    *_READING,
)  # fmt: skip
DETOKENIZE = _operation(
    "The text of token ids", _object({"model": _TEXT, "tokens": _list({"type": "integer", "minimum": 0})}, ("tokens",)),
    _object({"content": _TEXT}, ("content",)), *_READING,
)  # fmt: skip
APPLY_TEMPLATE = _operation(
    "The prompt that a chat request becomes",
    _object({"model": _TEXT, "messages": {"type": "array", "items": _MESSAGE}}, ("model", "messages")),
    _object({"prompt": _TEXT, "tokens": _list(_WHOLE)}, ("prompt", "tokens")), *_READING,
)  # fmt: skip
_STATE = _object({"status": _TEXT}, ("status",))
HEALTH = _operation("200 while the process works", None, _STATE, 500)
READY = _operation("200 while new requests are taken", None, _STATE, 503)
METRICS = _operation("Prometheus metrics", None, _TEXT, 401, kind="text/plain")
VERSION = _operation("The version", None, _object({"version": _TEXT}, ("version",)))
STATUS = _operation(
    "Load and caches of every model", None,
    _object({"models": _list({"type": "object"}), "process": {"type": "object"}}, ("models", "process")), 401,
)  # fmt: skip
