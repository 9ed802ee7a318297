"""Reading a checkpoint: headers first, then one matrix at a time, so peak memory is the model plus one matrix.

    with Checkpoint.open("models/flash") as checkpoint:
        for stored in checkpoint.match(config):           every problem of the checkpoint is raised here, by name
            weight = checkpoint.read(stored)              float values, FP8 and FP4 decoded exactly

A checkpoint is a directory with `model.safetensors`, or shards with `model.safetensors.index.json`, or any
`*.safetensors` files. The file format: 8 bytes header length, little endian; a JSON header {name: dtype, shape,
data_offsets}; the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longreach.checkpoint.names import Layout, Location, canonical, find, locate
from longreach.checkpoint.table import ITEM_SIZE, Encoding, TensorSpec, Unit, stored_shapes, units
from longreach.errors import CheckpointError
from longreach.model.config import ModelConfig
from longreach.ops.quant import fp4_weight_decode, fp8_weight_decode

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SHOWN = 5


@dataclass(frozen=True)
class StoredUnit:
    """One matrix of the model, and where and how this checkpoint keeps it."""

    unit: Unit
    location: Location
    encoding: Encoding
    dtype: str
    """safetensors' name of the dtype of the codes (of the values, when plain)."""


class Checkpoint(AbstractContextManager):
    """The tensors of one checkpoint directory. Files stay open (memory-mapped) until the `with` block ends.

    Attributes:
        tensors: name -> (name, shape, storage dtype), from the headers.
    """

    def __init__(self, directory: Path, tensors: dict[str, TensorSpec], file_of: dict[str, Path]) -> None:
        self.directory = directory
        self.tensors = tensors
        self._file_of = file_of
        self._open: dict[Path, Any] = {}

    @staticmethod
    def open(directory: str | Path) -> Checkpoint:
        """Read and check all headers; no weight is touched.

        Raises:
            CheckpointError: no weights here, a file is missing, cut off or damaged, or the index and the files
            disagree.
        """
        directory = Path(directory)
        indexed = read_index(directory)
        files = weight_files(directory, indexed)
        tensors: dict[str, TensorSpec] = {}
        file_of: dict[str, Path] = {}
        for file in files:
            for spec in read_header(file):
                if spec.name in tensors:
                    raise CheckpointError(f"tensor {spec.name} is in both {file_of[spec.name]} and {file}")
                tensors[spec.name] = spec
                file_of[spec.name] = file
        if indexed is not None:
            for name, file_name in indexed.items():
                if name not in tensors or file_of[name].name != file_name:
                    raise CheckpointError(f"{directory / INDEX_NAME} says {name} is in {file_name}, but it is not")
        return Checkpoint(directory, tensors, file_of)

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (without headers): `total_size` of an index."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def layout(self) -> Layout | None:
        """Whose names these are; None for no known layout."""
        return layout_of(self.tensors)

    # ---- what belongs to a model ----------------------------------------------------------------------------------

    def match(self, config: ModelConfig, ignored_prefixes: tuple[str, ...] = ()) -> list[StoredUnit]:
        """Find every matrix of `Transformer(config)`, whatever mixture of the spellings in `names` the files use.

        Args:
            ignored_prefixes: tensors whose names start so are left aside instead of being unexpected.

        Raises:
            CheckpointError: tensors are missing, unexpected or have another shape or dtype; the message names the first
                few of each and counts all.
        """
        is_mla = config.attention == "mla"
        if is_mla:
            ignored_prefixes += (f"model.layers.{config.num_hidden_layers}.",)  # V3.2's MTP block, which is not built
        found: list[StoredUnit] = []
        missing: list[str] = []
        wrong: list[str] = []
        used: set[str] = set()
        names = self._canonical_names()
        for unit in units(config):
            location = find(unit.parameter.name, unit.expert, names)
            if location is None:
                missing.append(locate(unit.parameter.name, unit.expert, is_mla, self.layout or "official").name)
                continue
            used |= {location.name, location.scale_name}
            stored = self._match_unit(unit, location, wrong, missing)
            if stored is not None:
                found.append(stored)
        unexpected = [
            name for name in self.tensors if name not in used and not name.startswith(ignored_prefixes or "\0")
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": wrong}
        # Once each: a stacked tensor that is wrong is wrong for every expert in it.
        problems = [_listed(what, list(dict.fromkeys(names_of))) for what, names_of in kinds.items() if names_of]
        if problems:
            raise CheckpointError(f"{self.directory} does not fit its config.json: {'; '.join(problems)}")
        return found

    def _canonical_names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for name in self.tensors:
            if (first := names.setdefault(canonical(name), name)) != name:
                raise CheckpointError(f"{self.directory} holds one tensor under two names, {first} and {name}")
        return names

    def _match_unit(self, unit: Unit, location: Location, wrong: list[str], missing: list[str]) -> StoredUnit | None:
        spec = self.tensors[location.name]
        scales = self.tensors.get(location.scale_name)
        kind = unit.parameter.kind
        if kind == "int64":
            encoding: Encoding | None = "plain" if spec.dtype in ("I64", "I32") else None
        elif spec.dtype in _FLOATS:
            encoding = "plain"
        elif kind in ("linear", "expert"):
            encoding = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4"}.get(spec.dtype)  # type: ignore[assignment]
        else:
            encoding = None
        if encoding is None:
            wrong.append(f"{spec.name} is {spec.dtype}")
            return None
        code_shape, scale_shape = stored_shapes(unit.shape, encoding)
        expected = _in_stack(code_shape, location, unit)
        if spec.shape != expected:
            wrong.append(f"{spec.name} is {list(spec.shape)}, should be {list(expected)}")
            return None
        if scale_shape is not None:
            if scales is None:
                missing.append(location.scale_name)
                return None
            expected = _in_stack(scale_shape, location, unit)
            if scales.shape != expected or scales.dtype not in ("F8_E8M0", "U8", "F32"):
                wrong.append(
                    f"{scales.name} is {scales.dtype} {list(scales.shape)}, should be F8_E8M0 {list(expected)}"
                )
                return None
        elif scales is not None:
            wrong.append(f"{scales.name} scales a {spec.dtype} tensor")
        return StoredUnit(unit, location, encoding, spec.dtype)

    # ---- data -----------------------------------------------------------------------------------------------------

    def read(self, stored: StoredUnit) -> Tensor:
        """The values of one matrix: float32 when it was quantised (exact), else in the stored dtype."""
        codes, scales = self.read_raw(stored)
        if scales is None:
            return codes
        return fp8_weight_decode(codes, scales) if stored.encoding == "fp8" else fp4_weight_decode(codes, scales)

    def read_raw(self, stored: StoredUnit) -> tuple[Tensor, Tensor | None]:
        """(codes as stored, scales as uint8 E8M0 or float32) of one matrix; no scales when it is plain."""
        codes = self._read_slice(stored.location.name, stored.location)
        if stored.encoding == "plain":
            return codes, None
        scales = self._read_slice(stored.location.scale_name, stored.location)
        return codes, scales if scales.dtype == torch.float32 else scales.view(torch.uint8)

    def _read_slice(self, name: str, location: Location) -> Tensor:
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt").__enter__()
            if location.expert is None:
                return self._open[file].get_tensor(name)
            view = self._open[file].get_slice(name)
            if location.half is None:
                return view[location.expert]
            half = self.tensors[name].shape[1] // 2
            return view[location.expert, location.half * half : (location.half + 1) * half]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from None


def _in_stack(shape: tuple[int, ...], location: Location, unit: Unit) -> tuple[int, ...]:
    if location.expert is None:
        return shape
    rows = shape[0] * (1 if location.half is None else 2)
    return (unit.parameter.shape[0], rows, *shape[1:])


def _listed(what: str, names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def layout_of(names: dict[str, TensorSpec] | dict[str, str]) -> Layout | None:
    """Whose names these are, told from the embedding's and the head's."""
    if "embed.weight" in names:
        return "official"
    if "model.embed_tokens.weight" not in names:
        return None
    if "head.weight" in names:
        return "saved"
    if any(".mlp.experts.0.w1." in name for name in names):
        return "transformers-per-expert"
    # V3.2 is published with transformers' names but one tensor per expert.
    return "official" if any(".mlp.experts.0.gate_proj." in name for name in names) else "transformers"


def read_index(directory: Path) -> dict[str, str] | None:
    """The shard index's {tensor: file}, or None where there is no index.

    Raises:
        CheckpointError: it is not valid.
    """
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(Path(file).name) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is no valid shard index (JSON with a weight_map)") from None


def weight_files(directory: Path, indexed: dict[str, str] | None) -> list[Path]:
    """The files with weights.

    Raises:
        CheckpointError: there are none, or the index names one that is absent.
    """
    if indexed is not None:
        files = [directory / name for name in dict.fromkeys(indexed.values())]
        if absent := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{directory} lacks {_listed('of its files', absent)}")
        return files
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no weights; expected {SINGLE_NAME} or shards with {INDEX_NAME}")
    return files


def read_header(file: Path) -> Iterator[TensorSpec]:
    """The tensors a safetensors file announces, after checking that it holds their data.

    Raises:
        CheckpointError: the file cannot be opened, is cut off, or its header contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file} is cut off or no safetensors file: its header does not fit in {size} bytes"
                )
            header = json.loads(handle.read(length).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is no safetensors file: its header is not JSON") from None
    end = 0
    specs = []
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            spec = TensorSpec(name, tuple(entry["shape"]), entry["dtype"])
            start, stop = entry["data_offsets"]
            if spec.dtype not in ITEM_SIZE:
                raise CheckpointError(f"{file}: {name} has dtype {spec.dtype}, which this program does not read")
            if stop - start != spec.nbytes:
                raise CheckpointError(f"{file}: {name} is {list(spec.shape)} {spec.dtype} but has {stop - start} bytes")
            end = max(end, stop)
            specs.append(spec)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{file} is no safetensors file: its header lacks dtype, shape or offsets") from None
    if 8 + length + end != size:
        what = "cut off" if size < 8 + length + end else "too long"
        raise CheckpointError(f"{file} is {what}: it has {size} bytes, its header announces {8 + length + end}")
    yield from specs


def dtype_census(tensors: dict[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """{storage dtype: (tensors, bytes)}, most bytes first."""
    census: dict[str, tuple[int, int]] = {}
    for spec in tensors.values():
        count, nbytes = census.get(spec.dtype, (0, 0))
        census[spec.dtype] = (count + 1, nbytes + spec.nbytes)
    return dict(sorted(census.items(), key=lambda item: -item[1][1]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
