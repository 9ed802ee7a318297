"""ModelConfig: every number that shapes a model, one frozen dataclass, checked on construction.

    ModelConfig.preset("flash")                      the released shape, 284B
    ModelConfig.preset("tiny").replace(index_topk=8) a variation
    ModelConfig.from_json(path)                      either published config.json layout, or the official inference one

Field names are those of the published `config.json`, so a reader can hold both side by side. Reading and writing the
two JSON layouts is in `config_io.py` and `config_write.py`.
Source: architecture of DeepSeek-V4 (arXiv 2606.19348) and the released config files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longreach.errors import ConfigError

LayerKind = Literal["sliding", "csa", "hca", "dense", "mla"]

PRESETS = ("flash", "pro", "v32", "micro", "tiny", "small", "bench")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one model. Frozen: vary it with `replace`."""

    # embedding and width
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int = 1_048_576
    bos_token_id: int = 0
    eos_token_id: int = 1
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    # attention: shared-KV multi-query heads with low-rank queries and a grouped low-rank output
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int = 1
    o_lora_rank: int = 0
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = ()
    """One entry per layer, then one per MTP block: 0 sliding only, `csa_ratio` CSA, anything else HCA."""
    csa_ratio: int = 4
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0

    # rotary positions
    rope_theta: float = 10_000.0
    compress_rope_theta: float = 160_000.0
    rope_factor: float = 1.0
    """YaRN extension of the compressed layers' base; 1 leaves it out."""
    rope_original_length: int = 65_536
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale_all_dim: float = 0.0
    """V3.2 only: softmax scale correction that comes with YaRN there."""

    # feed-forward
    n_routed_experts: int = 0
    n_shared_experts: int = 1
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    intermediate_size: int = 0
    """Width of a dense feed-forward layer: the `feed_forward="dense"` switch and V3.2's first layers."""
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sqrtsoftplus", "sigmoid", "softmax"] = "sqrtsoftplus"
    num_hash_layers: int = 0
    swiglu_limit: float = 10.0
    """Clamp of the gate (above) and of the linear branch (both sides); 0 leaves it out."""
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0

    # manifold-constrained hyper-connections
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    # multi-token prediction
    num_nextn_predict_layers: int = 0

    # V3.2's latent attention (attention="mla")
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0

    # how the published weights are stored; "plain" is one float dtype throughout
    weight_format: Literal["plain", "fp8", "fp8-fp4"] = "plain"

    # what each idea replaces
    attention: Literal["hybrid", "sliding", "dense", "mla"] = "hybrid"
    residual: Literal["mhc", "hc", "plain"] = "mhc"
    feed_forward: Literal["moe", "dense"] = "moe"

    # arithmetic of this build: see docs/model.md
    numerics: Literal["official", "transformers"] = "official"
    """"official" rounds KV entries, index queries and keys as the released inference code does; "transformers" does not."""
    arithmetic: Literal["fast", "invariant"] = "fast"
    """"invariant" computes in fixed tiles: a position's result is the same bits however it was chunked, batched, cached."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "compress_ratios", tuple(int(r) for r in self.compress_ratios))
        from longreach.model.config_check import check

        check(self)

    # ---- derived ------------------------------------------------------------------------------------------------

    def layer_kind(self, layer: int) -> LayerKind:
        """The attention of layer `layer`; layers from `num_hidden_layers` on are MTP blocks."""
        if self.attention == "mla":
            return "mla"
        ratio = self.compress_ratios[layer]
        if self.attention == "dense" and layer < self.num_hidden_layers:
            return "dense"
        if self.attention == "sliding" or ratio == 0:
            return "sliding"
        return "csa" if ratio == self.csa_ratio else "hca"

    @property
    def nope_head_dim(self) -> int:
        """Channels of a KV entry without rotary position."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def num_streams(self) -> int:
        """Residual streams per token: `hc_mult`, or one with the plain residual."""
        return 1 if self.residual == "plain" else self.hc_mult

    @property
    def has_streams(self) -> bool:
        return self.residual != "plain"

    def is_hash_layer(self, layer: int) -> bool:
        return self.feed_forward == "moe" and layer < self.num_hash_layers

    def is_dense_ffn(self, layer: int) -> bool:
        return self.feed_forward == "dense" or layer < self.first_k_dense_replace

    # ---- making and varying -------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again. Unknown names are refused."""
        known = {f.name for f in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ConfigError(f"unknown config field {unknown[0]!r}; fields are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """One of `flash`, `pro`, `v32` (released shapes), `micro`, `tiny`, `small` (trainable here), `bench`."""
        from longreach.model import presets

        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
        return getattr(presets, name)()

    @staticmethod
    def from_json(path: str | Path) -> ModelConfig:
        """Read a `config.json` of either published layout, a directory holding one, or the official inference one."""
        from longreach.model.config_io import read_config

        return read_config(path)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, our own names."""
        fields = dataclasses.asdict(self)
        fields["compress_ratios"] = list(self.compress_ratios)
        return fields
