"""The engine's bench: every figure it promises is there and says what it claims to."""

from __future__ import annotations

import json

import pytest

from longreach.checkpoint.save import save_model
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import Tokenizer

SHORT = (
    "--preset", "tiny", "--repeats", 1, "--context", 40, "--batch", 3, "--decode-tokens", 3, "--prefix", 512,
    "--walk", 60, "--threads", 1, "--device", "cpu",
)  # fmt: skip


def figures_of(result) -> dict[str, float]:
    assert result.code == 0, result.err
    last = json.loads(result.out.splitlines()[-1])
    assert (last["command"], last["preset"]) == ("bench engine", "tiny")
    return last["figures"]


def test_batches_prefixes_policies_and_the_walk_leave_their_figures(longreach_command):
    pytest.importorskip("transformers")
    found = figures_of(longreach_command("bench", "engine", *SHORT, "--against", "transformers", "--json"))
    assert {"batch3_over_batch1", "batch3_over_peer", "engine_overhead", "invariant_over_fast_prefill"} <= found.keys()
    assert found["batch3_over_peer"] == pytest.approx(found["decode_batch3_tok_s"] / found["decode_batch3_peer_tok_s"])
    assert found["warm_over_cold_512"] == pytest.approx(found["cold_512_s"] / found["warm_512_s"])
    assert found["warm_equals_cold"] == found["warm_equals_cold_invariant"] == 1
    assert (found["wrong_hits"], found["wrong_reports"], found["crossed_tenants"]) == (0, 0, 0)
    assert found["walk_operations"] == 60 and found["rollout_training_difference"] == 0
    state = {policy: found[f"policy_{policy}_state_mib"] for policy in ("zero", "ends", "periodic", "full")}
    assert 0 == state["zero"] < state["ends"] < state["periodic"] < state["full"]
    again = {policy: found[f"policy_{policy}_read_again"] for policy in state}
    assert again["full"] < 128 <= again["zero"], "every page has its state, or the window is rebuilt"


def test_speculation_is_measured_on_a_model_that_has_a_draft_block(longreach_command, tmp_path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" * 40], 320)
    shape = ModelConfig.preset("tiny").replace(vocab_size=tokenizer.vocab_size)
    save_model(Transformer(shape, seed=4), tmp_path / "model", layout="official")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "text").write_text("def f(x):\n    return x\n" * 300)
    arguments = (*SHORT, "--only", "speculation", "--run", tmp_path / "model", "--prompts", tmp_path / "text", "--json")
    found = figures_of(longreach_command("bench", "engine", *arguments))
    assert {"acceptance_mtp_1", "speculation_mtp_best", "speculation_lookup_best"} <= found.keys()
    assert all(0 <= found[name] <= 1 for name in found if name.startswith("acceptance"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", 0), "--batch 0 must be 1 or more"),
        (("--prefix", 70000), "more than the context of tiny"),
        (("--only", "speculation", "--run", "nowhere"), "nowhere"),
        (("--only", "speculation", "--run", "nowhere", "--prompts", "absent"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(longreach_command, arguments, message):
    result = longreach_command("bench", "engine", *SHORT, *arguments)
    assert result.code == 2
    assert message in result.err
