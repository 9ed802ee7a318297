"""y = x Wᵀ, with one thing known about one-row products on a CPU.

A product with a single row reads its matrix once and is bound by memory. The BLAS reads several matrix rows side by side
and reaches 9 GB/s here where a plain sum over the same matrix, one stream from end to end, reaches 25. So a matrix that
fits a core's cache is summed first, which brings it there, and then multiplied: 36 µs instead of 56 for 512 × 256.
`longreach bench model` measures decoding with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOUCH_BYTES = (1 << 17, 1 << 20)
"""Matrices between these sizes are read first: smaller ones cost more in calls, larger ones leave the cache again."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., in]` times `weight [out, in]` transposed."""
    if (
        x.numel() == weight.shape[1]
        and x.device.type == "cpu"
        and TOUCH_BYTES[0] <= weight.nbytes <= TOUCH_BYTES[1]
        and not torch.is_grad_enabled()
    ):
        weight.sum()
    return F.linear(x, weight)
