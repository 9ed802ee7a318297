"""transformers' DeepSeek-V4 as the independent reference: one shape in both, weights copied across by name.

The name table here is written out on its own, not taken from `longreach.checkpoint`, so that each can catch the other.
"""

from __future__ import annotations

import torch

from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer

RATIO_NAMES = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}

ATTENTION = {
    "wq_a.weight": "q_a_proj.weight",
    "q_norm.weight": "q_a_norm.weight",
    "wq_b.weight": "q_b_proj.weight",
    "wkv.weight": "kv_proj.weight",
    "kv_norm.weight": "kv_norm.weight",
    "wo_a.weight": "o_a_proj.weight",
    "wo_b.weight": "o_b_proj.weight",
    "attn_sink": "sinks",
    "compressor.wkv.weight": "compressor.kv_proj.weight",
    "compressor.wgate.weight": "compressor.gate_proj.weight",
    "compressor.ape": "compressor.position_bias",
    "compressor.norm.weight": "compressor.kv_norm.weight",
    "indexer.wq_b.weight": "compressor.indexer.q_b_proj.weight",
    "indexer.weights_proj.weight": "compressor.indexer.scorer.weights_proj.weight",
    "indexer.compressor.wkv.weight": "compressor.indexer.kv_proj.weight",
    "indexer.compressor.wgate.weight": "compressor.indexer.gate_proj.weight",
    "indexer.compressor.ape": "compressor.indexer.position_bias",
    "indexer.compressor.norm.weight": "compressor.indexer.kv_norm.weight",
}


def reference_model(c: ModelConfig, dtype: torch.dtype = torch.float32):
    """transformers' model of the same shape, random weights, eager attention and eager experts."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    hca = [r for i, r in enumerate(c.compress_ratios) if c.layer_kind(i) == "hca"]
    config = DeepseekV4Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        head_dim=c.head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim,
        q_lora_rank=c.q_lora_rank,
        o_groups=c.o_groups,
        o_lora_rank=c.o_lora_rank,
        sliding_window=c.sliding_window,
        layer_types=[RATIO_NAMES[c.layer_kind(i)] for i in range(c.num_hidden_layers)],
        compress_rates={
            "compressed_sparse_attention": c.csa_ratio,
            "heavily_compressed_attention": hca[0] if hca else 128,
        },
        index_n_heads=c.index_n_heads or 1,
        index_head_dim=c.index_head_dim or c.qk_rope_head_dim,
        index_topk=c.index_topk or 1,
        moe_intermediate_size=c.moe_intermediate_size,
        n_routed_experts=c.n_routed_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        routed_scaling_factor=c.routed_scaling_factor,
        num_hash_layers=c.num_hash_layers,
        swiglu_limit=c.swiglu_limit,
        hc_mult=c.hc_mult,
        hc_sinkhorn_iters=c.hc_sinkhorn_iters,
        rope_theta=c.rope_theta,
        compress_rope_theta=c.compress_rope_theta,
        rope_scaling={
            "type": "yarn",
            "rope_type": "yarn",
            "factor": c.rope_factor,
            "original_max_position_embeddings": c.rope_original_length,
            "beta_fast": c.rope_beta_fast,
            "beta_slow": c.rope_beta_slow,
        }
        if c.rope_factor > 1
        else None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = DeepseekV4ForCausalLM(config).to(dtype).eval()
    assert model.config._attn_implementation == "eager"
    return model


def randomise(model, seed: int) -> None:
    """Random values everywhere, so that no term of an equation hides behind a zero or a one."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if name.endswith("tid2eid"):
                experts = model.config.n_routed_experts
                p.copy_(torch.rand(p.shape[0], experts, generator=g).argsort(1)[:, : p.shape[1]])
            elif "inv_freq" in name:
                continue
            elif "norm" in name:
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=g))
            elif name.endswith(("sinks", "position_bias", "base", "scale", "bias", "hc_base", "hc_scale")):
                p.copy_(0.5 * torch.randn(p.shape, generator=g))
            else:
                fan_in = p.shape[-1]
                p.copy_(torch.randn(p.shape, generator=g) * fan_in**-0.5)


def name_pairs(c: ModelConfig) -> list[tuple[str, str]]:
    """(our name, transformers' name), the routed experts' w1 and w3 left out."""
    pairs = [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        ("norm.weight", "model.norm.weight"),
        *((f"collapse.{leaf}", f"model.hc_head.hc_{leaf}") for leaf in ("fn", "base", "scale")),
    ]
    for i in range(c.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        kind = c.layer_kind(i)
        for a, b in ATTENTION.items():
            if (a.startswith("indexer") and kind != "csa") or (a.startswith("compressor") and kind == "sliding"):
                continue
            pairs.append((f"{ours}attn.{a}", f"{theirs}self_attn.{b}"))
        pairs += [(f"{ours}attn_norm.weight", f"{theirs}input_layernorm.weight")]
        pairs += [(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight")]
        pairs += [
            (f"{ours}{hc}.{leaf}", f"{theirs}{hc}.{leaf}")
            for hc in ("attn_hc", "ffn_hc")
            for leaf in ("fn", "base", "scale")
        ]
        pairs += [(f"{ours}ffn.gate.weight", f"{theirs}mlp.gate.weight")]
        pairs += [(f"{ours}ffn.experts.w2", f"{theirs}mlp.experts.down_proj")]
        for a, b in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            pairs += [(f"{ours}ffn.shared_experts.{a}.weight", f"{theirs}mlp.shared_experts.{b}.weight")]
    return pairs


def buffers(c: ModelConfig) -> list[tuple[str, str]]:
    out = []
    for i in range(c.num_hidden_layers):
        a, b = ("tid2eid", "tid2eid") if c.is_hash_layer(i) else ("bias", "e_score_correction_bias")
        out.append((f"layers.{i}.ffn.gate.{a}", f"model.layers.{i}.mlp.gate.{b}"))
    return out


@torch.no_grad()
def ours_from(reference, c: ModelConfig) -> Transformer:
    """Our model with the reference's weights."""
    model = Transformer(c, dtype=next(reference.parameters()).dtype)
    mine, theirs = model.state_dict(), reference.state_dict()
    used = set()
    for a, b in name_pairs(c) + buffers(c):
        mine[a].copy_(theirs[b])
        used.add(a)
    for i in range(c.num_hidden_layers):
        w1, w3 = theirs[f"model.layers.{i}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        mine[f"layers.{i}.ffn.experts.w1"].copy_(w1)
        mine[f"layers.{i}.ffn.experts.w3"].copy_(w3)
        used |= {f"layers.{i}.ffn.experts.w1", f"layers.{i}.ffn.experts.w3"}
    assert used == set(mine), sorted(set(mine) - used)
    return model


def gradient_pairs(model: Transformer, reference) -> list[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """(our name, our gradient, the reference's) of every parameter."""
    c = model.config
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    out = [(a, mine[a].grad, theirs[b].grad) for a, b in name_pairs(c)]
    for i in range(c.num_hidden_layers):
        fused = theirs[f"model.layers.{i}.mlp.experts.gate_up_proj"].grad
        for leaf, part in zip(("w1", "w3"), fused.chunk(2, dim=1), strict=True):
            out.append((f"layers.{i}.ffn.experts.{leaf}", mine[f"layers.{i}.ffn.experts.{leaf}"].grad, part))
    return out
