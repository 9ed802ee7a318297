"""Mixture of experts: scores, selection, and the expert products.

    s = sqrt(softplus(x Wᵀ));   chosen = top-k of (s + bias), or a table by token id;   weight = s[chosen] / Σ s[chosen] · scale
    expert(x) = w2 (weight · silu(min(w1 x, limit)) · clamp(w3 x, ±limit))

The bias steers who is chosen, never how much an expert counts. Router and activation are float32; the routing weight
enters before w2, as in the official code. Ties go to the lowest expert.
Source: DeepSeek-V4 report, section 2.1 and official inference code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.index import select_top
from longreach.ops.linear import linear
from longreach.ops.quant import fp8_roundtrip


def router_scores(x: Tensor, weight_ED: Tensor, scoring: str) -> Tensor:
    """Affinity of each token to each expert, float32 `[..., E]`."""
    wide = x if x.dtype == torch.float64 else x.float()
    logits = F.linear(wide, weight_ED.to(wide.dtype))
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    return F.softplus(logits).sqrt()


def choose_experts(scores: Tensor, bias_E: Tensor | None, k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """The `k` experts of each token by score + bias, int64 `[..., k]` ascending.

    With groups (V3.2) only the `top_groups` groups whose two best members sum highest may be chosen from.
    """
    ranked = scores if bias_E is None else scores + bias_E
    if groups > 1:
        by_group = ranked.unflatten(-1, (groups, -1))
        strength = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, select_top(strength, top_groups), True)
        ranked = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    return select_top(ranked, k)


def routing_weights(scores: Tensor, chosen: Tensor, scale: float, normalise: bool = True) -> Tensor:
    """What each chosen expert counts: its unbiased score over the chosen scores' sum, times `scale`; `[..., k]`."""
    weights = scores.gather(-1, chosen)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) · clamp(up, ±limit) in float32; limit 0 leaves the clamps out."""
    if gate.dtype != torch.float64:
        gate, up = gate.float(), up.float()
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def expert(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float, weight: Tensor | None = None, fp8_block: int = 0
) -> Tensor:
    """One feed-forward expert on `x [..., D]`; `weight [..., 1]` multiplies before the last product.

    `fp8_block` > 0 rounds the input of each product to FP8 with one scale per that many channels, as the released
    FP4 and FP8 products do.
    """
    if fp8_block:
        x = fp8_roundtrip(x, fp8_block)
    hidden = clamped_swiglu(linear(x, w1), linear(x, w3), limit)
    if weight is not None:
        hidden = hidden * weight
    hidden = hidden.to(x.dtype)
    return linear(fp8_roundtrip(hidden, fp8_block) if fp8_block else hidden, w2)


def mixture(
    x_MD: Tensor,
    chosen_MK: Tensor,
    weight_MK: Tensor,
    w1_EfD: Tensor,
    w3_EfD: Tensor,
    w2_EDf: Tensor,
    limit: float,
    fp8_block: int = 0,
) -> Tensor:
    """Σ_k weight_k · expert_{chosen_k}(x) for every token: sorted by expert, one product per expert, put back in order.

    Args:
        x_MD: tokens.
        chosen_MK, weight_MK: experts of each token (int64) and their weights (float32).

    Returns:
        float32 (float64 for float64 input) `[M, D]`, summed in slot order.
    """
    M, K = chosen_MK.shape
    D = x_MD.shape[-1]
    wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
    if M == 1:  # a decode step: nothing to sort
        outputs = [
            expert(x_MD, w1_EfD[e], w3_EfD[e], w2_EDf[e], limit, weight_MK[:, k : k + 1], fp8_block).to(wide)
            for k, e in enumerate(chosen_MK[0].tolist())
        ]
        return torch.stack(outputs).sum(dim=0) if K > 1 else outputs[0]
    flat = chosen_MK.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=w1_EfD.shape[0]).tolist()
    rows = x_MD.index_select(0, order // K)
    row_weights = weight_MK.reshape(-1, 1).index_select(0, order)
    outputs, start = [], 0
    for e, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            outputs.append(expert(rows[part], w1_EfD[e], w3_EfD[e], w2_EDf[e], limit, row_weights[part], fp8_block))
            start += count
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return torch.cat(outputs).index_select(0, back).view(M, K, D).sum(dim=1, dtype=wide)


def mixture_reference(
    x_MD: Tensor,
    chosen_MK: Tensor,
    weight_MK: Tensor,
    w1_EfD: Tensor,
    w3_EfD: Tensor,
    w2_EDf: Tensor,
    limit: float,
    fp8_block: int = 0,
    rows: slice = slice(None),
) -> Tensor:
    """The same with every token through every chosen expert at its own row, experts in ascending order.

    Slower, but each product's shape depends only on the number of rows: the invariant arithmetic runs on this. Only
    experts that some token of `rows` chose are visited; the other rows of the result are then meaningless.
    """
    wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
    total = torch.zeros(x_MD.shape, dtype=wide, device=x_MD.device)
    for e in sorted(set(chosen_MK[rows].reshape(-1).tolist())):
        weight = (weight_MK * (chosen_MK == e)).sum(dim=-1, keepdim=True)
        total = total + expert(x_MD, w1_EfD[e], w3_EfD[e], w2_EDf[e], limit, weight, fp8_block)
    return total
