"""What a student has kept of its teachers: both on the same held-out problems.

exam = Exam(tasks, modes, windows, count=200, seed=0, judging=judging)
teacher, student = exam.take(source, tokenizer), exam.take(own, tokenizer)
kept_share(teacher[0], student[0])              0.98 (0.95 to 1.01)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longreach.chat.modes import Mode
from longreach.errors import RequestError
from longreach.evaluate.episode import Source
from longreach.evaluate.judging import Judging
from longreach.evaluate.score import Result, Score, paired, score
from longreach.evaluate.stats import Z
from longreach.runtime import write_atomic
from longreach.tasks.base import Task
from longreach.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Exam:
    """The held-out problems that student and teachers are asked; `count` of each task, in every mode."""

    tasks: Sequence[Task]
    modes: Sequence[Mode]
    windows: Mapping[Mode, int]
    count: int
    seed: int
    judging: Judging

    def take(self, source: Source, tokenizer: Tokenizer, names: Sequence[str] | None = None) -> list[Score]:
        """The scores of a model, task by task and mode by mode; `names`: on these tasks only."""
        tasks = [task for task in self.tasks if names is None or task.name in names]
        return score(source, tokenizer, tasks, modes=self.modes, count=self.count, seed=self.seed, window=self.windows,
                     judging=self.judging)  # fmt: skip


class Share(NamedTuple):
    """A ratio of accuracies and its interval of 95 %."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def kept_share(teacher: Score, student: Score) -> Share | None:
    """The student's accuracy over the teacher's, on the same problems; None where either has nothing right.

    The interval is that of a log-normal ratio of paired shares: its variance is (only one of them right) / (teacher's right ×
    student's right), counting at least one such problem, so that equal answers do not look like certainty.

    Raises:
        RequestError: they are not of the same problems.
    """
    difference = paired(teacher, student)
    if not teacher.right or not student.right:
        return None
    differing = max(1, difference.only_first + difference.only_second)
    half = Z * math.sqrt(differing / (teacher.right * student.right))
    share = student.right / teacher.right
    return Share(share, share * math.exp(-half), share * math.exp(half))


@dataclass(frozen=True)
class Compared:
    """One task in one mode: teacher, student before and after. `after` is None in a run that was stopped."""

    teacher_name: str
    teacher: Score
    before: Score
    after: Score | None

    @property
    def kept(self) -> Share | None:
        return None if self.after is None else kept_share(self.teacher, self.after)

    def record(self) -> dict[str, Any]:
        """Its figures for JSON."""
        kept = self.kept
        return {
            "task": self.teacher.task, "domain": self.teacher.domain, "mode": self.teacher.mode, "n": self.teacher.n,
            "teacher_name": self.teacher_name, "teacher": self.teacher.accuracy, "before": self.before.accuracy,
            "after": None if self.after is None else self.after.accuracy,
            "kept": None if kept is None else kept._asdict(),
        }  # fmt: skip


def table(rows: Sequence[Compared]) -> str:
    """Accuracies on held-out problems, and the share of the teacher's that the student kept."""
    lines = [("held-out problems", "mode", "n", "teacher", "before", "after", "kept of the teacher's")]
    for row in rows:
        after = "-" if row.after is None else f"{row.after.accuracy:.1%}"
        lines.append((row.teacher.task, row.teacher.mode, str(row.teacher.n), f"{row.teacher.accuracy:.1%}",
                      f"{row.before.accuracy:.1%}", after, str(row.kept or "-")))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def save_scores(path: Path, groups: Mapping[str, Sequence[Score]]) -> None:
    """Write scores with every problem's result, so that a resumed run need not take them again."""
    write_atomic(path, json.dumps({name: [asdict(one) for one in scores] for name, scores in groups.items()}) + "\n")


def load_scores(path: Path) -> dict[str, list[Score]]:
    """What `save_scores` wrote; empty where there is nothing.

    Raises:
        RequestError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: [Score(**{**one, "results": tuple(Result(**result) for result in one["results"])}) for one in scores]
            for name, scores in groups.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(f"{path} is damaged ({error}); delete it and the scores are taken again") from None
