"""What the small worlds of the task `agent` share: tools that never fail loudly, worked chains of calls, and goals.

    world = Cells(problem.extra)
    world.call(ToolCall("get", '{"cell": 317}'))        "38"
    world.call(ToolCall("get", '{"cell": "x"}'))        "error: cell must be an integer"

A world is a dictionary of names and values. It notes what it was asked about, so that a lucky guess can be told from an
answer that was looked up. Whatever a model writes is answered in words, and no text from outside is repeated in them: a
result can always be encoded, and stays short.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from longreach.chat.messages import Message, Tool, ToolCall
from longreach.chat.modes import Mode


class World(ABC):
    """The stateful world of one attempt. A subclass sets `parameters` and defines `act` and `agrees`.

    Attributes:
        parameters: of each tool by its name, their JSON types by theirs; all are required.
        state: what there is, by name. The world of a problem begins with `extra["start"]`.
        asked: names that a call was about and told something of.
    """

    parameters: ClassVar[Mapping[str, Mapping[str, str]]]

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self.state: dict[str, Any] = dict(extra["start"])
        self.asked: set[str] = set()

    def call(self, call: ToolCall) -> str:
        """The result of a call; one that begins with `error:` has changed nothing."""
        wanted = self.parameters.get(call.name)
        if wanted is None:
            return f"error: no such tool; there are {', '.join(self.parameters)}"
        arguments = _read(call.arguments)
        if isinstance(arguments, str):
            return arguments
        for name, kind in wanted.items():
            if name not in arguments:
                return f"error: {name} is missing"
            value = arguments[name]
            if not (isinstance(value, str) if kind == "string" else type(value) is int):
                return f"error: {name} must be {'a string' if kind == 'string' else 'an integer'}"
        if len(arguments) > len(wanted):
            return f"error: {call.name} takes {' and '.join(wanted) or 'nothing'}, no more"
        return self.act(call.name, arguments)

    @abstractmethod
    def act(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Carry out a call whose arguments have the right names and types."""

    def knows(self, name: str) -> bool:
        """Whether the calls so far have told how it stood with this name."""
        return name in self.asked

    @abstractmethod
    def agrees(self, content: str, answer: Any) -> bool:
        """Whether the answer in words says `answer`, which is not None."""

    @classmethod
    def tools(cls) -> tuple[Tool, ...]:
        """As they are announced: names and types alone, because every token of a schema stands in every prompt."""
        return tuple(
            Tool(
                {
                    "name": name,
                    "parameters": {
                        "type": "object",
                        "properties": {key: {"type": kind} for key, kind in wanted.items()},
                        "required": list(wanted),
                    },
                }
            )
            for name, wanted in cls.parameters.items()
        )


class _GivenTwice(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise _GivenTwice
    return read


def _read(arguments: str) -> dict[str, Any] | str:
    """The arguments by name, or the error."""
    try:
        read = json.loads(arguments, object_pairs_hook=_once)
    except _GivenTwice:
        return "error: an argument is given twice"
    except (ValueError, RecursionError):
        return "error: the arguments are not JSON"
    return read if isinstance(read, dict) else "error: the arguments are no JSON object"


# ---- worked solutions -----------------------------------------------------------------------------------------------


class Chain:
    """A worked solution that is being made: calls whose results are those of a real world.

    Attributes:
        is_careful: think-max: state what is to be done, and look again at what was changed.
    """

    def __init__(self, world: World, mode: Mode) -> None:
        self.world, self.mode = world, mode
        self.is_careful = mode == "think-max"
        self.messages: list[Message] = []
        self._num_calls = 0

    def call(self, calls: Iterable[tuple[str, Mapping[str, Any]]], thought: str, more: str = "") -> list[str]:
        """Make these calls in one turn and return their results. `more` is thought beside `thought` in think-max."""
        made = []
        for name, arguments in calls:
            self._num_calls += 1
            made.append(ToolCall(name, json.dumps(arguments), f"call_{self._num_calls}"))
        self.messages.append(Message("assistant", "", self._reasoning(thought, more), tuple(made)))
        results = [self.world.call(call) for call in made]
        self.messages += [
            Message("tool", result, tool_call_id=call.id) for call, result in zip(made, results, strict=True)
        ]
        return results

    def answer(self, content: str, thought: str, more: str = "") -> None:
        """End it."""
        self.messages.append(Message("assistant", content, self._reasoning(thought, more)))

    def _reasoning(self, thought: str, more: str) -> str | None:
        if self.mode == "non-think":
            return None
        return f"{thought}\n{more}" if more and self.is_careful else thought


# ---- goals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A goal with its numbers and names filled in; all values are JSON.

    Attributes:
        prompt: what the user asks for.
        start: the world's state.
        changes: what of it is to be different in the end; a name that is not in `start` is to be made.
        asks: names that the attempt has to have asked about.
        answer: what the answer has to say; None: anything in words.
        given: what a worked solution needs to know of the prompt.
        more: what the world needs beside its start.
    """

    prompt: str
    start: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)
    asks: Sequence[str] = ()
    answer: Any = None
    given: Sequence[Any] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def extra(self, world: str, goal: str) -> dict[str, Any]:
        """The problem's `extra`."""
        return {
            "world": world,
            "goal": goal,
            "start": dict(self.start),
            "end": {**self.start, **self.changes},
            "asks": list(self.asks),
            "given": list(self.given),
            **self.more,
        }


@dataclass(frozen=True)
class Goal:
    """A kind of thing to be done.

    Attributes:
        make: draws one.
        solve: writes the worked solution of what `make` drew: the chain, then `Draft.given`.
    """

    name: str
    level: int
    make: Callable[[random.Random], Draft]
    solve: Callable[..., None]
