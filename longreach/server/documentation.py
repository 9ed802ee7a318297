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


def _operation(
    summary: str, body: dict[str, Any] | None = None, *statuses: int, kind: str = "application/json"
) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "Done", "content": {kind: {}}}}
    if "event" in summary:
        answers["200"]["content"]["text/event-stream"] = {}
    for status in statuses:
        answers[str(status)] = {"description": _MEANINGS[status], "content": {"application/json": {"schema": _ERROR}}}
    about: dict[str, Any] = {"summary": summary, "responses": answers}
    if body is not None:
        about["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return about


_ERROR = _object({"error": _object({"message": _TEXT}, ("message",))}, ("error",))
_MEANINGS = {
    400: "The request breaks a rule; the message says which", 401: "No key, or one that is unknown or revoked",
    402: "The key's balance or budget does not cover it", 404: "No such thing", 413: "The body is too long",
    422: "A value of the wrong type, under --hosted-rules", 429: "Too much at the moment; see Retry-After",
    503: "Not now; see Retry-After",
}  # fmt: skip
_REFUSALS = (400, 401, 402, 413, 422, 429, 503)

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
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _object({"type": {"const": "text"}, "text": _TEXT}, ("type", "text"))}]},
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
    *_REFUSALS,
)  # fmt: skip
COMPLETIONS = _operation(
    "A text continued, or with `suffix` a gap filled; with `stream` as server-sent events",
    _object(
        {"model": _TEXT, "prompt": _TEXT, "suffix": _TEXT, "echo": _FLAG, "logprobs": {"type": "integer", "minimum": 0, "maximum": 5}}
        | _MORE_SAMPLING,
        ("model", "prompt"),
    ),
    *_REFUSALS,
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
    *_REFUSALS,
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
    *_REFUSALS,
)
COUNT_TOKENS = _operation(
    "Tokens of a Messages request", _object(_CLAUDE_BODY, ("model", "messages")), 400, 401, 413, 422
)
MODELS = _operation("The names that may be asked for", None, 401)
MODEL = _operation("One of them", None, 401, 404)
BALANCE = _operation("What the key has left", None, 401)
PRICES = _operation("What a million tokens cost at this moment", None, 401)
TOKENIZE = _operation(
    "Token ids of a text",
    _object({"model": _TEXT, "content": _TEXT, "with_pieces": _FLAG, "count_only": _FLAG}, ("content",)),
    400,
    401,
    413,
)
DETOKENIZE = _operation(
    "The text of token ids",
    _object({"model": _TEXT, "tokens": {"type": "array", "items": _WHOLE}}, ("tokens",)),
    400,
    401,
    413,
)
APPLY_TEMPLATE = _operation(
    "The prompt that a chat request becomes",
    _object({"model": _TEXT, "messages": {"type": "array", "items": _MESSAGE}}, ("model", "messages")),
    400, 401, 413, 422,
)  # fmt: skip
HEALTH = _operation("200 while the process works")
READY = _operation("200 while new requests are taken", None, 503)
METRICS = _operation("Prometheus metrics", None, 401, kind="text/plain")
VERSION = _operation("The version")
STATUS = _operation("Load and caches of every model", None, 401)
