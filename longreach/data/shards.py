"""Documents as tokens on disk, read without loading them: the data of a run may be far larger than memory.

    folder/
      index.json             what is here: counts, dtype, vocabulary, tokenizer, digest, and the same counts per shard
      tokens-00000.bin       ids end to end, little-endian uint16 (vocabularies up to 65,536) or uint32
      offsets-00000.npy      int64 (documents + 1): where each document begins and the last one ends
      tokens-00001.bin …

A folder is written under another name and gets its own when it is whole, so a half-written one is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longreach.data.documents import DocumentsDigest
from longreach.errors import RequestError
from longreach.runtime import write_atomic
from longreach.tokenizer.bpe import Tokenizer

SHARD_TOKENS = 1 << 28
SHARD_DOCUMENTS = 1 << 22
"""A shard is full at either; the second bounds the offsets held while writing to 32 MiB."""

_FORMAT = "longreach token shards, 1"


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 of its tokenizer.json."""
    return hashlib.sha256(tokenizer._json.encode("utf-8")).hexdigest()


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A new, empty folder to write into, which becomes `folder` if all goes well and is removed otherwise.

    A killed process leaves it behind under its other name; the next attempt removes it.

    Raises:
        RequestError: `folder` is there and not empty, or the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} exists and is not empty; give a new folder")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(
    documents: Iterable[np.ndarray], folder: str | Path, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS
) -> TokenShards:
    """Write documents as they come, holding one at a time, and open the result.

    Args:
        documents: one-dimensional arrays of ids of `tokenizer`.
        folder: absent or empty.
        shard_tokens: a shard ends with the document that reaches this many.

    Raises:
        RequestError: the folder holds something, an id is outside the vocabulary, or the disk is full.
    """
    folder = Path(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest, shards = DocumentsDigest(), []
    with whole_or_nothing(folder) as partial:
        stream = iter(documents)
        document = next(stream, None)
        while document is not None:
            offsets = array("q", [0])
            with (partial / _tokens_name(len(shards))).open("wb") as file:
                while document is not None and offsets[-1] < shard_tokens and len(offsets) <= SHARD_DOCUMENTS:
                    _check_ids(document, tokenizer.vocab_size)
                    file.write(np.ascontiguousarray(document, dtype=dtype).data)
                    digest.add(document)
                    offsets.append(offsets[-1] + len(document))
                    document = next(stream, None)
                _to_disk(file)
            with (partial / _offsets_name(len(shards))).open("wb") as file:
                np.save(file, np.frombuffer(offsets, dtype=np.int64))
                _to_disk(file)
            shards.append({"documents": len(offsets) - 1, "tokens": offsets[-1]})
        index = {
            "format": _FORMAT,
            "documents": sum(shard["documents"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer_digest(tokenizer),
            "digest": digest.hexdigest(),
            "shards": shards,
        }
        write_atomic(partial / "index.json", json.dumps(index, indent=1) + "\n")
    return TokenShards.open(folder)


class TokenShards:
    """Documents in a folder that `write_shards` wrote. Indexing gives a read-only view of the file, nothing is copied."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder = folder
        self.num_tokens: int = index["tokens"]
        self.digest: str = index["digest"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer: str = index["tokenizer"]
        self._tokens: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        for number, shard in enumerate(index["shards"]):
            tokens, offsets = folder / _tokens_name(number), folder / _offsets_name(number)
            _check_size(tokens, shard["tokens"] * np.dtype(index["dtype"]).itemsize)
            dtype = np.dtype(index["dtype"]).newbyteorder("<")
            self._tokens.append(
                np.memmap(tokens, dtype=dtype, mode="r")
                if shard["tokens"]
                else np.empty(0, dtype)  # mmap refuses 0 bytes
            )
            self._offsets.append(_read_offsets(offsets, shard["documents"], shard["tokens"]))
        self._ends = list(accumulate(shard["documents"] for shard in index["shards"]))
        if not self._ends or (self._ends[-1], sum(map(len, self._tokens))) != (index["documents"], self.num_tokens):
            raise RequestError(f"{folder / 'index.json'} contradicts itself or holds nothing; write the shards again")

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> TokenShards:
        """Open a folder of shards.

        Args:
            folder: what `write_shards` was given.
            tokenizer: the one the ids must be of.

        Raises:
            RequestError: no shards there, a file is absent or not of its size, or they are another tokenizer's.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if index["format"] != _FORMAT:
                raise RequestError(f"{folder} has the format {index['format']!r}, this release reads {_FORMAT!r}")
            shards = cls(folder, index)
        except FileNotFoundError as error:
            raise RequestError(f"{folder} holds no token shards: {Path(error.filename).name} is missing") from None
        except OSError as error:
            raise RequestError(f"{folder} cannot be read: {error.strerror or error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise RequestError(f"{folder / 'index.json'} is not an index of token shards: {error!r}") from None
        if tokenizer is not None:
            shards.check_tokenizer(tokenizer)
        return shards

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse any tokenizer but the one the documents were encoded with."""
        if tokenizer.vocab_size != self.vocab_size:
            raise RequestError(
                f"{self.folder} was written with a vocabulary of {self.vocab_size}, this tokenizer has "
                f"{tokenizer.vocab_size}; use the tokenizer it was prepared with"
            )
        if (digest := tokenizer_digest(tokenizer)) != self.tokenizer:
            raise RequestError(
                f"{self.folder} was written with another tokenizer (sha256 {self.tokenizer[:12]}, this one has "
                f"{digest[:12]}); use the one it was prepared with"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        start, stop = self._offsets[shard][place : place + 2]
        return self._tokens[shard][start:stop]


def _tokens_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def _offsets_name(shard: int) -> str:
    return f"offsets-{shard:05d}.npy"


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise RequestError(
            f"a document has ids from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab_size}"
        )


def _check_size(path: Path, expected: int) -> None:
    if (size := path.stat().st_size) != expected:
        raise RequestError(f"{path} has {size} bytes where its index says {expected}: it is damaged; write it again")


def _read_offsets(path: Path, documents: int, tokens: int) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise RequestError(f"{path} is damaged ({error}); write the shards again") from None
    if offsets.shape != (documents + 1,) or offsets[-1] != tokens:
        raise RequestError(f"{path} does not fit its index: it is damaged; write the shards again")
    return offsets


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
