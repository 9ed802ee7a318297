"""What can be drawn of a run: metrics.jsonl records turned into curves, without any drawing.

    smoothed y_t = sum_i keep^(t−i) · y_i / sum_i keep^(t−i)      over the records i ≤ t of one key

Both pictures of `longreach plot` (PNG and page) show exactly these curves. Records may lack any key: validation has no
learning rate, a dense model no indexer, an older run no token count. Needs neither torch nor matplotlib.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longreach.errors import RequestError
from longreach.rundir import RunDirectory

Axis = Literal["step", "tokens", "minutes"]
AXIS_KEYS: dict[Axis, tuple[str, float]] = {
    "step": ("step", 1.0),
    "tokens": ("tokens", 1.0),
    "minutes": ("seconds", 60),
}
"""Axis -> the key of a record that holds it, and how many of that make one."""

MAX_POINTS = 2000
"""Points that one drawn line may have: about one per pixel of a wide picture."""

PALETTE = (
    ("#2a78d6", "#5b9ff0"), ("#d9691e", "#ef8f4d"), ("#1a9a6c", "#35c08d"), ("#b03a8c", "#e06dbb"),
    ("#b58900", "#dcb02e"), ("#6a4fc4", "#a08df0"), ("#c93a3a", "#f07575"), ("#3c8a9e", "#62bfd4"),
)  # fmt: skip
"""Colour of the first run, the second, …: on white, on black. The ninth has the first's colour, dashed."""

DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))
"""Line pattern of the first eight runs, the next eight, …: lengths drawn and left out."""


class Panel(NamedTuple):
    """One diagram: a key of the records, how it is called, and its unit."""

    key: str
    title: str
    unit: str
    smooth: bool = True


PANELS = (
    Panel("loss", "Loss", "nats per token"),
    Panel("reward", "Reward", "mean of a step's attempts"),
    Panel("accuracy", "Accuracy: attempts in training", "share that is right"),
    Panel("eval_accuracy", "Held-out accuracy: problems no training sees", "share that is right", smooth=False),
    Panel("length", "Length", "tokens written per attempt"),
    Panel("entropy", "Entropy", "nats per token"),
    Panel("kl", "KL to the reference", "nats per token"),
    Panel("ratio_max", "Ratio: largest of a token", "new over old probability"),
    Panel("clip_share", "Clipped tokens", "share"),
    Panel("useless_groups", "Useless groups", "share whose rewards are all equal"),
    Panel("truncated", "Cut off", "share of attempts"),
    Panel("mtp_loss", "MTP loss: the token after the next", "nats per token"),
    Panel("index_loss", "Indexer loss", "nats"),
    Panel("index_recall", "Indexer recall", "fraction"),
    Panel("divergence", "Divergence from the teachers", "nats per token"),
    Panel("expert_balance", "Expert balance", "largest load over mean load"),
    Panel("lr", "Learning rate", "", smooth=False),
    Panel("grad_norm", "Gradient norm", "before clipping"),
    Panel("tokens_per_s", "Speed", "tokens/s"),
    Panel("rollout_tokens_per_s", "Speed: attempts", "tokens written/s"),
    Panel("update_tokens_per_s", "Speed: updates", "tokens/s"),
)
VALIDATION = "val_loss"
"""Drawn as dots in the panel of `loss`."""


class Curve(NamedTuple):
    """Points from left to right. `raw` is what was recorded; `line` is what the eye should follow."""

    xs: list[float]
    raw: list[float]
    line: list[float]


class Event(NamedTuple):
    """Something that happened at a step: a new stage, a rollback, a stop."""

    step: int
    x: float
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@dataclass(frozen=True)
class RunCurves:
    """Everything drawn of one run. `curves` has the keys of `PANELS` and `VALIDATION` that were recorded."""

    path: Path
    label: str
    curves: dict[str, Curve]
    events: list[Event]
    steps: int
    minutes: float | None
    best_validation: tuple[int, float] | None
    """Step and loss of the best validation."""

    @property
    def last_loss(self) -> float | None:
        """Training loss at the end, smoothed."""
        return self.curves["loss"].line[-1] if "loss" in self.curves else None


# ---- reading --------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path], axis: Axis, keep: float) -> list[RunCurves]:
    """The curves of several runs, each labelled by as much of its path as tells it from the others.

    Args:
        keep: weight of the past in the smoothed line, in [0, 1); 0 smooths nothing.

    Raises:
        RequestError: `keep` is out of range; a path is given twice, is no run, has no metrics yet, or lacks the axis.
    """
    if not 0 <= keep < 1:
        raise RequestError(f"--smooth {keep:g}: give a number from 0 (as recorded) to below 1, like 0.95")
    if not paths:
        raise RequestError("no run given; longreach plot RUN draws one, longreach plot RUN RUN compares them")
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise RequestError(f"{path} is given twice; name each run once")
    return [
        curves_of(path, label, _records(path), axis, keep) for path, label in zip(paths, _labels(resolved), strict=True)
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise RequestError(f"{path} does not exist; give a run directory, the --out of a training command")
    run = RunDirectory(path)
    if not (run.metrics_path.is_file() or run.config_path.is_file()):
        raise RequestError(f"{path} is not a run (no metrics.jsonl); give the --out of a training command")
    try:
        records = run.read_metrics()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{run.metrics_path} cannot be read: {error}") from None
    return [record for record in records if isinstance(record, dict) and _number(record, "step") is not None]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with more parts before it where two would read the same."""
    count = 1
    while True:
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
        count += 1


def curves_of(path: Path, label: str, records: Sequence[dict[str, Any]], axis: Axis, keep: float) -> RunCurves:
    """Turn the records of one run into curves.

    Raises:
        RequestError: nothing can be drawn, or no record has the axis.
    """
    events = [record for record in records if record.get("event")]
    records = _still_valid([record for record in records if not record.get("event")])
    position = _position(path, records, axis)
    curves: dict[str, Curve] = {}
    for panel in (*PANELS, Panel(VALIDATION, "", "", smooth=False)):
        points = _course(records, panel.key)
        if points:
            ys = [y for _, y in points]
            xs = [position(record) for record, _ in points]
            curves[panel.key] = Curve(xs, ys, smoothed(ys, keep) if panel.smooth and keep else ys)
    if not curves:
        raise RequestError(f"{path} has no metrics yet; wait for its first steps")
    validation = [(int(record["step"]), y) for record, y in _course(records, VALIDATION)]
    seconds = _course(records, "seconds")
    return RunCurves(
        path=path,
        label=label,
        curves=curves,
        events=[Event(int(e["step"]), position(e), str(e["event"]), str(e.get("text") or "")) for e in events],
        steps=int(records[-1]["step"]),
        minutes=seconds[-1][1] / 60 if seconds else None,
        best_validation=min(validation, key=lambda point: point[1], default=None),
    )


def _still_valid(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a run recorded beyond a step that it then went back to: a record of an earlier step says it did."""
    valid: list[dict[str, Any]] = []
    for record in records:
        if valid and valid[-1]["step"] > record["step"]:
            while valid and valid[-1]["step"] >= record["step"]:
                valid.pop()
        valid.append(record)
    return valid


def _course(records: Sequence[dict[str, Any]], key: str) -> list[tuple[dict[str, Any], float]]:
    """The records that have `key` as a finite number, with it: one per step, the last."""
    course = {record["step"]: (record, value) for record in records if (value := _number(record, key)) is not None}
    return list(course.values())


def _number(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _position(path: Path, records: Sequence[dict[str, Any]], axis: Axis) -> Callable[[dict[str, Any]], float]:
    """Where a record stands on the axis. One without that figure (validation, events) stands where its step does."""
    key, unit = AXIS_KEYS[axis]
    known = _course(records, key)
    if not known:
        if not any(_course(records, panel.key) for panel in PANELS):
            raise RequestError(f"{path} has no metrics yet; wait for its first steps")
        raise RequestError(f"{path} records no {key}; leave out --x {axis} to draw it by step")
    steps, values = [record["step"] for record, _ in known], [value / unit for _, value in known]

    def position(record: dict[str, Any]) -> float:
        own = _number(record, key)
        if own is not None:
            return own / unit
        step = record["step"]
        right = bisect_left(steps, step)
        if right in (0, len(steps)):
            return values[min(right, len(steps) - 1)]
        share = (step - steps[right - 1]) / (steps[right] - steps[right - 1])
        return values[right - 1] + share * (values[right] - values[right - 1])

    return position


# ---- shaping --------------------------------------------------------------------------------------------------------


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start so that the first value is the first value."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def thinned(xs: Sequence[float], ys: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` of the points: the ends, and the lowest and highest of each stretch, so that no spike is lost."""
    if len(xs) <= limit:
        return list(xs), list(ys)
    stretches = (limit - 2) // 2
    kept = {0, len(xs) - 1}
    for i in range(stretches):
        stretch = range(1 + i * (len(xs) - 2) // stretches, 1 + (i + 1) * (len(xs) - 2) // stretches)
        kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


def panels_of(runs: Sequence[RunCurves]) -> list[Panel]:
    """The panels that at least one run has something for."""
    keys = {key for run in runs for key in run.curves}
    return [panel for panel in PANELS if panel.key in keys or (panel.key == "loss" and VALIDATION in keys)]


def x_range(runs: Sequence[RunCurves]) -> tuple[float, float]:
    """The common horizontal range; it begins at 0 unless every run begins far from there."""
    xs = [x for run in runs for curve in run.curves.values() for x in (curve.xs[0], curve.xs[-1])]
    low, high = min(xs), max(xs)
    low = 0.0 if low < 0.2 * high else low
    return low, high if high > low else low + 1


def y_range(runs: Sequence[RunCurves], panel: Panel) -> tuple[float, float]:
    """The vertical range: the raw values but for the hundredth most extreme at either end, and the lines.

    A step with a gradient of a thousand times the usual leaves the picture at the top instead of flattening the rest: a
    smoothed line is followed beyond the usual values as far as twice their spread.
    """
    values: list[float] = []
    for run in runs:
        if curve := run.curves.get(panel.key):
            ordered, rare = sorted(curve.raw), len(curve.raw) // 100 if panel.smooth else 0
            usual_low, usual_high = ordered[rare], ordered[-1 - rare]
            reach = 2 * (usual_high - usual_low) or math.inf
            values += (usual_low, max(min(curve.line), usual_low - reach))
            values += (usual_high, min(max(curve.line), usual_high + reach))
        if panel.key == "loss" and (validation := run.curves.get(VALIDATION)):
            values += validation.line
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    # A quantity that is never negative gets no axis below zero.
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def figure(value: float) -> str:
    """A number as a reader wants it on an axis: 1.5M, 12k, 2.31, 3e-05."""
    for least, size, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"
