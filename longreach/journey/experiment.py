"""What every study shares: `longreach experiment NAME`, its kept results, its intervals, its conclusion.

    OUT/results.jsonl    one line per measurement: study, settings, seed, what came out, seconds
    OUT/study.png        the curves, where matplotlib is installed

A measurement is a pure function of (study, settings, seed), so one that is on file is never made again: a study that was
stopped, by Ctrl-C or because its --budget was spent, goes on where it was, and more --seeds add to what is there. A
conclusion is drawn by `at_least` and its siblings from the interval of the mean over seeds (Student's t, 95 %), never by hand:

    mean ± t · s / sqrt(n)      the target is reached, or missed, when the whole interval lies on one side of it
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from longreach.errors import RequestError
from longreach.runtime import json_line, log, set_threads, setup_logging

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantile of Student's t for 1 to 9 degrees of freedom; beyond, the normal's 1.96 plus what is missing of it."""


@dataclass(frozen=True)
class ExperimentOptions:
    """What every study can be asked."""

    seeds: int = 3
    """Repetitions, from seed 0 on."""
    budget: float | None = None
    """Minutes of measuring in this sitting: no measurement begins after that. The same command again goes on."""
    out: Path | None = None
    """Folder of the results (default runs/experiments/NAME)."""
    threads: int | None = None
    """CPU threads (default: one per core that others leave free)."""
    json: bool = False
    """End with one JSON object on stdout."""


def settings_of(options: ExperimentOptions) -> dict[str, Any]:
    """What decides a result: the options that a study adds to the common ones."""
    common = {f.name for f in dataclasses.fields(ExperimentOptions)}
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in common}


def folder_of(name: str, options: ExperimentOptions) -> Path:
    """Where the results of a study are."""
    return options.out or Path("runs/experiments") / name


def command_of(name: str, options: ExperimentOptions, verb: str = "experiment") -> str:
    """The command line that asks for this study with these options, whatever the sitting."""
    words = [f"longreach {verb} {name}"]
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if f.name not in ("budget", "json") and value != f.default:
            shown = value if isinstance(value, tuple) else (value,)
            words.append(f"--{f.name.replace('_', '-')} {shlex.join(map(str, shown))}")
    return " ".join(words)


# ---- intervals ------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Where the mean of a figure lies, with 95 % confidence. One value alone has an interval without bounds."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        if len(self.values) < 2:
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} ± {self.high - self.mean:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of independent values."""
    n = len(values)
    if n < 2:
        return Interval(values[0], -math.inf, math.inf, tuple(values))
    t = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else 1.96 + 2.4 / (n - 1)
    half = t * stdev(values) / math.sqrt(n)
    mean = fmean(values)
    return Interval(mean, mean - half, mean + half, tuple(values))


def at_least(what: str, found: Interval, target: float) -> str:
    """The sentence that follows from an interval and a lower bound asked for."""
    return _judged(what, found, f"at least {target:g}", found.low >= target, found.high < target, found.mean - target)


def at_most(what: str, found: Interval, target: float) -> str:
    """The sentence that follows from an interval and an upper bound asked for."""
    return _judged(what, found, f"at most {target:g}", found.high <= target, found.low > target, found.mean - target)


def _judged(what: str, found: Interval, asked: str, reached: bool, missed: bool, distance: float) -> str:
    head = f"{what} is {found}, asked for {asked}: "
    if reached:
        return head + "reached"
    if missed:
        return head + f"missed by {abs(distance):.3f}"
    side = "the mean is inside" if distance == 0 or ("least" in asked) == (distance > 0) else "the mean is outside"
    return head + f"undecided over {_seeds(len(found.values))}, {side} by {abs(distance):.3f}"


def above(what: str, higher: Sequence[float], lower: Sequence[float]) -> str:
    """The sentence that follows from two figures measured on the same seeds, by the interval of their differences."""
    found = interval([a - b for a, b in zip(higher, lower, strict=True)])
    if found.low > 0:
        return f"{what}: higher, by {found}"
    if found.high < 0:
        return f"{what}: lower, by {found}"
    return f"{what}: no difference shown over {_seeds(len(higher))}, {found}"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


# ---- kept results ---------------------------------------------------------------------------------------------------


class BudgetSpent(Exception):
    """No further measurement may begin in this sitting. Ends in `run_study`, never outside."""


class Ledger:
    """The measurements of one study. `measured` looks one up, or makes it and keeps it before it returns.

    Args:
        path: results.jsonl; made with the first result.
        study: its name.
        budget_s: seconds of measuring after which no measurement begins; None for no limit.
    """

    def __init__(self, path: Path, study: str, budget_s: float | None = None) -> None:
        self.path, self.study, self.budget_s = path, study, budget_s
        self.spent_s = 0.0
        self._asked: set[str] = set()
        self._made: set[str] = set()
        self._kept = {_key(record): record for record in self._read()}

    def measured(self, settings: dict[str, Any], seed: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gives for these settings and this seed.

        Args:
            settings: everything that decides the result besides the seed, as JSON values.
            measure: returns JSON values.

        Raises:
            BudgetSpent: it is not on file and the sitting is over.
        """
        record: dict[str, Any] = {"study": self.study, "settings": settings, "seed": seed}
        key = _key(record)
        if (kept := self._kept.get(key)) is not None:
            self._asked.add(key)
            return kept["result"]
        if self.budget_s is not None and self.spent_s >= self.budget_s:
            raise BudgetSpent
        began = time.perf_counter()
        result = measure()
        seconds = time.perf_counter() - began
        self.spent_s += seconds
        self._asked.add(key)
        self._made.add(key)
        record |= {"result": result, "seconds": round(seconds, 1)}
        record = json.loads(json_line(record))
        self._kept[key] = record
        self._append(record)
        return record["result"]

    @property
    def made(self) -> int:
        """Measurements made in this sitting."""
        return len(self._made)

    @property
    def found(self) -> int:
        """Measurements asked for that were on file."""
        return len(self._asked - self._made)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes() if self.path.exists() else b""
            with self.path.open("a", encoding="utf-8") as file:
                # A line that a full disk or a kill cut short must not swallow this one.
                file.write(("\n" if text and not text.endswith(b"\n") else "") + json_line(record) + "\n")
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _read(self) -> list[dict[str, Any]]:
        records = []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{self.path} cannot be read: {error}") from error
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut short: that measurement is made again
            if isinstance(record, dict) and {"study", "settings", "seed", "result"} <= record.keys():
                records.append(record)
        return records


def _key(record: dict[str, Any]) -> str:
    return json.dumps([record["study"], record["settings"], record["seed"]], sort_keys=True)


# ---- a study, run and told ------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A line of the picture."""

    label: str
    xs: list[float]
    ys: list[float]


@dataclass
class Outcome:
    """What a study found."""

    rows: list[list[str]]
    """The table; its first row names the columns."""
    figures: dict[str, Any]
    """The numbers that answer the question, means over seeds."""
    conclusion: list[str]
    """Sentences made by `at_least`, `at_most` and `above`."""
    curves: list[Curve] = field(default_factory=list)
    axes: tuple[str, str] = ("", "")
    next: str = ""
    """The command a reader may type next."""


def run_study(
    name: str,
    question: str,
    study: Callable[[Any, Ledger], Outcome],
    options: ExperimentOptions,
    verb: str = "experiment",
) -> int:
    """Run a study to its conclusion, or as far as the budget goes; returns the exit code.

    Args:
        verb: the first word of its command.

    Raises:
        RequestError: an option out of range, or results that cannot be read or written.
    """
    setup_logging()
    if options.seeds < 1:
        raise RequestError(f"--seeds {options.seeds}: give 1 or more")
    if options.budget is not None and not options.budget > 0:
        raise RequestError(f"--budget {options.budget:g}: give minutes above 0")
    for field_ in dataclasses.fields(options):
        value = getattr(options, field_.name)
        if field_.name != "threads" and isinstance(value, (int, float)) and value < 0:
            raise RequestError(f"--{field_.name.replace('_', '-')} {value:g} must not be negative")
    folder = folder_of(name, options)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--out {folder} is a file; give a folder")
    ledger = Ledger(folder / "results.jsonl", name, None if options.budget is None else options.budget * 60)
    log.info("question   %s", question)
    log.info("threads    %s", set_threads(options.threads))
    log.info("results    %s", ledger.path)
    again = command_of(name, options, verb)
    try:
        outcome = study(options, ledger)
    except BudgetSpent:
        log.info(
            "budget     %g minutes are spent: %d measured, %d were on file", options.budget, ledger.made, ledger.found
        )
        if options.json:
            print(json_line({"experiment": name, "finished": False, "measured": ledger.made, "results": ledger.path}))
        else:
            print(f"not finished: {ledger.path} keeps {ledger.made + ledger.found} measurements; go on with: {again}")
        return 0
    log.info("measured   %d new, %d were on file", ledger.made, ledger.found)
    picture = draw(outcome, folder / "study.png", question)
    if options.json:
        print(json_line({
            "experiment": name, "finished": True, "seeds": options.seeds, "figures": outcome.figures,
            "conclusion": outcome.conclusion, "results": ledger.path, "picture": picture,
        }))  # fmt: skip
        return 0
    print(table(outcome.rows))
    for sentence in outcome.conclusion:
        print(sentence)
    print(f"results: {ledger.path}" + (f", drawn in {picture}" if picture else "") + f"; next: {outcome.next or again}")
    return 0


def table(rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def draw(outcome: Outcome, path: Path, title: str) -> Path | None:
    """The curves as a PNG; None where there are none, or no matplotlib."""
    if not outcome.curves:
        return None
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    for curve in outcome.curves:
        axes.plot(curve.xs, curve.ys, label=curve.label)
    axes.set_xlabel(outcome.axes[0])
    axes.set_ylabel(outcome.axes[1])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
