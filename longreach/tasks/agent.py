"""Multi-turn tool calls against a small stateful world: `--task agent[:world=cells|boxes][:level=1-4]`.

    level   calls   cells                                       boxes
    1       1       What is in cell 317?                        Move the pen to F.
    2       1-3     Copy cell 317 to cell 502.                  Where is the pen, or is it nowhere?
    3       2-4     Put the sum of cells 317 and 502 in …       Move the red thing in A to F; if it is full, to K.
    4       4-11    Put the sum of all cells in cell 640.       Move all red things to F; if it is full, to K.

An attempt is right if the world is as it was to be, nothing else in it has changed, all that had to be looked up was looked
up, and the answer is right. Its calls are made again on a fresh world: what the transcript says they returned is compared,
never believed. Part of it earns up to half the reward, and less for every other thing that was changed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.tasks.agent_boxes import BOX_GOALS, Boxes
from longreach.tasks.agent_cells import CELL_GOALS, Cells
from longreach.tasks.agent_world import Chain, Goal, World
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, read_choices, wrong

WORLDS: dict[str, tuple[type[World], Sequence[Goal]]] = {"cells": (Cells, CELL_GOALS), "boxes": (Boxes, BOX_GOALS)}

PART = 0.5
"""The most that a wrong attempt can earn."""


class Agent(GeneratedTask):
    """Problems of one world, or of both."""

    kind = "agent"
    domain = "agentic"
    summary = "tool calls in turns against a small world with a state"
    all_levels = (1, 2, 3, 4)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        self.worlds = read_choices(self.kind, "world", options.get("world"), list(WORLDS))

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("world",)

    def make(self, rng: random.Random, level: int) -> Problem:
        name = rng.choice(self.worlds)
        world, goals = WORLDS[name]
        goal = rng.choice([goal for goal in goals if goal.level == level])
        draft = goal.make(rng)
        conversation = Conversation((Message("user", draft.prompt),), world.tools())
        return Problem(self.kind, conversation, draft.answer, level, draft.extra(name, goal.name))

    def environment(self, problem: Problem) -> World:
        return WORLDS[problem.extra["world"]][0](problem.extra)

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        world = self.environment(problem)
        if why := _replay(world, reply):
            return wrong(why)
        part, why = _progress(world, problem)
        final = final_message(reply)
        if not why:
            if final is None:
                why = "there is no answer"
            elif not final.content.strip() or (
                problem.answer is not None and not world.agrees(final.content, problem.answer)
            ):
                why = f"the answer is not {_worded(problem.answer)}"
        return wrong(why, PART * part) if why else RIGHT

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        """The chain of calls with their results. In think-max what was changed is looked at again."""
        _, goals = WORLDS[problem.extra["world"]]
        (goal,) = [goal for goal in goals if goal.name == problem.extra["goal"]]
        chain = Chain(self.environment(problem), mode)
        goal.solve(chain, *problem.extra["given"])
        return tuple(chain.messages)


def _replay(world: World, reply: Sequence[Message]) -> str:
    """Make the calls of a reply. Empty, or why it is no transcript of this world.

    Calls of a last message were never made if no results follow.
    """
    place = 0
    while place < len(reply):
        message = reply[place]
        place += 1
        if message.role != "assistant":
            return f"message {place} of the reply is of the role {message.role}; it is the assistant's turn"
        results: list[Message] = []
        while place < len(reply) and reply[place].role == "tool":
            results.append(reply[place])
            place += 1
        if place == len(reply) and not results:
            return ""
        if not message.tool_calls:
            return "the reply goes on behind its answer"
        if len(results) != len(message.tool_calls):
            return f"there are {len(results)} results of {len(message.tool_calls)} calls"
        waiting = list(message.tool_calls)
        said: dict[int, str] = {}
        for result in results:
            found = [call for call in waiting if result.tool_call_id in ("", call.id)]
            if not found:
                return f"a result answers the call {result.tool_call_id!r}, which was not made"
            said[id(found[0])] = result.content
            waiting = [call for call in waiting if call is not found[0]]
        for call in message.tool_calls:
            if (true := world.call(call)) != said[id(call)]:
                return f"a result of {call.name!r} reads {said[id(call)][:40]!r}; it was {true!r}"
    return ""


def _progress(world: World, problem: Problem) -> tuple[float, str]:
    """How much of the goal has been reached, 0 to 1, the answer left aside; and what of it has not."""
    start, end = problem.extra["start"], problem.extra["end"]
    reached = asked = spoiled = 0
    why = ""
    changes = [name for name in end if start.get(name) != end[name]]
    for name in changes:
        if world.state.get(name) == end[name]:
            reached += 1
        else:
            why = why or f"{name} should be {end[name]}, not {world.state.get(name, 'empty')}"
    for name in world.state:
        if name not in changes and world.state[name] != end.get(name):
            spoiled += 1
            why = why or f"{name} should not have been changed"
    for name in problem.extra["asks"]:
        if world.knows(name):
            asked += 1
        else:
            why = why or f"{name} was not looked up"
    return max(0, reached + asked - spoiled) / (len(changes) + len(problem.extra["asks"])), why


def _worded(answer: object) -> str:
    if isinstance(answer, list):
        return ", ".join(answer) or "nothing"
    return "in words" if answer is None else str(answer)
