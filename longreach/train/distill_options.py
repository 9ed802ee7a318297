"""The options of `longreach distill`, their defaults, and who teaches what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longreach.chat.modes import Mode
from longreach.errors import RequestError
from longreach.tasks.base import Task
from longreach.train.modes_option import open_weighted, read_by_mode, read_modes
from longreach.train.tuning import COMMON, Several, TuningOptions

WINDOWS: dict[Mode, int] = {"non-think": 64, "think-high": 256, "think-max": 384}
"""Tokens of an answer and its prompt, as in `longreach grpo`."""

LEARNING_RATES = {"muon": 4e-3, "adamw": 1.6e-3}
"""Of models about 100 wide. Every position has a whole distribution to learn from, so steps may be as long as with worked
solutions: with Muon and preset micro, 12 steps took the divergence from 0.63 to 0.34 at 0.001, to 0.14 at 0.004, and to 0.35
by way of 0.93 at 0.016. AdamW's has the ratio to it that pretraining's rates have."""


ADAPTERS_RATE = 5e-3
"""Of rank 8, from a teacher in a mode that the student did not know: 12 steps took the divergence from 10.9 to 10.6 at 0.0016, to
9.5 at 0.005, to 8.3 at 0.015, and all weights by Muon at 0.004 to 9.3. The middle one, as the last is past what SFT bears."""


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TuningOptions):
    """Teach one student by several teachers, on what the student itself writes.

    Every task's answers are compared with the teacher of its domain, token by token over the whole vocabulary.
    """

    teacher: Several = ()
    """DOMAIN=RUN: who teaches a domain (mathematics, code, …) or one kind of task (arithmetic, …). Give one for each."""
    task: Several = ()
    """A task whose problems the student answers, such as arithmetic:level=1-2; SPEC@WEIGHT for its share of them."""
    weight: Several = ()
    """DOMAIN=NUMBER: what a teacher's divergence counts for in the loss (default 1)."""
    method: Literal["full", "token"] | None = None
    """full (default): divergence over the whole vocabulary. token: the sampled token as a reward, for comparison."""
    modes: Several = ()
    """Modes to answer in, which a task's problems take in turn: non-think, think-high (default), think-max."""
    windows: str | None = None
    """Tokens of an answer and its prompt, by mode: non-think=64,think-high=256,think-max=384 (default), or one number."""
    problems: int | None = None
    """Problems per step (default 64)."""
    group_size: int | None = None
    """Answers to each of them (default 1)."""
    most_turns: int | None = None
    """Turns of an answer with tools (default 8)."""
    micro_tokens: int | None = None
    """Tokens that go through a model at once (default 8192); a step has as many such parts as it needs."""
    resident: int | None = None
    """Teachers in memory at once (default 2); the others wait on the disk."""
    decay: float | None = None
    """Fraction of the run, at its end, over which the learning rate falls to a tenth (default 0.5)."""
    eval_count: int | None = None
    """Held-out problems of each task, asked of teachers and student before and after (default 200; 0 for none)."""
    max_running: int | None = None
    """Answers written side by side (default 64)."""
    memory_gib: float | None = None
    """For their states (default 1)."""


DEFAULTS: dict[str, Any] = COMMON | {
    "teacher": None, "task": None, "weight": None, "method": "full", "modes": ["think-high"],
    "windows": None, "problems": 64, "group_size": 1, "most_turns": 8, "micro_tokens": 8192, "resident": 2, "decay": 0.5,
    "eval_count": 200, "max_running": 64, "memory_gib": 1.0,
}  # fmt: skip


def defaults(options: DistillOptions, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that decides what is learned, with what it is where nothing is given."""
    kind = saved.get("optimizer", options.optimizer) or "muon"
    return DEFAULTS | {"lr": ADAPTERS_RATE if options.lora is not None else LEARNING_RATES[kind]}


@dataclass(frozen=True)
class Plan:
    """Who teaches what.

    Attributes:
        tasks, shares: what is asked, and in which proportions.
        teacher_of: name of a task -> name of its teacher.
        runs, weights: name of a teacher -> its directory, what its divergence counts for.
        modes, windows: of the answers.
    """

    tasks: list[Task]
    shares: list[float]
    teacher_of: dict[str, str]
    runs: dict[str, str]
    weights: dict[str, float]
    modes: tuple[Mode, ...]
    windows: dict[Mode, int]

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Plan:
        """Read `--teacher`, `--task`, `--weight`, `--modes` and `--windows`.

        Raises:
            RequestError: a task without a teacher, a teacher without a task, anything named twice or unknown.
        """
        runs = dict(_pairs(settings["teacher"] or (), "--teacher", "mathematics=runs/math"))
        if not runs:
            raise RequestError("there is no teacher; give --teacher DOMAIN=RUN, one for each domain that is asked")
        tasks, shares = open_weighted(settings["task"] or ())
        teacher_of = {}
        for task in tasks:
            kind = task.name.partition(":")[0]
            if kind not in runs and task.domain not in runs:
                raise RequestError(
                    f"task {task.name} has no teacher; add --teacher {task.domain}=RUN (its domain) or --teacher {kind}=RUN"
                )
            teacher_of[task.name] = kind if kind in runs else task.domain
        if idle := [name for name in runs if name not in teacher_of.values()]:
            have = ", ".join(f"{task.name} ({task.domain})" for task in tasks)
            raise RequestError(f"--teacher {idle[0]}={runs[idle[0]]} has nothing to teach; the tasks are {have}")
        weights = dict.fromkeys(runs, 1.0)
        for name, text in _pairs(settings["weight"] or (), "--weight", "mathematics=0.5"):
            if name not in weights:
                raise RequestError(f"--weight {name}={text} is for no teacher; there are {', '.join(weights)}")
            weights[name] = _positive(text, f"--weight {name}={text}")
        modes = read_modes(settings["modes"])
        text: str | None = settings["windows"]
        windows = read_by_mode(text, modes, "--windows", default=WINDOWS, least=2) if text else dict(WINDOWS)
        for mode in modes:
            if windows[mode] != int(windows[mode]):
                raise RequestError(f"--windows {mode}={windows[mode]:g}: a token is not divided; give a whole number")
        return cls(tasks, shares, teacher_of, runs, weights, modes, {mode: int(windows[mode]) for mode in modes})


def _pairs(texts: Sequence[str], flag: str, example: str) -> list[tuple[str, str]]:
    """NAME=VALUE, each name once."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value or name in found:
            raise RequestError(f"{flag} {text}: write NAME=VALUE, each name once, for example {flag} {example}")
        found[name] = value
    return list(found.items())


def _positive(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise RequestError(f"{what}: {text} is no weight; give a number above 0")
    return number


def check(settings: dict[str, Any]) -> None:
    """Refuse numbers that cannot work.

    Raises:
        RequestError: the line names the option.
    """
    for name in ("problems", "group_size", "most_turns", "micro_tokens", "resident", "max_running", "eval_count"):
        least = 0 if name == "eval_count" else 1
        if settings[name] < least:
            raise RequestError(f"--{name.replace('_', '-')} {settings[name]} must be at least {least}")
    if not 0 <= settings["decay"] <= 1:
        raise RequestError(f"--decay {settings['decay']:g} is a fraction; give 0 to 1")
    if not 0 < settings["memory_gib"] < math.inf:
        raise RequestError(f"--memory-gib {settings['memory_gib']:g} must be above 0")
