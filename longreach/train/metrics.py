"""How a training run shows itself while it goes: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from longreach.runtime import log

PLAIN_LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """`75 s`, `4 min 05 s`, `2 h 10 min`."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class TrainingProgress:
    """Context manager around the loop. Writes to stderr only.

    `show` may be called every step: on a terminal it redraws one line, elsewhere it logs about every ten seconds.
    """

    def __init__(self) -> None:
        self._live = None
        self._task = None
        self._last_line = 0.0

    def __enter__(self) -> TrainingProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task("", total=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, step: int, total: int, figures: str, seconds_left: float) -> None:
        """Show the state after `step` steps of `total`; `figures` is one line without the time left."""
        line = f"{figures}  {duration(seconds_left)} left"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, total=total, description=line)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S or step == total:
            self._last_line = time.monotonic()
            log.info("step %d/%d  %s", step, total, line)


def figures_line(record: dict[str, Any]) -> str:
    """The record of a step in one line: loss, speed, share of the machine's peak, expert balance, indexer."""
    parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_s']:,.0f} tokens/s"]
    if record.get("mfu"):
        parts.append(f"MFU {record['mfu']:.0%}")
    if record.get("expert_balance"):
        parts.append(f"busiest expert {record['expert_balance']:.2f}x")
    if record.get("index_recall") is not None:
        parts.append(f"indexer recall {record['index_recall']:.0%}")
    return "  ".join(parts)
