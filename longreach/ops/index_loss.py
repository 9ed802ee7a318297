"""What the lightning indexer learns from: the attention its selection stands in for.

    p[t, s]  ∝  Σ_n e^{ℓ[t, n, s]} / Z[t, n],     Z = e^{sink} + Σ window + Σ entries     Σ_s p[t, s] = 1
    loss     =  Σ_t KL( p[t] ‖ softmax_s I[t, s] )                                        s over one set of entries

The teacher p is the joint softmax in use, summed over heads and normalised once, so a head that looks at its window says
little; normalising each head over its entries alone would give it a full voice. The student is a softmax of the index
scores over the same set: every visible entry while attention is dense, the selected ones once it is sparse. Top-k carries
no gradient, so without this loss the indexer does not learn; with it, nothing but the indexer does.

Work goes over the tiles of `ops.attention`. The gradient of a tile, softmax(I) − p, is known as soon as its loss is and is
taken on the spot: neither a tensor of queries × entries nor any tile outlives its turn.
Source: DeepSeek-V3.2 report (the loss; V4's was not published); open trainers agree on the joint normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.ops.attention import (
    EntrySource,
    Layout,
    TensorEntries,
    Tile,
    load_tile,
    tile_weights,
    tiles_of,
    widened,
)
from longreach.ops.index import index_scores_reference, select_top

HIDDEN = -1e30
"""Index score of an entry outside the set. Finite: the student's weight is 0, and its logarithm times 0 is still 0."""


@dataclass(frozen=True)
class Recall:
    """How much of the attention on compressed entries a selection keeps. Sums over queries; add records to join them.

    Only queries that see more entries than are selected count: for the others every selection keeps everything.

    Attributes:
        kept: float scalar, Σ of the selected entries' share of the dense attention on entries.
        chance: float scalar, Σ of selected / visible, what a random choice keeps on average.
        queries: int64 scalar.
    """

    kept: Tensor
    chance: Tensor
    queries: Tensor

    @property
    def mean(self) -> Tensor:
        """Kept share per query, 0 to 1; nan if there were none."""
        return self.kept / self.queries

    @property
    def mean_chance(self) -> Tensor:
        return self.chance / self.queries

    def __add__(self, other: Recall) -> Recall:
        return Recall(self.kept + other.kept, self.chance + other.chance, self.queries + other.queries)

    def map(self, change: Callable[[Tensor], Tensor]) -> Recall:
        return Recall(change(self.kept), change(self.chance), change(self.queries))


@dataclass(frozen=True)
class IndexLoss:
    """Sums over queries; add the records of passes, spans or layers to join them.

    Attributes:
        total: float scalar, nats; its gradient reaches index queries, head weights and keys.
        queries: int64 scalar, those with at least one entry in their set.
        recall: of the indexer's best entries; no queries in it if it was not asked for.
    """

    total: Tensor
    queries: Tensor
    recall: Recall

    @property
    def mean(self) -> Tensor:
        """Nats per query; 0 if there were none."""
        return self.total / self.queries.clamp(min=1)

    def __add__(self, other: IndexLoss) -> IndexLoss:
        return IndexLoss(self.total + other.total, self.queries + other.queries, self.recall + other.recall)

    def map(self, change: Callable[[Tensor], Tensor]) -> IndexLoss:
        return IndexLoss(change(self.total), change(self.queries), self.recall.map(change))


def index_loss(
    q_BTNH: Tensor,
    local_BSH: Tensor,
    entries: EntrySource | None,
    sink_N: Tensor | None,
    layout: Layout,
    index_q_BTNH: Tensor,
    index_weight_BTN: Tensor,
    index_keys: EntrySource | None,
    chosen_BTK: Tensor | None = None,
    *,
    recall_at: int = 0,
) -> IndexLoss:
    """KL divergence of the index scores' softmax from the attention on compressed entries, summed over queries.

    Args:
        q_BTNH, local_BSH, entries, sink_N, layout: what `sparse_attention` was given; the teacher, without gradient.
        index_q_BTNH, index_weight_BTN, index_keys: as in `index_scores`; keys one per entry.
        chosen_BTK: what `sparse_attention` was given. None: attention was dense, and the set is all visible entries.
        recall_at: also measure the recall at this many entries; 0 leaves it out. The recall of `chosen_BTK` costs another
            dense attention, without values; dense, it is that of the best index scores and costs their top-k.

    Returns:
        float32 sums (float64 for float64). Gradients reach the index queries and weights, and keys held in a
        `TensorEntries`.
    """
    keys = index_keys.entries if isinstance(index_keys, TensorEntries) else None
    learners = (index_q_BTNH, index_weight_BTN, *([keys] if keys is not None else []))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in learners)
    with torch.no_grad():
        loss, gradients = _over_tiles(
            q_BTNH, local_BSH, entries, sink_N, layout, index_q_BTNH, index_weight_BTN, index_keys, chosen_BTK,
            0 if chosen_BTK is not None else recall_at, learns,
        )  # fmt: skip
        if chosen_BTK is not None and recall_at:
            recall = attention_recall(q_BTNH, local_BSH, entries, sink_N, layout, chosen_BTK, recall_at)
            loss = IndexLoss(loss.total, loss.queries, recall)
    if not learns:
        return loss
    return IndexLoss(_WithGradients.apply(loss.total, gradients, *learners), loss.queries, loss.recall)  # pyright: ignore


@torch.no_grad()
def attention_recall(
    q_BTNH: Tensor,
    local_BSH: Tensor,
    entries: EntrySource | None,
    sink_N: Tensor | None,
    layout: Layout,
    chosen_BTK: Tensor,
    topk: int,
) -> Recall:
    """Share of the dense attention on compressed entries that falls on chosen ones.

    Dense attention here is the joint softmax over sink, window and every visible entry, summed over heads.

    Args:
        q_BTNH, local_BSH, entries, sink_N, layout: as in `sparse_attention`.
        chosen_BTK: int entry indices, distinct; negative ones and those beyond what the query sees are ignored.
        topk: only queries that see more entries than this count.
    """
    B, T, N, _ = q_BTNH.shape
    recall = _no_recall(q_BTNH)
    sink = _wide_sink(sink_N, q_BTNH)
    for tile in tiles_of(layout, T, B, N, local_BSH.shape[1], None, q_BTNH.device):
        if layout.visible(tile.start, tile.stop)[1] > topk:
            teacher = _teacher(q_BTNH, local_BSH, entries, sink, layout, tile, None)
            recall += _recall(teacher, chosen_BTK[:, tile.start : tile.stop], layout, tile, topk)
    return recall


def index_loss_reference(
    q_BTNH: Tensor,
    local_BSH: Tensor,
    entries_BSH: Tensor,
    sink_N: Tensor | None,
    layout: Layout,
    index_q_BTNH: Tensor,
    index_weight_BTN: Tensor,
    index_keys_BSH: Tensor,
    chosen_BTK: Tensor | None = None,
    *,
    recall_at: int = 0,
) -> IndexLoss:
    """The same with every query × every entry and autograd; quadratic, for tests."""
    B, T, N, _ = q_BTNH.shape
    S = entries_BSH.shape[1]
    t = layout.first_query + torch.arange(T)
    j = layout.first_key + torch.arange(local_BSH.shape[1])
    near = (j[None] <= t[:, None]) & (j[None] > t[:, None] - layout.window) & (j[None] >= 0)
    visible_T = (t + 1) // layout.ratio
    visible = (torch.arange(S) < visible_T[:, None]).expand(B, T, S)
    allowed = visible if chosen_BTK is None else visible & _as_mask(chosen_BTK, S)

    @torch.no_grad()
    def teacher(allowed: Tensor) -> Tensor:
        keys = widened(torch.cat([local_BSH, entries_BSH], dim=1))
        logits = torch.einsum("btnh,bsh->btns", widened(q_BTNH), keys) * layout.scale
        seen = torch.cat([near.expand(B, T, -1), allowed], dim=-1)
        logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
        sink = torch.full((N,), float("-inf")) if sink_N is None else sink_N
        logits = torch.cat([logits, sink.to(logits.dtype).expand(B, T, N)[..., None]], dim=-1)
        mass = logits.softmax(dim=-1)[..., local_BSH.shape[1] : -1].nan_to_num().sum(dim=2)
        return torch.nn.functional.normalize(mass, p=1, dim=-1, eps=torch.finfo(mass.dtype).tiny)

    scores = index_scores_reference(widened(index_q_BTNH), widened(index_weight_BTN), widened(index_keys_BSH))
    taught = allowed.any(dim=-1)
    log_student = scores.masked_fill(~allowed, float("-inf"))[taught].log_softmax(dim=-1)
    p = teacher(allowed)[taught]
    total = torch.where(p > 0, p * (p.log() - log_student), 0).sum()

    recall = _no_recall(q_BTNH)
    measured = visible_T > recall_at
    if recall_at and measured.any():
        ranked = scores.detach().masked_fill(~visible, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
        kept = visible & _as_mask(ranked[..., :recall_at] if chosen_BTK is None else chosen_BTK, S)
        shares = (teacher(visible) * kept).sum(dim=-1)[:, measured]
        chance = (kept.sum(dim=-1) / visible_T)[:, measured]
        recall = Recall(shares.sum(), chance.sum(), torch.tensor(shares.numel()))
    return IndexLoss(total, taught.sum(), recall)


# ---- tile by tile ----------------------------------------------------------------------------------------------------


def _over_tiles(
    q: Tensor,
    local: Tensor,
    entries: EntrySource | None,
    sink: Tensor | None,
    layout: Layout,
    index_q: Tensor,
    index_weight: Tensor,
    index_keys: EntrySource | None,
    chosen: Tensor | None,
    recall_at: int,
    learns: bool,
) -> tuple[IndexLoss, list[Tensor]]:
    """The loss, and if it `learns` the gradients to index queries, weights and keys (if they are in a tensor)."""
    B, T, N, _ = q.shape
    Ni, Hi = index_q.shape[2:]
    wide_sink = _wide_sink(sink, q)
    total = torch.zeros((), dtype=widened(q).dtype, device=q.device)
    queries = torch.zeros((), dtype=torch.int64, device=q.device)
    recall = _no_recall(q)
    d_q = torch.zeros_like(index_q, memory_format=torch.contiguous_format) if learns else None
    d_weight = torch.zeros_like(index_weight, memory_format=torch.contiguous_format) if learns else None
    d_keys = None
    if learns and isinstance(index_keys, TensorEntries):
        held = index_keys.entries
        d_keys = torch.zeros(held.shape, dtype=widened(held).dtype, device=held.device)
    for tile in tiles_of(layout, T, B, max(N, Ni), local.shape[1], chosen, q.device):
        if not tile.gathered and not tile.num_entries:
            continue
        assert index_keys is not None
        t, rows = tile.stop - tile.start, slice(tile.start, tile.stop)
        teacher = _teacher(q, local, entries, wide_sink, layout, tile, chosen)
        weight = widened(index_weight[:, rows])
        # One product per row of a query-and-heads matrix: all heads of the tile share keys read in full, a query's own
        # heads share the ones gathered for it.
        if tile.gathered:
            assert chosen is not None
            keys = widened(index_keys.gather(chosen[:, rows])).flatten(0, 1)
            queries_heads = widened(index_q[:, rows]).reshape(B * t, Ni, Hi)
        else:
            keys = widened(index_keys.read(tile.num_entries))
            queries_heads = widened(index_q[:, rows]).reshape(B, t * Ni, Hi)
        products = torch.bmm(queries_heads, keys.transpose(1, 2)).relu_().view(B * t, Ni, -1)
        scores = torch.bmm(weight.reshape(B * t, 1, Ni), products).view(B, t, -1)
        if tile.entry_bias is None:
            queries += B * t
        else:
            scores += tile.entry_bias.clamp(min=HIDDEN)
            has_any = (tile.entry_bias == 0).any(dim=-1).sum()
            queries += has_any if tile.gathered else B * has_any
        log_student = scores.log_softmax(dim=-1)
        total += (torch.xlogy(teacher, teacher) - teacher * log_student).sum()
        if recall_at and layout.visible(tile.start, tile.stop)[1] > recall_at:
            recall += _recall(teacher, select_top(scores, recall_at), layout, tile, recall_at)
        if d_q is None or d_weight is None:
            continue

        d_scores = log_student.exp_().mul_(teacher.sum(dim=-1, keepdim=True)).sub_(teacher).view(B * t, -1, 1)
        d_weight[:, rows] = torch.bmm(products, d_scores).view(B, t, Ni)
        d_products = (products > 0) * d_scores.transpose(1, 2) * weight.reshape(B * t, Ni, 1)
        d_products = d_products.view(*queries_heads.shape[:2], -1)
        d_q[:, rows] = torch.bmm(d_products, keys).view(B, t, Ni, Hi)
        if d_keys is None:
            continue
        d_tile_keys = torch.bmm(d_products.transpose(1, 2), queries_heads)
        if tile.gathered:
            assert chosen is not None
            S = d_keys.shape[1]
            # Invalid picks carry zero gradient, but they still need a row to land in.
            index = chosen[:, rows].long().clamp(0, S - 1) + torch.arange(0, B * S, S, device=q.device)[:, None, None]
            d_keys.view(B * S, Hi).index_add_(0, index.reshape(-1), d_tile_keys.reshape(-1, Hi))
        else:
            d_keys[:, : tile.num_entries] += d_tile_keys
    gradients = [d for d in (d_q, d_weight, d_keys) if d is not None]
    return IndexLoss(total, queries, recall), gradients


def _teacher(
    q: Tensor,
    local: Tensor,
    entries: EntrySource | None,
    sink: Tensor | None,
    layout: Layout,
    tile: Tile,
    chosen: Tensor | None,
) -> Tensor:
    """Attention on the tile's entries, summed over heads, then to one: `[B, t, E]`. All zero where it underflows."""
    keys, extra = load_tile(tile, local, entries, chosen)
    _, _, far = tile_weights(widened(q[:, tile.start : tile.stop]), keys, extra, sink, tile, layout.scale)
    assert far is not None
    mass = far.sum(dim=2)
    return mass.div_(mass.sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(mass.dtype).tiny))


def _recall(teacher_BtE: Tensor, chosen_BtK: Tensor, layout: Layout, tile: Tile, topk: int) -> Recall:
    """Of the tile's queries that see more than `topk` entries."""
    first = max(0, (topk + 1) * layout.ratio - 1 - layout.first_query - tile.start)
    positions = torch.arange(tile.start + first, tile.stop, device=teacher_BtE.device) + layout.first_query
    visible_t = (positions + 1) // layout.ratio
    teacher, chosen = teacher_BtE[:, first:], chosen_BtK[:, first:].long()
    valid = (chosen >= 0) & (chosen < visible_t[:, None])
    shares = teacher.gather(-1, chosen.clamp(0, teacher.shape[-1] - 1)) * valid
    chance = (valid.sum(dim=-1) / visible_t).to(teacher.dtype)
    return Recall(shares.sum(), chance.sum(), torch.tensor(chance.numel(), device=teacher.device))


def _no_recall(like: Tensor) -> Recall:
    zero = torch.zeros((), dtype=widened(like).dtype, device=like.device)
    return Recall(zero, zero, torch.zeros((), dtype=torch.int64, device=like.device))


def _wide_sink(sink: Tensor | None, q: Tensor) -> Tensor | None:
    return None if sink is None else sink.to(widened(q).dtype)


def _as_mask(chosen_BTK: Tensor, size: int) -> Tensor:
    """Bool `[B, T, size]`; indices outside [0, size) name nothing."""
    inside = torch.where(chosen_BTK < 0, size, chosen_BTK.long()).clamp(max=size)
    mask = torch.zeros(*chosen_BTK.shape[:2], size + 1, dtype=torch.bool)
    return mask.scatter_(-1, inside, True)[..., :size]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already, hung onto the tensors they belong to."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(gradient * upstream for gradient in ctx.saved_tensors)
