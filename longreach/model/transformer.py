"""The whole model: embedding → blocks on residual streams → collapse, norm → head.

    model = Transformer(ModelConfig.preset("tiny"))
    logits = model(tokens)                               [B, T, V] float32
    cache = model.new_cache(batch_size=1)
    logits = model(tokens, cache, logits_to_keep=1)      continues the cache; any chunking gives the same

One forward serves training, prefill and decoding. Without gradients a long call runs in chunks over its own cache, so
memory beyond the weights is the cache plus one chunk. With `arithmetic="invariant"` a position's bits depend on its own
text alone: compiled functions compute each row by itself (`model.native_pass`), and where they do not apply every call is
cut into tiles of `INVARIANT_TILE` positions aligned to the start of each sequence, one row at a time and padded to full
size, so that the same tile always runs the same operations on the same shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.errors import RequestError, ShapeError
from longreach.model.block import Block
from longreach.model.cache import ContiguousCache
from longreach.model.config import ModelConfig
from longreach.model.decode import NativeStep
from longreach.model.features import (
    KEEP,
    Features,
    Part,
    Request,
    cut,
    document_runs,
    join_rows,
    ordinary,
    side_by_side,
    trim,
)
from longreach.model.hyper_connection import StreamCollapse, expand_streams
from longreach.model.layers import RMSNorm
from longreach.model.mtp import MTPBlock
from longreach.model.native_pass import NativeRows, Run, product, replaced
from longreach.model.paged import Segment
from longreach.model.passing import Pass, Span
from longreach.model.stores import LayerStore, Precision, graph_stores
from longreach.ops.linear import linear

INVARIANT_TILE = 32
"""Positions per tile of the invariant arithmetic where compiled rows do not apply: decoding one token costs a tile."""

CHUNK_VALUES, CHUNK_TOKENS = 1 << 22, 2048
"""Bounds of a chunk of a long pass without gradients: residual-stream values (16 MiB in float32), and tokens."""


class Head(nn.Module):
    """Hidden states to logits, float32."""

    def __init__(self, config: ModelConfig, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))
        self.invariant = config.arithmetic == "invariant"

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., D]` to `[..., V]`."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        x, weight = hidden.to(wide), self.weight.to(wide)
        if not self.invariant:
            return linear(x, weight)
        # Hidden states carry no alignment, so each position is a product of its own: compiled rows are that, and where
        # they do not apply, one call of PyTorch's per position.
        if (rows := product(x, weight)) is not None:
            return replaced(F.linear(x, weight), rows) if torch.is_grad_enabled() else rows
        rows = [F.linear(row.unsqueeze(0), weight) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).view(*x.shape[:-1], -1) if rows else x.new_zeros(*x.shape[:-1], weight.shape[0])


class Transformer(nn.Module):
    """DeepSeek-V4 of any size (or, with `attention="mla"`, the V3.2 baseline).

    Args:
        config: the shape.
        dtype: of the weights that are not always float32 (mHC, sinks, positional biases, router bias).
        device: where; "meta" allocates nothing.
        seed: of the initial weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        c = self.config = config
        factory: dict[str, Any] = dict(dtype=dtype, device=device)
        self.embed = nn.Embedding(
            c.vocab_size, c.hidden_size, _weight=torch.empty(c.vocab_size, c.hidden_size, **factory)
        )
        self.layers = nn.ModuleList(Block(c, i, **factory) for i in range(c.num_hidden_layers))
        self.collapse: nn.Module = (
            StreamCollapse(c.hidden_size, c.hc_mult, eps=c.hc_eps, norm_eps=c.rms_norm_eps, device=device)
            if c.has_streams
            else nn.Identity()
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.head = Head(c, **factory)
        first = c.num_hidden_layers
        self.mtp = nn.ModuleList(MTPBlock(c, first + i, **factory) for i in range(c.num_nextn_predict_layers))
        from longreach.model.init import initialise

        initialise(self, seed)

    # ---- public ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in. The tables of a model with frozen weights may be stored in a narrower one."""
        return cast(RMSNorm, self.norm).weight.dtype

    def new_cache(self, batch_size: int = 1, precision: Precision | None = None) -> ContiguousCache:
        """An empty cache for this model. `precision` None stores in the model's dtype (float32 for wider ones)."""
        if precision is None:
            precision = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        return ContiguousCache(
            self.config, batch_size, precision=precision, device=self.device, dtype=self.dtype
        )  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        cache: ContiguousCache | None = None,
        logits_to_keep: int | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Next-token logits.

        Args:
            tokens: int64 `[B, T]`.
            cache: continue from it and advance it. Such a pass records no gradients.
            logits_to_keep: only the last so many positions of each row; None for all.
            lengths: real tokens per row when `tokens` is padded on the right.

        Returns:
            float32 `[B, T or logits_to_keep, V]`. Rows shorter than `logits_to_keep` have zeros in front.

        Raises:
            ShapeError: tokens are not `[B, T]`, or do not fit the cache's rows.
            RequestError: a token outside the vocabulary, or more tokens than the context holds.
        """
        features = self._run(tokens, cache, lengths=lengths, keep_last=logits_to_keep)
        return self.head(features.hidden)

    def features(
        self,
        tokens: Tensor,
        cache: ContiguousCache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        routing: Mapping[int, Tensor] | None = None,
        selection: Mapping[int, Tensor] | None = None,
        attention: Literal["sparse", "dense"] = "sparse",
        *,
        lengths: Sequence[int] | None = None,
        keep: Collection[str] = ("routing",),
    ) -> Features:
        """Hidden states and what training and engines need besides.

        Args:
            tokens, cache, lengths: as in `forward`.
            positions: int64 `[T]` or `[B, T]`, another way to mark packed documents: a position of 0 starts one.
                Positions must count up by one inside a document; with a cache they must continue it.
            documents: int64 `[B, T]`; a change of id starts a new document. Documents of a row see nothing of each
                other and each counts its positions from 0.
            routing: layer → experts to use instead of the router's choice, int64 `[B, T, K]`.
            selection: CSA layer → entries to attend to instead of the indexer's choice, int `[B, T, k]`, -1 for none.
            attention: "dense" lets CSA layers attend to every visible entry and skips the selection.
            keep: which extras to return, of "routing", "router_scores", "selection", "streams", "mtp", "index_loss" and
                "index_recall" (the index loss with its recall, which in sparse attention costs a dense one).

        Raises:
            ShapeError, RequestError: as in `forward`; also positions, documents or extras that do not fit.
        """
        if attention not in ("sparse", "dense"):
            raise ShapeError(f"attention={attention!r} is neither 'sparse' nor 'dense'")
        if unknown := sorted(set(keep) - set(KEEP)):
            raise ShapeError(f"keep has {unknown[0]!r}; choose among {', '.join(KEEP)}")
        return self._run(
            tokens, cache, positions, documents, routing, selection, attention == "dense", lengths, tuple(keep)
        )

    @torch.inference_mode()
    def extend(self, segments: Sequence[Segment], *, streams: bool = False) -> Features:
        """Continue sequences of an arena by their new tokens, several in one pass.

        Args:
            segments: new tokens of different sequences, at most `chunk_tokens` in all. Their page tables reach as far
                as the tokens do, and no page that is written is read by another sequence.
            streams: also return the residual streams, which the MTP block reads.

        Returns:
            `hidden [1, total, D]`, segment after segment. The sequences' `length`s have advanced.
        """
        tokens = torch.tensor([[t for s in segments for t in s.tokens]], dtype=torch.int64, device=self.device)
        if (rows := self._rows_for(segments)) is not None:
            hidden, after = rows.advance(tokens[0], segments, streams)
            return Features(hidden.unsqueeze(0), streams=after.unsqueeze(0) if after is not None else None)
        keep = ("streams",) if streams else ()
        ask = Request(tokens, None, None, False, keep, None, None)
        bounds = list(pairwise(accumulate((len(s.tokens) for s in segments), initial=0)))
        stores = [segment.sequence.stores() for segment in segments]
        firsts = [segment.sequence.length for segment in segments]
        if self.config.arithmetic == "invariant":
            runs = [(0, a, b, first, held) for (a, b), first, held in zip(bounds, firsts, stores, strict=True)]
            out = self._run_invariant(ask, runs)
        else:
            spans = [
                Span(slice(0, 1), slice(a, b), first, slice(0, b - a), held)
                for (a, b), first, held in zip(bounds, firsts, stores, strict=True)
            ]
            out = self._pass(ask.part(slice(0, tokens.shape[1])), spans)
        for segment, held in zip(segments, stores, strict=True):
            segment.sequence.advance(len(segment.tokens), held)
        return out

    @torch.inference_mode()
    def draft(self, segments: Sequence[Segment], streams: Tensor) -> tuple[Tensor, Tensor]:
        """What the MTP block makes of positions whose successors are known; advances the windows it keeps.

        Args:
            segments: for each sequence the tokens that follow the next positions of its MTP window.
            streams: the main model's streams at those positions `[1, total, n, D]`, or this block's own.

        Returns:
            Hidden states for the head `[1, total, D]`, and the streams after the block.
        """
        tokens = torch.tensor([[t for s in segments for t in s.tokens]], dtype=torch.int64, device=self.device)
        if (rows := self._rows_for(segments, looked=True)) is not None:  # by `extend`, which made the streams
            hidden, after = rows.draft(tokens[0], segments, streams[0])
            return hidden.unsqueeze(0), after.unsqueeze(0)
        bounds = list(pairwise(accumulate((len(s.tokens) for s in segments), initial=0)))
        stores = [segment.sequence.mtp_stores() for segment in segments]
        spans = [
            Span(slice(0, 1), slice(a, b), segment.sequence.extent.mtp_hi, slice(0, b - a), held)
            for (a, b), segment, held in zip(bounds, segments, stores, strict=True)
        ]
        block = cast(MTPBlock, self.mtp[0])
        out = block.continued(streams, self.embed(tokens), Pass(self.config, tokens, spans))
        for segment, held in zip(segments, stores, strict=True):
            segment.sequence.advance_mtp(len(segment.tokens), held)
        return block.read(out), out

    def _rows_for(self, segments: Sequence[Segment], *, looked: bool = False) -> NativeRows | None:
        """The compiled functions for these segments; None where they do not apply."""
        rows = NativeRows.of(self, looked=looked)
        return rows if rows is not None and rows.suits_segments(segments) else None

    # ---- how a call is cut into passes ------------------------------------------------------------------------------

    def _run(
        self,
        tokens: Tensor,
        cache: ContiguousCache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        routing: Mapping[int, Tensor] | None = None,
        selection: Mapping[int, Tensor] | None = None,
        dense: bool = False,
        lengths: Sequence[int] | None = None,
        keep: tuple[str, ...] = (),
        keep_last: int | None = None,
    ) -> Features:
        self._check(tokens, cache, lengths, keep)
        B, T = tokens.shape
        ask = Request(tokens, routing, selection, dense, keep, keep_last, lengths)
        if cache is not None:
            if documents is not None:
                raise ShapeError("documents cannot be given with a cache; a cache holds one document per row")
            self._check_continues(positions, cache, T)
            return self._run_cached(ask, cache)
        runs = document_runs(tokens, documents, positions, lengths)
        if self.config.arithmetic == "invariant":
            return self._run_invariant(ask, [(row, start, stop, 0, None) for row, start, stop in runs])
        whole = all(start == 0 and stop == T for _, start, stop in runs)
        if whole and self.chunk_tokens < T and not torch.is_grad_enabled() and "mtp" not in keep:
            cache = self.new_cache(B, "float32" if self.dtype != torch.bfloat16 else "bfloat16")
            cache.reserve(T)
            return self._run_cached(ask, cache)
        # Module by module even where no gradient is asked for: a short pass without a cache is what hooks are put on.
        spans = [
            Span(slice(*rows), slice(start, stop), 0, slice(0, stop - start), self._graph_stores())
            for rows, start, stop in side_by_side(runs)
        ]
        out = self._pass(ask.part(slice(0, T)), spans)
        return ask.finish([out], T)

    @property
    def chunk_tokens(self) -> int:
        """Tokens a pass without gradients handles at a time."""
        fitting = CHUNK_VALUES // (self.config.num_streams * self.config.hidden_size)
        return min(max(64, fitting // 64 * 64), CHUNK_TOKENS)

    def _graph_stores(self) -> list[LayerStore]:
        return graph_stores(self.config, self.config.num_hidden_layers + self.config.num_nextn_predict_layers)

    def _run_cached(self, ask: Request, cache: ContiguousCache) -> Features:
        with torch.inference_mode():
            out = self._advance(ask, cache)
        return ordinary(out)

    def _advance(self, ask: Request, cache: ContiguousCache) -> Features:
        B, T = ask.tokens.shape
        lengths = list(ask.lengths) if ask.lengths is not None else [T] * B
        if len(set(lengths)) > 1 or self.config.arithmetic == "invariant":
            cache.split_rows()
        if self.config.arithmetic == "invariant":
            rows = enumerate(zip(lengths, cache.groups, strict=True))
            runs: list[Run] = [(row, 0, n, group.length, group.stores) for row, (n, group) in rows if n]
            out = self._run_invariant(ask, runs)
            for n, group in zip(lengths, cache.groups, strict=True):
                group.length += n
            return out
        outputs = []
        for start in range(0, T, self.chunk_tokens):
            stop = min(start + self.chunk_tokens, T)
            spans, row = [], 0
            for group in cache.groups:
                new = min(lengths[row], stop) - start
                if new > 0:
                    rows = slice(row, row + group.batch)
                    spans.append(Span(rows, slice(0, new), group.length, slice(0, new), group.stores))
                    group.length += new
                row += group.batch
            if spans:
                part = ask.part(slice(start, stop))
                outputs.append(self._compiled(part, spans) or self._pass(part, spans))
                if ask.keep_last is not None and ask.lengths is None:
                    outputs = trim(outputs, ask.keep_last)
        return ask.finish(outputs, T)

    def _compiled(self, part: Part, spans: list[Span]) -> Features | None:
        """A pass by compiled functions; None where those do not apply."""
        if (rows := NativeRows.of(self)) is not None and rows.suits_spans(part, spans):
            return rows.decode(part, spans)
        step = NativeStep.of(self) if part.tokens.shape[1] == 1 else None
        return step.advance(part, spans) if step is not None and step.suits(part, spans) else None

    def _run_invariant(self, ask: Request, runs: Sequence[Run]) -> Features:
        """By compiled rows where they apply; else tile by tile over each run."""
        B, T = ask.tokens.shape
        compiled, runs = NativeRows.of(self), list(runs)
        if compiled is not None and runs and all(compiled.suits(stores) for *_, stores in runs):
            has_index_loss = bool({"index_loss", "index_recall"} & set(ask.keep))
            if all(stores is None for *_, stores in runs) and (torch.is_grad_enabled() or has_index_loss):
                return ask.finish([compiled.learn(ask, runs)], T)
            if not has_index_loss:
                return compiled.run(ask, runs)
        rows: list[list[tuple[int, Features]]] = [[] for _ in range(B)]
        for row, start, stop, first, given in runs:
            stores = given if given is not None else self._graph_stores()
            at = start
            while at < stop:
                position = first + at - start
                tile_start = position // INVARIANT_TILE * INVARIANT_TILE
                before = position - tile_start
                count = min(stop - at, INVARIANT_TILE - before)
                part = ask.part(slice(at, at + count), row, before, INVARIANT_TILE)
                real = slice(before, before + count)
                span = Span(slice(0, 1), slice(0, INVARIANT_TILE), tile_start, real, stores)
                rows[row].append((at, cut(self._pass(part, [span]), real)))
                at += count
        return ask.finish([join_rows(rows, T)], T)

    # ---- one pass ---------------------------------------------------------------------------------------------------

    def _pass(self, part: Part, spans: list[Span]) -> Features:
        c = self.config
        pass_ = Pass(
            c,
            part.tokens,
            spans,
            dense=part.dense,
            invariant=c.arithmetic == "invariant",
            routing_in=part.routing,
            selection_in=part.selection,
            wants_routing="routing" in part.keep,
            wants_scores="router_scores" in part.keep,
            wants_selection="selection" in part.keep,
            wants_index_loss="index_loss" in part.keep or "index_recall" in part.keep,
            wants_index_recall="index_recall" in part.keep,
        )
        x = self.embed(part.tokens)
        if c.has_streams:
            x = expand_streams(x, c.hc_mult)
        for block in self.layers:
            x = block(x, pass_)
        out = Features(self.norm(self.collapse(x)))
        if "mtp" in part.keep:
            out.mtp = cast(MTPBlock, self.mtp[0]).draft(x, self.embed(part.next_tokens), pass_)
        if "streams" in part.keep:
            out.streams = x
        out.routing, out.router_scores, out.selection = pass_.routing, pass_.router_scores, pass_.selection
        out.index_loss = pass_.index_loss
        return out

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check(
        self,
        tokens: Tensor,
        cache: ContiguousCache | None,
        lengths: Sequence[int] | None,
        keep: tuple[str, ...],
    ) -> None:
        c = self.config
        if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
            raise ShapeError(f"tokens have shape {tuple(tokens.shape)}; give int64 [batch, length], neither empty")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"tokens are {tokens.dtype}; give int64 token ids")
        B, T = tokens.shape
        if tokens.device.type == "cpu":
            low, high = (int(v) for v in tokens.aminmax())
            if low < 0 or high >= c.vocab_size:
                bad = low if low < 0 else high
                raise RequestError(
                    f"token id {bad} is outside the vocabulary of {c.vocab_size} (0 to {c.vocab_size - 1})"
                )
        before = 0
        if cache is not None:
            if cache.config != c:
                raise ShapeError("this cache was made for a model of another configuration; use model.new_cache()")
            if cache.batch_size != B:
                raise ShapeError(f"tokens have {B} rows but the cache has {cache.batch_size}")
            before = cache.length
        if lengths is not None and (len(lengths) != B or any(not 0 <= n <= T for n in lengths)):
            raise ShapeError(f"lengths {list(lengths)} must be {B} numbers between 0 and {T}")
        longest = before + (max(lengths) if lengths is not None else T)
        if longest > c.max_position_embeddings:
            raise RequestError(
                f"{longest} tokens are more than this model's context of {c.max_position_embeddings}; shorten the prompt"
            )
        layers = range(c.num_hidden_layers + (c.num_nextn_predict_layers if "mtp" in keep else 0))
        if {"index_loss", "index_recall"} & set(keep) and not any(c.layer_kind(i) == "csa" for i in layers):
            raise ShapeError("this model has no CSA layer, so there is no indexer and no index loss to keep")
        if "mtp" in keep and not self.mtp:
            raise ShapeError("this model has no MTP block; make one with num_nextn_predict_layers=1")
        if "mtp" in keep and cache is not None:
            raise ShapeError("MTP states cannot be kept in a pass with a cache: the last token's successor is unknown")

    @staticmethod
    def _check_continues(positions: Tensor | None, cache: ContiguousCache, T: int) -> None:
        if positions is None:
            return
        first = torch.tensor(cache.lengths, device=positions.device)
        expected = first[:, None] + torch.arange(T, device=positions.device)
        if not torch.equal(positions.expand(len(first), T), expected):
            raise ShapeError(f"positions do not continue the cache, which stands at {cache.lengths}; leave them out")
