"""Documents into rows of equal length: best fit for training, end to end for validation.

Best fit (`pack`) cuts only what has to be cut. A document longer than a row becomes full rows and a rest; rests and short
documents, longest first, each go where they leave the least room; what room is left is padding.

      document 0 (9 tokens)          document 1    document 2         rows of 6
    [bos a b c d e f g eos]         [bos h eos]   [bos i eos]

    [bos a b c d e]  [e f g eos · ·]  [bos h eos bos i eos]           · is padding
      0  0 0 0 0 0    0 0 0  0 -1 -1    0  0  0   1  1  1             `documents`

The rest begins with the last token of the row before, so that each token is predicted exactly once per pass. `documents`
keeps neighbours in a row apart: attention stays inside a document and no target crosses into the next one. V4 trains this
way (V3 let packed documents see each other); best fit is from "Fewer Truncations Improve Language Modeling" (2024).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from longreach.errors import RequestError

PADDING = -1
"""Stands in `documents` where a row holds no token."""
FILL_ABOVE = 1 / 16
"""A row with more room than this share is filled with a piece cut off another document.

Otherwise documents of, say, 0.6 rows each would leave 40 % of every row empty."""


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


def pack(pieces: Iterable[Piece], seq_len: int) -> list[list[Piece]]:
    """Rows of at most `seq_len` tokens that hold every target of `pieces` exactly once, in O(n log n).

    Full rows come first. A piece that is cut continues with the last token of its first part, which is context there.
    """
    full, rests = [], []
    for document, start, stop in pieces:
        while stop - start > seq_len:
            full.append([Piece(document, start, start + seq_len)])
            start += seq_len - 1
        if stop > start:
            rests.append(Piece(document, start, stop))
    rests.sort(key=lambda piece: piece.start - piece.stop)  # longest first; the sort is stable

    rows: list[list[Piece]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, ascending
    for piece in rests:
        size = piece.stop - piece.start
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        rows[row].append(piece)
        if room > size:
            if room - size not in rows_with_room:
                insort(rooms, room - size)
            rows_with_room.setdefault(room - size, []).append(row)
    return full + _filled(rows, seq_len)


def _filled(rows: list[list[Piece]], seq_len: int) -> list[list[Piece]]:
    """Empty the emptiest rows into the room that others have, as long as some have more than FILL_ABOVE."""
    allowed = max(1, int(seq_len * FILL_ABOVE))
    room = [seq_len - sum(piece.stop - piece.start for piece in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: -room[row])
    giving, taking = 0, len(order) - 1
    while giving < taking:
        donor, receiver = order[giving], order[taking]
        if room[receiver] <= allowed:
            taking -= 1
        elif not rows[donor]:
            giving += 1
        else:
            document, start, stop = rows[donor].pop()
            cut = min(stop, start + room[receiver])
            rows[receiver].append(Piece(document, start, cut))
            room[receiver] -= cut - start
            if cut < stop:
                rows[donor].append(Piece(document, cut - 1, stop))
    return [row for row in rows if row]


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces in document order, those that continue one another made one again."""
    whole: list[Piece] = []
    for piece in sorted(pieces):
        if whole and piece.document == whole[-1].document and piece.start == whole[-1].stop - 1:
            whole[-1] = whole[-1]._replace(stop=piece.stop)
        else:
            whole.append(piece)
    return whole


class PackingFigures(NamedTuple):
    """How well rows are used."""

    padding: float
    """Share of positions that hold no token."""
    cut: float
    """Share of the documents that would fit in a row and were cut all the same."""


def packing_figures(rows: Sequence[Sequence[Piece]], lengths: Sequence[int], seq_len: int) -> PackingFigures:
    """Figures of `rows` made from whole documents of these `lengths`."""
    held = sum(piece.stop - piece.start for row in rows for piece in row)
    parts = np.bincount([piece.document for row in rows for piece in row], minlength=len(lengths))
    short = np.asarray(lengths) <= seq_len
    return PackingFigures(1 - held / (len(rows) * seq_len), float((parts[short] > 1).mean()) if short.any() else 0.0)


class PackedRows:
    """Rows of `seq_len` tokens cut from documents laid end to end in the given order; each starts with the last token of
    the row before.

    The last tokens, too few for a row, are left out. Nothing is copied until a row is asked for.
    """

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int):
        self.seq_len = seq_len
        self._tokens = np.concatenate(documents)
        self._document_of = np.repeat(np.arange(len(documents), dtype=np.int32), [len(d) for d in documents])
        if len(self._tokens) < seq_len:
            raise too_short(len(self._tokens), seq_len)

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // (self.seq_len - 1)

    def take(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, documents) of these rows, both int64 (len(rows), seq_len)."""
        index = np.asarray(rows, dtype=np.int64)[:, None] * (self.seq_len - 1) + np.arange(self.seq_len)
        return self._tokens[index].astype(np.int64), self._document_of[index].astype(np.int64)


def too_short(tokens: int, seq_len: int) -> RequestError:
    """The error of data that does not fill one row."""
    return RequestError(
        f"the data holds {tokens} tokens, fewer than one row of {seq_len}; give more text or a lower --seq-len"
    )
