"""The head and the log-probabilities of given tokens in one, a few positions at a time, with the entropy beside them.

    log p_m = z_m[target_m] − log Σ_v e^{z_m[v]},   z_m = h_m Wᵀ / T      v over the vocabulary, or over what was kept of it
    H_m     = log Σ_v e^{z_m[v]} − Σ_v p_m[v] z_m[v]                      no gradient

Reinforcement learning needs these of every token that was drawn, by several sets of weights. As in `ops/cross_entropy.py`
logits never exist as a whole; but what a position's log-probability counts for (its advantage, and whether its ratio is
clipped) is known only behind it, so the way back computes each chunk of logits once more.

A token drawn with temperature T and from a truncated distribution (top-k, top-p, min-p) was drawn from softmax(logits / T)
over the ids that were left: `Kept` holds these ids, so that later weights are measured on the same ones. Source: "keep
sampling mask", DeepSeek-V3.2 report, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512


class Kept(NamedTuple):
    """The ids that could be drawn at each position.

    Attributes:
        ids: int32 `(total,)`, position after position.
        offsets: int64 `(M + 1,)`, on the CPU; those of position m are `ids[offsets[m] : offsets[m + 1]]`.
    """

    ids: Tensor
    offsets: Tensor

    def mask(self, start: int, stop: int, vocabulary: int) -> Tensor:
        """bool `(stop - start, V)`: which ids positions `start` to `stop` kept."""
        counts = self.offsets[start + 1 : stop + 1] - self.offsets[start:stop]
        rows = torch.repeat_interleave(torch.arange(stop - start), counts).to(self.ids.device)
        ids = self.ids[int(self.offsets[start]) : int(self.offsets[stop])].long()
        out = torch.zeros(stop - start, vocabulary, dtype=torch.bool, device=self.ids.device)
        out[rows, ids] = True
        return out


def head_logprobs(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float = 1.0, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden Wᵀ / temperature), and the entropy there, in nats.

    Args:
        hidden_MD, weight_VD: any float dtype; logits are float32 (float64 for float64 hidden states).
        targets_M: int64. With `kept`, each is among its position's ids.
        temperature: above 0.
        kept: draw among these ids only; None keeps all.

    Returns:
        (log-probabilities `(M,)`, entropy `(M,)`), of the logits' dtype. The first has gradients to `hidden_MD` and
        `weight_VD`, in their dtypes, once (no double backward); the second has none.
    """
    assert temperature > 0, temperature
    return _HeadLogprobs.apply(hidden_MD, weight_VD, targets_M, temperature, kept)  # pyright: ignore[reportReturnType]


def head_logprobs_reference(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float = 1.0, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """The same on whole logits, left to autograd."""
    wide = _wide(hidden_MD)
    logits = hidden_MD.to(wide) @ weight_VD.to(wide).t() / temperature
    if kept is not None:
        logits = logits.masked_fill(~kept.mask(0, len(targets_M), logits.shape[1]), -torch.inf)
    logprobs = logits.log_softmax(dim=-1)
    entropy = torch.special.entr(logprobs.detach().exp()).sum(dim=-1)
    return logprobs.gather(1, targets_M[:, None])[:, 0], entropy


class _HeadLogprobs(torch.autograd.Function):
    """Saves the two inputs and one normaliser per position."""

    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float, kept: Kept | None):
        weight = weight_VD.to(_wide(hidden_MD))
        logprobs, entropy, normalisers = (hidden_MD.new_empty(len(targets_M), dtype=weight.dtype) for _ in range(3))
        for start in range(0, len(targets_M), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _logits(hidden_MD, weight, start, temperature, kept)
            chosen = logits.gather(1, targets_M[part, None])[:, 0]
            largest = logits.amax(dim=1, keepdim=True)
            logits.sub_(largest)
            exponentials = logits.exp()
            total = exponentials.sum(dim=1)
            # Σ e^z z; an id that was not kept has z = −inf, and its e^z z is 0, which a product would not give
            weighted = (exponentials * logits if kept is None else torch.special.entr(exponentials).neg_()).sum(dim=1)
            normalisers[part] = total.log() + largest[:, 0]
            logprobs[part] = chosen - normalisers[part]
            entropy[part] = total.log() - weighted / total
        ctx.save_for_backward(hidden_MD, weight_VD, targets_M, normalisers)
        ctx.temperature, ctx.kept = temperature, kept
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, upstream_M: Tensor, _: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MD, weight_VD, targets_M, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(normalisers.dtype)
        hidden_gradient = torch.empty_like(hidden_MD) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight) if wants_weight else None
        for start in range(0, len(targets_M), CHUNK):
            part = slice(start, start + CHUNK)
            scale = upstream_M[part, None] / ctx.temperature
            gradient = _logits(hidden_MD, weight, start, ctx.temperature, ctx.kept)
            gradient.sub_(normalisers[part, None]).exp_().mul_(-scale)
            gradient.scatter_add_(1, targets_M[part, None], scale)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ weight
            if weight_gradient is not None:
                weight_gradient.addmm_(gradient.t(), hidden_MD[part].to(weight.dtype))
        weight_gradient = weight_gradient.to(weight_VD.dtype) if weight_gradient is not None else None
        return hidden_gradient, weight_gradient, None, None, None


def _logits(hidden_MD: Tensor, weight: Tensor, start: int, temperature: float, kept: Kept | None) -> Tensor:
    """Of one chunk of positions, divided by the temperature, minus infinity where an id was not kept."""
    hidden = hidden_MD[start : start + CHUNK].to(weight.dtype)
    logits = F.linear(hidden, weight)
    if temperature != 1:
        logits.div_(temperature)
    if kept is not None:
        logits.masked_fill_(~kept.mask(start, start + len(hidden), logits.shape[1]), -torch.inf)
    return logits


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
