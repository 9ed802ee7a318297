"""Useful operations of a token, by part and context, from the shape alone.

    decode_macs(config, context)      multiply-accumulates of the token at position context - 1, by part
    prefill_macs(config, tokens)      their sum over a whole prompt
    training_macs(config, tokens)     forward and backward of one text

A FLOP count is twice a MAC count. "Useful" leaves out masked-off work, padding and element-wise operations, so a measured
rate over it is a fair fraction of the matmul peak. Formulas: architecture of DeepSeek-V4, FLOPs per decoded token.
"""

from __future__ import annotations

import numpy as np

from longreach.model.config import ModelConfig

PARTS = ("projections", "compressors", "index scores", "core attention", "experts", "mhc")


def decode_macs(config: ModelConfig, context: int) -> dict[str, int]:
    """MACs of decoding one token when it sees `context` tokens (itself included), by part."""
    return {part: int(total[0]) for part, total in _macs(config, np.array([context])).items()}


def prefill_macs(config: ModelConfig, tokens: int, logits: int = 1) -> dict[str, int]:
    """MACs of reading a prompt of `tokens` tokens and computing `logits` rows of logits, by part."""
    parts = {part: int(total.sum()) for part, total in _macs(config, np.arange(1, tokens + 1)).items()}
    parts["head"] = config.vocab_size * config.hidden_size * logits
    return parts


def training_macs(config: ModelConfig, tokens: int) -> dict[str, int]:
    """MACs of the loss and its gradients on a text of `tokens` tokens, by part; what a backward pass recomputes is left out.

    A product has two gradients, each as large as itself. The index scores have none: the next-token loss does not train
    the indexer (nor its projections, a small share of theirs that is counted three times nonetheless).
    """
    forward = prefill_macs(config, tokens, logits=tokens - 1)
    return {part: macs * (1 if part == "index scores" else 3) for part, macs in forward.items()}


def _macs(c: ModelConfig, context: np.ndarray) -> dict[str, np.ndarray]:
    one = np.ones_like(context, dtype=np.float64)
    total: dict[str, np.ndarray] = dict.fromkeys(PARTS, 0 * one)  # one shared zero: parts are added to, never in place
    for layer in range(c.num_hidden_layers):
        _attention(c, layer, context, one, total)
        total["experts"] = total["experts"] + _feed_forward(c, layer) * one
        if c.has_streams:
            n = c.hc_mult
            coefficients = (2 + n) * n
            # Each of the two sublayers: coefficients, mixing in (n), mixing out (n² + n).
            total["mhc"] = total["mhc"] + 2 * (coefficients * n * c.hidden_size + coefficients * c.hidden_size) * one
    total["head"] = c.vocab_size * c.hidden_size * one
    return total


def _attention(c: ModelConfig, layer: int, context: np.ndarray, one: np.ndarray, total: dict[str, np.ndarray]) -> None:
    d, q, H, N = c.hidden_size, c.q_lora_rank, c.head_dim, c.num_attention_heads
    kind = c.layer_kind(layer)
    if kind == "mla":
        latent, rope = c.kv_lora_rank, c.qk_rope_head_dim
        projections = d * q + q * N * H + d * (latent + rope) + N * c.v_head_dim * d
        absorb = N * latent * (c.qk_nope_head_dim + c.v_head_dim)
        index = q * c.index_n_heads * c.index_head_dim + d * c.index_head_dim + d * c.index_n_heads
        total["projections"] = total["projections"] + (projections + absorb + index) * one
        total["index scores"] = total["index scores"] + c.index_n_heads * c.index_head_dim * context
        total["core attention"] = total["core attention"] + N * (2 * latent + rope) * np.minimum(c.index_topk, context)
        return
    total["projections"] = (
        total["projections"]
        + (d * q + q * N * H + d * H + N * H * c.o_lora_rank + c.o_groups * c.o_lora_rank * d) * one
    )
    window = context if kind == "dense" else np.minimum(c.sliding_window, context)
    entries = 0 * one
    if kind in ("csa", "hca"):
        m = c.compress_ratios[layer]
        visible = context // m
        if kind == "hca":
            total["compressors"] = total["compressors"] + 2 * d * H * one
            entries = visible
        else:
            width = c.index_n_heads * c.index_head_dim
            total["compressors"] = total["compressors"] + (2 * d * 2 * H + 2 * d * 2 * c.index_head_dim) * one
            total["projections"] = total["projections"] + (q * width + d * c.index_n_heads) * one
            total["index scores"] = total["index scores"] + width * visible
            entries = np.minimum(c.index_topk, visible)
    total["core attention"] = total["core attention"] + 2 * H * N * (window + entries)


def _feed_forward(c: ModelConfig, layer: int) -> int:
    if c.is_dense_ffn(layer):
        return 3 * c.hidden_size * c.intermediate_size
    experts = c.num_experts_per_tok + c.n_shared_experts
    return experts * 3 * c.hidden_size * c.moe_intermediate_size + c.n_routed_experts * c.hidden_size
