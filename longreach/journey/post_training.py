"""What rewards and teachers are worth at laptop size: `longreach bench post-training [--json]`

    weak start ──┬── grpo  --minutes 2.5 ──  held-out accuracy          per task and seed
                 └── sft   --minutes 2.5 ──  the same problems          (demonstrations in the same time, beside it)

    mixed start ─┬── sft on A ─ teacher A ─┐
                 ├── sft on B ─ teacher B ─┼── distill ── student       share of each teacher's score that is kept
                 │                         ├── average                  the baselines, in the same time
                 ├── sft on A and B        │
                 └── grpo on A and B       ┘

Every arrow is a `longreach` command in a process of its own, printed as it is run, so that any of them can be typed again.
All runs of a task are scored on the same held-out problems at temperature 1, so differences are paired. Measurements are kept
(`longreach.journey.experiment`): a bench that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from longreach.errors import RequestError
from longreach.journey.experiment import (
    ExperimentOptions,
    Ledger,
    Outcome,
    above,
    at_least,
    folder_of,
    interval,
    run_study,
)
from longreach.runtime import log, other_load

NAME = "post-training"
MODE = "think-high"
GAIN, KEPT = 0.15, 0.97
"""What is asked for: points of accuracy by GRPO, share of each teacher's score that the student keeps."""

GRPO = ("--minibatches", "4", "--normalise", "std")
"""Four optimizer steps on each batch of samples: on two cores drawing and learning then take about as long."""

QUESTION = "what do rewards add to a weak start, and what does a student keep of two teachers?"


@dataclass(frozen=True)
class PostTrainingOptions(ExperimentOptions):
    """GRPO from a weak start beside further SFT, and a two-teacher distillation beside averaging, mixture SFT and mixed RL.

    Everything begins from an untrained `micro` model, so nothing is needed but time: about twenty minutes per seed on two
    cores.
    """

    only: Literal["all", "grpo", "distill"] = "all"
    """One half of it."""
    tasks: tuple[str, str] = ("arithmetic:form=product:level=2", "programs:level=1")
    """Two tasks with worked solutions, of different domains."""
    start_steps: tuple[int, int] = (170, 220)
    """SFT steps of each task's weak start, all at the full learning rate."""
    mixed_steps: int = 300
    """SFT steps of the start that teachers and student share."""
    teacher_minutes: float = 2.5
    """SFT of each teacher."""
    minutes: float = 2.5
    """Of GRPO, and of the SFT beside it; of the distillation, and of its baselines."""
    count: int = 500
    """Held-out problems of a score in the first half."""
    pairs: int = 2000
    """Held-out problems per domain in the second half."""


def main(options: PostTrainingOptions) -> int:
    """Run the command; returns the exit code."""
    for name in ("minutes", "teacher_minutes", "mixed_steps", "count", "pairs"):
        if not getattr(options, name) > 0:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(options, name)}: give more than 0")
    return run_study(NAME, QUESTION, study, options, verb="bench")


def study(options: PostTrainingOptions, ledger: Ledger) -> Outcome:
    """Measure what is asked for, seed by seed, and compare."""
    log.info("load       other processes use %.2f CPUs", other_load(0.5) or 0.0)
    outcome = Outcome(
        [["what", "start", "by", "after", "gain"]], {}, [], next=f"longreach samples {folder_of(NAME, options)}"
    )
    if options.only != "distill":
        for place, task in enumerate(options.tasks):
            _compare_gains(options, ledger, outcome, place, task)
    if options.only != "grpo":
        _compare_students(options, ledger, outcome)
    return outcome


# ---- commands -------------------------------------------------------------------------------------------------------


class Bench:
    """The folder of one seed, and the commands that fill it."""

    def __init__(self, options: PostTrainingOptions, seed: int) -> None:
        self.folder, self.seed = folder_of(NAME, options) / f"seed-{seed}", seed
        self.threads = torch.get_num_threads()

    def run(self, name: str) -> Path:
        return self.folder / name

    def train(self, name: str, verb: str, *words: str) -> None:
        """Make a run; a finished one stays, one that was interrupted is gone on with."""
        out = self.run(name)
        if (out / "done").is_file():
            return
        words = (verb, *words, "--out", str(out), "--seed", str(self.seed), "--threads", str(self.threads))
        self.command(*words, *(["--resume"] if (out / "config.json").is_file() else []))
        (out / "done").touch()

    def accuracy(self, name: str, tasks: Sequence[str], count: int) -> dict[str, float]:
        """Share of right answers by task, on the problems that every run of this seed is asked."""
        asked = [word for task in tasks for word in ("--task", task)]
        result = self.command("evaluate", str(self.run(name)), *asked, "--mode", MODE, "--count", str(count),
                              "--temperature", "1", "--seed", str(self.seed), "--threads", str(self.threads))  # fmt: skip
        return {score["task"]: score["accuracy"] for score in result["scores"]}

    def command(self, *words: str) -> dict[str, Any]:
        """Run one `longreach` command; its object on the last line.

        Raises:
            RequestError: it failed.
        """
        log.info("$ longreach %s", shlex.join(words))
        # What it says goes on to the terminal: some of these take minutes.
        done = subprocess.run([sys.executable, "-m", "longreach", *words, "--json"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RequestError(
                f"longreach {shlex.join(words)} ended with code {done.returncode}; its reason stands above"
            )
        return json.loads(done.stdout.strip().splitlines()[-1])


def _settings(options: PostTrainingOptions, half: str, **more: Any) -> dict[str, Any]:
    return {"half": half, "mode": MODE, "grpo": list(GRPO), "threads": torch.get_num_threads(), **more}


# ---- GRPO from a weak start ------------------------------------------------------------------------------------------


def _compare_gains(options: PostTrainingOptions, ledger: Ledger, outcome: Outcome, place: int, task: str) -> None:
    settings = _settings(
        options, "grpo", task=task, start_steps=options.start_steps[place], minutes=options.minutes, count=options.count
    )
    found = [ledger.measured(settings, seed, lambda seed=seed: _gains(options, Bench(options, seed), place, task))
             for seed in range(options.seeds)]  # fmt: skip
    kind = task.partition(":")[0]
    gains = interval([one["grpo"] - one["start"] for one in found])
    further = interval([one["sft"] - one["start"] for one in found])
    for name, gained in (("grpo", gains), ("sft", further)):
        start, after = fmean(one["start"] for one in found), fmean(one[name] for one in found)
        outcome.rows.append([task, f"{start:.3f}", f"{name}, {options.minutes:g} min", f"{after:.3f}", str(gained)])
        outcome.figures |= {f"{kind}_{name}": after, f"{kind}_{name}_gain": gained.mean}
    error = (gains.high - gains.mean) / 1.96 if len(found) < 2 else _standard_error(gains.values)
    outcome.figures |= {f"{kind}_start": fmean(one["start"] for one in found), f"{kind}_grpo_standard_error": error}
    outcome.conclusion.append(at_least(f"{task}: points gained by GRPO in {options.minutes:g} minutes", gains, GAIN))
    if len(found) > 1:
        outcome.conclusion.append(
            f"{task}: the gain of {gains.mean:.3f} is {gains.mean / max(error, 1e-9):.1f} standard errors ({error:.3f})"
        )
    outcome.conclusion.append(
        above(f"{task}: SFT of equal time against GRPO", [o["sft"] for o in found], [o["grpo"] for o in found])
    )


def _standard_error(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _gains(options: PostTrainingOptions, bench: Bench, place: int, task: str) -> dict[str, float]:
    start, minutes = f"start-{place}", str(options.minutes)
    bench.train(start, "sft", "--preset", "micro", "--task", task, "--modes", MODE, "--steps",
                str(options.start_steps[place]), "--decay", "0")  # fmt: skip
    bench.train(f"grpo-{place}", "grpo", str(bench.run(start)), "--task", task, "--modes", MODE, "--minutes", minutes,
                "--eval-count", "0", *GRPO)  # fmt: skip
    bench.train(f"sft-{place}", "sft", str(bench.run(start)), "--task", task, "--modes", MODE, "--minutes", minutes)
    return {name.partition("-")[0]: bench.accuracy(name, [task], options.count)[task]
            for name in (start, f"grpo-{place}", f"sft-{place}")}  # fmt: skip


# ---- two teachers, one student ---------------------------------------------------------------------------------------

STUDENTS = ("distill", "average", "mixture", "mixed-rl")


def _compare_students(options: PostTrainingOptions, ledger: Ledger, outcome: Outcome) -> None:
    settings = _settings(
        options, "distill", tasks=list(options.tasks), mixed_steps=options.mixed_steps, minutes=options.minutes,
        teacher_minutes=options.teacher_minutes, pairs=options.pairs,
    )  # fmt: skip
    found = [ledger.measured(settings, seed, lambda seed=seed: _students(options, Bench(options, seed)))
             for seed in range(options.seeds)]  # fmt: skip
    for task in options.tasks:
        kind = task.partition(":")[0]
        start, teacher = (fmean(one[who][task] for one in found) for who in ("mixed", f"teacher of {task}"))
        outcome.rows.append([task, f"{start:.3f}", "its teacher", f"{teacher:.3f}", ""])
        outcome.figures[f"{kind}_teacher"] = teacher
        for student in STUDENTS:
            kept = interval([one[student][task] / max(one[f"teacher of {task}"][task], 1e-9) for one in found])
            after = fmean(one[student][task] for one in found)
            outcome.rows.append([task, f"{start:.3f}", student, f"{after:.3f}", f"kept {kept}"])
            outcome.figures[f"{kind}_kept_{student.replace('-', '_')}"] = kept.mean
            if student == "distill":
                outcome.conclusion.append(
                    at_least(f"{task}: share of its teacher's score the student keeps", kept, KEPT)
                )
    for student in STUDENTS[1:]:
        worst = [[min(one[who][task] / max(one[f"teacher of {task}"][task], 1e-9) for task in options.tasks) for one in found]
                 for who in ("distill", student)]  # fmt: skip
        outcome.conclusion.append(above(f"what is kept in the worse domain: distill against {student}", *worst))


def _students(options: PostTrainingOptions, bench: Bench) -> dict[str, dict[str, float]]:
    both = [word for task in options.tasks for word in ("--task", task)]
    modes, minutes = ("--modes", MODE), ("--minutes", str(options.minutes))
    bench.train("mixed", "sft", "--preset", "micro", *both, *modes, "--steps", str(options.mixed_steps))
    mixed = str(bench.run("mixed"))
    teachers, given = {}, []
    for place, task in enumerate(options.tasks):
        name = f"teacher-{place}"
        bench.train(name, "sft", mixed, "--task", task, *modes, "--minutes", str(options.teacher_minutes))
        teachers[f"teacher of {task}"] = name
        given += ["--teacher", f"{task.partition(':')[0]}={bench.run(name)}"]
    bench.train("distill", "distill", mixed, *both, *given, *modes, *minutes, "--eval-count", "0")
    average = bench.run("average")
    if not (average / "done").is_file():
        shutil.rmtree(average, ignore_errors=True)
        bench.command("average", *(str(bench.run(name)) for name in teachers.values()), "--out", str(average))
        (average / "done").touch()
    bench.train("mixture", "sft", mixed, *both, *modes, *minutes)
    bench.train("mixed-rl", "grpo", mixed, *both, *modes, *minutes, "--eval-count", "0", *GRPO)
    names = {"mixed": "mixed", **teachers, **{student: student for student in STUDENTS}}
    return {who: bench.accuracy(name, options.tasks, options.pairs) for who, name in names.items()}
