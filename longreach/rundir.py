"""The run directory: the one artifact that every training command reads and writes.

    RUN/config.json      the command's options as they were resolved
    RUN/metrics.jsonl    one JSON object per line, appended as training goes
    RUN/model/           weights (safetensors), config.json, tokenizer.json
    RUN/state/           what is needed to go on: optimizer, data position, random state

A command that takes a model takes a run directory, its `model/`, or any checkpoint directory (`find_model`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longreach.errors import RequestError
from longreach.runtime import json_line, write_atomic


class RunDirectory:
    """Paths and small files of one run. Holds nothing open; every write is complete or did not happen."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.model_dir = self.path / "model"
        self.state_dir = self.path / "state"
        self.tokenizer_path = self.path / "state" / "tokenizer.json"

    def check_new(self) -> None:
        """Refuse a path that already holds something, so that no run is overwritten by a retyped command.

        Raises:
            RequestError: the path is a file, a run, or any other folder that is not empty.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RequestError(f"--out {self.path} is a file; give a directory that does not exist yet")
        if self.config_path.exists():
            raise RequestError(
                f"--out {self.path} already holds a run; add --resume to go on with it, or give another directory"
            )
        if any(self.path.iterdir()):
            raise RequestError(
                f"--out {self.path} is not empty and not a run; give a directory that does not exist yet"
            )

    def create(self, config: dict[str, Any]) -> None:
        """Make the directory and write `config.json`. Raises like `check_new`."""
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_config(config)
        except OSError as error:
            raise RequestError(f"--out {self.path} cannot be written: {error.strerror or error}") from error

    def write_config(self, config: dict[str, Any]) -> None:
        write_atomic(self.config_path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The options this run was started with.

        Raises:
            RequestError: there is no run here, or its config.json is damaged.
        """
        if not self.config_path.is_file():
            raise RequestError(f"{self.path} holds no run to resume (no config.json); leave out --resume to start one")
        try:
            config = json.loads(self.config_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"{self.config_path} is not valid JSON ({error}); the run cannot be resumed") from None
        if not isinstance(config, dict):
            raise RequestError(f"{self.config_path} does not hold a JSON object; the run cannot be resumed")
        return config

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json_line(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records; a last line cut off by a crash is left out."""
        if not self.metrics_path.is_file():
            return []
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def drop_metrics_after(self, step: int) -> None:
        """Forget records of steps that the saved state has not seen: they will be made again after a resume."""
        kept = [record for record in self.read_metrics() if record.get("step", 0) <= step]
        write_atomic(self.metrics_path, "".join(json_line(record) + "\n" for record in kept))


def find_model(path: str | Path) -> Path:
    """The checkpoint directory meant by a run directory, its `model/`, or a checkpoint directory.

    Raises:
        RequestError: nothing like that is there; the line says what was found.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path} does not exist; give a run directory or a checkpoint directory")
    if not path.is_dir():
        raise RequestError(f"{path} is a file; give the directory that holds config.json and the weights")
    for directory in (path / "model", path):
        if (directory / "config.json").is_file() and _has_weights(directory):
            return directory
    if (path / "config.json").is_file() and (path / "metrics.jsonl").exists():
        raise RequestError(f"{path} is a run that has not saved a model yet; wait for its first checkpoint")
    raise RequestError(f"{path} holds no model; a checkpoint directory has config.json and .safetensors files")


def recorded(path: str | Path, name: str) -> Any:
    """What the run that made a model recorded under this name in its config.json; None for other checkpoints.

    Args:
        path: as for `find_model`.
    """
    for directory in (Path(path), Path(path).parent):
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "command" in config:
            return config.get(name)
    return None


def _has_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json"))
