"""RUN/state/training.pt: everything a run needs to go on as if it had never stopped, in one file, replaced as a whole.

It holds the weights too, although RUN/model/ has them: the two are written one after the other, and a crash between them
must not mix the weights of one step with the optimizer of another.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from longreach.errors import RequestError


@dataclass
class Progress:
    """How far a run has come. Saved with the weights; a resumed run counts on from here."""

    step: int = 0
    seconds: float = 0.0
    """Time spent in training steps and checkpoints, over all sittings."""
    data_digest: str = ""
    """Tells whether the data is still what the run began with."""


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state file; a crash leaves the previous one."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "random": torch.get_rng_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the saved weights, optimizer and random state in place and return the saved progress.

    Raises:
        RequestError: there is no state, or it is damaged, or of another model.
    """
    if not path.is_file():
        raise RequestError(f"{path} is missing: the run stopped before its first checkpoint; delete it and start again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return Progress(**state["progress"])
    except Exception as error:  # a damaged file fails in whichever library meets the damage first
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{path} cannot be read ({reason}); the run cannot be resumed from it") from error
