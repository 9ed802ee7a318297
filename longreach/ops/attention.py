"""Shared-KV attention over a sliding window and compressed entries, one softmax for both, with a per-head sink.

    ℓ_j = q · kv_j · scale            j in the last `window` positions  ∪  the visible (or chosen) compressed entries
    o   = Σ_j  e^{ℓ_j} / (Σ_j' e^{ℓ_j'} + e^{sink})  kv_j

One vector per position is key and value of every head. Work goes tile by tile over the queries: a band of the window,
all compressed entries (HCA) or a gathered few (CSA). No tensor of queries × keys over the whole sequence exists, and no
head's copy of the keys; the backward pass recomputes each tile. Logits and sums are float32.
Source: DeepSeek-V4 report, section 2.3; official inference code for visibility (entry i once its last token is ≤ t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TILE_QUERIES = 64
"""Queries per tile. 64 queries over a window of 128 waste a third of the band and keep a tile's logits in cache."""

TILE_LOGITS = 1 << 23
"""Upper bound on one tile's logits (32 MiB in float32): many heads over many entries shrink the tile instead."""


class EntrySource(Protocol):
    """Compressed entries to read from: a tensor in training, a cache's pool in inference."""

    def read(self, count: int) -> Tensor:
        """The first `count` entries, `[B, count, H]`."""
        ...

    def gather(self, index_BTK: Tensor) -> Tensor:
        """Entries by index, `[B, T, K, H]`; some entry for an index out of range."""
        ...


@dataclass(frozen=True)
class TensorEntries:
    """Entries `[B, S, H]` held in one tensor."""

    entries: Tensor

    def read(self, count: int) -> Tensor:
        return self.entries[:, :count]

    def gather(self, index_BTK: Tensor) -> Tensor:
        return gather_entries(self.entries, index_BTK.clamp(0, self.entries.shape[1] - 1))


def gather_entries(entries_BSH: Tensor, index_BTK: Tensor) -> Tensor:
    """`entries[b, index[b, t, k]]` as `[B, T, K, H]`; index_select, because advanced indexing is five times slower here."""
    B, S, H = entries_BSH.shape
    if B > 1:
        rows = torch.arange(0, B * S, S, device=index_BTK.device, dtype=index_BTK.dtype)
        index_BTK = index_BTK + rows[:, None, None]
    flat = entries_BSH.reshape(B * S, H).index_select(0, index_BTK.reshape(-1))
    return flat.view(*index_BTK.shape, H)


@dataclass(frozen=True)
class Layout:
    """Where queries, window keys and entries stand. Positions count from the start of the sequence.

    Attributes:
        first_query: position of query 0; the others follow.
        first_key: position of local key 0. May be negative when a fixed tile reaches before the start.
        window: positions a query sees of the local keys, itself included; 0 for none.
        ratio: tokens per entry; entry i is visible to position t iff i < (t + 1) // ratio. 0 for no entries.
        chosen_limit: entries per query in the chosen set; tiles that see no more than this read them all instead.
            0: the set is somebody else's, always read as it is, and may name fewer entries than a query sees (-1).
        scale: factor on q · k.
        value_dim: leading channels of a key that are its value.
    """

    first_query: int
    first_key: int
    window: int
    ratio: int
    chosen_limit: int
    scale: float
    value_dim: int

    def visible(self, start: int, stop: int) -> tuple[int, int]:
        """Entries seen by the first and by the last of queries [start, stop)."""
        if not self.ratio:
            return 0, 0
        return (self.first_query + start + 1) // self.ratio, (self.first_query + stop) // self.ratio

    def band(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """Local keys [lo, hi) that any of queries [start, stop) can see."""
        if not self.window:
            return 0, 0
        lo = max(self.first_query + start - self.window + 1 - self.first_key, 0)
        return lo, min(self.first_query + stop - self.first_key, num_keys)


def sparse_attention(
    q_BTNH: Tensor,
    local_BSH: Tensor,
    entries: EntrySource | None,
    chosen_BTK: Tensor | None,
    sink_N: Tensor | None,
    layout: Layout,
) -> Tensor:
    """Attention of every query over its window and its entries.

    Args:
        q_BTNH: rotated queries, any float dtype.
        local_BSH: rotated keys (= values) at consecutive positions from `layout.first_key`.
        entries: compressed entries, or None.
        chosen_BTK: int entry indices, at most `layout.chosen_limit` of them; those beyond what the query can see and
            negative ones are ignored. None: all visible entries.
        sink_N: per-head logit that takes weight and gives nothing, or None.

    Returns:
        `[B, T, N, value_dim]` in the dtype of `q_BTNH`. Gradients reach q, local keys, entries held in a
        `TensorEntries`, and the sink.
    """
    if torch.is_grad_enabled() and isinstance(entries, (TensorEntries, type(None))):
        held = entries.entries if entries is not None else None
        if any(t is not None and t.requires_grad for t in (q_BTNH, local_BSH, held, sink_N)):
            return _SparseAttention.apply(q_BTNH, local_BSH, held, chosen_BTK, sink_N, layout)
    return _forward(q_BTNH, local_BSH, entries, chosen_BTK, sink_N, layout)


def sparse_attention_reference(
    q_BTNH: Tensor,
    local_BSH: Tensor,
    entries_BSH: Tensor | None,
    chosen_BTK: Tensor | None,
    sink_N: Tensor | None,
    layout: Layout,
) -> Tensor:
    """The same with one dense mask over everything; quadratic, for tests."""
    B, T, N, _ = q_BTNH.shape
    t = layout.first_query + torch.arange(T)
    j = layout.first_key + torch.arange(local_BSH.shape[1])
    seen = (j[None] <= t[:, None]) & (j[None] > t[:, None] - layout.window) & (j[None] >= 0)
    seen = seen.expand(B, T, -1)
    keys = local_BSH
    if entries_BSH is not None:
        S = entries_BSH.shape[1]
        visible = torch.arange(S)[None] < ((t + 1) // layout.ratio)[:, None]
        if chosen_BTK is not None:
            picked = torch.zeros(B, T, S + 1, dtype=torch.bool)
            picked.scatter_(-1, torch.where(chosen_BTK < 0, S, chosen_BTK.long()).clamp(max=S), True)
            visible = visible & picked[..., :S]
        seen = torch.cat([seen, visible.expand(B, T, S)], dim=-1)
        keys = torch.cat([keys, entries_BSH], dim=1)
    logits = torch.einsum("btnh,bsh->btns", widened(q_BTNH), widened(keys)) * layout.scale
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    if sink_N is not None:
        logits = torch.cat([sink_N.to(logits.dtype).expand(B, T, N)[..., None], logits], dim=-1)
    weights = logits.softmax(dim=-1)
    if sink_N is not None:
        weights = weights[..., 1:]
    return torch.einsum("btns,bsh->btnh", weights, widened(keys[..., : layout.value_dim])).to(q_BTNH.dtype)


# ---- one tile --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Queries [start, stop) with the keys they see and the biases (0 or -inf, None if nothing is hidden)."""

    start: int
    stop: int
    band: tuple[int, int]
    local_bias: Tensor | None  # [t, L]
    num_entries: int  # read in full, shared by the tile; 0 if none or if gathered
    gathered: bool
    entry_bias: Tensor | None  # [t, E] or [B, t, K]


def tiles_of(layout: Layout, T: int, B: int, N: int, num_keys: int, chosen: Tensor | None, device: torch.device):
    start = 0
    biases: dict[tuple[int, ...], Tensor | None] = {}
    while start < T:
        size = min(TILE_QUERIES, T - start)
        # Entries seen by the tile bound its logits; shrinking the tile shrinks them.
        while size > 8 and B * N * size * (layout.window + size + layout.visible(start, start + size)[1]) > TILE_LOGITS:
            if chosen is not None:
                break
            size //= 2
        stop = start + size
        lo, hi = layout.band(start, stop, num_keys)
        offset = layout.first_query + start - layout.first_key - lo
        before = layout.first_key + lo  # negative: keys before the sequence exist in the tile but not in the text
        shape = (size, hi - lo, offset, min(before, 0))
        if shape not in biases:
            biases[shape] = _window_bias(size, hi - lo, offset, min(before, 0), layout.window, device)
        least, most = layout.visible(start, stop)
        gathered = chosen is not None and most > layout.chosen_limit
        bias = None
        if gathered:
            assert chosen is not None
            picks, limits = chosen[:, start:stop], _visible(layout, start, stop, device)
            invalid = (picks < 0) | (picks >= limits[:, None])
            if device.type != "cpu" or bool(invalid.any()):  # asking a GPU would cost more than adding zeros
                bias = _hidden(invalid)
        elif least < most:
            bias = _hidden(torch.arange(most, device=device) >= _visible(layout, start, stop, device)[:, None])
        yield Tile(start, stop, (lo, hi), biases[shape], 0 if gathered else most, gathered, bias)
        start = stop


def _visible(layout: Layout, start: int, stop: int, device: torch.device) -> Tensor:
    positions = torch.arange(layout.first_query + start, layout.first_query + stop, device=device)
    return (positions + 1) // layout.ratio


def _hidden(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, float("-inf"))


def _window_bias(size: int, keys: int, offset: int, before: int, window: int, device: torch.device) -> Tensor | None:
    if not keys or (size == 1 and keys <= window and before == 0):
        return None
    t = torch.arange(offset, offset + size, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return _hidden((j > t) | (j <= t - window) | (j < -before))


def tile_weights(
    q: Tensor, local: Tensor, extra: Tensor | None, sink: Tensor | None, tile: Tile, scale: float
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Softmax weights of the sink `[B, t, N, 1]`, the window `[B, t, N, L]` and the entries `[B, t, N, E]`."""
    B, t, N, H = q.shape
    parts: list[Tensor] = []
    if sink is not None:
        parts.append(sink.expand(B, t, N).unsqueeze(-1))
    logits = torch.bmm(q.reshape(B, t * N, H), local.transpose(1, 2)).view(B, t, N, -1).mul_(scale)
    if tile.local_bias is not None:
        logits.add_(tile.local_bias[:, None])
    parts.append(logits)
    if extra is not None:
        if extra.dim() == 4:
            logits = torch.bmm(q.reshape(B * t, N, H), extra.flatten(0, 1).transpose(1, 2))
        else:
            logits = torch.bmm(q.reshape(B, t * N, H), extra.transpose(1, 2))
        logits = logits.view(B, t, N, -1).mul_(scale)
        if tile.entry_bias is not None:
            logits.add_(tile.entry_bias.unsqueeze(-2))
        parts.append(logits)
    weights = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).softmax(dim=-1)
    split = weights.split([p.shape[-1] for p in parts], dim=-1)
    own = split[1:] if sink is not None else split
    return (split[0] if sink is not None else None), own[0], (own[1] if extra is not None else None)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Σ_s weights[b, t, n, s] values[b, s] or values[b, t, s]: `[B, t, N, H]`."""
    B, t, N, S = weights.shape
    if values.dim() == 4:
        return torch.bmm(weights.reshape(B * t, N, S), values.flatten(0, 1)).view(B, t, N, -1)
    return torch.bmm(weights.reshape(B, t * N, S), values).view(B, t, N, -1)


def widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def load_tile(
    tile: Tile, local: Tensor, entries: EntrySource | None, chosen: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    keys = widened(local[:, tile.band[0] : tile.band[1]])
    if tile.gathered:
        assert entries is not None and chosen is not None
        return keys, widened(entries.gather(chosen[:, tile.start : tile.stop]))
    if tile.num_entries:
        assert entries is not None
        return keys, widened(entries.read(tile.num_entries))
    return keys, None


def _forward(
    q: Tensor, local: Tensor, entries: EntrySource | None, chosen: Tensor | None, sink: Tensor | None, layout: Layout
) -> Tensor:
    B, T, N, _ = q.shape
    out = q.new_empty(B, T, N, layout.value_dim)
    sink = widened(sink).to(widened(q).dtype) if sink is not None else None
    for tile in tiles_of(layout, T, B, N, local.shape[1], chosen, q.device):
        keys, extra = load_tile(tile, local, entries, chosen)
        part = widened(q[:, tile.start : tile.stop])
        _, near, far = tile_weights(part, keys, extra, sink, tile, layout.scale)
        o = _weighted(near, keys[..., : layout.value_dim])
        if far is not None and extra is not None:
            o += _weighted(far, extra[..., : layout.value_dim])
        out[:, tile.start : tile.stop] = o
    return out


class _SparseAttention(torch.autograd.Function):
    """Saves the inputs; recomputes one tile's weights p at a time on the way back.

    With dp = dO · v, a logit's gradient is p (dp − δ), δ = Σ p dp over the query's keys. A tile holds all of them, so δ
    is summed there; as dO · O it would need the output, which would have to be kept.
    """

    @staticmethod
    def forward(ctx, q, local, entries, chosen, sink, layout: Layout) -> Tensor:
        out = _forward(q, local, TensorEntries(entries) if entries is not None else None, chosen, sink, layout)
        ctx.save_for_backward(q, local, entries, chosen, sink)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        q, local, entries, chosen, sink = ctx.saved_tensors
        layout: Layout = ctx.layout
        B, T, N, H = q.shape
        Hv = layout.value_dim
        wide = widened(q).dtype
        source = TensorEntries(entries) if entries is not None else None
        d_q = torch.empty_like(q)
        d_local = torch.zeros(local.shape, dtype=wide, device=q.device)
        d_entries = torch.zeros(entries.shape, dtype=wide, device=q.device) if entries is not None else None
        d_sink = torch.zeros(N, dtype=wide, device=q.device) if sink is not None else None
        wide_sink = sink.to(wide) if sink is not None else None
        for tile in tiles_of(layout, T, B, N, local.shape[1], chosen, q.device):
            rows = slice(tile.start, tile.stop)
            keys, extra = load_tile(tile, local, source, chosen)
            part, d_o = widened(q[:, rows]), widened(grad_out[:, rows])
            p_sink, near, far = tile_weights(part, keys, extra, wide_sink, tile, layout.scale)
            t = tile.stop - tile.start
            flat_q, flat_d = part.reshape(B, t * N, H), d_o.reshape(B, t * N, Hv)
            each_q, each_d, values = flat_q, flat_d, extra
            if extra is not None and extra.dim() == 4:
                each_q, each_d, values = part.reshape(B * t, N, H), d_o.reshape(B * t, N, Hv), extra.flatten(0, 1)

            near_grad = torch.bmm(flat_d, keys[..., :Hv].transpose(1, 2)).view_as(near).mul_(near)
            delta, far_grad = near_grad.sum(-1, keepdim=True), None
            if values is not None and far is not None:
                far_grad = torch.bmm(each_d, values[..., :Hv].transpose(1, 2)).view_as(far).mul_(far)
                delta += far_grad.sum(-1, keepdim=True)
            if p_sink is not None and d_sink is not None:
                d_sink -= (p_sink * delta).sum(dim=(0, 1, 3))

            d_logit = near_grad.addcmul_(near, delta, value=-1).mul_(layout.scale)
            d_part = _weighted(d_logit, keys)
            d_keys = torch.bmm(d_logit.reshape(B, t * N, -1).transpose(1, 2), flat_q)
            d_keys[..., :Hv] += torch.bmm(near.reshape(B, t * N, -1).transpose(1, 2), flat_d)
            d_local[:, tile.band[0] : tile.band[1]] += d_keys

            if extra is not None and far is not None and far_grad is not None and d_entries is not None:
                d_logit = far_grad.addcmul_(far, delta, value=-1).mul_(layout.scale)
                d_part += _weighted(d_logit, extra)
                leading = each_q.shape[:2]
                d_extra = torch.bmm(d_logit.reshape(*leading, -1).transpose(1, 2), each_q)
                d_extra[..., :Hv] += torch.bmm(far.reshape(*leading, -1).transpose(1, 2), each_d)
                if tile.gathered:
                    assert chosen is not None and entries is not None
                    S = entries.shape[1]
                    index = chosen[:, rows].long()
                    # Invalid picks carry zero gradient, but they still need a row to land in.
                    index = index.clamp(0, S - 1) + torch.arange(0, B * S, S, device=q.device)[:, None, None]
                    d_entries.view(B * S, H).index_add_(0, index.reshape(-1), d_extra.reshape(-1, H))
                else:
                    d_entries[:, : tile.num_entries] += d_extra
            d_q[:, rows] = d_part
        d_entries = d_entries.to(entries.dtype) if d_entries is not None and entries is not None else None
        d_sink = d_sink.to(sink.dtype) if d_sink is not None and sink is not None else None
        return d_q, d_local.to(local.dtype), d_entries, None, d_sink, None
