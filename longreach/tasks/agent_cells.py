"""A world of numbered cells, each of which holds a number: what sums, copies and pointers need.

    get(cell)           "38", or "empty"
    set(cell, value)    "ok"
    list()              "317 502", the cells that are not empty; or "none"

Cells are numbers from 100 to 999: every digit is one token, so that a name has the same tokens in a question, in a call and
in a result.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from longreach.tasks.agent_world import Chain, Draft, Goal, World

FIRST_CELL, LAST_CELL = 100, 999
LARGEST = 999
_NUMBER = re.compile(r"[0-9]+")


class Cells(World):
    """State: numbers by cell."""

    parameters: ClassVar = {"get": {"cell": "integer"}, "set": {"cell": "integer", "value": "integer"}, "list": {}}

    def __init__(self, extra: Mapping[str, Any]) -> None:
        super().__init__(extra)
        self._shown: set[str] | None = None  # cells in the first list

    def act(self, name: str, arguments: Mapping[str, Any]) -> str:
        if name == "list":
            if self._shown is None:
                self._shown = set(self.state)
            return " ".join(sorted(self.state)) or "none"
        if not FIRST_CELL <= arguments["cell"] <= LAST_CELL:
            return f"error: cells are {FIRST_CELL} to {LAST_CELL}"
        cell = str(arguments["cell"])
        if name == "get":
            self.asked.add(cell)
            return str(self.state.get(cell, "empty"))
        if not 0 <= arguments["value"] <= LARGEST:
            return f"error: values are 0 to {LARGEST}"
        self.state[cell] = arguments["value"]
        return "ok"

    def knows(self, name: str) -> bool:
        return super().knows(name) or (self._shown is not None and name not in self._shown)

    def agrees(self, content: str, answer: Any) -> bool:
        """The last number said is the answer."""
        said = _NUMBER.findall(content)
        return bool(said) and said[-1].lstrip("0") == str(answer).lstrip("0")


# ---- turns ----------------------------------------------------------------------------------------------------------


def _get(chain: Chain, *cells: str, more: str = "") -> list[str]:
    return chain.call([("get", {"cell": int(cell)}) for cell in cells], f"get {' '.join(cells)}", more)


def _set(chain: Chain, pairs: Iterable[tuple[str, int]], thought: str, more: str = "") -> None:
    """Set cells, look at them again where it is careful, and end."""
    pairs = list(pairs)
    chain.call([("set", {"cell": int(cell), "value": value}) for cell, value in pairs], thought, more)
    if chain.is_careful:
        chain.call([("get", {"cell": int(cell)}) for cell, _ in pairs], "look again")
    chain.answer("done", "ok")


def _sum(*terms: int) -> str:
    return f"{'+'.join(map(str, terms))}={sum(terms)}"


def _back(a: int, b: int) -> str:
    return f"{a + b}-{b}={a}"


# ---- goals ----------------------------------------------------------------------------------------------------------


def _cells(rng: random.Random, count: int) -> list[str]:
    return [str(cell) for cell in rng.sample(range(FIRST_CELL, LAST_CELL + 1), count)]


def _filled(rng: random.Random, *cells: str) -> dict[str, int]:
    """Different numbers in these cells. The last is one that nobody speaks of, so that there is something to spoil."""
    return dict(zip(cells, rng.sample(range(10, 100), len(cells)), strict=True))


def _make_read(rng: random.Random) -> Draft:
    a, other = _cells(rng, 2)
    start = _filled(rng, a, other)
    return Draft(f"What is in cell {a}?", start, asks=[a], answer=start[a], given=[a])


def _solve_read(chain: Chain, a: str) -> None:
    (x,) = _get(chain, a)
    chain.answer(x, f"{a}: {x}", f"asked: {a}")


def _make_write(rng: random.Random) -> Draft:
    a, other = _cells(rng, 2)
    value = rng.randint(10, 99)
    return Draft(f"Put {value} in cell {a}.", _filled(rng, other), {a: value}, given=[a, value])


def _solve_write(chain: Chain, a: str, value: int) -> None:
    _set(chain, [(a, value)], f"set {a} {value}")


def _make_add(rng: random.Random) -> Draft:
    a, b, other = _cells(rng, 3)
    start = _filled(rng, a, b, other)
    return Draft(f"Add up cells {a} and {b}.", start, asks=[a, b], answer=start[a] + start[b], given=[a, b])


def _solve_add(chain: Chain, a: str, b: str) -> None:
    x, y = map(int, _get(chain, a, b, more="then add"))
    chain.answer(str(x + y), _sum(x, y), _back(x, y))


def _make_copy(rng: random.Random) -> Draft:
    a, b, other = _cells(rng, 3)
    start = _filled(rng, a, other)
    return Draft(f"Copy cell {a} to cell {b}.", start, {b: start[a]}, [a], given=[a, b])


def _solve_copy(chain: Chain, a: str, b: str) -> None:
    (x,) = _get(chain, a, more=f"then set {b}")
    _set(chain, [(b, int(x))], f"set {b} {x}")


def _make_follow(rng: random.Random) -> Draft:
    a, b, other = _cells(rng, 3)
    start = {a: int(b), **_filled(rng, b, other)}
    prompt = f"Cell {a} names a cell. What is in that one?"
    return Draft(prompt, start, asks=[a, b], answer=start[b], given=[a])


def _solve_follow(chain: Chain, a: str) -> None:
    (b,) = _get(chain, a, more="it names a cell")
    (x,) = _get(chain, b)
    chain.answer(x, f"{b}: {x}", f"{a}: {b}")


def _make_sum(rng: random.Random) -> Draft:
    a, b, to, other = _cells(rng, 4)
    start = _filled(rng, a, b, other)
    prompt = f"Put the sum of cells {a} and {b} in cell {to}."
    return Draft(prompt, start, {to: start[a] + start[b]}, [a, b], given=[a, b, to])


def _solve_sum(chain: Chain, a: str, b: str, to: str) -> None:
    x, y = map(int, _get(chain, a, b, more=f"then add, then set {to}"))
    _set(chain, [(to, x + y)], _sum(x, y), _back(x, y))


def _make_swap(rng: random.Random) -> Draft:
    a, b, other = _cells(rng, 3)
    start = _filled(rng, a, b, other)
    return Draft(f"Swap cells {a} and {b}.", start, {a: start[b], b: start[a]}, [a, b], given=[a, b])


def _solve_swap(chain: Chain, a: str, b: str) -> None:
    x, y = map(int, _get(chain, a, b, more="then set both"))
    _set(chain, [(a, y), (b, x)], f"set {a} {y}, {b} {x}")


def _make_otherwise(rng: random.Random) -> Draft:
    a, b, to, other = _cells(rng, 4)
    start = _filled(rng, a, b, other)
    asks = [a]
    if rng.random() < 0.5:
        del start[a]
        asks.append(b)
    prompt = f"Copy cell {a} to cell {to}; if it is empty, copy cell {b}."
    return Draft(prompt, start, {to: start.get(a, start[b])}, asks, given=[a, b, to])


def _solve_otherwise(chain: Chain, a: str, b: str, to: str) -> None:
    (x,) = _get(chain, a, more=f"then set {to}")
    if x == "empty":
        (x,) = _get(chain, b, more=f"{a} is empty")
    _set(chain, [(to, int(x))], f"set {to} {x}")


def _make_raise(rng: random.Random) -> Draft:
    a, b, other = _cells(rng, 3)
    start = {a: int(b), **_filled(rng, b, other)}
    more = rng.randint(2, 9)
    prompt = f"Cell {a} names a cell. Add {more} to that one."
    return Draft(prompt, start, {b: start[b] + more}, [a, b], given=[a, more])


def _solve_raise(chain: Chain, a: str, more: int) -> None:
    (b,) = _get(chain, a, more="it names a cell")
    x = int(_get(chain, b, more=f"then add {more}")[0])
    _set(chain, [(b, x + more)], _sum(x, more), _back(x, more))


def _listed(rng: random.Random) -> tuple[str, dict[str, int]]:
    """Two to four cells with different numbers, and one that is empty."""
    to, *cells = _cells(rng, rng.randint(3, 5))
    return to, dict(zip(cells, rng.sample(range(10, 100), len(cells)), strict=True))


def _make_total(rng: random.Random) -> Draft:
    to, start = _listed(rng)
    prompt = f"Put the sum of all cells in cell {to}."
    return Draft(prompt, start, {to: sum(start.values())}, list(start), given=[to])


def _solve_total(chain: Chain, to: str) -> None:
    cells = chain.call([("list", {})], "list", f"then get all, then set {to}")[0].split()
    values = [int(value) for value in _get(chain, *cells)]
    steps = [_sum(sum(values[:n]), values[n]) for n in range(1, len(values))]
    _set(chain, [(to, sum(values))], "\n".join(steps), _sum(*reversed(values)))


def _make_largest(rng: random.Random) -> Draft:
    to, start = _listed(rng)
    prompt = f"Put twice the largest number of all cells in cell {to}."
    return Draft(prompt, start, {to: 2 * max(start.values())}, list(start), given=[to])


def _solve_largest(chain: Chain, to: str) -> None:
    cells = chain.call([("list", {})], "list", f"then get all, then set {to}")[0].split()
    values = [int(value) for value in _get(chain, *cells)]
    x = max(values)
    smaller = " ".join(f"{value}<{x}" for value in values if value < x)
    _set(chain, [(to, 2 * x)], f"largest {x}\n{_sum(x, x)}", smaller)


CELL_GOALS = (
    Goal("read", 1, _make_read, _solve_read),
    Goal("write", 1, _make_write, _solve_write),
    Goal("add", 2, _make_add, _solve_add),
    Goal("copy", 2, _make_copy, _solve_copy),
    Goal("follow", 2, _make_follow, _solve_follow),
    Goal("sum", 3, _make_sum, _solve_sum),
    Goal("swap", 3, _make_swap, _solve_swap),
    Goal("otherwise", 3, _make_otherwise, _solve_otherwise),
    Goal("raise", 3, _make_raise, _solve_raise),
    Goal("total", 4, _make_total, _solve_total),
    Goal("largest", 4, _make_largest, _solve_largest),
)
