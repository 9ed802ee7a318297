"""Metric records shown live elsewhere too: `longreach pretrain … --mirror tensorboard` (or wandb).

RUN/metrics.jsonl stays the record of a run; a mirror is a copy for those who watch many runs at once. What fails in it
is said once and never stops training.

    RUN/mirror/tensorboard/      tensorboard --logdir RUN/mirror/tensorboard
    RUN/mirror/wandb/            wandb sync RUN/mirror/wandb/offline-run-*

Both need the extra `monitor`. Nothing leaves the machine by itself: W&B runs offline unless WANDB_MODE says otherwise.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from typing import Any, Literal

from longreach.errors import RequestError
from longreach.rundir import RunDirectory
from longreach.runtime import log, write_atomic

Kind = Literal["none", "tensorboard", "wandb"]


class Mirror:
    """Takes the records that go to metrics.jsonl. This one keeps nothing; `TensorBoardMirror` and `WandbMirror` do.

    Afterwards `close` must be called once. Neither method raises: the first failure is logged and ends the mirror.
    """

    kind: Kind = "none"

    def __init__(self) -> None:
        self.broken = False

    def log(self, record: dict[str, Any]) -> None:
        """Copy one record; `step` says where it belongs, numbers become curves, an event becomes text."""
        self._try(lambda: self._log(record))

    def close(self) -> None:
        """Write out what is still in memory."""
        self._try(self._close)

    def _try(self, action: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # a full disk or a lost connection over there must not end the training here
            self.broken = True
            log.warning("%s mirror stopped (%s); metrics.jsonl goes on", self.kind, error)

    def _log(self, record: dict[str, Any]) -> None: ...

    def _close(self) -> None: ...


def open_mirror(kind: Kind, run: RunDirectory, config: dict[str, Any]) -> Mirror:
    """Start copying the records of `run`, beginning after those that its metrics.jsonl holds now.

    A resumed run calls this after `run.drop_metrics_after`: what was dropped disappears from the mirror too.

    Args:
        config: the resolved options, shown beside the curves.

    Raises:
        RequestError: the kind is unknown, its package is not installed, or it cannot start.
    """
    if kind == "none":
        return Mirror()
    kinds = {"tensorboard": TensorBoardMirror, "wandb": WandbMirror}
    if kind not in kinds:
        raise RequestError(f"--mirror {kind}: choose none, {' or '.join(kinds)}")
    try:
        return kinds[kind](run, config)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in (kind, "torch"):
            raise
        raise RequestError(f"--mirror {kind} needs its package: pip install {kind}") from None
    except OSError as error:
        raise RequestError(f"--mirror {kind} cannot write to {run.path}: {error.strerror or error}") from None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in record.items()
        if key not in ("step", "event") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _event_text(record: dict[str, Any]) -> str:
    return f"{record['event']}: {record['text']}" if record.get("text") else str(record["event"])


class TensorBoardMirror(Mirror):
    """Event files in RUN/mirror/tensorboard, one curve per key of the records.

    `purge_step` tells TensorBoard to hide what older files hold from a step on. It is set when a run is resumed, and
    when training itself goes back after a loss spike, so that every step is shown once.
    """

    kind = "tensorboard"

    def __init__(self, run: RunDirectory, config: dict[str, Any]):
        super().__init__()
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer_type, self.directory = SummaryWriter, str(run.path / "mirror" / "tensorboard")
        self.step = max((record.get("step", 0) for record in run.read_metrics()), default=0)
        self.writer = self._open(first_step=self.step + 1 if self.step else 0)
        if not self.step:
            self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", 0)

    def _open(self, first_step: int) -> Any:
        return self.writer_type(self.directory, purge_step=first_step, flush_secs=10)

    def _log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if record.get("event"):
            self.writer.add_text("event", _event_text(record), step)
            return
        if step < self.step:
            self.writer.close()
            self.writer = self._open(first_step=step)
        self.step = step
        for key, value in _numbers(record).items():
            self.writer.add_scalar(key, value, step)

    def _close(self) -> None:
        self.writer.close()


class WandbMirror(Mirror):
    """One W&B run under RUN/mirror/wandb; its id is kept beside it, so a resumed run goes on in the same one.

    Curves are drawn over the record's own `step`. W&B cannot take back what it was told: steps between the last
    checkpoint and a crash, or undone after a loss spike, are in it twice.
    """

    kind = "wandb"

    def __init__(self, run: RunDirectory, config: dict[str, Any]):
        super().__init__()
        import wandb  # pyright: ignore[reportMissingImports]

        directory = run.path / "mirror"
        id_path = directory / "wandb_id"
        if not id_path.is_file():
            write_atomic(id_path, secrets.token_hex(8))
        mode = os.environ.get("WANDB_MODE", "offline")
        try:
            self.wandb_run = wandb.init(
                project="longreach", id=id_path.read_text(encoding="utf-8").strip(), name=run.path.resolve().name,
                resume="allow", dir=str(directory), config=config, mode=mode,
                settings=wandb.Settings(console="off"),  # its capture of the terminal would garble the progress line
            )  # fmt: skip
        except wandb.Error as error:
            raise RequestError(f"--mirror wandb cannot start with WANDB_MODE={mode}: {error}") from None
        self.wandb_run.define_metric("*", step_metric="step")
        if mode == "offline":
            log.info("W&B is offline (set WANDB_MODE=online to upload): %s/wandb", directory)

    def _log(self, record: dict[str, Any]) -> None:
        shown: dict[str, Any] = {"step": record["step"], **_numbers(record)}
        if record.get("event"):
            shown["event"] = _event_text(record)
        self.wandb_run.log(shown)

    def _close(self) -> None:
        self.wandb_run.finish()
