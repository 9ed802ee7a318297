"""Residual connections: mHC, the unconstrained form it replaces, and the plain sum.

`HyperConnection` is a drop-in around any sublayer. In place of  x + F(x)  it keeps n residual streams:

    streams = expand_streams(x, n)                    n copies
    streams = connection(streams, F)                  mixes in, calls F once, mixes out
    x = collapse(streams)                             one vector per token again

`HyperWrapped` does the same for a torch block that already contains its own residual sum.
Source: DeepSeek-V4 report, section 2.2; the maths is `ops.hyper`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longreach.ops.hyper import collapse_streams, hyper_coefficients, mix_in, mix_out


def expand_streams(x_BTD: Tensor, n: int) -> Tensor:
    """`n` equal residual streams, `[B, T, n, D]`."""
    return x_BTD.unsqueeze(2).expand(-1, -1, n, -1).contiguous()


class HyperConnection(nn.Module):
    """Residual streams around one sublayer.

    At initialisation it equals the plain residual: streams that are copies stay copies, and the sublayer sees one of
    them. The small random `fn` lets them part during training.

    Args:
        dim: width of one stream.
        streams: n.
        constrained: mHC; False leaves the residual mixing unnormalised (hyper-connections as first published).
    """

    def __init__(
        self,
        dim: int,
        streams: int = 4,
        *,
        iters: int = 20,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
        constrained: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        n = streams
        self.streams, self.iters, self.eps, self.norm_eps, self.constrained = n, iters, eps, norm_eps, constrained
        factory: dict[str, Any] = dict(dtype=torch.float32, device=device)
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * dim, **factory))
        self.base = nn.Parameter(torch.empty((2 + n) * n, **factory))
        self.scale = nn.Parameter(torch.empty(3, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Start as the plain residual: pre sums to 1, post is 1, comb is (nearly) the identity."""
        n = self.streams
        self.fn.normal_(0.0, std, generator=generator)
        self.scale.fill_(0.01)
        pre, post, comb = self.base.split([n, n, n * n])
        pre.fill_(-math.log(n - 1) if n > 1 else 10.0)
        post.zero_()
        comb.copy_((torch.eye(n) * (4.0 if self.constrained else 1.0)).flatten())

    def coefficients(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre `[B, T, n]`, post `[B, T, n]` and comb `[B, T, n, n]` of these streams."""
        return hyper_coefficients(
            streams_BTnD,
            self.fn,
            self.base,
            self.scale,
            iters=self.iters,
            eps=self.eps,
            norm_eps=self.norm_eps,
            constrained=self.constrained,
        )

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """New streams after `sublayer`, a function `[B, T, D] -> [B, T, D]` without a residual of its own."""
        pre, post, comb = self.coefficients(streams_BTnD)
        return mix_out(streams_BTnD, sublayer(mix_in(streams_BTnD, pre)), post, comb)


class PlainResidual(nn.Module):
    """x + F(x), with the calling form of `HyperConnection` (one stream, no parameters)."""

    def forward(self, x_BTD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x_BTD + sublayer(x_BTD)


class StreamCollapse(nn.Module):
    """n streams to one vector per token, by gates learned from the streams themselves."""

    def __init__(
        self,
        dim: int,
        streams: int = 4,
        *,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.streams, self.eps, self.norm_eps = streams, eps, norm_eps
        factory: dict[str, Any] = dict(dtype=torch.float32, device=device)
        self.fn = nn.Parameter(torch.empty(streams, streams * dim, **factory))
        self.base = nn.Parameter(torch.empty(streams, **factory))
        self.scale = nn.Parameter(torch.empty(1, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        self.fn.normal_(0.0, std, generator=generator)
        self.scale.fill_(0.01)
        self.base.fill_(-math.log(self.streams - 1) if self.streams > 1 else 10.0)

    def forward(self, streams_BTnD: Tensor) -> Tensor:
        return collapse_streams(streams_BTnD, self.fn, self.base, self.scale, self.eps, self.norm_eps)


class HyperWrapped(nn.Module):
    """mHC around a torch block that computes x + F(x) itself, such as `nn.TransformerEncoderLayer`.

    block = HyperWrapped(nn.TransformerEncoderLayer(64, 4, batch_first=True), dim=64)
    streams = block(expand_streams(x, 4))          # [B, T, 4, 64]
    """

    def __init__(self, block: nn.Module, dim: int, streams: int = 4, **options) -> None:
        super().__init__()
        self.block = block
        self.connection = HyperConnection(dim, streams, **options)

    def forward(self, streams_BTnD: Tensor, *args, **kwargs) -> Tensor:
        return self.connection(streams_BTnD, lambda u: self.block(u, *args, **kwargs) - u)
