"""The named shapes. `flash`, `pro` and `v32` are the released ones; the others are for machines people own."""

from __future__ import annotations

from typing import Any

from longreach.model.config import ModelConfig

_RELEASED: dict[str, Any] = dict(
    vocab_size=129_280, head_dim=512, qk_rope_head_dim=64, o_lora_rank=1024, sliding_window=128,
    index_n_heads=64, index_head_dim=128, num_experts_per_tok=6, num_hash_layers=3, num_nextn_predict_layers=1,
    rope_factor=16.0, rope_original_length=65_536, weight_format="fp8-fp4",
)  # fmt: skip


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash: 284B parameters, 13B active."""
    return ModelConfig(
        **_RELEASED, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, q_lora_rank=1024, o_groups=8,
        compress_ratios=(0, 0) + (4, 128) * 20 + (4, 0), index_topk=512, n_routed_experts=256,
        moe_intermediate_size=2048, routed_scaling_factor=1.5,
    )  # fmt: skip


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro: 1.6T parameters, 49B active."""
    return ModelConfig(
        **_RELEASED, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, o_groups=16,
        compress_ratios=(128, 128) + (4, 128) * 29 + (4, 0), index_topk=1024, n_routed_experts=384,
        moe_intermediate_size=3072, routed_scaling_factor=2.5,
    )  # fmt: skip


def v32() -> ModelConfig:
    """DeepSeek-V3.2, the baseline of the announced ratios: latent attention with token-wise sparse selection."""
    return ModelConfig(
        vocab_size=129_280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, head_dim=192,
        qk_rope_head_dim=64, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128,
        index_n_heads=64, index_head_dim=128, index_topk=2048, max_position_embeddings=163_840,
        rope_factor=40.0, rope_original_length=4096, rope_mscale_all_dim=1.0,
        n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, intermediate_size=18_432,
        routed_scaling_factor=2.5, scoring_func="sigmoid", n_group=8, topk_group=4, first_k_dense_replace=3,
        swiglu_limit=0.0, attention="mla", residual="plain", weight_format="fp8",
    )  # fmt: skip


def tiny() -> ModelConfig:
    """3.1M parameters and an MTP block, every mechanism present; trains in minutes on two cores."""
    return ModelConfig(
        vocab_size=4096, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, head_dim=64,
        qk_rope_head_dim=16, q_lora_rank=64, o_groups=2, o_lora_rank=64, sliding_window=64,
        compress_ratios=(0, 0, 4, 32, 4, 32, 0), index_n_heads=4, index_head_dim=32, index_topk=32,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, routed_scaling_factor=1.5,
        num_hash_layers=2, num_nextn_predict_layers=1, max_position_embeddings=65_536, numerics="transformers",
    )  # fmt: skip


def micro() -> ModelConfig:
    """1.4M parameters: one sliding, one CSA, one HCA and one more sliding layer, for post-training studies in minutes."""
    return ModelConfig(
        vocab_size=1024, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        qk_rope_head_dim=16, q_lora_rank=64, o_groups=2, o_lora_rank=64, sliding_window=64,
        compress_ratios=(0, 4, 32, 0), index_n_heads=4, index_head_dim=32, index_topk=32,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, routed_scaling_factor=1.5,
        num_hash_layers=1, max_position_embeddings=16_384, numerics="transformers",
    )  # fmt: skip


def small() -> ModelConfig:
    """51M parameters and an MTP block: a night on two cores, or one GPU."""
    return ModelConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=10, num_attention_heads=8, head_dim=96,
        qk_rope_head_dim=32, q_lora_rank=192, o_groups=2, o_lora_rank=128, sliding_window=128,
        compress_ratios=(0, 0) + (4, 128) * 4 + (0,), index_n_heads=8, index_head_dim=64, index_topk=128,
        n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=192, routed_scaling_factor=1.5,
        num_hash_layers=2, num_nextn_predict_layers=1, max_position_embeddings=1_048_576, numerics="transformers",
    )  # fmt: skip


def bench() -> ModelConfig:
    """The 40.9M-parameter shape of every published comparison in this project."""
    return ModelConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, head_dim=128,
        qk_rope_head_dim=32, q_lora_rank=256, o_groups=2, o_lora_rank=128, sliding_window=128,
        compress_ratios=(0, 0) + (4, 128) * 3, index_n_heads=4, index_head_dim=64, index_topk=128,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, routed_scaling_factor=1.5,
        num_hash_layers=2, rope_factor=16.0, numerics="transformers",
    )  # fmt: skip
