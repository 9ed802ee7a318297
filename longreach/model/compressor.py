"""The compressor of a CSA or HCA layer, and of the indexer: projections, pooling, norm and rotation of entries.

Every `ratio` tokens become one entry. Tokens of a block that is not full yet stay raw in the layer's store. The maths of
pooling is `ops.compress`. Projections, gates and pooling are float32 whatever the model's dtype, as in the official code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longreach.model.config import ModelConfig
from longreach.model.layers import Linear, RMSNorm
from longreach.model.passing import Span
from longreach.model.stores import GraphRecent, Recent
from longreach.ops.compress import pool_blocks, pool_overlapping_blocks
from longreach.ops.linear import linear
from longreach.ops.rope import apply_rope, rope_table


class Compressor(nn.Module):
    """Entries of `width` channels from blocks of `ratio` tokens.

    Args:
        overlap: CSA: an entry also sees the block before its own, through channels of its own.
    """

    def __init__(self, config: ModelConfig, ratio: int, width: int, *, overlap: bool, **factory) -> None:
        super().__init__()
        self.ratio, self.overlap = ratio, overlap
        channels = width * (2 if overlap else 1)
        self.ape = nn.Parameter(torch.empty(ratio, channels, dtype=torch.float32, device=factory.get("device")))
        self.wkv = Linear(config.hidden_size, channels, **factory)
        self.wgate = Linear(config.hidden_size, channels, **factory)
        self.norm = RMSNorm(width, config.rms_norm_eps, **factory)

    def project(self, x_BTD: Tensor, positions: Tensor) -> Tensor:
        """Raw content and gate of every token, `[B, T, 2·channels]` float32 (content first, gate with its `ape`)."""
        wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        content = linear(wide, self.wkv.weight.to(wide.dtype))
        gate = linear(wide, self.wgate.weight.to(wide.dtype)) + self.ape.to(wide.dtype)[positions % self.ratio]
        return torch.cat([content, gate], dim=-1)

    def complete(
        self, raw: Tensor, span: Span, recent: Recent | GraphRecent, frequencies: Tensor, whole_tile: bool
    ) -> tuple[Tensor, slice]:
        """Entries of the blocks this span completes.

        Args:
            raw: `project`ed tokens of the span.
            recent: raw tokens before the span; advanced by the span's real ones.
            whole_tile: compute every block of the tile, finished or not, so that shapes depend on the tile alone.

        Returns:
            Entries `[b, e, width]` normed and rotated, and which of them are new and complete.
        """
        m = self.ratio
        done, now = span.real_first // m, span.real_stop // m
        first, last = (span.first // m, span.stop // m) if whole_tile else (done, now)
        back = m if self.overlap else 0
        if first == last:
            recent.push(raw[:, span.real])
            return raw.new_zeros(raw.shape[0], 0, self.norm.weight.shape[0]), slice(0, 0)
        tokens = extended(recent, raw, span, first * m - back)[:, : (last - first) * m + back]
        content, gate = tokens.chunk(2, dim=-1)
        if self.overlap:
            entries = pool_overlapping_blocks(content, gate, m, first_has_previous=first > 0)
        else:
            entries = pool_blocks(content, gate, m)
        entries = self.norm(entries.to(self.norm.weight.dtype))
        starts = torch.arange(first * m, last * m, m, device=raw.device)
        entries = apply_rope(entries, rope_table(starts, frequencies))
        return entries, slice(done - first, now - first)


def extended(recent: Recent | GraphRecent, values: Tensor, span: Span, lo: int) -> Tensor:
    """Values of positions [lo, span.stop): what `recent` holds, then the span's real ones, zeros where neither has any.

    `lo` is at most the first real token's position. Advances `recent` by the span's real tokens.
    """
    real = values[:, span.real]
    pieces = []
    if lo < span.real_first:
        if recent.hi > 0:
            pieces.append(recent.read(lo, span.real_first))
        else:
            pieces.append(values.new_zeros(values.shape[0], span.real_first - lo, values.shape[2]))
    pieces.append(recent.stored(real))
    if span.real_stop < span.stop:
        pieces.append(values.new_zeros(values.shape[0], span.stop - span.real_stop, values.shape[2]))
    joined = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
    recent.push(real)  # after the joining: what was read is a view of the buffer that this changes
    return joined
