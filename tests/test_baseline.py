"""The V3.2 baseline against transformers' DeepSeek-V3.2, and its cache against the full pass."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.errors import ConfigError
from longreach.model.baseline import rotate_halves, yarn_softmax_factor
from longreach.model.cache import ContiguousCache, expected_nbytes, load_cache
from longreach.model.config import ModelConfig
from longreach.model.count import count_parameters
from longreach.model.shapes import parameter_shapes
from longreach.model.stores import index_codec, kv_codec
from longreach.model.transformer import Transformer

YARN = {"rope_factor": 8.0, "rope_original_length": 32, "rope_mscale_all_dim": 1.0}


def small(**changes) -> ModelConfig:
    """A V3.2 shape with every part present: a dense layer first, grouped experts, selection below the length."""
    fields: dict[str, Any] = dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=20, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10, q_lora_rank=24, kv_lora_rank=16, index_n_heads=32, index_head_dim=16,
        index_topk=8, max_position_embeddings=4096, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        moe_intermediate_size=16, intermediate_size=40, first_k_dense_replace=1, routed_scaling_factor=2.5,
        scoring_func="sigmoid", swiglu_limit=0.0, attention="mla", residual="plain", numerics="transformers", **YARN,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def randomised(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config, dtype=dtype)
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random values everywhere, so that no term hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("bias"):
            p.copy_(0.3 * noise)
        elif p.dim() == 1:
            p.copy_(1 + 0.2 * noise)
        else:
            p.copy_(noise * p.shape[-1] ** -0.5)


def tokens_of(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- transformers as the independent reference ----------------------------------------------------------------------


def reference_of(c: ModelConfig):
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_factor > 1:
        rope |= {
            "rope_type": "yarn", "factor": c.rope_factor, "beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow,
            "original_max_position_embeddings": c.rope_original_length, "mscale": c.rope_mscale_all_dim,
            "mscale_all_dim": c.rope_mscale_all_dim,
        }  # fmt: skip
        if c.rope_mscale_all_dim == 0:  # else transformers would scale cos and sin, which the official code never does
            rope["attention_factor"] = 1.0
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim",
        "v_head_dim", "q_lora_rank", "kv_lora_rank", "index_n_heads", "index_head_dim", "index_topk", "rms_norm_eps",
        "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size",
        "intermediate_size", "first_k_dense_replace", "routed_scaling_factor", "max_position_embeddings",
    )  # fmt: skip
    fields = {name: getattr(c, name) for name in same} | {
        "num_key_value_heads": c.num_attention_heads,
        "rope_parameters": rope,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    return DeepseekV32ForCausalLM(DeepseekV32Config(**fields)).eval()


ATTENTION_NAMES = {
    "wq_a.weight": "q_a_proj.weight",
    "q_norm.weight": "q_a_layernorm.weight",
    "wq_b.weight": "q_b_proj.weight",
    "wkv_a.weight": "kv_a_proj_with_mqa.weight",
    "kv_norm.weight": "kv_a_layernorm.weight",
    "wkv_b.weight": "kv_b_proj.weight",
    "wo.weight": "o_proj.weight",
    "indexer.wq_b.weight": "indexer.wq_b.weight",
    "indexer.wk.weight": "indexer.wk.weight",
    "indexer.k_norm.weight": "indexer.k_norm.weight",
    "indexer.k_norm.bias": "indexer.k_norm.bias",
    "indexer.weights_proj.weight": "indexer.weights_proj.weight",
}
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def name_pairs(c: ModelConfig) -> dict[str, str]:
    """Our name to transformers', of everything but w1 and w3 of the routed experts, which it keeps in one tensor."""
    pairs = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    pairs["head.weight"] = "lm_head.weight"
    for i in range(c.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        pairs |= {f"{ours}attn.{a}": f"{theirs}self_attn.{b}" for a, b in ATTENTION_NAMES.items()}
        pairs[f"{ours}attn_norm.weight"] = f"{theirs}input_layernorm.weight"
        pairs[f"{ours}ffn_norm.weight"] = f"{theirs}post_attention_layernorm.weight"
        if c.is_dense_ffn(i):
            pairs |= {f"{ours}ffn.{a}.weight": f"{theirs}mlp.{b}.weight" for a, b in PROJECTIONS.items()}
            continue
        for a, b in PROJECTIONS.items():
            pairs[f"{ours}ffn.shared_experts.{a}.weight"] = f"{theirs}mlp.shared_experts.{b}.weight"
        pairs[f"{ours}ffn.gate.weight"] = f"{theirs}mlp.gate.weight"
        pairs[f"{ours}ffn.gate.bias"] = f"{theirs}mlp.gate.e_score_correction_bias"
        pairs[f"{ours}ffn.experts.w2"] = f"{theirs}mlp.experts.down_proj"
    return pairs


def by_our_names(c: ModelConfig, theirs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Their tensors under our names."""
    found = {a: theirs[b] for a, b in name_pairs(c).items() if b in theirs}
    for i in range(c.num_hidden_layers):
        if not c.is_dense_ffn(i):
            fused = theirs[f"model.layers.{i}.mlp.experts.gate_up_proj"]
            assert fused is not None
            found[f"layers.{i}.ffn.experts.w1"], found[f"layers.{i}.ffn.experts.w3"] = fused.chunk(2, dim=1)
    return found


def random_shape(seed: int) -> tuple[ModelConfig, int, int]:
    """A shape, a batch and a length; selections below and above what is visible, with YaRN and without, by turns."""
    pick = random.Random(seed)
    rope, nope = pick.choice([4, 8, 16]), pick.choice([6, 8, 12])
    groups = pick.choice([1, 2, 4])
    experts = groups * pick.choice([2, 3, 4])
    kept = pick.randint(1, groups)
    length = pick.choice([9, 33, 70])
    yarn = [YARN, {}, YARN | {"rope_factor": 40.0}, YARN | {"rope_mscale_all_dim": 0.0}][seed % 4]
    c = small(
        **({"rope_factor": 1.0, "rope_mscale_all_dim": 0.0} | yarn),
        num_attention_heads=pick.choice([1, 2, 3, 8]),
        qk_rope_head_dim=rope, qk_nope_head_dim=nope, head_dim=rope + nope, v_head_dim=pick.choice([4, 8, 12]),
        q_lora_rank=pick.choice([12, 24]), kv_lora_rank=pick.choice([8, 20]),
        index_n_heads=pick.choice([32, 48]), index_head_dim=rope + pick.choice([0, 4, 12]),
        index_topk=2 * length if seed % 3 == 2 else pick.choice([2, 4, length // 2]),  # of one, neither
        n_group=groups, topk_group=kept, n_routed_experts=experts,
        num_experts_per_tok=pick.randint(2, min(4, kept * experts // groups)),  # of one, the gate has no gradient
        first_k_dense_replace=pick.choice([0, 1]), num_hidden_layers=pick.choice([2, 3]),
        rms_norm_eps=pick.choice([1e-6, 1e-2]),  # of the layers' norms; those inside the attention have their own
    )  # fmt: skip
    return c, pick.choice([1, 3]), length


@pytest.mark.parametrize("seed", range(10))
def test_logits_and_every_gradient_are_those_of_transformers(seed: int) -> None:
    c, batch, length = random_shape(seed)
    reference = reference_of(c)
    randomise(reference, seed)
    model = Transformer(c)
    weights = by_our_names(c, dict(reference.state_dict()))
    assert set(weights) == set(model.state_dict())
    model.load_state_dict(weights)

    tokens = tokens_of(c, batch, length, seed)
    theirs, ours = reference(tokens).logits, model(tokens)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()

    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed)) / theirs.numel() ** 0.5
    (theirs * direction).sum().backward()
    (ours * direction).sum().backward()
    expected = by_our_names(c, {name: p.grad for name, p in reference.named_parameters()})
    for name, p in model.named_parameters():
        want = expected[name]
        if ".indexer." in name:
            assert p.grad is None, name
            assert want is None, name
            continue
        assert p.grad is not None, name
        assert want is not None, name
        assert (p.grad - want).norm() <= 1e-4 * want.norm(), name


# ---- the pieces, by hand ---------------------------------------------------------------------------------------------


def test_index_rope_turns_each_leading_channel_with_the_one_half_the_rotary_width_further() -> None:
    quarter = torch.tensor([1j, 1 + 0j])  # turn the first pair by 90 degrees, the second not at all
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rotate_halves(x, quarter).tolist() == [-3.0, 2.0, 1.0, 4.0, 5.0]


def test_yarn_multiplies_the_released_softmax_scale_by_1_8739() -> None:
    assert yarn_softmax_factor(ModelConfig.preset("v32")) == pytest.approx(1.87385, abs=1e-5)
    assert yarn_softmax_factor(small(rope_factor=1.0)) == 1.0


def test_equal_index_scores_select_the_earliest_tokens() -> None:
    model = randomised(small(index_topk=3))
    for name, p in model.named_parameters():
        if name.endswith("weights_proj.weight"):
            torch.nn.init.zeros_(p)
    chosen = model.features(tokens_of(model.config, 1, 5), keep=("selection",)).selection[1]
    assert chosen[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_a_fresh_model_has_neutral_norms_and_no_index_key_bias() -> None:
    state = Transformer(small()).state_dict()
    assert state["layers.1.attn.indexer.k_norm.weight"].eq(1).all()
    assert state["layers.1.attn.indexer.k_norm.bias"].eq(0).all()
    assert state["layers.1.attn.kv_norm.weight"].eq(1).all()


def test_the_released_shape_has_671_877_944_064_parameters_each_where_the_table_says() -> None:
    c = ModelConfig.preset("v32")
    state = Transformer(c, device="meta").state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {p.name: p.shape for p in parameter_shapes(c)}
    assert sum(t.numel() for t in state.values()) == count_parameters(c).total == 671_877_944_064


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 21}, "head_dim=21 must be qk_nope_head_dim"),
        ({"numerics": "official", "index_head_dim": 24}, "power of two"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


# ---- one call or many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 31, 32, 33, 64, 69])
def test_continuing_a_cache_is_the_full_pass_wherever_the_text_is_cut(cut: int) -> None:
    model = randomised(small())
    tokens = tokens_of(model.config, 2, 70)
    with torch.no_grad():
        full, cache = model(tokens), model.new_cache(2)
        pieces = (tokens[:, :cut], tokens[:, cut : cut + 1], tokens[:, cut + 1 :])
        parts = [model(piece, cache) for piece in pieces if piece.shape[1]]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5 * full.abs().max().item())


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("precision", ["float32", "released"])
def test_invariant_arithmetic_gives_the_same_bits_wherever_the_text_is_cut(cut: int, precision) -> None:
    model = randomised(small(arithmetic="invariant"))
    tokens = tokens_of(model.config, 2, 70)
    with torch.no_grad():
        whole = model(tokens, model.new_cache(2, precision))
        if precision == "float32":
            assert torch.equal(whole, model(tokens))
        cache = model.new_cache(2, precision)
        parts = [model(part, cache) for part in (tokens[:, :cut], tokens[:, cut : cut + 1], tokens[:, cut + 1 :])]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert torch.equal(model(tokens[1:], model.new_cache(1, precision)), whole[1:])


def test_truncating_and_going_on_is_as_if_one_had_never_gone_further(tmp_path) -> None:
    model = randomised(small(arithmetic="invariant"))
    tokens, other = tokens_of(model.config, 1, 70), tokens_of(model.config, 1, 50, seed=1)
    cache, short = model.new_cache(1), model.new_cache(1)
    model(tokens, cache)
    model(tokens[:, :3], short)
    cache.truncate(3)
    assert torch.equal(model(other, cache), model(other, short))

    cache.save(tmp_path / "cache.safetensors")
    loaded = load_cache(tmp_path / "cache.safetensors", model)
    branch = cache.fork()
    expected = model(tokens, cache)
    assert loaded.length == 53
    assert torch.equal(model(tokens, loaded), expected)
    assert torch.equal(model(tokens, branch), expected)


def test_rows_of_different_lengths_are_each_what_they_are_alone() -> None:
    model = randomised(small())
    tokens, more = tokens_of(model.config, 2, 40), tokens_of(model.config, 2, 20, seed=1)
    with torch.no_grad():
        cache = model.new_cache(2)
        first, second = model(tokens, cache, lengths=[40, 13]), model(more, cache, lengths=[5, 20])
        alone = [model(torch.cat([tokens[:1], more[:1, :5]], 1)), model(torch.cat([tokens[1:, :13], more[1:]], 1))]
    torch.testing.assert_close(torch.cat([first[:1], second[:1, :5]], 1), alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([first[1:, :13], second[1:]], 1), alone[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_packed_documents_see_nothing_of_each_other(arithmetic) -> None:
    model = randomised(small(arithmetic=arithmetic))
    tokens = tokens_of(model.config, 1, 60)
    documents = (torch.arange(60) >= 23).long().unsqueeze(0)
    hidden = model.features(tokens, documents=documents).hidden
    alone = torch.cat([model.features(part).hidden for part in (tokens[:, :23], tokens[:, 23:])], dim=1)
    torch.testing.assert_close(hidden, alone, rtol=0, atol=0 if arithmetic == "invariant" else 1e-5)
    (gradient,) = torch.autograd.grad(hidden[:, 23:].square().sum(), model.embed.weight)
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    seen[tokens[0, 23:]] = True
    assert gradient[~seen].eq(0).all()
    assert gradient[seen].ne(0).any(dim=1).all()


# ---- which tokens are attended to ------------------------------------------------------------------------------------


def test_dense_attention_is_a_selection_that_takes_everything() -> None:
    sparse, everything = randomised(small(index_topk=5)), randomised(small(index_topk=100))
    tokens = tokens_of(sparse.config, 2, 40)
    dense = sparse.features(tokens, attention="dense").hidden
    torch.testing.assert_close(dense, everything.features(tokens).hidden, rtol=0, atol=1e-5)
    assert (dense - sparse.features(tokens).hidden).abs().max() > 1e-2


@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_a_selection_read_out_and_given_back_changes_nothing(arithmetic) -> None:
    model = randomised(small(arithmetic=arithmetic))
    tokens = tokens_of(model.config, 2, 40)
    first = model.features(tokens, keep=("selection",))
    again = model.features(tokens, selection=first.selection, keep=("selection",))
    torch.testing.assert_close(again.hidden, first.hidden, rtol=0, atol=1e-5)
    assert all(torch.equal(first.selection[i], again.selection[i]) for i in range(2))
    first.hidden.sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again.hidden.sum().backward()
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p.grad, before[name], rtol=1e-3, atol=1e-4 * before[name].abs().max().item())


def test_a_query_told_to_attend_to_its_own_token_only_returns_that_tokens_value() -> None:
    model = randomised(small(num_hidden_layers=1))
    tokens = tokens_of(model.config, 1, 12)
    own = torch.arange(12).view(1, 12, 1)
    nobody = torch.full((1, 12, 1), -1)
    block: Any = model.layers[0]
    x, attention = block.attn_norm(model.embed(tokens)), block.attn
    latent = attention.kv_norm(attention.wkv_a(x)[..., :16])
    values = (latent @ attention.wkv_b.weight.T).unflatten(-1, (2, 22))[..., 12:].flatten(-2)
    outputs = []
    attention.register_forward_hook(lambda module, given, output: outputs.append(output))
    model.features(tokens, selection={0: own})
    model.features(tokens, selection={0: torch.cat([nobody, own], dim=-1)})
    model.features(tokens, selection={0: nobody})
    torch.testing.assert_close(outputs[0], attention.wo(values), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[1], attention.wo(values), rtol=0, atol=1e-5)
    assert outputs[2].eq(0).all()


# ---- what a token costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4096, 1 << 20])
def test_the_released_cache_takes_48_068_bytes_per_token(length: int) -> None:
    c = ModelConfig.preset("v32")
    assert kv_codec(c, "released", 576).width == 656
    assert index_codec(c, "released").width == 132
    assert expected_nbytes(c, length, "released") == 48_068 * length


def test_a_cache_holds_what_its_arithmetic_says() -> None:
    c = small()
    cache = ContiguousCache(c, 2, precision="released")
    cache.reserve(100)
    Transformer(c)(tokens_of(c, 2, 100), cache)
    assert cache.nbytes == expected_nbytes(c, 100, "released", batch=2) == 2 * 2 * 100 * ((16 + 4 + 16) + (16 + 4))


def test_a_stored_entry_is_codes_then_scales_then_rotary_channels() -> None:
    codec = kv_codec(ModelConfig.preset("v32").replace(numerics="transformers"), "released", 576)
    entry = torch.zeros(1, 1, 576)
    entry[..., 0], entry[..., 1] = 448.0, -1.0
    entry[..., 128] = 3.0
    entry[..., 512] = 1.5
    stored = codec.encode(entry)[0, 0]
    assert stored[:2].tolist() == [0x7E, 0xB8]  # the largest E4M3 number and -1
    assert stored[128].item() == 0x7E
    scales = stored[512:528].clone().view(torch.float32)
    assert scales.tolist() == pytest.approx([1.0, 3 / 448, 1e-4 / 448, 1e-4 / 448], rel=1e-6)
    assert stored[528:530].tolist() == [0xC0, 0x3F]  # 1.5 in BF16, little endian
    torch.testing.assert_close(codec.decode(stored.view(1, 1, -1), torch.float32), entry, rtol=1e-6, atol=0)


def test_the_released_cache_costs_little_accuracy_and_bfloat16_less() -> None:
    model = randomised(small(index_topk=100, feed_forward="dense"))
    tokens = tokens_of(model.config, 1, 40)
    with torch.no_grad():
        full = model(tokens)
        error = {
            precision: ((model(tokens, model.new_cache(1, precision)) - full).norm() / full.norm()).item()
            for precision in ("bfloat16", "released")
        }
    assert 0 < error["bfloat16"] < error["released"] < 0.1


def test_official_rounding_is_what_the_released_cache_keeps() -> None:
    """So storing the entries in bytes changes not one bit, where the model without rounding differs a little."""
    c = small(numerics="official", weight_format="fp8", feed_forward="dense")
    tokens = tokens_of(c, 1, 70)
    with torch.no_grad():
        model = randomised(c, dtype=torch.bfloat16)
        kept = model(tokens, model.new_cache(1, "bfloat16"))
        assert torch.equal(model(tokens, model.new_cache(1, "released")), kept)
        wide = c.replace(index_topk=100)
        rounded, exact = randomised(wide)(tokens), randomised(wide.replace(numerics="transformers"))(tokens)
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.1
