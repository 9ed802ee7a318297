"""From a checkpoint to a model whose quantised weights stay as they are stored: `model.frozen`, for training beside them.

    model = load_frozen("DeepSeek-V4-Flash")         FP8 and FP4 codes memory-mapped, all else in `dtype`; nothing learns

The files must stay as they are while the model is used: what is mapped is read when it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from longreach.checkpoint.load import check_routing_tables
from longreach.checkpoint.reader import Checkpoint
from longreach.model.config_io import read_config
from longreach.model.feedforward import MixtureOfExperts
from longreach.model.frozen import Codes, FrozenEmbedding, FrozenExperts, FrozenLinear, FrozenMixture, Stack
from longreach.model.layers import Linear
from longreach.model.transformer import Transformer
from longreach.rundir import find_model


def load_frozen(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, **overrides: Any
) -> Transformer:
    """Load a model of which no weight learns.

    Args:
        path, overrides: as of `load_model`.
        dtype: of what is computed, and of the weights that are not quantised. The embedding and the head keep the dtype they
            are stored in, if that is narrower.
        device: where the weights go; codes on the CPU stay in the file and are read when they are needed.

    Raises:
        As `load_model`.
    """
    directory = find_model(path)
    config = read_config(directory).replace(**overrides)
    device = torch.device("cpu" if device is None else device)
    model = Transformer(config, dtype=dtype, device="meta")
    ignored = ("mtp.", "model.mtp.") if overrides.get("num_nextn_predict_layers") == 0 else ()
    stacks: dict[str, dict[int, Codes]] = {}
    with Checkpoint.open(directory) as checkpoint:
        for stored in checkpoint.match(config, ignored):
            name, expert = stored.unit.parameter.name, stored.unit.expert
            codes, scales = checkpoint.read_raw(stored)
            if expert is not None:
                stacks.setdefault(name, {})[expert] = Codes(codes.to(device), _to(scales, device))
                continue
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if stored.encoding != "plain":
                assert isinstance(module, Linear), name
                frozen = FrozenLinear(
                    Codes(codes.to(device), _to(scales, device)), dtype, rounds_input=module.rounds_input
                )
                put(model, owner, frozen)
            elif name == "embed.weight":
                table = codes.to(device, _narrower(codes.dtype, dtype))
                put(model, owner, FrozenEmbedding(table, dtype))
            elif leaf in module._buffers:
                module._buffers[leaf] = codes.to(device, module._buffers[leaf].dtype)  # pyright: ignore[reportOptionalMemberAccess]
            else:
                meant = module._parameters[leaf]
                assert meant is not None
                if name == "head.weight":
                    value = codes.to(device, _narrower(codes.dtype, dtype))
                else:
                    value = codes.to(device, meant.dtype, copy=True)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for name in sorted({name.rpartition(".")[0] for name in stacks}):
        held = {leaf: stacks[f"{name}.{leaf}"] for leaf in ("w1", "w3", "w2")}
        ordered = {leaf: Stack([of[e] for e in sorted(of)], dtype) for leaf, of in held.items()}
        owner = name.rpartition(".")[0]
        mixture = model.get_submodule(owner)
        assert isinstance(mixture, MixtureOfExperts), name
        put(model, owner, FrozenMixture(mixture, FrozenExperts(**ordered)))
    check_routing_tables(model, config, directory)
    return model.requires_grad_(False)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let a module stand where the one of this name stood."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _narrower(stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return stored if stored.itemsize <= wanted.itemsize else wanted


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
