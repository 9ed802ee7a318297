"""The data of a run: training documents of every source, their weights, held-out documents, and the tokenizer of all.

sources = parse_sources(["code/@3", "pages.jsonl@1"])
split = Split.of(sources)                              reads everything once; errors come here
tokenizer = Tokenizer.train(tokenizer_sample(split), vocab_size)
corpus = read_corpus(split, tokenizer)        in memory
corpus = prepare(split, tokenizer, "out/")    on disk, whatever the size
corpus = open_corpus("out/")                           the same again, in any later run

out/
  longreach-corpus.json     sources, weights, sizes; marks the folder as a prepared corpus
  tokenizer.json
  train-0/  train-1/ …      token shards (data/shards.py), one folder per source
  validation/
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longreach.data.documents import Documents, MemoryDocuments, Shuffled, encode_stream
from longreach.data.shards import SHARD_TOKENS, TokenShards, whole_or_nothing, write_shards
from longreach.data.sources import PREPARED, Source
from longreach.data.split import Split
from longreach.errors import RequestError
from longreach.runtime import write_atomic
from longreach.tokenizer.bpe import Tokenizer

SAMPLE_CHARACTERS = 100_000_000
"""What a tokenizer learns from, if there is more. Training holds it in memory, with its words counted."""

_SAMPLE_OF_LONG = 10_000
_FORMAT = "longreach corpus, 1"


@dataclass(frozen=True)
class Corpus:
    """Everything that `MixtureStream` and `in_order` ask for."""

    names: list[str]
    """Of the sources, as they were given."""
    training: Sequence[Documents]
    """One collection per source."""
    weights: list[float] | None
    """One per source; None: by size."""
    validation: Documents
    """Held-out documents of all sources in a fixed shuffled order, so that the first of them are a sample of all."""
    tokenizer: Tokenizer

    @property
    def num_tokens(self) -> int:
        """Tokens to train on, all sources together."""
        return sum(documents.num_tokens for documents in self.training)


def read_corpus(split: Split[Source], tokenizer: Tokenizer) -> Corpus:
    """Encode the sources that were split, in memory."""
    training = [
        MemoryDocuments(encode_stream(split.training(number), tokenizer)) for number in range(len(split.sources))
    ]
    validation = MemoryDocuments(encode_stream(split.validation(), tokenizer))
    return Corpus(_names(split), training, _weights(split), Shuffled(validation), tokenizer)


def prepare(
    split: Split[Source],
    tokenizer: Tokenizer,
    folder: str | Path,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """Encode the sources that were split into a folder, a few documents in memory at a time.

    Args:
        folder: absent or empty; it appears when all of it is written.
        shard_tokens: tokens per file.

    Raises:
        RequestError: the folder holds something, the disk is full, or a source changed and cannot be read any more.
    """
    folder = Path(folder)
    with whole_or_nothing(folder) as partial:
        for number in range(len(split.sources)):
            documents = encode_stream(split.training(number), tokenizer)
            write_shards(documents, partial / f"train-{number}", tokenizer, shard_tokens)
        write_shards(encode_stream(split.validation(), tokenizer), partial / "validation", tokenizer, shard_tokens)
        tokenizer.save(partial)
        record = {"format": _FORMAT, "sources": _names(split), "weights": _weights(split)}
        write_atomic(partial / PREPARED, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return open_corpus(folder)


def is_prepared(path: str | Path) -> bool:
    """Whether `prepare` wrote this folder."""
    return (Path(path) / PREPARED).is_file()


def open_corpus(folder: str | Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Open what `prepare` wrote.

    Args:
        folder: the folder.
        tokenizer: one to use instead of the folder's own; it must be the same.

    Raises:
        RequestError: it is not a prepared corpus, part of it is damaged, or the tokenizer is another.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        names, weights, layout = record["sources"], record["weights"], record["format"]
    except OSError as error:
        raise RequestError(f"{folder} is not a prepared corpus: {PREPARED}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{folder / PREPARED} cannot be read: {error!r}") from None
    if layout != _FORMAT:
        raise RequestError(f"{folder} has the format {layout!r}, this release reads {_FORMAT!r}")
    tokenizer = tokenizer or Tokenizer.load(folder)
    training = [TokenShards.open(folder / f"train-{number}", tokenizer) for number in range(len(names))]
    validation = Shuffled(TokenShards.open(folder / "validation", tokenizer))
    return Corpus(names, training, weights, validation, tokenizer)


def tokenizer_sample(split: Split[Source], max_characters: int = SAMPLE_CHARACTERS) -> Iterator[str]:
    """Training texts to learn a tokenizer from: at most `max_characters`, spread evenly over each source.

    Sources share the characters by their weights; one that is too small for its share leaves the rest to the others.
    """
    sizes = [survey.characters for survey in split.surveys]
    shares = _shares(sizes, _weights(split) or sizes, max_characters)
    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        yield from _spread(split.training(number), size, share)


def _spread(texts: Iterable[str], size: int, share: int) -> Iterator[str]:
    """About `share` characters out of `size`, taken whenever enough are due; of a long text, its beginning."""
    passed = taken = 0
    for text in texts:
        passed += len(text)
        due = passed * share // size - taken
        if due >= max(1, min(len(text), _SAMPLE_OF_LONG, share // 2)):
            yield text[:due]
            taken += min(len(text), due)


def _shares(sizes: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by weight, none above its size."""
    shares = [0] * len(sizes)
    unfilled = set(range(len(sizes)))
    while unfilled:
        left = total - sum(shares)
        unit = left / sum(weights[number] for number in unfilled)
        fitting = {number for number in unfilled if sizes[number] <= unit * weights[number]}
        if not fitting:
            for number in unfilled:
                shares[number] = int(unit * weights[number])
            break
        for number in fitting:
            shares[number] = sizes[number]
        unfilled -= fitting
    return shares


def _names(split: Split[Source]) -> list[str]:
    return [source.name for source in split.sources]


def _weights(split: Split[Source]) -> list[float] | None:
    return [source.weight for source in split.sources if source.weight is not None] or None
