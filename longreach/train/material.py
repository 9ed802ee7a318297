"""What an SFT run learns from: files of conversations and tasks, read, weighed and, once there is a tokenizer, encoded.

material = Material.open(settings)              everything read once, so that whatever is wrong is found before any work
tokenizer = Tokenizer.train(material.texts(), 1024)
feed, validation = material.feed(tokenizer, …), material.validation(tokenizer, …)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.chat.modes import MODES, Mode
from longreach.data.chats import ChatFile, Chats
from longreach.data.examples import Example, ExampleFeed, ExampleSource, Fitting
from longreach.errors import RequestError
from longreach.tasks.base import Task
from longreach.tasks.registry import open_tasks
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.demonstrations import Demonstrations

TEXTS_PER_MODE = 500
"""Demonstrations of a task, in each mode, that a new tokenizer is learned from."""

HELD_OUT_PER_TASK = 96
"""Demonstrations of a task's held-out part that a validation reads."""


@dataclass
class Material:
    """Conversations and tasks with their weights.

    Attributes:
        files, tasks: what was named; weights: of both in this order, None where files count by their size.
        modes: of the tasks' demonstrations, with their chances.
    """

    files: list[ChatFile]
    tasks: list[Task]
    weights: Sequence[float | None]
    modes: dict[Mode, float]
    seed: int

    @classmethod
    def open(cls, settings: Mapping[str, Any]) -> Material:
        """Read and check what `--data`, `--task`, `--modes` and `--validate` name.

        Raises:
            RequestError: a file, line, task, mode or weight that cannot be used.
        """
        paths = [_weighed(text, "--data") for text in settings["data"] or ()]
        specifications = [_weighed(text, "--task") for text in settings["task"] or ()]
        named = paths + specifications
        if not named:
            raise RequestError(
                "nothing to learn from; give --data chats.jsonl or --task NAME (longreach tasks lists them)"
            )
        weights = [weight for _, weight in named]
        bare = [name for name, weight in named if weight is None]
        if bare and (len(bare) < len(named) or (paths and specifications)):
            raise RequestError(
                f"{bare[0]} has no weight; where files and tasks are mixed or anything has a weight, give every one its "
                f"own, as in {bare[0]}@1"
            )
        if specifications and bare:
            weights = [1.0] * len(named)
        if settings["modes"] and not specifications:
            raise RequestError(
                "--modes is for the demonstrations of --task; a conversation's mode is the one it was held in"
            )
        modes = parse_modes(settings["modes"] or MODES)
        tasks = open_tasks([name for name, _ in specifications])
        for task in tasks:
            for mode in modes:  # a task without worked solutions says so now
                Demonstrations(task, modes, settings["seed"], None, Fitting(0, False)).prompt(0, mode)
        files = [ChatFile.read(Path(path), settings["validate"]) for path, _ in paths]
        return cls(files, tasks, weights, modes, settings["seed"])

    def texts(self) -> Iterator[str]:
        """What a tokenizer for this material is learned from."""
        for file in self.files:
            for prompt in file.training():
                yield from (piece.text for piece in prompt.pieces if not piece.is_special)
        for task in self.tasks:
            source = Demonstrations(task, self.modes, self.seed, None, Fitting(0, False))
            for mode in self.modes:
                for index in range(TEXTS_PER_MODE):
                    yield from (p.text for p in source.prompt(index, mode).pieces if not p.is_special)

    def feed(self, tokenizer: Tokenizer, fitting: Fitting, batch_tokens: int, passes: int | None) -> ExampleFeed:
        """The training examples, encoded.

        Raises:
            RequestError: no example of a file is short enough, or a token is missing from the tokenizer.
        """
        chats = [Chats(file, tokenizer, fitting, self.seed) for file in self.files]
        tasks = [Demonstrations(task, self.modes, self.seed, tokenizer, fitting) for task in self.tasks]
        sources: Sequence[ExampleSource] = [*chats, *tasks]
        by_size = None in self.weights
        weights = [float(chat.num_tokens) for chat in chats] if by_size else [float(w or 0) for w in self.weights]
        return ExampleFeed(sources, weights, batch_tokens=batch_tokens, passes=passes, repeats=not by_size)

    def validation(self, tokenizer: Tokenizer, fitting: Fitting) -> list[Example]:
        """Examples that no step learns from: those of the files whose hash is low, and tasks' held-out parts."""
        found: list[Example] = []
        for file in self.files:
            found += file.held_out(tokenizer, fitting)
        for task in self.tasks:
            found += Demonstrations(task, self.modes, self.seed, tokenizer, fitting).held_out(HELD_OUT_PER_TASK)
        return found


def parse_modes(texts: Sequence[str]) -> dict[Mode, float]:
    """`think-high@2 non-think` (or with commas) as modes and their chances.

    Raises:
        RequestError: an unknown mode, one named twice, or a weight that is none.
    """
    modes: dict[Mode, float] = {}
    for named in (part for text in texts for part in text.split(",") if part):
        name, weight = _weighed(named, "--modes")
        if name not in MODES or name in modes:
            raise RequestError(f"--modes {name!r} is unknown or named twice; modes are {', '.join(MODES)}")
        modes[name] = 1.0 if weight is None else weight
    if not modes:
        raise RequestError(f"--modes names none; modes are {', '.join(MODES)}")
    return modes


def _weighed(text: str, flag: str) -> tuple[str, float | None]:
    """NAME or NAME@WEIGHT; a path that exists as it is written has no weight in it."""
    name, at, number = text.rpartition("@")
    if not at or not name or Path(text).exists():
        return text, None
    try:
        weight = float(number)
    except ValueError:
        return text, None
    if not 0 < weight < math.inf:
        raise RequestError(f"{flag} {text}: the weight after @ must be a number above 0")
    return name, weight
