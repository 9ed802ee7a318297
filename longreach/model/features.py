"""A call taken apart and put together: the columns each pass gets, and the results joined along positions and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.errors import ShapeError
from longreach.ops.index_loss import IndexLoss

KEEP = ("routing", "router_scores", "selection", "streams", "mtp", "index_loss", "index_recall")


@dataclass
class Features:
    """What a pass returns before the head.

    Attributes:
        hidden: `[B, T, D]` after collapse and final norm; `model.head` turns it into logits. Zeros at padding.
        routing: layer → chosen experts, int64 `[B, T, K]`.
        router_scores: layer → affinities, float32 `[B, T, E]`, with gradient.
        selection: CSA layer → chosen entries, int32 `[B, T, k]`, -1 where there were fewer.
        streams: `[B, T, n, D]` before the collapse (`[B, T, D]` with plain residuals).
        mtp: `[B, T, D]` hidden states of the MTP block: position t was told token t+1 and predicts token t+2 through
            `model.head`. The last position has no next token and is meaningless.
        index_loss: CSA layer → loss of its indexer, summed over the queries of all rows and documents. Its gradient
            reaches the indexer alone. It has the recall if that was asked for or attention was dense.
    """

    hidden: Tensor
    routing: dict[int, Tensor] = field(default_factory=dict)
    router_scores: dict[int, Tensor] = field(default_factory=dict)
    selection: dict[int, Tensor] = field(default_factory=dict)
    streams: Tensor | None = None
    mtp: Tensor | None = None
    index_loss: dict[int, IndexLoss] = field(default_factory=dict)


@dataclass
class Part:
    """The columns of a request that one pass handles."""

    tokens: Tensor
    next_tokens: Tensor
    routing: dict[int, Tensor] | None
    selection: dict[int, Tensor] | None
    dense: bool
    keep: tuple[str, ...]


@dataclass
class Request:
    """What a caller asked of a whole call."""

    tokens: Tensor
    routing: Mapping[int, Tensor] | None
    selection: Mapping[int, Tensor] | None
    dense: bool
    keep: tuple[str, ...]
    keep_last: int | None
    lengths: Sequence[int] | None

    def part(self, cols: slice, row: int | None = None, before: int = 0, size: int | None = None) -> Part:
        """Columns `cols`, of one row or all, padded to `size` with `before` places in front."""
        rows = slice(None) if row is None else slice(row, row + 1)

        def cut(t: Tensor, fill: int) -> Tensor:
            piece = t[rows, cols]
            if size is None:
                return piece
            after = size - before - piece.shape[1]
            return F.pad(piece, (0, 0) * (piece.dim() - 2) + (before, after), value=fill)

        following = torch.cat([self.tokens[:, 1:], self.tokens[:, :1]], dim=1) if "mtp" in self.keep else self.tokens
        return Part(
            cut(self.tokens, 0),
            cut(following, 0),
            {layer: cut(t, 0) for layer, t in self.routing.items()} if self.routing is not None else None,
            {layer: cut(t, -1) for layer, t in self.selection.items()} if self.selection is not None else None,
            self.dense,
            self.keep,
        )

    def finish(self, parts: list[Features], T: int) -> Features:
        """Join the passes' results along the positions and keep the last ones asked for."""
        joined = parts[0] if len(parts) == 1 else concat(parts)
        if self.keep_last is None:
            return joined
        if self.lengths is None:
            return Features(joined.hidden[:, max(0, joined.hidden.shape[1] - self.keep_last) :])
        hidden = joined.hidden.new_zeros(len(self.lengths), self.keep_last, joined.hidden.shape[-1])
        rows = []
        for row, n in enumerate(self.lengths):
            last = joined.hidden[row, max(0, n - self.keep_last) : n]
            rows.append(F.pad(last, (0, 0, self.keep_last - last.shape[0], 0)))
        hidden = torch.stack(rows)
        return Features(hidden)


def ordinary(part: Features) -> Features:
    """Tensors a caller may do anything with: those made in inference mode refuse in-place changes and gradients."""
    return Features(
        part.hidden.clone(),
        {k: v.clone() for k, v in part.routing.items()},
        {k: v.clone() for k, v in part.router_scores.items()},
        {k: v.clone() for k, v in part.selection.items()},
        part.streams.clone() if part.streams is not None else None,
        part.mtp.clone() if part.mtp is not None else None,
        {k: v.map(Tensor.clone) for k, v in part.index_loss.items()},
    )


def concat(parts: list[Features], dim: int = 1) -> Features:
    """Join along the positions (`dim` 1) or the rows (0); selections may differ in width and are padded with -1."""

    def layers(name: str, fill: int) -> dict[int, Tensor]:
        keys = sorted({layer for part in parts for layer in getattr(part, name)})
        out = {}
        for layer in keys:
            pieces = [getattr(part, name)[layer] for part in parts]
            width = max(piece.shape[-1] for piece in pieces)
            pieces = [F.pad(piece, (0, width - piece.shape[-1]), value=fill) for piece in pieces]
            out[layer] = torch.cat(pieces, dim=dim)
        return out

    def whole(name: str) -> Tensor | None:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces, dim=dim)

    return Features(
        torch.cat([part.hidden for part in parts], dim=dim),
        layers("routing", 0),
        layers("router_scores", 0),
        layers("selection", -1),
        whole("streams"),
        whole("mtp"),
        summed([part.index_loss for part in parts]),
    )


def summed(parts: list[dict[int, IndexLoss]]) -> dict[int, IndexLoss]:
    """Layer by layer."""
    out: dict[int, IndexLoss] = {}
    for part in parts:
        for layer, loss in part.items():
            out[layer] = out[layer] + loss if layer in out else loss
    return out


def cut(part: Features, cols: slice) -> Features:
    """Only these columns. The index loss never had others: it is of real tokens."""
    return Features(
        part.hidden[:, cols],
        {k: v[:, cols] for k, v in part.routing.items()},
        {k: v[:, cols] for k, v in part.router_scores.items()},
        {k: v[:, cols] for k, v in part.selection.items()},
        part.streams[:, cols] if part.streams is not None else None,
        part.mtp[:, cols] if part.mtp is not None else None,
        part.index_loss,
    )


def trim(parts: list[Features], keep_last: int) -> list[Features]:
    """Drop what is not among the last `keep_last` positions, so that a long prefill does not pile up hidden states."""
    hidden = torch.cat([part.hidden for part in parts], dim=1)
    return [Features(hidden[:, max(0, hidden.shape[1] - keep_last) :].clone())]


def join_rows(rows: list[list[tuple[int, Features]]], T: int) -> Features:
    """Rows of pieces (column, features) to one batch, zeros where there is no piece (padding)."""
    lines = []
    sample = next(part for row in rows for _, part in row)
    for row in rows:
        pieces, at = [], 0
        for start, part in row:
            if start > at:
                pieces.append(_blank(sample, start - at))
            pieces.append(part)
            at = start + part.hidden.shape[1]
        if at < T:
            pieces.append(_blank(sample, T - at))
        lines.append(concat(pieces))
    return lines[0] if len(lines) == 1 else concat(lines, dim=0)


def _blank(sample: Features, count: int) -> Features:
    def zeros(t: Tensor, fill: int = 0) -> Tensor:
        return t.new_full((1, count, *t.shape[2:]), fill)

    return Features(
        zeros(sample.hidden),
        {k: zeros(v) for k, v in sample.routing.items()},
        {k: zeros(v) for k, v in sample.router_scores.items()},
        {k: zeros(v, -1) for k, v in sample.selection.items()},
        zeros(sample.streams) if sample.streams is not None else None,
        zeros(sample.mtp) if sample.mtp is not None else None,
    )


def document_runs(
    tokens: Tensor, documents: Tensor | None, positions: Tensor | None, lengths: Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every document in the batch."""
    B, T = tokens.shape
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 0] = True
    if documents is not None:
        if documents.shape != tokens.shape:
            raise ShapeError(f"documents have shape {tuple(documents.shape)} but tokens {tuple(tokens.shape)}")
        ids = documents.cpu()
        starts[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    if positions is not None:
        if positions.shape not in ((T,), (B, T), (1, T)):
            raise ShapeError(f"positions have shape {tuple(positions.shape)}; give [{T}] or [{B}, {T}]")
        p = positions.cpu().expand(B, T)
        marked = p == 0
        if documents is None:
            starts |= marked
        counts = torch.arange(T).expand(B, T)
        begin = torch.where(starts, counts, 0).cummax(dim=1).values
        if not torch.equal(p, counts - begin):
            raise ShapeError(
                "positions must start at 0 and count up by one inside each document, which is what the model computes "
                "from documents; leave positions out or give documents that agree with them"
            )
    runs = []
    for row in range(B):
        end = T if lengths is None else lengths[row]
        edges = [*starts[row, :end].nonzero().flatten().tolist(), end]
        runs += [(row, a, b) for a, b in pairwise(edges)]
    return runs


def side_by_side(runs: list[tuple[int, int, int]]) -> list[tuple[tuple[int, int], int, int]]:
    """Documents that fill the same columns of neighbouring rows, together: ((first row, row after), start, stop)."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, start, stop in runs:
        blocks = found.setdefault((start, stop), [])
        if blocks and blocks[-1][1] == row:
            blocks[-1] = blocks[-1][0], row + 1
        else:
            blocks.append((row, row + 1))
    return [(rows, start, stop) for (start, stop), blocks in found.items() for rows in blocks]
