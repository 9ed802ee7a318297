"""The same loss and the same gradients as TRL's GRPOTrainer on settings that both have.

TRL's own `_compute_loss` runs on a small model; everything in it that is not mathematics (accelerator, records) is replaced.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from longreach.ops.logprobs import head_logprobs
from longreach.train.losses import Mean, clipped_loss, kept_sequences, mean_weights, unbiased_kl
from longreach.train.rewards import group_advantages

PROMPT, LONGEST, V, D = 3, 7, 19, 12
LOW, HIGH = 0.2, 0.28


class SmallModel(nn.Module):
    """A token's logits from the running mean of what stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        counts = torch.arange(1, tokens_BT.shape[1] + 1)[:, None]
        return torch.tanh(self.embed(tokens_BT).cumsum(dim=1) / counts)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """As transformers' fused head answers: the log-probability of each token, and the entropy it was drawn with."""
        logprobs_BTV = self.head(self.hidden(input_ids)[:, :-1]).log_softmax(dim=-1)
        chosen = logprobs_BTV.gather(-1, input_ids[:, 1:, None])[..., 0]
        entropy = -(logprobs_BTV.exp() * logprobs_BTV).sum(dim=-1)
        return SimpleNamespace(log_probs=nn.functional.pad(chosen, (1, 0)), entropy=nn.functional.pad(entropy, (1, 0)))


class Drawn:
    """A batch of two groups of four, as both sides want it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = SmallModel()
        self.tokens = torch.randint(0, V, (8, PROMPT + LONGEST))
        self.lengths = torch.randint(1, LONGEST + 1, (8,))
        self.mask = torch.arange(LONGEST) < self.lengths[:, None]
        self.rewards = torch.rand(2, 4, dtype=torch.float64)
        with torch.no_grad():
            now = self.model(self.tokens).log_probs[:, PROMPT:]
        drift = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64)[torch.randperm(8), None]  # of whole sequences
        self.old = now + drift + 0.2 * torch.randn_like(now)
        self.reference = now + 0.3 * torch.randn_like(now)


class TRL:
    """The parts of a GRPOTrainer that its loss asks for."""

    _compute_loss = GRPOTrainer._compute_loss
    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies
    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)

    def __init__(self, model: nn.Module, loss_type: str, beta: float, delta: float | None) -> None:
        self.model, self.loss_type, self.beta, self.off_policy_mask_threshold = model, loss_type, beta, delta
        self.epsilon_low, self.epsilon_high, self.max_completion_length = LOW, HIGH, LONGEST
        self.importance_sampling_level, self.top_entropy_quantile = "token", 1.0
        self.args = SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1)
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.current_gradient_accumulation_steps = 1
        self._metrics = {"train": defaultdict(list)}
        self.accelerator = SimpleNamespace(
            num_processes=1, is_main_process=True, autocast=nullcontext, gather=lambda x: x, reduce=lambda x, **_: x
        )


def trl_loss(drawn: Drawn, advantages: Tensor, loss_type: str, beta: float, delta: float | None) -> tuple[Tensor, TRL]:
    trainer = TRL(drawn.model, loss_type, beta, delta)
    inputs = {
        "prompt_ids": drawn.tokens[:, :PROMPT], "prompt_mask": torch.ones(8, PROMPT, dtype=torch.int64),
        "completion_ids": drawn.tokens[:, PROMPT:], "completion_mask": drawn.mask.long(), "advantages": advantages,
        "old_per_token_logps": drawn.old, "ref_per_token_logps": drawn.reference, "num_items_in_batch": drawn.mask.sum(),
    }  # fmt: skip
    return trainer._compute_loss(drawn.model, inputs), trainer


def own_loss(drawn: Drawn, advantages: Tensor, mean: Mean, beta: float, delta: float | None) -> tuple[Tensor, Tensor]:
    hidden = drawn.model.hidden(drawn.tokens)[:, PROMPT - 1 : -1][drawn.mask]
    logprobs, entropy = head_logprobs(hidden, drawn.model.head.weight, drawn.tokens[:, PROMPT:][drawn.mask])
    sequence = torch.arange(8).repeat_interleave(drawn.lengths)
    old = drawn.old[drawn.mask]
    terms = clipped_loss(logprobs, old, advantages[sequence], low=LOW, high=HIGH)
    if delta is not None:
        terms = terms * kept_sequences(logprobs, old, sequence, advantages, delta)[sequence]
    if beta:
        terms = terms + beta * unbiased_kl(logprobs, old, drawn.reference[drawn.mask])
    weights = mean_weights(drawn.lengths, mean, torch.full((8,), LONGEST))
    return (terms * weights[sequence]).sum(), entropy


@pytest.mark.parametrize("delta", [None, 0.1])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize(
    ("loss_type", "mean"), [("grpo", "sequences"), ("dapo", "tokens"), ("bnpo", "tokens"), ("dr_grpo", "windows")]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradients_equal_those_of_trl(seed, loss_type, mean, beta, delta):
    drawn = Drawn(seed)
    advantages = group_advantages(drawn.rewards)[0].flatten()
    theirs, trainer = trl_loss(drawn, advantages, loss_type, beta, delta)
    ours, entropy = own_loss(drawn, advantages, mean, beta, delta)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    parameters = list(drawn.model.parameters())
    for mine, right in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-12, rtol=1e-9)
    assert entropy.mean().item() == pytest.approx(trainer._metrics["train"]["entropy"][0])


def test_the_settings_under_which_losses_were_compared_clip_tokens_and_leave_sequences_out():
    """Otherwise equal losses would say little."""
    drawn = Drawn(0)
    advantages = group_advantages(drawn.rewards)[0].flatten()
    _, trainer = trl_loss(drawn, advantages, "grpo", 0.0, None)
    assert (
        trainer._metrics["train"]["clip_ratio/low_mean"][0] > 0
        and trainer._metrics["train"]["clip_ratio/high_mean"][0] > 0
    )
    assert trl_loss(drawn, advantages, "grpo", 0.0, 0.1)[0] != trl_loss(drawn, advantages, "grpo", 0.0, None)[0]
