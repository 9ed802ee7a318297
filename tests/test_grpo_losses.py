"""GRPO's pure parts: log-probabilities out of the head, the clipped loss, KL, masks, weights, advantages, penalties."""

from __future__ import annotations

import math

import pytest
import torch

from longreach.ops import logprobs as op
from longreach.ops.logprobs import Kept, head_logprobs, head_logprobs_reference
from longreach.train.losses import clipped_loss, is_clipped, kept_sequences, mean_weights, sequence_means, unbiased_kl
from longreach.train.rewards import group_advantages, length_penalties


def some_kept(M: int, V: int, targets: torch.Tensor) -> Kept:
    """Between 1 and V ids per position, the target among them."""
    parts = [
        torch.cat([targets[m : m + 1], torch.randperm(V)[: int(torch.randint(0, V, ()))]]).unique() for m in range(M)
    ]
    offsets = torch.tensor([0, *[len(part) for part in parts]]).cumsum(0)
    return Kept(torch.cat(parts).int(), offsets)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("M", [1, 7, 40])
def test_chunked_log_probabilities_equal_those_of_whole_logits(monkeypatch, M, temperature, truncated):
    monkeypatch.setattr(op, "CHUNK", 16)
    torch.manual_seed(M)
    V, D = 23, 8
    hidden = torch.randn(M, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (M,))
    kept = some_kept(M, V, targets) if truncated else None
    upstream = torch.randn(M, dtype=torch.float64)
    results = []
    for function in (head_logprobs, head_logprobs_reference):
        logprobs, entropy = function(hidden, weight, targets, temperature, kept)
        gradients = torch.autograd.grad(logprobs @ upstream, (hidden, weight))
        results.append([logprobs, entropy, *gradients])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-10)
    assert not results[0][1].requires_grad


def test_the_gradient_of_the_log_probabilities_is_that_of_finite_differences():
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (5,))
    kept = some_kept(5, 9, targets)
    for given in (None, kept):
        assert torch.autograd.gradcheck(lambda h, w, k=given: head_logprobs(h, w, targets, 0.8, k)[0], (hidden, weight))


def test_log_probabilities_by_hand_with_a_temperature_and_two_kept_ids():
    # logits 2, 0, 1 at temperature 2 are 1, 0, 0.5; of them ids 0 and 2 were kept
    weight = torch.tensor([[2.0], [0.0], [1.0]])
    kept = Kept(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2]))
    logprobs, entropy = head_logprobs(torch.ones(1, 1), weight, torch.tensor([0]), 2.0, kept)
    p = math.exp(1) / (math.exp(1) + math.exp(0.5))
    assert logprobs.item() == pytest.approx(math.log(p), abs=1e-6)
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)


def test_half_precision_inputs_are_measured_in_float32_and_get_gradients_of_their_own_dtype():
    torch.manual_seed(0)
    hidden = torch.randn(6, 16).bfloat16().requires_grad_()
    weight = torch.randn(30, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 30, (6,))
    logprobs, entropy = head_logprobs(hidden, weight, targets)
    plain, plain_entropy = head_logprobs_reference(hidden, weight, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, plain)
    torch.testing.assert_close(entropy, plain_entropy)
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_logits_of_a_thousand_overflow_nothing():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -2000.0] and entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert hidden.grad.isfinite().all()


def test_no_position_at_all_gives_nothing_and_no_gradient():
    weight = torch.randn(5, 3, requires_grad=True)
    logprobs, entropy = head_logprobs(torch.empty(0, 3), weight, torch.empty(0, dtype=torch.int64))
    assert len(logprobs) == len(entropy) == 0
    logprobs.sum().backward()
    assert not weight.grad.any()


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.25, 2.0, -2.5, -2.5, False),  # below 1 + 0.28
        (1.5, 2.0, -2.56, 0.0, True),
        (1.5, -2.0, 3.0, 3.0, False),  # worse than it was, and the advantage is against it: no bound
        (0.5, -2.0, 1.6, 0.0, True),  # below 1 - 0.2
        (0.5, 2.0, -1.0, -1.0, False),
    ],
)
def test_the_clipped_loss_and_its_slope_by_hand(ratio, advantage, value, slope, clipped):
    old = torch.tensor([-1.0])
    new = (old + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([advantage])
    loss = clipped_loss(new, old, advantages, low=0.2, high=0.28)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-5)
    assert new.grad.item() == pytest.approx(slope, abs=1e-5)  # d loss / d log-probability = −ratio · advantage
    assert is_clipped(new.detach(), old, advantages, low=0.2, high=0.28).item() == clipped


def test_a_ratio_beyond_all_bounds_gives_a_finite_loss_and_no_gradient():
    new = torch.tensor([0.0, -300.0], requires_grad=True)
    loss = clipped_loss(new, torch.tensor([-300.0, 0.0]), torch.tensor([-1.0, -1.0]), low=0.2, high=0.28)
    loss.sum().backward()
    assert loss.isfinite().all() and new.grad.tolist() == [0.0, 0.0]


def test_the_expected_kl_term_is_the_kl_and_its_expected_gradient_the_gradient_of_the_kl():
    """Over all tokens of a small vocabulary, weighted by the policy that draws: exactly what "unbiased" means."""
    torch.manual_seed(0)
    logits = torch.randn(11, dtype=torch.float64, requires_grad=True)
    old, reference = (torch.randn(11, dtype=torch.float64).log_softmax(0) for _ in range(2))
    new = logits.log_softmax(0)
    expected = (old.exp() * unbiased_kl(new, old, reference)).sum()
    truth = (new.exp() * (new - reference)).sum()
    torch.testing.assert_close(expected, truth)
    (mine,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (right,) = torch.autograd.grad(truth, logits)
    torch.testing.assert_close(mine, right)


def test_sequences_far_from_the_policy_that_drew_them_are_left_out_only_if_they_were_bad():
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])
    old = torch.zeros(6)
    new = torch.tensor([-0.9, -0.3, -0.9, -0.3, -0.2, -0.4])  # mean log(old / new): 0.6, 0.6, 0.3
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    assert kept_sequences(new, old, sequence, advantages, delta=0.5).tolist() == [False, True, True]
    assert kept_sequences(new, old, sequence, advantages, delta=0.7).tolist() == [True, True, True]


def test_means_over_sequences_count_each_token_once():
    means = sequence_means(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 0, 2]), 3)
    assert means.tolist() == [2.0, 0.0, 10.0]


def test_weights_of_the_three_means_by_hand():
    counts = torch.tensor([1, 3])
    assert mean_weights(counts, "tokens").tolist() == [0.25, 0.25]
    torch.testing.assert_close(mean_weights(counts, "sequences"), torch.tensor([1 / 2, 1 / 6], dtype=torch.float64))
    windows = torch.tensor([10, 20])
    assert mean_weights(counts, "windows", windows).tolist() == [1 / 20, 1 / 40]
    assert mean_weights(torch.tensor([0, 0]), "tokens").tolist() == [0.0, 0.0]
    assert mean_weights(torch.tensor([0, 2]), "sequences").tolist() == [0.0, 0.25]


def test_gradients_over_a_whole_batch_equal_plain_autograd_on_padded_logits():
    """The sum of all terms, as the loop takes it, against the formula written out on (sequences, tokens, vocabulary)."""
    torch.manual_seed(1)
    N, L, V, D, beta, delta = 4, 6, 17, 8, 0.07, 0.1
    lengths = torch.tensor([6, 2, 4, 1])
    mask = torch.arange(L) < lengths[:, None]
    hidden = torch.randn(N, L, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, V, (N, L))
    base = (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].detach()
    shift = torch.tensor([0.0, 0.6, 0.6, -0.6])[:, None]  # the second sample has drifted away, and was bad
    old = base + 0.3 * torch.randn(N, L) + shift
    reference = base + 0.3 * torch.randn(N, L)
    advantages = torch.tensor([0.5, -0.5, 1.0, -1.0], dtype=torch.float64)

    new = (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ratio = (new - old).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
    drift = ((old - new) * mask).sum(1) / mask.sum(1)
    kept = ~((advantages < 0) & (drift > delta))
    gap = reference - new
    plain = ((-gain * kept[:, None] + beta * ratio * (gap.exp() - gap - 1)) * mask).sum() / mask.sum()
    expected = torch.autograd.grad(plain, (hidden, weight))
    assert kept.tolist() == [True, False, True, True]

    sequence = torch.arange(N).repeat_interleave(lengths)
    logprobs, _ = head_logprobs(hidden[mask], weight, tokens[mask])
    good = kept_sequences(logprobs, old[mask], sequence, advantages, delta)
    terms = clipped_loss(logprobs, old[mask], advantages[sequence], low=0.2, high=0.28) * good[sequence]
    terms = terms + beta * unbiased_kl(logprobs, old[mask], reference[mask])
    total = (terms * mean_weights(lengths, "tokens")[sequence]).sum()
    torch.testing.assert_close(total, plain)
    for mine, right in zip(torch.autograd.grad(total, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(mine, right)


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_advantages_are_centred_in_each_group_and_equal_rewards_give_none():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [1.0, 1.0, 1.0, 1.0]])
    advantages, useless = group_advantages(rewards, "none")
    assert advantages[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages[1].tolist() == [-0.25, -0.25, -0.25, 0.75]
    assert not advantages[2:].any() and useless == 2


def test_advantages_divided_by_the_spread_have_the_same_size_in_every_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.0, 0.0, 0.2], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    advantages, useless = group_advantages(rewards, "std")
    spread = math.sqrt(4 * 0.25 / 3)  # of one group, as torch and TRL take it: divided by members − 1
    assert advantages[0, 0].item() == pytest.approx(0.5 / (spread + 1e-4))
    assert advantages[1, 0].item() == pytest.approx(0.1 / (spread / 5 + 1e-4))
    assert not advantages[2].any() and useless == 1


def test_a_group_of_one_teaches_nothing():
    for normalise in ("none", "std"):
        advantages, useless = group_advantages(torch.tensor([[1.0], [0.0]]), normalise)
        assert not advantages.any() and useless == 2


def test_the_length_penalty_grows_with_the_used_share_of_the_window_up_to_its_cap():
    lengths, windows = [0, 50, 100, 100], [100, 100, 100, 400]
    assert length_penalties(lengths, windows, [0.4, 0.4, 0.4, 0.4], cap=0.3) == pytest.approx([0.0, 0.2, 0.3, 0.1])
    assert length_penalties([10], [20], [0.0], cap=0.3) == [0.0]
