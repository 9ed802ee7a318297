"""One attempt at a problem: what is asked for, what came out, and who may supply the tokens.

    jobs = [Job(key, task, problem, "think-high", window=512, seed=7), …]
    samples = play(source, jobs, tokenizer)            longreach.evaluate.play

An episode is a chain of turns: the model writes, its tool calls are answered by the task's environment, it goes on, until it
answers, its window is full, or it has had its turns. All that the model wrote is kept token by token, because training needs
the very tokens that were drawn: encoding their text again could give others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from longreach.chat.messages import Message
from longreach.chat.modes import Mode
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.tasks.base import Problem, Task, Verdict


@dataclass(frozen=True)
class Job:
    """An attempt to be made.

    Attributes:
        key: names it in logs; unique within a run.
        window: tokens of the whole episode at most, prompt included.
        seed: of everything that is drawn.
        params: temperature and truncation; its `max_tokens`, `seed` and `logprobs` are set by whoever plays.
        most_turns: answers of the model, calls included.
    """

    key: str
    task: Task
    problem: Problem
    mode: Mode
    window: int
    seed: int
    params: SamplingParams = field(default_factory=SamplingParams)
    most_turns: int = 8


@dataclass(frozen=True)
class Sample:
    """An attempt that was made.

    Attributes:
        prompt: ids the model was given first.
        tokens: ids behind them: what the model wrote, and between its turns what was inserted (results, marks of turns).
        written: for each of `tokens`, whether the model wrote it.
        logprobs: for each, in nats by the policy that drew it without temperature and truncation; 0.0 where not written;
            None from sources that do not tell.
        reply: the messages behind the prompt.
        finish: why the last turn ended. LENGTH means the window was full: no answer, so no reward.
        weights: version of the weights that drew it (a count of optimizer steps).
    """

    job: Job
    prompt: list[int]
    tokens: list[int]
    written: list[bool]
    logprobs: list[float] | None
    reply: tuple[Message, ...]
    finish: FinishReason
    verdict: Verdict
    weights: int = 0

    @property
    def num_written(self) -> int:
        """Tokens the model wrote: what length, cost and penalties count."""
        return sum(self.written)


class Turn(NamedTuple):
    """Ask for the continuation of `prompt`, of which `begun` has been generated before an interruption."""

    prompt: list[int]
    params: SamplingParams
    """With `max_tokens` counted from the end of `prompt`, `seed` set and `logprobs=0`."""
    begun: tuple[int, ...] = ()
    begun_logprobs: tuple[float, ...] = ()


class Piece(NamedTuple):
    """More of a turn. `finish` is set on its last piece; `error` where it ended with FinishReason.ERROR."""

    turn: Any
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: FinishReason | None = None
    error: str | None = None


class Source(Protocol):
    """Where tokens come from: this process's engine, or another server. Turns run beside each other."""

    def submit(self, turn: Turn) -> Any:
        """Begin a turn; returns a handle that its pieces carry."""
        ...

    def step(self) -> Sequence[Piece]:
        """Wait for more of any turns under way."""
        ...


class Partial(NamedTuple):
    """What a journal knows of an episode that was interrupted.

    Attributes:
        tokens, written, logprobs: as in `Sample`, as far as they had come.
        turn_starts: where in `tokens` each of the model's turns began.
    """

    tokens: list[int]
    written: list[bool]
    logprobs: list[float]
    turn_starts: list[int]


class Journal(Protocol):
    """A write-ahead log of episodes, token by token. Every method returns only when the record is with the operating system."""

    def finished(self, job: Job) -> Sample | None:
        """The sample, if this episode was over and judged before the interruption."""
        ...

    def partial(self, job: Job) -> Partial | None:
        """How far an unfinished episode had come; None if it had not begun."""
        ...

    def wrote(self, pieces: Sequence[tuple[Job, Sequence[int], Sequence[float]]]) -> None:
        """Tokens the model wrote in this step, for several episodes at once."""
        ...

    def inserted(self, job: Job, tokens: Sequence[int]) -> None:
        """Tokens between two turns of the model."""
        ...

    def ended(self, sample: Sample) -> None:
        """The episode is over and judged."""
        ...
