"""The tokens that answers were really made of, for the next turn of their conversations.

A model may spell a text in tokens that encoding the same text anew would not choose, and a tool call's arguments come back
from a client in other words than the model's. The history of the next turn would then differ from what the cache holds from
that point on, and all behind it would be read again. So each part of an answer, its reasoning and what follows it, is kept by
the text that the renderer will make of it, where encoding that text gives other tokens than the model's.

Kept per tenant and within a limit; the least recently used goes first. Without an entry the next turn is right all the same,
only slower.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from longreach.chat.messages import Message
from longreach.chat.renderer import answer_parts
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import THINK_END

_ENTRY_NBYTES = 300
"""Of the dictionary's slot, the tuple and the array's head."""


class Replay:
    """Remembered parts of answers. Any thread may call.

    Args:
        limit_bytes: of all parts together, their texts included.
    """

    def __init__(self, tokenizer: Tokenizer, limit_bytes: int = 32 << 20) -> None:
        self.tokenizer, self.limit = tokenizer, limit_bytes
        self._parts: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def learn(
        self, tenant: str, message: Message, generated: Sequence[int], *, thinks: bool, began: Sequence[int] = ()
    ) -> None:
        """Remember an answer.

        Args:
            message: what it was read as.
            generated: its tokens, the end mark included or not.
            thinks: whether the prompt ended inside reasoning, so that they begin with it.
            began: tokens of a block of calls that stood in the prompt already, opened.
        """
        tokenizer = self.tokenizer
        ids = [*began, *generated]
        if ids and ids[-1] == tokenizer.eos_id:
            ids.pop()
        parts, reasoning = [ids], None
        if thinks:
            end = tokenizer.special_id(THINK_END)
            if end not in ids:
                return  # cut off while it thought: nothing follows it
            place = ids.index(end)
            # Reasoning may be empty: its end is the first token then.
            parts, reasoning = [ids[:place], ids[place + 1 :]], message.reasoning or ""
        for written, part in zip(answer_parts(replace(message, reasoning=reasoning)), parts, strict=True):
            if part and written.encode(tokenizer) != part:
                self._keep((tenant, written.key), part)

    def of(self, tenant: str) -> Callable[[str], Sequence[int] | None]:
        """What is known of a tenant's answers, by the text that the renderer makes of a part."""

        def find(text: str) -> Sequence[int] | None:
            with self._lock:
                part = self._parts.get((tenant, text))
                if part is not None:
                    self._parts.move_to_end((tenant, text))
                return part

        return find

    def _keep(self, key: tuple[str, str], ids: Sequence[int]) -> None:
        part = array("I", ids)
        with self._lock:
            if (old := self._parts.pop(key, None)) is not None:
                self._size -= _nbytes(key, old)
            self._parts[key] = part
            self._size += _nbytes(key, part)
            while self._size > self.limit:
                self._size -= _nbytes(*self._parts.popitem(last=False))


def _nbytes(key: tuple[str, str], part: array[int]) -> int:
    """Memory of an entry: its tokens, its texts, and what the objects around them take."""
    return part.itemsize * len(part) + sum(map(sys.getsizeof, key)) + _ENTRY_NBYTES
