"""Writing `config.json` in the published layout and in transformers', so that `config_io` reads an equal config back.

    official_config_dict(config)          any model; for the presets `flash` and `pro` the published file key for key
    transformers_config_dict(config)      what transformers can build, refused otherwise

What a layout cannot say goes into its "longreach" part. transformers ignores that part, so where ignoring it would make
another model, its layout is refused instead.
"""

from __future__ import annotations

import math
from typing import Any

from longreach.errors import ConfigError
from longreach.model.config import ModelConfig
from longreach.model.config_io import DEFAULTS, KIND_TO_LAYER_TYPE, V4_FIELDS, V32_FIELDS, WEIGHT_TILE, YARN_FIELDS


def official_config_dict(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The published `config.json` of a model.

    Args:
        config: any config. What the published layout cannot say goes into its "longreach" part.
        dtype: name of the torch dtype of the unquantised weights.
    """
    if config.attention == "mla":
        written = _v32_dict(config)
        written["rope_theta"] = config.rope_theta
        if config.rope_factor != 1:
            written["rope_scaling"] = {"type": "yarn", **_yarn_dict(config), **_mscale_dict(config)}
        written |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
        expressed, assumed = _v32_expressed(config), _v32_assumed(config)
    else:
        written = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
        written |= {name: getattr(config, name) for name in V4_FIELDS}
        written["compress_ratios"] = list(config.compress_ratios)
        if config.rope_factor != 1:
            written["rope_scaling"] = {"type": "yarn", **_yarn_dict(config)}
        written |= {"num_key_value_heads": 1, "topk_method": "noaux_tc"}
        expressed, assumed = {*V4_FIELDS, "compress_ratios", "weight_format"} | _yarn_expressed(config), DEFAULTS
    written |= _shared_dict(config)
    written["torch_dtype"] = dtype
    return written | _own_part(config, expressed, assumed)


def transformers_config_dict(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The `config.json` with which transformers builds the same model.

    layer_types and compress_rates are always given: transformers' default schedule is not the released one.

    Raises:
        ConfigError: transformers cannot build this model: one of the switches is thrown, HCA layers have different
            ratios (it knows one per model), or SwiGLU is not clamped.
    """
    if config.attention == "mla":
        _check_transformers_can_v32(config)
        written = _v32_dict(config)
        written["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_factor != 1:
            written["rope_parameters"] |= {"rope_type": "yarn", **_yarn_dict(config), **_mscale_dict(config)}
        layers = range(config.num_hidden_layers)
        written["mlp_layer_types"] = ["dense" if config.is_dense_ffn(i) else "sparse" for i in layers]
        written["layer_types"] = ["indexed_attention"] * config.num_hidden_layers
        written |= _shared_dict(config)
        written["dtype"] = dtype
        return written | _own_part(config, _v32_expressed(config), _v32_assumed(config))

    hca_ratio = _check_transformers_can(config)
    kinds = [config.layer_kind(i) for i in range(config.num_hidden_layers)]
    rotary = _partial_rotary_factor(config)
    written = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    written |= {name: getattr(config, name) for name in V4_FIELDS}
    written |= {
        "layer_types": [KIND_TO_LAYER_TYPE[kind] for kind in kinds],
        "compress_rates": {
            KIND_TO_LAYER_TYPE["csa"]: config.csa_ratio,
            KIND_TO_LAYER_TYPE["hca"]: hca_ratio,
        },
        "mlp_layer_types": ["hash_moe" if config.is_hash_layer(i) else "moe" for i in range(config.num_hidden_layers)],
        "num_key_value_heads": 1,
        "partial_rotary_factor": rotary,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": rotary},
            "compress": {
                "rope_type": "default",
                "rope_theta": config.compress_rope_theta,
                "partial_rotary_factor": rotary,
            },
        },
        "mlp_bias": False,
    }
    if config.rope_factor != 1:
        # The factor on cos and sin is 1 in V4; left out, transformers would derive another from the YaRN factor.
        written["rope_parameters"]["compress"] |= {"rope_type": "yarn", "attention_factor": 1.0, **_yarn_dict(config)}
    del written["num_hash_layers"]
    written |= _shared_dict(config)
    written["dtype"] = dtype
    expressed = {*V4_FIELDS, "compress_ratios", "csa_ratio", "weight_format"} | _yarn_expressed(config)
    # Always present here: it tells the reader to believe num_nextn_predict_layers.
    own = _own_part(config, expressed | {"numerics"}).get("longreach", {})
    return written | {"longreach": {"numerics": config.numerics, **own}}


def _check_transformers_can(config: ModelConfig) -> int:
    """Raise unless transformers' DeepseekV4 can be this model; return its one HCA ratio."""
    for name, only in (("attention", "hybrid"), ("residual", "mhc"), ("feed_forward", "moe")):
        if getattr(config, name) != only:
            raise ConfigError(
                f"transformers has no {name}={getattr(config, name)!r}, only {only!r}; "
                "write the official layout instead"
            )
    layers = range(config.num_hidden_layers)
    hca = sorted({config.compress_ratios[i] for i in layers if config.layer_kind(i) == "hca"})
    if len(hca) > 1:
        raise ConfigError(
            f"transformers knows one HCA ratio per model, this one has {hca}; write the official layout instead"
        )
    if config.num_nextn_predict_layers and config.compress_ratios[-1] != 0:
        raise ConfigError(
            f"the transformers layout cannot say that the MTP block compresses (ratio {config.compress_ratios[-1]}); "
            "write the official layout instead"
        )
    if config.swiglu_limit == 0:
        raise ConfigError("transformers always clamps SwiGLU, this model has swiglu_limit=0; write the official layout")
    for name, only in (("n_group", 1), ("first_k_dense_replace", 0)):
        if getattr(config, name) != only:
            raise ConfigError(
                f"transformers' DeepseekV4 has no {name}={getattr(config, name)}; write the official layout instead"
            )
    return hca[0] if hca else 128


def _check_transformers_can_v32(config: ModelConfig) -> None:
    """Raise unless transformers' DeepseekV32 can be this model."""
    for name, only in (
        ("feed_forward", "moe"),
        ("scoring_func", "sigmoid"),
        ("swiglu_limit", 0),
        ("num_hash_layers", 0),
    ):
        if getattr(config, name) != only:
            raise ConfigError(
                f"transformers' DeepseekV32 has no {name}={getattr(config, name)!r}; write the official layout instead"
            )


def _partial_rotary_factor(config: ModelConfig) -> float:
    """The factor f with int(head_dim * f) == qk_rope_head_dim, which is how transformers uses it."""
    factor = config.qk_rope_head_dim / config.head_dim
    while int(config.head_dim * factor) < config.qk_rope_head_dim:
        factor = math.nextafter(factor, math.inf)
    return factor


def _v32_dict(config: ModelConfig) -> dict[str, Any]:
    written = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    written |= {name: getattr(config, name) for name in V32_FIELDS}
    return written | {"num_key_value_heads": config.num_attention_heads}


def _v32_expressed(config: ModelConfig) -> set[str]:
    expressed = {*V32_FIELDS, "attention", "rope_theta", "weight_format"} | _yarn_expressed(config)
    return expressed | {"rope_mscale_all_dim"} if config.rope_factor != 1 else expressed


def _v32_assumed(config: ModelConfig) -> dict[str, Any]:
    """What a reader of a V3.2 file takes for granted."""
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return DEFAULTS | {"residual": "plain", "swiglu_limit": 0.0, "scoring_func": "sigmoid", "head_dim": head_dim}


def _yarn_dict(config: ModelConfig) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs in YARN_FIELDS.items()}


def _mscale_dict(config: ModelConfig) -> dict[str, Any]:
    return {"mscale": config.rope_mscale_all_dim, "mscale_all_dim": config.rope_mscale_all_dim}


def _yarn_expressed(config: ModelConfig) -> set[str]:
    """Without YaRN there is no object to hold its parameters, so unusual ones travel in the "longreach" part."""
    return set(YARN_FIELDS) if config.rope_factor != 1 else {"rope_factor"}


def _shared_dict(config: ModelConfig) -> dict[str, Any]:
    written: dict[str, Any] = {
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "norm_topk_prob": True,
        "tie_word_embeddings": False, "use_cache": True,
    }  # fmt: skip
    if config.weight_format != "plain":
        written["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": WEIGHT_TILE,
        }  # fmt: skip
    if config.weight_format == "fp8-fp4":
        written["expert_dtype"] = "fp4"
    return written


def _own_part(config: ModelConfig, expressed: set[str], assumed: dict[str, Any] = DEFAULTS) -> dict[str, Any]:
    """The "longreach" part: what the layout does not express and its reader would assume to be otherwise.

    Left out when there is nothing, as for the released configs.
    """
    own = {}
    for name, value in assumed.items():
        if name not in expressed and getattr(config, name) != value:
            own[name] = getattr(config, name)
    return {"longreach": own} if own else {}
