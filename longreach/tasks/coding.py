"""Write a function from a description and two examples; whether it is right is found out by calling it.

    --task coding:level=1

    level 1    f(a): a times 3, plus 2. f(4)=14 f(0)=2                          one number, one or two operations
    level 2    f(a,b): the larger of a and b, doubled. f(2,3)=6 f(5,1)=10       two numbers, conditions
    level 3    f(x): sum of the even numbers in x. f([1,2,4])=6 f([3])=0        a list of numbers

The answer is the function, alone or in a Markdown block:

    def f(a,b):return max(a,b)*2

It is called on inputs the prompt does not show, in the sandbox. The inputs go in, the results come out and are compared here:
the expected ones are never where the function could see them. The reward of a function that is not right everywhere is half
the share of calls that it got right.
"""

from __future__ import annotations

import json
import random
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.tasks.answers import shortened
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, wrong
from longreach.tasks.sandbox import Limits, run_python
from longreach.tasks.verifiers import code_of

NUM_EXAMPLES = 2
NUM_TESTS = 8

LIMITS = Limits(cpu_s=2, wall_s=8.0, memory_mib=256, files_mib=1, output_kib=64)

_CALLER = """
import json, sys
task = json.loads(sys.stdin.readline())
del sys.stdin
def main(task, write, dumps):
    space = {"__name__": "answer"}
    exec(compile(task["code"], "answer.py", "exec"), space)
    results = []
    for arguments in task["calls"]:
        try:
            results.append(dumps(space[task["name"]](*arguments)))
        except Exception as error:
            results.append("!" + type(error).__name__)
    write("\\n" + task["mark"] + dumps(results) + "\\n")
main(task, sys.stdout.write, json.dumps)
"""


class Coding(GeneratedTask):
    """Functions of integers and lists of integers. `extra` holds the body that was described, the inputs and the results."""

    kind = "coding"
    domain = "code"
    summary = "write a small Python function that passes hidden tests"
    all_levels = (1, 2, 3)
    judged_apart = True

    def make(self, rng: random.Random, level: int) -> Problem:
        while True:
            parameters, form = _FORMS[level](rng)
            # By the description, so that each has one problem: a function that is held out is not met in training.
            inputs = _inputs(random.Random(form.words), level, NUM_EXAMPLES + NUM_TESTS)
            results = [form.compute(*arguments) for arguments in inputs]
            examples, tests = results[:NUM_EXAMPLES], results[NUM_EXAMPLES:]
            # Where two constants or an argument would pass, nothing is asked.
            if len(set(map(str, tests))) > 3 and examples[0] != examples[1]:
                break
        shown = " ".join(
            f"f({','.join(_compact(a) for a in arguments)})={_compact(result)}"
            for arguments, result in zip(inputs[:NUM_EXAMPLES], examples, strict=True)
        )
        prompt = f"f({','.join(parameters)}): {form.words}. {shown}"
        head = f"def f({','.join(parameters)}):return "
        return Problem(
            self.kind, Conversation((Message("user", prompt),)), tests, level,
            {"name": "f", "calls": [list(arguments) for arguments in inputs[NUM_EXAMPLES:]], "code": head + form.code,
             "steps": form.steps},
        )  # fmt: skip

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        message = final_message(reply)
        if message is None:
            return wrong("no answer")
        code = code_of(message.content) or message.content.strip().strip("`")
        if problem.extra["name"] not in code:
            return wrong(f"no function {problem.extra['name']} in {shortened(code)!r}")
        results, why = called(code, problem.extra["name"], problem.extra["calls"])
        if results is None:
            return wrong(why)
        num_right = 0
        for arguments, given, expected in zip(problem.extra["calls"], results, problem.answer, strict=True):
            if given == json.dumps(expected):
                num_right += 1
            elif not why:
                told = ", ".join(map(_compact, arguments))
                why = f"f({told}): expected {_compact(expected)}, got {shortened(given)}"
        if num_right == len(problem.answer):
            return RIGHT
        share = num_right / len(problem.answer)
        return wrong(f"{num_right} of {len(problem.answer)} calls right; {why}", reward=share / 2)

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        code = problem.extra["code"]
        reasoning = None
        if mode != "non-think":
            reasoning = ";".join(f"{words}:{text}" for words, text in problem.extra["steps"])
            if mode == "think-max":
                reasoning += f"\ncheck:{_check(problem)};ok"
        return (Message("assistant", code, reasoning=reasoning),)


def called(code: str, name: str, calls: Sequence[Sequence[Any]]) -> tuple[list[str] | None, str]:
    """Call a function of a program in the sandbox.

    Returns:
        The results as JSON text, `!` and the error where one was raised; or None and why there are none.

    Raises:
        SandboxError: no program can be run on this machine.
    """
    mark = secrets.token_hex(8)
    told = json.dumps({"code": code, "name": name, "calls": calls, "mark": mark})
    outcome = run_python(_CALLER, stdin=told + "\n", limits=LIMITS)
    last = outcome.stdout.rstrip("\n").rpartition("\n")[2]
    if outcome.reason not in ("ok", "exit"):
        return None, f"the program was ended: {outcome.reason}"
    if not last.startswith(mark):
        return None, outcome.last_error or f"the program ended before {name} was called"
    try:
        results = json.loads(last[len(mark) :])
    except (ValueError, RecursionError):
        results = None
    if not isinstance(results, list) or len(results) != len(calls) or not all(isinstance(r, str) for r in results):
        return None, "the program wrote something else in place of its results"
    return results, ""


def _check(problem: Problem) -> str:
    """The examples, computed by the code: `f(2,3)=max(2,3)*2=6`."""
    formula = problem.extra["code"].partition("return ")[2]
    checked = []
    for example in problem.conversation.messages[-1].content.rpartition(". ")[2].split(" "):
        call, _, result = example.partition("=")
        values = json.loads(f"[{call[2:-1]}]")
        given = dict(zip("x" if isinstance(values[0], list) else "ab", values, strict=False))
        filled = re.sub(r"\b[abx]\b", lambda name, given=given: _compact(given[name[0]]), formula)
        checked.append(f"{call}={filled}={result}")
    return ";".join(checked)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


# ---- what is described ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """A value in words, in Python, and as a function of the arguments.

    Attributes:
        steps: the code as it grows, part of the description by part.
    """

    words: str
    code: str
    compute: Callable[..., Any]
    steps: tuple[tuple[str, str], ...] = ()


def _then(form: _Form, rng: random.Random) -> _Form:
    """One more operation on a number."""
    n = rng.randint(2, 9)
    compute = form.compute
    is_one = form.code.isidentifier() or (form.code.endswith(")") and not form.code.startswith("-"))
    inner = form.code if is_one else f"({form.code})"
    words, code, after = rng.choice(
        [
            (f"plus {n}", f"{form.code}+{n}", lambda v: v + n),
            (f"minus {n}", f"{form.code}-{n}", lambda v: v - n),
            (f"times {n}", f"{inner}*{n}", lambda v: v * n),
            ("doubled", f"{inner}*2", lambda v: v * 2),
            ("squared", f"{inner}**2", lambda v: v**2),
            (f"modulo {n}", f"{inner}%{n}", lambda v: v % n),
            ("negated", f"-{inner}", lambda v: -v),
        ]
    )
    first = not form.steps
    joined = f"{form.words} {words}" if first else f"{form.words}, {words}"
    return _Form(joined, code, lambda *a: after(compute(*a)), (*form.steps, (joined if first else words, code)))


def _named(words: str, code: str, compute: Callable[..., Any]) -> _Form:
    return _Form(words, code, compute, ((words, code),))


def _one_number(rng: random.Random) -> tuple[list[str], _Form]:
    form = _then(_Form("a", "a", lambda a: a), rng)
    return ["a"], _then(form, rng) if rng.random() < 0.75 else form


def _two_numbers(rng: random.Random) -> tuple[list[str], _Form]:
    n, m = rng.randint(2, 9), rng.randint(2, 9)
    form = rng.choice(
        [
            _named("the larger of a and b", "max(a,b)", max),
            _named("the smaller of a and b", "min(a,b)", min),
            _named("distance of a and b", "abs(a-b)", lambda a, b: abs(a - b)),
            _named("sum of a and b", "(a+b)", lambda a, b: a + b),
            _named(f"a times {n} plus b times {m}", f"a*{n}+b*{m}", lambda a, b: a * n + b * m),
            _named(f"a if b is over {n}, else {m}", f"(a if b>{n} else {m})", lambda a, b: a if b > n else m),
            _named(f"b if a is even, else a plus {n}", f"(b if a%2==0 else a+{n})", lambda a, b: a + n if a % 2 else b),
        ]
    )
    return ["a", "b"], _then(form, rng) if rng.random() < 0.75 else form


def _list_of_numbers(rng: random.Random) -> tuple[list[str], _Form]:
    n = rng.randint(2, 9)
    which, test, holds = rng.choice(
        [
            ("even numbers in x", "i%2==0", lambda i: i % 2 == 0),
            ("odd numbers in x", "i%2==1", lambda i: i % 2 == 1),
            (f"numbers in x over {n}", f"i>{n}", lambda i: i > n),
            (f"numbers in x below {n}", f"i<{n}", lambda i: i < n),
        ]
    )
    form = rng.choice(
        [
            _named(f"sum of the {which}", f"sum(i for i in x if {test})", lambda x: sum(filter(holds, x))),
            _named(f"how many {which}", f"sum({test} for i in x)", lambda x: sum(map(holds, x))),
            _named("largest of x minus smallest", "(max(x)-min(x))", lambda x: max(x) - min(x)),
            _named("first of x plus last", "(x[0]+x[-1])", lambda x: x[0] + x[-1]),
            _named("sum of x", "sum(x)", sum),
            _named("length of x", "len(x)", len),
        ]
    )
    if rng.random() < 0.3:
        each, code, compute = rng.choice(
            [
                (f"x, each plus {n}", f"[i+{n} for i in x]", lambda x: [i + n for i in x]),
                (f"x, each times {n}", f"[i*{n} for i in x]", lambda x: [i * n for i in x]),
                ("x in reverse", "x[::-1]", lambda x: x[::-1]),
                ("x sorted", "sorted(x)", sorted),
                (f"the {which}", f"[i for i in x if {test}]", lambda x: [i for i in x if holds(i)]),
            ]
        )
        return ["x"], _named(each, code, compute)
    return ["x"], _then(form, rng) if rng.random() < 0.6 else form


def _inputs(rng: random.Random, level: int, number: int) -> list[tuple[Any, ...]]:
    if level == 3:
        return [([rng.randint(0, 12) for _ in range(rng.randint(2, 5))],) for _ in range(number)]
    return [tuple(rng.randint(0, 12) for _ in range(level)) for _ in range(number)]


_FORMS: dict[int, Callable[[random.Random], tuple[list[str], _Form]]] = {
    1: _one_number,
    2: _two_numbers,
    3: _list_of_numbers,
}
