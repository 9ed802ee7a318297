"""Samples laid out for training, and what is kept of the policy that drew them: experts, kept ids, log-probabilities.

    batches = lay_out(samples, chosen, row_tokens=8192, device=device)      one sample a row, like lengths together
    for rows in batches:
        record(model, rows, params, covered)                                before the first update: the scoring pass
    …
    states = model.features(rows.tokens, routing=rows.routing, …)           in every update behind it

Why: between two updates on the same samples the weights change a little, and with them the experts that some tokens go to.
A token then passes through weights that had nothing to do with its having been drawn, its ratio jumps, and training becomes
unstable. *Routing replay* sends every token to the experts it was drawn with; scores still have gradients, so the router
learns. The same holds for truncation: a token drawn among the likeliest ids must be compared among the same ids, or the
policies are not defined on the same space (*sampling-mask replay*). Source: DeepSeek-V3.2 report, section 3.1.

Rows are not packed: samples of like length, one a row, are one piece of work for every layer, where packed ones are a piece
each. Measured on preset micro, one thread, 256 samples of 40 to 120 tokens, forward and backward: 5,600 tokens/s in batches
of 4,096 positions (7 % of them padding), 2,100 tokens/s packed into rows of 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.engine.sampler import UNIT
from longreach.engine.sampling import SamplingParams
from longreach.evaluate.episode import Sample
from longreach.model.transformer import Transformer
from longreach.ops.logprobs import CHUNK, Kept, head_logprobs
from longreach.train.balance import is_hashed


@dataclass
class Rows:
    """Samples that go through the model together, one a row, padded on the right.

    Attributes:
        samples: their places in the list they came from, row by row.
        tokens_BT: all but each sample's last token, which predicts nothing.
        real_BT: bool, False at padding.
        places_M: int64, for each written token the position before it, counted through the flattened rows.
        targets_M: int64, the written tokens; `rows_M`: the row of each.
        sampled_M: float32, their log-probabilities as the source told them; None if it did not.
        routing: layer → experts int64 `(B, T, K)` of the policy that drew them; None before the scoring pass.
        kept: ids that could be drawn, where the distribution was truncated.
        old_M: log-probabilities by the policy that drew them, of the tempered and truncated distribution.
        reference_M: the same by the reference model.
    """

    samples: list[int]
    tokens_BT: Tensor
    real_BT: Tensor
    places_M: Tensor
    targets_M: Tensor
    rows_M: Tensor
    sampled_M: Tensor | None
    routing: dict[int, Tensor] | None = None
    kept: Kept | None = None
    old_M: Tensor | None = None
    reference_M: Tensor | None = None

    def reading(self, covered: int) -> dict[str, Any]:
        """Arguments of `Transformer.features` for these rows.

        Args:
            covered: length up to which the indexers would select every entry there is. Such rows are read with dense
                attention, which gives the same for less. In longer ones indexers are at work and learn, from real tokens
                alone, so that every row's length is told.
        """
        if self.tokens_BT.shape[1] <= covered:
            return {"attention": "dense"}
        return {"attention": "sparse", "lengths": self.real_BT.sum(dim=1).tolist()}


def lay_out(samples: Sequence[Sample], chosen: Sequence[int], *, row_tokens: int, device: torch.device) -> list[Rows]:
    """Samples in batches of at most `row_tokens` positions, padding included; a longer one has a batch of its own.

    The order depends on the samples alone, so that a step that is repeated after a crash adds the same numbers in the same
    order. Samples in which the model wrote nothing (a prompt that filled its window) are left out.

    Args:
        chosen: places of the samples to lay out.
    """
    written = [place for place in chosen if any(samples[place].written)]
    order = sorted(written, key=lambda place: (_length(samples[place]), place))
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * _length(samples[place]) <= row_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return [_rows(samples, places, device) for places in batches]


def _length(sample: Sample) -> int:
    """Positions a sample takes in its row."""
    return len(sample.prompt) + len(sample.tokens) - 1


def _rows(samples: Sequence[Sample], chosen: list[int], device: torch.device) -> Rows:
    T = max(_length(samples[place]) for place in chosen)
    tokens_BT = torch.zeros(len(chosen), T, dtype=torch.int64)
    real_BT = torch.zeros(len(chosen), T, dtype=torch.bool)
    places, targets, rows = [], [], []
    sampled: list[float] | None = []
    for row, place in enumerate(chosen):
        sample = samples[place]
        ids = sample.prompt + sample.tokens
        tokens_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        real_BT[row, : len(ids) - 1] = True
        behind = [at for at, mine in enumerate(sample.written) if mine]
        first = row * T + len(sample.prompt) - 1
        places += [first + at for at in behind]
        targets += [sample.tokens[at] for at in behind]
        rows += [row] * len(behind)
        if sample.logprobs is None:
            sampled = None
        elif sampled is not None:
            sampled += [sample.logprobs[at] for at in behind]
    return Rows(
        chosen, tokens_BT.to(device), real_BT.to(device), torch.tensor(places, device=device),
        torch.tensor(targets, device=device), torch.tensor(rows, device=device),
        torch.tensor(sampled, dtype=torch.float32, device=device) if sampled is not None else None,
    )  # fmt: skip


# ---- the scoring pass -----------------------------------------------------------------------------------------------


def is_plain(params: SamplingParams) -> bool:
    """Whether tokens are drawn from the model's own distribution, so that reported log-probabilities are of it."""
    return params.temperature == 1 and not truncates(params)


def truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


@torch.no_grad()
def record(model: Transformer, rows: Rows, params: SamplingParams, covered: int) -> float | None:
    """Keep of these rows what the model, with the weights that drew them, does with them: experts, kept ids, log-probabilities.

    Args:
        covered: as in `Rows.reading`.

    Returns:
        the largest difference of a log-probability from the one that was reported when the token was drawn (both of the
        model's own distribution), in nats; None where none was reported.
    """
    features = model.features(rows.tokens_BT, keep=("routing",), **rows.reading(covered))
    rows.routing = {layer: chosen for layer, chosen in features.routing.items() if not is_hashed(model, layer)}
    states_MD = features.hidden.flatten(0, 1)[rows.places_M]
    weight = model.head.weight
    if truncates(params):
        rows.kept = kept_ids(states_MD, weight, rows.targets_M, params)
    rows.old_M, _ = head_logprobs(states_MD, weight, rows.targets_M, params.temperature, rows.kept)
    if rows.sampled_M is None or not len(rows.targets_M):
        return None
    own_M = rows.old_M if is_plain(params) else head_logprobs(states_MD, weight, rows.targets_M)[0]
    return (own_M - rows.sampled_M).abs().max().item()


def kept_ids(states_MD: Tensor, head_weight_VD: Tensor, targets_M: Tensor, params: SamplingParams) -> Kept:
    """The ids that top_k, top_p and min_p left at each position, as steps 6 to 9 of `longreach.engine.sampler`.

    A target is always among them: it was drawn, and where rounding has it just outside here it was just inside there.
    """
    ids, counts = [], []
    weight = head_weight_VD.float()
    for states, targets in zip(states_MD.split(CHUNK), targets_M.split(CHUNK), strict=True):
        mask_MV = kept_mask(states.float() @ weight.t(), params)
        mask_MV.scatter_(1, targets[:, None], True)
        ids.append(mask_MV.nonzero()[:, 1].int())
        counts.append(mask_MV.sum(dim=1).cpu())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    return Kept(torch.cat(ids), offsets)


def kept_mask(logits_MV: Tensor, params: SamplingParams) -> Tensor:
    """bool `(M, V)`: the ids that can be drawn."""
    ranked = logits_MV.sort(dim=1, descending=True, stable=True)  # among equals the lower id comes first
    tempered_MV = ranked.values.double() / params.temperature
    if 0 < params.top_k < tempered_MV.shape[1]:
        tempered_MV[:, params.top_k :] = -torch.inf
    probabilities_MV = tempered_MV.softmax(dim=1)
    kept_MV = (probabilities_MV > 0) & (probabilities_MV >= params.min_p * probabilities_MV[:, :1])
    if params.top_p < 1:
        units_MV = (probabilities_MV * UNIT).round_()
        kept_MV &= units_MV.cumsum(dim=1) - units_MV < params.top_p * units_MV.sum(dim=1, keepdim=True)
    return torch.zeros_like(kept_MV).scatter_(1, ranked.indices, kept_MV)
