"""Initial weights, one readable table.

matrices                     normal, std = initializer_range
matrices that write to the   the same / sqrt(2 · layers): the residual sum then starts at the embedding's scale
  residual (wo_b, w2)
norms                        1
mHC                          the plain residual (see HyperConnection)
sinks, positional biases     0
router bias                  0
hash tables                  evenly spread, distinct per layer
Hyper-parameters of V4's own initialisation are not published; V3 used std 0.006.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from longreach.model.config import ModelConfig
from longreach.model.feedforward import spread_table
from longreach.model.hyper_connection import HyperConnection, StreamCollapse


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a Transformer, in an order fixed by names. Does nothing on the meta device."""
    config = cast(ModelConfig, model.config)
    if next(model.parameters()).device.type == "meta":
        return
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    std = config.initializer_range
    for module in model.modules():
        if isinstance(module, (HyperConnection, StreamCollapse)):
            module.reset_parameters(std, generator)
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        owner = name.split(".")[-2] if "." in name else ""
        if leaf in ("fn", "base", "scale"):
            continue
        if leaf in ("attn_sink", "ape", "bias"):
            p.zero_()
        elif p.dim() == 1:
            p.fill_(1.0)
        else:
            writes_residual = owner in ("wo_b", "w2", "wo") or leaf == "w2"
            scale = (2 * config.num_hidden_layers) ** -0.5 if writes_residual else 1.0
            p.normal_(0.0, std * scale, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            layer = int(name.split(".")[1])
            vocab_size, k = buffer.shape
            buffer.copy_(spread_table(vocab_size, config.n_routed_experts, k, seed=seed * 1000 + layer))
