"""The tasks by name: `open_task("arithmetic:level=1-2")`, `open_task("gsm8k:path=gsm8k/test.jsonl")`.

A specification is a name, then options `key=value` after colons. A task's module is imported when it is opened.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from longreach.errors import RequestError
from longreach.tasks.base import Task

TASKS: dict[str, str] = {
    "arithmetic": "longreach.tasks.arithmetic:Arithmetic",
    "programs": "longreach.tasks.programs:Programs",
    "coding": "longreach.tasks.coding:Coding",
    "science": "longreach.tasks.science:Science",
    "agent": "longreach.tasks.agent:Agent",
    "needles": "longreach.tasks.needles:Needles",
    "instructions": "longreach.tasks.instructions:Instructions",
    "gsm8k": "longreach.tasks.files:GSM8K",
    "math": "longreach.tasks.files:Math",
    "humaneval": "longreach.tasks.files:HumanEval",
    "mbpp": "longreach.tasks.files:MBPP",
    "jsonl": "longreach.tasks.files:AnyJSONL",
}


def open_task(specification: str) -> Task:
    """The task of this name with these options.

    Raises:
        RequestError: an unknown name, an option it does not have, a file that cannot be read.
    """
    name, *parts = specification.split(":")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"tasks are {', '.join(TASKS)}"
        raise RequestError(f"task {name!r} is unknown; {hint}")
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value or key in options:
            raise RequestError(f"--task {specification}: {part!r} is no option; write {name}:key=value, each key once")
        options[key] = value
    module, _, class_name = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)(options)


def open_tasks(specifications: Sequence[str]) -> list[Task]:
    """Several, each named once.

    Raises:
        RequestError: as `open_task`; also the same one twice.
    """
    tasks = [open_task(specification) for specification in specifications]
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"--task {twice[0]} is given twice; name each once")
    return tasks
