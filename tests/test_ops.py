"""Each operator against its plain reference: values and gradients; and small cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from longreach.ops.attention import Layout, TensorEntries, sparse_attention, sparse_attention_reference
from longreach.ops.compress import pool_blocks, pool_overlapping_blocks, pool_overlapping_reference
from longreach.ops.cross_entropy import CHUNK, head_cross_entropy, head_cross_entropy_reference
from longreach.ops.hyper import collapse_streams, hyper_coefficients, mix_in, mix_out, sinkhorn, sinkhorn_reference
from longreach.ops.index import (
    index_scores,
    index_scores_reference,
    select_over_blocks,
    select_top,
    select_top_reference,
)
from longreach.ops.moe import (
    choose_experts,
    clamped_swiglu,
    clamped_swiglu_reference,
    mixture,
    mixture_reference,
    routing_weights,
)
from longreach.ops.norm import rms_norm, rms_norm_reference
from longreach.ops.rope import apply_rope, apply_rope_reference, rope_frequencies, rope_table


def gradients(function, *inputs):
    """Value and input gradients of a function of float tensors, along one fixed direction."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    g = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=g, dtype=out.dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def assert_same(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- norm and positions


def test_rms_norm_of_a_hand_computed_vector():
    out = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(out, torch.tensor([3.0, 8.0]) / math.sqrt(12.5))


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_equals_its_reference_with_gradients(weighted):
    x, w = torch.randn(3, 5, 16), torch.randn(16)
    if weighted:
        assert_same(
            gradients(lambda a, b: rms_norm(a, b, 1e-6), x, w),
            gradients(lambda a, b: rms_norm_reference(a, b, 1e-6), x, w),
        )
    else:
        assert_same(
            gradients(lambda a: rms_norm(a, None, 1e-6), x), gradients(lambda a: rms_norm_reference(a, None, 1e-6), x)
        )


def test_norm_weights_multiply_in_float32_before_the_one_rounding_to_bfloat16():
    x, w = torch.randn(64, 32).bfloat16(), torch.randn(32)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * w.double()
    assert (rms_norm(x, w, 1e-6).double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_rotation_touches_the_last_channels_in_interleaved_pairs():
    x = torch.arange(1.0, 7.0).view(1, 6)
    turned = apply_rope(x.clone(), torch.tensor([[1j, 1.0]]))  # a quarter turn of pair 0, none of pair 1
    torch.testing.assert_close(turned, torch.tensor([[1.0, 2.0, -4.0, 3.0, 5.0, 6.0]]))


@pytest.mark.parametrize("inverse", [False, True])
def test_rope_equals_its_reference_with_gradients_and_undoes_itself(inverse):
    positions, frequencies = torch.tensor([0, 1, 7, 1_048_575]), rope_frequencies(8, 10_000.0)
    x = torch.randn(2, 4, 12)
    table = rope_table(positions, frequencies)
    fast = gradients(lambda a: apply_rope(a * 1.0, table, inverse), x)
    assert_same(fast, gradients(lambda a: apply_rope_reference(a, positions, frequencies, inverse), x))
    back = apply_rope(apply_rope(x.clone(), table, inverse), table, not inverse)
    torch.testing.assert_close(back, x)


def test_yarn_keeps_fast_channels_divides_slow_ones_by_the_factor_and_ramps_between():
    plain = rope_frequencies(64, 160_000.0)
    yarn = rope_frequencies(64, 160_000.0, factor=16.0, original_length=65_536)
    # The released shape: ramp from pair 15 to pair 25 (architecture facts: 15.45 and 24.71, rounded outwards).
    torch.testing.assert_close(yarn[:16], plain[:16])
    torch.testing.assert_close(yarn[25:], plain[25:] / 16)
    torch.testing.assert_close(yarn[20], plain[20] * 0.5 + plain[20] / 16 * 0.5)


# ---- hyper-connections


def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    m = sinkhorn(torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0)), iters=20, eps=1e-6)
    torch.testing.assert_close(m.sum(-2), torch.ones(50, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(m.sum(-1), torch.ones(50, 4), atol=1e-4, rtol=0)
    assert (m >= 0).all()


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize(("n", "iters"), [(4, 20), (3, 1), (2, 5)])
def test_sinkhorn_equals_its_reference_and_its_hand_written_gradient_equals_autograd(n, iters, tokens):
    logits = torch.randn(tokens, n, n, dtype=torch.float64)
    fast = gradients(lambda z: sinkhorn(z, iters, 1e-6), logits)
    assert_same(fast, gradients(lambda z: sinkhorn_reference(z, iters, 1e-6), logits), 1e-12)
    given = torch.ones(tokens, n, n, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    sinkhorn(leaf, iters, 1e-6).backward(given)
    assert (given == 1).all()  # the backward pass works in place, but not on the caller's gradient


def test_mixing_contracts_the_source_stream():
    streams = torch.tensor([[[[1.0], [10.0]]]])  # B = T = D = 1, two streams
    comb = torch.tensor([[[[0.9, 0.1], [0.2, 0.8]]]])  # row: source, column: target
    out = mix_out(streams, torch.tensor([[[5.0]]]), torch.tensor([[[1.0, 2.0]]]), comb)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.9 * 1 + 0.2 * 10 + 5, 0.1 * 1 + 0.8 * 10 + 10]))
    torch.testing.assert_close(mix_in(streams, torch.tensor([[[0.5, 0.25]]])).flatten(), torch.tensor([3.0]))


def test_the_hand_written_gradients_of_mixing_and_of_the_coefficients_are_the_numerical_ones():
    g = torch.Generator().manual_seed(0)
    random = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    streams, fn, base, scale = random(1, 3, 2, 4), random(2, 8), random(2), random(1)
    assert torch.autograd.gradcheck(mix_out, (streams, random(1, 3, 4), random(1, 3, 2), random(1, 3, 2, 2)))
    # base and scale become float32 on the way, too coarse for differences
    collapse = lambda x, f: collapse_streams(x, f, base.detach(), scale.detach(), 1e-6, 1e-2)  # noqa: E731
    assert torch.autograd.gradcheck(collapse, (streams, fn))


def test_unconstrained_coefficients_are_the_linear_values():
    streams = torch.randn(1, 2, 3, 4)
    fn, base = torch.zeros(15, 12), torch.arange(15.0)
    _, _, comb = hyper_coefficients(
        streams, fn, base, torch.ones(3), iters=5, eps=1e-6, norm_eps=1e-6, constrained=False
    )
    torch.testing.assert_close(comb[0, 0], torch.arange(6.0, 15.0).view(3, 3))


# ---- compression


def test_pooling_equal_gates_is_the_block_mean():
    content = torch.arange(8.0).reshape(1, 8, 1)
    out = pool_blocks(content, torch.zeros_like(content), ratio=4)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5, 5.5]))


def test_an_overlapping_entry_sees_the_block_before_through_the_first_half_of_the_channels():
    content = torch.tensor([[[10.0, 1.0], [20.0, 3.0], [30.0, 5.0], [40.0, 7.0]]])  # ratio 2: two entries
    placeholder = torch.zeros(1, 2, 2)
    out = pool_overlapping_blocks(
        torch.cat([placeholder, content], 1), torch.zeros(1, 6, 2), ratio=2, first_has_previous=False
    )
    # entry 0: mean(1, 3); entry 1: mean of the block before seen through channel 0 (10, 20) and its own (5, 7)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, (10 + 20 + 5 + 7) / 4]))


def test_overlapping_pooling_equals_its_reference_with_gradients():
    content, gate = torch.randn(2, 12, 10), torch.randn(2, 12, 10)

    def fast(c, z):
        pad = torch.zeros(2, 3, 10)
        return pool_overlapping_blocks(torch.cat([pad, c], 1), torch.cat([pad, z], 1), 3, False)

    assert_same(
        gradients(fast, content, gate), gradients(lambda c, z: pool_overlapping_reference(c, z, 3), content, gate)
    )


# ---- index and selection


def test_index_scores_equal_the_equation():
    q, w, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3), torch.randn(2, 7, 8)
    assert_same(gradients(index_scores, q, w, k), gradients(index_scores_reference, q, w, k))


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0, 0.0]])
    assert select_top(scores, 3).tolist() == [[0, 1, 4]]
    assert select_top(scores, 4).tolist() == [[0, 1, 2, 4]]
    assert select_top(torch.zeros(1, 9), 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("k", [1, 3, 8, 50])
def test_selection_equals_a_stable_sort_even_with_many_ties(k):
    scores = torch.randint(0, 6, (40, 50), generator=torch.Generator().manual_seed(k)).float()
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    assert torch.equal(select_top(scores, k), expected)
    if k < 50:
        assert torch.equal(select_top_reference(scores, k), expected)


@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_selecting_block_by_block_equals_selecting_from_all_at_once(block):
    g = torch.Generator().manual_seed(block)
    # Small whole numbers: scores are exact in any order of summation, and relu makes many of them tie.
    q, w, k = (torch.randint(-2, 3, s, generator=g).float() for s in ((2, 30, 2, 4), (2, 30, 2), (2, 33, 4)))
    visible = torch.arange(30) + 4
    scores = index_scores_reference(q, w, k)
    hidden = torch.arange(33) >= visible[:, None]
    expected = scores.masked_fill(hidden, float("-inf")).sort(dim=-1, descending=True, stable=True).indices[..., :4]
    got = select_over_blocks(q, w, k.split(block, dim=1), visible, 4)
    assert torch.equal(got, expected.sort(-1).values)


# ---- attention


def random_attention(seed, *, ratio, chosen, T=150, first=37, window=20, B=2, N=3, H=8, Hv=8, sink=True):
    g = torch.Generator().manual_seed(seed)
    first_key = max(0, first - window + 1)
    q = torch.randn(B, T, N, H, generator=g, dtype=torch.float64)
    local = torch.randn(B, first + T - first_key, H, generator=g, dtype=torch.float64)
    S = (first + T) // ratio if ratio else 0
    entries = torch.randn(B, S, H, generator=g, dtype=torch.float64) if ratio else None
    index = None
    if chosen:
        index = torch.rand(B, T, S, generator=g).argsort(-1)[..., :chosen].sort(-1).values
    s = torch.randn(N, generator=g, dtype=torch.float64) if sink else None
    layout = Layout(first, first_key, window, ratio, chosen or 0, H**-0.5, Hv)
    return q, local, entries, index, s, layout


@pytest.mark.parametrize("case", [
    dict(ratio=0, chosen=0), dict(ratio=4, chosen=0), dict(ratio=4, chosen=6), dict(ratio=16, chosen=0),
    dict(ratio=4, chosen=6, T=1, first=99), dict(ratio=4, chosen=3, T=30, first=0), dict(ratio=0, chosen=0, first=0, window=500),
    dict(ratio=4, chosen=6, sink=False, Hv=5), dict(ratio=1, chosen=0, B=1), dict(ratio=2, chosen=9, B=1, Hv=3),
])  # fmt: skip
def test_sparse_attention_equals_the_dense_reference_with_gradients(case):
    q, local, entries, index, sink, layout = random_attention(3, **case)

    def fast(q, local, *rest):
        rest = list(rest)
        e = rest.pop(0) if entries is not None else None
        s = rest.pop(0) if sink is not None else None
        return sparse_attention(q, local, TensorEntries(e) if e is not None else None, index, s, layout)

    def dense(q, local, *rest):
        rest = list(rest)
        e = rest.pop(0) if entries is not None else None
        s = rest.pop(0) if sink is not None else None
        # "chosen" applies only where more is visible than may be chosen; below that all visible entries count
        chosen = index
        return sparse_attention_reference(q, local, e, chosen, s, layout)

    inputs = [t for t in (q, local, entries, sink) if t is not None]
    if index is not None:
        # Make the picks of early queries what selection would give: everything visible.
        t = layout.first_query + torch.arange(q.shape[1])
        few = ((t + 1) // layout.ratio) <= layout.chosen_limit
        index[:, few] = torch.arange(layout.chosen_limit)
        index[:, ::5, 0] = torch.where(few[::5], index[:, ::5, 0], -1)  # some places left empty
    assert_same(gradients(fast, *inputs), gradients(dense, *inputs), 1e-9)


def test_a_query_sees_its_window_itself_included_and_finished_blocks_only():
    # One head of width 1, keys 0: every seen key weighs the same, so the output is the mean of what is seen.
    layout = Layout(first_query=0, first_key=0, window=3, ratio=4, chosen_limit=0, scale=1.0, value_dim=1)
    keys = torch.arange(1.0, 10.0).view(1, 9, 1)
    entries = torch.tensor([[[100.0], [200.0]]])
    out = sparse_attention(torch.zeros(1, 9, 1, 1), keys, TensorEntries(entries), None, None, layout).flatten()
    assert out[0] == 1 and out[2] == 2
    torch.testing.assert_close(out[3], torch.tensor((2 + 3 + 4 + 100) / 4))  # token 3 completes block 0 and sees it
    torch.testing.assert_close(out[6], torch.tensor((5 + 6 + 7 + 100) / 4))
    torch.testing.assert_close(out[7], torch.tensor((6 + 7 + 8 + 300) / 5))


def test_the_sink_takes_weight_and_gives_nothing():
    layout = Layout(first_query=0, first_key=0, window=1, ratio=0, chosen_limit=0, scale=1.0, value_dim=1)
    out = sparse_attention(
        torch.zeros(1, 1, 1, 1), torch.tensor([[[8.0]]]), None, None, torch.tensor([math.log(3.0)]), layout
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0]))  # weight 1 / (1 + 3)


# ---- experts


def test_the_clamp_bounds_the_gate_above_and_the_linear_branch_on_both_sides():
    out = clamped_swiglu(torch.tensor([20.0, -20.0, 1.0]), torch.tensor([30.0, -30.0, -3.0]), limit=10.0)
    silu = lambda x: x / (1 + math.exp(-x))  # noqa: E731
    torch.testing.assert_close(out, torch.tensor([silu(10) * 10, silu(-20) * -10, silu(1) * -3]))


def test_the_router_bias_decides_who_is_chosen_and_not_how_much_it_counts():
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.1]])
    chosen = choose_experts(scores, torch.tensor([0.0, 0.0, 0.0, 1.0]), 2)
    assert chosen.tolist() == [[0, 3]]
    torch.testing.assert_close(routing_weights(scores, chosen, 1.5), torch.tensor([[0.5, 0.1]]) / 0.6 * 1.5)


@pytest.mark.parametrize("limit", [0.0, 0.7])
def test_the_activation_equals_its_reference_with_gradients_on_both_sides_of_the_clamps(limit):
    gate, up = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 2, 50)
    fast, plain = (
        gradients(lambda a, b, f=f: f(a, b, limit), gate, up) for f in (clamped_swiglu, clamped_swiglu_reference)
    )
    assert_same(fast, plain)
    at_the_clamp = torch.tensor([0.7, -0.7])  # where autograd lets a gradient through
    assert_same(
        gradients(lambda a, b: clamped_swiglu(a, b, 0.7), at_the_clamp, at_the_clamp),
        gradients(lambda a, b: clamped_swiglu_reference(a, b, 0.7), at_the_clamp, at_the_clamp),
    )


def test_an_expert_nobody_chose_gets_a_gradient_of_zero():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 6, generator=g), torch.rand(4, 2, generator=g)
    chosen = torch.tensor([[0, 2]] * 4)
    w1, w3, w2 = (torch.randn(3, *s, generator=g) for s in ((4, 6), (4, 6), (6, 4)))
    _, _, _, *weights = gradients(lambda *a: mixture(a[0], chosen, *a[1:], 0.0), x, w, w1, w3, w2)
    for d in weights:
        assert d[1].eq(0).all()
        assert d[0].ne(0).any()
        assert d[2].ne(0).any()


def test_the_mixture_equals_its_reference_with_gradients():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(11, 6, generator=g), torch.rand(11, 2, generator=g)
    chosen = torch.rand(11, 5, generator=g).argsort(-1)[:, :2].sort(-1).values
    w1, w3, w2 = (torch.randn(5, *s, generator=g) for s in ((4, 6), (4, 6), (6, 4)))
    run = lambda f: gradients(lambda *a: f(a[0], chosen, *a[1:], 10.0), x, w, w1, w3, w2)  # noqa: E731
    assert_same(run(mixture), run(mixture_reference))
    one = lambda f: gradients(lambda *a: f(a[0], chosen[:1], *a[1:], 10.0), x[:1], w[:1], w1, w3, w2)  # noqa: E731
    assert_same(one(mixture), one(mixture_reference))


# ---- head and loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 3])
def test_head_and_loss_together_equal_whole_logits_with_gradients(tokens, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, 8, generator=g, dtype=dtype), torch.randn(11, 8, generator=g, dtype=dtype)
    targets = torch.randint(0, 11, (tokens,), generator=g)
    fast, plain = (
        gradients(lambda h, w, f=f: f(h, w, targets) / tokens, hidden, weight)
        for f in (head_cross_entropy, head_cross_entropy_reference)
    )
    assert_same(fast, plain, 1e-5 if dtype == torch.float32 else 1e-12)
    assert fast[0].dtype == dtype


def test_bfloat16_hidden_states_get_a_float32_loss_and_bfloat16_gradients():
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    loss, *d = gradients(lambda h, w: head_cross_entropy(h, w, torch.arange(5)), hidden, weight)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in d] == [torch.bfloat16] * 2
