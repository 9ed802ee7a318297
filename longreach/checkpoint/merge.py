"""A checkpoint with something added to some of its matrices, written matrix by matrix: how adapters are merged.

    write_merged("DeepSeek-V4-Flash", "merged", {"layers.0.attn.wq_a.weight": delta, …})

Every other matrix is copied as it is stored, FP8 and FP4 codes byte for byte. A changed matrix that was quantised is written
in BF16, because a small change of a weight is far below the steps of its codes. Measured for a change of rank 8 and a
hundredth of the weights' size: rounded back to FP8 the error is 0.86 of the change, to FP4 4.9, in BF16 0.16; for one of a
tenth 0.26, 0.87 and 0.02. `load_model` reads such a mixture; `longreach convert` makes any uniform format of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longreach.checkpoint.names import locate
from longreach.checkpoint.reader import Checkpoint, StoredUnit
from longreach.checkpoint.save import Saveable, config_text, copy_tokenizer
from longreach.checkpoint.table import TensorSpec, code_dtype, stored_shapes
from longreach.checkpoint.writer import CheckpointWriter
from longreach.model.config_io import read_config
from longreach.rundir import find_model


def write_merged(
    source: str | Path,
    directory: str | Path,
    deltas: Mapping[str, Callable[[int | None], Tensor]],
    tokenizer: Saveable | None = None,
) -> Path:
    """Write the checkpoint `source` with `deltas` added, in the official layout.

    Args:
        source: a run or checkpoint directory, in any layout.
        directory: is replaced when it holds a checkpoint; it appears complete or not at all.
        deltas: by state-dict name, float32 of the parameter's shape; of a stacked one per expert.
        tokenizer: None copies that of `source`.

    Raises:
        CheckpointError: `source` cannot be read, or the directory not be written.
    """
    origin = find_model(source)
    config = read_config(origin)
    with Checkpoint.open(origin) as checkpoint, torch.no_grad():
        stored_units = checkpoint.match(config)
        unknown = deltas.keys() - {stored.unit.parameter.name for stored in stored_units}
        assert not unknown, unknown
        table, places = [], []
        for stored in stored_units:
            place = locate(stored.unit.parameter.name, stored.unit.expert, config.attention == "mla", "official")
            table += _specs(checkpoint, stored, place.name, place.scale_name, stored.unit.parameter.name in deltas)
            places.append(place)
        plain = next(s.dtype for s in stored_units if s.unit.parameter.name == "embed.weight")
        with CheckpointWriter(directory, table, overwrite=True) as writer:
            for stored, place in zip(stored_units, places, strict=True):
                delta = deltas.get(stored.unit.parameter.name)
                if delta is None:
                    codes, scales = checkpoint.read_raw(stored)
                    writer.write_unit(place, codes.view(torch.int8) if codes.dtype == torch.uint8 else codes, scales)
                else:
                    writer.write_unit(place, checkpoint.read(stored).float() + delta(stored.unit.expert).cpu(), None)
            writer.write_text("config.json", config_text(config, "official", plain))
            if tokenizer is not None:
                tokenizer.save(writer.path_of("tokenizer.json"))
            elif (origin / "tokenizer.json").is_file():
                copy_tokenizer(origin / "tokenizer.json", writer)
    return Path(directory)


def _specs(checkpoint: Checkpoint, stored: StoredUnit, name: str, scale_name: str, changes: bool) -> list[TensorSpec]:
    """The tensors that a matrix becomes."""
    shape = stored.unit.shape
    if stored.encoding == "plain" or changes:
        dtype = stored.dtype if stored.encoding == "plain" else "BF16"
        return [TensorSpec(name, shape, code_dtype(stored.unit.parameter, "plain", dtype))]
    codes, scales = stored_shapes(shape, stored.encoding)
    assert scales is not None
    scale_dtype = checkpoint.tensors[stored.location.scale_name].dtype
    return [
        TensorSpec(name, codes, "I8" if stored.encoding == "fp4" else "F8_E4M3"),
        TensorSpec(scale_name, scales, "F32" if scale_dtype == "F32" else "F8_E8M0"),
    ]
