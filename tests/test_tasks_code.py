"""Programs to be followed and functions to be written: right answers pass, wrong ones and cheats do not."""

from __future__ import annotations

import random
import sys

import pytest

from longreach.chat.messages import Message, ToolCall
from longreach.chat.modes import MODES
from longreach.errors import RequestError
from longreach.tasks.base import problem_at
from longreach.tasks.programs import MOST_VALUE, follow
from longreach.tasks.registry import open_task
from longreach.tasks.sandbox import Limits, Program, run_many

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are run on Linux only")

LEVELS = [("programs", level) for level in (1, 2, 3, 4)] + [("coding", level) for level in (1, 2, 3)]


def problems(name: str, level: int, number: int, split: str = "train"):
    task = open_task(name)
    return task, [problem_at(task, split, 0, index, level) for index in range(number)]


def said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


# Both tasks.


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_worked_solutions_are_right_in_every_mode(name, level):
    task, drawn = problems(name, level, 12)
    for problem in drawn:
        lengths = []
        for mode in MODES:
            reply = task.demonstrate(problem, mode, random.Random(0))
            assert task.verify(problem, reply).is_right, (problem, reply)
            assert (reply[0].reasoning is None) == (mode == "non-think")
            lengths.append(len(reply[0].reasoning or ""))
        assert lengths == sorted(lengths) and len(set(lengths)) == 3  # each mode thinks longer than the one before


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_fifth_of_the_problems_is_held_out(name, level):
    task = open_task(name)
    rng = random.Random(5)
    drawn = {problem.id: problem for problem in (task.draw(rng, level) for _ in range(1500))}
    share = sum(problem.split == "held-out" for problem in drawn.values()) / len(drawn)
    assert len(drawn) > 250
    assert abs(share - 0.2) < 3 * (0.16 / len(drawn)) ** 0.5


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_problems_stay_short(name, level):
    _, drawn = problems(name, level, 100)
    longest = max(len(problem.conversation.messages[0].content) for problem in drawn)
    assert longest <= (30 if (name, level) == ("programs", 1) else 120)


@pytest.mark.parametrize("name", ["programs", "coding"])
def test_what_is_no_answer_is_wrong(name):
    task = open_task(name)
    problem = problem_at(task, "train", 0, 0, 1)
    calls = Message("assistant", "", tool_calls=(ToolCall("f", "{}"),))
    for reply in ((), (calls,), (Message("user", "6"),), said(""), said("```"), said("\ud800\x00")):
        verdict = task.verify(problem, reply)
        assert not verdict.is_right and verdict.reward == 0.0 and verdict.why


@pytest.mark.parametrize("name", ["programs", "coding"])
def test_an_unknown_option_is_refused(name):
    with pytest.raises(RequestError, match="has no option 'size'; its options are level"):
        open_task(f"{name}:size=3")


# Programs.


def test_a_program_is_followed_step_by_step():
    steps, printed = follow("a=17;b=5\nif a%b>1:a-=b\nprint(a*2)")
    assert [step.text for step in steps] == ["a=17", "b=5", "17%5>1=2>1:yes", "a=17-5=12", "12*2=24"]
    assert [step.result for step in steps] == ["a=17", "b=5", "yes", "a=12", "24"]
    assert printed == "24"


def test_loops_and_lists_are_followed():
    steps, printed = follow(
        "x=[4,7]\nfor i in range(2):\n if x[i]>4:x[i]-=2\n else:x.append(i+1)\nprint(sum(x),len(x))"
    )
    assert ";".join(step.text for step in steps) == (
        "x=[4,7];i=0;4>4:no;0+1=1;x=[4,7,1];i=1;7>4:yes;x[1]=7-2=5;sum([4,5,1])=10;len([4,5,1])=3"
    )
    assert printed == "10 3"


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_python_prints_what_the_answer_says(level):
    _, drawn = problems("programs", level, 60)
    outcomes = run_many([Program(problem.conversation.messages[0].content) for problem in drawn])
    for problem, outcome in zip(drawn, outcomes, strict=True):
        assert outcome.stdout == problem.answer + "\n", problem
        assert all(abs(int(number)) <= MOST_VALUE for number in problem.answer.split())


def test_answers_vary_and_are_not_to_be_guessed():
    for level in (1, 2, 3, 4):
        _, drawn = problems("programs", level, 300)
        answers = [problem.answer for problem in drawn]
        assert max(map(answers.count, set(answers))) < 30  # no answer fits every tenth program


def test_the_output_may_stand_in_a_block_and_nothing_else_may():
    task = open_task("programs")
    problem = next(p for p in (problem_at(task, "train", 0, i, 4) for i in range(99)) if " " in p.answer)
    for right in (problem.answer, f" {problem.answer}\n", f"```\n{problem.answer}\n```", f"`{problem.answer}`"):
        assert task.verify(problem, said(right)).is_right
    for no in (problem.answer.split()[0], problem.answer + " 1", f"It prints {problem.answer}", problem.answer + "0"):
        assert not task.verify(problem, said(no)).is_right


# Functions.


def function(words: str):
    """A problem of the coding task whose description begins so."""
    task = open_task("coding")
    rng = random.Random(0)
    for _ in range(20_000):
        problem = task.draw(rng)
        if problem.conversation.messages[0].content.startswith(words):
            return task, problem
    raise AssertionError(words)


def test_a_description_shows_two_examples_and_hides_the_rest():
    _, problem = function("f(a,b): the larger of a and b, doubled.")
    text = problem.conversation.messages[0].content
    assert text.count("f(") == 3 and "=" in text
    assert len(problem.answer) == 8 and "max" not in text


def test_any_function_with_the_right_results_is_right():
    task, problem = function("f(a,b): the larger of a and b, doubled.")
    for code in (
        "def f(a,b):return max(a,b)*2",
        "f=lambda a,b:2*max(a,b)",
        "def double(n):\n    return n + n\ndef f(a, b):\n    if a > b:\n        return double(a)\n    return double(b)",
        "Here it is:\n```python\nimport math\ndef f(a, b):\n    print('called')\n    return a + b + abs(a - b)\n```\nIt works.",
    ):
        assert task.verify(problem, said(code)).is_right, code


def test_a_function_that_is_partly_right_earns_less_than_half():
    task, problem = function("f(a,b): the larger of a and b, doubled.")
    verdict = task.verify(problem, said("def f(a,b):return a*2"))
    share = sum(max(call) == call[0] for call in problem.extra["calls"]) / 8
    assert not verdict.is_right and verdict.reward == share / 2 and 0 < share < 1
    assert "calls right; f(" in verdict.why and "expected" in verdict.why


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def f(a,b):return max(a,b)*2+", "SyntaxError"),
        ("def g(a,b):return max(a,b)*2", "no function f|KeyError"),
        ("def f(a,b):\n while True:pass", "ended: cpu"),
        ("import time\ndef f(a,b):time.sleep(99)", "ended: wall"),
        ("def f(a,b):raise SystemExit(0)", "ended before f was called"),
        ("import os\nos._exit(0)\ndef f(a,b):0", "ended before f was called"),
        ("def f(a,b):return 'x'*10**6", "ended: output"),
        ("def f(a,b):return f", "0 of 8 calls right"),
        ("def f(a,b):return 10**10000", "0 of 8 calls right"),
        ("def f(a,b):return f(a,b)", "0 of 8 calls right"),
        ("class E:\n def __eq__(s,o):return True\ndef f(a,b):return E()", "0 of 8 calls right"),
        ("import json\njson.dumps=lambda *a:'22'\ndef f(a,b):0", "0 of 8 calls right"),
        ('print(\'["24","24"]\')\nimport os\ndef f(a,b):os._exit(0)', "ended before f was called"),
        ("import sys\nsys.stdout.close()\ndef f(a,b):0", "ValueError|ended before"),
    ],
)
def test_broken_functions_and_cheats_are_wrong(code, why, monkeypatch):
    monkeypatch.setattr("longreach.tasks.coding.LIMITS", Limits(cpu_s=1, wall_s=2.0 if "wall" in why else 60.0))
    task, problem = function("f(a,b): the larger of a and b, doubled.")
    verdict = task.verify(problem, said(code))
    assert not verdict.is_right and verdict.reward == 0.0
    assert any(one in verdict.why for one in why.split("|")), verdict.why


def test_the_expected_results_are_not_where_a_function_could_see_them():
    task, problem = function("f(a,b): the larger of a and b, doubled.")
    spy = """
import gc, sys
def f(a, b):
    frame, seen = sys._getframe(1), []
    while frame:
        seen.append(repr(frame.f_locals)); frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if type(o) in (list, dict, str, tuple)]
    return any(EXPECTED[::-1] in text for text in seen)
""".replace("EXPECTED", repr(str(problem.answer)[1:-1][::-1]))
    assert "got false" in task.verify(problem, said(spy)).why
    # The inputs are there, so the spy would have seen them.
    inputs = repr(problem.extra["calls"])[1:-1]
    spy = spy.replace(repr(str(problem.answer)[1:-1][::-1]), repr(inputs[::-1]))
    assert "got true" in task.verify(problem, said(spy)).why


@pytest.mark.parametrize("level", [1, 2, 3])
def test_constants_and_the_argument_itself_pass_nowhere(level):
    task, drawn = problems("coding", level, 8)
    for problem in drawn:
        most = max(problem.answer, key=problem.answer.count)
        for code in (f"def f(*a):return {most}", "def f(a,*b):return a[0] if type(a)==list else 0"):
            assert not task.verify(problem, said(code)).is_right, problem
