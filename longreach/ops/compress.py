"""Gated pooling of KV entries: a block of m tokens becomes one cache entry.

    HCA   c_i = Σ_{j in block i} softmax_j(Z_j + ape) ⊙ C_j
    CSA   the same over 2m slots: block i-1 seen through the first half of the channels, block i through the second

one softmax per channel, in float32. Long context is cheap because attention then reads T / m entries instead of T.
The gates arrive with the positional bias `ape` already added. Incomplete blocks are not emitted; the cache keeps them raw.
Source: DeepSeek-V4 report, section 2.3; the half that looks back is the first, as in the official code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_blocks(content_BTw: Tensor, gate_BTw: Tensor, ratio: int) -> Tensor:
    """HCA: `[B, n·ratio, w]` float32 content and gates to `[B, n, w]`."""
    content = content_BTw.unflatten(1, (-1, ratio))
    gate = gate_BTw.unflatten(1, (-1, ratio))
    return (gate.softmax(dim=2) * content).sum(dim=2)


def pool_overlapping_blocks(content_BTw: Tensor, gate_BTw: Tensor, ratio: int, first_has_previous: bool) -> Tensor:
    """CSA: `[B, (1+n)·ratio, 2w]` to `[B, n, w]`; the first block given is the one before the first entry.

    Args:
        content_BTw, gate_BTw: float32; channels `[:w]` serve the next entry, `[w:]` the token's own.
        first_has_previous: False when the first entry opens the sequence: the leading block is then a placeholder
            that takes no part.
    """
    w = content_BTw.shape[-1] // 2
    content = content_BTw.unflatten(1, (-1, ratio))
    gate = gate_BTw.unflatten(1, (-1, ratio))
    back_gate = gate[:, :-1, :, :w]
    if not first_has_previous:
        back_gate = torch.cat([torch.full_like(back_gate[:, :1], float("-inf")), back_gate[:, 1:]], dim=1)
    slots = torch.cat([content[:, :-1, :, :w], content[:, 1:, :, w:]], dim=2)
    weights = torch.cat([back_gate, gate[:, 1:, :, w:]], dim=2).softmax(dim=2)
    return (weights * slots).sum(dim=2)


def pool_overlapping_reference(content_BTw: Tensor, gate_BTw: Tensor, ratio: int) -> Tensor:
    """CSA from the start of a sequence, entry by entry: `[B, n·ratio, 2w]` to `[B, n, w]`."""
    w = content_BTw.shape[-1] // 2
    entries = []
    for i in range(content_BTw.shape[1] // ratio):
        now = slice(i * ratio, (i + 1) * ratio)
        content, gate = content_BTw[:, now, w:], gate_BTw[:, now, w:]
        if i:
            before = slice((i - 1) * ratio, i * ratio)
            content = torch.cat([content_BTw[:, before, :w], content], dim=1)
            gate = torch.cat([gate_BTw[:, before, :w], gate], dim=1)
        entries.append((gate.softmax(dim=1) * content).sum(dim=1))
    return torch.stack(entries, dim=1)
