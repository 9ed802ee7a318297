"""How many parameters a model has and how many a token uses, by part, without building it.

    count_parameters(ModelConfig.preset("flash")).total        284,332,240,471 (MTP: 6,610,048,891 more)
    count_parameters(ModelConfig.preset("flash")).active       13,270,101,591

Counted as the published totals are: every float tensor of the checkpoint, the router's correction biases included,
the integer table of the hash-routed layers (`tid2eid`) not. "Active" leaves out the embedding table, of which a token
reads one row, and takes `num_experts_per_tok` of the routed experts. Each total above equals the published one to the
parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from longreach.model.config import ModelConfig
from longreach.model.shapes import ParameterShape, parameter_shapes


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one model. The MTP block is counted apart, as its use is optional."""

    total: int
    """All parameters except the MTP block's."""
    active: int
    """Used by one token, without the embedding table and the MTP block."""
    mtp: int
    """The MTP block's own; embedding and head are shared with the model."""
    by_part: dict[str, int]
    """`total` by part of the model, parts without parameters left out."""
    active_by_part: dict[str, int]
    """`active` by part."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count a model's parameters from its config."""
    by_part: dict[str, int] = {}
    active_by_part: dict[str, int] = {}
    mtp = 0
    for parameter in parameter_shapes(config):
        if parameter.kind == "int64":
            continue
        if parameter.is_mtp:
            mtp += parameter.count
            continue
        by_part[parameter.part] = by_part.get(parameter.part, 0) + parameter.count
        if parameter.part != "embedding":
            active_by_part[parameter.part] = active_by_part.get(parameter.part, 0) + _active(config, parameter)
    return ParameterCount(sum(by_part.values()), sum(active_by_part.values()), mtp, by_part, active_by_part)


def _active(config: ModelConfig, parameter: ParameterShape) -> int:
    if parameter.kind != "expert":
        return parameter.count
    return parameter.count // config.n_routed_experts * config.num_experts_per_tok
