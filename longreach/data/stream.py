"""Batches for training as a pure function of (documents, seed, position): to resume is to load the position.

    stream = MixtureStream([code, prose], weights=[3, 1], seed=0)
    batch = stream.next_batch(rows=8, seq_len=4096)          rows and seq_len may differ from one batch to the next
    stream.state_dict()                                       a few numbers; load_state_dict goes on from there

Documents are drawn into a *window*, each time from the source that is furthest behind its weight, so that proportions
hold all along. The window is packed into rows by best fit, and the rows are handed out in an order that spreads the
sources over it. A window ends when it is full, or when every source has come to the end of a pass in it. Memory holds
one window's places, not its tokens: those are read when their row is due.

When seq_len changes, what is left of the window is packed again, so nothing is skipped and nothing comes twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from longreach.data.documents import Documents
from longreach.data.fim import FillInMiddle
from longreach.data.order import Shuffle
from longreach.data.packing import PADDING, PackedRows, Piece, joined, pack, too_short
from longreach.errors import RequestError

WINDOW_TOKENS = 1 << 22


class Batch(NamedTuple):
    """One step's input."""

    tokens: torch.Tensor
    """int64 (B, T); 0 where there is padding."""
    documents: torch.Tensor
    """int64 (B, T): equal numbers in a row belong to one document; -1 is padding, which must be no target."""


class _Drawn(NamedTuple):
    """A document in the window."""

    source: int
    index: int
    rearranged: np.ndarray | None
    """Its ids, where filling in the middle changed them; else they stay where they are."""


class MixtureStream:
    """Endless shuffled batches from several collections of documents.

    With one source every pass predicts each token once, and passes differ in order. A pass never shares a window with
    the next one.

    Args:
        sources: at least one, none empty.
        weights: tokens drawn of each, relative to the others; None: by size, so that passes end together.
        seed: decides every order and every cut.
        fim: moves the middle of some documents to their end; None: of none.
        window_tokens: how far packing and shuffling look ahead; several hundred rows or more.

    Raises:
        RequestError: an empty source, or weights that are not one number above 0 for each.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        fim: FillInMiddle | None = None,
        window_tokens: int = WINDOW_TOKENS,
    ):
        weights = [source.num_tokens for source in sources] if weights is None else weights
        if not sources or not all(source.num_tokens for source in sources):
            raise RequestError("a stream needs sources with tokens in them; one is empty")
        if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
            raise RequestError(f"weights {list(weights)} must be one number above 0 for each of {len(sources)} sources")
        self._sources, self._seed, self._fim, self._window_tokens = sources, seed, fim, window_tokens
        self._weights = [float(weight) for weight in weights]
        self._seek(0, [(0, 0)] * len(sources), [0] * len(sources))

    # ---- batches ----------------------------------------------------------------------------------------------------

    def next_batch(self, rows: int, seq_len: int) -> Batch:
        """The next `rows` rows of `seq_len` tokens.

        Raises:
            RequestError: all data together is shorter than one row.
        """
        if (there := sum(source.num_tokens for source in self._sources)) < seq_len:
            raise too_short(there, seq_len)
        tokens = np.zeros((rows, seq_len), dtype=np.int64)
        documents = np.full((rows, seq_len), PADDING, dtype=np.int64)
        pieces = np.zeros(rows, dtype=np.int64)
        for row in range(rows):
            at = 0
            for number, piece in enumerate(self._next_row(seq_len)):
                stop = at + piece.stop - piece.start
                tokens[row, at:stop] = self._read(piece)
                documents[row, at:stop] = number
                at = stop
            pieces[row] = documents[row].max()
        # Rows of one document stand together: the model attends over neighbours of equal extent in one go.
        order = pieces.argsort(kind="stable")
        tokens, documents = tokens[order], documents[order]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(documents))

    @property
    def passes(self) -> list[float]:
        """How often each source has been gone through, counting the whole of the window in use."""
        return [drawn / source.num_tokens for drawn, source in zip(self._drawn_tokens, self._sources, strict=True)]

    def rows_per_pass(self, seq_len: int) -> int:
        """Rows until every source has been gone through, from the beginning. Looks at the length of every document."""
        ahead = MixtureStream(
            self._sources, self._weights, seed=self._seed, fim=self._fim, window_tokens=self._window_tokens
        )
        count = 0
        while any(pass_number == 0 for pass_number, _ in ahead._cursors):
            ahead._open_window()
            count += len(pack(ahead._whole, seq_len))
        return count

    # ---- position ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; numbers and strings that JSON can hold."""
        return {
            "stream": self._identity(),
            "window": self._window,
            "cursors": [list(cursor) for cursor in self._start[0]],
            "drawn_tokens": list(self._start[1]),
            "taken": [list(taken) for taken in self._taken],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position: the next batch is the one that followed when it was saved.

        Raises:
            RequestError: it is a position in other data, or in the same data with another seed, weight or window.
        """
        there, here = state["stream"], self._identity()
        for name, value in here.items():
            if there.get(name) != value:
                raise RequestError(f"the data stream has {name} {value} where the run began with {there.get(name)}")
        self._seek(state["window"], [(p, place) for p, place in state["cursors"]], list(state["drawn_tokens"]))
        if state["taken"]:
            self._open_window()
        for seq_len, rows in state["taken"]:
            self._pack(seq_len)
            self._taken[-1][1] = rows

    def _identity(self) -> dict[str, Any]:
        return {
            "data": [source.digest for source in self._sources],
            "weights": self._weights,
            "seed": self._seed,
            "fim_rate": self._fim.rate if self._fim else 0.0,
            "window_tokens": self._window_tokens,
        }

    def _seek(self, window: int, cursors: list[tuple[int, int]], drawn_tokens: list[int]) -> None:
        """Stand before window number `window`."""
        self._window = window
        self._cursors, self._drawn_tokens = cursors, drawn_tokens  # where the next document of each source is
        self._start = list(cursors), list(drawn_tokens)  # the same when the window was opened
        self._drawn: list[_Drawn] = []
        self._whole: list[Piece] = []  # every document of the window
        self._rows: list[list[Piece]] = []
        self._taken: list[list[int]] = []  # [seq_len, rows handed out] for each time the window was packed

    # ---- one window -------------------------------------------------------------------------------------------------

    def _next_row(self, seq_len: int) -> list[Piece]:
        if not self._drawn:
            self._open_window()
        if not self._taken or self._taken[-1][0] != seq_len:
            self._pack(seq_len)
        while self._taken[-1][1] == len(self._rows):
            self._seek(self._window + 1, self._cursors, self._drawn_tokens)
            self._open_window()
            self._pack(seq_len)
        self._taken[-1][1] += 1
        return self._rows[self._taken[-1][1] - 1]

    def _open_window(self) -> None:
        """Draw documents until the window is full or every source has ended a pass in it."""
        drawn: list[_Drawn] = []
        lengths: list[int] = []
        ended: set[int] = set()
        orders = [self._order(source, pass_number) for source, (pass_number, _) in enumerate(self._cursors)]
        tokens = 0
        while tokens < self._window_tokens and len(ended) < len(self._sources):
            source = min(range(len(orders)), key=lambda s: self._drawn_tokens[s] / self._weights[s])
            pass_number, place = self._cursors[source]
            index = orders[source][place]
            ids = self._sources[source][index]
            tokens += len(ids)
            self._drawn_tokens[source] += len(ids)
            rearranged = None
            if self._fim is not None:
                rearranged = self._fim.rearranged(ids, self._seed, source, pass_number, index)
            drawn.append(_Drawn(source, index, rearranged))
            lengths.append(len(ids if rearranged is None else rearranged))
            self._cursors[source] = pass_number, place + 1
            if place + 1 == len(self._sources[source]):
                self._cursors[source] = pass_number + 1, 0
                orders[source] = self._order(source, pass_number + 1)
                ended.add(source)
        self._drawn = drawn
        self._whole = [Piece(number, 0, length) for number, length in enumerate(lengths)]

    def _pack(self, seq_len: int) -> None:
        """Pack what the window still holds."""
        left = [piece for row in self._rows[self._taken[-1][1] :] for piece in row] if self._taken else self._whole
        self._rows = self._spread(pack(joined(left), seq_len))
        self._taken.append([seq_len, 0])

    def _spread(self, rows: list[list[Piece]]) -> list[list[Piece]]:
        """Rows in random order, those of each source (by their first piece) at equal distances from one another."""
        by_source: dict[int, list[list[Piece]]] = {}
        for row in rows:
            by_source.setdefault(self._drawn[row[0].document].source, []).append(row)
        places = []
        for source, own in sorted(by_source.items()):
            order = Shuffle(len(own), self._seed, "rows", self._window, len(self._taken), source)
            places += [((place + 0.5) / len(own), source, own[order[place]]) for place in range(len(own))]
        return [row for _, _, row in sorted(places, key=lambda entry: entry[:2])]

    def _order(self, source: int, pass_number: int) -> Shuffle:
        return Shuffle(len(self._sources[source]), self._seed, "documents", source, pass_number)

    def _read(self, piece: Piece) -> np.ndarray:
        drawn = self._drawn[piece.document]
        ids = self._sources[drawn.source][drawn.index] if drawn.rearranged is None else drawn.rearranged
        return ids[piece.start : piece.stop]


def in_order(
    documents: Documents | Sequence[np.ndarray], seq_len: int, rows_per_batch: int, max_tokens: int
) -> Iterator[Batch]:
    """Batches for validation: the documents as they come, each row once, up to about `max_tokens` tokens.

    No padding: rows are cut from the documents laid end to end. Data shorter than one row becomes one shorter row.
    """
    gathered: list[np.ndarray] = []
    total = 0
    for index in range(len(documents)):
        if total >= max(max_tokens, seq_len):
            break
        gathered.append(documents[index])
        total += len(gathered[-1])
    rows = PackedRows(gathered, min(seq_len, total))
    count = min(len(rows), max(1, max_tokens // seq_len))
    for first in range(0, count, rows_per_batch):
        tokens, owners = rows.take(range(first, min(first + rows_per_batch, count)))
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(owners))
