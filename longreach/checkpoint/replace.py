"""A checkpoint with some of its matrices replaced, written beside it: training of a part ends here.

    replace_weights("models/flash", "runs/indexer/model", {"layers.2.attn.indexer.wq_b.weight": values, …})

Everything else is copied as it is stored, FP8 and FP4 codes with their scales included, one matrix in memory at a time. A
replaced matrix is stored the way the one before it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from longreach.checkpoint.convert import format_of, plain_dtypes, transcode
from longreach.checkpoint.names import Location, locate, written_layout
from longreach.checkpoint.reader import Checkpoint, StoredUnit
from longreach.checkpoint.save import Saveable, check_encodable, config_text, encode
from longreach.checkpoint.table import TensorSpec, encoding_of, tensor_table
from longreach.checkpoint.writer import TORCH_DTYPE, CheckpointWriter
from longreach.errors import CheckpointError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.ops.quant import e8m0_to_float, fp4_weight_decode, fp8_weight_decode
from longreach.rundir import find_model

COMPANIONS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""Small files of published checkpoints that other programs read; copied where they are."""

_WRITTEN_AS = {"U8": "I8", "I32": "I64"}
"""Storage types that are read but not written: the same FP4 codes, the same whole numbers."""


def replace_weights(
    source: str | Path,
    destination: str | Path,
    replaced: Mapping[str, Tensor],
    tokenizer: Saveable,
    layout: Literal["keep", "official", "transformers"] = "keep",
) -> None:
    """Write a checkpoint that differs from `source` in the replaced parameters alone.

    Args:
        source: as for `load_model`.
        destination: appears complete or not at all; a checkpoint there is replaced.
        replaced: state-dict name → values, whole parameters (no stacked experts).
        layout: "keep" also keeps every tensor's name and the config.json to the letter.

    Raises:
        RequestError, ConfigError, CheckpointError: `source` cannot be read, `destination` not be written, or the
            transformers layout cannot hold this model.
    """
    directory = find_model(source)
    config = read_config(directory)
    with Checkpoint.open(directory) as checkpoint:
        stored_units = checkpoint.match(config)
        if layout == "keep":
            table = _table_as_stored(checkpoint, stored_units)
            text = _text_of(directory / "config.json")
        else:
            # The files decide, not the config: only then does each matrix keep its encoding.
            config = config.replace(weight_format=format_of(stored_units))
            check_encodable(config)
            dtypes = plain_dtypes(stored_units)
            table = tensor_table(config, written_layout(layout, config.weight_format), dtypes)
            text = config_text(config, layout, dtypes["embed.weight"])
        with CheckpointWriter(destination, table, overwrite=True) as writer:
            dtype_of = {spec.name: spec.dtype for spec in table}
            for stored in stored_units:
                location, encoding = _place(stored, config, layout)
                values = replaced.get(stored.unit.parameter.name)
                if values is not None:
                    codes, scales = encode(values.detach().float().cpu(), encoding)
                    if scales is not None and dtype_of[location.scale_name] == "F32":
                        scales = e8m0_to_float(scales)
                elif layout == "keep":
                    codes, scales = checkpoint.read_raw(stored)
                    codes = codes.view(torch.int8) if codes.dtype == torch.uint8 else codes
                else:
                    codes, scales = transcode(checkpoint, stored, encoding)
                writer.write_unit(location, codes, scales)
            writer.write_text("config.json", text)
            tokenizer.save(writer.path_of("tokenizer.json"))
            for name in COMPANIONS:
                if (directory / name).is_file():
                    writer.write_text(name, _text_of(directory / name))


def as_stored(values: Tensor, stored: StoredUnit) -> Tensor:
    """What reading gives, float32, once these float32 values are written in the place of `stored`."""
    codes, scales = encode(values, stored.encoding)
    if scales is None:
        return codes.to(TORCH_DTYPE[stored.dtype]).float()
    return fp8_weight_decode(codes, scales) if stored.encoding == "fp8" else fp4_weight_decode(codes, scales)


def _table_as_stored(checkpoint: Checkpoint, stored_units: list[StoredUnit]) -> list[TensorSpec]:
    table: dict[str, TensorSpec] = {}
    for stored in stored_units:
        spec = checkpoint.tensors[stored.location.name]
        table[spec.name] = TensorSpec(spec.name, spec.shape, _WRITTEN_AS.get(spec.dtype, spec.dtype))
        if stored.encoding != "plain":
            scales = checkpoint.tensors[stored.location.scale_name]
            dtype = "F8_E8M0" if scales.dtype == "U8" else scales.dtype
            table[scales.name] = TensorSpec(scales.name, scales.shape, dtype)
    return list(table.values())


def _place(stored: StoredUnit, config: ModelConfig, layout: Literal["keep", "official", "transformers"]):
    """(location, encoding) of a matrix in the checkpoint that is written."""
    if layout == "keep":
        return stored.location, stored.encoding
    unit = stored.unit
    spelling = written_layout(layout, config.weight_format)
    location: Location = locate(unit.parameter.name, unit.expert, config.attention == "mla", spelling)
    return location, encoding_of(unit.parameter, config.weight_format)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
