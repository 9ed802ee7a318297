"""How many problems of a task's held-out part a model has right, in each mode, and what can be said of the others.

    scores = score(source, tokenizer, tasks, modes=["think-high"], count=200, seed=0, window={"think-high": 256}, judging=judging)
    print(scores[0])                                   arithmetic, think-high: 151 of 200 right, 75.5 % (69.1 to 81.0)
    paired(before[0], after[0])                        two models on the same problems

Problems are a function of task, part and seed, so two models asked with the same ones answer the same problems in the same
order. No problem is asked twice: a part with fewer than `count` problems gives a smaller score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from longreach.chat.modes import EffortTexts, Mode
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.episode import Job, Sample, Source
from longreach.evaluate.judging import Judging, was_judged
from longreach.evaluate.play import play, turn_seed
from longreach.evaluate.stats import Difference, paired_difference, wilson
from longreach.tasks.base import Problem, Split, Task, problem_at
from longreach.tokenizer.bpe import Tokenizer

MOST_REPEATS = 200
"""Draws in a row that give only problems already asked, before a part is taken to have no more of them."""


@dataclass(frozen=True)
class Result:
    """What became of one problem.

    Attributes:
        problem: its id.
        tokens: that the model wrote.
        is_cut_off: its window was full before an answer.
        is_judged: False where the verifier failed.
    """

    problem: str
    level: int
    is_right: bool
    reward: float
    tokens: int
    is_cut_off: bool
    is_judged: bool


@dataclass(frozen=True)
class Score:
    """Of a task in a mode.

    Attributes:
        task, domain: as the task says.
        level: where only problems of one level are counted.
        results: one for each problem, in the order they were asked.
    """

    task: str
    domain: str
    mode: Mode
    results: tuple[Result, ...]
    level: int | None = None

    @property
    def n(self) -> int:
        return len(self.results)

    @property
    def right(self) -> int:
        return sum(result.is_right for result in self.results)

    @property
    def accuracy(self) -> float:
        """Share of the problems that were right; cut off and unjudged ones count as wrong."""
        return self.right / self.n

    @property
    def low(self) -> float:
        """Of the interval of 95 % around the accuracy."""
        return wilson(self.right, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.right, self.n)[1]

    @property
    def reward(self) -> float:
        return sum(result.reward for result in self.results) / self.n

    @property
    def mean_tokens(self) -> float:
        return sum(result.tokens for result in self.results) / self.n

    @property
    def truncated(self) -> float:
        """Share of the answers that their window cut off."""
        return sum(result.is_cut_off for result in self.results) / self.n

    @property
    def unjudged(self) -> int:
        """Answers on which the verifier failed."""
        return sum(not result.is_judged for result in self.results)

    def by_level(self) -> list[Score]:
        """The same for each level alone, easiest first."""
        levels = sorted({result.level for result in self.results})
        chosen = [tuple(result for result in self.results if result.level == level) for level in levels]
        return [
            Score(self.task, self.domain, self.mode, results, level)
            for level, results in zip(levels, chosen, strict=True)
        ]

    def record(self) -> dict[str, object]:
        """Its figures for JSON."""
        return {
            "task": self.task, "domain": self.domain, "mode": self.mode, "level": self.level, "n": self.n, "right": self.right,
            "accuracy": round(self.accuracy, 4), "low": round(self.low, 4), "high": round(self.high, 4),
            "reward": round(self.reward, 4), "mean_tokens": round(self.mean_tokens, 1), "truncated": round(self.truncated, 4),
            "unjudged": self.unjudged,
        }  # fmt: skip

    def __str__(self) -> str:
        where = self.task if self.level is None else f"{self.task} level {self.level}"
        share = f"{self.accuracy:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"
        return f"{where}, {self.mode}: {self.right} of {self.n} right, {share}"


def score(
    source: Source,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    modes: Sequence[Mode],
    count: int,
    seed: int,
    window: Mapping[Mode, int],
    judging: Judging,
    split: Split = "held-out",
    temperature: float = 1.0,
    texts: EffortTexts = "preview",
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Score]:
    """One score for each task and mode, tasks in their order, for each the modes in theirs.

    Args:
        count: problems of each task; the same ones in every mode.
        seed: of the problems, and of what is drawn in answering them.
        window: tokens of an episode at most, by mode.
        on_sample: called with each attempt once it is judged.

    Raises:
        RequestError: as `play` and `problem_at`; a mode without a window, or a count below 1.
    """
    if count < 1:
        raise RequestError(f"a score of {count} problems says nothing; ask at least 1")
    if missing := [mode for mode in modes if mode not in window]:
        raise RequestError(f"no window is given for mode {missing[0]}; give one for each of {', '.join(modes)}")
    params = SamplingParams(temperature=temperature)
    asked = [list(problems(task, split, seed, count)) for task in tasks]
    jobs = [
        Job(
            f"{task.name}/{mode}/{place}", task, problem, mode, window[mode],
            turn_seed(seed, place), params,
        )
        for task, chosen in zip(tasks, asked, strict=True)
        for mode in modes
        for place, problem in enumerate(chosen)
    ]  # fmt: skip
    samples = iter(play(source, jobs, tokenizer, judging=judging, texts=texts, on_sample=on_sample))
    return [
        Score(task.name, task.domain, mode, tuple(result(next(samples)) for _ in chosen))
        for task, chosen in zip(tasks, asked, strict=True)
        for mode in modes
    ]


def problems(task: Task, split: Split, seed: int, count: int) -> Iterator[Problem]:
    """The first `count` different problems of a task's part; fewer where it has no more.

    Raises:
        RequestError: it has none.
    """
    seen: set[str] = set()
    index = repeats = 0
    while len(seen) < count and repeats < MOST_REPEATS and (task.size is None or index < task.size):
        problem = problem_at(task, split, seed, index)
        index += 1
        repeats = repeats + 1 if problem.id in seen else 0
        if problem.id not in seen:
            seen.add(problem.id)
            yield problem


def result(sample: Sample) -> Result:
    """What a score keeps of an attempt."""
    problem, verdict = sample.job.problem, sample.verdict
    return Result(
        problem.id, problem.level, verdict.is_right, verdict.reward, sample.num_written,
        sample.finish is FinishReason.LENGTH, was_judged(verdict),
    )  # fmt: skip


def paired(first: Score, second: Score) -> Difference:
    """How much better the second is, problem by problem.

    Raises:
        RequestError: they are not of the same problems.
    """
    if [r.problem for r in first.results] != [r.problem for r in second.results]:
        raise RequestError(
            f"the scores of {first.task} and {second.task} are of different problems; ask both with the same task, seed and count"
        )
    return paired_difference([r.is_right for r in first.results], [r.is_right for r in second.results])
