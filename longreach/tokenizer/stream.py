"""Text from tokens as they arrive. A character whose bytes are spread over several tokens waits until it is whole."""

from __future__ import annotations

import codecs

from longreach.tokenizer.bpe import Tokenizer


class StreamDecoder:
    """Turns one id at a time into the text that has become certain.

    What `push` and `finish` returned, joined, equals `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text this token completes; empty while a character is unfinished.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else nothing."""
        return self._utf8.decode(b"", final=True)
