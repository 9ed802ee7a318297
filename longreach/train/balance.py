"""How evenly the experts are used, and the bias that keeps it so without a loss; what the indexers' losses say.

    bias_e ← bias_e + speed · sign(mean load − load of expert e)       after each step, every layer routed by scores

Source: DeepSeek-V4 report, section 2.1; V3's auxiliary-loss-free balancing.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longreach.model.features import Features
from longreach.model.transformer import Transformer

BIAS_SPEED = 0.001


@torch.no_grad()
def balance_experts(
    model: Transformer, routing: dict[int, Tensor], real_BT: Tensor | None = None, speed: float = BIAS_SPEED
) -> None:
    """Raise the choosing bias of experts that got less than the mean load in this batch, lower it for the others.

    Args:
        routing: layer -> int64 (B, T, K) experts; layers from `num_hidden_layers` on are MTP blocks. Layers without a
            bias (hash-routed ones) are left alone.
        real_BT: bool, False at padding, which is no load.
    """
    for layer, chosen in routing.items():
        bias = gate_of(model, layer).bias
        if isinstance(bias, Tensor):
            counted = chosen if real_BT is None else chosen[real_BT]
            load = torch.bincount(counted.flatten(), minlength=len(bias)).float()
            bias += speed * (load.mean() - load).sign()


def gate_of(model: Transformer, layer: int) -> Any:
    """The gate of a layer, main or MTP."""
    first_mtp = model.config.num_hidden_layers
    block = f"layers.{layer}" if layer < first_mtp else f"mtp.{layer - first_mtp}"
    return model.get_submodule(f"{block}.ffn.gate")


def is_hashed(model: Transformer, layer: int) -> bool:
    return gate_of(model, layer).tid2eid is not None


def expert_balance(routing: dict[int, Tensor], experts: int) -> float | None:
    """Load of the busiest expert over the mean load, averaged over layers; 1 is even."""
    if not routing:
        return None
    loads = [torch.bincount(chosen.flatten(), minlength=experts).float() for chosen in routing.values()]
    return fmean(float(load.max() / load.mean()) for load in loads)


def indexer_figures(features: Features) -> dict[str, float]:
    """Index loss and recall, averaged over the layers that have them."""
    parts = list(features.index_loss.values())
    figures = {"index_loss": fmean(part.mean.item() for part in parts)}
    measured = [part.recall for part in parts if int(part.recall.queries)]
    if measured:
        figures["index_recall"] = fmean(recall.mean.item() for recall in measured)
        figures["index_chance"] = fmean(recall.mean_chance.item() for recall in measured)
    return figures
