"""A model with random weights in which everything matters, for tests of fast paths against plain ones."""

from __future__ import annotations

import torch

from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer


def shuffled(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose gates, sinks and biases all matter."""
    model = Transformer(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 1 or "hc" in name else 0.08))
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model
