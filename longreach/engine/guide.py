"""The text of one request on its way: first what it may think, then what its grammar allows, and always an end in time.

    guide = Guide(params, eos_ids, vocab_size)
    guide.mask()                    the tokens that may be drawn next
    guide.take(token, room)         the token drawn: False, and nothing changed, if `room` more tokens could not end the text
    guide.narrow(mask)              then draw again with this mask

The promise: a text with a grammar is complete when its request ends by itself, however few tokens are left. At every place
a closing is known, tokens that complete the text from there and fit into what is left; a token is taken only if a closing
is known behind it, too. So nothing has to be assumed about how much longer a single token can make a text. The next token of
the known closing may always be taken. Whether any other may is looked up for that one alone, once it has been drawn, never
for the whole vocabulary: mostly the old closing still fits behind it. A token that is refused is drawn again among the
others, and after `TRIES` refusals the known closing is followed by a token. Each of these depends on the text and the
tokens left, not on how drafts were guessed or what runs beside it, so a text stays what its seed makes it.

Before the mark `SamplingParams.after`, such as the end of thinking, the grammar waits: all tokens may come but the end mark,
until what is left is just enough for the mark and the shortest text of the grammar; then the mark is what comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longreach.engine.grammar import GrammarState
from longreach.engine.sampling import SamplingParams

TRIES = 4
"""Tokens drawn and refused before the known closing is followed."""

FAR = 64
"""A known closing of more tokens that only just fits is followed at once: looking for another would take long, and in vain."""


class Guide:
    """Where a request is. Drafts go forward and back with `advance` and `rollback`, drawn tokens forward with `take`.

    Attributes:
        closing: tokens that complete the grammar's text from the last taken token on.
        is_waiting: whether the mark is still to come.
    """

    def __init__(self, params: SamplingParams, eos_ids: Sequence[int], vocab_size: int) -> None:
        self.state: GrammarState | None = params.grammar.start() if params.grammar is not None else None
        self.closing: list[int] = list(params.grammar.shortest) if params.grammar is not None else []
        self.after = params.after
        self.is_waiting = self.after is not None
        self._eos_ids, self._vocab_size = eos_ids, vocab_size
        self._followed = 0  # tokens behind the mark
        self._refused: list[int] = []

    @property
    def needed(self) -> int:
        """Tokens enough to complete the text from here."""
        return len(self.closing) + (self.is_waiting and self.state is not None)

    @property
    def is_finished(self) -> bool:
        """Whether the grammar's text is complete and cannot go on."""
        return not self.is_waiting and self.state is not None and self.state.is_finished

    def mask(self) -> Tensor | None:
        """The tokens that may come next, bool `(V,)`; None when all may.

        Raises:
            RequestError: the grammar turned out too complex to follow.
        """
        if self.state is None:
            return None
        if not self.is_waiting:
            return self.state.mask()
        allowed = torch.ones(self._vocab_size, dtype=torch.bool)
        allowed[list(self._eos_ids)] = False
        return allowed

    def advance(self, token_id: int) -> bool:
        """Add a token, for as long as `rollback` does not take it back. False if it is not allowed; then nothing changed."""
        if self.is_waiting:
            if self.state is not None and token_id in self._eos_ids:
                return False
            self.is_waiting = token_id != self.after
            return True
        if self.state is not None and not self.state.advance(token_id):
            return False
        self._followed += 1
        return True

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens, none of them from before the last `take`."""
        behind = min(count, self._followed)
        if self.state is not None:
            self.state.rollback(behind)
        self._followed -= behind
        self.is_waiting = self.is_waiting or count > behind

    def take(self, token_id: int, room: int) -> bool:
        """Add the token that was drawn, if the text can be completed behind it.

        Args:
            room: tokens that may come after this one.

        Returns:
            False if it cannot: nothing changed, and `narrow` says what else to draw.
        """
        if self.state is None or (self.is_waiting and (token_id == self.after or room > len(self.closing))):
            self._refused = []
            return self.advance(token_id)
        if self.is_waiting:
            return False
        follows = bool(self.closing) and token_id == self.closing[0]
        if not follows and room < len(self.closing) and len(self.closing) > FAR:
            self._refused = [token_id] * TRIES
            return False
        if not self.advance(token_id):
            return False
        closing = self.closing[1:] if follows else self.state.closing(room, token_id, self.closing)
        if closing is None:
            self.rollback(1)
            self._refused.append(token_id)
            return False
        self.closing, self._refused = closing, []
        return True

    def narrow(self, mask: Tensor | None) -> Tensor:
        """The mask to draw with after a refusal; `mask` is the one that was drawn with, and stays as it is."""
        if self.is_waiting or len(self._refused) >= TRIES:
            forced = self.after if self.is_waiting else self.closing[0]
            assert forced is not None
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[forced] = True
            return allowed
        allowed = torch.ones(self._vocab_size, dtype=torch.bool) if mask is None else mask.clone()
        allowed[self._refused] = False
        return allowed
