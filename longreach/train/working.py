"""The model that computes, beside the float32 weights that learn: bfloat16, or what FP8 and FP4 files would hold.

    working weight  ←  decode(encode(master weight))      before each step
    master gradient ←  working gradient                   after each backward pass: straight through the rounding

A step of 1e-4 on a weight of 1 is below bfloat16's resolution, so the weights that are trained stay float32. Training with
`weight_format` fp8 or fp8-fp4 is quantisation-aware training: the working weights pass through the very functions that
write and read checkpoints, so its forward is that of the saved file, bit for bit, and with `numerics="official"` inputs
and cache entries are rounded as the released code does, straight-through as well.
Source: DeepSeek-V4 report, section 5.2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longreach.checkpoint.save import encode
from longreach.checkpoint.table import code_dtype, encoding_of
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.shapes import ParameterShape, parameter_shapes
from longreach.model.transformer import Transformer
from longreach.ops.quant import fp4_weight_decode, fp8_weight_decode

FORMATS = ("plain", "fp8", "fp8-fp4")
CLIP_NORM = 1.0


class WorkingCopy:
    """A model to run forward and backward, whose weights follow another's.

    Args:
        master: the float32 model that learns.
        config: as the master's, with the `weight_format` (and `numerics`) to train for.
        dtype: of the working weights.
    """

    def __init__(self, master: Transformer, config: ModelConfig, dtype: torch.dtype) -> None:
        self.master = master
        self.model = Transformer(config, dtype=dtype, device=master.device)
        self.shapes = {p.name: p for p in parameter_shapes(config)}
        held = dict(master.named_parameters())
        self.pairs = [(name, p, held[name]) for name, p in self.model.named_parameters()]
        for name, buffer in master.named_buffers():  # one and the same: balancing moves it once for both
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the working weights those of the master, rounded."""
        for name, working, master in self.pairs:
            working.copy_(stored(master, self.shapes[name], self.model.config.weight_format))

    def follow_frozen(self) -> None:
        """Train what the master trains: a frozen weight needs no gradient here either."""
        for _, working, master in self.pairs:
            working.requires_grad_(master.requires_grad)

    @torch.no_grad()
    def hand_gradients(self) -> None:
        """Move the gradients to the master."""
        for _, working, master in self.pairs:
            if working.grad is not None:
                master.grad = working.grad.to(master.dtype)
                working.grad = None


def stored(weight: Tensor, parameter: ParameterShape, weight_format: str) -> Tensor:
    """What a checkpoint of this format gives back for a weight, float32. The plain format stores it as it is."""
    if weight_format == "plain":
        return weight
    encoding = encoding_of(parameter, weight_format)
    if encoding == "plain":
        return weight.bfloat16().float() if code_dtype(parameter, encoding, "BF16") == "BF16" else weight
    if weight.dim() == 3:  # experts, each a matrix of its own
        out = torch.empty_like(weight)
        for expert, matrix in enumerate(weight):
            out[expert] = stored(matrix, parameter, weight_format)
        return out
    codes, scale = encode(weight.detach().float(), encoding)
    assert scale is not None
    return fp8_weight_decode(codes, scale) if encoding == "fp8" else fp4_weight_decode(codes, scale)


def working_copy(master: Transformer, dtype: torch.dtype, weight_format: str) -> WorkingCopy | None:
    """The copy a run needs; None where the master itself can compute.

    Raises:
        RequestError: an unknown format, or a shape FP4 cannot hold.
    """
    if weight_format not in FORMATS:
        raise RequestError(f"--qat {weight_format!r} is none of {', '.join(FORMATS)}")
    if weight_format == "plain":
        return WorkingCopy(master, master.config, dtype) if dtype != torch.float32 else None
    return WorkingCopy(master, master.config.replace(weight_format=weight_format, numerics="official"), dtype)


def frozen_but_indexer(model: nn.Module) -> None:
    """Leave only the indexers' own weights to learn."""
    for name, p in model.named_parameters():
        p.requires_grad_(".indexer." in name)


def unfrozen(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(True)


def clip_gradients(model: nn.Module, norm: float = CLIP_NORM) -> float:
    """Bound the gradients' norm, the indexers' apart: they have a loss of their own. Returns the main norm before."""
    own, rest = [], []
    for name, p in model.named_parameters():
        if p.grad is not None:
            (own if ".indexer." in name else rest).append(p)
    norms = [torch.nn.utils.clip_grad_norm_(part, norm).item() for part in (rest, own) if part]
    return norms[0] if norms else 0.0


def sharing(model: Transformer, **changes: Any) -> Transformer:
    """A model of another configuration whose weights are those of `model`, in the same memory.

    Args:
        changes: config fields that change no shape, such as `arithmetic="invariant"`.
    """
    twin = Transformer(model.config.replace(**changes), dtype=model.dtype, device="meta")
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._parameters[leaf] = parameter
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._buffers[leaf] = buffer
    return twin
