"""The complete list of a checkpoint's tensors, from the config alone: name, shape, storage dtype.

    tensor_table(ModelConfig.preset("flash"), "official")      69,187 tensors, 159,609,485,896 bytes

Saving plans its shards with it, `inspect --against` checks headers with it, and the two totals above, which are those
of the published index, certify it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from longreach.checkpoint.names import Layout, Location, locate
from longreach.model.config import ModelConfig
from longreach.model.shapes import ParameterShape, parameter_shapes
from longreach.ops.quant import FP4_WEIGHT_BLOCK, WEIGHT_TILE

ITEM_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of safetensors' dtype names."""

Encoding = Literal["plain", "fp8", "fp4"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint file; `dtype` is safetensors' name for it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Unit:
    """One matrix or vector of the model, the grain in which everything is read, converted and written.

    A unit is a whole parameter, or one expert of a stacked one; `shape` is without the expert dimension.
    """

    parameter: ParameterShape
    expert: int | None
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """For messages: the state-dict name, with the expert where there is one."""
        return self.parameter.name if self.expert is None else f"{self.parameter.name}[{self.expert}]"


def units(config: ModelConfig) -> Iterator[Unit]:
    """All units of a model in state-dict order."""
    for parameter in parameter_shapes(config):
        if parameter.kind == "expert":
            for expert in range(parameter.shape[0]):
                yield Unit(parameter, expert, parameter.shape[1:])
        else:
            yield Unit(parameter, None, parameter.shape)


def encoding_of(parameter: ParameterShape, weight_format: str) -> Encoding:
    """How `weight_format` stores a parameter."""
    if weight_format == "plain" or parameter.kind not in ("linear", "expert"):
        return "plain"
    return "fp4" if parameter.kind == "expert" and weight_format == "fp8-fp4" else "fp8"


def stored_shapes(shape: tuple[int, ...], encoding: Encoding) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(shape of the codes, shape of the scales) of one unit; no scales when it is plain."""
    if encoding == "plain":
        return shape, None
    rows, columns = shape
    if encoding == "fp8":
        return shape, (-(-rows // WEIGHT_TILE), -(-columns // WEIGHT_TILE))
    return (rows, columns // 2), (rows, -(-columns // FP4_WEIGHT_BLOCK))


def code_dtype(parameter: ParameterShape, encoding: Encoding, plain_dtype: str) -> str:
    """safetensors' name of the dtype a parameter is stored in; `plain_dtype` where the format leaves it open."""
    if encoding != "plain":
        return {"fp8": "F8_E4M3", "fp4": "I8"}[encoding]
    return {"float32": "F32", "int64": "I64"}.get(parameter.kind, plain_dtype)


def tensor_table(
    config: ModelConfig, layout: Layout = "official", plain_dtype: str | Mapping[str, str] = "BF16"
) -> list[TensorSpec]:
    """Every tensor of a checkpoint of this model, in the format `config.weight_format`.

    Args:
        layout: whose names; see `names`.
        plain_dtype: safetensors' name of the dtype of unquantised tensors other than those that are float32 or int64
            whatever happens; or that dtype for each parameter by state-dict name.
    """
    table: dict[str, TensorSpec] = {}
    for unit in units(config):
        parameter = unit.parameter
        location = locate(parameter.name, unit.expert, config.attention == "mla", layout)
        if location.name in table:
            continue  # a later slice of a stacked tensor
        encoding = encoding_of(parameter, config.weight_format)
        plain = plain_dtype if isinstance(plain_dtype, str) else plain_dtype[parameter.name]
        codes, scales = stored_shapes(unit.shape, encoding)
        table[location.name] = TensorSpec(
            location.name, _stacked(codes, location, parameter), code_dtype(parameter, encoding, plain)
        )
        if scales is not None:
            table[location.scale_name] = TensorSpec(
                location.scale_name, _stacked(scales, location, parameter), "F8_E8M0"
            )
    return list(table.values())


def _stacked(shape: tuple[int, ...], location: Location, parameter: ParameterShape) -> tuple[int, ...]:
    if location.expert is None:
        return shape
    rows = shape[0] * (1 if location.half is None else 2)
    return (parameter.shape[0], rows, *shape[1:])
