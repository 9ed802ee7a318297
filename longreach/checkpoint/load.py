"""From a checkpoint to a model in memory.

    model = load_model("runs/quickstart")                    a run directory
    model = load_model("DeepSeek-V4-Flash", device="cuda")   a published checkpoint, official or transformers layout

The model is built without initialisation and filled matrix by matrix: peak memory is the model plus one matrix. FP8
and FP4 weights are decoded exactly; the values then round to the model's dtype (E4M3 and E2M1 times a power of two
fit BF16).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longreach.checkpoint.reader import Checkpoint, StoredUnit
from longreach.errors import CheckpointError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.model.transformer import Transformer
from longreach.rundir import find_model


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> Transformer:
    """Load a model.

    Args:
        path: a run directory, its `model/`, or a checkpoint directory of either published layout.
        dtype: of the weights; what the model keeps in float32 stays float32. None: on a CUDA device bfloat16 if the
            checkpoint's matrices are 16 bits or fewer, which loses nothing; float32 otherwise, because a CPU gains
            little from bfloat16 and a float32 checkpoint would lose bits.
        device: where the model is built. None: the CPU.
        overrides: config fields to change, such as `numerics="transformers"` or `arithmetic="invariant"`.
            `num_nextn_predict_layers=0` (with `compress_ratios` one shorter) leaves the MTP block unread.

    Returns:
        The model, with gradients enabled on its parameters.

    Raises:
        RequestError: there is no checkpoint at `path`.
        ConfigError: its config.json cannot be read, or an override is impossible.
        CheckpointError: weights are damaged, or do not fit the config; all problems are listed by name.
    """
    directory = find_model(path)
    config = read_config(directory).replace(**overrides)
    device = torch.device("cpu" if device is None else device)
    ignored = ("mtp.", "model.mtp.") if overrides.get("num_nextn_predict_layers") == 0 else ()
    with Checkpoint.open(directory) as checkpoint:
        stored_units = checkpoint.match(config, ignored)
        if dtype is None:
            dtype = _natural_dtype(stored_units, device)
        model = build_empty(config, dtype, device)
        state = model.state_dict()
        for stored in stored_units:
            target = state[stored.unit.parameter.name]
            if stored.unit.expert is not None:
                target = target[stored.unit.expert]
            target.copy_(checkpoint.read(stored))
    check_routing_tables(model, config, directory)
    return model


def build_empty(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A model whose tensors are allocated but not initialised. All of them are in the state dict, so all get filled."""
    return Transformer(config, dtype=dtype, device="meta").to_empty(device=device)


def _natural_dtype(stored_units: list[StoredUnit], device: torch.device) -> torch.dtype:
    wide = any(s.dtype in ("F32", "F64") for s in stored_units if s.unit.parameter.kind in ("linear", "expert"))
    return torch.bfloat16 if device.type == "cuda" and not wide else torch.float32


def check_routing_tables(model: Transformer, config: ModelConfig, directory: Path) -> None:
    """Raise CheckpointError if a hash-routed layer's table names an expert that there is none of."""
    for name, table in model.state_dict().items():
        if name.endswith(".tid2eid") and not bool(((table >= 0) & (table < config.n_routed_experts)).all()):
            raise CheckpointError(
                f"{directory}: {name} routes to experts outside 0..{config.n_routed_experts - 1}; the file is damaged"
            )
