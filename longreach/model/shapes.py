"""Every tensor of a model, from its config alone: name, shape, part and the way it is stored.

    for p in parameter_shapes(ModelConfig.preset("pro")): print(p.name, p.shape)

The names are those of `Transformer.state_dict()`, in no-surprise order: embedding, layers, head, MTP. Counting
parameters, checking a checkpoint's headers and writing one all start here, so they cannot disagree; that the model
really has these tensors is a test (tests/test_checkpoint.py). Source: architecture of DeepSeek-V4, tensor table of
the released checkpoints (69,187 tensors for Flash).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from longreach.model.config import ModelConfig

Part = Literal[
    "embedding", "attention", "compressor", "indexer", "experts", "shared experts", "dense feed-forward", "router",
    "hyper-connections", "norms", "head",
]  # fmt: skip
Kind = Literal["linear", "expert", "float", "float32", "int64"]
"""linear: FP8 in the quantised formats; expert: FP4 (or FP8); float: the model's dtype; float32, int64: always that."""


@dataclass(frozen=True)
class ParameterShape:
    """One entry of the state dict. `is_mtp` tells the MTP block's tensors; `part` is what they do there."""

    name: str
    shape: tuple[int, ...]
    part: Part
    kind: Kind
    is_mtp: bool = False

    @property
    def count(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def parameter_shapes(config: ModelConfig) -> list[ParameterShape]:
    """All parameters and buffers of `Transformer(config)`."""
    D, V = config.hidden_size, config.vocab_size
    shapes = [ParameterShape("embed.weight", (V, D), "embedding", "float")]
    for layer in range(config.num_hidden_layers):
        shapes += _block(config, layer, f"layers.{layer}.", is_mtp=False)
    shapes.append(ParameterShape("norm.weight", (D,), "norms", "float"))
    shapes += _collapse(config, "collapse.", is_mtp=False)
    shapes.append(ParameterShape("head.weight", (V, D), "head", "float"))
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{depth}."
        shapes += _block(config, config.num_hidden_layers + depth, prefix, is_mtp=True)
        shapes += [
            ParameterShape(f"{prefix}{name}.weight", (D, D), "attention", "linear", True)
            for name in ("e_proj", "h_proj")
        ]
        shapes += [
            ParameterShape(f"{prefix}{name}.weight", (D,), "norms", "float", True)
            for name in ("enorm", "hnorm", "norm")
        ]
        shapes += _collapse(config, f"{prefix}collapse.", is_mtp=True)
    return shapes


def _collapse(config: ModelConfig, prefix: str, is_mtp: bool) -> list[ParameterShape]:
    """What merges the residual streams before the head."""
    if not config.has_streams:
        return []
    n = config.hc_mult
    sizes = {"fn": (n, n * config.hidden_size), "base": (n,), "scale": (1,)}
    return [ParameterShape(prefix + name, size, "hyper-connections", "float32", is_mtp) for name, size in sizes.items()]


def _block(config: ModelConfig, layer: int, prefix: str, is_mtp: bool) -> Iterator[ParameterShape]:
    D, n = config.hidden_size, config.hc_mult
    parts = _latent_attention(config) if config.attention == "mla" else _attention(config, layer)
    for name, shape, part, kind in [*parts, *_feed_forward(config, layer)]:
        yield ParameterShape(prefix + name, shape, part, kind, is_mtp)
    for name in ("attn_norm", "ffn_norm"):
        yield ParameterShape(f"{prefix}{name}.weight", (D,), "norms", "float", is_mtp)
    if config.has_streams:
        width = (2 + n) * n
        for name in ("attn_hc", "ffn_hc"):
            for leaf, shape in (("fn", (width, n * D)), ("base", (width,)), ("scale", (3,))):
                yield ParameterShape(f"{prefix}{name}.{leaf}", shape, "hyper-connections", "float32", is_mtp)


_Row = tuple[str, tuple[int, ...], Part, Kind]


def _attention(config: ModelConfig, layer: int) -> Iterator[_Row]:
    D, N, H, q = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    groups, rank = config.o_groups, config.o_lora_rank
    yield "attn.wq_a.weight", (q, D), "attention", "linear"
    yield "attn.q_norm.weight", (q,), "norms", "float"
    yield "attn.wq_b.weight", (N * H, q), "attention", "linear"
    yield "attn.wkv.weight", (H, D), "attention", "linear"
    yield "attn.kv_norm.weight", (H,), "norms", "float"
    yield "attn.attn_sink", (N,), "attention", "float32"
    yield "attn.wo_a.weight", (groups * rank, N * H // groups), "attention", "linear"
    yield "attn.wo_b.weight", (D, groups * rank), "attention", "linear"
    kind = config.layer_kind(layer)
    if kind == "hca":
        yield from _compressor("attn.compressor.", D, config.compress_ratios[layer], H, 1, "compressor")
    if kind == "csa":
        heads, width = config.index_n_heads, config.index_head_dim
        yield from _compressor("attn.compressor.", D, config.csa_ratio, H, 2, "compressor")
        yield "attn.indexer.wq_b.weight", (heads * width, q), "indexer", "linear"
        yield "attn.indexer.weights_proj.weight", (heads, D), "indexer", "float"
        yield from _compressor("attn.indexer.compressor.", D, config.csa_ratio, width, 2, "indexer")


def _compressor(prefix: str, D: int, ratio: int, width: int, series: int, part: Part) -> Iterator[_Row]:
    """`series` is 2 for CSA, whose blocks overlap: the previous block's projection and the current one's."""
    yield f"{prefix}wkv.weight", (series * width, D), part, "float"
    yield f"{prefix}wgate.weight", (series * width, D), part, "float"
    yield f"{prefix}ape", (ratio, series * width), part, "float32"
    yield f"{prefix}norm.weight", (width,), "norms", "float"


def _latent_attention(config: ModelConfig) -> Iterator[_Row]:
    D, N, q, kv = config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    rope, nope, value = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    heads, width = config.index_n_heads, config.index_head_dim
    yield "attn.wq_a.weight", (q, D), "attention", "linear"
    yield "attn.q_norm.weight", (q,), "norms", "float"
    yield "attn.wq_b.weight", (N * (nope + rope), q), "attention", "linear"
    yield "attn.wkv_a.weight", (kv + rope, D), "attention", "linear"
    yield "attn.kv_norm.weight", (kv,), "norms", "float"
    yield "attn.wkv_b.weight", (N * (nope + value), kv), "attention", "linear"
    yield "attn.wo.weight", (D, N * value), "attention", "linear"
    yield "attn.indexer.wq_b.weight", (heads * width, q), "indexer", "linear"
    yield "attn.indexer.wk.weight", (width, D), "indexer", "linear"
    yield "attn.indexer.k_norm.weight", (width,), "norms", "float"
    yield "attn.indexer.k_norm.bias", (width,), "norms", "float"
    yield "attn.indexer.weights_proj.weight", (heads, D), "indexer", "float"


def _feed_forward(config: ModelConfig, layer: int) -> Iterator[_Row]:
    D = config.hidden_size
    if config.is_dense_ffn(layer):
        f = config.intermediate_size
        yield "ffn.w1.weight", (f, D), "dense feed-forward", "linear"
        yield "ffn.w3.weight", (f, D), "dense feed-forward", "linear"
        yield "ffn.w2.weight", (D, f), "dense feed-forward", "linear"
        return
    f, E = config.moe_intermediate_size, config.n_routed_experts
    yield "ffn.gate.weight", (E, D), "router", "float"
    if config.is_hash_layer(layer):
        yield "ffn.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "router", "int64"
    else:
        yield "ffn.gate.bias", (E,), "router", "float32"
    yield "ffn.experts.w1", (E, f, D), "experts", "expert"
    yield "ffn.experts.w3", (E, f, D), "experts", "expert"
    yield "ffn.experts.w2", (E, D, f), "experts", "expert"
    yield "ffn.shared_experts.w1.weight", (f, D), "shared experts", "linear"
    yield "ffn.shared_experts.w3.weight", (f, D), "shared experts", "linear"
    yield "ffn.shared_experts.w2.weight", (D, f), "shared experts", "linear"
