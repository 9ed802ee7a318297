"""RUN/state/step-00000100.pt: everything a run needs to go on as if it had never stopped, in one file, written whole.

    weights · optimizer · random state · data position · loss history · routing computed ahead · step and seconds

The file holds the weights too, although RUN/model/ has them: the two are written one after the other, and a crash between
them must not mix the weights of one step with the optimizer of another. Two regular checkpoints are kept, because a loss
spike goes back past the last one, and the newest of all if it is not among them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from longreach.errors import CheckpointError, RequestError

KEPT = 2


def state_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a folder, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*.pt") if (match := re.match(r"step-(\d+)", path.name))
    ]
    return sorted(found)


def save_state(folder: Path, step: int, state: dict[str, Any], every: int) -> Path:
    """Write the state of a step; a crash or a full disk leaves the others as they were.

    Args:
        every: steps between regular checkpoints; the last two of those stay.

    Raises:
        RequestError: it could not be written.
    """
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its archive writer
        temporary.unlink(missing_ok=True)
        kept = state_files(folder)
        last = f"the checkpoint of step {kept[-1][0]} stays" if kept else "there is no earlier checkpoint"
        raise RequestError(
            f"{path} could not be written ({_reason(error)}); {last}; free some space and go on with --resume"
        ) from error
    regular = [at for at, _ in state_files(folder) if at % every == 0][-KEPT:]
    for at, old in state_files(folder):
        if at != step and at not in regular:
            old.unlink(missing_ok=True)
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The saved state.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever library meets the damage first
        raise CheckpointError(f"{path} cannot be read ({_reason(error)}); the run cannot be resumed from it") from error


def newest_state(folder: Path) -> dict[str, Any]:
    """The state to go on from.

    Raises:
        RequestError: there is none.
        CheckpointError: the newest is damaged; the line says what to do.
    """
    files = state_files(folder)
    if not files:
        raise RequestError(f"{folder} holds no checkpoint: the run stopped before its first; delete it and start again")
    try:
        return read_state(files[-1][1])
    except CheckpointError as error:
        older = f"; delete that file to go on from step {files[-2][0]}" if len(files) > 1 else ""
        raise CheckpointError(f"{error}{older}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
