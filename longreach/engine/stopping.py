"""The text side of a request: tokens in, text out as soon as it is certain, and the reason it ends.

    stream = TextStream(tokenizer, SamplingParams(stop=["\\n\\n", "END"], max_tokens=100))
    text = stream.push(token_id)              again and again, until stream.finish_reason is set
    text = stream.finish()                    what was still held back

Text that could be the beginning of a stop string is held back until it is known not to be. Every character is looked at
once (Knuth, Morris and Pratt's automaton, one state per stop string), so a long output costs no more per token than a
short one. The text ends where a stop string is first complete; if two become complete at one character, before the longer.
That depends on the text alone, never on how it was cut into tokens.
"""

from __future__ import annotations

from typing import Protocol

from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.stream import StreamDecoder


class TokenReader(Protocol):
    """Whoever reads a request's tokens and may end it: `TextStream`, or a server's parser of chat answers."""

    finish_reason: FinishReason | None
    stop_reason: str | int | None

    def push(self, token_id: int) -> str:
        """Read a token; returns text for `Output.text`. `finish_reason` set afterwards ends the request."""
        ...

    def finish(self, reason: FinishReason | None = None) -> str:
        """Nothing more will come; called once or more often."""
        ...


class TextStream:
    """The text of one request while it is generated.

    What `push` and `finish` returned, joined, is the decoded text, cut before the first stop string (behind it with
    `include_stop`). The end mark and stop tokens have no text.

    Attributes:
        finish_reason: None while the text may go on; then STOP, LENGTH or what `finish` was told.
        stop_reason: the stop string, or the id of the end mark or stop token, that ended it.
        num_tokens: tokens pushed, the one that ended the text included.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._params = params
        self._decoder = StreamDecoder(tokenizer)
        self._end_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {tokenizer.eos_id})
        self._watches = [_Watch(stop) for stop in params.stop]
        self._held = ""
        self._is_closed = False
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.num_tokens = 0

    def push(self, token_id: int) -> str:
        """The text that this token makes certain. No more may be pushed once `finish_reason` is set.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        assert self.finish_reason is None, f"the text has ended ({self.finish_reason})"
        self.num_tokens += 1
        if token_id in self._end_ids:
            self.finish_reason, self.stop_reason = FinishReason.STOP, token_id
            return ""
        text = self._certain(self._decoder.push(token_id))
        if self.finish_reason is None and self.num_tokens >= self._params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        return text

    def finish(self, reason: FinishReason | None = None) -> str:
        """The text still held back. Empty after a stop string, and when called again.

        Args:
            reason: why nothing more will come, where that is not known yet: CANCELLED, DEADLINE, ERROR, or LENGTH for a
                full context. One already known stays.
        """
        if self._is_closed:
            return ""
        # A character that never became whole is U+FFFD now, which may even complete a stop string.
        text = self._certain(self._decoder.finish()) + self._held
        self._held, self._is_closed = "", True
        self.finish_reason = self.finish_reason or reason
        return text

    def _certain(self, new: str) -> str:
        """Add text to what is held, and let go of all that no stop string can begin in any more."""
        if not self._watches:
            return new
        for place, character in enumerate(new):
            longest: _Watch | None = None
            for watch in self._watches:
                if watch.advance(character) and (longest is None or len(watch.stop) > len(longest.stop)):
                    longest = watch
            if longest is not None and self.num_tokens >= self._params.min_tokens:
                text = self._held + new[: place + 1]
                self._held, self._is_closed = "", True
                self.finish_reason, self.stop_reason = FinishReason.STOP, longest.stop
                return text if self._params.include_stop else text[: -len(longest.stop)]
        text = self._held + new
        certain = len(text) - max(watch.matched for watch in self._watches)
        self._held = text[certain:]
        return text[:certain]


class _Watch:
    """How many characters of a stop string the text ends with: always the most that fit, never the whole string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # For each length of a matched beginning, the longest shorter beginning that it ends with.
        self._shorter = [0] * (len(stop) + 1)
        for length in range(2, len(stop) + 1):
            self._shorter[length] = self._extended(self._shorter[length - 1], stop[length - 1])

    def advance(self, character: str) -> bool:
        """Read one character; whether it completes the string."""
        self.matched = self._extended(self.matched, character)
        if self.matched < len(self.stop):
            return False
        self.matched = self._shorter[self.matched]
        return True

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched]
        return matched + 1 if self.stop[matched] == character else 0
