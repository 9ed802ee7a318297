"""Texts that keep to a form: a regular expression, a JSON schema, a choice, a grammar. Needs the extra `grammar`.

    grammar = compile_grammar(tokenizer, json_schema={"type": "object", "properties": {"n": {"type": "integer"}}})
    state = grammar.start()
    state.mask()                  the tokens that may come next, bool (V,); the end mark exactly where the text may end
    state.advance(token_id)       False, and nothing changed, if it may not
    state.rollback(1)             a draft was rejected

The work is done by llguidance, on the bytes of our tokens; special tokens are never part of a text. The engine sees only
`Grammar` and `GrammarState`, so anything else that can tell allowed tokens may take its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer


class GrammarState(Protocol):
    """Where one text is in its grammar."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but the end mark may follow, or has."""
        ...

    def mask(self) -> Tensor | None:
        """The tokens that may come next, bool `(V,)` on the CPU; None when all may.

        Raises:
            RequestError: the grammar turned out too complex to follow.
        """
        ...

    def advance(self, token_id: int) -> bool:
        """Add a token to the text. False if it is not allowed here; then nothing has changed."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        ...

    def copy(self) -> GrammarState:
        """The same place, to go on from independently."""
        ...


class Grammar(Protocol):
    """What texts are allowed. Immutable; may serve any number of requests at a time."""

    @property
    def vocab_size(self) -> int:
        """Length of the masks."""
        ...

    def start(self) -> GrammarState:
        """The place before the first token."""
        ...


def compile_grammar(
    tokenizer: Tokenizer,
    *,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    choice: Sequence[str] | None = None,
    lark: str | None = None,
) -> Grammar:
    """Prepare a grammar for the tokens of `tokenizer`. Exactly one form is given.

    The first grammar of a tokenizer takes longer: its tokens are sorted into a tree, which is kept.

    Args:
        regex: the whole text matches this (syntax of Rust's regex: no look-around, no back references; \\d and \\w mean
            those of Unicode, so write [0-9] for ten digits).
        json_schema: the text is JSON that this schema accepts; a mapping, or its JSON text. White space is free, and a
            model may go on with it for ever: `"x-guidance": {"whitespace_flexible": false}` in the schema forbids it.
        choice: the text is one of these.
        lark: rules in llguidance's variant of Lark; `start` is the whole text.

    Raises:
        RequestError: llguidance is not installed, or the grammar is not one, asks for what is not supported, or allows
            no text at all.
    """
    forms = {"regex": regex, "json_schema": json_schema, "choice": choice, "lark": lark}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            f"a grammar is given as exactly one of {', '.join(forms)}, not {' and '.join(given) or 'none'}"
        )
    try:
        import llguidance
    except ImportError:
        raise RequestError(
            f"{given[0]} needs the library llguidance: pip install 'longreach[grammar]', or leave {given[0]} out"
        ) from None
    if regex is not None:
        source = llguidance.LLMatcher.grammar_from_regex(_text("regex", regex))
    elif json_schema is not None:
        source = llguidance.LLMatcher.grammar_from_json_schema(_schema_text(json_schema))
    elif choice is not None:
        source = llguidance.LLMatcher.grammar_from_lark(_choice_rule(choice))
    else:
        source = llguidance.LLMatcher.grammar_from_lark(_text("lark", lark))
    matcher = llguidance.LLMatcher(_bind(tokenizer), source, log_level=0)
    if matcher.is_error():
        raise RequestError(f"{given[0]} cannot be used: {_one_line(matcher.get_error())}")
    grammar = _Grammar(matcher, tokenizer.vocab_size, tokenizer.eos_id)
    try:
        mask = grammar.start().mask()
    except RequestError:
        mask = torch.zeros(1, dtype=torch.bool)
    if mask is not None and not mask.any():
        raise RequestError(f"{given[0]} allows no text at all; loosen it")
    return grammar


class _Grammar:
    """A matcher that stays at its start, to be copied."""

    def __init__(self, matcher: Any, vocab_size: int, eos_id: int) -> None:
        self._matcher, self._eos_id, self.vocab_size = matcher, eos_id, vocab_size

    def start(self) -> _State:
        return _State(self._matcher.deep_copy(), self.vocab_size, self._eos_id)


class _State:
    """A place in the text. The end mark is kept here, so that the matcher can always be rolled back by text tokens."""

    def __init__(self, matcher: Any, vocab_size: int, eos_id: int, has_ended: bool = False) -> None:
        self._matcher, self._vocab_size, self._eos_id, self._has_ended = matcher, vocab_size, eos_id, has_ended

    @property
    def is_finished(self) -> bool:
        return self._has_ended or self._matcher.is_stopped()

    def mask(self) -> Tensor | None:
        if self._has_ended:
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[self._eos_id] = True
            return allowed
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed any further: {_one_line(self._matcher.get_error())}")
        flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=self._vocab_size, bitorder="little")
        return None if flags.all() else torch.from_numpy(flags.view(np.bool_))

    def advance(self, token_id: int) -> bool:
        if self._has_ended or not 0 <= token_id < self._vocab_size:
            return False
        if token_id == self._eos_id:
            self._has_ended = self._matcher.is_accepting()
            return self._has_ended
        return self._matcher.try_consume_tokens([token_id]) == 1

    def rollback(self, count: int) -> None:
        if count and self._has_ended:
            self._has_ended = False
            count -= 1
        if count:
            done = self._matcher.rollback(count)
            assert done, f"rollback by {count}: {self._matcher.get_error()}"

    def copy(self) -> _State:
        return _State(self._matcher.deep_copy(), self._vocab_size, self._eos_id, self._has_ended)


# ---- llguidance's view of our tokenizer ------------------------------------------------------------------------------


class _TokenTable:
    """The attributes llguidance reads off a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = None
        self.tokens = list(tokenizer.token_bytes)
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@lru_cache(maxsize=4)
def _bind(tokenizer: Tokenizer) -> Any:
    import llguidance

    table: Any = _TokenTable(tokenizer)
    return llguidance.LLTokenizer(table, n_vocab=tokenizer.vocab_size)


# ---- forms -----------------------------------------------------------------------------------------------------------


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, not {value!r}")
    return value


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, str | Mapping):
        raise RequestError(f"json_schema must be an object or its JSON text, not {schema!r}")
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else dict(schema)
        text = json.dumps(parsed)
    except (ValueError, TypeError) as error:
        raise RequestError(f"json_schema is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"json_schema must be a JSON object, not {text}")
    return text


def _choice_rule(choice: Any) -> str:
    """A Lark rule; Lark spells a string as JSON does."""
    is_list = isinstance(choice, Sequence) and not isinstance(choice, str)
    if not is_list or not choice or not all(isinstance(text, str) for text in choice):
        raise RequestError(f"choice must be a list of one string or more, not {choice!r}")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)


def _one_line(message: str) -> str:
    """The beginning of llguidance's message, which may go on with a dump of its state."""
    line = " ".join(message.split("<state>")[0].split())
    return line if len(line) <= 300 else line[:300] + "…"
