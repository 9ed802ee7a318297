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
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from longreach.model import native_paged
from longreach.model.bind import BoundModel, is_suited
from longreach.model.features import Features, Part, Request, side_by_side
from longreach.model.hyper_connection import expand_streams
from longreach.model.native_runs import Answer, Held, Piece, RowPass, Run, is_plain, packed
from longreach.model.paged import Segment
from longreach.model.passing import Pass, Span
from longreach.model.stores import LayerStore, Pool, buffer_stores, graph_stores
from longreach.native.library import library

_bound: weakref.WeakKeyDictionary[nn.Module, tuple[int, NativeRows | None]] = weakref.WeakKeyDictionary()
"""Beside the models, not in them: addresses must not travel with a copied or pickled model."""


class NativeRows:
    """A model's weights bound for the compiled functions. Holds no state of any sequence."""

    def __init__(self, model: nn.Module, native: Any) -> None:
        self.bound = BoundModel(model, native)
        self.native, self.config = native, self.bound.config

    @classmethod
    def of(cls, model: nn.Module, *, looked: bool = False) -> NativeRows | None:
        """The rows of this model, made once and again whenever a weight has moved; None where it does not apply.

        Looking at every weight takes a tenth of a millisecond; `looked` says that the caller has just done it.
        """
        address, rows = _bound.get(model, (0, None))
        if rows is not None and (looked or rows.bound.is_current()):
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
        return stores is None or all(is_plain(part) for store in stores for part in store.parts().values())

    @torch.no_grad()
    def run(self, ask: Request, runs: list[Run]) -> Features:
        """Features of every run's tokens, advancing their stores; zeros where no run is."""
        out = Answer(self.bound, ask, runs)
        for pieces in packed(runs):
            stores = [self._stores_for(piece) for piece in pieces]
            now = RowPass(self.bound, ask.tokens, pieces)
            for layer in range(self.bound.num_main):
                kept = now.layer(layer, stores, out.wants(layer, now))
                out.put(layer, now, kept)
            out.put_hidden(now, now.hidden(self.bound.collapse))
            if "mtp" in ask.keep:
                last, now.streams = now.streams, self._told(now.streams, now.next_tokens)
                out.put(
                    self.bound.num_main,
                    now,
                    now.layer(self.bound.num_main, stores, out.wants(self.bound.num_main, now)),
                )
                assert self.bound.mtp_collapse is not None
                out.put_mtp(now, now.hidden(self.bound.mtp_collapse))
                now.streams = last
            out.put_streams(now)
        return out.features()

    def learn(self, ask: Request, runs: list[Run]) -> Features:
        """The features `run` gives, bit for bit, with gradients and with the extras that need them.

        Each layer runs twice: here for the values, and through PyTorch on the same streams, with the same experts and
        entries, for the gradients.
        """
        model, c = cast(Any, self.bound.model()), self.config
        B, T = ask.tokens.shape
        count = len(self.bound.layers)
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
        chosen = Answer(self.bound, own, runs)
        with torch.no_grad():
            passes = [RowPass(self.bound, ask.tokens, pieces) for pieces in packed(runs)]
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
            exact = collapsed(x, self.bound.collapse)
        out = Features(replaced(model.norm(model.collapse(x)), exact))
        if "mtp" in ask.keep:
            following = ask.part(slice(0, T)).next_tokens
            with torch.no_grad():
                first = torch.zeros_like(x).view(B * T, c.hc_mult, -1)
                for now in passes:
                    rows = x.detach().reshape(B * T, c.hc_mult, -1).index_select(0, now.index)
                    first.index_copy_(0, now.index, self._told(rows, now.next_tokens))
                exact = collapsed(values(self.bound.num_main, first.view_as(x)), self.bound.mtp_collapse)
            out.mtp = replaced(model.mtp[0].draft(x, model.embed(following), pass_), exact)
        if "streams" in ask.keep:
            out.streams = x
        out.routing, out.router_scores, out.selection = pass_.routing, pass_.router_scores, pass_.selection
        out.index_loss = pass_.index_loss
        return out

    def _told(self, streams_MnD: Tensor, next_tokens_M: Tensor) -> Tensor:
        """What goes into the MTP block's layer: the streams, told the next tokens (`model.mtp`)."""
        before, tokens, told = streams_MnD.contiguous(), next_tokens_M.contiguous(), torch.empty(streams_MnD.shape)
        at = before.data_ptr(), told.data_ptr()
        self.native.lr_tell(self.bound.network.pointer, len(tokens), tokens.data_ptr(), *at)
        return told

    def _new_stores(self, length: int) -> list[LayerStore]:
        stores = buffer_stores(self.config, len(self.bound.layers), 1, "float32", torch.device("cpu"), torch.float32)
        for layer, store in zip(self.bound.layers, stores, strict=True):
            for pool in (store.entries, store.index_entries):
                if isinstance(pool, Pool):
                    pool.reserve(length // layer.attn.ratio)
        return stores

    def _stores_for(self, piece: Piece) -> list[LayerStore]:
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
            held = Held(span.stores, count, False)
            pieces.append(Piece(len(runs), span.rows.start, span.cols.start, at, batch, count, span.first, held, True))
            at += batch * count
        ask = Request(part.tokens, None, None, part.dense, part.keep, None, None)
        out, now, stores = (
            Answer(self.bound, ask, runs),
            RowPass(self.bound, part.tokens, pieces),
            [span.stores for span in spans],
        )
        for layer in range(self.bound.num_main):
            out.put(layer, now, now.layer(layer, stores, out.wants(layer, now)))
        out.put_hidden(now, now.hidden(self.bound.collapse))
        out.put_streams(now)
        return out.features()

    # ---- an engine's sequences ---------------------------------------------------------------------------------------

    def suits_segments(self, segments: Sequence[Segment]) -> bool:
        """Whether the segments are of one arena that holds plain float32."""
        return native_paged.suits(segments)

    @torch.no_grad()
    def advance(
        self, tokens: Tensor, segments: Sequence[Segment], streams: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`native_paged.advance`, the residual streams only if asked for."""
        hidden, after = native_paged.advance(self.bound, tokens, segments)
        return hidden, after if streams else None

    @torch.no_grad()
    def draft(
        self, tokens: Tensor, segments: Sequence[Segment], streams: Tensor, *, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`native_paged.draft`."""
        return native_paged.draft(self.bound, tokens, segments, streams, last_only=last_only)


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
