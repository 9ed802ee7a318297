"""The short way to the end of a text with a grammar, so that it is complete when its tokens are used up.

    closing = find_closing(matcher, spelling, limit=40)      '"}' inside the last string of an object, and the end mark

A matcher of llguidance says what may come next, not how far the end is, and for grammars in general no formula does. So
an end is looked for by going there: byte by byte on a copy of the matcher, taking what is forced where anything is, and
otherwise what most likely closes. A walk that comes to an end has proved its way; that it is short is a hope, so some
habits of choosing are tried and the shortest way wins. Habits alone could go round for ever in a text that must be long
(`[a-z]{40}x`); so of what may follow in the same situation, what was taken least often goes first, and whatever has just
become possible goes before the rest.

Most tokens do not change how a text ends: another letter in a string leaves `"}` right. So the closing known from before
the token is tried first, as it is and without the part that the token has just written, which costs some millionths of a
second; only a token that opens something new needs a walk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from longreach.tokenizer.bpe import Tokenizer

LONGEST_BYTES = 16_384
"""A walk that has no end after so many bytes is given up."""

LONGEST_PIECE = 32
"""Tokens of more bytes are not used for closings: they are runs of one character."""

SKIPPED = 8
"""Bytes at the beginning of a known closing that may have been overtaken by a token that spells them otherwise."""

CONTENT = 80
"""A place that allows more bytes than this is inside free text, where brackets are only letters."""

MOST_CHOICES = 4096
"""A walk that has no end after so many choices is given up: some hundredths of a second."""

MOST_HINTS = 64
"""Times a hint is taken in one situation."""

TAKEN, NEW, NEVER = 4096, 2048, 1 << 60
"""In a score (the lowest is taken): each time it was taken here before; only now possible; not possible."""


class Habit(NamedTuple):
    """An order of preference among bytes, best first; those that are not named follow."""

    between: bytes
    """Outside free text."""
    inside: bytes
    """Inside free text, where more bytes than `CONTENT` may follow."""
    varies: bool
    """Whether what was taken before goes behind, and what has just become possible goes first."""


_RISING = bytes(range(256))
HABITS = (
    Habit(b'/}])><,:0123456789"ntfabcdefghijklmopqrsuvwxyz[{', b'"abcdefghijklmnopqrstuvwxyz0123456789', varies=False),
    Habit(b'/}])><,:0123456789"ntf[{', b'"<\n', varies=True),
    Habit(_RISING, _RISING, varies=True),
    Habit(_RISING[::-1], _RISING[::-1], varies=True),
)
"""The first is that of JSON: what closes, then what is short. The others are for texts that have to vary to end."""


def _scores(order: bytes, count: int) -> np.ndarray:
    """Of `count` symbols, the lowest the most welcome, int64: the slash of a closing tag, special tokens, other bytes."""
    scores = np.ones(count, dtype=np.int64)
    scores[:256] = [order.find(byte) + 2 if byte in order else 300 + byte for byte in range(256)]
    if order.startswith(b"/"):
        scores[ord("/")] = 0
    return scores


_SPECIAL = re.compile(rb"\xff\[([0-9]+)\]")


class Spelling:
    """How the tokens of one tokenizer spell bytes: symbols are the tokens of single bytes, and the special tokens.

    Attributes:
        symbols: ids of the 256 single-byte tokens, then of the special tokens, int64.
        scores: of each habit: how welcome the symbols are outside and inside free text; the lowest is taken.
        eos_id: the end mark.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = set(tokenizer.special_ids.values())
        self.eos_id = tokenizer.eos_id
        self._pieces = {
            text: index
            for index, text in enumerate(tokenizer.token_bytes)
            if index not in special and 0 < len(text) <= LONGEST_PIECE
        }
        self._byte_ids = [self._pieces[bytes([byte])] for byte in range(256)]
        self._byte_of = {index: byte for byte, index in enumerate(self._byte_ids)}
        self._table, self._special = tokenizer.token_bytes, special
        self.symbols = np.array(self._byte_ids + sorted(special - {self.eos_id}))
        count = len(self.symbols)
        self.scores = [(_scores(habit.between, count), _scores(habit.inside, count)) for habit in HABITS]

    def spell(self, text: bytes) -> list[int]:
        """A text as symbols; llguidance writes a special token as the byte 255, which no UTF-8 has, and its id."""
        if 0xFF not in text:
            return [self._byte_ids[byte] for byte in text]
        parts = _SPECIAL.split(text)
        return [
            symbol
            for place, part in enumerate(parts)
            for symbol in ([int(part)] if place % 2 else [self._byte_ids[byte] for byte in part])
        ]

    def symbols_of(self, tokens: Sequence[int]) -> list[int]:
        """Tokens as symbols; the end mark has none."""
        out: list[int] = []
        for token in tokens:
            if token not in self._special:
                out += [self._byte_ids[byte] for byte in self._table[token]]
            elif token != self.eos_id:
                out.append(token)
        return out

    def tokens_of(self, symbols: Sequence[int], limit: int) -> list[int]:
        """Symbols as tokens, longest first; as few as there can be where that alone meets the limit."""
        runs = list(self._runs(symbols))
        quick = [token for run in runs for token in (self._longest_first(run) if isinstance(run, bytes) else [run])]
        if len(quick) <= limit:
            return quick
        return [token for run in runs for token in (self._fewest(run) if isinstance(run, bytes) else [run])]

    def _runs(self, symbols: Sequence[int]) -> Iterator[bytes | int]:
        run = bytearray()
        for symbol in symbols:
            if (byte := self._byte_of.get(symbol)) is not None:
                run.append(byte)
                continue
            if run:
                yield bytes(run)
            run = bytearray()
            yield symbol
        if run:
            yield bytes(run)

    def _longest_first(self, text: bytes) -> list[int]:
        out, at, pieces = [], 0, self._pieces
        while at < len(text):
            for end in range(min(at + LONGEST_PIECE, len(text)), at, -1):
                if (piece := pieces.get(text[at:end])) is not None:
                    out.append(piece)
                    at = end
                    break
        return out

    def _fewest(self, text: bytes) -> list[int]:
        best: list[tuple[int, int, int]] = [(0, 0, 0)]  # tokens up to this byte, the last of them, where it begins
        for end in range(1, len(text) + 1):
            starts = range(max(0, end - LONGEST_PIECE), end)
            best.append(
                min(
                    (best[start][0] + 1, self._pieces[text[start:end]], start)
                    for start in starts
                    if text[start:end] in self._pieces
                )
            )
        out, at = [], len(text)
        while at:
            _, piece, at = best[at]
            out.append(piece)
        return out[::-1]


@lru_cache(maxsize=4)
def spelling_of(tokenizer: Tokenizer) -> Spelling:
    """The spelling of a tokenizer, made once."""
    return Spelling(tokenizer)


def find_closing(
    matcher: Any,
    spelling: Spelling,
    limit: int,
    *,
    token: int | None = None,
    earlier: Sequence[int] = (),
    hints: Sequence[bytes] = (),
) -> list[int] | None:
    """Tokens that complete the text from here, the end mark included where the grammar would allow more.

    Args:
        matcher: an `LLMatcher`, left as it is.
        limit: tokens at most.
        token: the last token of the text, with `earlier`, the closing known from before it.
        hints: strings that end free text in this grammar, such as the tag that follows it.

    Returns:
        None where no way of at most `limit` tokens was found.
    """
    if token is not None:
        for symbols in _overtaken(spelling, token, earlier):
            if (found := _completed(matcher, spelling, symbols, limit)) is not None:
                return found
    best: list[int] | None = None
    longest = min(LONGEST_BYTES, limit * LONGEST_PIECE)
    # A token of a closing rarely spells more than two choices; what is looked up for every token must not go far.
    choices = MOST_CHOICES if token is None else min(MOST_CHOICES, 2 * limit + 32)
    for habit in range(len(HABITS)):
        most = choices // 4 if HABITS[habit].varies else choices
        symbols = _walk(matcher.deep_copy(), spelling, longest, most, habit, hints)
        if symbols is None:
            continue
        found = _completed(matcher, spelling, symbols, limit)
        if found is not None and (best is None or len(found) < len(best)):
            best, longest = found, len(symbols)
        if token is not None:
            break  # it fits and will soon change again, or the end is too far off
    return best


def _overtaken(spelling: Spelling, token: int, earlier: Sequence[int]) -> Iterator[list[int]]:
    """What may be left of a closing after a token: all behind the part the token ends with, or behind its first bytes."""
    new, rest = spelling.symbols_of([token]), spelling.symbols_of(earlier)
    overlaps = [size for size in range(min(len(new), len(rest)), 0, -1) if new[-size:] == rest[:size]]
    for size in dict.fromkeys([*overlaps, *range(min(SKIPPED, len(rest)) + 1)]):
        yield rest[size:]


def _completed(matcher: Any, spelling: Spelling, symbols: list[int], limit: int) -> list[int] | None:
    """The tokens of these symbols and, where it is needed, the end mark, if that completes the text within the limit."""
    probe = matcher.deep_copy()
    if symbols and probe.try_consume_tokens(symbols) != len(symbols):
        return None
    if not probe.is_accepting():
        return None
    end = [] if probe.is_stopped() else [spelling.eos_id]
    tokens = spelling.tokens_of(symbols, limit - len(end)) + end
    return tokens if len(tokens) <= limit else None


def _walk(
    matcher: Any, spelling: Spelling, longest: int, choices: int, habit: int, hints: Sequence[bytes]
) -> list[int] | None:
    """Symbols from here to an end, or None. Changes the matcher."""
    varies = HABITS[habit].varies
    out: list[int] = []
    taken: dict[bytes, np.ndarray] = {}
    hinted: Counter = Counter()
    before = np.zeros(len(spelling.symbols), dtype=bool)
    for _ in range(choices):
        forced = matcher.compute_ff_bytes()
        if forced:
            step = spelling.spell(forced)
            out += step
            if len(out) > longest or matcher.try_consume_tokens(step) != len(step):
                return None
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            return None
        if bits[spelling.eos_id >> 3] >> (spelling.eos_id & 7) & 1:
            return out
        allowed = (bits[spelling.symbols >> 3] >> (spelling.symbols & 7)) & 1 != 0
        here = allowed.tobytes()
        count = here.count(1, 0, 256)
        is_content, is_special = count > CONTENT, 1 in here[256:]
        step = _hint(matcher, spelling, allowed, hints, hinted, here) if is_content and not is_special else None
        if step is None:
            scores = spelling.scores[habit][is_content]
            if varies:
                times = taken.setdefault(here, np.zeros(len(allowed), dtype=np.int64))
                scores = scores + times * TAKEN - NEW * ~before
            place = int(np.where(allowed, scores, NEVER).argmin())
            if not allowed[place]:
                return None
            if varies:
                taken[here][place] += 1
            step, before = [int(spelling.symbols[place])], allowed
        if len(out) >= longest or matcher.try_consume_tokens(step) != len(step):
            return None
        out += step
    return None


def _hint(
    matcher: Any, spelling: Spelling, allowed: np.ndarray, hints: Sequence[bytes], hinted: Counter, here: bytes
) -> list[int] | None:
    """The hint taken least often here, if it may follow as a whole."""
    for hint in sorted(hints, key=lambda hint: hinted[here, hint]):
        if allowed[hint[0]] and hinted[here, hint] < MOST_HINTS:
            hinted[here, hint] += 1
            symbols = spelling.spell(hint)
            if matcher.validate_tokens(symbols) == len(symbols):
                return symbols
    return None
