"""One layer: attention and feed-forward, each normed and inside its residual connection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longreach.model.attention import Attention
from longreach.model.baseline import LatentAttention
from longreach.model.config import ModelConfig
from longreach.model.feedforward import FeedForward, MixtureOfExperts
from longreach.model.hyper_connection import HyperConnection, PlainResidual
from longreach.model.layers import RMSNorm
from longreach.model.passing import Pass


class Block(nn.Module):
    """streams ← attention(streams); streams ← feed-forward(streams). `[B, T, n, D]`, or `[B, T, D]` with plain residuals."""

    def __init__(self, config: ModelConfig, layer: int, **factory) -> None:
        super().__init__()
        c = config
        self.layer = layer
        self.attn_hc = residual(c, factory.get("device"))
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.attn = LatentAttention(c, layer, **factory) if c.attention == "mla" else Attention(c, layer, **factory)
        self.ffn_hc = residual(c, factory.get("device"))
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        if c.is_dense_ffn(layer):
            self.ffn: nn.Module = FeedForward(c, c.intermediate_size, **factory)
        else:
            self.ffn = MixtureOfExperts(c, layer, **factory)

    def forward(self, streams: Tensor, pass_: Pass) -> Tensor:
        streams = self.attn_hc(streams, lambda u: self.attn(self.attn_norm(u), pass_))
        return self.ffn_hc(streams, lambda u: self.ffn(self.ffn_norm(u), pass_))


def residual(config: ModelConfig, device: torch.device | str | None) -> HyperConnection | PlainResidual:
    """The residual connection this configuration asks for."""
    if config.residual == "plain":
        return PlainResidual()
    return HyperConnection(
        config.hidden_size,
        config.hc_mult,
        iters=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        constrained=config.residual == "mhc",
        device=device,
    )
