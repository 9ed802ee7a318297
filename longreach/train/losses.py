"""The training losses: pure functions of tensors.

    next-token loss   mean over t of −log p(token_{t+1} | …),  t and t+1 in one document
    MTP loss          the same for token_{t+2}, predicted by the multi-token-prediction block
    balance loss      Σ_e f_e P_e per row and routed layer: keeps each sequence's load spread, weight 1e-4

Logits never exist as a whole: `ops/cross_entropy.py` runs head and loss together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longreach.ops.cross_entropy import head_cross_entropy


def predicted(documents_BT: Tensor, ahead: int) -> Tensor:
    """Which positions have a target `ahead` tokens later in the same document; bool `(B, T - ahead)`. -1 is padding."""
    return (documents_BT[:, :-ahead] == documents_BT[:, ahead:]) & (documents_BT[:, ahead:] >= 0)


def summed_loss(
    hidden_BTD: Tensor, head_weight_VD: Tensor, tokens_BT: Tensor, documents_BT: Tensor, ahead: int = 1
) -> tuple[Tensor, int]:
    """Negative log-likelihood of every token that can be predicted from `ahead` tokens before it, summed, in nats.

    Args:
        hidden_BTD: what the head reads; position t predicts token t + ahead. The last `ahead` positions are not used.
        head_weight_VD: the head, a linear map without bias; logits are float32 whatever its dtype.
        documents_BT: equal numbers in a row belong to one document; no target crosses from one to the next.

    Returns:
        (float32 scalar, number of targets). Gradients flow to `hidden_BTD` and `head_weight_VD`.
    """
    mask = predicted(documents_BT, ahead)
    targets_M = tokens_BT[:, ahead:][mask]
    return head_cross_entropy(hidden_BTD[:, :-ahead][mask], head_weight_VD, targets_M), len(targets_M)


def mean_loss(
    hidden_BTD: Tensor, head_weight_VD: Tensor, tokens_BT: Tensor, documents_BT: Tensor, ahead: int = 1
) -> Tensor:
    """`summed_loss` per target; 0 if no position has one."""
    total, count = summed_loss(hidden_BTD, head_weight_VD, tokens_BT, documents_BT, ahead)
    return total / max(1, count)


def balance_loss(scores_BTE: Tensor, chosen_BTK: Tensor, real_BT: Tensor) -> Tensor:
    """Sequence-wise balance loss of one routed layer, the mean over rows.

        f_e = E / (K T) · times expert e was chosen in the row;    P_e = mean over t of s_e / Σ s;    loss = Σ_e f_e P_e

    1 when a row's tokens are spread evenly, E / K at worst. The gradient goes through P alone.

    Args:
        scores_BTE: affinities, with gradient.
        chosen_BTK: experts chosen, int64.
        real_BT: bool, False at padding.

    Returns:
        float32 scalar. Source: DeepSeek-V3 report, equations 17 to 20; kept by V4.
    """
    E, K = scores_BTE.shape[-1], chosen_BTK.shape[-1]
    weight = real_BT / real_BT.sum(dim=1, keepdim=True).clamp(min=1)
    shares = scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)
    P = (shares * weight[..., None]).sum(dim=1)
    f = torch.zeros_like(P).scatter_add_(1, chosen_BTK.flatten(1), weight.repeat_interleave(K, dim=1).to(P.dtype))
    return (f * P).sum(dim=1).mean() * (E / K)
