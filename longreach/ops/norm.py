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
    """Normalise the last dimension of `x` (any float dtype) to unit RMS; `weight` has that dimension's size or is None."""
    if x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32):
        if x.numel() <= SMALL:  # by shape alone: the invariant arithmetic must not depend on gradients being wanted
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            return x * scale if weight is None else x * scale * weight
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same, written out."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype)
