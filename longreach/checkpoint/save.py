"""From a model in memory to a checkpoint directory.

    save_model(model, "runs/base/model", tokenizer=tokenizer)
    save_model(model, "out", layout="transformers")           transformers' AutoModelForCausalLM loads it
    save_model(model, "out", weight_format="fp8-fp4")         the released storage: FP8 linears, FP4 experts

The directory appears complete or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from longreach.checkpoint.names import locate, written_layout
from longreach.checkpoint.table import Encoding, encoding_of, tensor_table, units
from longreach.checkpoint.writer import MAX_SHARD_BYTES, SAFETENSORS_DTYPE, CheckpointWriter
from longreach.errors import CheckpointError
from longreach.model.config import ModelConfig
from longreach.model.config_write import official_config_dict, transformers_config_dict
from longreach.ops.quant import fp4_weight_encode, fp8_weight_encode

if TYPE_CHECKING:
    from longreach.model.transformer import Transformer

TORCH_NAME = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class Saveable(Protocol):
    """What `save_model` asks of a tokenizer."""

    def save(self, path: str | Path) -> Any: ...


def save_model(
    model: Transformer,
    directory: str | Path,
    layout: Literal["official", "transformers"] = "official",
    weight_format: Literal["plain", "fp8", "fp8-fp4"] | None = None,
    tokenizer: Saveable | str | Path | None = None,
    overwrite: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write weights, config.json and tokenizer.json.

    Args:
        model: on any device; it is copied to the CPU matrix by matrix.
        directory: is replaced when it holds a checkpoint and `overwrite` is true; any other files in it stay.
        weight_format: "plain" stores each parameter in its own dtype; "fp8" and "fp8-fp4" round linear weights to the
            released formats and store the rest in BF16 (float32 where the model always has float32). None: what
            `model.config.weight_format` says.
        tokenizer: something with `save(path)`, or the path of a tokenizer.json to copy.
        max_shard_bytes: tensor bytes per file.

    Returns:
        The directory.

    Raises:
        ConfigError: transformers cannot build this model and `layout` is "transformers".
        CheckpointError: the directory is refused or cannot be written, or a shape does not fit FP4.
    """
    config = model.config if weight_format is None else model.config.replace(weight_format=weight_format)
    check_encodable(config)
    state = model.state_dict()
    plain_dtype: str | dict[str, str] = "BF16"
    if config.weight_format == "plain":
        plain_dtype = {name: SAFETENSORS_DTYPE[tensor.dtype] for name, tensor in state.items()}
    named_dtype = plain_dtype if isinstance(plain_dtype, str) else plain_dtype["embed.weight"]
    config_json = config_text(config, layout, named_dtype)
    is_mla = config.attention == "mla"
    spelling = written_layout(layout, config.weight_format)
    table = tensor_table(config, spelling, plain_dtype)
    with CheckpointWriter(directory, table, overwrite, max_shard_bytes) as writer, torch.no_grad():
        for unit in units(config):
            values = state[unit.parameter.name]
            if unit.expert is not None:
                values = values[unit.expert]
            codes, scales = encode(values, encoding_of(unit.parameter, config.weight_format))
            writer.write_unit(locate(unit.parameter.name, unit.expert, is_mla, spelling), codes, scales)
        writer.write_text("config.json", config_json)
        if isinstance(tokenizer, (str, Path)):
            copy_tokenizer(Path(tokenizer), writer)
        elif tokenizer is not None:
            tokenizer.save(writer.path_of("tokenizer.json"))
    return Path(directory)


def config_text(config: ModelConfig, layout: str, plain_dtype: str) -> str:
    """config.json of a layout; `plain_dtype` is safetensors' name of the unquantised weights' dtype."""
    write = transformers_config_dict if layout == "transformers" else official_config_dict
    return json.dumps(write(config, TORCH_NAME[plain_dtype]), indent=2) + "\n"


def encode(values: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
    """(codes, E8M0 bytes) of one matrix; plain values stay as they are."""
    if encoding == "fp8":
        return fp8_weight_encode(values)
    if encoding == "fp4":
        return fp4_weight_encode(values)
    return values, None


def check_encodable(config: ModelConfig) -> None:
    """Raise CheckpointError if FP4's two values per byte do not fit the experts' widths."""
    if config.weight_format == "fp8-fp4" and config.feed_forward == "moe":
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, name) % 2:
                raise CheckpointError(f"{name}={getattr(config, name)} is odd; FP4 stores two inputs per byte, use fp8")


def copy_tokenizer(source: Path, writer: CheckpointWriter) -> None:
    """Copy a tokenizer.json into the checkpoint being written.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        writer.path_of("tokenizer.json").write_bytes(source.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{source} cannot be copied: {error.strerror}") from None
