"""Writing a checkpoint: shards planned from the tensor table, filled in any order, visible only when all are complete.

    with CheckpointWriter("models/out", tensor_table(config, layout)) as writer:
        writer.write_unit(location, codes, scales)        once for every unit of the model
        writer.write_text("config.json", ...)
                                                          leaving the block without an error makes the directory appear

Everything goes to a temporary directory next to the destination, which is renamed at the end; a failure leaves nothing
behind and an existing checkpoint untouched. Names, shapes and offsets are known beforehand, so each slice is written
straight to its place in its file and memory holds one matrix, even where the layout stacks all experts in one tensor.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from longreach.checkpoint.names import Location
from longreach.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from longreach.checkpoint.table import ITEM_SIZE, TensorSpec
from longreach.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8,
}  # fmt: skip
"""safetensors' dtype names as torch dtypes; E8M0 scales are handled as their bytes."""
SAFETENSORS_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip

_CHECKPOINT_FILES = ("config.json", "tokenizer.json", INDEX_NAME)


class CheckpointWriter(AbstractContextManager):
    """One checkpoint being written. Invariant: `destination` changes in `__exit__` only, and only on success."""

    def __init__(
        self,
        destination: str | Path,
        table: Sequence[TensorSpec],
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Plan the shards and make the temporary directory.

        Args:
            destination: a directory that does not exist, is empty, or, with `overwrite`, holds a checkpoint.
            table: every tensor that will be written.
            max_shard_bytes: tensor bytes per file; a larger tensor gets a file of its own.

        Raises:
            CheckpointError: the destination is refused, the disk is too small or the directory cannot be made.
        """
        # absolute, because the parent is where the temporary directory goes and "." has none
        self.destination = Path(os.path.abspath(destination))
        check_destination(self.destination, overwrite)
        self._shards = _plan_shards(table, max_shard_bytes)
        self._place: dict[str, tuple[str, int, TensorSpec]] = {}
        self._remaining = {spec.name: spec.nbytes for spec in table}
        self._files: dict[str, BinaryIO] = {}
        self.nbytes = sum(spec.nbytes for spec in table)
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.destination.parent).free
            if free < self.nbytes:
                raise CheckpointError(f"{self.destination} needs {self.nbytes:,} bytes but its disk has {free:,} free")
            self._temporary = Path(
                tempfile.mkdtemp(dir=self.destination.parent, prefix=f".{self.destination.name}.", suffix=".partial")
            )
            os.chmod(self._temporary, 0o777 & ~_umask())
        except OSError as error:
            raise CheckpointError(f"{self.destination} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> CheckpointWriter:
        try:
            for name, specs in self._shards.items():
                self._start_shard(name, specs)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise CheckpointError(f"{self.destination} cannot be written: {error.strerror or error}") from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            raise CheckpointError(f"{self.destination} cannot be written: {failure.strerror or failure}") from None
        finally:
            self._abandon()

    def write_unit(self, location: Location, codes: Tensor, scales: Tensor | None) -> None:
        """Put one matrix (codes, and E8M0 bytes when quantised) where `location` says; plain values are cast."""
        self._write(location.name, location, codes)
        if scales is not None:
            self._write(location.scale_name, location, scales)

    def write_text(self, name: str, text: str) -> None:
        """Add a small file."""
        (self._temporary / name).write_text(text, encoding="utf-8")

    def path_of(self, name: str) -> Path:
        """Where to write another file so that it appears with the rest."""
        return self._temporary / name

    def _write(self, name: str, location: Location, values: Tensor) -> None:
        file_name, offset, spec = self._place[name]
        assert spec.dtype in ("F8_E8M0", "F8_E4M3", "I8") or values.dtype.is_floating_point or spec.dtype == "I64"
        data = values.detach().to(device="cpu", dtype=TORCH_DTYPE[spec.dtype]).contiguous().flatten().view(torch.uint8)
        if location.expert is not None:
            offset += location.expert * math.prod(spec.shape[1:]) * ITEM_SIZE[spec.dtype]
            offset += (location.half or 0) * data.numel()
        self._remaining[name] -= data.numel()
        assert self._remaining[name] >= 0, f"{name} was written twice"
        try:
            file = self._files[file_name]
            file.seek(offset)
            file.write(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{self.destination} cannot be written: {error.strerror or error}") from None

    def _start_shard(self, name: str, specs: list[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        file = self._files[name] = (self._temporary / name).open("wb")
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(start + offset)
        offset = start
        for spec in specs:
            self._place[spec.name] = (name, offset, spec)
            offset += spec.nbytes

    def _publish(self) -> None:
        unwritten = [name for name, count in self._remaining.items() if count]
        assert not unwritten, f"never written: {unwritten[:5]}"
        if list(self._shards) != [SINGLE_NAME]:
            weight_map = {spec.name: file for file, specs in self._shards.items() for spec in specs}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            self.write_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if not self.destination.exists():
            os.rename(self._temporary, self.destination)
            return
        old = Path(tempfile.mkdtemp(dir=self.destination.parent, prefix=f".{self.destination.name}.", suffix=".old"))
        os.rename(self.destination, old)
        os.rename(self._temporary, self.destination)
        for left in old.iterdir():
            # what somebody else put beside the weights stays there
            if not _is_checkpoint_file(left.name) and not (self.destination / left.name).exists():
                os.rename(left, self.destination / left.name)
        shutil.rmtree(old, ignore_errors=True)

    def _abandon(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be written to this directory."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; give a directory")
    present = [entry.name for entry in destination.iterdir()]
    if not present:
        return
    if not overwrite:
        raise CheckpointError(f"{destination} is not empty; give another directory, or --force to replace a checkpoint")
    if not any(map(_is_checkpoint_file, present)):
        raise CheckpointError(f"{destination} is not empty and holds no checkpoint; give another directory")


def _is_checkpoint_file(name: str) -> bool:
    return name in _CHECKPOINT_FILES or name.endswith(".safetensors")


def _plan_shards(table: Sequence[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """{file name: its tensors}. Tensors keep their order among files; inside one, wide dtypes come first so that all
    are aligned to their size."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in table:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    for shard in shards:
        shard.sort(key=lambda spec: (-ITEM_SIZE[spec.dtype], spec.name))
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
