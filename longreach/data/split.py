"""Which documents are held out for validation: those whose text hashes low, about two in a hundred.

    held out  ⇔  hash(text) / 2⁶⁴ ≤ max(share, the lowest hash of all)

A document is on the same side in every run, whatever else the corpus holds, and a copy of it is never on both. The
second term gives a corpus too small for any hash to be low one document to validate on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from longreach.errors import RequestError

SHARE = 0.02

Texts = TypeVar("Texts", bound=Iterable[str])


@dataclass(frozen=True)
class Survey:
    """What one reading of a source found."""

    documents: int
    characters: int
    lowest: float
    """The lowest hash of its documents, from 0 to 1."""
    highest: float


class Split(Generic[Texts]):
    """Sources divided into training and validation texts, one text in memory at a time.

    A source whose documents would all be held out (one of a single document, mostly) keeps them for training except the
    last tenth of the last one.
    """

    def __init__(self, sources: Sequence[Texts], surveys: Sequence[Survey], share: float = SHARE):
        self.sources, self.surveys = sources, surveys
        self.threshold = max(share, min(survey.lowest for survey in surveys))

    @classmethod
    def of(cls, sources: Sequence[Texts], share: float = SHARE) -> Split[Texts]:
        """Read every source once, so that whatever is wrong in it is found before any work is done.

        Raises:
            RequestError: a source holds no text, or cannot be read.
        """
        return cls(sources, [_survey(source) for source in sources], share)

    def training(self, source: int) -> Iterator[str]:
        """The training texts of that source, in its order; never none."""
        if not self._is_divided(source):
            last = self.surveys[source].documents - 1
            texts = iter(self.sources[source])
            yield from islice(texts, last)
            yield _cut(next(texts))[0]
            return
        for text in self.sources[source]:
            if unit_hash(text) > self.threshold:
                yield text

    def validation(self) -> Iterator[str]:
        """The held-out texts of all sources, each text once; never none."""
        # 8 bytes for every held-out document: with 2 % held out, a hundred million documents take about 200 MB.
        seen: set[float] = set()
        for source, texts in enumerate(self.sources):
            if not self._is_divided(source):
                yield _cut(next(islice(texts, self.surveys[source].documents - 1, None)))[1]
                continue
            for text in texts:
                value = unit_hash(text)
                if value <= self.threshold and value not in seen:
                    seen.add(value)
                    yield text

    def _is_divided(self, source: int) -> bool:
        return self.surveys[source].highest > self.threshold


def unit_hash(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _survey(source: Iterable[str]) -> Survey:
    documents = characters = 0
    lowest, highest = 1.0, 0.0
    for text in source:
        value = unit_hash(text)
        documents, characters = documents + 1, characters + len(text)
        lowest, highest = min(lowest, value), max(highest, value)
    if not documents:
        raise RequestError("the data holds no text")
    return Survey(documents, characters, lowest, highest)


def _cut(text: str) -> tuple[str, str]:
    """Its first nine tenths and the rest; a text of one character twice."""
    cut = len(text) - max(1, len(text) // 10)
    return (text[:cut], text[cut:]) if cut else (text, text)
