"""Texts that keep to a form: a regular expression, a JSON schema, a choice, a grammar. Needs the extra `grammar`.

    grammar = compile_grammar(tokenizer, json_schema={"type": "object", "properties": {"n": {"type": "integer"}}})
    state = grammar.start()
    state.mask()                  the tokens that may come next, bool (V,); the end mark exactly where the text may end
    state.advance(token_id)       False, and nothing changed, if it may not
    state.rollback(1)             a draft was rejected
    state.closing(12)             at most 12 tokens that complete the text, so that it can be ended in time

The work is done by llguidance, on the bytes of our tokens; special tokens are part of a text only where a Lark grammar names
them by id, as in `<[6]>`. The engine sees only `Grammar` and `GrammarState`, so anything else that can tell allowed tokens
may take its place.

A grammar may come from a stranger. Its text is at most `MOST_BYTES` long and `MOST_DEPTH` deep, which is checked before
anything looks at it, and llguidance works with limited fuel, both when it compiles and for each mask; what is too complex
is refused, or ends its own request. Every grammar can be completed: one for which no end is found within
`closing.LONGEST_BYTES` (an object that must contain itself, an array of a billion numbers) is refused too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longreach.engine.closing import LONGEST_BYTES, Spelling, find_closing, spelling_of
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer

MOST_BYTES = 1 << 18
"""Length of a grammar's text, in UTF-8."""

MOST_DEPTH = 64
"""Objects and lists of a schema inside each other, and brackets of a regular expression."""

MOST_MULTIPLES = 20_000
"""The sum of all `multipleOf` of a schema, each without its decimal point: an automaton counts remainders one by one."""

MOST_STATES = 30_000
"""Places that the automaton of one grammar may have; each takes a few kilobytes."""

MOST_LITERALS = 16
"""Pieces of a regular expression that are tried as the end of free text."""

KEPT = 64
"""Compiled grammars kept, of all tokenizers together."""

SEPARATORS: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""White space of JSON, unless a schema says otherwise: a space behind each comma and colon, or none, and no more: a model
that is unsure would go on with white space for ever. Both styles that models have learned fit: Python's and the compact."""


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

    def closing(self, limit: int, token_id: int | None = None, earlier: Sequence[int] = ()) -> list[int] | None:
        """Tokens that complete the text from here; the end mark is the last where the text might go on without it.

        Args:
            limit: tokens at most.
            token_id: the last token of the text, where `earlier` is given.
            earlier: what this returned before that token; mostly what is left of it is right, which is quick to find.

        Returns:
            None where none of at most `limit` tokens is found, which may happen though there is one.
        """
        ...


class Grammar(Protocol):
    """What texts are allowed. Immutable; may serve any number of requests at a time."""

    @property
    def vocab_size(self) -> int:
        """Length of the masks."""
        ...

    @property
    def shortest(self) -> Sequence[int]:
        """The closing of the start: a whole text, the shortest that was found."""
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
    ends: Sequence[str] = (),
) -> Grammar:
    """Prepare a grammar for the tokens of `tokenizer`. Exactly one form is given.

    The first grammar of a tokenizer takes longer: its tokens are sorted into a tree, which is kept. So are the last grammars.

    Args:
        regex: the whole text matches this (syntax of Rust's regex: no look-around, no back references; \\d and \\w mean
            those of Unicode, so write [0-9] for ten digits).
        json_schema: the text is JSON that this schema accepts; a mapping, or its JSON text. `{"type": "object"}` is any
            object. White space is as in `SEPARATORS`; `"x-guidance": {"whitespace_flexible": true}` in the schema frees it.
        choice: the text is one of these.
        lark: rules in llguidance's variant of Lark; `start` is the whole text.
        ends: with `lark`: strings that end a free text inside it, such as the tag behind it. They help to find a closing.

    Raises:
        RequestError: llguidance is not installed, or the grammar is not one, asks for what is not supported, allows no
            text that ends, or is too large or too complex.
    """
    forms = {"regex": regex, "json_schema": json_schema, "choice": choice, "lark": lark}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            f"a grammar is given as exactly one of {', '.join(forms)}, not {' and '.join(given) or 'none'}"
        )
    [form] = given
    if form == "json_schema":
        text = _schema_text(json_schema)
    elif form == "choice":
        text = _choice_rule(choice)
    else:
        text = _text(form, forms[form])
        _check_size(form, len(text.encode(errors="replace")))
        if form == "regex":
            _check_brackets(text)
    return _compiled(tokenizer, form, text, tuple(ends))


@lru_cache(maxsize=KEPT)
def _compiled(tokenizer: Tokenizer, form: str, text: str, ends: tuple[str, ...]) -> Grammar:
    try:
        import llguidance
    except ImportError:
        raise RequestError(
            f"{form} needs the library llguidance: pip install 'longreach[grammar]', or leave {form} out"
        ) from None
    matchers = llguidance.LLMatcher
    hints = tuple(end.encode() for end in ends)
    if form == "regex":
        source, hints = matchers.grammar_from_regex(text), literals(text)
    elif form == "json_schema":
        source = matchers.grammar_from_json_schema(text, defaults=SEPARATORS)
    else:
        source = matchers.grammar_from_lark(text)
    limits = llguidance.LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
    matcher = matchers(_bind(tokenizer), source, log_level=0, limits=limits)
    if matcher.is_error():
        raise RequestError(f"{form} cannot be used: {_one_line(matcher.get_error())}")
    probe = matcher.deep_copy()
    bits = probe.compute_bitmask()
    if probe.is_error() or not any(bits):
        raise RequestError(f"{form} allows no text at all; loosen it")
    spelling = spelling_of(tokenizer)
    shortest = find_closing(matcher, spelling, LONGEST_BYTES, hints=hints)
    if shortest is None:
        raise RequestError(
            f"{form} allows no text that ends within {LONGEST_BYTES} bytes, or none that could be found; let it end sooner"
        )
    return _Grammar(matcher, tokenizer.vocab_size, spelling, hints, tuple(shortest))


class _Grammar:
    """A matcher that stays at its start, to be copied."""

    def __init__(
        self, matcher: Any, vocab_size: int, spelling: Spelling, hints: Sequence[bytes], shortest: tuple[int, ...]
    ) -> None:
        self._matcher, self.vocab_size, self._spelling, self._hints = matcher, vocab_size, spelling, hints
        self.shortest: Sequence[int] = shortest

    def start(self) -> _State:
        return _State(self._matcher.deep_copy(), self.vocab_size, self._spelling, self._hints)


class _State:
    """A place in the text. The end mark is kept here, so that the matcher can always be rolled back by text tokens."""

    def __init__(
        self, matcher: Any, vocab_size: int, spelling: Spelling, hints: Sequence[bytes], has_ended: bool = False
    ) -> None:
        self._matcher, self._vocab_size, self._spelling, self._hints = matcher, vocab_size, spelling, hints
        self._eos_id, self._has_ended = spelling.eos_id, has_ended

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
        return _State(self._matcher.deep_copy(), self._vocab_size, self._spelling, self._hints, self._has_ended)

    def closing(self, limit: int, token_id: int | None = None, earlier: Sequence[int] = ()) -> list[int] | None:
        if self.is_finished:
            return []
        return find_closing(self._matcher, self._spelling, limit, token=token_id, earlier=earlier, hints=self._hints)


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
    if isinstance(schema, str):
        _check_size("json_schema", len(schema))
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else dict(schema)
        check_nesting(parsed)
        text = json.dumps(parsed)
    except RecursionError:
        raise RequestError(f"json_schema is nested more than {MOST_DEPTH} deep; make it flatter") from None
    except (ValueError, TypeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"json_schema is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"json_schema must be a JSON object, not {_shown(text)}")
    _check_size("json_schema", len(text))
    return text


def _check_size(form: str, size: int) -> None:
    if size > MOST_BYTES:
        raise RequestError(f"{form} of {size} bytes is too large, at most {MOST_BYTES} are allowed; make it simpler")


def check_nesting(schema: Any) -> None:
    """Refuse a JSON schema that is too deep, has too many values, or needs too large an automaton.

    Level by level, so that nothing recurses before the depth is known.

    Raises:
        RequestError: one line with the value and the limit.
    """
    level, count, multiples = [schema], 0, 0
    for _ in range(MOST_DEPTH + 1):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                multiples += _coefficient(value.get("multipleOf"))
                deeper += value.values()
            elif isinstance(value, list | tuple):
                deeper += value
        count += len(deeper)
        if count > MOST_BYTES:
            raise RequestError(f"json_schema has more than {MOST_BYTES} values; make it simpler")
        if multiples > MOST_MULTIPLES:
            raise RequestError(
                f"json_schema has multipleOf of {multiples} in all, at most {MOST_MULTIPLES} can be followed; leave it out"
            )
        if not deeper:
            return
        level = deeper
    raise RequestError(f"json_schema is nested more than {MOST_DEPTH} deep; make it flatter")


def _coefficient(value: object) -> int:
    """The digits of a number, without its decimal point; one that no automaton could follow where it is huge."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e15:
        return 0 if not isinstance(value, int | float) else MOST_MULTIPLES + 1
    number = Decimal(repr(value))
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return abs(int(number.scaleb(-min(exponent, 0))))


def _check_brackets(pattern: str) -> None:
    depth = deepest = 0
    for character in re.sub(r"\\.", "", pattern, flags=re.DOTALL):
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MOST_DEPTH:
        raise RequestError(f"regex has {deepest} brackets inside each other, at most {MOST_DEPTH} are allowed")


def _choice_rule(choice: Any) -> str:
    """A Lark terminal; Lark spells a string as JSON does. A terminal is one automaton, so thousands of choices cost little."""
    is_list = isinstance(choice, Sequence) and not isinstance(choice, str)
    if not is_list or not choice or not all(isinstance(text, str) for text in choice):
        raise RequestError(f"choice must be a list of one string or more, not {_shown(choice)}")
    _check_size("choice", sum(len(text.encode(errors="replace")) for text in choice))
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)


def literals(source: str) -> tuple[bytes, ...]:
    """The runs of two plain characters and more in a regular expression, longest first: one may be what ends a free text."""
    runs = {run for run in re.findall(r"[\w<>/\"'=:;,\-]{2,40}", source) if len(run) > 1}
    return tuple(run.encode() for run in sorted(runs, key=lambda run: (-len(run), run))[:MOST_LITERALS])


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _one_line(message: str) -> str:
    """The beginning of llguidance's message, which may go on with a dump of its state."""
    line = " ".join(message.split("<state>")[0].split())
    return line if len(line) <= 300 else line[:300] + "…"
