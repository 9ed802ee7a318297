"""Feed-forward sublayers: a shared expert plus routed ones, chosen by learned scores or by a table of token ids.

The first layers route by token id alone (`tid2eid`): no balancing is needed and training starts evenly spread. The
learned gate still decides how much each chosen expert counts. Maths in `ops.moe`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longreach.model.config import ModelConfig
from longreach.model.layers import FP8_ACTIVATION_BLOCK, Linear
from longreach.model.passing import Pass
from longreach.ops.moe import (
    choose_experts,
    clamped_swiglu,
    mixture,
    mixture_reference,
    router_scores,
    routing_weights,
)


class FeedForward(nn.Module):
    """w2 (silu(w1 x) · w3 x), clamped: the shared expert, and the dense layer that MoE replaces."""

    def __init__(self, config: ModelConfig, width: int, **factory) -> None:
        super().__init__()
        rounds = config.numerics == "official" and config.weight_format != "plain"
        self.w1 = Linear(config.hidden_size, width, rounds_input=rounds, **factory)
        self.w3 = Linear(config.hidden_size, width, rounds_input=rounds, **factory)
        self.w2 = Linear(width, config.hidden_size, rounds_input=rounds, **factory)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor, pass_: Pass | None = None) -> Tensor:
        return self.w2(clamped_swiglu(self.w1(x), self.w3(x), self.limit).to(x.dtype))


class Gate(nn.Module):
    """Which experts a token goes to, and with what weight.

    Attributes:
        bias: float32 `[E]`, added to the scores for choosing only; steered by the trainer, not by gradient.
        tid2eid: int64 `[V, K]`, the table of a hash-routed layer. A layer has one or the other.
    """

    def __init__(self, config: ModelConfig, layer: int, **factory) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        device = factory.get("device")
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, **factory))
        self.hashed = config.is_hash_layer(layer)
        self.bias: Tensor | None
        self.tid2eid: Tensor | None
        if self.hashed:
            table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64, device=device)
            self.register_buffer("tid2eid", table)
            self.bias = None
        else:
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32, device=device)
            self.register_buffer("bias", bias)
            self.tid2eid = None

    def forward(self, x_BTD: Tensor, pass_: Pass) -> tuple[Tensor, Tensor]:
        """Chosen experts int64 `[B, T, K]` and their weights float32 `[B, T, K]`."""
        c = self.config
        scores = router_scores(x_BTD, self.weight, c.scoring_func)
        if (forced := pass_.routing_for(self.layer)) is not None:
            chosen = forced
        elif self.tid2eid is not None:
            chosen = self.tid2eid[pass_.tokens]
        else:
            chosen = choose_experts(scores, self.bias, c.num_experts_per_tok, c.n_group, c.topk_group)
        pass_.keep_routing(self.layer, chosen, scores)
        return chosen, routing_weights(scores, chosen, c.routed_scaling_factor, c.scoring_func != "softmax")


class Experts(nn.Module):
    """The routed experts' weights, stacked: `w1`, `w3` are `[E, f, D]`, `w2` is `[E, D, f]`."""

    def __init__(self, config: ModelConfig, **factory) -> None:
        super().__init__()
        E, f, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w1 = nn.Parameter(torch.empty(E, f, D, **factory))
        self.w3 = nn.Parameter(torch.empty(E, f, D, **factory))
        self.w2 = nn.Parameter(torch.empty(E, D, f, **factory))


class MixtureOfExperts(nn.Module):
    """Σ_k weight_k · expert_k(x) + shared expert(x)."""

    def __init__(self, config: ModelConfig, layer: int, **factory) -> None:
        super().__init__()
        self.gate = Gate(config, layer, **factory)
        self.experts = Experts(config, **factory)
        self.shared_experts = FeedForward(config, config.moe_intermediate_size, **factory)
        self.limit = config.swiglu_limit
        rounds = config.numerics == "official" and config.weight_format != "plain"
        self.fp8_block = FP8_ACTIVATION_BLOCK if rounds else 0

    def forward(self, x_BTD: Tensor, pass_: Pass) -> Tensor:
        chosen, weight = self.gate(x_BTD, pass_)
        B, T, D = x_BTD.shape
        routed = self.mix(x_BTD.reshape(B * T, D), chosen.flatten(0, 1), weight.flatten(0, 1), pass_)
        shared = self.shared_experts(x_BTD).view(B * T, D)
        return (routed + shared).to(x_BTD.dtype).view(B, T, D)

    def mix(self, x_MD: Tensor, chosen_MK: Tensor, weight_MK: Tensor, pass_: Pass) -> Tensor:
        """What the routed experts say, `[M, D]` in float32 (float64 for float64)."""
        stacked = self.experts.w1, self.experts.w3, self.experts.w2, self.limit, self.fp8_block
        if pass_.invariant:
            return mixture_reference(x_MD, chosen_MK, weight_MK, *stacked, pass_.real_rows)
        return mixture(x_MD, chosen_MK, weight_MK, *stacked)


def spread_table(vocab_size: int, experts: int, k: int, seed: int) -> Tensor:
    """A token-to-expert table, int64 `[vocab_size, k]`, as even as it can be.

    Within every run of `experts` consecutive ids each expert is used exactly `k` times, a token's experts are distinct,
    and which experts meet differs from run to run. (The released hash is unpublished; its table ships with the weights.)
    """
    generator = torch.Generator().manual_seed(seed)
    runs = -(-vocab_size // experts)
    order = torch.rand(runs, experts, generator=generator).argsort(dim=1)
    offsets = torch.rand(runs, experts, generator=generator).argsort(dim=1)[:, :k]
    slots = (torch.arange(experts)[None, :, None] + offsets[:, None, :]) % experts
    table = order[:, :, None].expand(-1, -1, k).gather(1, slots)
    return table.reshape(-1, k)[:vocab_size].contiguous()
