"""The operation counts against the published components at a million tokens."""

from __future__ import annotations

import pytest

from longreach.model.config import ModelConfig
from longreach.plan.flops import decode_macs, prefill_macs, training_macs


@pytest.mark.parametrize(("preset", "scores", "core", "experts", "total"), [
    ("v32", 1047.97, 34.80, None, 1157.7), ("pro", 128.85, 76.67, 56.42, 303.3), ("flash", 90.19, 23.60, 15.15, 140.4),
])  # fmt: skip
def test_operations_of_a_decoded_token_at_a_million_are_the_published_ones(preset, scores, core, experts, total):
    parts = {name: 2 * macs / 1e9 for name, macs in decode_macs(ModelConfig.preset(preset), 2**20).items()}
    assert parts["index scores"] == pytest.approx(scores, abs=0.01)
    assert parts["core attention"] == pytest.approx(core, abs=0.01)
    if experts:
        router = {"pro": 2 * 61 * 384 * 7168, "flash": 2 * 43 * 256 * 4096}[preset] / 1e9
        assert parts["experts"] - router == pytest.approx(experts, abs=0.01)
    assert sum(parts.values()) == pytest.approx(total, rel=0.002)


def test_a_prompt_costs_the_sum_of_its_tokens():
    config = ModelConfig.preset("bench")
    by_token = [decode_macs(config, t) for t in range(1, 301)]
    whole = prefill_macs(config, 300, logits=300)
    for part, macs in whole.items():
        assert macs == sum(token[part] for token in by_token), part


def test_training_costs_three_times_the_forward_pass_except_for_the_untrained_index_scores():
    config = ModelConfig.preset("bench")
    forward, training = prefill_macs(config, 300, logits=299), training_macs(config, 300)
    assert {part for part in training if training[part] != 3 * forward[part]} == {"index scores"}
    assert training["index scores"] == forward["index scores"] > 0
