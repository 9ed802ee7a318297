"""The lightning indexer of a CSA layer: which compressed entries each query attends to.

    q = rotate(rope(qr wq_b));  k = rotate(rope(norm(compressed x)));  w = x weights_proj / sqrt(heads · width)
    I[t, s] = Σ_h w_h relu(q_h · k_s);   the query keeps its `index_topk` best visible entries, ties to the lowest index

`rotate` is the Hadamard rotation and the 4-bit rounding of the released code (`numerics="official"`); without rounding the
rotation changes nothing and is left out. Selection carries no gradient, and the loss that teaches it (`ops.index_loss`)
ends at the indexer's own weights: its inputs are cut off. Source: DeepSeek-V4 report, equations 13 to 17.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longreach.model.compressor import Compressor
from longreach.model.config import ModelConfig
from longreach.model.layers import Linear
from longreach.model.passing import Pass, Span
from longreach.model.stores import INDEX_BLOCK, GraphPool, LayerStore
from longreach.ops.index import select_over_blocks
from longreach.ops.quant import fp4_roundtrip, hadamard
from longreach.ops.rope import apply_rope

TILE_SCORES = 1 << 21
"""Query-head × key products per tile (8 MiB in float32: larger pieces scatter over the heap)."""


class Indexer(nn.Module):
    """Index queries, index keys and the selection."""

    def __init__(self, config: ModelConfig, ratio: int, **factory) -> None:
        super().__init__()
        c = self.config = config
        self.ratio = ratio
        rounds = c.numerics == "official" and c.weight_format != "plain"
        self.wq_b = Linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim, rounds_input=rounds, **factory)
        self.weights_proj = Linear(c.hidden_size, c.index_n_heads, **factory)
        self.compressor = Compressor(c, ratio, c.index_head_dim, overlap=True, **factory)
        self.scale = (c.index_head_dim * c.index_n_heads) ** -0.5

    def project(self, x_BTD: Tensor, qr_BTR: Tensor, table: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Index queries `[B, T, heads, width]`, head weights `[B, T, heads]` and raw keys of every token."""
        c = self.config
        x_BTD, qr_BTR = x_BTD.detach(), qr_BTR.detach()
        q = self.wq_b(qr_BTR).view(*qr_BTR.shape[:2], c.index_n_heads, c.index_head_dim)
        q = self.rotate(apply_rope(q, table.unsqueeze(2)))
        weight = self.weights_proj(x_BTD)
        weight = (weight if weight.dtype == torch.float64 else weight.float()) * self.scale
        return {"index_q": q, "index_weight": weight, "index_raw": self.compressor.project(x_BTD, positions)}

    def rotate(self, x: Tensor) -> Tensor:
        """Hadamard rotation and 4-bit rounding, where the released code makes them."""
        return fp4_roundtrip(hadamard(x)) if self.config.numerics == "official" else x

    def extend(self, index_raw: Tensor, span: Span, store: LayerStore, pass_: Pass) -> None:
        """Add the index keys of the blocks this span completes to the layer's store."""
        assert store.index_raw is not None and store.index_entries is not None
        frequencies = pass_.frequencies(compressed=True)
        keys, new = self.compressor.complete(index_raw, span, store.index_raw, frequencies, pass_.invariant)
        if keys.shape[1] or isinstance(store.index_entries, GraphPool):
            store.index_entries.append(self.rotate(keys)[:, new])

    def select(self, q_BTNH: Tensor, weight_BTN: Tensor, span: Span, store: LayerStore) -> Tensor | None:
        """`select_entries` for this layer."""
        return select_entries(q_BTNH, weight_BTN, span, store, self.ratio, self.config.index_topk)


@torch.no_grad()
def select_entries(
    q_BTNH: Tensor, weight_BTN: Tensor, span: Span, store: LayerStore, ratio: int, k: int
) -> Tensor | None:
    """Entries for each query of the span, int64 `[b, t, k]` ascending; None when all visible ones fit.

    Invalid places (fewer than `k` visible entries) hold indices at or beyond the visible count.
    """
    assert store.index_entries is not None
    count = span.stop // ratio
    if count <= k:
        return None
    B, T, N, _ = q_BTNH.shape
    wide = torch.float64 if q_BTNH.dtype == torch.float64 else torch.float32
    size = max(8, min(T, TILE_SCORES // (B * N * min(count, INDEX_BLOCK))))
    positions = torch.arange(span.first, span.stop, device=q_BTNH.device)
    visible = (positions + 1) // ratio
    # Filled in place: a small tensor kept from each tile would sit in the hole its large temporaries leave, and the next
    # tile's would no longer fit there.
    chosen = torch.arange(k, device=q_BTNH.device).expand(B, T, k).contiguous()
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        seen = (span.first + rows.stop) // ratio
        if seen <= k:
            continue
        # A few sizes that recur, not one more key with every tile: the allocator would find no hole that fits and grow.
        quantum = INDEX_BLOCK // 8 if seen > INDEX_BLOCK // 8 else 64
        blocks = (block.to(wide) for block in store.index_entries.blocks(-(-seen // quantum) * quantum))
        chosen[:, rows] = select_over_blocks(
            q_BTNH[:, rows].to(wide), weight_BTN[:, rows].to(wide), blocks, visible[rows], k
        )
    return chosen
