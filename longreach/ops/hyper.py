"""Manifold-constrained hyper-connections: several residual streams, mixed by a doubly stochastic matrix per token.

    z = ρ · (fn · vec X)             ρ = 1 / rms(vec X)
    pre  = σ(a_pre z_pre + b_pre) + ε            sublayer input   u = Σ_j pre_j X_j
    post = 2 σ(a_post z_post + b_post)           new streams      X'_k = post_k y + Σ_j M_jk X_j
    M    = Sinkhorn(softmax_k(a_comb z_comb + b_comb))   rows and columns sum to 1: the residual path neither grows nor shrinks

All coefficients are float32. Source: DeepSeek-V4 report, equations 1 to 8, in the order of the official code (column
step first and last; every sum carries ε). `constrained=False` leaves M at its unnormalised linear value, the
hyper-connections that mHC replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longreach.ops.linear import linear


def hyper_coefficients(
    streams_BTnD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    constrained: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mixings of one sublayer.

    Args:
        streams_BTnD: residual streams, any float dtype.
        fn, base, scale: `[(2+n)n, nD]`, `[(2+n)n]`, `[3]`.
        iters: Sinkhorn column steps.

    Returns:
        pre `[B, T, n]`, post `[B, T, n]`, comb `[B, T, n, n]` (row = source stream, column = target), float32.
    """
    n = streams_BTnD.shape[-2]
    z = _projected(streams_BTnD, fn, norm_eps)
    z_pre, z_post, z_comb = z.split([n, n, n * n], dim=-1)
    b_pre, b_post, b_comb = base.float().split([n, n, n * n])
    a_pre, a_post, a_comb = scale.float().unbind()
    pre = torch.sigmoid(a_pre * z_pre + b_pre) + eps
    post = 2 * torch.sigmoid(a_post * z_post + b_post)
    logits = (a_comb * z_comb + b_comb).view(*z.shape[:-1], n, n)
    if not constrained:
        return pre, post, logits
    return pre, post, sinkhorn(logits, iters, eps)


def collapse_streams(
    streams_BTnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """One vector per token from n streams, weighted by σ(scale · z + base) + ε. Returns `[B, T, D]` in the input's dtype."""
    weights = torch.sigmoid(_projected(streams_BTnD, fn, norm_eps) * scale.float() + base.float()) + eps
    return mix_in(streams_BTnD, weights)


def mix_in(streams_BTnD: Tensor, pre_BTn: Tensor) -> Tensor:
    """Σ_j pre_j X_j in float32, rounded once to the streams' dtype: `[B, T, D]`."""
    B, T, n, D = streams_BTnD.shape
    wide = streams_BTnD.to(pre_BTn.dtype).reshape(B * T, n, D)
    return torch.bmm(pre_BTn.reshape(B * T, 1, n), wide).view(B, T, D).to(streams_BTnD.dtype)


def mix_out(streams_BTnD: Tensor, y_BTD: Tensor, post_BTn: Tensor, comb_BTnn: Tensor) -> Tensor:
    """X'_k = post_k y + Σ_j comb_jk X_j in float32, rounded once: `[B, T, n, D]`."""
    B, T, n, D = streams_BTnD.shape
    wide = streams_BTnD.to(comb_BTnn.dtype).reshape(B * T, n, D)
    y, post = y_BTD.to(wide.dtype).reshape(B * T, 1, D), post_BTn.reshape(B * T, n, 1)
    tensors = wide, y, post, comb_BTnn.reshape(B * T, n, n)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        mixed: Tensor = _MixOut.apply(*tensors)  # pyright: ignore[reportAssignmentType]
    else:
        mixed = _mixed(*tensors)
    return mixed.view(B, T, n, D).to(streams_BTnD.dtype)


def _mixed(streams_MnD: Tensor, y_M1D: Tensor, post_Mn1: Tensor, comb_Mnn: Tensor) -> Tensor:
    return torch.bmm(comb_Mnn.transpose(1, 2), streams_MnD).addcmul_(post_Mn1, y_M1D)


class _MixOut(torch.autograd.Function):
    """Every gradient is one product with dX'; autograd sums two tensors of the streams' size that it makes for it."""

    @staticmethod
    def forward(ctx, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(streams, y, post, comb)
        return _mixed(streams, y, post, comb)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        streams, y, post, comb = ctx.saved_tensors
        d_y = torch.bmm(post.transpose(1, 2), grad)
        d_post = torch.bmm(grad, y.transpose(1, 2))
        return torch.bmm(comb, grad), d_y, d_post, torch.bmm(streams, grad.transpose(1, 2))


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Project softmax(logits) towards the doubly stochastic matrices; `[..., n, n]` float32 in and out.

    Ends on a column step, so columns sum to 1 up to eps and rows nearly. The backward pass runs the iterations again
    instead of keeping them: 2·iters matrices per token would be most of the memory of a training step.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        return _RecomputedSinkhorn.apply(logits, iters, eps)
    return _sinkhorn_steps(logits, iters, eps)


def sinkhorn_reference(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The same in the layout of the equations, differentiable by autograd alone."""
    m = logits.softmax(dim=-1) + eps
    m = m / (m.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        m = m / (m.sum(dim=-1, keepdim=True) + eps)
        m = m / (m.sum(dim=-2, keepdim=True) + eps)
    return m


def _sinkhorn_steps(logits: Tensor, iters: int, eps: float) -> Tensor:
    n = logits.shape[-1]
    if logits.numel() == n * n:
        return _sinkhorn_one(logits.view(n, n), iters, eps).view(logits.shape)
    # Tokens last: every step is then a handful of long vector operations instead of many 4-wide ones.
    m = (logits.softmax(dim=-1) + eps).view(-1, n, n).permute(1, 2, 0).contiguous()
    epsilon = m.new_full((), eps)  # a Python number would be converted anew in each of these small steps
    m.div_(m.sum(0, keepdim=True).add_(epsilon))
    for _ in range(iters - 1):
        m.div_(m.sum(1, keepdim=True).add_(epsilon))
        m.div_(m.sum(0, keepdim=True).add_(epsilon))
    return m.permute(2, 0, 1).contiguous().view(logits.shape)  # bmm copies matrix by matrix if this stays a view


def _sinkhorn_one(logits_nn: Tensor, iters: int, eps: float) -> Tensor:
    """One token's matrix as M = K / (r ⊗ c): a step m ← m / (Σ m + ε) is then  c ← Kᵀ(1/r) + ε c, half the calls.

    Decoding makes this 2·iters times per sublayer on four numbers at a time, where calls are all that costs.
    """
    k = logits_nn.softmax(dim=-1) + eps
    k_t = k.t()
    r, c = k.new_ones(k.shape[0]), k.new_ones(k.shape[0])
    u, v = k.new_ones(k.shape[0]), k.new_empty(k.shape[0])
    for step in range(iters):
        if step:
            torch.reciprocal(r.addmv_(k, v, beta=eps), out=u)
        torch.reciprocal(c.addmv_(k_t, u, beta=eps), out=v)
    return k * u[:, None] * v


class _RecomputedSinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, iters: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iters, ctx.eps = iters, eps
        return _sinkhorn_steps(logits, iters, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (logits,) = ctx.saved_tensors
        n = logits.shape[-1]
        # The column and row steps replayed tokens-last, keeping each step's output and divisor, then undone in reverse:
        # for y = m / s with s = sum(m) + eps,  dm = (dy - sum(dy * y)) / s.
        start = logits.softmax(dim=-1)
        m = (start + ctx.eps).view(-1, n, n).permute(1, 2, 0).contiguous()
        trail: list[tuple[Tensor, Tensor, int]] = []
        for step in range(2 * ctx.iters - 1):
            dim = step % 2  # 0: column step (over sources), 1: row step (over targets)
            s = m.sum(dim, keepdim=True).add_(ctx.eps)
            m = m / s
            trail.append((m, s, dim))
        g = grad.reshape(-1, n, n).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        scratch = torch.empty_like(g)
        for y, s, dim in reversed(trail):
            g.sub_(torch.mul(g, y, out=scratch).sum(dim, keepdim=True)).div_(s)
        g = g.permute(2, 0, 1).reshape(logits.shape)
        return start * (g - (g * start).sum(-1, keepdim=True)), None, None


def _projected(streams_BTnD: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """ρ · (fn · vec X)."""
    flat = streams_BTnD.flatten(-2)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if torch.is_grad_enabled() and (flat.requires_grad or fn.requires_grad):
        return _Projected.apply(flat, fn.to(flat.dtype), norm_eps)  # pyright: ignore[reportReturnType]
    return linear(flat, fn.to(flat.dtype)) * _inverse_rms(flat, norm_eps)


def _inverse_rms(flat: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1] + eps)


class _Projected(torch.autograd.Function):
    """dX = ρ fnᵀ dz − X (dz · z) ρ² / width, in one tensor of the streams' size where autograd makes five."""

    @staticmethod
    def forward(ctx, flat: Tensor, fn: Tensor, eps: float) -> Tensor:
        inverse_rms = _inverse_rms(flat, eps)
        z = linear(flat, fn) * inverse_rms
        ctx.save_for_backward(flat, fn, inverse_rms, z)
        return z

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat, fn, inverse_rms, z = ctx.saved_tensors
        width, scaled = flat.shape[-1], grad * inverse_rms
        # z = ρ u and dρ/dX = −ρ³ X / width
        factor = (grad * z).sum(-1, keepdim=True).mul_(inverse_rms.square()).div_(-width)
        d_flat = (flat * factor).view(-1, width)
        d_flat.addmm_(scaled.view(-1, scaled.shape[-1]), fn)
        d_fn = scaled.reshape(-1, scaled.shape[-1]).t() @ flat.reshape(-1, width)
        return d_flat.view_as(flat), d_fn, None
