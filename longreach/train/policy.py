"""One step's samples become updates of the policy: replay, forward, clipped loss, backward, step.

    −min(r A, clip(r) A) · [sample not left out] + β KL        averaged over the written tokens (train/losses.py)
    + 1e-4 balance                                             router; to all weights but the indexers'
    + KL(attention ‖ indexer)                                  where samples are longer than the indexers select whole

Before the first of several updates a *scoring pass* by the weights that drew the samples keeps what later ones must not
change (train/replay.py). With a single update on samples of the model's own distribution there is nothing to keep: the
weights are still those that drew them, so experts are the same and log-probabilities those of the journal, and the pass is
left out. Samples whose advantage is 0 move nothing; unless the KL is on they are not computed either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.episode import Sample
from longreach.model.transformer import Transformer
from longreach.ops.logprobs import head_logprobs
from longreach.runtime import log, synchronise
from longreach.train.balance import expert_balance, indexer_figures, is_hashed
from longreach.train.losses import (
    balance_loss,
    clipped_loss,
    is_clipped,
    kept_sequences,
    log_ratio,
    mean_weights,
    unbiased_kl,
)
from longreach.train.replay import Rows, is_plain, lay_out, record
from longreach.train.sft import BALANCE, covered_tokens
from longreach.train.tuning import Tuning

WARMUP_STEPS = 5

LARGEST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Nats by which a log-probability may differ between the engine and the training pass before a line says so."""

ROW_TOKENS = {"cpu": 4096, "cuda": 65_536}


class Policy:
    """Learns from one step's samples after another's.

    Args:
        params: of the sampling.
        reference: frozen model for the KL; None where its weight is 0.
        is_elsewhere: samples come from a server, whose weights or arithmetic may be others: its log-probabilities, not
            those of this process, are of the policy that drew them.
    """

    def __init__(
        self, tuning: Tuning, params: SamplingParams, reference: Transformer | None, is_elsewhere: bool
    ) -> None:
        self.tuning, self.params, self.reference, self.is_elsewhere = tuning, params, reference, is_elsewhere
        self.settings: Mapping[str, Any] = tuning.settings
        self.row_tokens: int = self.settings["row_tokens"] or ROW_TOKENS.get(tuning.device.type, ROW_TOKENS["cuda"])
        self.covered = covered_tokens(tuning.master.config)
        self.has_warned = False

    @property
    def scoring(self) -> str:
        """Why a scoring pass is needed; empty if it is not."""
        if self.settings["updates"] * self.settings["minibatches"] > 1:
            return "several updates per step"
        return "" if is_plain(self.params) else "a distribution that is tempered or truncated"

    def learn(self, samples: Sequence[Sample], advantages_N: Tensor, group_size: int) -> dict[str, Any]:
        """Take a step's updates; ends the step. Returns its figures.

        Args:
            advantages_N: of the samples, group after group.

        Raises:
            RequestError: the loss or the gradient is not finite; the weights that are saved stay.
        """
        settings, tuning = self.settings, self.tuning
        start = time.perf_counter()
        advantages_N = advantages_N.float().to(tuning.device)
        parts = split_groups(len(samples), group_size, settings["minibatches"])
        everything = settings["kl"] > 0
        batches = [
            lay_out(samples, [n for n in part if everything or advantages_N[n] != 0], row_tokens=self.row_tokens,
                    device=tuning.device)
            for part in parts
        ]  # fmt: skip
        weights_N = torch.zeros(len(samples))
        for part in parts:
            weights_N[part] = self.weights(samples, part).float()
        weights_N = weights_N.to(tuning.device)

        figures = Figures()
        self.score([rows for part in batches for rows in part], figures)
        todo = [part for _ in range(settings["updates"]) for part in batches if part]
        norms = []
        factor = min(1.0, (tuning.step + 1) / WARMUP_STEPS)
        for part in todo:
            routing: dict[int, list[Tensor]] = {}
            rows_in_part = sum(len(rows.samples) for rows in part)
            for rows in part:
                chosen = self.backward(rows, advantages_N, weights_N, len(rows.samples) / rows_in_part, figures)
                for layer, experts in chosen.items():
                    routing.setdefault(layer, []).append(experts[rows.real_BT])
            joined = {layer: torch.cat(experts) for layer, experts in routing.items()}
            norm = tuning.update(joined, lr_factor=factor, ends_step=False)
            if not math.isfinite(norm):
                raise self.not_finite("gradient", norm)
            norms.append(norm)
            figures.experts = expert_balance(joined, tuning.model.config.n_routed_experts)
        tuning.end_step()
        synchronise(tuning.device)
        seconds = time.perf_counter() - start
        self.warn(figures)
        return figures.record(len(norms)) | {
            "grad_norm": max(norms, default=0.0), "lr": settings["lr"] * factor, "updates": len(norms),
            "update_s": seconds, "update_tokens_per_s": figures.positions / seconds,
        }  # fmt: skip

    def weights(self, samples: Sequence[Sample], part: Sequence[int]) -> Tensor:
        """What each token of these samples weighs in the part's loss."""
        counts = torch.tensor([samples[n].num_written for n in part])
        windows = torch.tensor([max(1, samples[n].job.window - len(samples[n].prompt)) for n in part])
        return mean_weights(counts, self.settings["mean"], windows)

    def score(self, batches: Sequence[Rows], figures: Figures) -> None:
        """The scoring pass, where it is needed, and that of the reference model."""
        model = self.tuning.model
        for rows in batches:
            told = rows.sampled_M is not None and is_plain(self.params)
            if self.scoring or not told:
                figures.see_gap(record(model, rows, self.params, self.covered))
            if told and (self.is_elsewhere or rows.old_M is None):
                rows.old_M = rows.sampled_M
            if self.reference is not None:
                rows.reference_M = self.reference_logprobs(self.reference, rows)

    @torch.no_grad()
    def reference_logprobs(self, reference: Transformer, rows: Rows) -> Tensor:
        """By the frozen model, with its own experts, of the distribution that was drawn from."""
        hidden = reference.features(rows.tokens_BT, keep=(), **rows.reading(self.covered)).hidden
        states_MD = hidden.flatten(0, 1)[rows.places_M]
        return head_logprobs(states_MD, reference.head.weight, rows.targets_M, self.params.temperature, rows.kept)[0]

    def backward(
        self, rows: Rows, advantages_N: Tensor, weights_N: Tensor, share: float, figures: Figures
    ) -> dict[int, Tensor]:
        """Add the gradients of these rows; returns the experts they went to.

        Args:
            share: of the rows of this update, for the losses that are means over rows.

        Raises:
            RequestError: the loss is not finite.
        """
        settings, model = self.settings, self.tuning.model
        reading = rows.reading(self.covered)
        keep = ["routing", "router_scores", *(["index_loss"] if reading["attention"] == "sparse" else [])]
        features = model.features(rows.tokens_BT, routing=rows.routing, keep=keep, **reading)
        states_MD = features.hidden.flatten(0, 1)[rows.places_M]
        logprobs_M, entropy_M = head_logprobs(
            states_MD, model.head.weight, rows.targets_M, self.params.temperature, rows.kept
        )
        old_M = rows.old_M
        assert old_M is not None, "these rows were not scored"
        advantages_B = advantages_N[rows.samples]
        advantages_M, weights_M = advantages_B[rows.rows_M], weights_N[rows.samples][rows.rows_M]

        bounds = {"low": settings["clip_low"], "high": settings["clip_high"]}
        kept_B = kept_sequences(logprobs_M, old_M, rows.rows_M, advantages_B, settings["delta"])
        terms_M = clipped_loss(logprobs_M, old_M, advantages_M, **bounds) * kept_B[rows.rows_M]
        if rows.reference_M is not None:
            kl_M = unbiased_kl(logprobs_M, old_M, rows.reference_M)
            terms_M = terms_M + settings["kl"] * kl_M
            figures.kl = (figures.kl or 0.0) + kl_M.sum().item()
        loss = (terms_M * weights_M).sum()
        if not math.isfinite(loss.item()):
            raise self.not_finite("loss", loss.item())

        objective = loss
        balance = [
            balance_loss(scores, features.routing[layer], rows.real_BT)
            for layer, scores in features.router_scores.items() if not is_hashed(model, layer)
        ]  # fmt: skip
        if balance:
            objective = objective + share * BALANCE * torch.stack(balance).sum()
        if features.index_loss:
            objective = objective + share * torch.stack([part.mean for part in features.index_loss.values()]).sum()
            figures.index_loss.append((share, indexer_figures(features)["index_loss"]))
        objective.backward()

        with torch.no_grad():
            ratio_M = log_ratio(logprobs_M, old_M).exp()
            figures.loss += loss.item()
            figures.tokens += len(ratio_M)
            figures.positions += int(rows.real_BT.sum())
            figures.entropy += entropy_M.sum().item()
            figures.ratio += ratio_M.sum().item()
            figures.largest_ratio = max(figures.largest_ratio, ratio_M.max().item())
            figures.clipped += int(is_clipped(logprobs_M, old_M, advantages_M, **bounds).sum())
            figures.samples += len(rows.samples)
            figures.left_out += len(rows.samples) - int(kept_B.sum())
            if rows.routing is None and rows.sampled_M is not None:
                figures.see_gap((logprobs_M - rows.sampled_M).abs().max().item())
        return features.routing

    def not_finite(self, what: str, value: float) -> RequestError:
        return RequestError(
            f"the {what} became {value} at step {self.tuning.step + 1}; the last checkpoint stays: start again from it "
            f"with a --lr below {self.settings['lr']:g}"
        )

    def warn(self, figures: Figures) -> None:
        """Say once that engine and training do not compute the same."""
        limit = LARGEST_GAP.get(self.tuning.model.dtype, 0.5)
        if figures.gap is None or figures.gap <= limit or self.has_warned or self.is_elsewhere:
            return
        self.has_warned = True
        log.warning(
            "a token's log-probability is %.3g nats other in training than when it was drawn (%g is usual); ratios and "
            "masks are off by as much", figures.gap, limit,
        )  # fmt: skip


class Figures:
    """Sums over the tokens and samples of a step's updates."""

    def __init__(self) -> None:
        self.loss = self.entropy = self.ratio = self.largest_ratio = 0.0
        self.tokens = self.positions = self.clipped = self.samples = self.left_out = 0
        self.index_loss: list[tuple[float, float]] = []
        self.experts: float | None = None
        self.gap: float | None = None
        self.kl: float | None = None

    def see_gap(self, gap: float | None) -> None:
        if gap is not None:
            self.gap = max(gap, self.gap or 0.0)

    def record(self, updates: int) -> dict[str, Any]:
        """For metrics.jsonl; what no sample contributed to is left out."""
        if not self.tokens:
            return {"learned_samples": 0}
        out: dict[str, Any] = {
            "policy_loss": self.loss / updates, "entropy": self.entropy / self.tokens, "ratio_mean": self.ratio / self.tokens,
            "ratio_max": self.largest_ratio, "clip_share": self.clipped / self.tokens, "masked_samples": self.left_out,
            "learned_samples": self.samples, "expert_balance": self.experts,
            "logprob_gap": self.gap,
        }  # fmt: skip
        if self.kl is not None:
            out["kl"] = self.kl / self.tokens
        if self.index_loss:
            out["index_loss"] = sum(share * loss for share, loss in self.index_loss) / sum(
                s for s, _ in self.index_loss
            )
        return out


def split_groups(samples: int, group_size: int, parts: int) -> list[list[int]]:
    """Places of the samples in so many parts, whole groups each, as even as they can be.

    Groups of one task stand at regular distances, so every part takes each `parts`-th group.
    """
    groups = samples // group_size
    return [
        [group * group_size + member for group in range(part, groups, parts) for member in range(group_size)]
        for part in range(parts)
    ]
