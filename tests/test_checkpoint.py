"""Checkpoints: what is saved is what loads, in every layout and format; what is wrong with a file is said by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longreach.checkpoint.convert import ConvertOptions
from longreach.checkpoint.convert import main as convert
from longreach.checkpoint.load import load_model
from longreach.checkpoint.names import canonical, locate
from longreach.checkpoint.reader import Checkpoint
from longreach.checkpoint.save import encode, save_model
from longreach.checkpoint.table import TensorSpec, encoding_of, tensor_table, units
from longreach.checkpoint.writer import CheckpointWriter
from longreach.errors import CheckpointError, ConfigError
from longreach.model.config import PRESETS, ModelConfig
from longreach.model.config_io import read_config
from longreach.model.config_write import official_config_dict
from longreach.model.count import count_parameters
from longreach.model.shapes import parameter_shapes
from longreach.model.transformer import Transformer
from longreach.ops.quant import fp4_weight_decode, fp4_weight_encode, fp8_weight_decode, fp8_weight_encode

# Sixteen index heads: with few, all scores of an entry are often exactly 0, and which of the tied is chosen is open.
SMALL = ModelConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=8, compress_ratios=(0, 4, 16, 4, 0), index_n_heads=16,
    index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    routed_scaling_factor=1.5, num_hash_layers=1, num_nextn_predict_layers=1, rope_factor=16.0,
    numerics="transformers",
)  # fmt: skip
V32 = ModelConfig.preset("v32").replace(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    qk_nope_head_dim=16, v_head_dim=16, q_lora_rank=32, kv_lora_rank=32, index_n_heads=16, index_head_dim=32,
    index_topk=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32,
    intermediate_size=48, first_k_dense_replace=1, weight_format="plain", numerics="transformers",
)  # fmt: skip
VARIANTS = {
    "hybrid": SMALL,
    "no streams": SMALL.replace(residual="plain"),
    "free streams": SMALL.replace(residual="hc"),
    "dense attention": SMALL.replace(attention="dense"),
    "sliding attention": SMALL.replace(attention="sliding"),
    "dense feed-forward": SMALL.replace(feed_forward="dense", intermediate_size=48),
    "two HCA ratios": SMALL.replace(compress_ratios=(0, 4, 16, 8, 0)),
    "V3.2": V32,
}


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A model whose every value is random, so that no two tensors could be mistaken for each other."""
    model = Transformer(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.float() + 0.1 * torch.randn(value.shape, generator=generator))
    return model


def tokens_of(config: ModelConfig, count: int = 50) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, count), generator=torch.Generator().manual_seed(1))


def assert_same_weights(a: Transformer, b: Transformer) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def edit(directory: Path, change) -> None:
    """Rewrite model.safetensors after `change(tensors)`."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint in the official layout."""
    return save_model(random_model(SMALL), tmp_path / "saved")


# ---- the tensor table ---------------------------------------------------------------------------------------------


def test_the_table_of_flash_has_the_published_tensors_and_bytes():
    table = tensor_table(ModelConfig.preset("flash"))
    assert len(table) == len({spec.name for spec in table}) == 69_187
    assert sum(spec.nbytes for spec in table) == 159_609_485_896
    census = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792, "I64": 3}
    assert Counter(spec.dtype for spec in table) == census


def test_the_table_of_pro_has_the_published_tensors_and_bytes():
    table = tensor_table(ModelConfig.preset("pro"))
    assert len(table) == 145_116
    assert sum(spec.nbytes for spec in table) == 864_704_792_696
    census = {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I8": 71_424, "I64": 3}
    assert Counter(spec.dtype for spec in table) == census


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("layers.2.attn.wq_b.weight", (32768, 1024), "F8_E4M3"),
        ("layers.2.attn.wq_b.scale", (256, 8), "F8_E8M0"),
        ("layers.2.attn.attn_sink", (64,), "F32"),
        ("layers.2.attn.compressor.ape", (4, 1024), "F32"),
        ("layers.3.attn.compressor.ape", (128, 512), "F32"),
        ("layers.3.attn.compressor.wgate.weight", (512, 4096), "BF16"),
        ("layers.2.attn.indexer.compressor.wkv.weight", (256, 4096), "BF16"),
        ("layers.42.hc_attn_fn", (24, 16384), "F32"),
        ("layers.0.ffn.gate.tid2eid", (129280, 6), "I64"),
        ("layers.3.ffn.gate.bias", (256,), "F32"),
        ("layers.3.ffn.experts.255.w2.weight", (4096, 1024), "I8"),
        ("layers.3.ffn.experts.255.w2.scale", (4096, 64), "F8_E8M0"),
        ("layers.3.ffn.shared_experts.w1.weight", (2048, 4096), "F8_E4M3"),
        ("mtp.0.e_proj.weight", (4096, 4096), "F8_E4M3"),
        ("mtp.0.hc_head_base", (4,), "F32"),
        ("hc_head_fn", (4, 16384), "F32"),
        ("head.weight", (129280, 4096), "BF16"),
    ],
)
def test_released_tensors_are_in_the_table_as_published(name, shape, dtype):
    assert TensorSpec(name, shape, dtype) in tensor_table(ModelConfig.preset("flash"))


@pytest.mark.parametrize("config", [*map(ModelConfig.preset, PRESETS), *VARIANTS.values()],
                         ids=[*PRESETS, *VARIANTS])  # fmt: skip
def test_the_shape_table_is_the_models_state_dict(config):
    model = Transformer(config, device="meta")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        p.name: p.shape for p in parameter_shapes(config)
    }
    count = count_parameters(config)
    floats = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    assert count.total + count.mtp == floats


def test_the_kinds_of_the_shape_table_are_the_dtypes_of_a_bfloat16_model():
    dtypes = {"int64": torch.int64, "float32": torch.float32}
    model = Transformer(SMALL, dtype=torch.bfloat16, device="meta")
    for parameter in parameter_shapes(SMALL):
        assert model.state_dict()[parameter.name].dtype == dtypes.get(parameter.kind, torch.bfloat16), parameter.name


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ModelConfig.preset("tiny"), V32, VARIANTS["dense feed-forward"]],
                         ids=["tiny", "V3.2", "dense"])  # fmt: skip
def test_every_spelling_of_a_tensor_has_one_canonical_name(config):
    for unit in units(config):
        is_mla = config.attention == "mla"
        official = locate(unit.parameter.name, unit.expert, False, "official")
        for layout in ("official", "saved", "transformers", "transformers-per-expert"):
            location = locate(unit.parameter.name, unit.expert, is_mla, layout)
            if location.expert is None:
                assert canonical(location.name) == official.name
                assert canonical(location.scale_name) == official.scale_name or not unit.parameter.name.endswith(
                    "weight"
                )


@pytest.mark.parametrize(
    ("theirs", "official"),
    [
        (
            "model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.7.attn.indexer.weights_proj.weight",
        ),
        ("model.layers.7.attn.compressor.indexer.wkv.weight", "layers.7.attn.indexer.compressor.wkv.weight"),
        ("model.layers.7.attn.compressor.indexer.norm.weight", "layers.7.attn.indexer.compressor.norm.weight"),
        ("model.layers.7.attn.norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.self_attn.compressor.gate_proj.weight", "layers.7.attn.compressor.wgate.weight"),
        ("model.layers.7.mlp.shared_experts.gate_proj.weight", "layers.7.ffn.shared_experts.w1.weight"),
        ("model.layers.7.mlp.gate.e_score_correction_bias", "layers.7.ffn.gate.bias"),
        ("model.layers.7.self_attn.q_a_proj.weight_scale_inv", "layers.7.attn.wq_a.scale"),
        ("model.layers.7.mlp.experts.gate_up_proj_scale_inv", "layers.7.ffn.experts.gate_up_proj_scale"),
        ("model.layers.7.mlp.experts.down_proj", "layers.7.ffn.experts.down_proj"),
        ("model.hc_head.hc_scale", "hc_head_scale"),
        ("model.layers.7.ffn_hc.scale", "layers.7.hc_ffn_scale"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", "head.weight"),
    ],
)  # fmt: skip
def test_names_of_transformers_and_its_mixtures_become_official(theirs, official):
    assert canonical(theirs) == official
    assert canonical(official) == official


@pytest.mark.parametrize("name", ["", "model", "indexer", "layers.0.attn.compressor.indexer", "a..b", "norm"])
def test_a_meaningless_name_is_just_an_unexpected_tensor(name, saved):
    edit(saved, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load_model(saved)


def test_one_tensor_under_two_names_is_refused(saved):
    edit(saved, lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.zeros(4)}))
    with pytest.raises(
        CheckpointError, match=r"one tensor under two names, layers.0.attn.attn_sink and model.layers.0"
    ):
        load_model(saved)


# ---- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_model_loads_with_the_same_bits_and_config(name, tmp_path):
    model = random_model(VARIANTS[name])
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert loaded.config == VARIANTS[name]
    assert_same_weights(model, loaded)


@pytest.mark.parametrize("config", [SMALL, V32], ids=["V4", "V3.2"])
@pytest.mark.parametrize("weight_format", ["plain", "fp8", "fp8-fp4"])
def test_both_layouts_hold_the_same_model(config, weight_format, tmp_path):
    model = random_model(config)
    official = load_model(save_model(model, tmp_path / "o", "official", weight_format))
    theirs = load_model(save_model(model, tmp_path / "t", "transformers", weight_format))
    assert_same_weights(official, theirs)
    assert theirs.config == official.config == config.replace(weight_format=weight_format)


def test_quantised_weights_load_as_exactly_what_the_codes_mean(tmp_path):
    model = random_model(SMALL)
    loaded = load_model(save_model(model, tmp_path / "m", weight_format="fp8-fp4"))
    for parameter in parameter_shapes(SMALL):
        before, after = model.state_dict()[parameter.name], loaded.state_dict()[parameter.name]
        if parameter.kind == "linear":
            assert torch.equal(after, fp8_weight_decode(*fp8_weight_encode(before))), parameter.name
        elif parameter.kind == "expert":
            assert torch.equal(after, fp4_weight_decode(*fp4_weight_encode(before))), parameter.name
        elif parameter.kind == "float":
            assert torch.equal(after, before.bfloat16().float()), parameter.name
        else:
            assert torch.equal(after, before), parameter.name


def test_a_quantised_model_saved_again_keeps_every_byte_of_its_values(tmp_path):
    first = load_model(save_model(random_model(SMALL), tmp_path / "a", weight_format="fp8-fp4"))
    again = load_model(save_model(first, tmp_path / "b"))  # its config says fp8-fp4
    assert again.config.weight_format == "fp8-fp4"
    assert_same_weights(first, again)
    in_bfloat16 = load_model(tmp_path / "a", dtype=torch.bfloat16)
    assert torch.equal(
        in_bfloat16.state_dict()["layers.1.attn.wq_b.weight"].float(), first.state_dict()["layers.1.attn.wq_b.weight"]
    )


def test_a_bfloat16_model_keeps_its_float32_parts_on_disk_and_in_memory(tmp_path):
    model = random_model(SMALL, torch.bfloat16)
    directory = save_model(model, tmp_path / "m")
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.get_slice("layers.1.attn.wq_a.weight").get_dtype() == "BF16"
        assert file.get_slice("layers.1.hc_attn_fn").get_dtype() == "F32"
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_weights(model, load_model(directory, dtype=torch.bfloat16))
    assert load_model(directory).dtype == torch.float32


def test_the_official_file_is_an_ordinary_safetensors_file_with_official_names(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert names == {spec.name for spec in tensor_table(SMALL)}
        assert {
            "layers.1.ffn.experts.3.w1.weight",
            "layers.1.hc_ffn_scale",
            "hc_head_fn",
            "mtp.0.enorm.weight",
        } <= names
        assert not any("collapse" in name or "attn_hc" in name for name in names)
        model = load_model(saved)
        assert torch.equal(
            file.get_tensor("layers.1.ffn.experts.3.w1.weight"), model.state_dict()["layers.1.ffn.experts.w1"][3]
        )


def test_the_transformers_file_stacks_w1_above_w3(tmp_path):
    model = random_model(SMALL)
    directory = save_model(model, tmp_path / "m", "transformers")
    with safe_open(directory / "model.safetensors", "pt") as file:
        stacked = file.get_tensor("model.layers.2.mlp.experts.gate_up_proj")
        assert torch.equal(
            stacked,
            torch.cat(
                [model.state_dict()["layers.2.ffn.experts.w1"], model.state_dict()["layers.2.ffn.experts.w3"]], dim=1
            ),
        )
        assert torch.equal(
            file.get_tensor("model.layers.2.self_attn.sinks"), model.state_dict()["layers.2.attn.attn_sink"]
        )


def test_stacked_quantised_experts_are_read_as_transformers_keeps_them_in_memory(tmp_path):
    model = random_model(SMALL)
    config = SMALL.replace(weight_format="fp8")
    with CheckpointWriter(tmp_path / "m", tensor_table(config, "transformers")) as writer:
        for unit in units(config):
            values = model.state_dict()[unit.parameter.name]
            codes, scales = encode(values if unit.expert is None else values[unit.expert],
                                   encoding_of(unit.parameter, "fp8"))  # fmt: skip
            writer.write_unit(locate(unit.parameter.name, unit.expert, False, "transformers"), codes, scales)
        writer.write_text("config.json", json.dumps(official_config_dict(config)))
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert "model.layers.2.mlp.experts.gate_up_proj_scale_inv" in file.keys()  # noqa: SIM118
    assert_same_weights(load_model(tmp_path / "m"), load_model(save_model(model, tmp_path / "o", weight_format="fp8")))


def test_shards_are_limited_and_indexed(tmp_path):
    model = random_model(SMALL)
    directory = save_model(model, tmp_path / "m", max_shard_bytes=200_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 3
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert all(shard.stat().st_size < 200_000 + 20_000 for shard in shards)
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in tensor_table(SMALL, plain_dtype="F32"))
    assert_same_weights(model, load_model(directory))


def test_a_run_directory_loads_its_model_and_overrides_apply(saved, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    saved.rename(run / "model")
    assert load_model(run, arithmetic="invariant").config == SMALL.replace(arithmetic="invariant")
    without = load_model(run, num_nextn_predict_layers=0, compress_ratios=SMALL.compress_ratios[:-1])
    assert len(without.mtp) == 0
    with pytest.raises(ConfigError, match="unknown config field 'numeric'"):
        load_model(run, numeric="official")


def test_a_tokenizer_travels_with_the_model(tmp_path):
    source = tmp_path / "tokenizer.json"
    source.write_text('{"version": "1.0"}')
    directory = save_model(random_model(SMALL), tmp_path / "m", tokenizer=source)
    assert (directory / "tokenizer.json").read_text() == source.read_text()
    convert(ConvertOptions(directory, tmp_path / "c", "transformers"))
    assert (tmp_path / "c" / "tokenizer.json").read_text() == source.read_text()


# ---- never half-written -------------------------------------------------------------------------------------------


def test_saving_replaces_a_checkpoint_but_nothing_else(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "model-00001-of-00002.safetensors").write_text("stale")
    model = random_model(SMALL, seed=5)
    save_model(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert_same_weights(model, load_model(saved))
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_directory_that_holds_something_else_is_never_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("...")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        save_model(random_model(SMALL), tmp_path / "letters")
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(random_model(SMALL), tmp_path / "letters" / "dear.txt")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "..."


def test_a_failure_while_writing_leaves_the_old_checkpoint_and_no_rubbish(saved):
    before = (saved / "model.safetensors").read_bytes()

    def broken_tokenizer_save(path):
        raise OSError(28, "No space left on device")

    tokenizer: Any = SimpleNamespace(save=broken_tokenizer_save)
    with pytest.raises(OSError, match="No space left"):
        save_model(random_model(SMALL, seed=5), saved, tokenizer=tokenizer)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path):
    huge = [TensorSpec("x", (1 << 60,), "I8")]
    with pytest.raises(CheckpointError, match="needs 1,152,921,504,606,846,976 bytes but its disk has"):
        CheckpointWriter(tmp_path / "m", huge)
    assert list(tmp_path.iterdir()) == []


# ---- converting ---------------------------------------------------------------------------------------------------


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in names
    )


@pytest.mark.parametrize("config", [SMALL, V32], ids=["V4", "V3.2"])
@pytest.mark.parametrize("weight_format", ["plain", "fp8", "fp8-fp4"])
def test_converting_there_and_back_gives_the_same_bytes(config, weight_format, tmp_path):
    save_model(random_model(config), tmp_path / "a", weight_format=weight_format)
    convert(ConvertOptions(tmp_path / "a", tmp_path / "b", "transformers"))
    convert(ConvertOptions(tmp_path / "b", tmp_path / "c", "official"))
    assert same_files(tmp_path / "a", tmp_path / "c")
    assert_same_weights(load_model(tmp_path / "a"), load_model(tmp_path / "b"))


def test_conversion_keeps_scales_that_this_encoder_would_not_choose(tmp_path):
    directory = save_model(random_model(SMALL), tmp_path / "a", weight_format="fp8")
    before = load_model(directory).state_dict()["layers.0.attn.wq_a.weight"]

    def double_a_scale(tensors):
        scale = tensors["layers.0.attn.wq_a.scale"].view(torch.uint8)
        scale += 1

    edit(directory, double_a_scale)
    convert(ConvertOptions(directory, tmp_path / "b", "transformers"))
    assert torch.equal(load_model(tmp_path / "b").state_dict()["layers.0.attn.wq_a.weight"], before * 2)


def test_quantising_while_converting_equals_quantising_while_saving(tmp_path):
    model = random_model(SMALL)
    plain = save_model(model, tmp_path / "plain")
    convert(ConvertOptions(plain, tmp_path / "converted", "official", quantize="fp8-fp4"))
    save_model(model, tmp_path / "saved", weight_format="fp8-fp4")
    assert same_files(tmp_path / "converted", tmp_path / "saved")
    convert(ConvertOptions(tmp_path / "saved", tmp_path / "decoded", "official", quantize="plain"))
    assert_same_weights(load_model(tmp_path / "decoded"), load_model(tmp_path / "saved"))
    assert read_config(tmp_path / "decoded").weight_format == "plain"
    with Checkpoint.open(tmp_path / "decoded") as checkpoint:
        assert checkpoint.tensors["layers.0.attn.wq_a.weight"].dtype == "BF16"


def test_convert_reports_counts_and_refuses_a_filled_destination(saved, tmp_path, longreach_command):
    result = longreach_command("convert", saved, tmp_path / "t", "--to", "transformers", "--json")
    assert result.code == 0
    report = json.loads(result.out.splitlines()[-1])
    table = tensor_table(SMALL, "transformers", "F32")
    assert report["tensors"] == len(table)
    assert report["bytes"] == sum(spec.nbytes for spec in table)
    again = longreach_command("convert", saved, tmp_path / "t", "--to", "official")
    assert again.code == 2
    assert "is not empty; give another directory, or --force" in again.err
    assert longreach_command("convert", saved, tmp_path / "t", "--to", "official", "--force").code == 0
    assert_same_weights(load_model(saved), load_model(tmp_path / "t"))


def test_conversion_never_holds_more_than_one_matrix(saved, tmp_path, monkeypatch):
    largest = max(torch.Size(unit.shape).numel() for unit in units(SMALL))
    seen = []
    original = CheckpointWriter.write_unit

    def spy(self, location, codes, scales):
        seen.append(codes.numel())
        original(self, location, codes, scales)

    monkeypatch.setattr(CheckpointWriter, "write_unit", spy)
    convert(ConvertOptions(saved, tmp_path / "t", "transformers"))
    assert max(seen) == largest
    assert len(seen) == len(list(units(SMALL)))


# ---- what is wrong is said ----------------------------------------------------------------------------------------


def check_refused(directory: Path, longreach_command, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    for part in parts:
        assert part in str(error.value), str(error.value)
    result = longreach_command("compare", directory, directory)
    assert result.code == 2
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("longreach: ")
    assert "Traceback" not in result.err


def test_a_truncated_file_is_named(saved, longreach_command):
    file = saved / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 1000)
    check_refused(saved, longreach_command, "model.safetensors is cut off", f"it has {size - 1000} bytes", str(size))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, (8).to_bytes(8, "little") + b"not json",
                                     (2).to_bytes(8, "little") + b"[]"])  # fmt: skip
def test_a_file_that_is_no_safetensors_file_is_named(saved, content, longreach_command):
    (saved / "model.safetensors").write_bytes(content)
    check_refused(saved, longreach_command, "model.safetensors")


def test_an_absent_shard_is_named(tmp_path, longreach_command):
    directory = save_model(random_model(SMALL), tmp_path / "m", max_shard_bytes=200_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    check_refused(directory, longreach_command, "lacks 1 of its files", shard.name)


def test_a_damaged_index_is_named(tmp_path, longreach_command):
    directory = save_model(random_model(SMALL), tmp_path / "m", max_shard_bytes=200_000)
    (directory / "model.safetensors.index.json").write_text("{")
    check_refused(directory, longreach_command, "index.json is no valid shard index")


def test_missing_unexpected_and_misshapen_tensors_are_listed_by_name_in_one_error(saved, longreach_command):
    def change(tensors):
        del tensors["layers.1.attn.wq_a.weight"]
        del tensors["layers.2.ffn.experts.3.w2.weight"]
        tensors["layers.9.attn_norm.weight"] = torch.ones(64)
        tensors["layers.0.attn.wkv.weight"] = torch.ones(32, 63)
        tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].float()

    edit(saved, change)
    check_refused(
        saved,
        longreach_command,
        "2 missing (layers.1.attn.wq_a.weight, layers.2.ffn.experts.3.w2.weight)",
        "1 unexpected (layers.9.attn_norm.weight)",
        "2 of another shape or dtype (layers.0.attn.wkv.weight is [32, 63], should be [32, 64], "
        "layers.0.ffn.gate.tid2eid is F32)",
    )


def test_many_problems_are_counted_and_the_first_few_named(saved):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    edit(saved, change)
    with pytest.raises(CheckpointError, match=r"60 missing \(.*, and 55 more\)"):
        load_model(saved)


def test_a_wrong_stacked_tensor_is_named_once(tmp_path, longreach_command):
    directory = save_model(random_model(SMALL), tmp_path / "m", "transformers")

    def change(tensors):
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 62, 64)
        del tensors["model.layers.1.mlp.experts.down_proj"]

    edit(directory, change)
    check_refused(
        directory,
        longreach_command,
        "1 missing (model.layers.1.mlp.experts.down_proj)",
        "1 of another shape or dtype (model.layers.0.mlp.experts.gate_up_proj is [4, 62, 64], should be [4, 64, 64])",
    )


def test_a_quantised_weight_without_its_scale_is_missing_it(tmp_path, longreach_command):
    directory = save_model(random_model(SMALL), tmp_path / "m", weight_format="fp8")
    edit(directory, lambda tensors: tensors.pop("layers.1.attn.wq_a.scale"))
    check_refused(directory, longreach_command, "1 missing (layers.1.attn.wq_a.scale)")


def test_a_routing_table_with_an_unknown_expert_is_refused(saved, longreach_command):
    edit(saved, lambda tensors: tensors["layers.0.ffn.gate.tid2eid"].fill_(4))
    check_refused(saved, longreach_command, "layers.0.ffn.gate.tid2eid routes to experts outside 0..3")


def test_an_unknown_config_key_stops_a_command_with_one_line(saved, longreach_command):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"index_topq": 3}))
    result = longreach_command("inspect", saved)
    assert (result.code, result.out) == (2, "")
    assert "unknown key 'index_topq'; the nearest known key is 'index_topk'" in result.err
    assert len(result.err.strip().splitlines()) == 1


# ---- inspecting ---------------------------------------------------------------------------------------------------


def write_sparse_checkpoint(directory: Path, table: list[TensorSpec], config: ModelConfig, shards: int = 3) -> None:
    """A checkpoint with real headers and holes for data: any size, no disk."""
    directory.mkdir()
    weight_map = {}
    for shard in range(shards):
        specs = table[shard::shards]
        header, offset = {}, 0
        for spec in specs:
            entry = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
            header[spec.name] = entry
            offset += spec.nbytes
            weight_map[spec.name] = f"part-{shard}.safetensors"
        encoded = json.dumps(header).encode()
        with (directory / f"part-{shard}.safetensors").open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + offset)
    (directory / "config.json").write_text(json.dumps(official_config_dict(config)))
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in table)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def flash_headers(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("flash") / "checkpoint"
    config = ModelConfig.preset("flash")
    write_sparse_checkpoint(directory, tensor_table(config), config)
    return directory


def test_all_69187_tensors_of_flash_are_checked_from_headers(flash_headers, longreach_command):
    result = longreach_command("inspect", flash_headers, "--against", "flash")
    assert result.code == 0
    assert "69,187 tensors, all names, shapes and dtypes are those of flash" in result.out
    assert "284,332,240,471" in result.out
    assert "13,270,101,591" in result.out
    assert "159,609,485,896" in result.out


def test_every_difference_from_flash_is_listed_and_the_exit_code_is_1(tmp_path, longreach_command):
    config = ModelConfig.preset("flash")
    table = tensor_table(config)
    by_name = {spec.name: i for i, spec in enumerate(table)}
    at = by_name["layers.7.ffn.experts.12.w1.weight"]
    table[at] = TensorSpec(table[at].name, (2048, 2047), "I8")
    at = by_name["norm.weight"]
    table[at] = TensorSpec("norm.weight", (4096,), "F32")
    at = by_name["mtp.0.hnorm.weight"]
    table[at] = TensorSpec("mtp.0.other.weight", (4096,), "BF16")
    write_sparse_checkpoint(tmp_path / "c", table, config)
    result = longreach_command("inspect", tmp_path / "c", "--against", "flash", "--json")
    assert result.code == 1
    against = json.loads(result.out.splitlines()[-1])["against"]
    assert {d["name"]: d["what"] for d in against["differences"]} == {
        "layers.7.ffn.experts.12.w1.weight": "shape [2048, 2047], expected [2048, 2048]",
        "norm.weight": "dtype F32, expected BF16",
        "mtp.0.hnorm.weight": "missing",
        "mtp.0.other.weight": "unexpected",
    }


def test_a_config_that_says_otherwise_than_flash_is_a_difference_too(flash_headers, tmp_path, longreach_command):
    (tmp_path / "config.json").write_text(
        json.dumps(official_config_dict(ModelConfig.preset("flash").replace(routed_scaling_factor=2.5)))
    )
    (tmp_path / "model.safetensors.index.json").write_bytes(
        (flash_headers / "model.safetensors.index.json").read_bytes()
    )
    result = longreach_command("inspect", tmp_path, "--against", "flash")
    assert result.code == 1
    assert "config differs: routed_scaling_factor=2.5, expected 1.5" in result.out


def test_an_index_alone_is_checked_by_name_and_says_so(flash_headers, tmp_path, longreach_command):
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((flash_headers / name).read_bytes())
    result = longreach_command("inspect", tmp_path, "--against", "flash")
    assert result.code == 0
    assert "only the index is here: names are checked, shapes and dtypes cannot be" in result.out
    assert "69,187 tensors, all names are those of flash" in result.out
    assert "159,609,485,896" in result.out


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_inspected_without_any_file(name, longreach_command):
    result = longreach_command("inspect", name, "--json")
    assert result.code == 0
    report = json.loads(result.out.splitlines()[-1])
    assert report["parameters"]["total"] == count_parameters(ModelConfig.preset(name)).total


def test_inspecting_what_does_not_exist_is_refused(tmp_path, longreach_command):
    result = longreach_command("inspect", tmp_path / "nothing")
    assert result.code == 2
    assert "neither a checkpoint directory nor a preset (flash, pro" in result.err
    empty = longreach_command("inspect", tmp_path)
    assert empty.code == 2
    assert "config.json does not exist" in empty.err


# ---- transformers -------------------------------------------------------------------------------------------------


def transformers_model(directory: Path, **options):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("config", [SMALL, V32], ids=["V4", "V3.2"])
@torch.no_grad()
def test_transformers_loads_what_we_save_and_computes_the_same_logits(config, tmp_path):
    pytest.importorskip("transformers")
    ours = random_model(config)
    theirs = transformers_model(save_model(ours, tmp_path / "m", "transformers"))
    tokens = tokens_of(config)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("config", [SMALL, V32], ids=["V4", "V3.2"])
@torch.no_grad()
def test_what_transformers_saves_loads_with_the_same_bits(config, tmp_path):
    pytest.importorskip("transformers")
    ours = random_model(config)
    theirs = transformers_model(save_model(ours, tmp_path / "m", "transformers"))
    theirs.save_pretrained(tmp_path / "theirs")  # under a mixture of names: see longreach.checkpoint.names
    loaded = load_model(tmp_path / "theirs")
    assert loaded.config.num_nextn_predict_layers == 0
    state = ours.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    tokens = tokens_of(config)
    assert torch.equal(loaded(tokens), ours(tokens))


@torch.no_grad()
def test_a_model_made_by_transformers_alone_loads_with_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
        q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=8, compress_ratios=[0, 4, 128], index_n_heads=16,
        index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        num_hash_layers=1,
    )  # fmt: skip
    theirs = transformers.DeepseekV4ForCausalLM(config).eval()
    theirs.state_dict()["model.layers.0.mlp.gate.tid2eid"].copy_(torch.rand(64, 4).argsort(1)[:, :2])
    theirs.save_pretrained(tmp_path)
    tokens = tokens_of(SMALL, 140)
    torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("weight_format", ["fp8", "fp8-fp4"])
@torch.no_grad()
def test_transformers_decodes_our_quantised_checkpoints_to_the_same_logits(layout, weight_format, tmp_path):
    # Widths are multiples of 128, since transformers infers the tile size from the scale grid.
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads quantised weights only with accelerate installed")
    config = SMALL.replace(hidden_size=128, head_dim=128, q_lora_rank=128, o_lora_rank=128, moe_intermediate_size=128,
                           compress_ratios=(0, 4, 128, 4, 0))  # fmt: skip
    directory = save_model(random_model(config), tmp_path / "m", layout, weight_format)
    theirs = transformers_model(directory, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    tokens = tokens_of(config, 140)
    ours = load_model(directory)
    torch.testing.assert_close(theirs.float()(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)
