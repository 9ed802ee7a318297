"""Root-mean-square normalisation, with and without a weight.

    y = x / sqrt(mean(x²) + eps) * weight        float32 inside, one rounding to the input's dtype at the end

V4 uses the weighted form before every sublayer and on latents, the weightless form on every query head and on the
flattened residual streams. Source: architecture of DeepSeek-V4, official inference code; the weight is multiplied in
float32 before the rounding (V3.2 rounds first; in float32 the two agree).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 12
"""Elements up to which torch's own rms_norm spends three times as long on being called as these few steps do."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension of `x` (any float dtype) to unit RMS; `weight` has that dimension's size or is None.

    Training keeps `x` alone for the backward pass; torch's own norm keeps two or three of its size on a CPU.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return _normalised(x, weight, eps)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32):
        if x.numel() <= SMALL:  # by shape alone: the invariant arithmetic must not depend on gradients being wanted
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            return x * scale if weight is None else x * scale * weight
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms:  dx = (w dy − n · mean(n w dy)) / rms,  dw = Σ n dy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normalised(x, weight, eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        grad = grad.to(wide.dtype)
        width = x.shape[-1]
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(width).add_(ctx.eps)).rsqrt_()
        normed = wide * scale
        product = normed * grad
        d_weight = None
        if weight is None:
            mean = product.mean(-1, keepdim=True)
        else:
            w = weight.to(wide.dtype)
            d_weight = product.reshape(-1, width).sum(0).to(weight.dtype)
            mean = (product @ w).unsqueeze(-1).div_(width)
            grad = torch.mul(grad, w, out=product)
        d_x = torch.addcmul(grad, normed, mean, value=-1, out=normed).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same, written out."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype)
