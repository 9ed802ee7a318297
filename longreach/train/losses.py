"""The training losses: pure functions of tensors.

    next-token loss   mean over t of −log p(token_{t+1} | …),  t and t+1 in one document
    MTP loss          the same for token_{t+2}, predicted by the multi-token-prediction block
    balance loss      Σ_e f_e P_e per row and routed layer: keeps each sequence's load spread, weight 1e-4

and those of reinforcement learning, per written token, with r = π_θ / π_old of that token and A its sample's advantage:

    clipped loss      −min(r A, clip(r, 1 − low, 1 + high) A)
    KL                r (π_ref/π_θ − log(π_ref/π_θ) − 1)                      unbiased, and so is its gradient
    sequence mask     a sample with A < 0 and mean of log(π_old/π_θ) above δ counts for nothing in the clipped loss
    mean              over all tokens, over sequences of their means, or over sequences of sums per window

Source of the latter: DeepSeek-V3.2 report, section 3.1, equations 5 to 9; asymmetric bounds and the mean over tokens: DAPO
(2025); sums per window: "Understanding R1-Zero-Like Training" (Dr. GRPO, 2025).
Logits never exist as a whole: `ops/cross_entropy.py` and `ops/logprobs.py` run the head together with what reads it.
"""

from __future__ import annotations

from typing import Literal

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


# ---- reinforcement learning -----------------------------------------------------------------------------------------

LARGEST_LOG_RATIO = 20.0
"""Log-ratios beyond this have no gradient: e^20 is far outside any bound, and an infinite loss would be worse than none."""

Mean = Literal["tokens", "sequences", "windows"]


def log_ratio(logprobs_M: Tensor, old_M: Tensor) -> Tensor:
    """log(π_θ / π_old), bounded by ±LARGEST_LOG_RATIO."""
    return (logprobs_M - old_M).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def clipped_loss(logprobs_M: Tensor, old_M: Tensor, advantages_M: Tensor, *, low: float, high: float) -> Tensor:
    """−min(r A, clip(r, 1 − low, 1 + high) A) of each token, `(M,)`.

    Args:
        logprobs_M: of the policy that learns, with gradient; `old_M`: of the one that drew the tokens.
        advantages_M: of each token's sample.
    """
    ratio = log_ratio(logprobs_M, old_M).exp()
    return -torch.minimum(ratio * advantages_M, ratio.clamp(1 - low, 1 + high) * advantages_M)


def is_clipped(logprobs_M: Tensor, old_M: Tensor, advantages_M: Tensor, *, low: float, high: float) -> Tensor:
    """Tokens whose ratio is at its bound, where the clipped loss has no gradient; bool `(M,)`."""
    ratio = log_ratio(logprobs_M, old_M).exp()
    return ((ratio < 1 - low) & (advantages_M < 0)) | ((ratio > 1 + high) & (advantages_M > 0))


def unbiased_kl(logprobs_M: Tensor, old_M: Tensor, reference_M: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) estimated at each token, `(M,)`: r (π_ref/π_θ − log(π_ref/π_θ) − 1), never negative.

    The ratio corrects for the tokens having been drawn by π_old, and it has a gradient: over many tokens this is the KL
    and the gradient that of the KL. Without the ratio the gradient would be biased, and unbounded where π_θ ≪ π_ref.
    """
    gap = reference_M - logprobs_M
    return log_ratio(logprobs_M, old_M).exp() * (gap.exp() - gap - 1)


def sequence_means(values_M: Tensor, sequence_M: Tensor, count: int) -> Tensor:
    """Mean of the values of each sequence, `(count,)`; 0 for one that has none.

    Args:
        sequence_M: int64, which sequence each value belongs to.
    """
    sums = values_M.new_zeros(count).index_add_(0, sequence_M, values_M)
    return sums / torch.bincount(sequence_M, minlength=count).clamp(min=1)


def kept_sequences(logprobs_M: Tensor, old_M: Tensor, sequence_M: Tensor, advantages_N: Tensor, delta: float) -> Tensor:
    """Which samples count in the clipped loss, bool `(N,)`; no gradient.

    Learning from one's own mistakes helps; pushing further away from a text that the policy would hardly write any more
    does not, and makes training unstable. So a sample with a negative advantage is left out where the mean over its tokens
    of log(π_old / π_θ) is above `delta`.
    """
    drift = sequence_means(old_M - logprobs_M.detach(), sequence_M, len(advantages_N))
    return (advantages_N >= 0) | (drift <= delta)


def mean_weights(counts_N: Tensor, mean: Mean, windows_N: Tensor | None = None) -> Tensor:
    """What each token of a sample weighs, float64 `(N,)`: the loss is the sum over all tokens of weight times term.

    Weights are of the whole batch, so that a batch can be computed in parts and the parts' losses added.

    Args:
        counts_N: written tokens of each sample, int64.
        mean: "tokens": all tokens of the batch weigh the same. "sequences": all samples weigh the same, whatever their
            length. "windows": a sample's terms are summed and divided by its window, so that neither short nor long
            answers are favoured.
        windows_N: tokens each sample might have had, for "windows".
    """
    counts = counts_N.double()
    if mean == "tokens":
        return torch.where(counts > 0, 1 / counts.sum().clamp(min=1), 0.0)
    if mean == "sequences":
        return torch.where(counts > 0, 1 / (len(counts) * counts.clamp(min=1)), 0.0)
    assert windows_N is not None, "the mean over windows needs the windows"
    return torch.where(counts > 0, 1 / (len(counts) * windows_N.double()), 0.0)
