"""A world of boxes that hold a few things each: searching, sorting, and another try where a box is full.

    look(box)           "red cup, blue pen", or "nothing"
    move(thing, box)    "ok", or "error: F is full"

A prompt names the boxes there are, by three or four letters of the alphabet.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

from longreach.tasks.agent_world import Chain, Draft, Goal, World

COLORS = ("red", "blue", "green")
NOUNS = (
    "cup",
    "pen",
    "hat",
    "key",
    "map",
    "pin",
    "bag",
    "can",
    "fan",
    "mug",
    "net",
    "pot",
    "rug",
    "toy",
    "jar",
    "bell",
)
NOWHERE = "nowhere"
_WORD = re.compile(r"[A-Za-z]+")


class Boxes(World):
    """State: boxes by thing. Moving a thing to where it is changes nothing, even if that box is full."""

    parameters: ClassVar = {"look": {"box": "string"}, "move": {"thing": "string", "box": "string"}}

    def __init__(self, extra: Mapping[str, Any]) -> None:
        super().__init__(extra)
        self.boxes: Sequence[str] = extra["boxes"]
        self.room: int = extra["room"]

    def act(self, name: str, arguments: Mapping[str, Any]) -> str:
        box = arguments["box"]
        if box not in self.boxes:
            return f"error: no such box; there are {' '.join(self.boxes)}"
        inside = [thing for thing, place in self.state.items() if place == box]
        if name == "look":
            self.asked.add(box)
            return ", ".join(inside) or "nothing"
        if arguments["thing"] not in self.state:
            return "error: no such thing"
        self.asked.add(box)
        if self.state[arguments["thing"]] != box:
            if len(inside) == self.room:
                return f"error: {box} is full"
            self.state[arguments["thing"]] = box
        return "ok"

    def agrees(self, content: str, answer: Any) -> bool:
        """A box: the last one named. Things: these are named and no other."""
        words = _WORD.findall(content)
        if isinstance(answer, str):
            places = [word for word in words if word in self.boxes or word.lower() == NOWHERE]
            return bool(places) and places[-1] in (answer, answer.capitalize())
        return bool(words) and {word.lower() for word in words} & set(NOUNS) == {thing.split()[-1] for thing in answer}


# ---- turns ----------------------------------------------------------------------------------------------------------


def _look(chain: Chain, *boxes: str, more: str = "") -> list[list[str]]:
    """The things in each of these boxes."""
    said = chain.call([("look", {"box": box}) for box in boxes], f"look {' '.join(boxes)}", more)
    return [[] if inside == "nothing" else inside.split(", ") for inside in said]


def _move(chain: Chain, things: Sequence[str], box: str, otherwise: str | None = None) -> None:
    """Move things to a box, or where it is full to another; look there where it is careful, and end."""
    for to in (box, otherwise):
        if to is None or not things:
            continue
        results = _moves(chain, things, to)
        things = [thing for thing, result in zip(things, results, strict=True) if result != "ok"]
        box = to
    if chain.is_careful:
        chain.call([("look", {"box": box})], "look again")
    chain.answer("done", "ok")


def _moves(chain: Chain, things: Iterable[str], box: str) -> list[str]:
    things = list(things)
    return chain.call(
        [("move", {"thing": thing, "box": box}) for thing in things], f"move {', '.join(things)} to {box}"
    )


# ---- goals ----------------------------------------------------------------------------------------------------------


class _Scene:
    """Boxes that are being filled.

    Attributes:
        boxes: their letters, in a random order that has nothing to do with the prompt's.
    """

    def __init__(self, rng: random.Random, num_boxes: int, room: int, is_colored: bool) -> None:
        self.rng, self.room, self.is_colored = rng, room, is_colored
        self.boxes = rng.sample(ascii_uppercase, num_boxes)
        self.start: dict[str, str] = {}
        self._nouns = rng.sample(NOUNS, len(NOUNS))

    def put(self, box: str, count: int, colors: Sequence[str] = COLORS) -> list[str]:
        """Make that many things and put them into a box."""
        made = []
        for _ in range(count):
            noun = self._nouns.pop()
            made.append(f"{self.rng.choice(colors)} {noun}" if self.is_colored else noun)
        self.start.update(dict.fromkeys(made, box))
        return made

    def draft(self, goal: str, changes: Mapping[str, str] | None = None, **more: Any) -> Draft:
        things = list(self.start)
        self.rng.shuffle(things)
        boxes = sorted(self.boxes)
        return Draft(
            f"Boxes {' '.join(boxes)}. {goal}",
            {thing: self.start[thing] for thing in things},
            changes or {},
            more={"boxes": boxes, "room": self.room},
            **more,
        )


def _make_look(rng: random.Random) -> Draft:
    scene = _Scene(rng, 3, 3, is_colored=False)
    a, b, _ = scene.boxes
    things = scene.put(a, rng.randint(0, 3))
    scene.put(b, rng.randint(1, 2))
    return scene.draft(f"What is in {a}?", asks=[a], answer=things, given=[a])


def _solve_look(chain: Chain, a: str) -> None:
    (things,) = _look(chain, a)
    said = ", ".join(things) or "nothing"
    chain.answer(said, f"{a}: {said}", f"asked: {a}")


def _make_move(rng: random.Random) -> Draft:
    scene = _Scene(rng, 3, 3, is_colored=False)
    a, b, _ = scene.boxes
    thing, *_rest = scene.put(a, rng.randint(1, 3))
    scene.put(b, rng.randint(0, 2))
    return scene.draft(f"Move the {thing} to {b}.", {thing: b}, given=[thing, b])


def _solve_move(chain: Chain, thing: str, b: str) -> None:
    _move(chain, [thing], b)


def _make_where(rng: random.Random) -> Draft:
    scene = _Scene(rng, 3, 3, is_colored=False)
    things = [thing for box in scene.boxes for thing in scene.put(box, rng.randint(0, 2))]
    thing = rng.choice(things) if things and rng.random() < 0.8 else scene.put(NOWHERE, 1)[0]
    place = scene.start[thing]
    if place == NOWHERE:
        del scene.start[thing]
    asks = sorted(scene.boxes) if place == NOWHERE else [place]
    return scene.draft(
        f"Where is the {thing}, or is it nowhere?", asks=asks, answer=place, given=[thing, *sorted(scene.boxes)]
    )


def _solve_where(chain: Chain, thing: str, *boxes: str) -> None:
    for number, box in enumerate(boxes):
        (inside,) = _look(chain, box, more=f"not in {' '.join(boxes[:number])}" if number else f"find {thing}")
        if thing in inside:
            return chain.answer(box, f"in {box}", f"{box}: {', '.join(inside)}")
    return chain.answer(NOWHERE, NOWHERE, f"not in {' '.join(boxes)}")


def _make_fit(rng: random.Random) -> Draft:
    scene = _Scene(rng, 3, 3, is_colored=False)
    a, b, c = scene.boxes
    thing, *_rest = scene.put(a, rng.randint(1, 3))
    is_full = rng.random() < 0.5
    scene.put(b, 3 if is_full else rng.randint(0, 2))
    scene.put(c, rng.randint(0, 2))
    goal = f"Move the {thing} to {b}; if it is full, to {c}."
    return scene.draft(goal, {thing: c if is_full else b}, asks=[b], given=[thing, b, c])


def _solve_fit(chain: Chain, thing: str, b: str, c: str) -> None:
    _move(chain, [thing], b, c)


def _make_color(rng: random.Random) -> Draft:
    scene = _Scene(rng, 3, 3, is_colored=True)
    a, b, c = scene.boxes
    color, *others = rng.sample(COLORS, 3)
    (thing,) = scene.put(a, 1, [color])
    scene.put(a, rng.randint(1, 2), others)
    is_full = rng.random() < 0.5
    scene.put(b, 3 if is_full else rng.randint(0, 2))
    scene.put(c, rng.randint(0, 2))
    goal = f"Move the {color} thing in {a} to {b}; if it is full, to {c}."
    return scene.draft(goal, {thing: c if is_full else b}, asks=[a, b], given=[color, a, b, c])


def _solve_color(chain: Chain, color: str, a: str, b: str, c: str) -> None:
    (inside,) = _look(chain, a, more=f"then move the {color} thing")
    _move(chain, _of_color(inside, color), b, c)


def _of_color(things: Iterable[str], color: str) -> list[str]:
    return [thing for thing in things if thing.startswith(color)]


def _make_pour(rng: random.Random) -> Draft:
    scene = _Scene(rng, 3, 4, is_colored=True)
    a, b, c = scene.boxes
    things = scene.put(a, rng.randint(1, 3))
    scene.put(b, rng.randint(0, 1))
    scene.put(c, rng.randint(0, 2))
    return scene.draft(f"Move all things in {a} to {b}.", dict.fromkeys(things, b), asks=[a], given=[a, b])


def _solve_pour(chain: Chain, a: str, b: str) -> None:
    (things,) = _look(chain, a, more=f"then move all to {b}")
    _move(chain, things, b)


def _make_gather(rng: random.Random) -> Draft:
    """All things of a color to one box; where that is full of others, to another, in which there may be some already."""
    scene = _Scene(rng, 4, 4, is_colored=True)
    a, p, b, c = scene.boxes
    color, *others = rng.sample(COLORS, 3)
    wanted = scene.put(a, rng.randint(1, 2), [color])
    scene.put(a, rng.randint(0, 1), others)
    wanted += scene.put(p, rng.randint(0, 1), [color])
    scene.put(p, rng.randint(0, 1), others)
    there = scene.put(c, rng.randint(0, 1), [color])
    is_full = rng.random() < 0.5
    scene.put(b, 4 if is_full else 0, others)
    changes = dict.fromkeys(wanted, c) if is_full else dict.fromkeys([*wanted, *there], b)
    goal = f"Move all {color} things to {b}; if it is full, to {c}."
    sources = sorted((a, p, c))
    return scene.draft(goal, changes, asks=sorted(scene.boxes), given=[color, b, c, *sources])


def _solve_gather(chain: Chain, color: str, b: str, c: str, *sources: str) -> None:
    found = _look(chain, *sources, more=f"then move the {color} things to {b}")
    _move(chain, [thing for inside in found for thing in _of_color(inside, color)], b, c)


BOX_GOALS = (
    Goal("look", 1, _make_look, _solve_look),
    Goal("move", 1, _make_move, _solve_move),
    Goal("where", 2, _make_where, _solve_where),
    Goal("fit", 2, _make_fit, _solve_fit),
    Goal("color", 3, _make_color, _solve_color),
    Goal("pour", 3, _make_pour, _solve_pour),
    Goal("gather", 4, _make_gather, _solve_gather),
)
