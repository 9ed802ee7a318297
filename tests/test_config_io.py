"""config.json in four layouts: what is read is what was written, and nothing in a file is silently ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longreach.errors import ConfigError
from longreach.model.config import PRESETS, ModelConfig
from longreach.model.config_io import config_from_dict, read_config
from longreach.model.config_write import official_config_dict, transformers_config_dict
from longreach.model.count import count_parameters

SMALL = ModelConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=8, compress_ratios=(0, 4, 16, 4, 0), index_n_heads=16,
    index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    routed_scaling_factor=1.5, num_hash_layers=1, num_nextn_predict_layers=1, rope_factor=16.0,
)  # fmt: skip

# The released Flash configuration, key by key as published.
FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4", "hc_eps": 1e-06,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 512, "hidden_act": "silu", "index_head_dim": 128,
    "index_n_heads": 64, "initializer_range": 0.02, "max_position_embeddings": 1048576, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_experts_per_tok": 6, "num_hash_layers": 3, "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1, "o_lora_rank": 1024, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536,
                     "type": "yarn"},
    "rope_theta": 10000, "scoring_func": "sqrtsoftplus", "sliding_window": 128, "swiglu_limit": 10.0,
    "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 129280, "compress_rope_theta": 160000, "hidden_size": 4096, "index_topk": 512,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_attention_heads": 64, "num_hidden_layers": 43,
    "o_groups": 8, "q_lora_rank": 1024, "routed_scaling_factor": 1.5,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip

PRO_CHANGES = {
    "hidden_size": 7168, "index_topk": 1024, "moe_intermediate_size": 3072, "n_routed_experts": 384,
    "num_attention_heads": 128, "num_hidden_layers": 61, "o_groups": 16, "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5, "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}  # fmt: skip

# The same model as the official inference code's own config file says it.
FLASH_INFERENCE = {
    "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43, "n_hash_layers": 3, "n_heads": 64,
    "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 6, "score_func": "sqrtsoftplus",
    "route_scale": 1.5, "swiglu_limit": 10.0, "q_lora_rank": 1024, "head_dim": 512, "rope_head_dim": 64,
    "o_groups": 8, "o_lora_rank": 1024, "window_size": 128, "original_seq_len": 65536, "rope_theta": 10000,
    "rope_factor": 16, "beta_fast": 32, "beta_slow": 1, "compress_rope_theta": 160000, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "hc_mult": 4, "hc_sinkhorn_iters": 20, "dtype": "fp8",
    "scale_fmt": "ue8m0", "expert_dtype": "fp4", "n_mtp_layers": 1, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip

VARIANTS = {
    "small": SMALL,
    "no streams": SMALL.replace(residual="plain"),
    "free streams": SMALL.replace(residual="hc"),
    "dense feed-forward": SMALL.replace(feed_forward="dense", intermediate_size=96),
    "dense attention": SMALL.replace(attention="dense"),
    "sliding attention": SMALL.replace(attention="sliding"),
    "two HCA ratios": SMALL.replace(compress_ratios=(0, 4, 16, 32, 0)),
    "CSA of ratio 8": SMALL.replace(csa_ratio=8, compress_ratios=(0, 8, 16, 8, 0)),
    "no YaRN, odd lengths": SMALL.replace(rope_factor=1.0, rope_original_length=1234, rope_beta_fast=8.0),
    "unclamped": SMALL.replace(swiglu_limit=0.0),
    "invariant": SMALL.replace(arithmetic="invariant", numerics="transformers"),
    "fp8": SMALL.replace(weight_format="fp8"),
    "grouped": SMALL.replace(n_group=2, topk_group=1),
    "no MTP": SMALL.replace(num_nextn_predict_layers=0, compress_ratios=(0, 4, 16, 4)),
}


def write(path: Path, content: dict) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(content))
    return file


# ---- reading ------------------------------------------------------------------------------------------------------


def test_the_published_flash_and_pro_configs_are_the_presets():
    assert config_from_dict(FLASH) == ModelConfig.preset("flash")
    assert config_from_dict(FLASH | PRO_CHANGES) == ModelConfig.preset("pro")


def test_writing_the_flash_preset_gives_the_published_file_key_for_key():
    assert official_config_dict(ModelConfig.preset("flash")) == FLASH


def test_the_official_inference_config_is_the_same_model():
    assert config_from_dict(FLASH_INFERENCE) == ModelConfig.preset("flash")


def test_the_inference_config_without_original_seq_len_has_no_yarn():
    assert config_from_dict(FLASH_INFERENCE | {"original_seq_len": 0}).rope_factor == 1.0


def test_the_base_models_without_expert_dtype_store_fp8_throughout():
    base = {key: value for key, value in FLASH.items() if key != "expert_dtype"}
    assert config_from_dict(base).weight_format == "fp8"
    assert config_from_dict({k: v for k, v in base.items() if k != "quantization_config"}).weight_format == "plain"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("to_dict", [official_config_dict, transformers_config_dict])
def test_every_preset_survives_writing_and_reading_in_both_layouts(name, to_dict, tmp_path):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_json(write(tmp_path, to_dict(config))) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_survives_the_official_layout(name, tmp_path):
    assert ModelConfig.from_json(write(tmp_path, official_config_dict(VARIANTS[name]))) == VARIANTS[name]


def test_a_config_is_found_in_a_directory_and_in_a_runs_model_directory(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", official_config_dict(SMALL))
    write(tmp_path, {"command": "pretrain"})
    assert read_config(tmp_path) == SMALL
    assert read_config(tmp_path / "model") == SMALL


def test_a_transformers_config_says_nothing_of_mtp_so_the_weights_decide(tmp_path):
    written = transformers_config_dict(SMALL)
    del written["longreach"]
    file = write(tmp_path, written)
    assert read_config(file).num_nextn_predict_layers == 0
    index = {"weight_map": {"mtp.0.norm.weight": "a.safetensors", "model.norm.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_config(file) == SMALL.replace(numerics="transformers")
    # transformers passes our part on when it saves, but not the MTP tensors
    file = write(tmp_path, transformers_config_dict(SMALL))
    del index["weight_map"]["mtp.0.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_config(file) == SMALL.replace(num_nextn_predict_layers=0, compress_ratios=SMALL.compress_ratios[:-1])


# ---- refusing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 4096}, r"unknown key 'hiden_size'; the nearest known key is 'hidden_size'"),
        ({"attention_bias": True}, r"attention_bias=True, but the only legal value is False"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True, but the only legal value is False"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu', but the only legal value is 'silu'"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads=8, but the only legal value is 1"),
        ({"topk_method": "greedy"}, r"topk_method='greedy'"),
        ({"model_type": "llama"}, r"model_type='llama'; this program reads deepseek_v4 and deepseek_v32"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling.rope_type='linear'"),
        ({"rope_scaling": {"type": "yarn"}}, r"key 'rope_scaling.factor' is missing"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"mscale": 1.0}}, r"unknown key 'rope_scaling.mscale'"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"attention_factor": 1.3}}, r"rope_scaling.attention_factor=1.3"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config.quant_method='awq'"),
        ({"quantization_config": FLASH["quantization_config"] | {"weight_block_size": [64, 64]}}, r"weight_block_size"),
        ({"expert_dtype": "int4"}, r"expert_dtype='int4' must be 'fp4', 'fp8' or absent"),
        ({"compress_ratios": [4, 128]}, r"compress_ratios has 2 entries but .* = 44"),
        ({"compress_ratios": "4"}, r"compress_ratios='4' must be a list of whole numbers"),
        ({"vocab_size": "many"}, r"vocab_size='many' must be a whole number"),
        ({"longreach": {"numeric": "official"}}, r"unknown key 'longreach.numeric'.*'longreach.numerics'"),
        ({"longreach": {"hidden_size": 64}}, r"unknown key 'longreach.hidden_size'"),
        ({"longreach": []}, r"longreach=\[\] must be an object"),
        ({"layer_types": ["sliding_attention"] * 43}, r"compress_ratios and layer_types are both given"),
    ],
)
def test_a_wrong_or_unknown_key_is_refused_in_one_line_that_names_it(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        read_config(write(tmp_path, FLASH | change))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "compress_ratios", "rope_theta", "swiglu_limit", "index_topk"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        config_from_dict({k: v for k, v in FLASH.items() if k != key})


def test_a_misspelt_required_key_is_pointed_at():
    misspelt = {("hiden_size" if k == "hidden_size" else k): v for k, v in FLASH.items()}
    with pytest.raises(ConfigError, match="key 'hidden_size' is missing; is 'hiden_size' a misspelling of it"):
        config_from_dict(misspelt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "not valid JSON at line 1"),
        (b"[1, 2]", "holds a JSON list"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused_in_one_line(content, message, tmp_path):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_config(file)
    assert "\n" not in str(error.value)


def test_changed_transformers_keys_are_checked_against_each_other(tmp_path):
    written = transformers_config_dict(SMALL)
    bad = {
        "layer_types has 3 entries for 4 layers": {"layer_types": written["layer_types"][:3]},
        "layer_types=.* must be a list of": {"layer_types": ["full_attention"] * 4},
        "mlp_layer_types has 'hash_moe' after 'moe'": {"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]},
        "rope_theta=5.0 but rope_parameters says 10000.0": {"rope_theta": 5.0},
        "partial_rotary_factor=0.25 means 8 rotary channels": {"partial_rotary_factor": 0.25},
        "unknown key 'compress_rates.csa'": {"compress_rates": {"csa": 4}},
        "needs both 'main' and 'compress'": {"rope_parameters": {"main": written["rope_parameters"]["main"]}},
    }
    for message, change in bad.items():
        with pytest.raises(ConfigError, match=message):
            read_config(write(tmp_path, written | change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two HCA ratios", r"one HCA ratio per model, this one has \[16, 32\]"),
        ("no streams", "transformers has no residual='plain'"),
        ("dense attention", "transformers has no attention='dense'"),
        ("dense feed-forward", "transformers has no feed_forward='dense'"),
        ("unclamped", "swiglu_limit=0"),
        ("grouped", "no n_group=2"),
    ],
)
def test_what_transformers_cannot_build_is_not_written_in_its_layout(name, message):
    with pytest.raises(ConfigError, match=message):
        transformers_config_dict(VARIANTS[name])


def test_a_changed_v32_is_written_in_the_official_layout_only():
    v32 = ModelConfig.preset("v32")
    for change in (
        {"swiglu_limit": 10.0},
        {"scoring_func": "softmax"},
        {"feed_forward": "dense"},
        {"num_hash_layers": 2},
    ):
        config = v32.replace(**change)
        assert config_from_dict(official_config_dict(config)) == config
        with pytest.raises(ConfigError, match=f"DeepseekV32 has no {next(iter(change))}"):
            transformers_config_dict(config)


# ---- transformers itself --------------------------------------------------------------------------------------------


def load_with_transformers(directory: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("config", [SMALL, VARIANTS["CSA of ratio 8"], VARIANTS["no YaRN, odd lengths"],
                                    ModelConfig.preset("small"), ModelConfig.preset("flash")])  # fmt: skip
def test_transformers_reads_the_same_meaning_from_its_layout(config, tmp_path):
    write(tmp_path, transformers_config_dict(config))
    theirs = load_with_transformers(tmp_path)
    names = {
        "sliding": "sliding_attention",
        "csa": "compressed_sparse_attention",
        "hca": "heavily_compressed_attention",
    }
    assert theirs.layer_types == [names[config.layer_kind(i)] for i in range(config.num_hidden_layers)]
    assert theirs.compress_rates["compressed_sparse_attention"] == config.csa_ratio
    hca = {r for i, r in enumerate(config.compress_ratios) if config.layer_kind(i) == "hca"}
    assert hca <= {theirs.compress_rates["heavily_compressed_attention"]}
    assert theirs.mlp_layer_types.count("hash_moe") == config.num_hash_layers
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    main, compress = theirs.rope_parameters["main"], theirs.rope_parameters["compress"]
    assert (main["rope_type"], main["rope_theta"]) == ("default", config.rope_theta)
    assert compress["rope_theta"] == config.compress_rope_theta
    assert int(config.head_dim * compress["partial_rotary_factor"]) == config.qk_rope_head_dim
    if config.rope_factor > 1:
        assert compress["rope_type"] == "yarn"
        assert compress["attention_factor"] == 1.0
        assert compress["factor"] == config.rope_factor
        assert compress["original_max_position_embeddings"] == config.rope_original_length
    else:
        assert compress["rope_type"] == "default"
    for field in ("hidden_size", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_topk", "n_routed_experts",
                  "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor", "swiglu_limit", "hc_mult",
                  "sliding_window", "vocab_size", "scoring_func"):  # fmt: skip
        assert getattr(theirs, field) == getattr(config, field), field


@pytest.mark.parametrize("config", [SMALL, ModelConfig.preset("flash"), ModelConfig.preset("v32")])
def test_what_transformers_writes_again_reads_back_equal(config, tmp_path):
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", transformers_config_dict(config))
    load_with_transformers(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == config


def test_a_config_made_by_transformers_alone_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    yarn = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    transformers.DeepseekV4Config(
        num_hidden_layers=3, compress_ratios=[0, 4, 128], num_hash_layers=2, hidden_size=64, head_dim=32,
        qk_rope_head_dim=16, rope_parameters=yarn,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = read_config(tmp_path)
    assert config.compress_ratios == (0, 4, 128)
    assert config.num_hash_layers == 2
    assert config.rope_factor == 16
    assert config.numerics == "transformers"
    assert config.num_nextn_predict_layers == 0


def test_a_v32_config_made_by_transformers_alone_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    transformers.DeepseekV32Config(rope_parameters=yarn).save_pretrained(tmp_path)
    assert read_config(tmp_path) == ModelConfig.preset("v32").replace(weight_format="plain")
    yarn["mscale"] = 0.7
    transformers.DeepseekV32Config(rope_parameters=yarn).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"mscale=0.7 and mscale_all_dim=1.0 must both be given and equal"):
        read_config(tmp_path)


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_parameter_counts_equal_the_published_ones_to_the_parameter():
    flash, pro = count_parameters(ModelConfig.preset("flash")), count_parameters(ModelConfig.preset("pro"))
    assert (flash.total, flash.mtp, flash.active) == (284_332_240_471, 6_610_048_891, 13_270_101_591)
    assert (pro.total, pro.mtp, pro.active) == (1_572_997_201_763, 25_840_145_979, 48_852_402_019)


def test_parts_add_up_and_active_leaves_out_what_a_token_does_not_use():
    config = ModelConfig.preset("flash")
    count = count_parameters(config)
    assert sum(count.by_part.values()) == count.total
    assert sum(count.active_by_part.values()) == count.active
    assert count.active_by_part["experts"] * 256 == count.by_part["experts"] * 6
    assert "embedding" not in count.active_by_part
    assert count.by_part["embedding"] == count.by_part["head"] == 129_280 * 4096
