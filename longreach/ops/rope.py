"""Interleaved partial rotary positions with YaRN, and their inverse.

    (x[2k], x[2k+1]) as a complex number  *  exp(i · position · ω_k)      on the last `rope_dim` channels only
    ω_k = θ^(-2k / rope_dim);  YaRN: ω_k (1 - ramp_k) + (ω_k / factor) ramp_k

V4 rotates keys that are also values, so the attention output is rotated back at the query's position (`inverse`).
Compressed entries sit at the position of the first token of their block. Tables are float32. No attention factor.
Source: DeepSeek-V4 official inference code; YaRN, arXiv 2309.00071.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_length: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Angular frequency of each channel pair, float32 `[dim / 2]`. `factor` 1 leaves YaRN out."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if factor == 1.0:
        return frequencies

    def pair_turning(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low or 1e-3)
    ramp = ramp.clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def rope_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex numbers exp(i · position · ω), complex64 `[*positions.shape, rope_dim / 2]`."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the trailing channels of `x` by `table`, or back.

    Args:
        x: `[..., dim]`, any float dtype; the rotation is float32 and rounded once.
        table: complex `[..., rope_dim / 2]`, broadcastable to x's leading dimensions.
        inverse: rotate by the negative angle.

    Returns:
        A tensor like `x`. Without gradients the rotation happens in place, on `x` itself.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Rotated.apply(x, table, inverse)  # pyright: ignore[reportReturnType]
    return _rotate(x, table, inverse)


def _rotate(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """`apply_rope` in place."""
    rotary = x[..., -2 * table.shape[-1] :]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(rotary.to(wide).reshape(*x.shape[:-1], -1, 2))
    rotary.copy_(torch.view_as_real(pairs * (table.conj() if inverse else table)).view(rotary.shape))
    return x


class _Rotated(torch.autograd.Function):
    """Of a copy; the gradient is turned the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.inverse = inverse
        return _rotate(x.clone(memory_format=torch.contiguous_format), table, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (table,) = ctx.saved_tensors
        return _rotate(grad.clone(memory_format=torch.contiguous_format), table, not ctx.inverse), None, None


def apply_rope_reference(x: Tensor, positions: Tensor, frequencies: Tensor, inverse: bool = False) -> Tensor:
    """The same with sines and cosines: `x [..., dim]`, `positions` broadcastable to x's leading dimensions."""
    rope_dim = 2 * frequencies.shape[-1]
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies * (-1 if inverse else 1)
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., -rope_dim::2].float(), x[..., -rope_dim + 1 :: 2].float()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([x[..., :-rope_dim], turned.to(x.dtype)], dim=-1)
