"""Reading `config.json` in four published layouts. `config_write` writes two of them.

| layout                   | recognised by                       | written by                |
| published V4             | hidden_size, compress_ratios        | `official_config_dict`    |
| transformers V4          | layer_types, rope_parameters        | `transformers_config_dict`|
| official inference code  | dim, n_layers                       | -                         |
| V3.2, either spelling    | model_type "deepseek_v32"           | both, for attention="mla" |

Every key is accounted for: taken into a field, checked because only one value is legal, or known to change nothing.
Any other key is refused with the nearest known one, because a key that is silently dropped is a model that is
silently wrong. What the published layouts cannot say (the switches, the arithmetic, ...) travels in a sub-dict named
"longreach", so `read_config` of a written file gives back an equal config.

Two choices the files leave open:
- `numerics`: the published layouts mean the released arithmetic, "official"; a file in transformers' own layout means
  what transformers computes, "transformers", unless its "longreach" part says otherwise.
- MTP: transformers keeps `num_nextn_predict_layers` (and our "longreach" part) although it saves no MTP tensors. So
  in its layout there is an MTP block exactly if the weights beside the file hold `mtp.` tensors; of a file without
  weights beside it, one with a "longreach" part is believed and any other has none.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longreach.errors import ConfigError
from longreach.model.config import ModelConfig

WEIGHT_TILE = [128, 128]

# Our field and the published key are one name.
V4_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "rms_norm_eps", "initializer_range", "num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank",
    "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "rope_theta",
    "compress_rope_theta", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "routed_scaling_factor", "scoring_func", "num_hash_layers", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters",
    "hc_eps", "num_nextn_predict_layers",
)  # fmt: skip
V32_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "rms_norm_eps", "initializer_range", "num_attention_heads", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size", "routed_scaling_factor",
    "n_group", "topk_group", "first_k_dense_replace",
)  # fmt: skip
INFERENCE_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "head_dim": "head_dim", "qk_rope_head_dim": "rope_head_dim", "q_lora_rank": "q_lora_rank", "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank", "sliding_window": "window_size", "compress_ratios": "compress_ratios",
    "index_n_heads": "index_n_heads", "index_head_dim": "index_head_dim", "index_topk": "index_topk",
    "rope_theta": "rope_theta", "compress_rope_theta": "compress_rope_theta", "rope_factor": "rope_factor",
    "rope_original_length": "original_seq_len", "rope_beta_fast": "beta_fast", "rope_beta_slow": "beta_slow",
    "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "n_activated_experts", "moe_intermediate_size": "moe_inter_dim",
    "routed_scaling_factor": "route_scale", "scoring_func": "score_func", "num_hash_layers": "n_hash_layers",
    "swiglu_limit": "swiglu_limit", "hc_mult": "hc_mult", "hc_sinkhorn_iters": "hc_sinkhorn_iters", "hc_eps": "hc_eps",
    "num_nextn_predict_layers": "n_mtp_layers", "rms_norm_eps": "norm_eps",
}  # fmt: skip

# Left out, these have one value everybody uses. The architecture itself has no defaults: the official dataclass's are
# not the released values, so a file without them would load as some other model.
OPTIONAL = {
    "max_position_embeddings", "bos_token_id", "eos_token_id", "rms_norm_eps", "initializer_range", "hc_eps", "hc_mult",
    "hc_sinkhorn_iters", "n_shared_experts", "scoring_func", "num_hash_layers", "num_nextn_predict_layers",
}  # fmt: skip

HARMLESS = (
    "use_cache", "torch_dtype", "dtype", "transformers_version", "architectures", "pad_token_id", "_name_or_path",
    "auto_map", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "is_encoder_decoder", "id2label",
    "label2id", "problem_type", "chunk_size_feed_forward", "ep_size",
)  # fmt: skip
ONE_LEGAL_VALUE: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "norm_topk_prob": True, "topk_method": "noaux_tc",
    "tie_word_embeddings": False, "attention_dropout": 0.0, "moe_layer_freq": 1, "pretraining_tp": 1,
}  # fmt: skip

KIND_TO_LAYER_TYPE = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
_LAYER_TYPE_TO_KIND = {layer_type: kind for kind, layer_type in KIND_TO_LAYER_TYPE.items()}
DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.default is not dataclasses.MISSING}
YARN_FIELDS = {
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
}


def model_directory(path: str | Path) -> Path:
    """The directory that holds a model's files: `path`, or its `model/` when `path` is a run directory."""
    path = Path(path)
    return path / "model" if (path / "model" / "config.json").is_file() else path


def read_config(path: str | Path) -> ModelConfig:
    """The config in a `config.json`, a checkpoint directory or a run directory, in any layout this module names.

    Raises:
        ConfigError: the file is missing or no JSON object, lacks a key, holds an unknown one, or says something this
            model cannot be.
    """
    path = Path(path)
    if path.is_dir():
        path = model_directory(path) / "config.json"
    return config_from_dict(_read_json(path), str(path), weights_directory=path.parent)


def config_from_dict(raw: dict[str, Any], source: str = "config", weights_directory: Path | None = None) -> ModelConfig:
    """`read_config` of an object already parsed; `source` names it in errors.

    `weights_directory` is where a transformers layout's MTP tensors are looked for.
    """
    if "dim" in raw and "hidden_size" not in raw:
        fields = _read_inference(_Keys(raw, source))
    elif (model_type := raw.get("model_type", "deepseek_v4")) == "deepseek_v32":
        fields = _read_v32(_Keys(raw, source))
    elif model_type == "deepseek_v4":
        fields = _read_v4(_Keys(raw, source), weights_directory)
    else:
        raise ConfigError(f"{source}: model_type={model_type!r}; this program reads deepseek_v4 and deepseek_v32")
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path} does not exist; give a config.json, a checkpoint directory or a run directory"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; a config.json is JSON in UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{path} is not valid JSON{where}; was it cut off?") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object of settings")
    return raw


_REQUIRED = object()


class _Keys:
    """The keys of one JSON object, each handed out once; what nobody asked for is refused by `finish`."""

    def __init__(self, raw: Any, source: str, prefix: str = "") -> None:
        if not isinstance(raw, dict):
            raise ConfigError(f"{source}: {prefix.rstrip('.')}={raw!r} must be an object")
        self.raw, self.source, self.prefix = raw, source, prefix
        self.known: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        self.known.add(name)
        if name in self.raw:
            return self.raw[name]
        if default is not _REQUIRED:
            return default
        close = difflib.get_close_matches(name, [key for key in self.raw if key not in self.known], n=1, cutoff=0.75)
        hint = f"; is {close[0]!r} a misspelling of it?" if close else ""
        raise ConfigError(f"{self.source}: key {self.prefix + name!r} is missing{hint}")

    def expect(self, name: str, legal: Any) -> None:
        """The key may be absent, null, or `legal`."""
        value = self.take(name, None)
        if value is not None and value != legal:
            raise ConfigError(f"{self.source}: {self.prefix}{name}={value!r}, but the only legal value is {legal!r}")

    def ignore(self, *names: str) -> None:
        self.known.update(names)

    def part(self, name: str) -> _Keys | None:
        """The object under `name`, or None where it is absent or null."""
        value = self.take(name, None)
        return None if value is None else _Keys(value, self.source, f"{self.prefix}{name}.")

    def finish(self) -> None:
        for name in self.raw:
            if name not in self.known:
                close = difflib.get_close_matches(name, sorted(self.known), n=1, cutoff=0.0)
                hint = f"; the nearest known key is {self.prefix + close[0]!r}" if close else ""
                raise ConfigError(f"{self.source}: unknown key {self.prefix + name!r}{hint}")


def _take_fields(keys: _Keys, names: Iterable[str]) -> dict[str, Any]:
    fields = {}
    for name in names:
        value = keys.take(name, DEFAULTS[name] if name in OPTIONAL else _REQUIRED)
        fields[name] = value
    return fields


def _finish(keys: _Keys, fields: dict[str, Any], expressible: Iterable[str]) -> dict[str, Any]:
    """Check what every layout shares, add the "longreach" part, refuse the rest."""
    for name, legal in ONE_LEGAL_VALUE.items():
        keys.expect(name, legal)
    keys.ignore(*HARMLESS)
    own = keys.part("longreach")
    if own is not None:
        names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in expressible]
        for name in names:
            value = own.take(name, None)
            if value is not None:
                fields[name] = value
        own.finish()
    keys.finish()
    return fields


def _read_v4(keys: _Keys, weights_directory: Path | None) -> dict[str, Any]:
    keys.ignore("model_type")
    by_ratio = "compress_ratios" in keys.raw
    rope = keys.part("rope_parameters")
    if rope is not None:
        thetas = _read_nested_rope(keys, rope)
        keys.raw = {**keys.raw, **{name: theta for name, theta in thetas.items() if name.endswith("theta")}}
    layer_types = keys.take("layer_types", None)
    mlp_layer_types = keys.take("mlp_layer_types", None)
    if mlp_layer_types is not None and "num_hash_layers" not in keys.raw:
        keys.raw = {
            **keys.raw,
            "num_hash_layers": _leading(keys, "mlp_layer_types", mlp_layer_types, "hash_moe", "moe"),
        }
    fields = _take_fields(keys, V4_FIELDS)
    if rope is not None:
        fields |= thetas
    fields |= _read_rope_scaling(keys)
    fields["weight_format"] = _read_weight_format(keys)
    keys.expect("num_key_value_heads", 1)
    if by_ratio:
        if layer_types is not None:
            raise ConfigError(f"{keys.source}: compress_ratios and layer_types are both given; keep one")
        fields["compress_ratios"] = _whole_numbers(keys, "compress_ratios", keys.take("compress_ratios"))
        keys.ignore("partial_rotary_factor")
        return _finish(keys, fields, [*V4_FIELDS, "compress_ratios", "weight_format"])

    # transformers' own layout
    if layer_types is None:
        keys.take("compress_ratios")  # raises: neither schedule is given
    ratios, csa_ratio = _read_layer_types(keys, layer_types, fields["num_hidden_layers"])
    if partial := keys.take("partial_rotary_factor", None):
        implied = int(fields["head_dim"] * partial)
        if implied != fields["qk_rope_head_dim"]:
            raise ConfigError(
                f"{keys.source}: partial_rotary_factor={partial} means {implied} rotary channels of "
                f"head_dim={fields['head_dim']}, but qk_rope_head_dim={fields['qk_rope_head_dim']}"
            )
    fields["numerics"] = "transformers"
    stored = None if weights_directory is None else _stores_mtp(weights_directory)
    if stored is False or (stored is None and "longreach" not in keys.raw):
        fields["num_nextn_predict_layers"] = 0
    fields["compress_ratios"] = ratios + [0] * fields["num_nextn_predict_layers"]
    fields["csa_ratio"] = csa_ratio
    return _finish(keys, fields, [*V4_FIELDS, "compress_ratios", "csa_ratio", "weight_format"])


def _whole_numbers(keys: _Keys, name: str, values: Any) -> list[int]:
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConfigError(f"{keys.source}: {name}={values!r} must be a list of whole numbers")
    return values


def _leading(keys: _Keys, name: str, types: Any, first: str, rest: str) -> int:
    """How many leading entries of `types` are `first`; all others must be `rest`."""
    if not isinstance(types, list) or set(map(str, types)) - {first, rest}:
        raise ConfigError(f"{keys.source}: {name}={types!r} must be a list of {first!r} and {rest!r}")
    count = next((i for i, value in enumerate(types) if value != first), len(types))
    if first in types[count:]:
        raise ConfigError(f"{keys.source}: {name} has {first!r} after {rest!r}; only leading layers can be {first!r}")
    return count


def _read_layer_types(keys: _Keys, layer_types: Any, num_layers: int) -> tuple[list[int], int]:
    """(a ratio per layer, the CSA ratio) of transformers' layer_types and compress_rates."""
    rates = keys.part("compress_rates")
    if rates is None:
        rates = _Keys({}, keys.source, "compress_rates.")
    ratio_of = {
        "sliding": 0,
        "csa": rates.take(KIND_TO_LAYER_TYPE["csa"], DEFAULTS["csa_ratio"]),
        "hca": rates.take(KIND_TO_LAYER_TYPE["hca"], 128),
    }
    rates.finish()
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - set(_LAYER_TYPE_TO_KIND):
        raise ConfigError(
            f"{keys.source}: layer_types={layer_types!r} must be a list of {', '.join(map(repr, _LAYER_TYPE_TO_KIND))}"
        )
    if len(layer_types) != num_layers:
        raise ConfigError(f"{keys.source}: layer_types has {len(layer_types)} entries for {num_layers} layers")
    return [ratio_of[_LAYER_TYPE_TO_KIND[t]] for t in layer_types], ratio_of["csa"]


def _read_nested_rope(keys: _Keys, rope: _Keys) -> dict[str, Any]:
    """transformers' rope_parameters {main, compress} as our rope fields."""
    main, compress = rope.part("main"), rope.part("compress")
    if main is None or compress is None:
        raise ConfigError(f"{keys.source}: rope_parameters needs both 'main' and 'compress'")
    rope.finish()
    if main.take("rope_type", "default") != "default":
        raise ConfigError(f"{keys.source}: rope_parameters.main must have rope_type 'default'")
    main.ignore("partial_rotary_factor", "type")
    fields = {"rope_theta": main.take("rope_theta")}
    main.finish()
    compress.ignore("partial_rotary_factor")
    fields["compress_rope_theta"] = compress.take("rope_theta")
    fields |= _read_yarn(compress)
    for name in ("rope_theta", "compress_rope_theta"):
        if name in keys.raw and keys.raw[name] != fields[name]:
            raise ConfigError(
                f"{keys.source}: {name}={keys.raw[name]} but rope_parameters says {fields[name]}; make them equal"
            )
    return fields


def _read_rope_scaling(keys: _Keys) -> dict[str, Any]:
    scaling = keys.part("rope_scaling")
    return {} if scaling is None else _read_yarn(scaling)


def _read_yarn(yarn: _Keys, allow_mscale: bool = False) -> dict[str, Any]:
    """One YaRN object as our rope fields; {} for rope type "default"."""
    rope_type = yarn.take("rope_type", yarn.take("type", "default"))
    if rope_type not in ("default", "yarn"):
        raise ConfigError(f"{yarn.source}: {yarn.prefix}rope_type={rope_type!r} must be 'yarn' or 'default'")
    fields: dict[str, Any] = {}
    if rope_type == "yarn":
        for ours, theirs in YARN_FIELDS.items():
            fields[ours] = yarn.take(theirs, DEFAULTS[ours] if "beta" in theirs else _REQUIRED)
    yarn.expect("truncate", True)
    yarn.expect("attention_factor", 1.0)
    if allow_mscale and rope_type == "yarn":
        fields |= _read_mscale(yarn)
    yarn.finish()
    return fields


def _read_mscale(yarn: _Keys) -> dict[str, Any]:
    mscale, mscale_all_dim = yarn.take("mscale", None), yarn.take("mscale_all_dim", None)
    if mscale is None and mscale_all_dim is None and yarn.take("attention_factor", None) == 1.0:
        return {}
    if mscale != mscale_all_dim or mscale is None:
        # Unequal, YaRN would also scale cos and sin; the official V3.2 code never does.
        raise ConfigError(
            f"{yarn.source}: {yarn.prefix}mscale={mscale} and mscale_all_dim={mscale_all_dim} must both be given "
            "and equal"
        )
    return {"rope_mscale_all_dim": mscale_all_dim}


def _read_weight_format(keys: _Keys) -> str:
    expert_dtype = keys.take("expert_dtype", None)
    quantization = keys.part("quantization_config")
    if quantization is None:
        if expert_dtype is not None:
            raise ConfigError(f"{keys.source}: expert_dtype={expert_dtype!r} without a quantization_config")
        return "plain"
    quantization.expect("quant_method", "fp8")
    quantization.expect("fmt", "e4m3")
    quantization.expect("scale_fmt", "ue8m0")
    quantization.expect("activation_scheme", "dynamic")
    quantization.expect("weight_block_size", WEIGHT_TILE)
    quantization.ignore("modules_to_not_convert", "dequantize")
    expert_dtype = quantization.take("expert_dtype", expert_dtype)
    quantization.finish()
    if expert_dtype not in (None, "fp8", "fp4"):
        raise ConfigError(f"{keys.source}: expert_dtype={expert_dtype!r} must be 'fp4', 'fp8' or absent")
    return "fp8-fp4" if expert_dtype == "fp4" else "fp8"


def _read_v32(keys: _Keys) -> dict[str, Any]:
    # The published V3.2 has an MTP block; this baseline is built without, and readers pass its tensors over.
    keys.ignore("num_nextn_predict_layers")
    keys.ignore("model_type", "qk_head_dim", "head_dim", "rope_interleave")
    mlp_layer_types = keys.take("mlp_layer_types", None)
    if mlp_layer_types is not None:
        dense = _leading(keys, "mlp_layer_types", mlp_layer_types, "dense", "sparse")
        keys.raw = {**keys.raw, "first_k_dense_replace": dense}
    fields = _take_fields(keys, V32_FIELDS)
    fields["attention"], fields["residual"], fields["swiglu_limit"] = "mla", "plain", 0.0
    fields["head_dim"] = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    fields["scoring_func"] = "sigmoid"
    keys.expect("scoring_func", "sigmoid")
    keys.expect("num_key_value_heads", fields["num_attention_heads"])
    keys.expect("layer_types", ["indexed_attention"] * fields["num_hidden_layers"])
    if (rope := keys.part("rope_parameters")) is not None:
        fields["rope_theta"] = rope.take("rope_theta", DEFAULTS["rope_theta"])
        rope.ignore("partial_rotary_factor")
        fields |= _read_yarn(rope, allow_mscale=True)
        keys.expect("rope_theta", fields["rope_theta"])
    else:
        fields["rope_theta"] = keys.take("rope_theta")
        if (scaling := keys.part("rope_scaling")) is not None:
            fields |= _read_yarn(scaling, allow_mscale=True)
    fields["weight_format"] = _read_weight_format(keys)
    return _finish(keys, fields, [*V32_FIELDS, "attention", "head_dim", "rope_theta", "weight_format"])


def _read_inference(keys: _Keys) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for ours, theirs in INFERENCE_FIELDS.items():
        if ours == "num_nextn_predict_layers":
            continue
        fields[ours] = keys.take(theirs, DEFAULTS[ours] if ours in OPTIONAL else _REQUIRED)
    ratios = _whole_numbers(keys, "compress_ratios", fields["compress_ratios"])
    # The released file may leave n_mtp_layers out; the schedule has one entry per block, MTP included.
    fields["num_nextn_predict_layers"] = keys.take("n_mtp_layers", max(len(ratios) - fields["num_hidden_layers"], 0))
    if fields["rope_original_length"] == 0:  # the official spelling of "no YaRN"
        fields["rope_factor"] = 1.0
        fields["rope_original_length"] = DEFAULTS["rope_original_length"]
    keys.ignore("max_batch_size", "max_seq_len", "temperature")
    keys.expect("scale_fmt", "ue8m0")
    keys.expect("scale_dtype", "fp8")
    linear_dtype, expert_dtype = keys.take("dtype", "fp8"), keys.take("expert_dtype", None)
    formats = {("bf16", None): "plain", ("fp8", None): "fp8", ("fp8", "fp8"): "fp8", ("fp8", "fp4"): "fp8-fp4"}
    if (linear_dtype, expert_dtype) not in formats:
        raise ConfigError(
            f"{keys.source}: dtype={linear_dtype!r} with expert_dtype={expert_dtype!r} is no released format"
        )
    fields["weight_format"] = formats[linear_dtype, expert_dtype]
    return _finish(keys, fields, [*INFERENCE_FIELDS, "weight_format"])


def _stores_mtp(directory: Path) -> bool | None:
    """Whether the weights in `directory` hold MTP tensors, told from the index or the first bytes of the one file.

    None when no weights can be read there: whoever wants them will say what is wrong with them.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            with single.open("rb") as file:
                names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        else:
            return None
    except (OSError, ValueError, KeyError, OverflowError, MemoryError):
        return None
    return any(name.removeprefix("model.").startswith("mtp.") for name in names)
