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
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _ClampedSwiGLU.apply(gate, up, limit)  # pyright: ignore[reportReturnType]
    return clamped_swiglu_reference(gate, up, limit)


def clamped_swiglu_reference(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The same, left to autograd."""
    if gate.dtype != torch.float64:
        gate, up = gate.float(), up.float()
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, in the dtype of `grad`; beyond a clamp there is none."""
    wide_gate, wide_up = gate.to(grad.dtype), up.to(grad.dtype)
    if limit:
        wide_gate, wide_up = wide_gate.clamp(max=limit), wide_up.clamp(-limit, limit)
    d_up = F.silu(wide_gate).mul_(grad)
    d_gate = torch.ops.aten.silu_backward(grad * wide_up, wide_gate)
    if limit:
        d_up.masked_fill_(up.abs() > limit, 0)
        d_gate.masked_fill_(gate > limit, 0)
    return d_gate, d_up


class _ClampedSwiGLU(torch.autograd.Function):
    """Keeps the two inputs; autograd keeps six tensors of their size."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return clamped_swiglu_reference(gate, up, limit)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        d_gate, d_up = swiglu_backward(grad, gate, up, ctx.limit)
        return d_gate.to(gate.dtype), d_up.to(up.dtype), None


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
    tensors = x_MD, weight_MK, w1_EfD, w3_EfD, w2_EDf
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not fp8_block:
        return _Mixture.apply(*tensors, chosen_MK, limit)  # pyright: ignore[reportReturnType]
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


class _Mixture(torch.autograd.Function):
    """`mixture` for training: keeps the input, and gate and up of every row; gathers and activates again on the way back.

    Each expert's weight gradients are written where they belong. Autograd would add a zero-filled gradient of the whole
    stack per expert and matrix, and keep ten tensors of a row's hidden width where this keeps two.
    """

    @staticmethod
    def forward(ctx, x_MD, weight_MK, w1_EfD, w3_EfD, w2_EDf, chosen_MK, limit: float) -> Tensor:
        M, K = chosen_MK.shape
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        order = chosen_MK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen_MK.reshape(-1), minlength=w1_EfD.shape[0]).tolist()
        gate, up = (x_MD.new_empty(M * K, w1_EfD.shape[1]) for _ in range(2))
        out = x_MD.new_empty(M * K, x_MD.shape[1])
        for e, part in parts_by_expert(counts):
            rows = x_MD.index_select(0, order[part] // K)
            torch.mm(rows, w1_EfD[e].t(), out=gate[part])
            torch.mm(rows, w3_EfD[e].t(), out=up[part])
            weight = weight_MK.reshape(-1, 1).index_select(0, order[part])
            hidden = (clamped_swiglu_reference(gate[part], up[part], limit) * weight).to(x_MD.dtype)
            torch.mm(hidden, w2_EDf[e].t(), out=out[part])
        ctx.save_for_backward(x_MD, weight_MK, w1_EfD, w3_EfD, w2_EDf, order, gate, up)
        ctx.counts, ctx.limit = counts, limit
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return out.index_select(0, back).view(M, K, -1).sum(dim=1, dtype=wide)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, weight_MK, w1_EfD, w3_EfD, w2_EDf, order, gate, up = ctx.saved_tensors
        K, grad = weight_MK.shape[1], grad.to(x_MD.dtype)
        d_x = torch.zeros(x_MD.shape, dtype=weight_MK.dtype, device=x_MD.device)
        d_weight = torch.empty_like(weight_MK)
        d_w1, d_w3, d_w2 = (torch.empty_like(w) for w in (w1_EfD, w3_EfD, w2_EDf))
        for e, count in enumerate(ctx.counts):
            if not count:
                for d in (d_w1, d_w3, d_w2):
                    d[e].zero_()
        for e, part in parts_by_expert(ctx.counts):
            slots = order[part]
            tokens = slots // K
            rows, d_out = x_MD.index_select(0, tokens), grad.index_select(0, tokens)
            weight = weight_MK.reshape(-1, 1).index_select(0, slots)
            active = clamped_swiglu_reference(gate[part], up[part], ctx.limit)
            torch.mm(d_out.t(), (active * weight).to(x_MD.dtype), out=d_w2[e])
            d_hidden = (d_out @ w2_EDf[e]).to(active.dtype)
            d_weight.view(-1).index_copy_(0, slots, active.mul_(d_hidden).sum(-1).to(d_weight.dtype))
            d_gate, d_up = swiglu_backward(d_hidden.mul_(weight), gate[part], up[part], ctx.limit)
            d_gate, d_up = d_gate.to(x_MD.dtype), d_up.to(x_MD.dtype)
            torch.mm(d_gate.t(), rows, out=d_w1[e])
            torch.mm(d_up.t(), rows, out=d_w3[e])
            d_rows = (d_gate @ w1_EfD[e]).addmm_(d_up, w3_EfD[e])
            d_x.index_add_(0, tokens, d_rows.to(d_x.dtype))
        return d_x.to(x_MD.dtype), d_weight, d_w1, d_w3, d_w2, None, None


def parts_by_expert(counts: list[int]):
    """(expert, its rows among those sorted by expert), for experts that have any."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
            start += count


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
