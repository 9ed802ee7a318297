"""The training losses: pure functions of tensors.

next-token loss   mean over t of −log p(token_{t+1} | …),  t and t+1 in one document
MTP loss          the same for token_{t+2}, predicted by the multi-token-prediction block
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _CrossEntropy(torch.autograd.Function):
    """Per-token negative log-likelihood that keeps one buffer of logits' size instead of the usual three.

    The gradient, softmax minus one-hot, is known as soon as the loss is: it is written over the logits at once.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        rows = torch.arange(len(targets_M), device=targets_M.device)
        chosen = logits_MV[rows, targets_M]
        normaliser = logits_MV.logsumexp(dim=-1)
        gradient = logits_MV.sub_(normaliser.unsqueeze(-1)).exp_()
        gradient[rows, targets_M] -= 1
        ctx.save_for_backward(gradient)
        return normaliser - chosen

    @staticmethod
    def backward(ctx, upstream_M: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream_M.unsqueeze(-1)), None


def cross_entropy_(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """−log softmax(logits)[target] of each row, float32 `(M,)`.

    Overwrites `logits_MV`, which must be float32 and used for nothing else; its gradient can be taken once.
    """
    return _CrossEntropy.apply(logits_MV, targets_M)  # pyright: ignore[reportReturnType]


def predicted(documents_BT: Tensor, ahead: int) -> Tensor:
    """Which positions have a target `ahead` tokens later in the same document; bool `(B, T - ahead)`."""
    return documents_BT[:, :-ahead] == documents_BT[:, ahead:]


def loss_per_token(
    hidden_BTD: Tensor, head: Callable[[Tensor], Tensor], tokens_BT: Tensor, documents_BT: Tensor, ahead: int = 1
) -> Tensor:
    """Negative log-likelihood of every token that can be predicted from `ahead` tokens before it, in nats.

    Args:
        hidden_BTD: what the head reads; position t predicts token t + ahead. The last `ahead` positions are not used.
        head: hidden states `(M, D)` to float32 logits `(M, V)`. Only positions with a target go through it.
        documents_BT: equal numbers in a row belong to one document.

    Returns:
        float32 `(M,)`, rows one after another.
    """
    mask = predicted(documents_BT, ahead)
    hidden_MD = hidden_BTD[:, :-ahead][mask]
    return cross_entropy_(head(hidden_MD), tokens_BT[:, ahead:][mask])
