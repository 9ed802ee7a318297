"""Muon: the update of a matrix is its momentum made orthogonal, so all its directions move equally far.

    M ← μ M + G;   O = orthogonalise(μ M + G) · sqrt(max(n, m)) · γ;   W ← W (1 − η λ) − η O

An orthogonal n × m matrix has root mean square 1 / sqrt(max(n, m)): the update has γ, about AdamW's, and both share one
learning rate. For matrices inside a network; `optim.groups` says which. Source: DeepSeek-V4 report, section 2.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from longreach.errors import CheckpointError, RequestError, ShapeError
from longreach.optim.newton_schulz import default_dtype, orthogonalise

BATCH_BYTES = {"cpu": 512 << 10, "cuda": 64 << 20}
"""Default size of a batch: elsewhere what keeps the device busy; on a CPU what stays in a core's cache with its working
memory (preset `bench`, one thread: 5.6 s per step, 6.7 s with 1 MiB, 8.3 s with 4 MiB)."""

BUFFER = "momentum_buffer"


class Muon(Optimizer):
    """Muon for any torch model's matrices.

    A parameter is one matrix `[n, m]`, or a stack `[E, n, m]` of which each is treated alone (experts; a convolution's
    weights are not such a stack). Matrices of equal shape go through Newton-Schulz together, across parameters and
    groups. The momentum is float32, or float64 for float64 weights; weights of fewer bits are updated in float32 and
    rounded once per step, which loses updates below half their last bit: keep float32 weights where you can.

    On a CPU a matrix's update is the same bits whatever it is batched with. A loaded state continues bit for bit.

    Args:
        params: tensors, `(name, tensor)` pairs or groups of either, as for every torch optimizer. Names appear in errors.
        lr: η, the learning rate AdamW would have.
        momentum: μ.
        weight_decay: λ, decoupled: each step takes `lr * weight_decay` of the weight away.
        update_rms: γ, root mean square of an update, times `lr`.
        dtype: of Newton-Schulz; None for bfloat16 on a GPU and float32 elsewhere. Not part of the state.
        batch_bytes: bound of a batch of matrices, in the momentum's dtype (at least one matrix; the working memory is
            about five times this). None for `BATCH_BYTES`.

    Raises:
        ShapeError: a parameter that is no matrix and no stack of matrices.
        RequestError: a rate or factor out of range; at `step`, a sparse gradient, before anything has changed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        dtype: torch.dtype | None = None,
        batch_bytes: int | None = None,
    ) -> None:
        if batch_bytes is not None and batch_bytes < 1:
            raise RequestError(f"batch_bytes={batch_bytes} must be positive")
        if dtype is not None and not dtype.is_floating_point:
            raise RequestError(f"dtype={dtype} is not a float dtype; use torch.float32 or torch.bfloat16")
        self.dtype, self.batch_bytes = dtype, batch_bytes
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, update_rms=update_rms))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"dtype": self.dtype, "batch_bytes": self.batch_bytes}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; the others keep weight and momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for batch in self._batches():
            self._update(batch)
        return loss

    def _batches(self) -> Iterator[list[Piece]]:
        """Matrices of equal shape and kind, at most `batch_bytes` of them at a time, a stack cut where it does not fit."""
        alike: dict[tuple, list[tuple[dict, Tensor]]] = {}
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise RequestError(f"{_name(group, index)} has a sparse gradient; Muon needs dense ones, use AdamW")
                alike.setdefault((p.shape[-2:], p.device, p.dtype), []).append((group, p))
        for (shape, device, dtype), parameters in alike.items():
            limit = self.batch_bytes or BATCH_BYTES.get(device.type, BATCH_BYTES["cuda"])
            room = most = max(1, limit // (shape.numel() * _wide(dtype).itemsize))
            batch: list[Piece] = []
            for group, p in parameters:
                momentum = self.state[p].get(BUFFER)
                if momentum is None:
                    momentum = self.state[p][BUFFER] = torch.zeros_like(p, dtype=_wide(dtype))
                assert p.grad is not None
                weight, grad, momentum = (t if t.dim() == 3 else t.unsqueeze(0) for t in (p, p.grad, momentum))
                start = 0
                while start < len(weight):
                    part = slice(start, min(start + room, len(weight)))
                    batch.append(Piece(group, weight[part], grad[part], momentum[part]))
                    room -= part.stop - start
                    start = part.stop
                    if room == 0:
                        yield batch
                        batch, room = [], most
            if batch:
                yield batch

    def _update(self, batch: list[Piece]) -> None:
        weight = batch[0].weight
        shape = (sum(len(piece.weight) for piece in batch), *weight.shape[1:])
        ahead = torch.empty(shape, dtype=_wide(weight.dtype), device=weight.device)
        sizes = [len(piece.weight) for piece in batch]
        for piece, target in zip(batch, ahead.split(sizes), strict=True):
            momentum = piece.group["momentum"]
            piece.momentum.mul_(momentum).add_(piece.grad)
            torch.add(piece.grad, piece.momentum, alpha=momentum, out=target)  # Nesterov: where the momentum is heading
        directions = orthogonalise(ahead, self.dtype or default_dtype(ahead))
        for piece, direction in zip(batch, directions.split(sizes), strict=True):
            lr, decay = float(piece.group["lr"]), piece.group["weight_decay"]
            step = lr * piece.group["update_rms"] * max(shape[1:]) ** 0.5
            new = piece.weight.to(direction.dtype)  # the weight itself where it is as wide
            new.mul_(1 - lr * decay).add_(direction, alpha=-step)
            if new.dtype != piece.weight.dtype:
                piece.weight.copy_(new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit. Nothing is shared with the given state.

        Raises:
            CheckpointError: a momentum that does not have its parameter's shape.
        """
        # torch casts every saved tensor to its parameter's dtype, and the momentum is wider than bf16 weights
        pairs = []
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for index, (key, p) in enumerate(zip(saved["params"], group["params"], strict=False)):
                momentum = state_dict["state"].get(key, {}).get(BUFFER)
                if momentum is not None and momentum.shape != p.shape:
                    raise CheckpointError(
                        f"the saved momentum of {_name(group, index)} is {tuple(momentum.shape)}, "
                        f"the parameter {tuple(p.shape)}; the state is of another model"
                    )
                pairs.append((p, momentum))
        super().load_state_dict(state_dict)
        for p, momentum in pairs:
            if momentum is not None:
                self.state[p][BUFFER] = torch.empty_like(p, dtype=_wide(p.dtype)).copy_(momentum)


class Piece(NamedTuple):
    """Some matrices of one parameter, all `[k, n, m]` views."""

    group: dict[str, Any]
    weight: Tensor
    grad: Tensor
    momentum: Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _name(group: dict[str, Any], index: int) -> str:
    return group["param_names"][index] if "param_names" in group else f"parameter {index} of its group"


def _check_group(group: dict[str, Any]) -> None:
    for key, allowed in (("lr", "0 or more"), ("weight_decay", "0 or more"), ("update_rms", "0 or more")):
        if not group[key] >= 0:
            raise RequestError(f"{key}={group[key]} must be {allowed}")
    if not 0 <= group["momentum"] < 1:
        raise RequestError(f"momentum={group['momentum']} must be at least 0 and below 1")
    for index, p in enumerate(group["params"]):
        if p.dim() not in (2, 3):
            fix = "give vectors to AdamW" if p.dim() < 2 else "reshape it to matrices, or give it to AdamW"
            raise ShapeError(f"{_name(group, index)} is {tuple(p.shape)}, Muon takes [n, m] and [E, n, m]; {fix}")
        if p.numel() == 0 or not p.is_floating_point():
            raise ShapeError(f"{_name(group, index)} is {tuple(p.shape)} of {p.dtype}; Muon takes float matrices")
