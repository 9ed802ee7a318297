"""The head and the next-token loss in one, a few tokens at a time.

    Σ_m −log softmax(h_m Wᵀ)[target_m]            gradient of the logits: softmax − one-hot

Logits are the largest tensor of a small model's step (tokens x vocabulary), so they never exist as a whole: the head and
the loss run over CHUNK tokens at a time, and since the gradient is known as soon as the loss is, it is taken on the spot.
Measured for 4,096 tokens, vocabulary 4,096, width 128, one thread: 0.18 s against 0.29 s for torch's cross_entropy on
whole logits, and 8 MiB of logits instead of 3 x 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512

ROWS = 16_384
"""Rows of a head of another dtype that are widened at a time."""


def head_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Negative log-likelihood of the targets under softmax(hidden Wᵀ), summed, in nats.

    Args:
        hidden_MD, weight_VD: any float dtype; logits are float32 (float64 for float64 hidden states).
        targets_M: int64.

    Returns:
        Scalar of the logits' dtype. Gradients reach `hidden_MD` and `weight_VD`, in their dtypes; taking them a second
        time (double backward) is not supported.
    """
    return _HeadCrossEntropy.apply(hidden_MD, weight_VD, targets_M)  # pyright: ignore[reportReturnType]


def head_cross_entropy_reference(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """The same on whole logits."""
    wide = _wide(hidden_MD)
    return F.cross_entropy(hidden_MD.to(wide) @ weight_VD.to(wide).t(), targets_M, reduction="sum")


class _HeadCrossEntropy(torch.autograd.Function):
    """Saves the two finished gradients instead of logits."""

    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
        wants_gradient, wide = any(ctx.needs_input_grad), _wide(hidden_MD)
        total = torch.zeros((), dtype=wide, device=hidden_MD.device)
        hidden_gradient = torch.empty_like(hidden_MD) if wants_gradient else hidden_MD
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # a frozen head is a gigabyte or two at the released vocabulary
            weight_gradient = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
        for start in range(0, len(targets_M), CHUNK):
            hidden, targets = hidden_MD[start : start + CHUNK].to(wide), targets_M[start : start + CHUNK, None]
            logits = _logits(hidden, weight_VD)
            chosen = logits.gather(1, targets)
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            normaliser = exponentials.sum(dim=1, keepdim=True)
            total += (normaliser.log() + largest - chosen).sum()
            if wants_gradient:
                gradient = exponentials.div_(normaliser)
                gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
                hidden_gradient[start : start + CHUNK] = _back(gradient, weight_VD)
                if weight_gradient is not None:
                    weight_gradient.addmm_(gradient.t(), hidden)
        if wants_gradient:
            ctx.save_for_backward(
                hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight_VD.dtype)
            )
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * upstream, None if weight_gradient is None else weight_gradient * upstream, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ in hidden's dtype; a narrower W is widened some rows at a time."""
    if weight.dtype == hidden.dtype:
        return F.linear(hidden, weight)
    return torch.cat([F.linear(hidden, rows.to(hidden.dtype)) for rows in weight.split(ROWS)], dim=1)


def _back(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient W, likewise."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    parts = zip(gradient.split(ROWS, dim=1), weight.split(ROWS), strict=True)
    return torch.stack([part @ rows.to(part.dtype) for part, rows in parts]).sum(dim=0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
