"""Muon and AdamW as one optimizer, each with its share of a model.

    optimizer = make_optimizers(model, lr=2.7e-4)
    optimizer.scale_lr(factor)                   a schedule's factor, 1 at its peak
    loss.backward(); optimizer.step(); optimizer.zero_grad()

Source of the constants: DeepSeek-V4 report, section 4.2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from longreach.errors import CheckpointError, RequestError
from longreach.optim.groups import Kind, parameter_groups
from longreach.optim.muon import Muon

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPS = 1e-20
"""Far below any gradient: the usual 1e-8 would shrink the updates of parameters with tiny ones (rare rows, gates)."""


def make_optimizers(
    model: nn.Module,
    lr: float,
    adamw_lr: float | None = None,
    kind: Kind = "muon",
    *,
    momentum: float = 0.95,
    weight_decay: float = WEIGHT_DECAY,
    update_rms: float = 0.18,
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
    adamw: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> HybridOptimizer:
    """The optimizer of a model, one parameter group per role.

    Args:
        model: a Longreach model, or any torch model; see `parameter_groups`.
        lr: peak learning rate. Muon's updates are scaled so that AdamW can share it.
        adamw_lr: another one for AdamW's groups.
        kind: "muon", or "adamw" to put every parameter on AdamW, for comparison.
        momentum, update_rms, dtype: of `Muon`.
        weight_decay: of both.
        betas, eps: of AdamW.
        adamw: name patterns of parameters that AdamW is to have as well.

    Raises:
        RequestError: an unknown kind, a rate out of range, a parameter without a role.
    """
    if kind not in ("muon", "adamw"):
        raise RequestError(f"kind={kind!r} is neither 'muon' nor 'adamw'")
    adamw_lr = lr if adamw_lr is None else adamw_lr
    for rate in (lr, adamw_lr):
        if not rate >= 0:
            raise RequestError(f"lr={rate} must be 0 or more")
    groups = parameter_groups(model, adamw)
    if kind == "adamw":
        groups = [group | {"optimizer": "adamw"} for group in groups]
    optimizers: dict[Kind, torch.optim.Optimizer] = {}
    if mine := _of("muon", groups, lr):
        optimizers["muon"] = Muon(
            mine, lr, momentum=momentum, weight_decay=weight_decay, update_rms=update_rms, dtype=dtype
        )  # fmt: skip
    if mine := _of("adamw", groups, adamw_lr):
        optimizers["adamw"] = torch.optim.AdamW(
            mine, adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )  # fmt: skip
    return HybridOptimizer(optimizers)


class HybridOptimizer:
    """What a training loop needs of an optimizer, for one or both of Muon and AdamW.

    Every group has `role`, `optimizer` and `base_lr`, its rate where the schedule's factor is 1.
    """

    def __init__(self, optimizers: dict[Kind, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, to read and to set (`group["lr"]`); adding to this list does nothing."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def scale_lr(self, factor: float) -> None:
        """Set every rate to `factor` times its base."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def set_lr(self, muon_lr: float, adamw_lr: float | None = None) -> None:
        """Set the rates of this step (AdamW's is Muon's where not given); the bases stay."""
        for group in self.param_groups:
            group["lr"] = muon_lr if group["optimizer"] == "muon" or adamw_lr is None else adamw_lr

    def state_dict(self) -> dict[str, Any]:
        """Plain values and the live tensors, by "muon" and "adamw"."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit; rates and constants become the saved ones, as torch does.

        Raises:
            CheckpointError: it is of another kind of optimizer, or of a model with other parameters. Nothing changes.
        """
        if set(state) != set(self.optimizers):
            raise CheckpointError(
                f"the saved state is of {' and '.join(sorted(state)) or 'nothing'}, this optimizer has "
                f"{' and '.join(sorted(self.optimizers))}; choose the same kind of optimizer"
            )
        for name, optimizer in self.optimizers.items():
            saved = [n for group in state[name]["param_groups"] for n in group["param_names"]]
            mine = [n for group in optimizer.param_groups for n in group["param_names"]]
            if saved != mine:
                other = sorted(set(saved) ^ set(mine)) or ["their order"]
                raise CheckpointError(f"the saved {name} state is of other parameters; they differ in {other[0]}")
        for name, optimizer in self.optimizers.items():
            # AdamW would take the given tensors for its own and change them
            optimizer.load_state_dict(state[name] if name == "muon" else copy.deepcopy(state[name]))


def _of(kind: Kind, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    return [group | {"base_lr": lr} for group in groups if group["optimizer"] == kind]
