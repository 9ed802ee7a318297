"""Reads JSON that a stranger sent: typed, field by field, with one clear refusal for whatever does not fit.

    fields = open_body(body, rules)
    temperature = fields.number("temperature")        # None where absent or null
    fields.unread()                                   # names that nobody asked for

A wrong type is status 422 under the hosted rules, as DeepSeek's service answers, and 400 otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from longreach.server.call import ApiError, Rules

MAX_SHOWN = 60
"""Characters of a client's value that a refusal repeats at most."""

_MAX_UNREAD = 32
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True)
class Unsupported:
    """A field that would change the answer and is not supported.

    Attributes:
        neutral: values that ask for nothing, and are let through.
        advice: what to do instead.
    """

    advice: str
    neutral: tuple[Any, ...] = ()


class Fields:
    """One JSON object, and which of its fields have been read. A field that is null counts as absent."""

    def __init__(self, value: Any, rules: Rules, path: str = "") -> None:
        self.rules, self.path = rules, path
        if not isinstance(value, Mapping):
            wrong_type(rules, path or "the body", "an object", value)
        self.value: Mapping[str, Any] = value
        self._read: set[str] = set()

    def at(self, name: str) -> str:
        """Where a field is, for messages: `tools[0].function`."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether the field is there, even as null."""
        return name in self.value

    def any(self, name: str) -> Any:
        """The value as it is."""
        self._read.add(name)
        return self.value.get(name)

    def required(self, name: str) -> Any:
        value = self.any(name)
        if name not in self.value:
            malformed(self.rules, f"missing field `{name}`", self.at(name), f"{self.at(name)} is missing")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, str):
            wrong_type(self.rules, self.at(name), "a string", value)
        return value

    def required_text(self, name: str) -> str:
        value = self.required(name)
        if not isinstance(value, str):
            wrong_type(self.rules, self.at(name), "a string", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            wrong_type(self.rules, self.at(name), "true or false", value)
        return value

    def number(self, name: str) -> float | None:
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            wrong_type(self.rules, self.at(name), "a number", value)
        return float(value)

    def integer(self, name: str, low: int = 0, high: int = (1 << 64) - 1) -> int | None:
        """`low` and `high` bound the type, not the meaning: a value outside is malformed."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            kind = "an integer" if low < 0 else "an integer of at least 0" if low == 0 else f"an integer from {low} on"
            wrong_type(self.rules, self.at(name), kind, value)
        return value

    def word(self, name: str, allowed: Iterable[str]) -> str | None:
        """One of a few words."""
        value = self.any(name)
        if value is None:
            return None
        allowed = tuple(allowed)
        if not isinstance(value, str) or value not in allowed:
            wrong_type(self.rules, self.at(name), "one of " + ", ".join(allowed), value)
        return value

    def list(self, name: str) -> list[Any] | None:
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, list):
            wrong_type(self.rules, self.at(name), "a list", value)
        return value

    def object(self, name: str) -> Fields | None:
        value = self.any(name)
        return None if value is None else Fields(value, self.rules, self.at(name))

    def objects(self, name: str) -> list[Fields] | None:
        """A list of objects."""
        items = self.list(name)
        if items is None:
            return None
        return [Fields(item, self.rules, f"{self.at(name)}[{i}]") for i, item in enumerate(items)]

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings, as a tuple; empty where absent."""
        value = self.any(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            wrong_type(self.rules, self.at(name), "a string or a list of strings", value)
        for i, item in enumerate(value):
            if not isinstance(item, str):
                wrong_type(self.rules, f"{self.at(name)}[{i}]", "a string", item)
        return tuple(value)

    def unread(self) -> tuple[str, ...]:
        """Names of the fields that were given and never asked for, fit for an HTTP header; at most 32."""
        names = [name for name, value in self.value.items() if name not in self._read and value is not None]
        return tuple(name for name in names if _HEADER_SAFE.fullmatch(name))[:_MAX_UNREAD]

    def refuse(self, unsupported: Mapping[str, Unsupported]) -> None:
        """Refuse the first field of the list that is there and asks for something.

        Raises:
            ApiError: 400, with the field's name and what to do instead.
        """
        for name, value in self.value.items():
            field = unsupported.get(name)
            if field is not None and value is not None and not any(same(value, neutral) for neutral in field.neutral):
                raise ApiError(400, f"{self.at(name)} is not supported: {field.advice}", param=self.at(name))


def open_body(body: Any, rules: Rules) -> Fields:
    """A request's JSON, after what would break later is ruled out: half characters, endless nesting, huge integers.

    Raises:
        ApiError: it is no object, or no JSON that this server can pass on.
    """
    fields = Fields(body, rules)
    try:
        # One pass in C; it also refuses lone surrogates, integers beyond 64 bits and more than 254 levels.
        orjson.dumps(body)
    except (TypeError, RecursionError) as error:
        reason = {
            "str is not valid UTF-8: surrogates not allowed": "a string holds half of a surrogate pair",
            "Integer exceeds 64-bit range": "an integer needs more than 64 bits",
            "Recursion limit reached": "it is nested more than 254 levels deep",
        }.get(str(error), "it holds something that is not JSON")
        malformed(rules, reason, None, f"the body cannot be read: {reason}")
    return fields


def same(left: Any, right: Any) -> bool:
    """Equality that tells 1 from true."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def shown(value: Any) -> str:
    """A client's value for a message: short, and nothing of a longer text but its beginning."""
    if isinstance(value, str):
        cut = value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 1] + "…"
        return orjson.dumps(cut.encode("utf-8", "replace").decode()).decode()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        # Digits of a hostile integer are not worked out: that takes quadratic time.
        return "a huge integer" if isinstance(value, int) and value.bit_length() > 128 else str(value)
    return "a list" if isinstance(value, list) else "an object"


def wrong_type(rules: Rules, where: str, expected: str, value: Any) -> NoReturn:
    """Refuse a value of the wrong type."""
    text = f"{where} must be {expected}, not {shown(value)}"
    malformed(rules, text, where, text)


def malformed(rules: Rules, hosted: str, param: str | None, ours: str) -> NoReturn:
    """Refuse a body that is no request at all."""
    if rules.hosted:
        raise ApiError(422, f"Failed to deserialize the JSON body into the target type: {hosted}")
    raise ApiError(400, ours, param=param)
