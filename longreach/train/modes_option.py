"""Options that name modes and tasks: `non-think=64,think-high=256`, `arithmetic:level=2@0.5`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from longreach.chat.modes import MODES, Mode
from longreach.errors import RequestError
from longreach.tasks.base import Task
from longreach.tasks.registry import open_tasks


def read_modes(texts: Sequence[str], flag: str = "--modes") -> tuple[Mode, ...]:
    """The named modes, each once.

    Raises:
        RequestError: none, an unknown one, or one twice.
    """
    named = [part for text in texts for part in text.split(",") if part]
    for name in named:
        if name not in MODES:
            raise RequestError(f"{flag} {name}: there is no such mode; modes are {', '.join(MODES)}")
    if not named or len(set(named)) < len(named):
        raise RequestError(f"{flag} {' '.join(named)}: name each mode once, of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in named)


def read_by_mode(
    text: str, modes: Sequence[Mode], flag: str, *, default: Mapping[Mode, float], least: float = 0.0
) -> dict[Mode, float]:
    """A number for each mode, out of `NUMBER` (for all) or `MODE=NUMBER,MODE=NUMBER`.

    Args:
        modes: those that numbers are wanted for.
        default: of modes that the text leaves out.
        least: smallest number allowed.

    Raises:
        RequestError: no such list, an unknown mode, a mode that is not in use, a number out of range.
    """
    given: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        names = [name] if equals else list(modes)
        try:
            value = float(number if equals else name)
        except ValueError:
            raise RequestError(
                f"{flag} {text}: {part.strip()!r} is no number; write 256, or non-think=64,think-high=256"
            ) from None
        if not least <= value < math.inf:
            raise RequestError(f"{flag} {text}: {value:g} must be at least {least:g}")
        for mode in names:
            if mode not in modes:
                which = "there is no such mode" if mode not in MODES else "this mode is not among --modes"
                raise RequestError(f"{flag} {text}: {mode!r}: {which}; those in use are {', '.join(modes)}")
            if mode in given:
                raise RequestError(f"{flag} {text}: {mode} has two numbers; give one")
            given[mode] = value
    return {mode: given[mode] if mode in given else default[mode] for mode in modes}


def open_weighted(specifications: Sequence[str], flag: str = "--task") -> tuple[list[Task], list[float]]:
    """Tasks of `SPEC` or `SPEC@WEIGHT`, with their weights (1 where none is given).

    Raises:
        RequestError: none, an unknown one, one twice, a weight that is not above 0.
    """
    if not specifications:
        raise RequestError(f"there is no task; name one with {flag}, such as {flag} arithmetic:level=1")
    names, weights = [], []
    for text in specifications:
        name, at, number = text.rpartition("@")
        weight = _number(number) if at and not Path(text.rpartition("=")[2]).exists() else None
        if weight is not None and not 0 < weight < math.inf:
            raise RequestError(f"{flag} {text}: the weight after @ must be above 0")
        names.append(text if weight is None else name)
        weights.append(1.0 if weight is None else weight)
    return open_tasks(names), weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
