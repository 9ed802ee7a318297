"""Documents as token ids: what a stream asks of a collection of them, and the one that lives in memory.

    [bos a b c eos]     one document

The one on disk is `TokenShards` (data/shards.py). The same documents have the same digest in either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from longreach.data.order import Shuffle
from longreach.tokenizer.bpe import Tokenizer

_ENCODE_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 2_000_000


class Documents(Protocol):
    """A fixed, ordered collection of documents; each is a one-dimensional array of ids, of any integer type."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        ...

    @property
    def digest(self) -> str:
        """Equal for equal documents in equal order, wherever they are kept."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class DocumentsDigest:
    """Hashes documents one at a time; where one ends and the next begins counts too."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, ids: np.ndarray) -> None:
        """Take in the next document."""
        self._hash.update(len(ids).to_bytes(8, "little"))
        self._hash.update(np.ascontiguousarray(ids, dtype="<u4").data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class MemoryDocuments:
    """Documents in a list."""

    def __init__(self, documents: Iterable[np.ndarray]):
        self._documents = list(documents)
        self.num_tokens = sum(map(len, self._documents))
        digest = DocumentsDigest()
        for document in self._documents:
            digest.add(document)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self._documents[index]


class Shuffled:
    """The same documents in a fixed shuffled order, so that the first few of them are a sample of all."""

    def __init__(self, documents: Documents):
        self._documents = documents
        self._order = Shuffle(len(documents), "sample")
        self.num_tokens, self.digest = documents.num_tokens, f"{documents.digest}, shuffled"

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self._documents[self._order[index]]


def encode_stream(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Each text as int32 ids: begin mark, text, end mark. Special tokens spelled out in a text stay text.

    Only a few texts are held at a time.
    """

    def encoded(portion: Sequence[str]) -> Iterator[np.ndarray]:
        for ids in tokenizer.encode_batch(portion):
            yield np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=np.int32)

    # In portions: an encoding in the making takes far more memory than its ids.
    portion: list[str] = []
    characters = 0
    for text in texts:
        portion.append(text)
        characters += len(text)
        if len(portion) == _ENCODE_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield from encoded(portion)
            portion, characters = [], 0
    yield from encoded(portion)


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """`encode_stream` as a list."""
    return list(encode_stream(texts, tokenizer))
