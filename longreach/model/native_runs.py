"""How runs of tokens become passes of the compiled functions, layer by layer, over stores of any owner.

    for pieces in packed(runs):                          PASS_ROWS tokens at a time
        now = RowPass(bound, tokens, pieces)
        kept = now.layer(layer, stores, answer.wants(layer, now))    one layer over the pass's rows; the stores advance
        answer.put(layer, now, kept)                     what a call returns, filled pass by pass

Here is arranged where each run's rows and stores lie; `model.native_pass` says in which order things happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import addressof
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from longreach.errors import ShapeError
from longreach.model.bind import BoundModel
from longreach.model.features import Features, Request
from longreach.model.paged import PagedPool, slid
from longreach.model.stores import REWIND, FloatCodec, LayerStore, Pool, Recent
from longreach.native.library import LayerWeights, Rows

PASS_ROWS = 256
"""Rows per pass of a long text: enough to read the weights once for many, few enough to stay in the second cache."""

Run = tuple[int, int, int, int, list[LayerStore] | None]
"""Consecutive tokens of one row: (row, start, stop, position of the first, stores; None for new ones)."""

_NO_PIECE = np.zeros(1, dtype=np.int64)
_ENDLESS = 1 << 62


@dataclass
class Held:
    """The stores of one run while its passes go on."""

    stores: list[LayerStore] | None
    length: int
    is_ours: bool


@dataclass
class Piece:
    """Tokens of one run (or of several rows that stand at the same position) in one pass."""

    run: int
    row: int
    start: int
    at: int
    """The pass's row of the first token; row after row, `count` each."""
    batch: int
    count: int
    first: int
    held: Held
    is_last: bool


def packed(runs: list[Run]) -> Iterator[list[Piece]]:
    """The runs' tokens in order, PASS_ROWS at a time."""
    pieces: list[Piece] = []
    room = PASS_ROWS
    for index, (row, start, stop, first, stores) in enumerate(runs):
        held = Held(stores, first + stop - start, stores is None)
        at = start
        while at < stop:
            count = min(stop - at, room)
            done = PASS_ROWS - room
            pieces.append(Piece(index, row, at, done, 1, count, first + at - start, held, at + count == stop))
            at += count
            room -= count
            if not room:
                yield pieces
                pieces, room = [], PASS_ROWS
    if pieces:
        yield pieces


def rounds(count: int) -> Iterator[tuple[int, int]]:
    """(offset, tokens) of the portions in which C puts a segment into the sliding buffers."""
    for offset in range(0, count, REWIND):
        yield offset, min(REWIND, count - offset)


@dataclass
class Wants:
    """What a layer is told and asked in one pass; tensors of the pass's rows."""

    dense: bool = False
    routing_in: Tensor | None = None
    selection_in: Tensor | None = None
    routing: bool = False
    selection: bool = False
    scores: bool = False


@dataclass
class Kept:
    """What came of it."""

    routing: Tensor | None = None
    selection: Tensor | None = None
    scores: Tensor | None = None


class RowPass:
    """The rows of one pass: tokens, positions, rotary tables, streams."""

    def __init__(self, bound: BoundModel, tokens_BT: Tensor, pieces: list[Piece]) -> None:
        T = tokens_BT.shape[1]
        places, positions = [], []
        for piece in pieces:
            steps = np.arange(piece.count)
            for row in range(piece.row, piece.row + piece.batch):
                places.append(row * T + piece.start + steps)
                positions.append(piece.first + steps)
        self.pieces = pieces
        self.index = torch.from_numpy(np.concatenate(places))
        flat = tokens_BT.reshape(-1).to(torch.int64)
        following = torch.where(self.index % T == T - 1, self.index - (T - 1), self.index + 1)
        self.next_tokens = flat[following]  # of a row's last token meaningless, as documented
        native, self.tokens = bound.native, flat[self.index].contiguous()
        native.lr_set_threads(torch.get_num_threads())
        self.bound, self.native, self.M = bound, native, len(self.tokens)
        self.positions = torch.from_numpy(np.concatenate(positions).astype(np.int64, copy=False))
        self.tables = {}
        for compressed, f in bound.frequencies.items():
            table = self.tables[compressed] = torch.empty(self.M, 2 * len(f))
            native.lr_rope_table(f.data_ptr(), len(f), self.positions.data_ptr(), self.M, table.data_ptr())
        embed = cast(Any, bound.model()).embed.weight.detach()
        self.streams = embed.index_select(0, self.tokens).unsqueeze(1).expand(-1, bound.config.hc_mult, -1).contiguous()
        self.args = Rows(M=self.M, token=self.tokens, position=self.positions)
        self.args_at = addressof(self.args)

    def call(self, weights: LayerWeights, segments_at: int, num_segments: int) -> None:
        """One layer over the rows, in place on `streams`."""
        args = self.args
        args.num_segments, args.segments = num_segments, segments_at
        args.streams = self.streams.data_ptr()
        args.table = self.tables[weights.attn.ratio > 1].data_ptr()
        self.native.lr_layer(weights.pointer, self.args_at)

    def _ask(self, weights: LayerWeights, wants: Wants) -> Kept:
        """Tell the next call what it is given and asked; returns where the answers will be."""
        a, e, args, kept = weights.attn, weights.ffn, self.args, Kept()
        args.dense = int(wants.dense)
        args.routing_in = _address(wants.routing_in)
        args.selection_in = _address(wants.selection_in)
        args.selection_width = wants.selection_in.shape[1] if wants.selection_in is not None else 0
        if wants.routing and e.E:
            kept.routing = torch.empty(self.M, e.K, dtype=torch.int64)
        if wants.selection and a.topk:
            kept.selection = torch.empty(self.M, a.topk, dtype=torch.int64)
        if wants.scores and e.E:
            kept.scores = torch.empty(self.M, e.E)
        args.routing, args.selection = _address(kept.routing), _address(kept.selection)
        args.scores = _address(kept.scores)
        return kept

    def layer(self, layer: int, stores: list[list[LayerStore]], wants: Wants) -> Kept:
        """One layer, with the stores of each piece; they advance."""
        weights = self.bound.layers[layer]
        lines, alive = [], []
        for piece, held in zip(self.pieces, stores, strict=True):
            lines += _lines(piece, held[layer], weights.attn.ratio, alive)
        table, kept = np.array(lines, dtype=np.int64), self._ask(weights, wants)
        self.call(weights, table.ctypes.data, len(table))
        for piece, held in zip(self.pieces, stores, strict=True):
            for recent in (held[layer].window, held[layer].raw, held[layer].index_raw):
                if isinstance(recent, Recent):
                    for _, some in rounds(piece.count):
                        recent.lo = slid(recent.lo, recent.hi, some, recent.keep)
                        recent.hi += some
        return kept

    def hidden(self, weights: Any) -> Tensor:
        """Collapsed and normed `[M, D]`."""
        hidden, z = torch.empty(self.M, weights.D), torch.empty(self.M, weights.n)
        self.native.lr_collapse(weights.pointer, self.M, self.streams.data_ptr(), z.data_ptr(), hidden.data_ptr())
        return hidden


class Answer:
    """What a call returns, filled pass by pass."""

    def __init__(self, bound: BoundModel, ask: Request, runs: list[Run]) -> None:
        self.bound, self.ask, self.runs = bound, ask, runs
        B, T = ask.tokens.shape
        c = bound.config
        self.width = T if ask.keep_last is None else ask.keep_last if ask.lengths is not None else min(ask.keep_last, T)
        ends = torch.tensor(list(ask.lengths) if ask.lengths is not None else [T] * B)
        self.ends = ends if ask.keep_last is not None else torch.full((B,), T)
        self.keep = ask.keep if ask.keep_last is None else ()
        self._hidden = torch.zeros(B * self.width, c.hidden_size)
        self._mtp = torch.zeros(B * T, c.hidden_size) if "mtp" in self.keep else None
        self._streams = torch.zeros(B * T, c.hc_mult, c.hidden_size) if "streams" in self.keep else None
        self.routing: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}
        self.selection: dict[int, Tensor] = {}
        for layer, given in (ask.routing or {}).items():
            e = bound.layers[layer].ffn
            if given.shape != (B, T, e.K) or (given.numel() and not 0 <= int(given.min()) <= int(given.max()) < e.E):
                raise ShapeError(
                    f"routing of layer {layer} is {tuple(given.shape)} with experts {int(given.min())} to "
                    f"{int(given.max())}; give int64 [{B}, {T}, {e.K}] of experts 0 to {e.E - 1}"
                )

    def longest(self, layer: int) -> int:
        """Entries seen by the last token of the longest run."""
        ratio = self.bound.layers[layer].attn.ratio
        return max((first + stop - start for _, start, stop, first, _ in self.runs), default=0) // ratio

    def wants(self, layer: int, now: RowPass) -> Wants:
        """What the layer is told and asked for the rows of this pass."""
        ask = self.ask

        def given(what: Any) -> Tensor | None:
            if what is None or layer not in what:
                return None
            return what[layer].flatten(0, 1).index_select(0, now.index).to(torch.int64).contiguous()

        is_csa = self.bound.kinds[layer] == "csa"
        return Wants(
            ask.dense, given(ask.routing), given(ask.selection) if is_csa and not ask.dense else None,
            "routing" in self.keep, "selection" in self.keep and is_csa and not ask.dense, "router_scores" in self.keep,
        )  # fmt: skip

    def put(self, layer: int, now: RowPass, kept: Kept) -> None:
        if kept.routing is not None:
            self._put(self.routing, layer, now, kept.routing, 0)
        if kept.scores is not None:
            self._put(self.scores, layer, now, kept.scores, 0)
        if kept.selection is not None:
            width = min(self.bound.config.index_topk, self.longest(layer))
            self._put(self.selection, layer, now, kept.selection[:, :width].to(torch.int32), -1)

    def _put(self, where: dict[int, Tensor], layer: int, now: RowPass, values: Tensor, fill: int) -> None:
        B, T = self.ask.tokens.shape
        if layer not in where:
            where[layer] = values.new_full((B, T, values.shape[1]), fill)
        where[layer].view(B * T, -1).index_copy_(0, now.index, values)

    def put_hidden(self, now: RowPass, hidden: Tensor) -> None:
        T = self.ask.tokens.shape[1]
        if self.width == T and self.ask.keep_last is None:
            self._hidden.index_copy_(0, now.index, hidden)
            return
        row, col = now.index // T, now.index % T
        place = col - (self.ends[row] - self.width)
        kept = place >= 0
        self._hidden[(row * self.width + place)[kept]] = hidden[kept]

    def put_mtp(self, now: RowPass, hidden: Tensor) -> None:
        if self._mtp is not None:
            self._mtp.index_copy_(0, now.index, hidden)

    def put_streams(self, now: RowPass) -> None:
        if self._streams is not None:
            self._streams.index_copy_(0, now.index, now.streams)

    def features(self) -> Features:
        B, T = self.ask.tokens.shape
        return Features(
            self._hidden.view(B, self.width, -1), self.routing, self.scores, self.selection,
            self._streams.view(B, T, *self._streams.shape[1:]) if self._streams is not None else None,
            self._mtp.view(B, T, -1) if self._mtp is not None else None,
        )  # fmt: skip


# ---- where stores lie ------------------------------------------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def is_plain(part: Any) -> bool:
    """Whether this part of a store is float32 where C can read and write it."""
    if not isinstance(part, (Recent, Pool, PagedPool)) or not isinstance(part.codec, FloatCodec):
        return False
    return part.codec.dtype == part.out_dtype == torch.float32


def _lines(piece: Piece, store: LayerStore, ratio: int, alive: list[Any]) -> list[tuple[int, ...]]:
    """The segments of a piece at one layer, one per row of it. Makes room for the entries it completes."""
    new = (piece.first + piece.count) // ratio - piece.first // ratio if ratio else 0
    for pool in (store.entries, store.index_entries):
        if new and isinstance(pool, (Pool, PagedPool)):
            pool.append(torch.zeros(piece.batch, new, pool.codec.width))  # C writes what belongs there
    held = store.entries.held * ratio if isinstance(store.entries, PagedPool) else 0
    lines = []
    for b in range(piece.batch):
        lines.append((
            piece.at + b * piece.count, piece.count, piece.first, held,
            _row_address(store.window, b), _row_address(store.raw, b), _row_address(store.index_raw, b),
            cast(Any, store.window).lo if store.window is not None else 0,
            cast(Any, store.raw).lo if store.raw is not None else 0,
            *_pieces_of(store.entries, b, alive), *_pieces_of(store.index_entries, b, alive),
        ))  # fmt: skip
    return lines


def _row_address(recent: Any, b: int) -> int:
    return recent.buffer.data_ptr() + 4 * b * recent.buffer.stride(0) if recent is not None else 0


def _pieces_of(pool: Any, b: int, alive: list[Any]) -> tuple[int, int, int, int, int]:
    """(base, step, at, start, size) of C's `Entries`."""
    if pool is None:
        return 0, 0, 0, 0, 0
    if isinstance(pool, PagedPool):
        return pool.pages.data_ptr(), 4 * pool.pages.stride(0), pool.table.data_ptr(), 0, pool.per_page
    tail = pool.tail.data_ptr() + 4 * b * pool.tail.stride(0)
    if not pool.frozen:
        return tail, 0, _NO_PIECE.ctypes.data, 0, _ENDLESS
    at = np.array([*(p.data_ptr() + 4 * b * p.stride(0) for p in pool.frozen), tail], dtype=np.int64)
    start = np.cumsum([0, *(p.shape[1] for p in pool.frozen), 0], dtype=np.int64)
    start[-1] = _ENDLESS
    alive += [at, start]
    return 0, 1, at.ctypes.data, start.ctypes.data, 0
