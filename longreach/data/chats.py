"""Files of conversations as examples: read once to be checked, then encoded, a few in a hundred held out.

    file = ChatFile.read(Path("chats.jsonl"), share=0.02)          every line checked; problems are one error
    chats = Chats(file, tokenizer, Fitting(4096, cuts=False), seed=0)
    chats.example(17)                                              endless: pass after pass, each in an order of its own

A conversation is held out if the hash of its text is low, so a copy of it is never on both sides and the same one is held
out in every run. A file too small for any hash to be low gives its lowest, and a file of one conversation gives none.
Encoded examples stay in memory, five bytes a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longreach.chat.renderer import Prompt
from longreach.data.conversations import Chat, read_chats
from longreach.data.examples import Example, Fitting, make_example
from longreach.data.order import Shuffle
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class ChatFile:
    """A file that was read and found good.

    Attributes:
        count: conversations in it, those held out included.
        threshold: a conversation whose hash is not above it is held out.
    """

    path: Path
    count: int
    threshold: float

    @classmethod
    def read(cls, path: Path, share: float) -> ChatFile:
        """Read the whole file.

        Args:
            share: of the conversations to be held out; 0 for none.

        Raises:
            RequestError: it cannot be read, holds nothing, or has lines that cannot be used.
        """
        hashes = [chat.place for chat in read_chats(path)]
        if not hashes:
            raise RequestError(f"--data {path} holds no conversation")
        lowest, highest = min(hashes), max(hashes)
        threshold = -1.0 if share == 0 or lowest == highest else max(share, lowest)
        return cls(path, len(hashes), -1.0 if highest <= threshold else threshold)

    def training(self) -> Iterator[Prompt]:
        """What is learned."""
        for chat in read_chats(self.path):
            if chat.place > self.threshold:
                yield from chat.prompts

    def held_out(self, tokenizer: Tokenizer, fitting: Fitting) -> Iterator[Example]:
        """The others, encoded, each conversation once, without what is too long."""
        held_out: dict[float, Chat] = {}
        for chat in read_chats(self.path):
            if chat.place <= self.threshold:
                held_out.setdefault(chat.place, chat)
        for chat in held_out.values():
            for prompt in chat.prompts:
                if (example := fitting(make_example(*prompt.encode_with_loss(tokenizer)))) is not None:
                    yield example


class Chats:
    """The training conversations of a file, encoded, pass after pass.

    Attributes:
        size: examples of a pass; a conversation may give several.
        num_tokens: of a pass.
        too_long, cut: examples left out of every pass, and cut at their end.

    Raises:
        RequestError: none is short enough, or the tokenizer lacks a special token.
    """

    def __init__(self, file: ChatFile, tokenizer: Tokenizer, fitting: Fitting, seed: int) -> None:
        self.name, self.seed, self.longest = f"--data {file.path}", seed, fitting.longest
        self.examples: list[Example] = []
        self.too_long = self.cut = 0
        digest = hashlib.sha256()
        for prompt in file.training():
            whole = make_example(*prompt.encode_with_loss(tokenizer))
            fitted = fitting(whole)
            if fitted is None:
                self.too_long += 1
                continue
            self.cut += fitted is not whole
            self.examples.append(fitted)
            digest.update(fitted.tokens.tobytes() + fitted.learned.tobytes())
        if not self.examples:
            raise RequestError(
                f"{self.name}: all of its {self.too_long} conversations are longer than {fitting.longest} tokens; "
                "raise --longest, or say --too-long cut to learn from their beginnings"
            )
        self.size = len(self.examples)
        self.num_tokens = sum(len(example.tokens) for example in self.examples)
        self.identity = f"{digest.hexdigest()} {seed}"

    def example(self, index: int) -> Example:
        turn, place = divmod(index, self.size)
        return self.examples[Shuffle(self.size, "conversations", self.seed, turn)[place]]
