"""Science in a few tokens: quantities with units, mixtures, causes and effects.

    --task science                          all topics, all levels
    --task science:topic=causes:level=2

    topic        level 1                   level 2                        level 3
    quantities   one formula               one formula, units to change   two formulas, units to change
    mixtures     a share of one mass       what is dissolved in two       concentration or temperature of a mixture
    causes       two links, in order       three links, in any order      four links and two that lead elsewhere

    v=12 m/s, t=3 min: s in m, with unit?          t:3*60=180
                                                   s:12*180:2*8=16;1*8=8:96;2*1=2:116;1*1=1:216:2160        2160 m
    A raises B. B lowers C. A up: C up, down, same?
                                                   A up;A raises B up;B lowers C down                      down

think-max goes on with `check:`: every operation by another one, every effect traced back from its end.

A quantity needs number and unit. Any unit of the same kind is accepted if the value fits (`2.16 km` for `2160 m`), with or
without a space, with the symbol asked for before it (`s = 2160 m`); the number alone is not. What may stand around an answer
is said in `longreach.tasks.answers`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.tasks.answers import MOST_CHARACTERS, bare_answer, read_number, shortened
from longreach.tasks.arithmetic import operate, worked_line
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, read_choices, wrong

TOPICS = ("quantities", "mixtures", "causes")
EFFECTS = ("up", "down", "same")

UNITS: dict[str, dict[str, int | tuple[int, int]]] = {
    "time": {"s": 1, "ms": (1, 1000), "min": 60, "h": 3600},
    "length": {"m": 1, "mm": (1, 1000), "cm": (1, 100), "km": 1000},
    "mass": {"g": 1, "mg": (1, 1000), "kg": 1000, "t": 1_000_000},
    "volume": {"cm3": 1, "mL": 1, "ml": 1, "L": 1000, "l": 1000, "dm3": 1000, "m3": 1_000_000},
    "speed": {"m/s": 1, "km/s": 1000, "km/h": (5, 18), "m/min": (1, 60)},
    "acceleration": {"m/s2": 1, "N/kg": 1},
    "force": {"N": 1, "mN": (1, 1000), "kN": 1000},
    "energy": {"J": 1, "kJ": 1000, "MJ": 1_000_000, "Nm": 1, "Ws": 1, "Wh": 3600, "kWh": 3_600_000},
    "power": {"W": 1, "mW": (1, 1000), "kW": 1000, "MW": 1_000_000, "J/s": 1, "VA": 1},
    "voltage": {"V": 1, "mV": (1, 1000), "kV": 1000},
    "current": {"A": 1, "mA": (1, 1000), "kA": 1000},
    "resistance": {"ohm": 1, "kohm": 1000, "V/A": 1},
    "density": {"g/cm3": 1, "g/mL": 1, "kg/L": 1, "t/m3": 1, "kg/m3": (1, 1000), "g/L": (1, 1000)},
    "heat capacity": {"J/K": 1, "kJ/K": 1000},
    "temperature difference": {"K": 1},
    "temperature": {"C": 1},
    "amount": {"mol": 1, "mmol": (1, 1000), "kmol": 1000},
    "molar mass": {"g/mol": 1, "kg/kmol": 1, "kg/mol": 1000},
    "share": {"%": 1},
}
"""What each unit is in the first one of its kind; a pair is a fraction."""

_UNITS = {
    unit: (kind, Fraction(*size) if isinstance(size, tuple) else Fraction(size))
    for kind, sizes in UNITS.items()
    for unit, size in sizes.items()
}


class Science(GeneratedTask):
    """Three topics. The answer is {"symbol", "value", "unit"} or {"effect"}; `extra` holds what worked solutions need."""

    kind = "science"
    domain = "science"
    summary = "quantities with units, mixtures, chains of cause and effect"
    all_levels = (1, 2, 3)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        self.topics = read_choices(self.kind, "topic", options.get("topic"), TOPICS)

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("topic",)

    def make(self, rng: random.Random, level: int) -> Problem:
        topic = rng.choice(self.topics)
        make = {"quantities": _quantities, "mixtures": _mixtures, "causes": _causes}[topic]
        question = None
        while question is None:
            try:
                question, answer, extra = make(rng, level)
            except _Unfit:
                continue
        return Problem(self.kind, Conversation((Message("user", question),)), answer, level, {"topic": topic, **extra})

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        message = final_message(reply)
        if message is None or not message.content.strip():
            return wrong("no answer")
        given = bare_answer(message.content)
        if "effect" in problem.answer:
            is_right, expected = given.lower() == problem.answer["effect"], problem.answer["effect"]
        else:
            expected = f"{problem.answer['value']} {problem.answer['unit']}"
            is_right = _is_quantity(given, problem.answer)
        return RIGHT if is_right else wrong(f"expected {expected}, got {shortened(message.content)!r}")

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        is_effect = "effect" in problem.answer
        reasoning = None
        if mode != "non-think":
            reasoning = _traced(problem.extra) if is_effect else _worked(problem.extra["steps"])
            if mode == "think-max":
                check = _traced_back(problem.extra) if is_effect else _recomputed(problem.extra["steps"])
                reasoning += f"\ncheck:{check};ok"
        content = problem.answer["effect"] if is_effect else f"{problem.answer['value']} {problem.answer['unit']}"
        return (Message("assistant", content, reasoning=reasoning),)


# ---- judging --------------------------------------------------------------------------------------------------------

_SPELLINGS = {"\u03a9": "ohm", "\u2126": "ohm", "°": "", "²": "2", "³": "3", "^": "", "·": "", "\\,": " ", "\\%": "%"}
_QUANTITY = re.compile(r"([^A-Za-z%]+?)\s*([A-Za-z%][A-Za-z0-9/%]*)")


def _is_quantity(given: str, answer: Mapping[str, Any]) -> bool:
    """Whether the text is this number with its unit, or the same in another unit of its kind."""
    if len(given) > MOST_CHARACTERS:  # also: the patterns below take the square of the length
        return False
    for spelling, plain in _SPELLINGS.items():
        given = given.replace(spelling, plain)
    given = re.sub(rf"\A{re.escape(answer['symbol'])}\s*=\s*", "", given.strip())
    found = _QUANTITY.fullmatch(given)
    if found is None:
        return False
    number, unit = read_number(found[1]), found[2]
    if number is None or unit not in _UNITS:
        return False
    kind, size = _UNITS[unit]
    expected_kind, expected_size = _UNITS[answer["unit"]]
    return kind == expected_kind and number * size == answer["value"] * expected_size


# ---- calculations ---------------------------------------------------------------------------------------------------

LARGEST = 99_999


class _Unfit(Exception):
    """Drawn numbers that do not make a question: draw again."""


class _Calculation:
    """The steps of a question as they are worked out: [[name, left, sign, right], …].

    Every value on the way is a whole number from 1 to LARGEST, and what is divided by has one digit besides zeros.
    """

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []

    def __call__(self, name: str, left: int, sign: str, right: int) -> int:
        if sign == "/" and (left % right or right // _zeros(right) > 9):
            raise _Unfit
        value = operate(left, sign, right)
        if not 1 <= value <= LARGEST:
            raise _Unfit
        self.steps.append([name, left, sign, right])
        return value


def _zeros(number: int) -> int:
    """The power of ten that the number ends with."""
    return 10 ** (len(str(number)) - len(str(number).rstrip("0")))


def _line(left: int, sign: str, right: int) -> str:
    """As `worked_line`, with the zeros at the ends of factors and divisors left out while it is worked."""
    result = operate(left, sign, right)
    zeros_left, zeros_right = (_zeros(left), _zeros(right)) if sign in "*/" else (1, 1)
    if sign == "/":
        zeros_left = zeros_right = min(zeros_left, zeros_right)
    if zeros_left * zeros_right == 1:
        return worked_line(left, sign, right)
    core_left, core_right = left // zeros_left, right // zeros_right
    if core_right == 1 or (core_left < 10 and core_right < 10):
        return f"{left}{sign}{right}={result}"
    worked = worked_line(core_left, sign, core_right)
    _, _, worked = worked.partition(":")
    core = operate(core_left, sign, core_right)
    return f"{left}{sign}{right}:{worked}" + (f":{result}" if result != core else "")


def _worked(steps: Sequence[Sequence[Any]]) -> str:
    return "\n".join(f"{name}:{_line(*step)}" for name, *step in steps)


def _recomputed(steps: Sequence[Sequence[Any]]) -> str:
    lines = []
    for _, left, sign, right in steps:
        if sign in "+*":
            lines.append(_line(right, sign, left))
        else:
            lines.append(_line(operate(left, sign, right), "+" if sign == "-" else "*", right))
    return "\n".join(lines)


# ---- quantities -----------------------------------------------------------------------------------------------------

_LAWS: tuple[tuple[tuple[str, str], tuple[str, str], tuple[str, str]], ...] = (
    (("s", "m"), ("v", "m/s"), ("t", "s")),
    (("m", "g"), ("d", "g/cm3"), ("V", "cm3")),
    (("U", "V"), ("R", "ohm"), ("I", "A")),
    (("P", "W"), ("U", "V"), ("I", "A")),
    (("E", "J"), ("P", "W"), ("t", "s")),
    (("F", "N"), ("m", "kg"), ("a", "m/s2")),
    (("W", "J"), ("F", "N"), ("s", "m")),
    (("Q", "J"), ("C", "J/K"), ("T", "K")),
    (("m", "g"), ("M", "g/mol"), ("n", "mol")),
)
"""The first is the product of the other two, in these units."""

_LARGER = {"s": ("min", 60), "m": ("km", 1000), "g": ("kg", 1000), "cm3": ("L", 1000), "V": ("kV", 1000),
           "W": ("kW", 1000), "J": ("kJ", 1000), "N": ("kN", 1000), "ohm": ("kohm", 1000), "J/K": ("kJ/K", 1000)}  # fmt: skip
_SMALLER = {"A": ("mA", 1000), "mol": ("mmol", 1000), "m": ("cm", 100), "V": ("mV", 1000)}

_Made = tuple[str, dict[str, Any], dict[str, Any]]


def _quantities(rng: random.Random, level: int) -> _Made:
    if level < 3:
        return _one_law(rng, changes=level == 2)
    return rng.choice(_TWO_LAWS)(rng)


def _one_law(rng: random.Random, changes: bool) -> _Made:
    """Two quantities of a law are given, the third is asked; `changes`: one of them is in another unit."""
    law = rng.choice(_LAWS)
    asked = rng.randrange(3)
    changed = rng.choice([part for part in range(3) if _other_units(law[part][1])]) if changes else None
    calculation = _Calculation()
    if asked == 0:
        values = {1: rng.randrange(2, 100), 2: rng.randrange(2, 100)}
    else:
        given = rng.randrange(2, 10) * rng.choice((1, 1, 10))
        values = {0: given * rng.randrange(2, 100), 3 - asked: given}
    texts, last_unit = [], law[asked][1]
    for part, value in list(values.items()):
        symbol, unit = law[part]
        if part == changed:
            value, unit, base = _in_other_unit(rng, calculation, symbol, unit, value)
            values[part] = base
        texts.append(f"{symbol}={value} {unit}")
    symbol = law[asked][0]
    if asked == 0:
        value = calculation(symbol, values[1], "*", values[2])
    else:
        value = calculation(symbol, values[0], "/", values[3 - asked])
    if changed == asked:
        last_unit, size = rng.choice(_other_units(last_unit))
        value = calculation(symbol, value, "/" if size > 0 else "*", abs(size))
    return _asked(rng, texts, symbol, value, last_unit, calculation)


def _other_units(unit: str) -> list[tuple[str, int]]:
    """(unit, how many of ours make one of it); negative: how many of it make one of ours."""
    found = [_LARGER[unit]] if unit in _LARGER else []
    return found + [(name, -size) for name, size in [_SMALLER.get(unit, ("", 0))] if size]


def _in_other_unit(
    rng: random.Random, calculation: _Calculation, symbol: str, unit: str, value: int
) -> tuple[int, str, int]:
    """The number to be shown, its unit, and what it is in `unit`, with the step that finds out.

    In a larger unit the number itself is shown, so that the base value is larger; in a smaller unit it is blown up.
    """
    other, size = rng.choice(_other_units(unit))
    if size > 0:
        return value, other, calculation(symbol, value, "*", size)
    return value * -size, other, calculation(symbol, value * -size, "/", -size)


def _asked(
    rng: random.Random, texts: list[str], symbol: str, value: int, unit: str, calculation: _Calculation,
    shuffles: bool = True,
) -> _Made:  # fmt: skip
    if shuffles:
        rng.shuffle(texts)
    question = f"{', '.join(texts)}: {symbol} in {unit}, with unit?"
    return question, {"symbol": symbol, "value": value, "unit": unit}, {"steps": calculation.steps}


def _legs(rng: random.Random) -> _Made:
    do, texts, parts = _Calculation(), [], []
    for part in "12":
        speed, minutes = rng.randrange(2, 30), rng.randrange(2, 10)
        texts.append(f"{speed} m/s for {minutes} min")
        parts.append(do(f"s{part}", speed, "*", do(f"t{part}", minutes, "*", 60)))
    return _asked(rng, texts, "s", do("s", *_plus(parts)), "m", do, shuffles=False)


def _plus(parts: Sequence[int]) -> tuple[int, str, int]:
    return parts[0], "+", parts[1]


def _series(rng: random.Random) -> _Made:
    do, first, second = _Calculation(), rng.randrange(2, 60), rng.randrange(2, 60)
    both = do("R", first, "+", second)
    voltage = both * rng.randrange(2, 30)
    current = do("I", voltage, "/", both)
    texts = [f"R={first} ohm + {second} ohm", f"U={voltage} V"]
    return _asked(rng, texts, "P", do("P", voltage, "*", current), "W", do)


def _heating(rng: random.Random) -> _Made:
    do = _Calculation()
    power, capacity, rise = rng.randrange(2, 10), rng.randrange(2, 100) * 100, rng.randrange(2, 100)
    heat = do("Q", capacity, "*", rise)
    time = do("t", heat, "/", do("P", power, "*", 1000))
    return _asked(rng, [f"P={power} kW", f"C={capacity} J/K", f"T={rise} K"], "t", time, "s", do)


def _lifting(rng: random.Random) -> _Made:
    do = _Calculation()
    force, way, time = rng.randrange(2, 100) * 10, rng.randrange(2, 100), rng.randrange(2, 10) * rng.choice((1, 10))
    work = do("W", force, "*", way)
    return _asked(rng, [f"F={force} N", f"s={way} m", f"t={time} s"], "P", do("P", work, "/", time), "W", do)


def _used(rng: random.Random) -> _Made:
    do = _Calculation()
    voltage, current, minutes = rng.randrange(2, 100), rng.randrange(2, 10), rng.randrange(2, 60)
    power = do("P", voltage, "*", current)
    energy = do("E", power, "*", do("t", minutes, "*", 60))
    return _asked(rng, [f"U={voltage} V", f"I={current} A", f"t={minutes} min"], "E", energy, "J", do)


def _pushing(rng: random.Random) -> _Made:
    do = _Calculation()
    mass, start, time = rng.randrange(2, 100), rng.randrange(2, 50), rng.randrange(2, 10)
    end = start + time * rng.randrange(2, 10)
    gained = do("v", end, "-", start)
    acceleration = do("a", gained, "/", time)
    texts = [f"m={mass} kg", f"v={start} to {end} m/s", f"t={time} s"]
    return _asked(rng, texts, "F", do("F", mass, "*", acceleration), "N", do)


def _block(rng: random.Random) -> _Made:
    do = _Calculation()
    a, b, c, density = (rng.randrange(2, 10) * rng.choice((1, 10)) for _ in range(4))
    density = density // _zeros(density)
    volume = do("V", do("V", a, "*", b), "*", c)
    mass = do("m", do("m", volume, "*", density), "/", 1000)
    return _asked(rng, [f"block {a} {b} {c} cm", f"d={density} g/cm3"], "m", mass, "kg", do, shuffles=False)


_TWO_LAWS: tuple[Callable[[random.Random], _Made], ...] = (
    _legs, _series, _heating, _lifting, _used, _pushing, _block,
)  # fmt: skip


# ---- mixtures -------------------------------------------------------------------------------------------------------


def _mixtures(rng: random.Random, level: int) -> _Made:
    do = _Calculation()
    if level == 1:
        mass, percent = rng.randrange(2, 100) * 100, rng.randrange(2, 100)
        salt = do("salt", do("1%", mass, "/", 100), "*", percent)
        return _asked(rng, [f"{mass} g of {percent}% salt"], "salt", salt, "g", do)
    masses = [rng.randrange(2, 10) if level == 2 else rng.randrange(1, 9) for _ in range(2)]
    if level == 3 and rng.random() < 0.5:
        degrees = [rng.randrange(2, 99) for _ in range(2)]
        texts = [f"{mass} kg of {degree} C" for mass, degree in zip(masses, degrees, strict=True)]
        parts = [do("mT", *pair) for pair in zip(masses, "**", degrees, strict=True)]
        total = do("mT", *_plus(parts))
        return _asked(rng, texts, "T", do("T", total, "/", do("m", *_plus(masses))), "C", do, shuffles=False)
    percents = [rng.randrange(2, 99) for _ in range(2)]
    texts = [f"{mass}00 g of {percent}% salt" for mass, percent in zip(masses, percents, strict=True)]
    parts = [
        do("salt", do("1%", mass * 100, "/", 100), "*", percent) for mass, percent in zip(masses, percents, strict=True)
    ]
    salt = do("salt", *_plus(parts))
    if level == 2:
        return _asked(rng, texts, "salt", salt, "g", do, shuffles=False)
    mass = do("1%", do("m", masses[0] * 100, "+", masses[1] * 100), "/", 100)
    return _asked(rng, texts, "salt", do("salt", salt, "/", mass), "%", do, shuffles=False)


# ---- causes ---------------------------------------------------------------------------------------------------------

_NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_VERBS = ("raises", "lowers")


def _causes(rng: random.Random, level: int) -> _Made:
    """A chain of links, at level 3 with two more links that leave it; the effect of a change somewhere in it is asked.

    The change begins at the second name in one of four questions from level 2 on, and what is asked may then be the first:
    effects do not run backwards, so it stays the same.
    """
    names = rng.sample(_NAMES, level + 4)
    chain, others = names[: level + 2], names[level + 2 :]
    links = [[cause, rng.choice(_VERBS), effect] for cause, effect in pairwise(chain)]
    if level == 3:
        links += [[rng.choice(chain[:-1]), rng.choice(_VERBS), others[0]],
                  [others[1], rng.choice(_VERBS), rng.choice(chain[1:])]]  # fmt: skip
    start, asked = chain[0], chain[-1]
    if level > 1:
        rng.shuffle(links)
        if rng.random() < 0.25:
            start, asked = chain[1], rng.choice(chain[:1] + (others if level == 3 else []))
    change = rng.choice(EFFECTS[:2])
    sentences = " ".join(f"{cause} {verb} {effect}." for cause, verb, effect in links)
    extra = {"links": links, "start": start, "change": change, "asked": asked}
    return (f"{sentences} {start} {change}: {asked} {', '.join(EFFECTS)}?",
            {"effect": _effects(extra).get(asked, "same")}, extra)  # fmt: skip


def _effects(extra: Mapping[str, Any]) -> dict[str, str]:
    """What changes and how, in the order in which it is found."""
    effects = {extra["start"]: extra["change"]}
    for cause, verb, effect in _links_in_order(extra["links"], extra["start"]):
        effects[effect] = effects[cause] if verb == "raises" else _opposite(effects[cause])
    return effects


def _links_in_order(links: Sequence[Sequence[str]], start: str) -> list[Sequence[str]]:
    """The links that a change of `start` runs along, each after the one that leads to it."""
    reached, found = [start], []
    for name in reached:
        for link in links:
            if link[0] == name:
                found.append(link)
                reached.append(link[2])
    return found


def _opposite(change: str) -> str:
    return "down" if change == "up" else "up"


def _traced(extra: Mapping[str, Any]) -> str:
    """Along the links from what changes, until what is asked is reached or nothing more is."""
    effects = _effects(extra)
    parts = [f"{extra['start']} {extra['change']}"]
    for cause, verb, effect in _links_in_order(extra["links"], extra["start"]):
        parts.append(f"{cause} {verb} {effect} {effects[effect]}")
        if effect == extra["asked"]:
            return ";".join(parts)
    return ";".join([*parts, f"{extra['asked']} same"])


def _traced_back(extra: Mapping[str, Any]) -> str:
    """From what is asked back along its causes; an even number of `lowers` keeps the direction."""
    effects, name, parts, lowers = _effects(extra), extra["asked"], [], 0
    while name != extra["start"]:
        links = [link for link in extra["links"] if link[2] == name]
        if not links:
            return ";".join([*parts, f"{name} free:same"])
        # Of two causes the one that changes leads back to the start.
        cause, verb, _ = max(links, key=lambda link: link[0] in effects)
        parts.append(f"{name} from {cause} {verb}")
        name, lowers = cause, lowers + (verb == "lowers")
    return ";".join([*parts, f"{lowers} lowers:{effects[extra['asked']]}"])
