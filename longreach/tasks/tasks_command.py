"""`longreach tasks`: which tasks there are, and what their problems look like.

    longreach tasks list
    longreach tasks show arithmetic:form=product:level=2
    longreach tasks show agent --mode non-think --count 1 --split train
    longreach tasks show gsm8k:path=gsm8k/test.jsonl --json

`show` prints problems, a worked solution of each and what the judge says to it.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from longreach.chat.messages import Message
from longreach.chat.modes import Mode
from longreach.errors import RequestError
from longreach.runtime import json_line
from longreach.tasks.base import Problem, Split, Task, problem_at
from longreach.tasks.registry import TASKS, open_task

MOST_SHOWN = 2000
"""Characters of a message that are printed; `--json` gives all of them."""


@dataclass(frozen=True)
class TasksOptions:
    """Show which tasks there are."""

    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Show problems of a task with worked solutions."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SPEC")]
    """Name of the task, with options: arithmetic:level=2."""
    mode: Mode = "think-high"
    """Of the worked solutions."""
    count: int = 3
    """Problems to show."""
    split: Split = "held-out"
    """Part they are from."""
    seed: int = 0
    """Decides which ones."""
    json: bool = False
    """Print one JSON object instead of the text."""


def main(options: TasksOptions) -> None:
    """`longreach tasks list`."""
    entries = [_entry(name) for name in TASKS]
    if options.json:
        print(json_line({"tasks": entries}))
        return
    rows = [("task", "domain", "levels", "what it asks"), *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
    print(
        "\nlongreach tasks show NAME prints problems; options follow the name, like arithmetic:level=1-2 or gsm8k:path=FILE"
    )


def show(options: ShowOptions) -> None:
    """`longreach tasks show`.

    Raises:
        RequestError: no such task, or no problem in this part of it.
    """
    if options.count < 1:
        raise RequestError(f"--count {options.count} must be at least 1")
    task = open_task(options.task)
    shown = [_shown(task, problem_at(task, options.split, options.seed, i), options) for i in range(options.count)]
    if options.json:
        print(json_line({"task": task.name, "domain": task.domain, "mode": options.mode, "problems": shown}))
        return
    print(f"{task.name} ({task.domain}): {task.summary}")
    for entry in shown:
        print(f"\n{entry['id']}, level {entry['level']}, {entry['split']}")
        for tool in entry["tools"]:
            print(_labelled("tool", json_line(tool)))
        for message in [*entry["prompt"], *(entry["solution"] or [])]:
            _print_message(message)
        if entry["solution"] is None:
            print(_labelled("solution", entry["why"]))
        else:
            verdict = entry["verdict"]
            print(_labelled("verdict", "right" if verdict["is_right"] else f"wrong: {verdict['why']}"))


# ---- what there is --------------------------------------------------------------------------------------------------


def _entry(name: str) -> dict[str, Any]:
    """Of the class, since a task read from a file cannot be opened without one."""
    module, _, class_name = TASKS[name].partition(":")
    task = getattr(importlib.import_module(module), class_name)
    levels: Sequence[int] | None = getattr(task, "all_levels", None)
    return {
        "name": name,
        "domain": getattr(task, "domain", None),  # of a user's own file, the file's options say it
        "levels": list(levels) if levels else None,
        "options": ["level" if levels else "path", *task.more_options()],
        "summary": task.summary,
    }


def _row(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    levels = entry["levels"]
    return entry["name"], entry["domain"] or "", f"{levels[0]}-{levels[-1]}" if levels else "", entry["summary"]


# ---- one problem ----------------------------------------------------------------------------------------------------


def _shown(task: Task, problem: Problem, options: ShowOptions) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": problem.id,
        "split": problem.split,
        "level": problem.level,
        "prompt": [_message(message) for message in problem.conversation.messages],
        "tools": [dict(tool.function) for tool in problem.conversation.tools],
        "answer": problem.answer,
        "solution": None,
    }
    try:
        # Of its own random numbers, so that a solution does not depend on which problems are shown beside it.
        solution = task.demonstrate(problem, options.mode, random.Random(problem.id))
    except RequestError as error:
        return {**entry, "why": str(error)}
    verdict = task.verify(problem, solution)
    return {**entry, "solution": [_message(message) for message in solution], "verdict": verdict._asdict()}


def _message(message: Message) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        shown["reasoning"] = message.reasoning
    if message.tool_calls:
        shown["calls"] = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return shown


def _print_message(message: dict[str, Any]) -> None:
    if "reasoning" in message:
        print(_labelled("thinks", message["reasoning"]))
    if message["content"] or "calls" not in message:
        print(_labelled(message["role"], message["content"]))
    for call in message.get("calls", ()):
        print(_labelled("calls", f"{call['name']} {call['arguments']}"))


def _labelled(label: str, text: str) -> str:
    if len(text) > MOST_SHOWN:
        text = f"{text[:MOST_SHOWN]}… ({len(text):,} characters in all)"
    return "\n".join(f"  {label if first else '':<11}{line}" for first, line in _with_first(text.split("\n")))


def _with_first(lines: Sequence[str]) -> list[tuple[bool, str]]:
    return [(number == 0, line) for number, line in enumerate(lines)]
