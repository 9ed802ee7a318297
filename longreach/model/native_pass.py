"""Whole layers through the compiled functions of `native`, for any number of rows: one call per layer and pass.

    rows = NativeRows.of(model)                       None where the model or the machine is not suited
    features = rows.run(ask, runs)                    the invariant arithmetic, with stores or without
    features = rows.learn(ask, runs)                  the same values, with gradients
    hidden, streams = rows.advance(tokens, segments)  an engine's sequences

A row's numbers are computed from that row alone, in an order that does not depend on what else is in the pass
(`native/rows.h`), so the bits of a position depend on its own text: not on chunking, neighbours, caching or threads.
Here only is arranged where each sequence's rows and stores lie. Float32 on a CPU, without the released rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from ctypes import addressof
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from longreach.errors import ShapeError
from longreach.model.bind import are_current, bind_collapse, bind_layer, is_suited, weights
from longreach.model.features import Features, Part, Request, side_by_side
from longreach.model.hyper_connection import expand_streams
from longreach.model.paged import Arena, PagedPool, PagedSequence, Segment, slid
from longreach.model.passing import Pass, Span, frequencies
from longreach.model.stores import REWIND, FloatCodec, LayerStore, Pool, Recent, buffer_stores, graph_stores
from longreach.native.library import SEGMENT_FIELDS, LayerWeights, Rows, library

PASS_ROWS = 256
"""Rows per pass of a long text: enough to read the weights once for many, few enough to stay in the second cache."""

Run = tuple[int, int, int, int, list[LayerStore] | None]
"""Consecutive tokens of one row: (row, start, stop, position of the first, stores; None for new ones)."""

_COLUMN = {name: i for i, name in enumerate(SEGMENT_FIELDS)}
_NO_PIECE = np.zeros(1, dtype=np.int64)
_ENDLESS = 1 << 62

_bound: weakref.WeakKeyDictionary[nn.Module, tuple[int, NativeRows | None]] = weakref.WeakKeyDictionary()
"""Beside the models, not in them: addresses must not travel with a copied or pickled model."""


class NativeRows:
    """A model's weights bound for the compiled functions. Holds no state of any sequence."""

    def __init__(self, model: nn.Module, native: Any) -> None:
        m = cast(Any, model)
        self.native, self.config = native, m.config
        self.model = weakref.ref(m)
        self.watched = weights(model)
        self.layers = [bind_layer(block) for block in (*m.layers, *m.mtp)]
        self.num_main = len(m.layers)
        self.kinds = [self.config.layer_kind(i) for i in range(len(self.layers))]
        self.collapse = bind_collapse(m.collapse, m.norm, self.config)
        self.mtp_collapse = bind_collapse(m.mtp[0].collapse, m.mtp[0].norm, self.config) if m.mtp else None
        self.frequencies = {compressed: frequencies(self.config, compressed) for compressed in (False, True)}
        self.arenas: weakref.WeakKeyDictionary[Arena, _Layout] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module, *, looked: bool = False) -> NativeRows | None:
        """The rows of this model, made once and again whenever a weight has moved; None where it does not apply.

        Looking at every weight takes a tenth of a millisecond; `looked` says that the caller has just done it.
        """
        address, rows = _bound.get(model, (0, None))
        if rows is not None and (looked or are_current(rows.watched)):
            return rows
        now = cast(Any, model).embed.weight.data_ptr()
        if rows is None and address == now:
            return None  # looked at before, and not suited
        native = library()
        suited = native is not None and is_suited(model) and cast(Any, model).config.numerics == "transformers"
        rows = cls(model, native) if suited else None
        _bound[model] = now, rows
        return rows

    # ---- the invariant arithmetic ------------------------------------------------------------------------------------

    @staticmethod
    def suits(stores: list[LayerStore] | None) -> bool:
        """Whether these stores hold plain float32 where C can read and write it."""
        return stores is None or all(_is_plain(part) for store in stores for part in store.parts().values())

    @torch.no_grad()
    def run(self, ask: Request, runs: list[Run]) -> Features:
        """Features of every run's tokens, advancing their stores; zeros where no run is."""
        out = _Answer(self, ask, runs)
        for pieces in packed(runs):
            stores = [self._stores_for(piece) for piece in pieces]
            now = _Pass(self, ask.tokens, pieces)
            for layer in range(self.num_main):
                kept = now.layer(layer, stores, out.wants(layer, now))
                out.put(layer, now, kept)
            out.put_hidden(now, now.hidden(self.collapse))
            if "mtp" in ask.keep:
                last, now.streams = now.streams, self._told(now.streams, now.next_tokens)
                out.put(self.num_main, now, now.layer(self.num_main, stores, out.wants(self.num_main, now)))
                assert self.mtp_collapse is not None
                out.put_mtp(now, now.hidden(self.mtp_collapse))
                now.streams = last
            out.put_streams(now)
        return out.features()

    def learn(self, ask: Request, runs: list[Run]) -> Features:
        """The features `run` gives, bit for bit, with gradients and with the extras that need them.

        Each layer runs twice: here for the values, and through PyTorch on the same streams, with the same experts and
        entries, for the gradients.
        """
        model, c = cast(Any, self.model()), self.config
        B, T = ask.tokens.shape
        count = len(self.layers)
        spans = [
            Span(slice(*rows), slice(start, stop), 0, slice(0, stop - start), graph_stores(c, count))
            for rows, start, stop in side_by_side([run[:3] for run in runs])
        ]
        routing, selection = dict(ask.routing or {}), dict(ask.selection or {})
        pass_ = Pass(
            c, ask.tokens, spans, dense=ask.dense, routing_in=routing, selection_in=selection,
            wants_routing="routing" in ask.keep, wants_scores="router_scores" in ask.keep,
            wants_selection="selection" in ask.keep,
            wants_index_loss="index_loss" in ask.keep or "index_recall" in ask.keep,
            wants_index_recall="index_recall" in ask.keep,
        )  # fmt: skip
        own = Request(ask.tokens, ask.routing, ask.selection, ask.dense, ("routing", "selection"), None, ask.lengths)
        chosen = _Answer(self, own, runs)
        with torch.no_grad():
            passes = [_Pass(self, ask.tokens, pieces) for pieces in packed(runs)]
            stores = [self._new_stores(stop - start) for _, start, stop, _, _ in runs]

        def values(layer: int, streams: Tensor) -> Tensor:
            """Streams after the layer; also notes which experts and entries it chose."""
            after = streams.detach().clone()
            rows = after.view(B * T, c.hc_mult, c.hidden_size)
            for now in passes:
                now.streams = rows.index_select(0, now.index)
                kept = now.layer(layer, [stores[piece.run] for piece in now.pieces], chosen.wants(layer, now))
                chosen.put(layer, now, kept)
                rows.index_copy_(0, now.index, now.streams)
            if layer in chosen.routing:
                routing[layer] = chosen.routing[layer]
            if layer in chosen.selection and chosen.longest(layer) > c.index_topk:
                selection[layer] = chosen.selection[layer]
            return after

        def collapsed(streams: Tensor, weights: Any) -> Tensor:
            hidden = streams.new_zeros(B * T, c.hidden_size)
            rows = streams.detach().reshape(B * T, c.hc_mult, c.hidden_size)
            for now in passes:
                now.streams = rows.index_select(0, now.index)
                hidden.index_copy_(0, now.index, now.hidden(weights))
            return hidden.view(B, T, -1)

        x = expand_streams(model.embed(ask.tokens), c.hc_mult)
        for layer, block in enumerate(model.layers):
            with torch.no_grad():
                exact = values(layer, x)
            x = replaced(block(x, pass_), exact)
        with torch.no_grad():
            exact = collapsed(x, self.collapse)
        out = Features(replaced(model.norm(model.collapse(x)), exact))
        if "mtp" in ask.keep:
            following = ask.part(slice(0, T)).next_tokens
            with torch.no_grad():
                first = torch.zeros_like(x).view(B * T, c.hc_mult, -1)
                for now in passes:
                    rows = x.detach().reshape(B * T, c.hc_mult, -1).index_select(0, now.index)
                    first.index_copy_(0, now.index, self._told(rows, now.next_tokens))
                exact = collapsed(values(self.num_main, first.view_as(x)), self.mtp_collapse)
            out.mtp = replaced(model.mtp[0].draft(x, model.embed(following), pass_), exact)
        if "streams" in ask.keep:
            out.streams = x
        out.routing, out.router_scores, out.selection = pass_.routing, pass_.router_scores, pass_.selection
        out.index_loss = pass_.index_loss
        return out

    def _told(self, streams_MnD: Tensor, next_tokens_M: Tensor) -> Tensor:
        """What goes into the MTP block's layer: the streams, told the next tokens (`model.mtp`)."""
        block = cast(Any, self.model()).mtp[0]
        embedded = cast(Any, self.model()).embed.weight[next_tokens_M]
        e = product(self._normed(embedded, block.enorm), block.e_proj.weight)
        h = product(self._normed(streams_MnD, block.hnorm), block.h_proj.weight)
        assert e is not None and h is not None
        return h + e.unsqueeze(1)

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        D = x.shape[-1]
        self.native.lr_norm(x.data_ptr(), norm.weight.data_ptr(), y.data_ptr(), x.numel() // D, D, norm.eps)
        return y

    def _new_stores(self, length: int) -> list[LayerStore]:
        stores = buffer_stores(self.config, len(self.layers), 1, "float32", torch.device("cpu"), torch.float32)
        for layer, store in zip(self.layers, stores, strict=True):
            for pool in (store.entries, store.index_entries):
                if isinstance(pool, Pool):
                    pool.reserve(length // layer.attn.ratio)
        return stores

    def _stores_for(self, piece: _Piece) -> list[LayerStore]:
        if piece.held.stores is None:
            piece.held.stores = self._new_stores(piece.held.length)
        stores = piece.held.stores
        if piece.is_last and piece.held.is_ours:
            piece.held.stores = None  # the run is over when this pass is
        return stores

    # ---- rows of a cache in the fast arithmetic ----------------------------------------------------------------------

    def suits_spans(self, part: Part, spans: list[Span]) -> bool:
        """Whether a pass of the fast arithmetic asks for nothing but what `decode` gives."""
        covered = sum((s.rows.stop - s.rows.start) * (s.cols.stop - s.cols.start) for s in spans)
        return (
            covered == part.tokens.numel()
            and part.routing is None
            and part.selection is None
            and set(part.keep) <= {"routing", "selection", "router_scores", "streams"}
            and all(self.suits(span.stores) for span in spans)
        )

    def decode(self, part: Part, spans: list[Span]) -> Features:
        """As `Transformer._pass` for rows of a cache, advancing the spans' stores."""
        runs: list[Run] = []
        pieces, at = [], 0
        for span in spans:
            batch, count = span.rows.stop - span.rows.start, span.cols.stop - span.cols.start
            runs += [(row, span.cols.start, span.cols.stop, span.first, span.stores)
                     for row in range(span.rows.start, span.rows.stop)]  # fmt: skip
            held = _Held(span.stores, count, False)
            pieces.append(_Piece(len(runs), span.rows.start, span.cols.start, at, batch, count, span.first, held, True))
            at += batch * count
        ask = Request(part.tokens, None, None, part.dense, part.keep, None, None)
        out, now, stores = _Answer(self, ask, runs), _Pass(self, part.tokens, pieces), [span.stores for span in spans]
        for layer in range(self.num_main):
            out.put(layer, now, now.layer(layer, stores, out.wants(layer, now)))
        out.put_hidden(now, now.hidden(self.collapse))
        out.put_streams(now)
        return out.features()

    # ---- an engine's sequences ---------------------------------------------------------------------------------------

    def suits_segments(self, segments: Sequence[Segment]) -> bool:
        """Whether the segments are of one arena that holds plain float32."""
        arena = segments[0].sequence.arena
        return _is_plain_arena(arena) and all(s.sequence.arena is arena for s in segments)

    @torch.no_grad()
    def advance(
        self, tokens: Tensor, segments: Sequence[Segment], streams: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Continue sequences of an arena by their new tokens, one call per layer for all of them.

        Args:
            tokens: int64 `[total]`, segment after segment.
            segments: of different sequences; page tables reach as far as their tokens do.
            streams: also return the residual streams.

        Returns:
            float32 hidden states `[total, D]` and streams `[total, n, D]`. The sequences have advanced.
        """
        counts = [len(segment.tokens) for segment in segments]
        sequences = [segment.sequence for segment in segments]
        layout = self._layout(sequences[0].arena)
        now = _Pass.of(self, tokens, [sequence.length for sequence in sequences], counts)
        table, kept = layout.segments(sequences, counts)
        at, step = table.ctypes.data, table.strides[0]
        for layer in range(self.num_main):
            now.call(self.layers[layer], at + layer * step, len(segments))
        del kept
        for sequence, count in zip(sequences, counts, strict=True):
            for _, some in rounds(count):  # the buffers slid as often as C slid them
                sequence.advance(some)
        return now.hidden(self.collapse), now.streams if streams else None

    @torch.no_grad()
    def draft(self, tokens: Tensor, segments: Sequence[Segment], streams: Tensor) -> tuple[Tensor, Tensor]:
        """What the MTP block makes of the next positions of its windows; advances those.

        Args:
            tokens: int64 `[total]`, the tokens that follow those positions, segment after segment.
            streams: `[total, n, D]` of the main model at those positions, or this block's own.

        Returns:
            float32 hidden states for the head `[total, D]`, and the streams after the block.
        """
        counts = [len(segment.tokens) for segment in segments]
        sequences = [segment.sequence for segment in segments]
        now = _Pass.of(self, tokens, [sequence.extent.mtp_hi for sequence in sequences], counts)
        now.streams = self._told(streams, now.tokens)
        layout, weights = self._layout(sequences[0].arena), self.layers[self.num_main]
        table = layout.mtp_segments(sequences, counts)
        now.call(weights, table.ctypes.data, len(table))
        for sequence, count in zip(sequences, counts, strict=True):
            extent = sequence.extent
            for _, some in rounds(count):
                extent.mtp_lo = slid(extent.mtp_lo, extent.mtp_hi, some, layout.mtp_keep)
                extent.mtp_hi += some
        assert self.mtp_collapse is not None
        return now.hidden(self.mtp_collapse), now.streams

    def _layout(self, arena: Arena) -> _Layout:
        if (layout := self.arenas.get(arena)) is None:
            layout = self.arenas[arena] = _Layout(arena)
        return layout


# ---- how runs become passes ------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """The stores of one run while its passes go on."""

    stores: list[LayerStore] | None
    length: int
    is_ours: bool


@dataclass
class _Piece:
    """Tokens of one run (or of several rows that stand at the same position) in one pass."""

    run: int
    row: int
    start: int
    at: int
    """The pass's row of the first token; row after row, `count` each."""
    batch: int
    count: int
    first: int
    held: _Held
    is_last: bool


def packed(runs: list[Run]) -> Iterator[list[_Piece]]:
    """The runs' tokens in order, PASS_ROWS at a time."""
    pieces: list[_Piece] = []
    room = PASS_ROWS
    for index, (row, start, stop, first, stores) in enumerate(runs):
        held = _Held(stores, first + stop - start, stores is None)
        at = start
        while at < stop:
            count = min(stop - at, room)
            done = PASS_ROWS - room
            pieces.append(_Piece(index, row, at, done, 1, count, first + at - start, held, at + count == stop))
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
class _Wants:
    """What a layer is told and asked in one pass; tensors of the pass's rows."""

    dense: bool = False
    routing_in: Tensor | None = None
    selection_in: Tensor | None = None
    routing: bool = False
    selection: bool = False
    scores: bool = False


@dataclass
class _Kept:
    routing: Tensor | None = None
    selection: Tensor | None = None
    scores: Tensor | None = None


class _Pass:
    """The rows of one pass: tokens, positions, rotary tables, streams."""

    def __init__(self, rows: NativeRows, tokens_BT: Tensor, pieces: list[_Piece]) -> None:
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
        self._start(rows, flat[self.index], np.concatenate(positions))

    @classmethod
    def of(cls, rows: NativeRows, tokens: Tensor, firsts: list[int], counts: list[int]) -> _Pass:
        """Of an engine's sequences: the position of the first new token, and how many, of each."""
        now = object.__new__(cls)
        starts = np.cumsum([0, *counts[:-1]])
        positions = np.repeat(np.array(firsts, dtype=np.int64) - starts, counts) + np.arange(len(tokens))
        now._start(rows, tokens, positions)
        return now

    def _start(self, rows: NativeRows, tokens: Tensor, positions: np.ndarray) -> None:
        c, native = rows.config, rows.native
        native.lr_set_threads(torch.get_num_threads())
        self.owner, self.native, self.tokens = rows, native, tokens.contiguous()
        self.M = M = len(tokens)
        self.positions = torch.from_numpy(np.ascontiguousarray(positions, dtype=np.int64))
        self.tables = {}
        for compressed, f in rows.frequencies.items():
            table = self.tables[compressed] = torch.empty(M, 2 * len(f))
            native.lr_rope_table(f.data_ptr(), len(f), self.positions.data_ptr(), M, table.data_ptr())
        embed = cast(Any, rows.model()).embed.weight
        self.streams = embed.detach().index_select(0, self.tokens).unsqueeze(1).expand(-1, c.hc_mult, -1).contiguous()
        self.args = Rows(M=M, token=self.tokens, position=self.positions)
        self.args_at = addressof(self.args)

    def call(self, weights: LayerWeights, segments_at: int, num_segments: int) -> None:
        """One layer over the rows, in place on `streams`."""
        args = self.args
        args.num_segments, args.segments = num_segments, segments_at
        args.streams = self.streams.data_ptr()
        args.table = self.tables[weights.attn.ratio > 1].data_ptr()
        self.native.lr_layer(weights.pointer, self.args_at)

    def _ask(self, weights: LayerWeights, wants: _Wants) -> _Kept:
        """Tell the next call what it is given and asked; returns where the answers will be."""
        a, e, args, kept = weights.attn, weights.ffn, self.args, _Kept()
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

    def layer(self, layer: int, stores: list[list[LayerStore]], wants: _Wants) -> _Kept:
        """One layer, with the stores of each piece; they advance."""
        weights = self.owner.layers[layer]
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


class _Answer:
    """What a call returns, filled pass by pass."""

    def __init__(self, rows: NativeRows, ask: Request, runs: list[Run]) -> None:
        self.rows, self.ask, self.runs = rows, ask, runs
        B, T = ask.tokens.shape
        c = rows.config
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
            e = rows.layers[layer].ffn
            if given.shape != (B, T, e.K) or (given.numel() and not 0 <= int(given.min()) <= int(given.max()) < e.E):
                raise ShapeError(
                    f"routing of layer {layer} is {tuple(given.shape)} with experts {int(given.min())} to "
                    f"{int(given.max())}; give int64 [{B}, {T}, {e.K}] of experts 0 to {e.E - 1}"
                )

    def longest(self, layer: int) -> int:
        """Entries seen by the last token of the longest run."""
        ratio = self.rows.layers[layer].attn.ratio
        return max((first + stop - start for _, start, stop, first, _ in self.runs), default=0) // ratio

    def wants(self, layer: int, now: _Pass) -> _Wants:
        """What the layer is told and asked for the rows of this pass."""
        ask = self.ask

        def given(what: Any) -> Tensor | None:
            if what is None or layer not in what:
                return None
            return what[layer].flatten(0, 1).index_select(0, now.index).to(torch.int64).contiguous()

        is_csa = self.rows.kinds[layer] == "csa"
        return _Wants(
            ask.dense, given(ask.routing), given(ask.selection) if is_csa and not ask.dense else None,
            "routing" in self.keep, "selection" in self.keep and is_csa and not ask.dense, "router_scores" in self.keep,
        )  # fmt: skip

    def put(self, layer: int, now: _Pass, kept: _Kept) -> None:
        if kept.routing is not None:
            self._put(self.routing, layer, now, kept.routing, 0)
        if kept.scores is not None:
            self._put(self.scores, layer, now, kept.scores, 0)
        if kept.selection is not None:
            width = min(self.rows.config.index_topk, self.longest(layer))
            self._put(self.selection, layer, now, kept.selection[:, :width].to(torch.int32), -1)

    def _put(self, where: dict[int, Tensor], layer: int, now: _Pass, values: Tensor, fill: int) -> None:
        B, T = self.ask.tokens.shape
        if layer not in where:
            where[layer] = values.new_full((B, T, values.shape[1]), fill)
        where[layer].view(B * T, -1).index_copy_(0, now.index, values)

    def put_hidden(self, now: _Pass, hidden: Tensor) -> None:
        T = self.ask.tokens.shape[1]
        if self.width == T and self.ask.keep_last is None:
            self._hidden.index_copy_(0, now.index, hidden)
            return
        row, col = now.index // T, now.index % T
        place = col - (self.ends[row] - self.width)
        kept = place >= 0
        self._hidden[(row * self.width + place)[kept]] = hidden[kept]

    def put_mtp(self, now: _Pass, hidden: Tensor) -> None:
        if self._mtp is not None:
            self._mtp.index_copy_(0, now.index, hidden)

    def put_streams(self, now: _Pass) -> None:
        if self._streams is not None:
            self._streams.index_copy_(0, now.index, now.streams)

    def features(self) -> Features:
        B, T = self.ask.tokens.shape
        return Features(
            self._hidden.view(B, self.width, -1), self.routing, self.scores, self.selection,
            self._streams.view(B, T, *self._streams.shape[1:]) if self._streams is not None else None,
            self._mtp.view(B, T, -1) if self._mtp is not None else None,
        )  # fmt: skip


class _Replaced(torch.autograd.Function):
    """The second value with the gradient of the first."""

    @staticmethod
    def forward(ctx, differentiable: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def replaced(differentiable: Tensor, exact: Tensor) -> Tensor:
    """`exact`, whose gradient goes to `differentiable`."""
    return _Replaced.apply(differentiable, exact)  # pyright: ignore[reportReturnType]


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x Wᵀ, every row of x by itself and without gradient; None where there is no library or it does not apply."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and weight.is_contiguous()
    if not plain or (native := library()) is None:
        return None
    x = x.detach().contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    native.lr_linear(weight.data_ptr(), x.data_ptr(), y.data_ptr(), x.numel() // weight.shape[1], *weight.shape)
    return y


# ---- where stores lie ------------------------------------------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def _is_plain(part: Any) -> bool:
    if not isinstance(part, (Recent, Pool, PagedPool)) or not isinstance(part.codec, FloatCodec):
        return False
    return part.codec.dtype == part.out_dtype == torch.float32


def _is_plain_arena(arena: Arena) -> bool:
    return arena.precision == "float32" and arena.dtype == torch.float32 and arena.device.type == "cpu"


def _lines(piece: _Piece, store: LayerStore, ratio: int, alive: list[Any]) -> list[tuple[int, ...]]:
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


class _Layout:
    """Where an arena's tensors lie, layer by layer.

    Attributes:
        fixed: `[layers, 1, fields]`, what all sequences share.
        strides: `[layers, 1, 3]`, bytes from slot to slot of window, raw and index_raw.
    """

    def __init__(self, arena: Arena) -> None:
        self.keeps = arena.raw_keeps
        self.fixed = np.zeros((len(arena.layers), 1, len(SEGMENT_FIELDS)), dtype=np.int64)
        self.strides = np.zeros((len(arena.layers), 1, 3), dtype=np.int64)
        self.keep_of = [self.keeps.index(a.needs.raw_keep) if a.needs.raw_keep else 0 for a in arena.layers]
        for i, layer in enumerate(arena.layers):
            line = self.fixed[i, 0]
            for j, (name, part) in enumerate(
                (("window", layer.window), ("raw", layer.raw), ("index_raw", layer.index_raw))
            ):
                if part is not None:
                    line[_COLUMN[name]], self.strides[i, 0, j] = part.data_ptr(), 4 * part.stride(0)
            for name, part in (("", layer.entries), ("index_", layer.index_entries)):
                if part is not None:
                    line[_COLUMN[name + "base"]], line[_COLUMN[name + "step"]] = part.data_ptr(), 4 * part.stride(0)
                    line[_COLUMN[name + "size"]] = part.shape[1]

        self.mtp_window, self.mtp_stride, self.mtp_keep = 0, 0, 0
        if arena.mtp is not None and arena.mtp.window is not None:
            self.mtp_window, self.mtp_stride = arena.mtp.window.data_ptr(), 4 * arena.mtp.window.stride(0)
            self.mtp_keep = arena.mtp.needs.window_keep

    def mtp_segments(self, sequences: list[PagedSequence], counts: list[int]) -> np.ndarray:
        """`[segments, fields]` of the MTP block's layer, which keeps a window and nothing else."""
        table, row = np.zeros((len(sequences), len(SEGMENT_FIELDS)), dtype=np.int64), 0
        for line, sequence, count in zip(table, sequences, counts, strict=True):
            line[:3] = row, count, sequence.extent.mtp_hi
            line[_COLUMN["window"]] = self.mtp_window + sequence.slot * self.mtp_stride
            line[_COLUMN["window_lo"]] = sequence.extent.mtp_lo
            row += count
        return table

    def segments(self, sequences: list[PagedSequence], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """`[layers, segments, fields]`, and what must outlive its use."""
        L, S = len(self.fixed), len(sequences)
        table = np.empty((L, S, len(SEGMENT_FIELDS)), dtype=np.int64)
        table[:] = self.fixed
        pages = np.array([page for sequence in sequences for page in sequence.pages] or [0], dtype=np.int64)
        at, lines = pages.ctypes.data, []
        row = 0
        for sequence, count in zip(sequences, counts, strict=True):
            lines.append((row, count, sequence.length, sequence.held, sequence.extent.window_lo, at, sequence.slot))
            row += count
            at += 8 * len(sequence.pages)
        shared = np.array(lines, dtype=np.int64)
        table[:, :, 0:4] = shared[:, 0:4]
        table[:, :, _COLUMN["window_lo"]] = shared[:, 4]
        table[:, :, _COLUMN["at"]] = table[:, :, _COLUMN["index_at"]] = shared[:, 5]
        table[:, :, 4:7] += shared[:, 6][:, None] * self.strides
        if self.keeps:
            lo = np.array([[s.extent.raw_lo[keep] for s in sequences] for keep in self.keeps], dtype=np.int64)
            table[:, :, _COLUMN["raw_lo"]] = lo[self.keep_of]
        return table, pages
