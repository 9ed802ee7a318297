"""The two parameter holders every part uses: a bias-free linear map and an RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longreach.ops.linear import linear
from longreach.ops.norm import rms_norm
from longreach.ops.quant import fp8_roundtrip

FP8_ACTIVATION_BLOCK = 128
"""Channels that share one scale when the released code rounds a linear map's input to FP8."""


class Linear(nn.Module):
    """y = x Wᵀ without bias, weight `[out, in]`.

    `rounds_input` repeats what the released FP8 and FP4 products do to their input: E4M3 with one power-of-two scale per
    token and 128 channels. It is set for weights stored in those formats under `numerics="official"`.
    """

    def __init__(self, in_features: int, out_features: int, *, rounds_input: bool = False, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.rounds_input = rounds_input

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds_input:
            x = fp8_roundtrip(x, FP8_ACTIVATION_BLOCK)
        return linear(x, self.weight)

    def grouped(self, x_GMI: Tensor) -> Tensor:
        """Each group of rows by its own share of the outputs, inputs unrounded: `[G, M, in]` to `[G, M, out / G]`."""
        groups, _, in_features = x_GMI.shape
        return torch.bmm(x_GMI, self.weight.view(groups, -1, in_features).transpose(1, 2))

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features} -> {out_features}" + (", FP8 input" if self.rounds_input else "")


class RMSNorm(nn.Module):
    """Weighted RMSNorm over the last dimension; see `ops.norm`."""

    def __init__(self, dim: int, eps: float, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
