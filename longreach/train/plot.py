"""RUN/loss.png: the loss curves of a run. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreach.runtime import log


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw training loss (each step, and smoothed) and validation loss from metrics.jsonl records.

    Returns:
        Whether the picture was written; without matplotlib one line says how to get it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no loss.png: matplotlib is not installed (pip install 'longreach[plot]')")
        return False
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    # Drawn under another name first: a reader never meets half a picture.
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return True


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start so that the first value is the first value."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return out
