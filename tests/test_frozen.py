"""Frozen weights: FP8, FP4 and plain codes compute what their decoded values compute, keep nothing decoded, and do not learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.checkpoint.frozen import load_frozen
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.errors import CheckpointError
from longreach.model.bind import is_suited
from longreach.model.config import ModelConfig
from longreach.model.frozen import Codes, FrozenLinear
from longreach.model.layers import Linear
from longreach.model.transformer import Transformer
from longreach.ops.cross_entropy import head_cross_entropy, head_cross_entropy_reference
from longreach.ops.quant import fp4_weight_encode, fp8_weight_encode

FORMATS = ("plain", "fp8", "fp8-fp4")


def small(**changes: Any) -> ModelConfig:
    """Sliding, CSA and HCA layers, an MTP block, hashed and learned routing; widths that fill no tile of 128."""
    fields: dict[str, Any] = dict(
        hidden_size=64, num_hidden_layers=3, compress_ratios=(0, 4, 8, 0), num_attention_heads=4, head_dim=32,
        qk_rope_head_dim=8, q_lora_rank=48, o_groups=2, o_lora_rank=24, sliding_window=8, index_n_heads=4,
        index_head_dim=32, index_topk=8, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=48,
        num_hash_layers=1, num_nextn_predict_layers=1, vocab_size=101, numerics="official",
    )  # fmt: skip
    return ModelConfig.preset("tiny").replace(**(fields | changes))


def small_v32(**changes: Any) -> ModelConfig:
    """V3.2's shape: latent attention, grouped choice of experts, one dense layer."""
    fields: dict[str, Any] = dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=20, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10, q_lora_rank=24, kv_lora_rank=16, index_n_heads=32, index_head_dim=16,
        index_topk=8, max_position_embeddings=4096, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        moe_intermediate_size=16, intermediate_size=40, first_k_dense_replace=1, scoring_func="sigmoid", swiglu_limit=0.0,
        attention="mla", residual="plain", numerics="transformers",
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def saved(folder: Path, config: ModelConfig, weight_format: Any = None, layout: Any = "official") -> Path:
    return save_model(Transformer(config, seed=3), folder / "base", layout=layout, weight_format=weight_format)


def some_tokens(config: ModelConfig, length: int = 40, rows: int = 2) -> Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def codes_of(values: Tensor, kind: str) -> Codes:
    if kind == "plain":
        return Codes(values, None)
    return Codes(*(fp8_weight_encode(values) if kind == "fp8" else fp4_weight_encode(values)))


# ---- one matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fp8", "fp4"])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_frozen_matrix_gives_the_values_and_gradients_of_its_decoded_weight(kind, rounds):
    codes = codes_of(torch.randn(200, 160), kind)
    assert codes.shape == (200, 160)
    plain, frozen = Linear(160, 200, rounds_input=rounds), FrozenLinear(codes, torch.float32, rounds_input=rounds)
    with torch.no_grad():
        plain.weight.copy_(codes.decode(torch.float32))
    assert torch.equal(frozen.weight, plain.weight)
    x, upstream = torch.randn(3, 7, 160), torch.randn(3, 7, 200)
    results = []
    for module in (plain, frozen):
        given = x.clone().requires_grad_()
        y = module(given)
        y.backward(upstream)
        results.append((y.detach(), given.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "fp8", "fp4"])
def test_a_frozen_matrix_serves_groups_as_its_decoded_weight_does(kind):
    codes = codes_of(torch.randn(96, 64), kind)
    plain = Linear(64, 96)
    with torch.no_grad():
        plain.weight.copy_(codes.decode(torch.float32))
    x = torch.randn(4, 5, 64)
    results = []
    for module in (plain, FrozenLinear(codes, torch.float32)):
        given = x.clone().requires_grad_()
        y = module.grouped(given)
        y.square().sum().backward()
        results.append((y, given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for group in range(4):  # what the groups mean, spelled out
        torch.testing.assert_close(results[0][0][group], x[group] @ plain.weight[24 * group : 24 * group + 24].t())


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_a_gradient_keeps_no_decoded_matrix(kind):
    layer, x = (
        FrozenLinear(codes_of(torch.randn(512, 256), kind), torch.float32),
        torch.randn(4, 256, requires_grad=True),
    )
    assert kept_bytes(lambda: layer(x).sum()) == 0
    assert kept_bytes(lambda: layer.grouped(x.view(2, 2, 256)).sum()) == 0


@pytest.mark.parametrize("kind", ["plain", "fp8", "fp4"])
@pytest.mark.parametrize("size", [1, 160 * 130, 160 * 300])
def test_a_matrix_may_be_decoded_in_parts_of_any_size(monkeypatch, kind, size):
    monkeypatch.setattr("longreach.model.frozen.PART", size)
    codes = codes_of(torch.randn(400, 160), kind)
    assert torch.equal(
        torch.cat([part.decode(torch.float32) for _, part in codes.parts()]), codes.decode(torch.float32)
    )
    x, layer = torch.randn(3, 160, requires_grad=True), FrozenLinear(codes, torch.float32)
    layer(x).square().sum().backward()
    weight, reference = codes.decode(torch.float32), x.detach().clone().requires_grad_()
    (reference @ weight.t()).square().sum().backward()
    torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-2)


def kept_bytes(call: Any) -> int:
    """Of the tensors that autograd keeps for the way back."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


# ---- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_a_model_of_frozen_codes_computes_what_the_decoded_model_computes(tmp_path, weight_format, layout):
    config = small(num_nextn_predict_layers=0, compress_ratios=(0, 4, 8))
    path = saved(tmp_path, config, weight_format, layout)
    plain, frozen = load_model(path, dtype=torch.float32), load_frozen(path)
    tokens = some_tokens(config)
    assert frozen.dtype == torch.float32 and not is_suited(frozen)
    torch.testing.assert_close(frozen(tokens), plain(tokens), rtol=0, atol=1e-5)
    assert torch.equal(frozen.embed(tokens), plain.embed(tokens))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_gradient_through_frozen_codes_is_that_of_the_decoded_model(tmp_path, weight_format):
    config = small()
    path = saved(tmp_path, config, weight_format)
    tokens = some_tokens(config)
    gradients = []
    for model in (load_model(path, dtype=torch.float32), load_frozen(path)):
        model.requires_grad_(False)
        # what learns beside frozen matrices: here the norms, which every gradient passes on its way
        learning = {n: p.requires_grad_() for n, p in model.named_parameters() if "norm" in n and "indexer" not in n}
        features = model.features(tokens, keep=("mtp",))
        (model.head(features.hidden).logsumexp(-1).sum() + features.mtp.square().sum()).backward()
        gradients.append({name: p.grad for name, p in learning.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_v32_with_its_scales_in_float32_stays_frozen_too(tmp_path):
    config = small_v32()
    path = saved(tmp_path, config, "fp8")
    tokens = some_tokens(config)
    torch.testing.assert_close(
        load_frozen(path)(tokens), load_model(path, dtype=torch.float32)(tokens), rtol=0, atol=1e-5
    )


def test_a_frozen_model_decodes_and_reads_in_the_invariant_arithmetic(tmp_path):
    config = small()
    path = saved(tmp_path, config, "fp8-fp4")
    tokens = some_tokens(config, rows=1)
    frozen = load_frozen(path, arithmetic="invariant")
    with torch.no_grad():
        whole = frozen(tokens)
        cache = frozen.new_cache()
        parts = [frozen(tokens[:, :13], cache), frozen(tokens[:, 13:], cache)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(whole, load_model(path, dtype=torch.float32)(tokens), rtol=0, atol=1e-4)


def test_nothing_of_a_frozen_model_learns_and_codes_are_no_parameters(tmp_path):
    path = saved(tmp_path, small(), "fp8-fp4")
    frozen, plain = load_frozen(path), load_model(path)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert sum(p.numel() for p in frozen.parameters()) < 0.5 * sum(p.numel() for p in plain.parameters())


def test_codes_on_the_cpu_are_the_files_own_memory(tmp_path):
    path = saved(tmp_path, small(), "fp8-fp4")
    mapped = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line}
    frozen = load_frozen(path)
    now = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in now if line.split()[0] not in mapped]
    held = [m.codes.codes for m in frozen.modules() if isinstance(m, FrozenLinear)]
    held += [codes.codes for codes in frozen.get_submodule("layers.1.ffn.experts").w2.experts]  # type: ignore[attr-defined]
    assert all(any(low <= tensor.data_ptr() < high for low, high in spans) for tensor in held)


def test_a_bfloat16_checkpoint_can_be_computed_in_float32_with_tables_as_they_are_stored(tmp_path):
    config = small()
    path = save_model(Transformer(config, dtype=torch.bfloat16, seed=3), tmp_path / "base")
    frozen = load_frozen(path)
    assert frozen.embed.weight.dtype == frozen.head.weight.dtype == torch.bfloat16
    tokens = some_tokens(config)
    torch.testing.assert_close(frozen(tokens), load_model(path, dtype=torch.float32)(tokens), rtol=0, atol=1e-5)
    half = load_frozen(path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.features(tokens).hidden.dtype == torch.bfloat16


def test_a_routing_table_that_names_no_expert_is_refused(tmp_path):
    model = Transformer(small(), seed=3)
    model.get_buffer("layers.0.ffn.gate.tid2eid")[7, 0] = 99
    path = save_model(model, tmp_path / "base")
    with pytest.raises(CheckpointError, match="routes to experts outside"):
        load_frozen(path)


# ---- the head of a frozen model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40, 7])
def test_a_narrower_head_gives_the_loss_and_gradient_of_its_widened_weight(monkeypatch, rows):
    monkeypatch.setattr("longreach.ops.cross_entropy.ROWS", rows)
    hidden, targets = torch.randn(30, 16), torch.randint(0, 100, (30,))
    head = torch.randn(100, 16).bfloat16()
    results = []
    for loss, weight in ((head_cross_entropy, head), (head_cross_entropy_reference, head.float())):
        given = hidden.clone().requires_grad_()
        total = loss(given, weight, targets)
        total.backward()
        results.append((total.detach(), given.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, targets = torch.randn(30, 16, requires_grad=True), torch.randint(0, 4000, (30,))
    head = torch.nn.Parameter(torch.randn(4000, 16), requires_grad=False)
    assert kept_bytes(lambda: head_cross_entropy(hidden, head, targets)) == hidden.nbytes
    head_cross_entropy(hidden, head, targets).backward()
    assert head.grad is None and hidden.grad is not None
    learning = head.detach().clone().requires_grad_()
    head_cross_entropy(hidden, learning, targets).backward()
    assert learning.grad is not None
