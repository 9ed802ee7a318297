"""Long texts in little memory: a layer's inner tensors are computed again on the way back instead of being kept.

    recompute_layers(model)                  before training; no other call changes
    recompute_layers(model, False)           back to keeping everything

Of each layer only its incoming residual streams stay, and during the backward pass the inner tensors of one layer. Preset
`bench`, 4,096 tokens, beyond weights, gradients and moments: 0.9 GiB instead of 2.1, for a third more time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longreach.model.block import Block
from longreach.model.passing import Pass
from longreach.model.stores import graph_stores
from longreach.model.transformer import Transformer


def recompute_layers(model: Transformer, on: bool = True) -> None:
    """Let training passes of `model` recompute its layers, or not. Gradients stay the same; other passes do not change.

    The MTP block, a single layer, keeps its tensors.
    """
    for block in model.layers:
        assert isinstance(block, Block)
        block.__dict__.pop("forward", None)
        if on:
            block.forward = _Recomputed(block)


class _Recomputed:
    """A block's forward that keeps its input alone."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, streams: Tensor, pass_: Pass) -> Tensor:
        plain = type(self.block).forward
        if not torch.is_grad_enabled():
            return plain(self.block, streams, pass_)
        again = False

        def layer(x: Tensor) -> Tensor:
            nonlocal again
            # The second time everything that a layer leaves behind exists already: it starts from stores as empty as the
            # first time, and hands what it would report to nobody.
            current = _silent(pass_) if again else pass_
            again = True
            return plain(self.block, x, current)

        out = checkpoint(layer, streams, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out


def _silent(pass_: Pass) -> Pass:
    c = pass_.config
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    spans = [replace(span, stores=graph_stores(c, layers)) for span in pass_.spans]
    return replace(pass_, spans=spans, routing={}, router_scores={}, selection={}, index_loss={})
