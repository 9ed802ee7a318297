"""V4's attention sublayers behind one forward signature: sliding window, CSA, HCA (and dense, for comparison).

    qr = norm(x wq_a);  q = rope(rms(qr wq_b));  kv = round(rope(norm(x wkv)))       one kv vector, key and value of all heads
    o  = sparse_attention(q, window of kv, compressed entries)                        one softmax, per-head sink
    y  = wo_b (wo_a o', group by group),  o' = o rotated back by the query's position

What a layer remembers between calls goes through a `LayerStore`; with the stores of a cache or with differentiable ones
the code is the same. Source: DeepSeek-V4 report, section 2.3; official inference code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from longreach.model.compressor import Compressor, extended
from longreach.model.config import ModelConfig
from longreach.model.indexer import Indexer
from longreach.model.layers import Linear, RMSNorm
from longreach.model.passing import Pass, Span
from longreach.model.stores import Entries, GraphPool, LayerStore
from longreach.ops.attention import Layout, TensorEntries, sparse_attention
from longreach.ops.index_loss import index_loss
from longreach.ops.norm import rms_norm
from longreach.ops.quant import KV_BLOCK, fp8_roundtrip
from longreach.ops.rope import apply_rope


class Attention(nn.Module):
    """The attention of one layer; `config.layer_kind(layer)` decides which parts it has."""

    def __init__(self, config: ModelConfig, layer: int, **factory) -> None:
        super().__init__()
        c = self.config = config
        self.layer, self.kind = layer, config.layer_kind(layer)
        rounds = c.numerics == "official" and c.weight_format != "plain"
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, rounds_input=rounds, **factory)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps, **factory)
        self.wq_b = Linear(c.q_lora_rank, c.num_attention_heads * c.head_dim, rounds_input=rounds, **factory)
        self.wkv = Linear(c.hidden_size, c.head_dim, rounds_input=rounds, **factory)
        self.kv_norm = RMSNorm(c.head_dim, c.rms_norm_eps, **factory)
        # The released code runs wo_a unrounded in BF16 although it is stored in FP8.
        self.wo_a = Linear(c.num_attention_heads * c.head_dim // c.o_groups, c.o_groups * c.o_lora_rank, **factory)
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size, rounds_input=rounds, **factory)
        self.attn_sink = nn.Parameter(
            torch.empty(c.num_attention_heads, dtype=torch.float32, device=factory.get("device"))
        )
        if self.kind in ("csa", "hca"):
            ratio = c.compress_ratios[layer]
            self.compressor = Compressor(c, ratio, c.head_dim, overlap=self.kind == "csa", **factory)
        if self.kind == "csa":
            self.indexer = Indexer(c, c.compress_ratios[layer], **factory)
        self.ratio = {"sliding": 0, "dense": 1}.get(self.kind, c.compress_ratios[layer])

    def forward(self, x_BTD: Tensor, pass_: Pass) -> Tensor:
        c = self.config
        table = pass_.table(self.ratio > 1)
        qr = self.q_norm(self.wq_a(x_BTD))
        q = self.wq_b(qr).view(*qr.shape[:2], c.num_attention_heads, c.head_dim)
        q = rms_norm(q, None, c.rms_norm_eps)
        q = apply_rope(q, table.unsqueeze(2))
        kv = self.round_entries(apply_rope(self.kv_norm(self.wkv(x_BTD)), table))
        parts: dict[str, Tensor] = {"q": q, "kv": kv}
        if self.kind in ("csa", "hca"):
            parts["raw"] = self.compressor.project(x_BTD, pass_.positions)
        if self.uses_indexer(pass_):
            with pass_.index_graph():
                parts |= self.indexer.project(x_BTD, qr, table, pass_.positions)
        out = span_by_span(parts, pass_, self.attend)
        out = apply_rope(out, table.unsqueeze(2), inverse=True)
        return self.project_out(out)

    def uses_indexer(self, pass_: Pass) -> bool:
        """Dense attention needs no indexer, unless it is to learn or a cache keeps its keys for later calls."""
        if self.kind != "csa":
            return False
        caches = not isinstance(pass_.spans[0].stores[self.layer].index_entries, GraphPool)
        return caches or not pass_.dense or pass_.wants_index_loss

    def project_out(self, o_BTNH: Tensor) -> Tensor:
        """Grouped low-rank output: each group of heads to `o_lora_rank`, all groups together to the model width."""
        c = self.config
        B, T = o_BTNH.shape[:2]
        grouped = o_BTNH.reshape(B * T, c.o_groups, -1).transpose(0, 1)
        return self.wo_b(self.wo_a.grouped(grouped).transpose(0, 1).reshape(B, T, -1))

    def round_entries(self, kv: Tensor) -> Tensor:
        """FP8 round-trip of the position-free channels where the released code makes one."""
        return round_entries(self.config, kv)

    def attend(self, parts: dict[str, Tensor], span: Span, pass_: Pass) -> Tensor:
        """Attention of one span's queries, `[b, t, N, H]`; advances the span's stores."""
        c, store = self.config, span.stores[self.layer]
        source, chosen, forced = None, None, False
        local, first_key, window = parts["kv"][:, :0], span.first, 0
        if self.kind == "dense":
            assert store.entries is not None
            store.entries.append(parts["kv"][:, span.real])
            source = entry_source(store, span.stop)
        else:
            window = c.sliding_window
            first_key = span.first - window + 1 if pass_.invariant else max(0, span.first - window + 1)
            assert store.window is not None
            local = extended(store.window, parts["kv"], span, first_key)
        if self.kind in ("csa", "hca"):
            table = pass_.frequencies(compressed=True)
            entries, new = self.compressor.complete(parts["raw"], span, first_of(store.raw), table, pass_.invariant)
            assert store.entries is not None
            if entries.shape[1] or isinstance(store.entries, GraphPool):  # most decoding steps complete no block
                store.entries.append(self.round_entries(entries)[:, new])
            source = entry_source(store, span.stop // self.ratio)
        if "index_raw" in parts:
            with pass_.index_graph():
                self.indexer.extend(parts["index_raw"], span, store, pass_)
            if not pass_.dense:
                forced = (chosen := pass_.selection_for(self.layer, span)) is not None
                if chosen is None:
                    chosen = self.indexer.select(parts["index_q"], parts["index_weight"], span, store)
                self._report_selection(chosen, span, pass_)
        layout = Layout(
            first_query=span.first,
            first_key=first_key,
            window=window,
            ratio=self.ratio if source is not None else 0,
            chosen_limit=0 if forced else c.index_topk,
            scale=c.head_dim**-0.5,
            value_dim=c.head_dim,
        )
        if self.kind == "csa" and pass_.wants_index_loss:
            self._keep_index_loss(parts, local, source, chosen, layout, span, pass_)
        return sparse_attention(parts["q"], local, source, chosen, self.attn_sink, layout)

    def _keep_index_loss(
        self,
        parts: dict[str, Tensor],
        local: Tensor,
        source: Entries | TensorEntries | None,
        chosen: Tensor | None,
        layout: Layout,
        span: Span,
        pass_: Pass,
    ) -> None:
        real = span.real  # an invariant tile's padding and repeated tokens teach nothing
        loss = index_loss(
            parts["q"][:, real],
            local,
            source,
            self.attn_sink,
            replace(layout, first_query=span.real_first),
            parts["index_q"][:, real],
            parts["index_weight"][:, real],
            source_of(span.stores[self.layer].index_entries, span.stop // self.ratio),
            chosen[:, real] if chosen is not None else None,
            # Dense, the recall costs the top-k of scores that are there anyway; sparse, another dense attention.
            recall_at=self.config.index_topk if pass_.dense or pass_.wants_index_recall else 0,
        )
        pass_.keep_index_loss(self.layer, loss)

    def _report_selection(self, chosen: Tensor | None, span: Span, pass_: Pass) -> None:
        if pass_.wants_selection:
            report_selection(self.layer, chosen, self.ratio, self.config.index_topk, span, pass_)


def round_entries(config: ModelConfig, kv: Tensor) -> Tensor:
    """KV entries as the released code keeps them: E4M3 in blocks of 64 except for the rotary channels."""
    if config.numerics != "official" or not config.nope_head_dim:
        return kv
    nope, rotary = kv.split([config.nope_head_dim, config.qk_rope_head_dim], dim=-1)
    return torch.cat([fp8_roundtrip(nope, KV_BLOCK), rotary], dim=-1)


def entry_source(store: LayerStore, nominal: int) -> Entries | TensorEntries | None:
    """The entries a span may read: `nominal` of them, zeros where they are not complete yet. None if there are none."""
    return source_of(store.entries, nominal)


def source_of(pool: Entries | None, nominal: int) -> Entries | TensorEntries | None:
    """`entry_source` for any pool of the layer."""
    if nominal == 0:
        return None
    if isinstance(pool, GraphPool):
        return TensorEntries(pool.read(nominal))
    return pool


def first_of(recent):
    assert recent is not None
    return recent


def report_selection(layer: int, chosen: Tensor | None, ratio: int, topk: int, span: Span, pass_: Pass) -> None:
    """Hand back what each query attended to: `[b, t, k]` entries, -1 where there were fewer."""
    positions = torch.arange(span.first, span.stop, device=pass_.device)
    visible = ((positions + 1) // ratio)[:, None]
    if chosen is None:
        width = min(topk, span.stop // ratio)
        batch = span.rows.stop - span.rows.start
        chosen = torch.arange(width, device=pass_.device).expand(batch, len(positions), width)
    pass_.keep_selection(layer, span, torch.where(chosen < visible, chosen, -1))


def span_by_span(
    parts: dict[str, Tensor], pass_: Pass, attend: Callable[[dict[str, Tensor], Span, Pass], Tensor]
) -> Tensor:
    """`attend` on each span's share of `parts`, all `[B, T, ...]`; tokens of no span (padding) give zeros."""
    if len(pass_.spans) == 1 and parts["q"].shape[:2] == _extent(pass_.spans[0]):
        return attend(parts, pass_.spans[0], pass_)
    pieces: list[tuple[Span, Tensor]] = []
    for span in pass_.spans:
        mine = {name: part[span.rows, span.cols] for name, part in parts.items()}
        pieces.append((span, attend(mine, span, pass_)))
    return assemble(pieces, parts["q"].shape)


def assemble(pieces: list[tuple[Span, Tensor]], shape: torch.Size) -> Tensor:
    """Put the spans' outputs `[b, t, N, H]` where they belong in `[B, T, N, H]`, zeros elsewhere; differentiable."""
    B, T = shape[:2]
    first = pieces[0][1]
    if not (torch.is_grad_enabled() and any(piece.requires_grad for _, piece in pieces)):
        out = first.new_zeros(B, T, *first.shape[2:])
        for span, piece in pieces:
            out[span.rows, span.cols] = piece
        return out
    rows: dict[int, list[tuple[Span, Tensor]]] = {}
    for span, piece in pieces:
        for row in range(span.rows.start, span.rows.stop):
            rows.setdefault(row, []).append((span, piece[row - span.rows.start]))
    out_rows = []
    for row in range(B):
        at, line = 0, []
        for span, piece in sorted(rows.get(row, []), key=lambda pair: pair[0].cols.start):
            if span.cols.start > at:
                line.append(first.new_zeros(span.cols.start - at, *first.shape[2:]))
            line.append(piece)
            at = span.cols.stop
        if at < T:
            line.append(first.new_zeros(T - at, *first.shape[2:]))
        out_rows.append(torch.cat(line))
    return torch.stack(out_rows)


def _extent(span: Span) -> tuple[int, int]:
    return span.rows.stop - span.rows.start, span.cols.stop - span.cols.start
