"""Reverse KL between two heads: equal to the whole computation, whatever the shapes, tiles and logits."""

from __future__ import annotations

import math
import random

import pytest
import torch

from longreach.errors import ShapeError
from longreach.ops.reverse_kl import head_reverse_kl, head_reverse_kl_reference


def drawn(M: int, V: int, D: int, E: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32):
    """Hidden states and heads of a student and a teacher; `scale` widens the logits. Parts of the student learn."""
    made = torch.Generator().manual_seed(seed)
    shapes = ((M, D), (V, D), (M, E), (V, E))
    parts = [torch.randn(shape, generator=made, dtype=torch.float64).mul(scale**0.5).to(dtype) for shape in shapes]
    for part in parts[:2]:
        part.requires_grad_()
    return parts


def values_and_gradients(compute, parts, weight=None, upstream: float = 1.0, **options):
    for part in parts:
        part.grad = None
    out = compute(*parts, weight, **options)
    (out.total * upstream).backward()
    return out.total.detach(), out.each_M, parts[0].grad, parts[1].grad


def test_two_tokens_give_the_value_one_gets_by_hand():
    """p = (0.8, 0.2), q = (0.5, 0.5): KL = 0.8 ln 1.6 + 0.2 ln 0.4, and ∂KL/∂z_0 = 0.8 (ln 1.6 − KL)."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[math.log(4.0)], [0.0]], dtype=torch.float64, requires_grad=True)
    out = head_reverse_kl(hidden, head, torch.ones(1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert out.total.item() == pytest.approx(kl, abs=1e-14)
    assert out.each_M.tolist() == [pytest.approx(kl, abs=1e-14)]
    out.total.backward()
    first = 0.8 * (math.log(1.6) - kl)
    assert head.grad is not None
    torch.testing.assert_close(head.grad[:, 0], torch.tensor([first, -first], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients_are_those_of_the_whole_computation_for_any_shape_and_tile(seed):
    pick = random.Random(seed)
    M, V, D, E = pick.randint(1, 70), pick.randint(2, 130), pick.randint(1, 24), pick.randint(1, 24)
    parts = drawn(M, V, D, E, seed, scale=pick.choice([0.01, 1.0, 5.0]), dtype=torch.float64)
    weight = torch.rand(M, dtype=torch.float64) if seed % 2 else None
    chunk = (pick.randint(1, M + 3), pick.randint(1, V + 3))
    ours = values_and_gradients(head_reverse_kl, parts, weight, upstream=0.7, chunk=chunk)
    plain = values_and_gradients(head_reverse_kl_reference, parts, weight, upstream=0.7)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [(512, 16_384), (7, 50)])
@pytest.mark.parametrize("seed", range(6))
def test_float32_agrees_to_1e_5_with_the_whole_computation_in_float64(seed, chunk):
    parts = drawn(96, 1024, 128, 96, seed, scale=0.3)
    wide = [part.detach().double().requires_grad_(part.requires_grad) for part in parts]
    weight = torch.full((96,), 1 / 96)
    ours = values_and_gradients(head_reverse_kl, parts, weight, chunk=chunk)
    exact = values_and_gradients(head_reverse_kl_reference, wide, weight.double())
    for mine, expected in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [(64, 64), (3, 1), (2, 5), (4, 9)])
@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_extreme_logits_stay_finite_and_exact(scale, chunk):
    """Products of up to several thousand: probabilities of 1 and 0, KLs of thousands."""
    parts = drawn(8, 33, 4, 6, seed=5, scale=scale)
    wide = [part.detach().double().requires_grad_(part.requires_grad) for part in parts]
    ours = values_and_gradients(head_reverse_kl, parts, chunk=chunk)
    exact = values_and_gradients(head_reverse_kl_reference, wide)
    assert exact[0] > 10 * scale**0.5
    for mine, expected in zip(ours, exact, strict=True):
        assert mine.isfinite().all()
        # Float32 logits of this size are themselves off by 1e-7 of their size.
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=2e-6 * scale * scale**0.5)


def test_a_large_shift_of_all_logits_costs_no_digit():
    """Adding one constant to every logit changes neither distribution; sums of unshifted logits would lose three digits."""
    parts = drawn(16, 40, 3, 3, seed=2, dtype=torch.float64)
    # Multiples of 1/64 stay exact in float32 after 8,192 is added to them.
    steps = [(part.detach() * 8).round() / 8 for part in parts]
    one = [torch.ones(len(part), 1, dtype=torch.float64) for part in steps]
    lifted = [torch.cat([steps[0], one[0] * 8192], 1), torch.cat([steps[1], one[1]], 1),
              torch.cat([steps[2], one[2] * -8192], 1), torch.cat([steps[3], one[3]], 1)]  # fmt: skip
    exact = head_reverse_kl_reference(*steps).each_M
    torch.testing.assert_close(
        head_reverse_kl(*(part.float() for part in lifted)).each_M.double(), exact, rtol=1e-6, atol=1e-6
    )


def test_gradients_pass_the_numerical_check_in_float64():
    parts = drawn(5, 11, 3, 4, seed=1, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64)
    for chunk in ((5, 11), (2, 4)):
        assert torch.autograd.gradcheck(
            lambda h, w, chunk=chunk: head_reverse_kl(h, w, *parts[2:], weight, chunk=chunk).total, tuple(parts[:2])
        )


def test_bfloat16_states_and_heads_give_float32_values_and_bfloat16_gradients():
    parts = drawn(20, 50, 16, 8, seed=3, dtype=torch.bfloat16)
    wide = [part.detach().float().requires_grad_(part.requires_grad) for part in parts]
    ours = values_and_gradients(head_reverse_kl, parts, chunk=(6, 20))
    exact = values_and_gradients(head_reverse_kl_reference, wide)
    assert ours[0].dtype == torch.float32 and ours[2].dtype == ours[3].dtype == torch.bfloat16
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-5)
    for mine, expected in zip(ours[2:], exact[2:], strict=True):
        torch.testing.assert_close(mine.float(), expected, rtol=1 / 128, atol=1e-2)


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient():
    hidden, head, _, _ = drawn(12, 30, 8, 8, seed=4, dtype=torch.float64)
    total, each, *gradients = values_and_gradients(head_reverse_kl, [hidden, head, hidden.detach(), head.detach()])
    assert abs(total) < 1e-13 and each.abs().max() < 1e-14
    assert all(gradient.abs().max() < 1e-13 for gradient in gradients)


def test_the_teacher_gets_no_gradient_even_where_it_could():
    parts = drawn(4, 9, 3, 3, seed=6)
    for part in parts[2:]:
        part.requires_grad_()
    out = head_reverse_kl(*parts)
    out.total.backward()
    assert parts[2].grad is None and parts[3].grad is None
    assert not out.each_M.requires_grad


def test_a_frozen_head_still_hands_gradients_to_the_hidden_states():
    parts = drawn(4, 9, 3, 3, seed=7, dtype=torch.float64)
    frozen = [parts[0], parts[1].detach(), *parts[2:]]
    head_reverse_kl(*frozen).total.backward()
    mine = parts[0].grad
    parts[0].grad = None
    head_reverse_kl_reference(*frozen).total.backward()
    torch.testing.assert_close(mine, parts[0].grad)


def test_no_positions_cost_nothing():
    parts = drawn(0, 9, 3, 3, seed=8)
    total, each, _, head_gradient = values_and_gradients(head_reverse_kl, parts)
    assert total == 0 and len(each) == 0 and not head_gradient.any()


def test_no_tensor_of_positions_times_vocabulary_is_made(monkeypatch):
    """Every product that makes logits stays within its tile."""
    made = []
    linear = torch.nn.functional.linear

    def watched(*arguments):
        made.append(linear(*arguments))
        return made[-1]

    monkeypatch.setattr("longreach.ops.reverse_kl.F.linear", watched)
    parts = drawn(100, 90, 8, 8, seed=9)
    head_reverse_kl(*parts, chunk=(16, 32)).total.backward()
    assert max(max(logits.shape) for logits in made) <= 32 and max(logits.numel() for logits in made) == 16 * 32
    assert len(made) == 7 * 3 * 2 * 2  # seven groups of positions, three of tokens, two models, there and back
    made.clear()
    head_reverse_kl(*parts, chunk=(16, 90)).total.backward()
    assert len(made) == 7 * 2  # where a row of tiles is one tile nothing is made twice


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (9, 3), (4, 3), (8, 3)), "the student's head has 9 tokens and the teacher's 8"),
        (((4, 3), (9, 2), (4, 3), (9, 3)), r"\(4, 3\) of the student do not fit its head \(9, 2\)"),
        (((4, 3), (9, 3), (4, 5), (9, 3)), r"\(4, 5\) of the teacher do not fit its head \(9, 3\)"),
        (((4, 3), (9, 3), (5, 3), (9, 3)), "4 positions of the student and 5 of the teacher"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(shapes, message):
    with pytest.raises(ShapeError, match=message):
        head_reverse_kl(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ShapeError, match="weights"):
        head_reverse_kl(torch.zeros(4, 3), torch.zeros(9, 3), torch.zeros(4, 3), torch.zeros(9, 3), torch.zeros(3))
