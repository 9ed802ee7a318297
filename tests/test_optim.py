"""Optimizers: orthogonalisation against the SVD, Muon against plain loops, groups over every shape a model can take."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longreach.errors import CheckpointError, LongreachError, RequestError, ShapeError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.optim.groups import ROLES, describe, parameter_groups, role_of
from longreach.optim.hybrid import HybridOptimizer, make_optimizers
from longreach.optim.muon import BUFFER, Muon
from longreach.optim.newton_schulz import (
    COEFFICIENTS,
    newton_schulz_flops,
    orthogonalise,
    orthogonalise_reference,
)

LR, MU, DECAY, RMS = 0.02, 0.95, 0.1, 0.18

SHAPES = [
    (1, 1, 1),
    (3, 1, 9),
    (3, 9, 1),
    (2, 16, 16),
    (4, 7, 33),
    (4, 33, 7),
    (2, 24, 512),
    (2, 64, 128),
    (1, 100, 37),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrices_with_spectrum(n: int, m: int, smallest: float, count: int = 3) -> Tensor:
    """float64 `[count, n, m]`, n ≤ m: singular values evenly spread in the logarithm from 1 to `smallest`, Frobenius norm 1."""
    U = torch.linalg.qr(normal(count, n, n, seed=1, dtype=torch.float64))[0]
    V = torch.linalg.qr(normal(count, m, n, seed=2, dtype=torch.float64))[0]
    s = torch.logspace(0, torch.tensor(smallest).log10().item(), n, dtype=torch.float64)
    return (U * (s / s.norm())) @ V.mT


# ---- orthogonalisation ----------------------------------------------------------------------------------------------


def test_eight_steep_steps_come_before_two_that_settle():
    assert len(COEFFICIENTS) == 10
    assert COEFFICIENTS[:8] == ((3.4445, -4.7750, 2.0315),) * 8
    assert COEFFICIENTS[8:] == ((2.0, -1.5, 0.5),) * 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_matrices_become_their_nearest_orthogonal_ones(shape):
    G = normal(*shape)
    out = orthogonalise(G)
    assert out.shape == G.shape and out.dtype == G.dtype
    singular = torch.linalg.svdvals(out.double())
    assert singular.min() >= 0.9999 and singular.max() <= 1.001
    distance = torch.linalg.matrix_norm(out - orthogonalise_reference(G)) / min(shape[1:]) ** 0.5
    assert distance.max() < 5e-4


@pytest.mark.parametrize(("n", "m"), [(16, 200), (64, 64), (48, 100)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-3, 1.5e-4])
def test_the_stated_band_holds_down_to_the_stated_singular_value(n, m, smallest):
    G = matrices_with_spectrum(n, m, smallest)
    assert torch.linalg.svdvals(G).min() >= 5e-5
    for dtype in (torch.float64, torch.float32):
        for stack in (G, G.mT):
            out = orthogonalise(stack.to(dtype)).double()
            singular = torch.linalg.svdvals(out)
            assert singular.min() >= 0.999 and singular.max() <= 1.003
            distance = torch.linalg.matrix_norm(out - orthogonalise_reference(stack)) / n**0.5
            assert distance.max() < 5e-4


@pytest.mark.parametrize(("n", "m"), [(16, 200), (64, 64), (48, 100)])
def test_bfloat16_products_keep_their_wider_band(n, m):
    G = matrices_with_spectrum(n, m, 0.1)
    assert torch.linalg.svdvals(G).min() >= 1e-2
    out = orthogonalise(G.float(), torch.bfloat16)
    singular = torch.linalg.svdvals(out.double())
    assert singular.min() >= 0.99 and singular.max() <= 1.01
    distance = torch.linalg.matrix_norm(out - orthogonalise_reference(G)) / n**0.5
    assert distance.max() < 0.02
    assert not torch.equal(out, orthogonalise(G.float())), "bfloat16 was asked for and float32 computed"


def test_a_direction_that_is_absent_stays_absent():
    low_rank = normal(2, 20, 3, seed=1) @ normal(2, 3, 30, seed=2)
    singular = torch.linalg.svdvals(orthogonalise(low_rank))
    assert singular[:, :3].min() > 0.999
    assert singular[:, 3:].max() < 0.02  # rounding of the input, raised 3.4445⁸ · 2² times
    assert torch.linalg.svdvals(orthogonalise_reference(low_rank))[:, 3:].max() < 1e-12


def test_a_matrix_of_zeros_stays_zero_beside_others():
    G = normal(3, 5, 8)
    G[1] = 0
    out = orthogonalise(G)
    assert not out[1].any()
    assert torch.equal(out[0], orthogonalise(G[:1])[0])


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_the_scale_of_a_gradient_does_not_matter(scale):
    G = normal(2, 6, 9)
    torch.testing.assert_close(orthogonalise(G * scale), orthogonalise(G), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("n", "m"), [(7, 33), (33, 7), (5, 5), (17, 31), (64, 128), (24, 512)])
def test_a_matrix_gets_the_same_bits_whatever_it_is_batched_with(n, m):
    G = normal(7, n, m)
    together = orthogonalise(G)
    for i in range(7):
        assert torch.equal(orthogonalise(G[i : i + 1])[0], together[i])
    assert torch.equal(orthogonalise(G[2:5]), together[2:5])


def test_the_input_is_left_alone():
    G = normal(2, 4, 6)
    before = G.clone()
    orthogonalise(G)
    assert torch.equal(G, before)


@pytest.mark.parametrize(
    "G", [torch.zeros(4, 4), torch.zeros(0, 4, 4), torch.zeros(2, 0, 4), torch.ones(2, 3, 4).long()]
)
def test_what_is_no_stack_of_matrices_is_refused(G):
    with pytest.raises(ShapeError, match="B, N, M"):
        orthogonalise(G)


def test_operations_are_counted_with_the_smaller_gram_matrix():
    assert newton_schulz_flops(2, 3, steps=1) == 2 * (2 * 2 * 3) + 2 * (2 * 2 * 2) + 2 * (2 * 2 * 3)
    assert newton_schulz_flops(512, 256) == newton_schulz_flops(256, 512) == 10 * (4 * 256**2 * 512 + 2 * 256**3)


# ---- Muon -----------------------------------------------------------------------------------------------------------


def plain_step(W: Tensor, G: Tensor, M: Tensor, orthogonal) -> tuple[Tensor, Tensor]:
    """One step of one matrix, as the recipe reads."""
    M = MU * M + G
    O = orthogonal(MU * M + G) * max(W.shape) ** 0.5 * RMS
    return W * (1 - LR * DECAY) - LR * O, M


def newton_schulz_one(G: Tensor) -> Tensor:
    """One matrix, the textbook way."""
    tall = G.shape[0] > G.shape[1]
    X = G.T if tall else G
    X = X / X.norm()
    for a, b, c in COEFFICIENTS:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


def svd_one(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def trained(parameters: list[Tensor], steps: int, **options: Any) -> list[nn.Parameter]:
    """Copies of `parameters` after `steps` steps of Muon with gradients from a seed."""
    mine = [nn.Parameter(p.clone()) for p in parameters]
    optimizer = Muon(mine, LR, momentum=MU, weight_decay=DECAY, update_rms=RMS, **options)
    for step in range(steps):
        for i, p in enumerate(mine):
            p.grad = normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
        optimizer.step()
    return mine


def trained_plainly(parameters: list[Tensor], steps: int, orthogonal) -> list[Tensor]:
    """The same, one matrix after the other."""
    out = []
    for i, start in enumerate(parameters):
        grads = [normal(*start.shape, seed=100 * step + i, dtype=start.dtype) for step in range(steps)]
        stack = start.dim() == 3
        results = []
        for e in range(len(start) if stack else 1):
            W = start[e] if stack else start
            M = torch.zeros_like(W)
            for grad in grads:
                W, M = plain_step(W, grad[e] if stack else grad, M, orthogonal)
            results.append(W)
        out.append(torch.stack(results) if stack else results[0])
    return out


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(6, 10), (10, 6), (5, 6, 10), (12, 12), (6, 10), (1, 7), (3, 10, 6)]
    return [normal(*shape, seed=50 + i, dtype=dtype) for i, shape in enumerate(shapes)]


def test_a_step_is_the_recipe_with_the_singular_value_decomposition():
    start = weights(torch.float64)
    for mine, exact in zip(trained(start, 3), trained_plainly(start, 3, svd_one), strict=True):
        # every step's direction is within the band of Newton-Schulz: 1e-3 relative to an update's norm
        update = LR * RMS * max(mine.shape[-2:]) ** 0.5 * min(mine.shape[-2:]) ** 0.5
        assert torch.linalg.matrix_norm(mine - exact).max() < 3 * 1e-3 * update
        assert torch.linalg.matrix_norm(mine - exact).min() > 0, "compared with itself"


@pytest.mark.parametrize("batch_bytes", [None, 1, 500, 1000])
def test_batched_matrices_move_as_one_after_the_other(batch_bytes):
    start = weights()
    for mine, plain in zip(
        trained(start, 3, batch_bytes=batch_bytes), trained_plainly(start, 3, newton_schulz_one), strict=True
    ):
        torch.testing.assert_close(mine.detach(), plain, rtol=1e-5, atol=1e-5)


def test_the_batch_size_does_not_change_a_bit():
    start = weights()
    for a, b in zip(trained(start, 3), trained(start, 3, batch_bytes=600), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (3, 16, 64)])
def test_an_update_has_the_stated_root_mean_square(shape):
    p = nn.Parameter(torch.zeros(shape))
    p.grad = 1e-6 * normal(*shape)
    Muon([p], LR).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.18 * LR, rel=1e-3)
    p = nn.Parameter(torch.zeros(shape))
    p.grad = normal(*shape)
    Muon([p], LR, update_rms=0.5).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.5 * LR, rel=1e-3)


def test_one_experts_gradient_moves_no_other_expert():
    start = normal(4, 6, 10)

    def after(grad: Tensor) -> Tensor:
        p = nn.Parameter(start.clone())
        p.grad = grad
        Muon([p], LR).step()
        return p.detach()

    grad = normal(4, 6, 10, seed=1)
    changed = grad.clone()
    changed[2] = 1000 * normal(6, 10, seed=2)
    one, other = after(grad), after(changed)
    assert not torch.equal(one[2], other[2])
    for expert in (0, 1, 3):
        assert torch.equal(one[expert], other[expert])


def test_a_stack_moves_as_its_matrices_would_as_parameters():
    start, grad = normal(3, 6, 10), normal(3, 6, 10, seed=1)
    stack, single = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    stack.grad = grad
    for p, g in zip(single, grad, strict=True):
        p.grad = g.clone()
    Muon([stack], LR).step()
    Muon(single, LR).step()
    assert torch.equal(stack.detach(), torch.stack([p.detach() for p in single]))


def test_weight_decay_is_decoupled_from_the_gradient():
    p = nn.Parameter(torch.full((3, 4), 2.0))
    p.grad = torch.zeros(3, 4)
    Muon([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((3, 4), 2.0 * (1 - 0.5 * 0.1)), rtol=1e-6, atol=0)


def test_groups_keep_their_own_constants_though_batched_together():
    grad = normal(6, 10)
    slow, fast = nn.Parameter(torch.zeros(6, 10)), nn.Parameter(torch.zeros(6, 10))
    slow.grad, fast.grad = grad.clone(), grad.clone()
    Muon([{"params": [slow]}, {"params": [fast], "lr": 4 * LR}], LR).step()
    torch.testing.assert_close(fast.detach(), 4 * slow.detach(), rtol=1e-6, atol=0)


def test_a_parameter_without_gradient_is_left_alone():
    still, moving = nn.Parameter(normal(4, 6)), nn.Parameter(normal(4, 6, seed=1))
    optimizer = Muon([still, moving], LR)
    still.grad, moving.grad = normal(4, 6, seed=2), normal(4, 6, seed=3)
    optimizer.step()
    weight, momentum = still.detach().clone(), optimizer.state[still][BUFFER].clone()
    still.grad = None
    before = moving.detach().clone()
    optimizer.step()
    assert torch.equal(still, weight) and torch.equal(optimizer.state[still][BUFFER], momentum)
    assert not torch.equal(moving, before)
    fresh = nn.Parameter(normal(4, 6))
    optimizer = Muon([fresh], LR)
    optimizer.step()
    assert not optimizer.state[fresh]


def test_bfloat16_weights_keep_a_float32_momentum_and_round_once():
    start = normal(6, 10, dtype=torch.bfloat16)
    p, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer, exact = Muon([p], LR), Muon([wide], LR)
    for step in range(4):
        p.grad = normal(6, 10, seed=step, dtype=torch.bfloat16)
        wide.grad = p.grad.float()
        with torch.no_grad():
            wide.copy_(p)
        optimizer.step()
        exact.step()
        assert torch.equal(p, wide.bfloat16())
    assert optimizer.state[p][BUFFER].dtype == torch.float32
    assert torch.equal(optimizer.state[p][BUFFER], exact.state[wide][BUFFER])


def test_a_weight_that_is_not_contiguous_is_trained_in_place():
    start, grad = normal(6, 10), normal(6, 10, seed=1)
    p, turned = nn.Parameter(start.clone()), nn.Parameter(start.t().contiguous().t())
    assert not turned.is_contiguous()
    p.grad, turned.grad = grad.clone(), grad.clone()
    Muon([p], LR).step()
    Muon([turned], LR).step()
    torch.testing.assert_close(turned.detach(), p.detach())


def test_a_closure_is_called_with_gradients_enabled():
    p = nn.Parameter(normal(3, 4))
    before = p.detach().clone()

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert Muon([p], LR).step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(p, before)


@pytest.mark.parametrize(
    ("shape", "fix"), [((4,), "AdamW"), ((), "AdamW"), ((2, 3, 4, 5), "reshape"), ((0, 4), "float matrices")]
)
def test_parameters_that_are_no_matrices_are_refused_by_name(shape, fix):
    with pytest.raises(ShapeError, match=rf"layer\.bias.*{fix}"):
        Muon([("layer.bias", nn.Parameter(torch.zeros(shape)))], LR)
    optimizer = Muon([nn.Parameter(torch.zeros(2, 2))], LR)
    with pytest.raises(ShapeError, match=fix):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(shape))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0},
                {"update_rms": -1.0}, {"batch_bytes": 0}, {"dtype": torch.int8}], ids=str
)  # fmt: skip
def test_impossible_constants_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        Muon([nn.Parameter(torch.zeros(2, 2))], **({"lr": LR} | options))


def test_a_sparse_gradient_is_refused_before_anything_moves():
    dense, table = nn.Parameter(normal(4, 4)), nn.Embedding(5, 3, sparse=True)
    before = dense.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    dense.grad = torch.ones(4, 4)
    optimizer = Muon([("dense", dense), ("table", table.weight)], LR)
    with pytest.raises(RequestError, match="table has a sparse gradient"):
        optimizer.step()
    assert torch.equal(dense, before) and not optimizer.state


# ---- roles and groups -----------------------------------------------------------------------------------------------


def small(**changes: Any) -> ModelConfig:
    """Every mechanism of V4, few parameters."""
    return ModelConfig.preset("tiny").replace(**(dict(
        vocab_size=64, hidden_size=32, num_attention_heads=2, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16,
        o_lora_rank=8, index_n_heads=2, index_head_dim=16, n_routed_experts=4, moe_intermediate_size=16,
        compress_ratios=(0, 4, 8, 0), num_hidden_layers=3, num_hash_layers=1, sliding_window=8, index_topk=2,
    ) | changes))  # fmt: skip


def small_v32() -> ModelConfig:
    return ModelConfig.preset("v32").replace(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=20, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10, q_lora_rank=24, kv_lora_rank=16, index_n_heads=2, index_head_dim=16,
        index_topk=8, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, moe_intermediate_size=16,
        intermediate_size=40, first_k_dense_replace=1, weight_format="plain", numerics="transformers",
    )  # fmt: skip


CONFIGS = {
    "v4": small(),
    "plain residual": small(residual="plain"),
    "unconstrained hc": small(residual="hc"),
    "dense feed-forward": small(feed_forward="dense", intermediate_size=48),
    "sliding": small(attention="sliding"),
    "dense attention": small(attention="dense"),
    "no mtp": small(num_nextn_predict_layers=0, compress_ratios=(0, 4, 8)),
    "plain, dense, sliding": small(
        residual="plain", feed_forward="dense", intermediate_size=48, attention="sliding",
        num_nextn_predict_layers=0, compress_ratios=(0, 4, 8),
    ),
    "v3.2": small_v32(),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_in_exactly_one_group_whatever_the_switches(name):
    model = Transformer(CONFIGS[name], device="meta")
    groups = parameter_groups(model)
    grouped = [n for group in groups for n, _ in group["params"]]
    assert sorted(grouped) == sorted(n for n, _ in model.named_parameters())
    tensors = {id(p) for group in groups for _, p in group["params"]}
    assert tensors == {id(p) for p in model.parameters()}
    for group in groups:
        for parameter_name, p in group["params"]:
            matching = [role.name for role in ROLES if _matches(role.pattern, parameter_name)]
            assert matching == [group["role"]], parameter_name
            assert group["optimizer"] == "adamw" or p.dim() in (2, 3)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern.replace("#", r"(layers|mtp)\.\d+"), name) is not None


def test_every_role_of_the_table_occurs_in_some_model():
    found = {g["role"] for config in CONFIGS.values() for g in parameter_groups(Transformer(config, device="meta"))}
    # adapters are added to a model (tests/test_lora.py), no configuration has them
    assert found == {role.name for role in ROLES} - {"adapters"}


@pytest.mark.parametrize("name", CONFIGS)
def test_adamw_has_tables_vectors_and_the_head_and_muon_all_other_matrices(name):
    model = Transformer(CONFIGS[name], device="meta")
    for group in parameter_groups(model):
        for parameter_name, p in group["params"]:
            on_adamw = (
                p.dim() < 2 or parameter_name in ("embed.weight", "head.weight") or parameter_name.endswith("ape")
            )
            assert group["optimizer"] == ("adamw" if on_adamw else "muon"), parameter_name


@pytest.mark.parametrize(
    ("name", "role", "optimizer"),
    [
        ("embed.weight", "embedding", "adamw"),
        ("head.weight", "head", "adamw"),
        ("norm.weight", "norms", "adamw"),
        ("layers.10.attn.q_norm.weight", "norms", "adamw"),
        ("mtp.0.enorm.weight", "norms", "adamw"),
        ("layers.2.attn.indexer.compressor.norm.weight", "norms", "adamw"),
        ("layers.2.attn_hc.base", "mHC biases", "adamw"),
        ("collapse.scale", "mHC gates", "adamw"),
        ("mtp.0.collapse.fn", "mHC matrices", "muon"),
        ("layers.2.ffn_hc.fn", "mHC matrices", "muon"),
        ("layers.2.attn.attn_sink", "attention sinks", "adamw"),
        ("layers.2.attn.compressor.ape", "position biases", "adamw"),
        ("layers.2.attn.wo_a.weight", "attention", "muon"),
        ("layers.2.attn.compressor.wgate.weight", "compressor", "muon"),
        ("layers.2.attn.indexer.compressor.wkv.weight", "indexer", "muon"),
        ("layers.2.attn.indexer.weights_proj.weight", "indexer", "muon"),
        ("layers.2.ffn.gate.weight", "router", "muon"),
        ("layers.2.ffn.experts.w2", "experts", "muon"),
        ("mtp.0.ffn.shared_experts.w1.weight", "shared experts", "muon"),
        ("layers.2.ffn.w3.weight", "feed-forward", "muon"),
        ("mtp.0.h_proj.weight", "MTP projections", "muon"),
    ],
)
def test_each_part_of_the_model_is_trained_as_the_report_says(name, role, optimizer):
    assert role_of(name)[:2] == (role, optimizer)


def test_a_parameter_without_a_role_is_an_error_not_a_guess():
    model = Transformer(CONFIGS["v4"], device="meta")
    model.layers[0].adapter = nn.Linear(4, 4, device="meta")
    with pytest.raises(RequestError, match=r"layers\.0\.adapter\.weight has no role"):
        parameter_groups(model)


def test_frozen_parameters_are_in_no_group():
    model = Transformer(CONFIGS["v4"], device="meta")
    model.embed.requires_grad_(False)
    assert "embedding" not in {group["role"] for group in parameter_groups(model)}
    with pytest.raises(RequestError, match="no trainable parameters"):
        parameter_groups(model.requires_grad_(False))


def test_any_torch_model_is_split_by_what_its_layers_are():
    model = nn.Sequential(
        nn.Embedding(10, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Conv1d(16, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)
    )
    roles = {
        name: (group["role"], group["optimizer"]) for group in parameter_groups(model) for name, _ in group["params"]
    }
    assert roles == {
        "0.weight": ("embedding", "adamw"),
        "1.weight": ("matrices", "muon"), "1.bias": ("vectors and others", "adamw"),
        "2.weight": ("vectors and others", "adamw"), "2.bias": ("vectors and others", "adamw"),
        "3.weight": ("vectors and others", "adamw"), "3.bias": ("vectors and others", "adamw"),
        "4.weight": ("matrices", "muon"), "4.bias": ("vectors and others", "adamw"),
        "5.weight": ("head", "adamw"), "5.bias": ("vectors and others", "adamw"),
    }  # fmt: skip


def test_a_head_tied_to_the_embedding_takes_no_other_matrix_from_muon():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 10, bias=False))
    model[2].weight = model[0].weight
    kinds = {name: group["optimizer"] for group in parameter_groups(model) for name, _ in group["params"]}
    assert kinds == {"0.weight": "adamw", "1.weight": "muon"}


def test_name_patterns_move_parameters_to_adamw():
    model = Transformer(CONFIGS["v4"], device="meta")
    kinds = {n: g["optimizer"] for g in parameter_groups(model, adamw=["*.gate.weight"]) for n, _ in g["params"]}
    assert kinds["layers.1.ffn.gate.weight"] == "adamw" and kinds["layers.1.attn.wkv.weight"] == "muon"
    with pytest.raises(RequestError, match="matches no parameter"):
        parameter_groups(model, adamw=["*.router.weight"])


def test_a_compiled_longreach_model_keeps_its_roles():
    model = Transformer(CONFIGS["v4"], device="meta")
    plain = [(group["role"], len(group["params"])) for group in parameter_groups(model)]
    compiled: Any = torch.compile(model)
    assert [(group["role"], len(group["params"])) for group in parameter_groups(compiled)] == plain


def test_the_table_counts_tensors_matrices_and_parameters():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 10, bias=False))
    assert [line.split() for line in describe(parameter_groups(model)).splitlines()] == [
        ["role", "optimizer", "tensors", "matrices", "parameters"],
        ["embedding", "adamw", "1", "-", "80"],
        ["head", "adamw", "1", "-", "160"],
        ["matrices", "muon", "1", "1", "128"],
        ["vectors", "and", "others", "adamw", "1", "-", "16"],
        ["total", "4", "1", "384"],
    ]
    v4 = Transformer(CONFIGS["v4"], device="meta")
    rows = {line.split("  ")[0]: line.split() for line in describe(make_optimizers(v4, LR).param_groups).splitlines()}
    assert rows["experts"][1:] == [
        "muon",
        "12",
        "48",
        f"{4 * 3 * 4 * 16 * 32:,}",
    ]  # 4 layers, 3 stacks of 4 matrices each
    assert rows["total"][-1] == f"{sum(p.numel() for p in v4.parameters()):,}"


# ---- both together --------------------------------------------------------------------------------------------------


def with_gradients(model: nn.Module, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = normal(*p.shape, seed=1000 * step + i, dtype=p.dtype)


def run(model: nn.Module, optimizer: HybridOptimizer, steps: range) -> nn.Module:
    for step in steps:
        with_gradients(model, step)
        optimizer.scale_lr(1 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_adamws_groups_move_as_torchs_adamw_and_muons_as_muon():
    model = Transformer(CONFIGS["v4"])
    by_name = dict(copy.deepcopy(model).named_parameters())
    optimizer = make_optimizers(model, LR, adamw_lr=0.01)
    on_muon = {n for g in optimizer.param_groups if g["optimizer"] == "muon" for n in g["param_names"]}
    adamw = torch.optim.AdamW(
        [p for n, p in by_name.items() if n not in on_muon], lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1
    )
    muon = Muon([p for n, p in by_name.items() if n in on_muon], LR)
    for step in range(3):
        with_gradients(model, step)
        for (_, p), (n, _) in zip(model.named_parameters(), by_name.items(), strict=True):
            by_name[n].grad = p.grad
        optimizer.step()
        adamw.step()
        muon.step()
    for n, p in model.named_parameters():
        if n in on_muon:
            assert torch.equal(p, by_name[n]), n
        else:
            torch.testing.assert_close(p, by_name[n], rtol=1e-6, atol=1e-7, msg=n)


def test_a_gradient_however_small_moves_adamws_parameters_by_the_rate():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = make_optimizers(model, LR, weight_decay=0.0)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.full((4, 4), 1e-14)
    optimizer.step()
    torch.testing.assert_close(before - model[0].weight.detach(), torch.full((4, 4), LR), rtol=1e-4, atol=0)


def test_kind_adamw_is_torchs_adamw_for_every_parameter():
    model = Transformer(CONFIGS["v4"])
    other = copy.deepcopy(model)
    optimizer = make_optimizers(model, LR, kind="adamw")
    assert {group["optimizer"] for group in optimizer.param_groups} == {"adamw"}
    plain = torch.optim.AdamW(other.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    for step in range(3):
        with_gradients(model, step)
        with_gradients(other, step)
        optimizer.step()
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_bit_for_bit(kind, dtype):
    model = Transformer(CONFIGS["v4"], dtype=dtype)
    optimizer = make_optimizers(model, LR, kind=kind)
    run(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, range(2, 5))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Transformer(CONFIGS["v4"], dtype=dtype, seed=1)
    again.load_state_dict(saved["model"])
    resumed = make_optimizers(again, 7.0, kind=kind)  # the saved rates win
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, range(2, 5))
    assert same(model, again)
    for group, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert group["base_lr"] == other["base_lr"] == LR


def test_a_state_loaded_without_a_file_is_not_shared():
    model = Transformer(CONFIGS["v4"])
    optimizer = make_optimizers(model, LR)
    run(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    twins = make_optimizers(twin, LR)
    twins.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(2, 4))
    run(twin, twins, range(2, 4))  # would start from moments that the first run has changed
    assert same(model, twin)


CONTINUE = """
import sys, torch
from torch import nn
from longreach.optim.hybrid import make_optimizers
torch.set_num_threads(1)
saved = torch.load(sys.argv[1], weights_only=True)
model = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 33), nn.Linear(33, 33), nn.Linear(33, 5))
model.load_state_dict(saved["model"])
optimizer = make_optimizers(model, 0.02)
optimizer.load_state_dict(saved["optimizer"])
for grads in saved["grads"]:
    for p, grad in zip(model.parameters(), grads):
        p.grad = grad
    optimizer.step()
torch.save(model.state_dict(), sys.argv[1])
"""


def test_a_new_process_continues_bit_for_bit(tmp_path):
    model = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 33), nn.Linear(33, 33), nn.Linear(33, 5))
    optimizer = make_optimizers(model, LR)
    run(model, optimizer, range(2))
    grads = [[normal(*p.shape, seed=10 * step + i) for i, p in enumerate(model.parameters())] for step in range(2)]
    path = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "grads": grads}, path)
    subprocess.run([sys.executable, "-c", CONTINUE, str(path)], check=True)
    for step in grads:
        for p, grad in zip(model.parameters(), step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    for name, value in torch.load(path, weights_only=True).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    model = Transformer(CONFIGS["v4"])
    optimizer = make_optimizers(model, LR)
    run(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    adamw = make_optimizers(Transformer(CONFIGS["v4"]), LR, kind="adamw")
    plain = make_optimizers(Transformer(CONFIGS["plain residual"]), LR)
    wider_model = Transformer(CONFIGS["v4"].replace(moe_intermediate_size=24))
    wider = make_optimizers(wider_model, LR)
    run(wider_model, wider, range(1))
    with pytest.raises(CheckpointError, match="same kind of optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(CheckpointError, match=r"differ in collapse\.fn"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(CheckpointError, match=r"momentum of layers\.0\.ffn\.experts\.w1 is \(4, 24, 32\)"):
        optimizer.load_state_dict(wider.state_dict())
    after = optimizer.state_dict()
    assert after["muon"]["param_groups"] == before["muon"]["param_groups"]
    for i, entry in before["muon"]["state"].items():
        assert torch.equal(after["muon"]["state"][i][BUFFER], entry[BUFFER])


def test_rates_follow_a_schedules_factor_and_can_be_set():
    optimizer = make_optimizers(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), 0.5, adamw_lr=0.25)

    def rates() -> dict[str, float]:
        return {group["optimizer"]: group["lr"] for group in optimizer.param_groups}

    assert rates() == {"muon": 0.5, "adamw": 0.25}
    optimizer.scale_lr(0.5)
    assert rates() == {"muon": 0.25, "adamw": 0.125}
    optimizer.scale_lr(1.0)
    assert rates() == {"muon": 0.5, "adamw": 0.25}
    optimizer.set_lr(0.1)
    assert rates() == {"muon": 0.1, "adamw": 0.1}
    optimizer.set_lr(0.1, 0.2)
    assert rates() == {"muon": 0.1, "adamw": 0.2}


def test_gradients_are_dropped_or_zeroed_as_asked():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = make_optimizers(model, LR)
    with_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"), [({"kind": "sgd"}, "sgd"), ({"lr": -1.0}, "lr=-1"), ({"adamw_lr": float("nan")}, "nan")]
)
def test_impossible_optimizers_are_refused(options, message):
    with pytest.raises(LongreachError, match=message):
        make_optimizers(nn.Linear(4, 4), **({"lr": LR} | options))


def test_a_small_model_learns_with_it():
    model = Transformer(CONFIGS["v4"])
    optimizer = make_optimizers(model, 0.01)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(4.16, abs=0.1)  # ln 64
    assert losses[-1] < 0.5 * losses[0]
