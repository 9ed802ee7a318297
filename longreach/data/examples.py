"""Examples to learn from, several to a batch: whole ones, kept apart, most of the batch real.

    feed = ExampleFeed([source, …], batch_tokens=2048)
    batch = lay_out(feed.take())                       tokens, slots, which are real, which the model has to produce
    feed.state_dict()                                  how far each source has been gone through: a few numbers

An example is never cut to fill a row, and each is put by best fit where it leaves the least room:

    [bos a a a a a a a eos · · ·]      each example has a slot, here of a multiple of 4 tokens, so that neighbouring rows
    [bos b b b b eos · · bos c c eos]  have theirs in the same columns; · is padding
    [bos d d d eos · · · bos e eos ·]

Attention runs slot by slot, and slots of neighbouring rows with the same columns in one go. That is why padding belongs to
the slot before it: nothing real ever looks at it, and a hundred short examples cost a few runs instead of a hundred. Rows
are as wide as makes positions and runs together cheapest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from longreach.errors import RequestError

GRID = 8
"""Slots are rounded up to this many tokens."""

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Widths of rows that are tried, in lengths of the longest example: wide rows are filled better, narrow ones have fewer
examples to be kept apart."""

RUN_COST = 32
"""What one more run of attention costs, in positions: 4.4 ms against 0.14 ms, with the preset micro on one thread."""

MOST_LEFT_OUT = 1000
"""Examples in a row that a source may leave out before it is declared to have none."""


class Example(NamedTuple):
    """A conversation as the model reads it.

    Attributes:
        tokens: int32 (T,).
        learned: bool (T,): the model has to produce this token.
    """

    tokens: np.ndarray
    learned: np.ndarray


def make_example(tokens: Sequence[int], learned: Sequence[bool]) -> Example:
    return Example(np.asarray(tokens, dtype=np.int32), np.asarray(learned, dtype=bool))


class Fitting(NamedTuple):
    """What becomes of examples that are too long.

    Attributes:
        longest: tokens of one example at most.
        cuts: keep the beginning; otherwise they are left out.
    """

    longest: int
    cuts: bool

    def __call__(self, example: Example) -> Example | None:
        """The example, its beginning, or None if it is left out: also when nothing to learn remains of it."""
        if len(example.tokens) <= self.longest:
            return example
        if not self.cuts or not example.learned[: self.longest].any():
            return None
        return Example(example.tokens[: self.longest], example.learned[: self.longest])


# ---- batches --------------------------------------------------------------------------------------------------------


class ExampleBatch(NamedTuple):
    """One step's input, all `(B, T)`.

    Attributes:
        tokens: int64; 0 where there is padding.
        slots: int64; equal numbers in a row belong to one example and the padding behind it: `documents` to the model.
        real: bool, False at padding.
        learned: bool: the model has to produce this token. The first of a slot never is.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    real: torch.Tensor
    learned: torch.Tensor

    def to(self, device: torch.device) -> ExampleBatch:
        return ExampleBatch(*(part.to(device) for part in self))

    @property
    def longest_slot(self) -> int:
        """Tokens from the beginning of a slot to the last real one, at most: how far attention has to reach."""
        starts = torch.zeros_like(self.real)
        starts[:, 0] = True
        starts[:, 1:] = self.slots[:, 1:] != self.slots[:, :-1]
        columns = torch.arange(self.slots.shape[1], device=self.slots.device).expand_as(self.slots)
        begin = torch.where(starts, columns, 0).cummax(dim=1).values
        return int(((columns - begin + 1) * self.real).max())


def lay_out(examples: Sequence[Example], grid: int = GRID, widths: Sequence[int] = WIDTHS) -> ExampleBatch:
    """Put examples into rows, of the width that costs least.

    Args:
        widths: of rows, in lengths of the longest example.
    """
    assert examples, "a batch needs an example"
    sizes = [-(-len(example.tokens) // grid) * grid for example in examples]
    layouts = {width: _rows(sizes, width) for width in sorted({max(sizes) * width for width in widths})}
    width = min(layouts, key=lambda width: _cost(layouts[width], sizes, width))
    rows = layouts[width]
    shape = len(rows), width
    tokens, slots = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    real, learned = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, places in enumerate(rows):
        at = 0
        for slot, place in enumerate(places):
            stop = at + len(examples[place].tokens)
            tokens[row, at:stop] = examples[place].tokens
            learned[row, at:stop] = examples[place].learned
            real[row, at:stop] = True
            slots[row, at:] = slot  # the last one reaches to the end of the row
            at += sizes[place]
    return ExampleBatch(*map(torch.from_numpy, (tokens, slots, real, learned)))


def _rows(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Best fit, rows of equal columns next to each other."""
    return sorted(_best_fit(sizes, width), key=lambda row: [-sizes[place] for place in row])


def _cost(rows: Sequence[Sequence[int]], sizes: Sequence[int], width: int) -> int:
    """Positions, and for each run of attention as much as it takes beside them."""
    runs, before = 0, set()
    for row in rows:
        starts = [0, *accumulate(sizes[place] for place in row[:-1])]
        columns = set(pairwise([*starts, width]))
        runs += len(columns - before)
        before = columns
    return len(rows) * width + RUN_COST * runs


def _best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Places of `sizes` in rows of `width`, longest first, each where it leaves the least room."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), ascending
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found = bisect_left(rooms, (sizes[place], -1))
        if found < len(rooms):
            room, row = rooms.pop(found)
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(place)
        if room > sizes[place]:
            insort(rooms, (room - sizes[place], row))
    return rows


# ---- where examples come from ---------------------------------------------------------------------------------------


class ExampleSource(Protocol):
    """An endless sequence of examples, each a function of its number.

    Attributes:
        name: for messages.
        identity: names the sequence: two sources with the same identity give the same examples.
        size: examples of one pass; None where there is no such thing.
    """

    name: str
    identity: str

    @property
    def size(self) -> int | None: ...

    def example(self, index: int) -> Example | None:
        """Example number `index`; None where it is left out."""
        ...


class ExampleFeed:
    """Examples for one step after the other, from several sources in proportion.

    The next example comes from the source that is furthest behind its weight, counted in tokens, so proportions hold all
    along; an example that does not fit into the batch begins the next one. No example is skipped or comes twice, however
    often the feed is saved and loaded.

    Args:
        sources: at least one.
        weights: tokens drawn of each, relative to the others.
        batch_tokens: real tokens per step at most; an example longer than that is a batch of its own.
        passes: end when every source with a size has been gone through so often; None: never.
        repeats: a source that has had its passes goes on beside the others; otherwise it waits for them.
    """

    def __init__(self, sources: Sequence[ExampleSource], weights: Sequence[float], *, batch_tokens: int,
                 passes: int | None = None, repeats: bool = True) -> None:  # fmt: skip
        assert sources and len(sources) == len(weights) and all(weight > 0 for weight in weights)
        self.sources, self.weights, self.batch_tokens = list(sources), list(weights), batch_tokens
        self.passes, self.repeats = passes, repeats
        self.indices = [0] * len(sources)
        self.drawn = [0] * len(sources)
        self.left_out = 0
        self._ahead: tuple[int, int, Example] | None = None  # source, index and the example that did not fit

    @property
    def is_over(self) -> bool:
        """Whether the passes are done."""
        limits = self._limits()
        ended = [index >= limit for index, limit in zip(self.indices, limits, strict=True) if limit is not None]
        return bool(ended) and all(ended)

    def take(self) -> list[Example]:
        """The examples of the next step; none once the feed is over.

        Raises:
            RequestError: a source leaves out everything.
        """
        taken: list[Example] = []
        tokens = 0
        while not self.is_over:
            source, example = self._next()
            if example is None:  # what was left out ended the last pass
                break
            if taken and tokens + len(example.tokens) > self.batch_tokens:
                self._ahead = source, self.indices[source], example
                break
            taken.append(example)
            tokens += len(example.tokens)
            self.indices[source] += 1
            self.drawn[source] += len(example.tokens)
        return taken

    def check(self) -> None:
        """See whether every source has an example to give.

        Raises:
            RequestError: one leaves out everything.
        """
        for place, source in enumerate(self.sources):
            if all(source.example(self.indices[place] + ahead) is None for ahead in range(MOST_LEFT_OUT)):
                raise self._too_long(source)

    def count_steps(self) -> int:
        """Steps from here until the feed is over."""
        assert self.passes is not None
        ahead = ExampleFeed(self.sources, self.weights, batch_tokens=self.batch_tokens, passes=self.passes,
                            repeats=self.repeats)  # fmt: skip
        ahead.load_state_dict(self.state_dict())
        steps = 0
        while ahead.take():
            steps += 1
        return steps

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"sources": [source.identity for source in self.sources], "weights": list(self.weights),
                "indices": list(self.indices), "drawn": list(self.drawn), "left_out": self.left_out}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            RequestError: it is a position in other data.
        """
        for source, known in zip(self.sources, state["sources"], strict=True):
            if source.identity != known:
                raise RequestError(f"{source.name} has changed since this run began; a resumed run needs the same")
        self.indices, self.drawn = list(state["indices"]), list(state["drawn"])
        self.left_out = state["left_out"]
        self._ahead = None

    def _limits(self) -> list[int | None]:
        if self.passes is None:
            return [None] * len(self.sources)
        return [source.size * self.passes if source.size is not None else None for source in self.sources]

    def _next(self) -> tuple[int, Example | None]:
        """The source whose turn it is, and its next example that is not left out; None if there is no more."""
        limits, source = self._limits(), 0
        for _ in range(MOST_LEFT_OUT):
            waiting = [
                place
                for place, (index, limit) in enumerate(zip(self.indices, limits, strict=True))
                if self.repeats or limit is None or index < limit
            ]
            if not waiting or self.is_over:
                return 0, None
            source = min(waiting, key=lambda s: self.drawn[s] / self.weights[s])
            if self._ahead is not None and self._ahead[:2] == (source, self.indices[source]):
                example = self._ahead[2]
            else:
                example = self.sources[source].example(self.indices[source])
            if example is not None:
                return source, example
            self.indices[source] += 1
            self.left_out += 1
        raise self._too_long(self.sources[source])

    def _too_long(self, source: ExampleSource) -> RequestError:
        return RequestError(
            f"{MOST_LEFT_OUT} examples of {source.name} in a row are too long; raise --longest or say --too-long cut"
        )
