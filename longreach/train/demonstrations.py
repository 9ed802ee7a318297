"""Worked solutions of tasks as examples to learn from: endless, each a function of its number.

source = Demonstrations(open_task("arithmetic"), {"non-think": 1.0, "think-high": 1.0}, seed=0, …)
source.example(17)                 problem 17 of the task's training part, in the mode that number 17 drew
source.held_out(64)                the same from the part that no training sees
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping

from longreach.chat.modes import Mode, in_mode
from longreach.chat.renderer import Prompt, render
from longreach.data.conversations import learned_where
from longreach.data.examples import Example, Fitting, make_example
from longreach.data.order import words
from longreach.tasks.base import Problem, Task, problem_at
from longreach.tokenizer.bpe import Tokenizer


def demonstration(task: Task, problem: Problem, mode: Mode, rng: random.Random) -> Prompt:
    """A problem with a right reply in this mode. Only the reply is learned, also where the problem shows answers.

    Raises:
        RequestError: the task knows no reply.
    """
    asked = in_mode(problem.conversation, mode)
    reply = task.demonstrate(problem, mode, rng)
    whole = dataclasses.replace(asked, messages=asked.messages + tuple(reply))
    given = sum(message.role == "assistant" for message in asked.messages)
    prompt = render(whole, texts="preview", for_training=True)
    return learned_where(prompt, lambda answer: answer >= given) if given else prompt


class Demonstrations:
    """The demonstrations of one task.

    Args:
        modes: modes and their chances, relative to each other.
        tokenizer: None only while texts for one are gathered.
    """

    size = None

    def __init__(self, task: Task, modes: Mapping[Mode, float], seed: int, tokenizer: Tokenizer | None,
                 fitting: Fitting) -> None:  # fmt: skip
        self.task, self.modes, self.seed, self.tokenizer, self.fitting = task, dict(modes), seed, tokenizer, fitting
        self.name = f"task {task.name}"
        self.identity = f"{task.name} {self.modes} {seed}"

    def mode(self, index: int) -> Mode:
        """The mode that this number drew."""
        place = words("mode", self.seed, self.task.name, index)[0] / 2**64 * sum(self.modes.values())
        for mode, weight in self.modes.items():
            place -= weight
            if place < 0:
                return mode
        return list(self.modes)[-1]

    def prompt(self, index: int, mode: Mode | None = None) -> Prompt:
        """Number `index` of the training part, laid out."""
        problem = problem_at(self.task, "train", self.seed, index)
        return demonstration(self.task, problem, mode or self.mode(index), self._rng("train", index))

    def example(self, index: int) -> Example | None:
        return self._encoded(self.prompt(index))

    def held_out(self, count: int) -> Iterator[Example]:
        """Examples of the held-out part, the modes taking turns; fewer than `count` where some are too long."""
        modes = list(self.modes)
        for index in range(count):
            problem = problem_at(self.task, "held-out", self.seed, index)
            prompt = demonstration(self.task, problem, modes[index % len(modes)], self._rng("held-out", index))
            if (example := self._encoded(prompt)) is not None:
                yield example

    def _encoded(self, prompt: Prompt) -> Example | None:
        assert self.tokenizer is not None
        return self.fitting(make_example(*prompt.encode_with_loss(self.tokenizer)))

    def _rng(self, part: str, index: int) -> random.Random:
        return random.Random(f"demonstration/{self.task.name}/{part}/{self.seed}/{index}")
