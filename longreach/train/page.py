"""The curves of one or several runs as one HTML file: `longreach plot RUN` writes it to RUN/plot.html.

The drawing is inline SVG, so it is there without JavaScript; a short script in `page.html` adds the values under the
pointer. Nothing is loaded from elsewhere: the file can be mailed, or opened in ten years. Colours are CSS variables with
one value for light and one for dark. Needs no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from longreach.runtime import json_line
from longreach.train.curves import (
    DASHES,
    PALETTE,
    VALIDATION,
    Axis,
    Curve,
    Panel,
    RunCurves,
    figure,
    panels_of,
    thinned,
    ticks,
    x_range,
    y_range,
)
from longreach.train.metrics import duration

TEMPLATE = Path(__file__).with_name("page.html")

WIDE, NARROW = (1000, 342), (500, 240)
"""Width and height of the first panel and of the others, in units that are pixels at full width."""

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 38
LABEL_ROWS, LABEL_CHARS, CHAR_WIDTH = 3, 34, 6.0


def page(runs: Sequence[RunCurves], axis: Axis, keep: float) -> str:
    """The whole HTML document. `keep` is only told to the reader; the curves are smoothed already."""
    panels, xs = panels_of(runs), x_range(runs)
    title = ", ".join(run.label for run in runs)
    figures = [_figure(runs, panel, axis, xs, wide=index == 0) for index, panel in enumerate(panels)]
    smoothing = f"Strong lines are smoothed ({keep:g}), faint ones as recorded" if keep else "Lines are as recorded"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f"<p>{smoothing}; dots are validation.</p>",
            _table(runs),
            f'<div class="panels">\n{"".join(figures)}</div>',
            _events(runs),
        ]
    )
    data = {
        "axis": axis,
        "range": xs,
        "runs": [run.label for run in runs],
        "panels": [{"key": panel.key, "curves": _values(runs, panel)} for panel in panels],
        "events": [
            {"run": i, "step": event.step, "x": _short(event.x), "text": str(event)}
            for i, run in enumerate(runs)
            for event in run.events
        ],
    }
    # A "</script>" in a run's name would end the data early.
    parts = {"TITLE": escape(title), "BODY": body, "DATA": json_line(data).replace("<", "\\u003c")}
    document = TEMPLATE.read_text(encoding="utf-8").replace("/*COLOURS*/", _colours(runs))
    for name, text in parts.items():
        document = document.replace(f"<!--{name}-->", text, 1)
    return document


def _colours(runs: Sequence[RunCurves]) -> str:
    rules = []
    for i in range(len(runs)):
        light, dark = PALETTE[i % len(PALETTE)]
        mark = "var(--c)" if len(runs) > 1 else "var(--soft)"
        rules.append(f".run-{i} {{ --c: {light}; --mark: {mark}; }}")
        rules.append(f"@media (prefers-color-scheme: dark) {{ .run-{i} {{ --c: {dark}; }} }}")
    return "\n".join(rules)


def _dash(run: int) -> str:
    pattern = DASHES[run // len(PALETTE) % len(DASHES)]
    return f' stroke-dasharray="{" ".join(map(str, pattern))}"' if pattern else ""


def _short(value: float) -> float:
    """Six digits: more than a screen resolves, and half the bytes."""
    return float(f"{value:.6g}")


def _values(runs: Sequence[RunCurves], panel: Panel) -> list[dict[str, Any]]:
    """What the script shows under the pointer: the lines of a panel, thinned like the drawn ones."""
    out = []
    for i, run in enumerate(runs):
        for key, name in ((panel.key, _name(panel)), (VALIDATION, "validation")):
            if key in run.curves and (key != VALIDATION or panel.key == "loss"):
                xs, ys = thinned(run.curves[key].xs, run.curves[key].line)
                out.append({"run": i, "name": name, "dots": key == VALIDATION, "x": list(map(_short, xs)),
                            "y": list(map(_short, ys))})  # fmt: skip
    return out


def _name(panel: Panel) -> str:
    return "training" if panel.key == "loss" else panel.title.partition(":")[0].lower()


# ---- drawing --------------------------------------------------------------------------------------------------------


class Frame:
    """Where data stand inside one SVG."""

    def __init__(self, size: tuple[int, int], xs: tuple[float, float], ys: tuple[float, float]):
        self.size, self.xs, self.ys = size, xs, ys
        self.width, self.height = size[0] - LEFT - RIGHT, size[1] - TOP - BOTTOM
        self.bottom = TOP + self.height

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * self.width

    def y(self, value: float) -> float:
        return self.bottom - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * self.height

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        points = [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(*thinned(xs, ys), strict=True)]
        # A path of one point draws nothing; a short dash does.
        return "M" + "L".join(points) + ("h2" if len(points) == 1 else "")


def _figure(runs: Sequence[RunCurves], panel: Panel, axis: Axis, xs: tuple[float, float], wide: bool) -> str:
    size = WIDE if wide else NARROW
    frame = Frame(size, xs, y_range(runs, panel))
    labels = Labels(frame)
    parts = [_grid(frame, axis, size)]
    parts += [_events_of(frame, i, run, labels if wide else None) for i, run in enumerate(runs)]
    clip = f"clip-{panel.key}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{frame.width}" height="{frame.height}"/></clipPath>'
    )
    for i, run in enumerate(runs):
        curve, validation = run.curves.get(panel.key), run.curves.get(VALIDATION) if panel.key == "loss" else None
        drawn = _lines(frame, curve, _dash(i)) if curve else ""
        parts.append(f'<g class="run-{i}" clip-path="url(#{clip})">{drawn}</g>')
        # Not clipped: validation decides the range, and half of the last dot stands over the edge.
        parts.append(f'<g class="run-{i}">{_dots(frame, validation)}</g>' if validation else "")
    parts.append(f'<line class="cross" y1="{TOP}" y2="{frame.bottom}"/>')
    unit = f" <span>{escape(panel.unit)}</span>" if panel.unit else ""
    return (
        f"<figure{' class=' + chr(34) + 'wide' + chr(34) if wide else ''}>"
        f"<figcaption>{escape(panel.title)}{unit}</figcaption>\n"
        f'<svg class="panel" id="panel-{panel.key}" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="{escape(panel.title)} by {axis}" data-left="{LEFT}" data-width="{frame.width}">\n'
        + "\n".join(part for part in parts if part)
        + "\n</svg></figure>\n"
    )


def _lines(frame: Frame, curve: Curve, dash: str) -> str:
    raw = f'<path class="raw" d="{frame.path(curve.xs, curve.raw)}"/>' if curve.raw is not curve.line else ""
    return raw + f'<path class="line"{dash} d="{frame.path(curve.xs, curve.line)}"/>'


def _dots(frame: Frame, curve: Curve) -> str:
    xs, ys = thinned(curve.xs, curve.line)
    # Dots that would touch each other become a line.
    dots = zip(xs, ys, strict=True) if len(xs) <= 100 else ()
    circles = "".join(f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4"/>' for x, y in dots)
    return f'<path class="between" d="{frame.path(xs, ys)}"/>' + circles


def _grid(frame: Frame, axis: Axis, size: tuple[int, int]) -> str:
    parts = []
    for value in ticks(*frame.ys, count=size[1] // 55):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + frame.width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{figure(value)}</text>')
    for value in ticks(*frame.xs, count=size[0] // 110):
        parts.append(
            f'<text x="{frame.x(value):.1f}" y="{frame.bottom + 16}" text-anchor="middle">{figure(value)}</text>'
        )
    parts.append(f'<text x="{LEFT + frame.width}" y="{frame.bottom + 32}" text-anchor="end">{axis}</text>')
    return "".join(parts)


class Labels:
    """Names of events along the top, in up to three rows. No two overlap; one for which there is no room is left out."""

    def __init__(self, frame: Frame):
        self.frame = frame
        self.taken: list[list[tuple[float, float]]] = [[] for _ in range(LABEL_ROWS)]
        self.said: set[tuple[float, str]] = set()

    def place(self, x: float, name: str) -> str:
        """The SVG text for an event at `x`; empty if it has no room, or another run has the same event there."""
        if (x, name) in self.said:
            return ""
        self.said.add((x, name))
        name = name if len(name) <= LABEL_CHARS else name[: LABEL_CHARS - 1] + "…"
        reach = len(name) * CHAR_WIDTH
        flipped = x + reach > LEFT + self.frame.width
        start, end = (x - reach, x) if flipped else (x, x + reach)
        for row, taken in enumerate(self.taken):
            if all(end + 8 < left or start > right + 8 for left, right in taken):
                taken.append((start, end))
                at, anchor = (x - 4, ' text-anchor="end"') if flipped else (x + 4, "")
                return f'<text x="{at:.1f}" y="{TOP + 12 + 14 * row}"{anchor}>{escape(name)}</text>'
        return ""


def _events_of(frame: Frame, number: int, run: RunCurves, labels: Labels | None) -> str:
    """A vertical mark for each event of one run."""
    parts: list[str] = []
    for event in run.events:
        x = frame.x(event.x)
        if LEFT - 1 <= x <= LEFT + frame.width + 1:
            line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.bottom}"/>'
            label = labels.place(x, str(event)) if labels else ""
            parts.append(f"<g><title>step {event.step}: {escape(str(event))}</title>{line}{label}</g>")
    return f'<g class="event run-{number}">{"".join(parts)}</g>' if parts else ""


# ---- tables ---------------------------------------------------------------------------------------------------------


def _table(runs: Sequence[RunCurves]) -> str:
    rows = []
    for i, run in enumerate(runs):
        swatch = f'<svg class="swatch" width="18" height="6"><line x2="18" y1="3" y2="3"{_dash(i)}/></svg>'
        name = f"{swatch}{escape(run.label)}"
        if len(runs) > 1:
            name = f'<button class="run" data-run="{i}" aria-pressed="true" title="hide or show">{name}</button>'
        loss = "" if run.last_loss is None else f"{run.last_loss:.4f}"
        best = "" if run.best_validation is None else f"{run.best_validation[1]:.4f} at step {run.best_validation[0]}"
        time = "" if run.minutes is None else duration(60 * run.minutes)
        rows.append(
            f'<tr class="run-{i}"><td class="text">{name}</td><td>{run.steps:,}</td><td>{time}</td>'
            f"<td>{loss}</td><td>{best}</td></tr>"
        )
    head = '<th class="text">run</th><th>last step</th><th>time</th><th>last loss</th><th>best validation</th>'
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _events(runs: Sequence[RunCurves]) -> str:
    rows = [
        f'<tr><td class="text">{escape(run.label)}</td><td>{event.step:,}</td><td class="text">{escape(str(event))}</td></tr>'
        for run in runs
        for event in run.events
    ]
    if not rows:
        return ""
    head = '<tr><th class="text">run</th><th>step</th><th class="text">event</th></tr>'
    return (
        '<h2 style="font-size:15px;margin:24px 0 4px">Events</h2>'
        + f'<table id="events">{head}\n'
        + "\n".join(rows)
        + "\n</table>"
    )
