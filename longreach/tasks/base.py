"""What a task is: problems drawn from a seed, a judge of answers, worked solutions, and a held-out part.

    task = open_task("arithmetic:level=2")                       longreach.tasks.registry
    problem = problem_at(task, "train", seed=0, index=17)        always the same one
    verdict = task.verify(problem, reply)                        reply: the messages behind the prompt
    shown = task.demonstrate(problem, "think-high", rng)         the same messages as they should be

Training and evaluation share all of this, so a reward and a score can never disagree. Which part a problem belongs to is a
hash of its prompt: nothing has to be remembered, a problem met in training is never in the held-out part, whoever drew it
and with whichever seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from longreach.chat.messages import Conversation, Message, ToolCall
from longreach.chat.modes import Mode
from longreach.errors import RequestError

Split = Literal["train", "held-out"]

HELD_OUT = 0.2
"""Share of all problems that no training sees."""

MOST_DRAWS = 1000
"""Problems of the wrong part or level drawn before a task is declared to have none of the right one."""


@dataclass(frozen=True)
class Problem:
    """One question and what its judge knows.

    Attributes:
        task: name of the task.
        conversation: ends with the message to be answered; its mode is set by whoever asks (`chat.modes.in_mode`).
        answer: what the judge compares with; JSON values only, so that a problem can be written to a file.
        level: difficulty, 1 is the easiest.
    """

    task: str
    conversation: Conversation
    answer: Any
    level: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else a judge or an environment needs; JSON values."""

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of a hash of task and prompt."""
        said = [[m.role, m.content, m.reasoning, m.tool_call_id, [[c.name, c.arguments] for c in m.tool_calls]]
                for m in self.conversation.messages]  # fmt: skip
        tools = [dict(tool.function) for tool in self.conversation.tools]
        text = json.dumps([self.task, said, tools], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def split(self) -> Split:
        return "held-out" if int(self.id[:8], 16) < HELD_OUT * 2**32 else "train"


class Verdict(NamedTuple):
    """What a judge says.

    Attributes:
        reward: 0 to 1.
        is_right: what accuracy counts.
        why: one line for whoever reads samples; says what was expected where the answer is wrong.
    """

    reward: float
    is_right: bool
    why: str = ""


RIGHT = Verdict(1.0, True)


def wrong(why: str, reward: float = 0.0) -> Verdict:
    """A wrong answer, which may have earned part of the reward."""
    return Verdict(reward, False, why)


class Environment(Protocol):
    """The stateful world of one attempt at a problem with tools."""

    def call(self, call: ToolCall) -> str:
        """The text of the tool's result. What the model got wrong is a result too; nothing is raised."""
        ...


class Task(Protocol):
    """A source of problems and their judge. Has no state: every method is a function of its arguments.

    A judge that runs programs, or may take long, sets the class attribute `judged_apart = True`: `verify` is then asked in a
    process of its own, under a time limit (`evaluate.judging`, which says who else is asked there). Its task must pickle.

    Attributes:
        name: as in `--task`, options included.
        domain: mathematics, code, science, agentic, long-context, instructions, or what a user's file says.
        summary: one line.
        levels: the difficulties there are, easiest first.
        size: number of problems of a task read from a file; None where they are drawn without end.
    """

    name: str
    domain: str
    summary: str
    levels: Sequence[int]
    size: int | None

    def draw(self, rng: random.Random, level: int | None = None) -> Problem:
        """Any problem of either part. `level` None draws among the levels this task was opened with."""
        ...

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        """Judge the messages behind the prompt; the last is the assistant's answer (or its calls, where it was cut off)."""
        ...

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        """A right reply in this mode. Raises RequestError where the task knows none."""
        ...

    def environment(self, problem: Problem) -> Environment | None:
        """A fresh world for one attempt; None for tasks without tools."""
        ...


def final_message(reply: Sequence[Message]) -> Message | None:
    """The assistant's last message if it is an answer in words; None if there is none or it still calls tools."""
    if not reply or reply[-1].role != "assistant" or reply[-1].tool_calls:
        return None
    return reply[-1]


def problem_at(task: Task, split: Split, seed: int, index: int, level: int | None = None) -> Problem:
    """Problem number `index` of a task's part: a function of these arguments alone, so a run needs to save no more than a
    number. Tasks read from a file give their problems in the order of a permutation by `seed`, again and again.

    Raises:
        RequestError: the part is empty.
    """
    if task.size is not None:
        return _listed(task, split, seed, index)
    rng = random.Random(f"{task.name}/{split}/{seed}/{index}/{level}")
    for _ in range(MOST_DRAWS):
        problem = task.draw(rng, level)
        if problem.split == split:
            return problem
    raise RequestError(
        f"task {task.name} has no {split} problem among {MOST_DRAWS}; choose another level or a wider task"
    )


def _listed(task: Task, split: Split, seed: int, index: int) -> Problem:
    chosen = [problem for problem in task.problems() if problem.split == split]  # pyright: ignore[reportAttributeAccessIssue]
    if not chosen:
        raise RequestError(
            f"task {task.name} has {task.size} problems and none of them in its {split} part; give a larger file"
        )
    turn, place = divmod(index, len(chosen))
    order = list(range(len(chosen)))
    random.Random(f"{seed}/{turn}").shuffle(order)
    return chosen[order[place]]


class GeneratedTask(ABC):
    """What tasks that draw their problems have in common: `--task NAME[:level=2][:level=1-3]`, and no world.

    A subclass sets `kind`, `domain`, `summary` and `all_levels`, defines `make`, `verify` and, where it can, `demonstrate`.
    """

    kind: str
    domain: str
    summary: str
    all_levels: Sequence[int]
    size: int | None = None

    def __init__(self, options: Mapping[str, str]) -> None:
        unknown = sorted(set(options) - {"level", *self.more_options()})
        if unknown:
            allowed = ", ".join(["level", *self.more_options()])
            raise RequestError(f"task {self.kind} has no option {unknown[0]!r}; its options are {allowed}")
        self.levels = read_levels(self.kind, options.get("level"), self.all_levels)
        self.name = self.kind + "".join(f":{key}={value}" for key, value in sorted(options.items()))

    @classmethod
    def more_options(cls) -> Sequence[str]:
        """Names of options beside `level`."""
        return ()

    def draw(self, rng: random.Random, level: int | None = None) -> Problem:
        return self.make(rng, level if level is not None else rng.choice(list(self.levels)))

    @abstractmethod
    def make(self, rng: random.Random, level: int) -> Problem:
        """Any problem of this level."""

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        raise RequestError(
            f"task {self.name} has no worked solutions to learn from; it can be used for rewards and scores"
        )

    def environment(self, problem: Problem) -> Environment | None:
        return None


def read_levels(kind: str, given: str | None, allowed: Sequence[int]) -> list[int]:
    """`2`, `1-3` or nothing (all) as levels.

    Raises:
        RequestError: not one of `allowed`.
    """
    if given is None:
        return list(allowed)
    first, _, last = given.partition("-")
    if first.isdecimal() and (last or first).isdecimal():
        levels = list(range(int(first), int(last or first) + 1))
        if levels and set(levels) <= set(allowed):
            return levels
    raise RequestError(
        f"task {kind} has no level {given!r}; give one of {allowed[0]} to {allowed[-1]}, or a range like 1-2"
    )


def read_choices(kind: str, option: str, given: str | None, allowed: Sequence[str]) -> list[str]:
    """`sum+chain` or nothing (all) as a list.

    Raises:
        RequestError: one that is not allowed, or the same twice.
    """
    chosen = list(allowed) if given is None else given.split("+")
    if unknown := [choice for choice in chosen if choice not in allowed]:
        raise RequestError(
            f"task {kind} has no {option} {unknown[0]!r}; give one or several of {', '.join(allowed)}, joined by +"
        )
    if len(set(chosen)) < len(chosen):
        raise RequestError(f"task {kind}: {option}={given} names one twice; name each once")
    return chosen
