"""The arithmetic task: right answers by Python's own reckoning, steps that are small and true, wrong answers refused."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from longreach.chat.messages import Message
from longreach.tasks.arithmetic import FORMS, worked_difference, worked_product, worked_quotient, worked_sum
from longreach.tasks.registry import open_task

CASES = [(form, level) for form in FORMS for level in range(1, 6)]


def drawn(form, level, count=300):
    task, rng = open_task(f"arithmetic:form={form}:level={level}"), random.Random(f"{form}{level}")
    return task, [task.draw(rng) for _ in range(count)]


def question(problem) -> str:
    return problem.conversation.messages[0].content


def says(task, problem, content) -> bool:
    return task.verify(problem, (Message("assistant", content, reasoning=""),)).is_right


@pytest.mark.parametrize(("form", "level"), CASES)
def test_the_answer_is_what_python_makes_of_the_question(form, level):
    task, problems = drawn(form, level)
    for problem in problems:
        assert re.fullmatch(r"[0-9+\-*()]+=", question(problem))
        value = eval(question(problem)[:-1])
        (message,) = task.demonstrate(problem, "non-think", random.Random(0))
        assert problem.answer == value and message.content == str(value)
        assert says(task, problem, str(value))


@pytest.mark.parametrize(
    ("form", "level", "pattern"),
    [
        ("sum", 1, r"\d\d\+\d\d="), ("sum", 2, r"\d\d(\+\d\d){2}="), ("sum", 5, r"\d{4}(\+\d{4}){4}="),
        ("difference", 1, r"\d\d-\d\d="), ("difference", 3, r"\d{3}-\d{3}="), ("difference", 5, r"\d{5}-\d{5}="),
        ("product", 1, r"(\d\d\*\d|\d\*\d\d)="), ("product", 2, r"\d\d\*\d\d="), ("product", 5, r"(\d{4}\*\d{3}|\d{3}\*\d{4})="),
        ("chain", 1, r"[(]*\d[+*-][(]?\d[)]?[+*-][(]?\d[)]*="), ("chain", 3, r"[()]*\d+([+*-][()]*\d+[()]*){3}="),
        ("chain", 5, r"[()]*\d+([+*-][()]*\d+[()]*){5}="),
    ],
)  # fmt: skip
def test_levels_raise_digits_and_steps(form, level, pattern):
    _, problems = drawn(form, level)
    assert all(re.fullmatch(pattern, question(problem)) for problem in problems)


def test_differences_are_negative_from_level_three_on_and_chains_never():
    for level in range(1, 6):
        below = sum(problem.answer < 0 for problem in drawn("difference", level)[1])
        assert below == 0 if level < 3 else 100 < below < 200
        assert all(0 < problem.answer <= 9999 for problem in drawn("chain", level)[1])


def test_chains_need_the_order_of_operations():
    _, problems = drawn("chain", 3)
    from_left_to_right = []
    for problem in problems:
        first, *steps = re.findall(r"[+*-]?\d+", re.sub("[()=]", "", question(problem)))
        value = int(first)
        for step in steps:
            value = eval(f"{value}{step}")
        from_left_to_right.append(value == problem.answer)
    assert sum(from_left_to_right) < len(problems) / 2
    assert all("*" in question(problem) and re.search("[+-]", question(problem)) for problem in problems)


def equations(reasoning):
    """(left, sign, right, result, remainder) of every equation, chained ones (`9+9=18+5=23`) taken apart."""
    for part in re.split(r"[;:\n]", reasoning):
        sides = part.split("=")
        for side, following in pairwise(sides):
            left, sign, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", side).groups()
            result, _, remainder = re.match(r"(\d+)(r(\d+))?", following).groups()
            yield int(left), sign, int(right), int(result), int(remainder or 0)


@pytest.mark.parametrize("mode", ["think-high", "think-max"])
@pytest.mark.parametrize(("form", "level"), CASES)
def test_every_step_of_a_worked_solution_is_true_and_no_more_than_digits_and_a_carry(form, level, mode):
    task, problems = drawn(form, level, 150)
    for problem in problems:
        (message,) = task.demonstrate(problem, mode, random.Random(0))
        steps = list(equations(message.reasoning))
        assert steps
        for left, sign, right, result, remainder in steps:
            assert right <= 9 and left <= {"+": 90, "-": 19, "*": 9, "/": 89}[sign], (left, sign, right)
            if sign == "/":
                assert left == result * right + remainder and remainder < right
            else:
                assert result == eval(f"{left}{sign}{right}")
        worked, _, check = message.reasoning.partition("\ncheck:")
        assert re.search(r"-?\d+$", worked)[0] == str(problem.answer)
        assert (mode == "think-max") == check.endswith(";ok")


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (worked_sum([37, 48, 56]), "7+8=15+6=21;2+3=5+4=9+5=14:141"),
        (worked_sum([99, 2]), "9+2=11;1+9=10:101"),
        (worked_sum([4, 3]), "4+3=7"),
        (worked_difference(523, 168), "13-8=5;12-6=6-1=5;5-1=4-1=3:355"),
        (worked_difference(168, 523), "523-168:13-8=5;12-6=6-1=5;5-1=4-1=3:355:-355"),
        (worked_difference(1000, 1), "10-1=9;10-1=9;10-1=9;1-1=0:999"),
        (worked_difference(66, 60), "6-0=6;6-6=0:6"),
        (worked_product(37, 48), "7*8=56;3*8=24:296;7*4=28:576;3*4=12:1776"),
        (worked_product(7, 8), "7*8=56"),
        (worked_product(30, 4), "0*4=0;3*4=12:120"),
        (worked_quotient(216, 6), "21/6=3r3;36/6=6r0:36"),
        (worked_quotient(8, 4), "8/4=2r0:2"),
    ],
)
def test_worked_solutions_read_like_this(made, text):
    assert made == text


def test_the_second_route_of_each_form_reads_like_this():
    checks = {}
    for form, level in (("sum", 2), ("difference", 2), ("product", 2), ("chain", 2)):
        task, problems = drawn(form, level, 1)
        (message,) = task.demonstrate(problems[0], "think-max", random.Random(0))
        checks[form] = (question(problems[0]), message.reasoning.partition("check:")[2])
    numbers = re.findall(r"\d+", checks["sum"][0])
    assert checks["sum"][1].startswith("+".join(number[-1] for number in reversed(numbers))[:3])
    larger = re.findall(r"\d+", checks["difference"][0])[0]
    assert checks["difference"][1].endswith(f":{larger};ok")
    left, right = map(int, re.findall(r"\d+", checks["product"][0]))
    assert f"\n{left % 9}*{right % 9}=" in checks["product"][1]
    assert checks["product"][1].endswith(f":{left * right % 9};ok")
    start = checks["chain"][1].removesuffix(";ok").rpartition(":")[2].rpartition("=")[2]
    assert start in re.findall(r"\d+", checks["chain"][0])


@pytest.mark.parametrize(("form", "level"), CASES)
def test_wrong_and_mangled_answers_are_refused(form, level):
    task, problems = drawn(form, level, 60)
    for problem in problems:
        right = problem.answer
        if right == 0:  # many of these would be zero again
            continue
        wrong = {str(right + 1), str(right - 1), str(right * 10), str(-right), f"{right}0", f"1{right}",
                 str(right)[:-1], f"{right} or {right + 1}", f"{right}\n{right + 1}", f"not {right}", f"{right} apples",
                 f"It may well be {right}, who knows", f"{right}.5", f"{right}%", f"{right}/1", f"1={right}"}  # fmt: skip
        for text in wrong:
            assert not says(task, problem, text), (question(problem), text)


def test_answers_in_the_usual_dress_are_accepted():
    task = open_task("arithmetic:form=product:level=3")
    problem = next(p for p in (task.draw(random.Random(seed)) for seed in range(99)) if p.answer > 9999)
    a = problem.answer
    for text in (f"{a}", f"{a:,}", f"= {a}", f"{a}.", f"\\boxed{{{a:,}}}", f"$\\boxed{{{a}}}$", f"**{a}**", f"{a}.0",
                 f"{question(problem)}{a}", f"{question(problem).replace('*', ' * ')} {a}.", f"The answer is {a}."):  # fmt: skip
        assert says(task, problem, text), text
    other = question(problem).replace("*", "+")
    assert not says(task, problem, f"{other}{a}")


def test_a_wrong_answer_is_told_what_was_expected():
    task, (problem,) = drawn("sum", 1, 1)
    verdict = task.verify(problem, (Message("assistant", "five " * 100, reasoning=""),))
    assert verdict.reward == 0
    assert verdict.why.startswith(f"expected {problem.answer}, got 'five five") and len(verdict.why) < 120
