"""The tokens that answers were really made of, for the next turn of their conversations.

A model may spell a text in tokens that encoding the same text anew would not choose, and a tool call's arguments come back
from a client in other words than the model's. The history of the next turn would then differ from what the cache holds from
that point on, and all behind it would be read again. So each part of an answer, its reasoning and what follows it, is kept by
the text that the renderer will make of it, where encoding that text gives other tokens than the model's.

Kept per tenant and within a limit; the least recently used goes first. Without an entry the next turn is right all the same,
only slower.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from longreach.chat.messages import Message
from longreach.chat.renderer import answer_parts
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import THINK_END

_ENTRY_TOKENS = 64
"""What an entry costs besides its own tokens, counted as tokens of 8 bytes."""


class Replay:
    """Remembered parts of answers. Any thread may call.

    Args:
        limit_tokens: of all parts together; a token takes 8 bytes and its text some more.
    """

    def __init__(self, tokenizer: Tokenizer, limit_tokens: int = 4_000_000) -> None:
        self.tokenizer, self.limit = tokenizer, limit_tokens
        self._parts: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def learn(self, tenant: str, message: Message, generated: Sequence[int], began: Sequence[int] = ()) -> None:
        """Remember an answer.

        Args:
            message: what it was read as.
            generated: its tokens, the end mark included or not.
            began: tokens of the answer's part that stood in the prompt already (an open message).
        """
        tokenizer = self.tokenizer
        ids = [*began, *generated]
        if ids and ids[-1] == tokenizer.eos_id:
            ids.pop()
        parts = [ids]
        end = tokenizer.special_ids.get(THINK_END)
        if message.reasoning is not None and end in ids:
            place = ids.index(end)
            parts = [ids[:place], ids[place + 1 :]]
        elif message.reasoning is not None:
            return  # cut off while it thought: nothing follows it
        for written, part in zip(answer_parts(message)[-len(parts) :], parts, strict=True):
            if part and written.encode(tokenizer) != part:
                self._keep((tenant, written.key), part)

    def of(self, tenant: str) -> Callable[[str], list[int] | None]:
        """What is known of a tenant's answers, by the text that the renderer makes of a part."""

        def find(text: str) -> list[int] | None:
            with self._lock:
                part = self._parts.get((tenant, text))
                if part is not None:
                    self._parts.move_to_end((tenant, text))
                return part

        return find

    def _keep(self, key: tuple[str, str], part: list[int]) -> None:
        with self._lock:
            if (old := self._parts.pop(key, None)) is not None:
                self._size -= len(old) + _ENTRY_TOKENS
            self._parts[key] = part
            self._size += len(part) + _ENTRY_TOKENS
            while self._size > self.limit:
                _, gone = self._parts.popitem(last=False)
                self._size -= len(gone) + _ENTRY_TOKENS
