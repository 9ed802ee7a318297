"""The science task: answers found a second time from the question's text alone, and units that are more than decoration."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest

from longreach.chat.messages import Conversation, Message
from longreach.tasks.base import Problem
from longreach.tasks.registry import open_task

SI = {
    "s": 1, "min": 60, "m": 1, "km": 1000, "cm": Fraction(1, 100), "g": 1, "kg": 1000, "cm3": 1, "L": 1000, "m/s": 1,
    "m/s2": 1, "N": 1, "kN": 1000, "J": 1, "kJ": 1000, "W": 1, "kW": 1000, "V": 1, "kV": 1000, "mV": Fraction(1, 1000),
    "A": 1, "mA": Fraction(1, 1000), "ohm": 1, "kohm": 1000, "g/cm3": 1, "J/K": 1, "kJ/K": 1000, "K": 1, "C": 1,
    "mol": 1, "mmol": Fraction(1, 1000), "g/mol": 1, "%": 1,
}  # fmt: skip
PRODUCTS = ("s v t", "m d V", "U R I", "P U I", "E P t", "F m a", "W F s", "Q C T", "m M n")


def drawn(topic, level, count=300):
    task, rng = open_task(f"science:topic={topic}:level={level}"), random.Random(f"{topic}{level}")
    return task, [task.draw(rng) for _ in range(count)]


def question(problem) -> str:
    return problem.conversation.messages[0].content


def says(task, problem, content) -> bool:
    return task.verify(problem, (Message("assistant", content, reasoning=""),)).is_right


def read(text):
    """What is given by name, in base units (a kilogram counts 1 in forces), what is asked, and the text before it."""
    given, _, asked = text.rpartition(": ")
    symbol, unit = re.fullmatch(r"(\w+%?) in (\S+), with unit\?", asked).groups()
    found = re.findall(r"(\w+)=(\d+) ([^\s,]+)", given)
    values = {name: Fraction(int(number)) * SI[u] for name, number, u in found if u != "to"}
    if {"m", "a"} & set(values) and "kg" in given and "F" in (symbol, *values):
        values = {name: value / 1000 if name == "m" else value for name, value in values.items()}
    return values, symbol, unit, given


@pytest.mark.parametrize("level", [1, 2])
def test_one_formula_gives_the_answer(level):
    task, problems = drawn("quantities", level)
    for problem in problems:
        values, symbol, unit, _ = read(question(problem))
        (law,) = [law.split() for law in PRODUCTS if set(law.split()) == {symbol, *values}]
        product, first, second = law
        if symbol == product:
            expected = values[first] * values[second]
        else:
            expected = values[product] / values[second if symbol == first else first]
        size = 1 if law == ["F", "m", "a"] and symbol == "m" else SI[unit]
        assert says(task, problem, f"{expected / size} {unit}"), question(problem)
        assert not says(task, problem, f"{expected / size + 1} {unit}")


def second_opinion(text):
    """The answer to a question of two formulas, in base units."""
    values, symbol, _, given = read(text)
    if symbol == "s":
        return sum(int(v) * int(t) * 60 for v, t in re.findall(r"(\d+) m/s for (\d+) min", given))
    if series := re.search(r"R=(\d+) ohm \+ (\d+) ohm", given):
        return values["U"] ** 2 / (int(series[1]) + int(series[2]))
    if block := re.search(r"block (\d+) (\d+) (\d+) cm", given):
        return int(block[1]) * int(block[2]) * int(block[3]) * values["d"]
    if pushed := re.search(r"v=(\d+) to (\d+) m/s", given):
        mass = int(re.search(r"m=(\d+) kg", given)[1])
        return mass * (int(pushed[2]) - int(pushed[1])) / values["t"]
    if symbol == "t":
        return values["C"] * values["T"] / values["P"]
    return values["F"] * values["s"] / values["t"] if symbol == "P" else values["U"] * values["I"] * values["t"]


def test_two_formulas_give_the_answer():
    task, problems = drawn("quantities", 3)
    kinds = set()
    for problem in problems:
        _, symbol, unit, given = read(question(problem))
        kinds.add((symbol, re.sub(r"\d+", "#", " ".join(sorted(given)))[:12]))
        assert says(task, problem, f"{Fraction(second_opinion(question(problem))) / SI[unit]} {unit}"), question(
            problem
        )
    assert {symbol for symbol, _ in kinds} == {"s", "P", "t", "E", "F", "m"}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_mixtures_give_the_answer(level):
    task, problems = drawn("mixtures", level)
    for problem in problems:
        text = question(problem)
        parts = [(int(a), int(b)) for a, b in re.findall(r"(\d+) (?:k?g) of (\d+)(?:%| C)", text)]
        assert len(parts) == (1 if level == 1 else 2)
        total = sum(Fraction(mass * share) for mass, share in parts)
        if level == 3:
            expected, unit = total / sum(mass for mass, _ in parts), "C" if "kg" in text else "%"
        else:
            expected, unit = total / 100, "g"
        assert f"in {unit}, with unit?" in text
        assert says(task, problem, f"{expected} {unit}"), text


def effect_of(text):
    """By multiplying signs along every path, whatever the order of the sentences."""
    links = [(a, 1 if verb == "raises" else -1, b) for a, verb, b in re.findall(r"(\w) (raises|lowers) (\w)\.", text)]
    start, change, asked = re.search(r" (\w) (up|down): (\w) up, down, same\?$", text).groups()

    def signs(name):
        return [1] if name == start else [sign * before for a, sign, b in links if b == name for before in signs(a)]

    (sign,) = set(signs(asked)) or {0}
    return {0: "same", 1: change, -1: "down" if change == "up" else "up"}[sign]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_causes_give_the_effect(level):
    task, problems = drawn("causes", level, 1000)
    effects = []
    for problem in problems:
        effects.append(effect_of(question(problem)))
        assert problem.answer == {"effect": effects[-1]}, question(problem)
        for word in ("up", "down", "same"):
            assert says(task, problem, word) == (word == effects[-1])
    assert (effects.count("same") == 0) if level == 1 else (100 < effects.count("same") < 350)
    assert min(effects.count("up"), effects.count("down")) > 300


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_effect_traced_back_from_its_end_is_the_one_traced_forward(level):
    task, problems = drawn("causes", level)
    for problem in problems:
        (message,) = task.demonstrate(problem, "think-max", random.Random(0))
        forward, _, back = message.reasoning.partition("\ncheck:")
        effect = problem.answer["effect"]
        assert forward.endswith(f"{problem.extra['asked']} {effect}") and back.endswith(f":{effect};ok")
        if effect != "same":
            number = int(re.search(r"(\d+) lowers:", back)[1])
            assert number == len(re.findall(r"from \w lowers", back))
            assert (effect == problem.extra["change"]) == (number % 2 == 0)


@pytest.mark.parametrize("topic", ["quantities", "mixtures"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_equation_of_a_worked_calculation_is_true(topic, level):
    task, problems = drawn(topic, level, 150)
    for problem in problems:
        (message,) = task.demonstrate(problem, "think-max", random.Random(0))
        found = re.findall(r"(?<![\d=])(\d+)([-+*/])(\d+)=(\d+)(?:r(\d+))?", message.reasoning)
        assert found
        for left, sign, right, result, remainder in found:
            if sign == "/":
                assert int(left) == int(result) * int(right) + int(remainder or 0), message.reasoning
            else:
                assert eval(f"{left}{sign}{right}") == int(result), message.reasoning
        worked = message.reasoning.partition("\ncheck:")[0]
        assert re.search(r"\d+$", worked)[0] == str(problem.answer["value"])


def test_worked_solutions_read_like_this():
    task = open_task("science")
    asked = Conversation((Message("user", "v=12 m/s, t=3 min: s in m, with unit?"),))
    steps = [["t", 3, "*", 60], ["s", 12, "*", 180]]
    problem = Problem("science", asked, {"symbol": "s", "value": 2160, "unit": "m"}, 2, {"steps": steps})
    (message,) = task.demonstrate(problem, "think-max", random.Random(0))
    assert message.content == "2160 m"
    assert message.reasoning == (
        "t:3*60=180\ns:12*180:2*8=16;1*8=8:96;2*1=2:116;1*1=1:216:2160\n"
        "check:60*3=180\n180*12:8*2=16;1*2=2:36;8*1=8:116;1*1=1:216:2160;ok"
    )
    links = [["B", "lowers", "C"], ["A", "raises", "B"]]
    extra = {"links": links, "start": "A", "change": "up", "asked": "C"}
    problem = Problem("science", asked, {"effect": "down"}, 1, extra)
    (message,) = task.demonstrate(problem, "think-max", random.Random(0))
    assert message.reasoning == (
        "A up;A raises B up;B lowers C down\ncheck:C from B lowers;B from A raises;1 lowers:down;ok"
    )


QUANTITY = Problem(
    "science", Conversation((Message("user", "v=12 m/s, t=3 min: s in m, with unit?"),)),
    {"symbol": "s", "value": 2160, "unit": "m"},
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["2160 m", "2160m", "2,160 m", "2.16 km", "216000 cm", "2160.0 m", "s=2160 m", "s = 2.16 km.", "$2160\\,\\text{m}$",
     "\\boxed{2160\\text{ m}}", "**2160 m**", "The answer is 2160 m.", "= 2160 m", "2 160 m"],
)  # fmt: skip
def test_the_number_with_its_unit_or_an_equal_one_is_accepted(text):
    assert says(open_task("science"), QUANTITY, text)


@pytest.mark.parametrize(
    "text",
    ["2160", "m", "2160 s", "2160 km", "2.16 m", "2160 M", "2160 m/s", "2160 m2", "2160 mm", "v=2160 m", "2160 m 5", "-2160 m",
     "about 2160 m", "2160 m or 2161 m", "2160 meters or so", "m 2160", "2161 m", "2160 % m"],
)  # fmt: skip
def test_another_number_unit_or_none_is_refused(text):
    verdict = open_task("science").verify(QUANTITY, (Message("assistant", text, reasoning=""),))
    assert not verdict.is_right and verdict.reward == 0
    assert verdict.why.startswith("expected 2160 m, got ")


@pytest.mark.parametrize(
    ("unit", "value", "same", "other"),
    [
        ("J", 3600, ("3.6 kJ", "1 Wh", "3600 Ws", "3600 J"), ("3600 W", "1 kWh", "3600 N")),
        ("kg", 24, ("24000 g", "0.024 t"), ("24 g", "24 N")),
        ("ohm", 12, ("12 Ω", "12 Ω", "0.012 kohm"), ("12 V", "12 A")),
        ("C", 50, ("50 °C", "50°C", "50 C"), ("50 K", "50")),
        ("%", 8, ("8%", "8 %", "8\\%"), ("8", "0.08 g")),
        ("m/s2", 5, ("5 m/s²", "5 m/s^2", "5 N/kg"), ("5 m/s",)),
        ("km", 18, ("18000 m", "18 km"), ("18 m", "18 km/h")),
    ],
)
def test_units_of_one_kind_are_converted_and_others_are_not(unit, value, same, other):
    task = open_task("science")
    problem = Problem("science", QUANTITY.conversation, {"symbol": "x", "value": value, "unit": unit})
    assert all(says(task, problem, text) for text in same)
    assert not any(says(task, problem, text) for text in other)


def test_an_effect_is_one_word():
    task = open_task("science")
    problem = Problem("science", QUANTITY.conversation, {"effect": "down"})
    assert all(says(task, problem, text) for text in ("down", "Down.", "**down**", "The answer is down."))
    assert not any(says(task, problem, text) for text in ("up", "up, down, same", "not down", "down or up", "downs"))
