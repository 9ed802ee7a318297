"""Multi-token prediction, depth 1: one more block that predicts the token after next.

    X⁰_j = e_proj norm(embed(token[t+1])) + h_proj norm(X_j)      X: the main model's streams before their collapse
    hidden = norm(collapse(block(X⁰)));  head(hidden[t]) predicts token[t+2]

A sliding-window block with learned routing; embedding and head are the main model's. Position of the pair is t.
Source: DeepSeek-V4 report; official inference code, which defines the module; the shift follows DeepSeek-V3.
"""

from __future__ import annotations

from torch import Tensor, nn

from longreach.model.block import Block
from longreach.model.config import ModelConfig
from longreach.model.hyper_connection import StreamCollapse
from longreach.model.layers import Linear, RMSNorm
from longreach.model.passing import Pass


class MTPBlock(Block):
    """The draft block; `layer` counts on from the main layers."""

    def __init__(self, config: ModelConfig, layer: int, **factory) -> None:
        super().__init__(config, layer, **factory)
        c = config
        rounds = c.numerics == "official" and c.weight_format != "plain"
        self.e_proj = Linear(c.hidden_size, c.hidden_size, rounds_input=rounds, **factory)
        self.h_proj = Linear(c.hidden_size, c.hidden_size, rounds_input=rounds, **factory)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **factory)
        self.collapse: nn.Module = (
            StreamCollapse(
                c.hidden_size, c.hc_mult, eps=c.hc_eps, norm_eps=c.rms_norm_eps, device=factory.get("device")
            )
            if c.has_streams
            else nn.Identity()
        )

    def draft(self, streams: Tensor, next_embedding_BTD: Tensor, pass_: Pass) -> Tensor:
        """Hidden states `[B, T, D]`, normed: position t, told token t+1, for predicting token t+2."""
        return self.read(self.continued(streams, next_embedding_BTD, pass_))

    def continued(self, streams: Tensor, next_embedding_BTD: Tensor, pass_: Pass) -> Tensor:
        """The streams after this block; as input of another call they stand in for the main model's, one token on."""
        e = self.e_proj(self.enorm(next_embedding_BTD))
        if streams.dim() == 4:
            e = e.unsqueeze(2)
        return super().forward(e + self.h_proj(self.hnorm(streams)), pass_)

    def read(self, streams: Tensor) -> Tensor:
        """What the head reads of them."""
        return self.norm(self.collapse(streams))
