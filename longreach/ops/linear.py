"""y = x Wᵀ, with one thing known about products of a few rows on a CPU.

A product with a single row reads its matrix once and is bound by memory. The BLAS reads several matrix rows side by side
and reaches 9 GB/s here where one stream from end to end reaches 25: `native` walks the matrix that way, and for some more
rows fetches what it will read next. `longreach bench model` measures decoding with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.native.library import MAX_ROWS, library

LARGE = 1 << 14
"""Elements of a matrix below which calling costs more than reading."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., in]` times `weight [out, in]` transposed."""
    out_features, in_features = weight.shape
    if (
        x.numel() <= MAX_ROWS * in_features
        and weight.numel() >= LARGE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and weight.is_contiguous()
        and (native := library()) is not None
    ):
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], out_features)
        rows = x.numel() // in_features
        native.lr_linear(weight.data_ptr(), x.data_ptr(), y.data_ptr(), rows, out_features, in_features)
        return y
    return F.linear(x, weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The same by PyTorch alone."""
    return F.linear(x, weight)
