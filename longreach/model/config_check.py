"""The relations between ModelConfig's fields. Each message names the fix."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, get_args, get_type_hints

from longreach.errors import ConfigError

if TYPE_CHECKING:
    from longreach.model.config import ModelConfig

POSITIVE = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "sliding_window",
    "csa_ratio",
    "hc_mult",
    "hc_sinkhorn_iters",
]


def check(c: ModelConfig) -> None:
    """Raise ConfigError for the first impossible value or relation."""
    _check_types(c)
    for name in POSITIVE:
        if getattr(c, name) < 1:
            raise ConfigError(f"{name}={getattr(c, name)} must be at least 1")
    if c.qk_rope_head_dim % 2 or not 0 < c.qk_rope_head_dim <= c.head_dim:
        raise ConfigError(f"qk_rope_head_dim={c.qk_rope_head_dim} must be even and between 2 and head_dim={c.head_dim}")
    if c.rope_factor < 1:
        raise ConfigError(f"rope_factor={c.rope_factor} must be at least 1 (1 switches YaRN off)")
    for name in ("bos_token_id", "eos_token_id"):
        if not 0 <= getattr(c, name) < c.vocab_size:
            raise ConfigError(f"{name}={getattr(c, name)} must lie inside the vocabulary of {c.vocab_size}")
    if c.attention == "mla":
        _check_mla(c)
    else:
        _check_v4_attention(c)
    _check_feed_forward(c)
    if c.attention == "mla" and (c.residual != "plain" or c.num_nextn_predict_layers):
        raise ConfigError("attention='mla' (V3.2) is built with residual='plain' and num_nextn_predict_layers=0")


def _check_types(c: ModelConfig) -> None:
    hints = get_type_hints(type(c))
    for field in dataclasses.fields(c):
        value, hint = getattr(c, field.name), hints[field.name]
        if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{field.name}={value!r} must be a whole number")
        if hint is float and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
        ):
            raise ConfigError(f"{field.name}={value!r} must be a finite number")
        if hint is float and value < 0:
            raise ConfigError(f"{field.name}={value!r} must not be negative")
        if (allowed := get_args(hint)) and all(isinstance(a, str) for a in allowed) and value not in allowed:
            raise ConfigError(f"{field.name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _check_v4_attention(c: ModelConfig) -> None:
    expected = c.num_hidden_layers + c.num_nextn_predict_layers
    if len(c.compress_ratios) != expected:
        raise ConfigError(
            f"compress_ratios has {len(c.compress_ratios)} entries but num_hidden_layers + num_nextn_predict_layers "
            f"= {expected}; give one ratio per layer (0 sliding, {c.csa_ratio} CSA, other HCA) and one per MTP block"
        )
    if any(r < 0 for r in c.compress_ratios):
        raise ConfigError(f"compress_ratios={list(c.compress_ratios)} must not be negative; 0 means sliding only")
    if c.attention == "hybrid" and any(r == 1 for r in c.compress_ratios):
        raise ConfigError("a compress ratio of 1 compresses nothing; use 0 for sliding only, 2 or more otherwise")
    if c.num_nextn_predict_layers > 1:
        raise ConfigError(f"num_nextn_predict_layers={c.num_nextn_predict_layers}: V4 has depth 0 or 1")
    if c.o_groups < 1 or c.num_attention_heads % c.o_groups:
        divisors = [g for g in range(1, c.num_attention_heads + 1) if c.num_attention_heads % g == 0]
        raise ConfigError(
            f"num_attention_heads={c.num_attention_heads} is not divisible by o_groups={c.o_groups}; "
            f"choose o_groups among {', '.join(map(str, divisors))}"
        )
    if c.o_lora_rank < 1:
        raise ConfigError(f"o_lora_rank={c.o_lora_rank} must be at least 1")
    if any(c.layer_kind(i) == "csa" for i in range(expected)):
        for name in ("index_n_heads", "index_head_dim", "index_topk"):
            if getattr(c, name) < 1:
                raise ConfigError(f"{name}={getattr(c, name)} must be at least 1: the CSA layers have an indexer")
        if c.index_head_dim < c.qk_rope_head_dim:
            raise ConfigError(
                f"index_head_dim={c.index_head_dim} must be at least qk_rope_head_dim={c.qk_rope_head_dim}"
            )
        _check_hadamard(c)


def _check_hadamard(c: ModelConfig) -> None:
    if c.numerics == "official" and c.index_head_dim & (c.index_head_dim - 1):
        raise ConfigError(
            f"index_head_dim={c.index_head_dim} must be a power of two for the Hadamard rotation of "
            f"numerics='official'; choose a power of two or numerics='transformers'"
        )


def _check_mla(c: ModelConfig) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk"):
        if getattr(c, name) < 1:
            raise ConfigError(f"{name}={getattr(c, name)} must be at least 1 with attention='mla'")
    if c.index_head_dim < c.qk_rope_head_dim:
        raise ConfigError(f"index_head_dim={c.index_head_dim} must be at least qk_rope_head_dim={c.qk_rope_head_dim}")
    if c.head_dim != c.qk_nope_head_dim + c.qk_rope_head_dim:
        raise ConfigError(
            f"head_dim={c.head_dim} must be qk_nope_head_dim + qk_rope_head_dim = "
            f"{c.qk_nope_head_dim + c.qk_rope_head_dim} with attention='mla'"
        )
    _check_hadamard(c)


def _check_feed_forward(c: ModelConfig) -> None:
    layers = range(c.num_hidden_layers + c.num_nextn_predict_layers)
    if any(c.is_dense_ffn(i) for i in layers) and c.intermediate_size < 1:
        raise ConfigError(f"intermediate_size={c.intermediate_size} must be at least 1: there are dense layers")
    if all(c.is_dense_ffn(i) for i in layers):
        return
    for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        if getattr(c, name) < 1:
            raise ConfigError(f"{name}={getattr(c, name)} must be at least 1 with feed_forward='moe'")
    if c.n_shared_experts != 1:
        raise ConfigError(f"n_shared_experts={c.n_shared_experts}: V4 has exactly 1 shared expert")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ConfigError(
            f"num_experts_per_tok={c.num_experts_per_tok} is more than n_routed_experts={c.n_routed_experts}"
        )
    if not 0 <= c.num_hash_layers <= c.num_hidden_layers:
        raise ConfigError(f"num_hash_layers={c.num_hash_layers} must be between 0 and {c.num_hidden_layers}")
    if c.n_group < 1 or c.n_routed_experts % c.n_group or not 1 <= c.topk_group <= c.n_group:
        raise ConfigError(
            f"n_group={c.n_group}, topk_group={c.topk_group} do not fit n_routed_experts={c.n_routed_experts}; "
            "groups must divide the experts and topk_group must not exceed n_group"
        )
