"""`longreach compare`: equal models are said to be equal, and the first operator that differs is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=8, compress_ratios=(0, 4, 16, 0), index_n_heads=16,
    index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    routed_scaling_factor=1.5, num_hash_layers=1, num_nextn_predict_layers=1, numerics="transformers",
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_model(Transformer(CONFIG), tmp_path_factory.mktemp("compare") / "original")


def changed(original: Path, directory: Path, name: str, factor: float) -> Path:
    """A copy with one element of one parameter multiplied."""
    model = load_model(original)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[3] *= factor
    return save_model(model, directory)


def report_of(longreach_command, *arguments: object) -> tuple[int, dict]:
    result = longreach_command("compare", *arguments, "--json")
    return result.code, json.loads(result.out.splitlines()[-1])


def test_two_layouts_of_one_model_are_the_same_to_the_bit(original, tmp_path, longreach_command):
    other = save_model(load_model(original), tmp_path / "t", "transformers")
    code, report = report_of(longreach_command, original, other, "--tokens", 60)
    assert code == 0
    assert report["same"] is True
    assert report["first_divergence"] is None
    assert report["parameters"]["relative"] == {}
    assert {d["max_abs"] for d in report["operators"]} == {0.0}
    names = {(d["layer"], d["operator"]) for d in report["operators"]}
    expected = {(None, "embed"), (0, "attn_norm"), (0, "attn.wq_a"), (0, "attn.wkv"), (0, "attn.kv_norm"), (0, "attn"),
                (0, "attn_hc"), (1, "attn.compressor.norm"), (1, "attn.indexer.wq_b"), (1, "attn.selection"),
                (1, "ffn.gate.chosen"), (1, "ffn.gate.weights"), (1, "ffn.shared_experts"), (2, "ffn"), (2, "ffn_hc"),
                (2, "streams"), (None, "collapse"), (None, "norm"), (None, "head"), (None, "mtp.0.e_proj")}  # fmt: skip
    assert expected <= names


@pytest.mark.parametrize(
    ("parameter", "layer", "operator"),
    [
        ("embed.weight", None, "embed"),
        ("layers.0.attn.wkv.weight", 0, "attn.wkv"),
        ("layers.1.attn.compressor.norm.weight", 1, "attn.compressor.norm"),
        ("layers.2.attn.attn_sink", 2, "attn.wo_b"),
        ("layers.1.ffn.shared_experts.w2.weight", 1, "ffn.shared_experts.w2"),
        ("layers.2.ffn.experts.w1", 2, "ffn"),
        ("layers.1.ffn_hc.base", 1, "ffn_norm"),
        ("head.weight", None, "head"),
        ("mtp.0.h_proj.weight", None, "mtp.0.h_proj"),
    ],
)
def test_the_first_operator_behind_a_changed_parameter_is_named(original, tmp_path, longreach_command, parameter, layer,
                                                                operator):  # fmt: skip
    other = changed(original, tmp_path / "b", parameter, 50.0)
    if parameter.endswith(("sink", "base")):
        model = load_model(other)
        with torch.no_grad():
            model.state_dict()[parameter] += 1.0
        save_model(model, other)
    code, report = report_of(longreach_command, original, other, "--tokens", 60)
    assert code == 1
    assert list(report["parameters"]["relative"]) == [parameter]
    first = report["first_divergence"]
    assert (first["layer"], first["operator"]) == (layer, operator)
    before = next(i for i, d in enumerate(report["operators"]) if (d["layer"], d["operator"]) == (layer, operator))
    assert all(d["max_abs"] == 0 for d in report["operators"][:before])
    assert first["relative"] > 1e-4


def test_a_different_number_of_selected_entries_shows_at_the_selection(original, tmp_path, longreach_command):
    model = load_model(original, index_topk=8)
    other = save_model(model, tmp_path / "b")
    code, report = report_of(longreach_command, original, other, "--tokens", 60)
    assert code == 1
    assert report["config"] == ["index_topk: 4 in A, 8 in B"]
    assert (report["first_divergence"]["layer"], report["first_divergence"]["operator"]) == (1, "attn.selection")


def test_a_difference_in_an_unused_parameter_is_found_too(original, tmp_path, longreach_command):
    model = load_model(original)
    with torch.no_grad():
        model.state_dict()["layers.1.ffn.gate.bias"] += torch.tensor([0.0, 0.0, 0.0, 1e-9])
    code, report = report_of(longreach_command, original, save_model(model, tmp_path / "b"))
    assert code == 1
    assert report["first_divergence"] is None
    assert list(report["parameters"]["relative"]) == ["layers.1.ffn.gate.bias"]


def test_parameters_that_only_one_model_has_are_named(original, tmp_path, longreach_command):
    model = load_model(original, num_nextn_predict_layers=0, compress_ratios=CONFIG.compress_ratios[:-1])
    code, report = report_of(longreach_command, original, save_model(model, tmp_path / "b"))
    assert code == 1
    assert "mtp.0.e_proj.weight (only in A)" in report["parameters"]["missing"]
    assert report["first_divergence"] is None


def test_the_report_for_people_names_layer_operator_and_figures(original, tmp_path, longreach_command):
    other = changed(original, tmp_path / "b", "layers.1.attn.wq_b.weight", 50.0)
    result = longreach_command("compare", original, other, "--tokens", 20)
    assert result.code == 1
    assert "first divergence beyond 0.0001: layer 1, attn.wq_b: relative " in result.out
    assert "layers.1.attn.wq_b.weight: relative " in result.out
    same = longreach_command("compare", original, original, "--tokens", 20)
    assert same.code == 0
    assert "same: nothing differs by more than 0.0001" in same.out


def test_text_is_read_through_the_tokenizer_of_a(original, tmp_path, longreach_command):
    import tokenizers

    vocabulary = {"hello": 5, "world": 6, "?": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with_tokenizer = save_model(load_model(original), tmp_path / "a", tokenizer=tmp_path / "tokenizer.json")
    code, report = report_of(longreach_command, with_tokenizer, original, "--text", "hello world hello")
    assert (code, report["tokens"]) == (0, 3)
    refused = longreach_command("compare", original, with_tokenizer, "--text", "hello")
    assert refused.code == 2
    assert "tokenizer.json, which is absent; leave --text out" in refused.err
    (with_tokenizer / "tokenizer.json").write_text("{}")
    damaged = longreach_command("compare", with_tokenizer, original, "--text", "hello")
    assert damaged.code == 2
    assert "is no valid tokenizer" in damaged.err
