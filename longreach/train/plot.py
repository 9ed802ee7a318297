"""Curves of training runs: `longreach plot RUN` and, at the end of every training command, RUN/loss.png.

    longreach plot runs/base                              runs/base/plot.html and runs/base/plot.png
    longreach plot runs/muon runs/adamw --x minutes       both in one picture, by training time
    longreach plot runs/base --out loss.png               just that file

The page needs nothing; the PNG needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longreach.errors import RequestError
from longreach.runtime import json_line, log, setup_logging, write_atomic
from longreach.train.curves import (
    DASHES,
    PALETTE,
    VALIDATION,
    Panel,
    RunCurves,
    figure,
    panels_of,
    read_runs,
    smoothed,
    thinned,
    x_range,
    y_range,
)
from longreach.train.page import page

HOW_TO_GET_PNG = "matplotlib is not installed (pip install 'longreach[plot]')"

PNG_WIDTH, PNG_FIRST_ROW, PNG_ROW, DPI = 1600, 560, 340, 100
"""Pixels: the width, the height of the first panel, and that of each row of two further ones."""


@dataclass(frozen=True)
class PlotOptions:
    """Draw the curves of one or several runs: losses, learning rate, gradient norm, speed, and what else they recorded.

    Writes a web page that shows values under the pointer, and the same as a PNG.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")]
    """Run directories; several are drawn over each other."""
    out: Path | None = None
    """One file to write, .png or .html. Default: plot.html and plot.png, in RUN if there is one, here if several."""
    x: Literal["step", "tokens", "minutes"] = "step"
    """What runs to the right: steps, tokens seen, or minutes of training."""
    smooth: float = 0.95
    """Weight of the past in the strong lines, from 0 (as recorded) to below 1."""
    json: bool = False
    """End with one JSON object on stdout: files written, and each run's last and best loss."""


def main(options: PlotOptions) -> None:
    """Run the command."""
    setup_logging()
    if options.out is not None and options.out.suffix not in (".png", ".html"):
        raise RequestError(f"--out {options.out}: the name must end in .png (picture) or .html (page)")
    runs = read_runs(options.runs, options.x, options.smooth)
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    written: list[Path] = []
    for path in [options.out] if options.out else [folder / "plot.html", folder / "plot.png"]:
        if path.suffix == ".html":
            content = page(runs, options.x, options.smooth)
        else:
            content = draw_png(runs, options.x)
            if content is None and options.out:
                raise RequestError(f"--out {path}: {HOW_TO_GET_PNG}; or give a name ending in .html")
            if content is None:
                log.info("no %s: %s", path.name, HOW_TO_GET_PNG)
                continue
        try:
            write_atomic(path, content)
        except OSError as error:
            raise RequestError(
                f"{path} cannot be written: {error.strerror or error}; name another with --out"
            ) from None
        written.append(path)

    if options.json:
        print(json_line({"runs": [_summary(run) for run in runs], "files": [str(path) for path in written]}))
        return
    for run in runs:
        log.info("%s: %s", run.label, _in_words(run))
    for path in written:
        print(f"{'page' if path.suffix == '.html' else 'picture'}: {path}")
    print(f"next: python -m webbrowser {shlex.quote(written[0].resolve().as_uri())}")


def _in_words(run: RunCurves) -> str:
    words = [f"step {run.steps}"]
    if run.last_loss is not None:
        words.append(f"loss {run.last_loss:.3f}")
    if run.best_validation:
        words.append(f"best validation {run.best_validation[1]:.3f} at step {run.best_validation[0]}")
    return ", ".join(words)


def _summary(run: RunCurves) -> dict[str, Any]:
    step, loss = run.best_validation or (None, None)
    return {"run": str(run.path), "label": run.label, "step": run.steps, "loss": run.last_loss, "best_val_loss": loss,
            "best_val_step": step}  # fmt: skip


def draw_png(runs: Sequence[RunCurves], axis: str) -> bytes | None:
    """The panels of `page` as a PNG, `png_size` pixels large; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        return None
    panels = panels_of(runs)
    width, height = png_size(len(panels))
    canvas = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    rows = [PNG_FIRST_ROW] + [PNG_ROW] * (len(panels) // 2)
    grid = canvas.add_gridspec(len(rows), 2, height_ratios=rows)
    for index, panel in enumerate(panels):
        axes = canvas.add_subplot(grid[0, :] if index == 0 else grid[(index + 1) // 2, (index + 1) % 2])
        for number, run in enumerate(runs):
            _draw_run(axes, number, run, panel, alone=len(runs) == 1, first=index == 0)
        axes.set(xlim=x_range(runs), ylim=y_range(runs, panel))
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_ylabel(panel.unit, color="#6a6f78")
        axes.grid(color="#e4e6ea")
        axes.spines[["top", "right"]].set_visible(False)
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_formatter(FuncFormatter(lambda value, _: figure(value)))
        if index == 0 or index >= len(panels) - 2:
            axes.set_xlabel(axis)
        if index == 0:
            axes.legend(loc="upper right")
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def png_size(panels: int) -> tuple[int, int]:
    """Width and height in pixels of a picture of so many panels: one wide, then two to a row."""
    return PNG_WIDTH, PNG_FIRST_ROW + PNG_ROW * (panels // 2)


def _draw_run(axes: Any, number: int, run: RunCurves, panel: Panel, alone: bool, first: bool) -> None:
    colour = PALETTE[number % len(PALETTE)][0]
    pattern = DASHES[number // len(PALETTE) % len(DASHES)]
    label = run.label
    if curve := run.curves.get(panel.key):
        if curve.raw is not curve.line:
            axes.plot(*thinned(curve.xs, curve.raw), color=colour, alpha=0.25, linewidth=0.8)
        marker = "o" if len(curve.xs) == 1 else None
        axes.plot(*thinned(curve.xs, curve.line), color=colour, linewidth=1.8, marker=marker, label=label,
                  linestyle=(0, pattern) if pattern else "-")  # fmt: skip
        label = "_"  # matplotlib's sign for: not in the legend
    if first and (validation := run.curves.get(VALIDATION)):
        label = "validation" if alone else label
        axes.plot(*thinned(validation.xs, validation.line), color=colour, linewidth=0.8, marker="o", markersize=7,
                  markeredgecolor="white", label=label)  # fmt: skip
    for event in run.events:
        mark = "#6a6f78" if alone else colour
        axes.axvline(event.x, color=mark, linewidth=0.9, linestyle=(0, (3, 3)))
        if first:
            axes.annotate(str(event), (event.x, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), va="top",
                          textcoords="offset points", rotation=90, fontsize=8, color=mark, clip_on=True)  # fmt: skip


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw training loss (each step, and smoothed) and validation loss from metrics.jsonl records.

    Returns:
        Whether the picture was written; without matplotlib one line says how to get it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no %s: %s", path.name, HOW_TO_GET_PNG)
        return False
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    canvas = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
    return True
