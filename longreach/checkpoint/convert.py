"""`longreach convert SRC DST --to official|transformers`: rewrite a checkpoint, one matrix at a time.

The model is never in memory. Matrices that keep their encoding are copied byte for byte, FP8 and FP4 codes with their
scales included, so converting there and back gives the same bits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from longreach.checkpoint.names import locate, written_layout
from longreach.checkpoint.reader import Checkpoint, StoredUnit, dtype_census
from longreach.checkpoint.save import check_encodable, config_text, copy_tokenizer, encode
from longreach.checkpoint.table import encoding_of, tensor_table
from longreach.checkpoint.writer import CheckpointWriter, check_destination
from longreach.errors import ConfigError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.rundir import find_model
from longreach.runtime import json_line, setup_logging

log = logging.getLogger("longreach")


@dataclass(frozen=True)
class ConvertOptions:
    """Rewrite a checkpoint in another layout or storage format, without loading the model."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Run directory or checkpoint directory to read."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Directory to write; it appears when it is complete."""
    to: Literal["official", "transformers"]
    """Names and config.json of the released checkpoints, or those that transformers' modules have."""
    quantize: Literal["keep", "plain", "fp8", "fp8-fp4"] = "keep"
    """Storage of the weights: as they are; decoded to BF16; FP8 throughout; FP8 with FP4 experts as released. With
    numerics "official" a model stored in FP8 also rounds the inputs of its linears, so its outputs change a little."""
    shard_gb: float = 5.0
    """Largest file, in 10^9 bytes."""
    force: bool = False
    """Replace a checkpoint that is already at DST."""
    json: bool = False
    """Print one JSON object instead of the report."""


def main(options: ConvertOptions) -> int:
    """Convert, and print what was written."""
    setup_logging()
    if not options.shard_gb > 0:
        raise ConfigError(f"--shard-gb {options.shard_gb} must be above 0")
    check_destination(options.destination, options.force)
    source = find_model(options.source)
    config = read_config(source)
    with Checkpoint.open(source) as checkpoint:
        stored_units = checkpoint.match(config)
        actual = format_of(stored_units)
        target = config.replace(weight_format=actual if options.quantize == "keep" else options.quantize)
        log.info(f"reading {source}: {checkpoint.layout} layout, {actual}, {len(checkpoint.tensors):,} tensors")
        report = _convert(checkpoint, stored_units, target, options)
    report = {"source": str(source), "destination": str(options.destination), "layout": options.to,
              "weight_format": target.weight_format, **report}  # fmt: skip
    if options.json:
        print(json_line(report))
    else:
        print(f"{options.destination}: {options.to} layout, {target.weight_format}")
        print(f"{report['tensors']:,} tensors, {report['bytes']:,} bytes")
        for dtype, entry in report["storage"].items():
            print(f"  {dtype:<8} {entry['tensors']:>8,} tensors {entry['bytes']:>18,} bytes")
        print(f"next: longreach inspect {options.destination}")
    return 0


def _convert(
    checkpoint: Checkpoint, stored_units: list[StoredUnit], target: ModelConfig, options: ConvertOptions
) -> dict:
    check_encodable(target)
    plain_dtype = "BF16" if target.weight_format != "plain" else plain_dtypes(stored_units)
    named = plain_dtype if isinstance(plain_dtype, str) else plain_dtype["embed.weight"]
    config_json = config_text(target, options.to, named)
    is_mla = target.attention == "mla"
    spelling = written_layout(options.to, target.weight_format)
    table = tensor_table(target, spelling, plain_dtype)
    shard_bytes = max(1, int(options.shard_gb * 1e9))
    with CheckpointWriter(options.destination, table, options.force, shard_bytes) as writer:
        for count, stored in enumerate(stored_units, 1):
            unit = stored.unit
            codes, scales = transcode(checkpoint, stored, encoding_of(unit.parameter, target.weight_format))
            writer.write_unit(locate(unit.parameter.name, unit.expert, is_mla, spelling), codes, scales)
            if count % 5000 == 0:
                log.info(f"{count:,} of {len(stored_units):,} matrices")
        writer.write_text("config.json", config_json)
        tokenizer = checkpoint.directory / "tokenizer.json"
        if tokenizer.is_file():
            copy_tokenizer(tokenizer, writer)
    census = dtype_census({spec.name: spec for spec in table})
    storage = {dtype: {"tensors": count, "bytes": nbytes} for dtype, (count, nbytes) in census.items()}
    return {"tensors": len(table), "bytes": writer.nbytes, "storage": storage}


def transcode(checkpoint: Checkpoint, stored: StoredUnit, encoding: str) -> tuple[Tensor, Tensor | None]:
    """(codes, scales) of one matrix in another encoding; as they are stored if it is the same."""
    if encoding == stored.encoding:
        codes, scales = checkpoint.read_raw(stored)
        # V3.2 keeps its scales in float32, which need not be powers of two: those are decoded and encoded anew.
        if scales is None or scales.dtype == torch.uint8:
            return codes.view(torch.int8) if codes.dtype == torch.uint8 else codes, scales
    return encode(checkpoint.read(stored), encoding)  # type: ignore[arg-type]


def format_of(stored_units: list[StoredUnit]) -> Literal["plain", "fp8", "fp8-fp4"]:
    """The weight format these tensors are in: that of the experts decides between the two quantised ones."""
    encodings = {stored.encoding for stored in stored_units}
    return "fp8-fp4" if "fp4" in encodings else "fp8" if "fp8" in encodings else "plain"


def plain_dtypes(stored_units: list[StoredUnit]) -> dict[str, str]:
    """The dtype each parameter keeps; BF16 holds every decoded FP8 or FP4 value exactly."""
    return {s.unit.parameter.name: s.dtype if s.encoding == "plain" else "BF16" for s in stored_units}
