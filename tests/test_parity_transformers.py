"""Ours against transformers 5.23, an independent implementation: logits and the gradient of every parameter."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is a dev dependency")

from hf import gradient_pairs, ours_from, randomise, reference_model

from longreach.model.config import ModelConfig

LOGITS = 2e-5
GRADIENTS = 1e-4


def random_config(seed: int) -> ModelConfig:
    """All layer kinds and mixtures, small and released rates, several head, group, expert and stream counts."""
    r = random.Random(seed)
    csa, hca = r.choice([(4, 128), (4, 128), (2, 8), (4, 16), (3, 7), (8, 32)])
    layers = r.choice([1, 2, 3, 4])
    kinds = [r.choice([0, csa, hca]) for _ in range(layers)]
    if seed < 3:  # every kind on its own first
        kinds, layers = [[0, csa, hca][seed]], 1
    heads = r.choice([2, 4, 8])
    head_dim = r.choice([16, 32, 48])
    experts = r.choice([4, 6, 8])
    return ModelConfig(
        vocab_size=r.choice([97, 128]),
        hidden_size=r.choice([32, 48, 64]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        qk_rope_head_dim=r.choice([8, 16]),
        q_lora_rank=r.choice([16, 24]),
        o_groups=r.choice([1, 2, heads]),
        o_lora_rank=r.choice([8, 16]),
        sliding_window=r.choice([4, 16, 33, 128]),
        compress_ratios=tuple(kinds),
        csa_ratio=csa,
        # 32 index heads make exact ties at the cut (all heads' relu zero) practically impossible
        index_n_heads=32,
        index_head_dim=r.choice([16, 32]),
        index_topk=r.choice([3, 8, 512]),
        n_routed_experts=experts,
        num_experts_per_tok=r.choice([1, 2, 3]),
        moe_intermediate_size=r.choice([16, 24]),
        routed_scaling_factor=r.choice([1.0, 1.5, 2.5]),
        num_hash_layers=r.choice([0, 1, layers]),
        # active for a few values in a hundred; at a tighter limit some value lies within float32 rounding of the kink,
        # where the two gradients differ by right
        swiglu_limit=r.choice([2.0, 10.0]),
        hc_mult=r.choice([2, 3, 4]),
        hc_sinkhorn_iters=r.choice([1, 5, 20]),
        rope_factor=r.choice([1.0, 16.0]),
        rope_original_length=r.choice([64, 65_536]),
        numerics="transformers",
    )


@pytest.mark.parametrize("seed", range(28))
def test_logits_and_gradients_equal_those_of_transformers(seed):
    config = random_config(seed)
    reference = reference_model(config)
    randomise(reference, seed)
    model = ours_from(reference, config)
    r = random.Random(1000 + seed)
    batch, length = r.choice([1, 2, 3]), r.choice([1, 5, 67, 131, 190, 301])
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))

    theirs = reference(tokens, use_cache=False).logits
    mine = model(tokens)
    largest = theirs.abs().max()
    assert (mine - theirs).abs().max() <= LOGITS * largest

    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed + 1)) / theirs.numel() ** 0.5
    (theirs * direction).sum().backward()
    (mine * direction).sum().backward()
    pairs = gradient_pairs(model, reference)
    # A gradient that cancels to nothing (the gate with one expert per token, the last collapse before a norm) is rounding
    # in both programs: a difference below float32's resolution of the model's largest gradient is none.
    rounding = torch.finfo(torch.float32).eps * max(e.abs().max() for _, _, e in pairs if e is not None)
    for name, ours, expected in pairs:
        if expected is None or ours is None:  # the indexer in both; experts no token chose in neither
            assert expected is None or not expected.any(), name
            assert ours is None or not ours.any(), name
            continue
        assert (ours - expected).abs().max() <= max(GRADIENTS * expected.abs().max(), rounding), name


def test_the_random_configurations_cover_what_they_claim():
    configs = [random_config(seed) for seed in range(28)]
    kinds = {tuple(sorted({c.layer_kind(i) for i in range(c.num_hidden_layers)})) for c in configs}
    assert {("sliding",), ("csa",), ("hca",)} <= kinds and max(map(len, kinds)) == 3
    assert {4, 128} <= {ratio for c in configs for ratio in c.compress_ratios}
    assert {c.hc_mult for c in configs} == {2, 3, 4} and len({c.o_groups for c in configs}) >= 3
