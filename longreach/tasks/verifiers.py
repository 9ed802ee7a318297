"""Judges by name, for problems that come from files: `VERIFIERS["number"]("So he pays $1,250.", "1250")`.

    exact       the answer's text, or one of a list of them; white space is not compared
    number      the number that the text ends with (or boxes, or puts behind ####) has the answer's value
    choice      the letter that the text decides for
    contains    the answer's text occurs, or each of a list of them; small and capital letters are the same
    regex       the text matches the answer, a regular expression, somewhere
    json        the text is JSON; if the answer is a JSON Schema, also one that satisfies it
    math        the text is mathematically equal to the answer (math-verify)
    python      the Python in the text passes the answer, a program of tests

A judge takes the text that a model wrote and the answer from the file. Whatever the model wrote, nothing is raised and time is
bounded: what could hang or run code (regex, math, python) is done in the sandbox. An answer that the judge cannot use is the
file's fault and is found by `check_answer`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from longreach.errors import RequestError
from longreach.tasks.answers import shortened
from longreach.tasks.base import RIGHT, Verdict, wrong
from longreach.tasks.sandbox import Limits, Sandbox, run_python, sandbox

# A loop is ended by its CPU time, which does not depend on what else the machine does; wall time is for what waits.
# Both end before whoever asks for a verdict is out of patience (10 seconds, unless told otherwise).
CODE_LIMITS = Limits(cpu_s=3, wall_s=8.0, memory_mib=1024)
SHORT_LIMITS = Limits(cpu_s=1, wall_s=8.0)
MATH_LIMITS = Limits(cpu_s=4, wall_s=8.0, memory_mib=1024)

MOST_TEXT = 200_000
"""Characters of an answer that are judged, its last ones: no answer is that long, and every judge here is linear in them."""


# ---- reading texts --------------------------------------------------------------------------------------------------

# Nothing is given back (`*+`): a search through a long line that is no fence would take the square of its length.
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+([\w+-]*+)[^\n]*+\n(.*?)^[ \t]*+```", re.DOTALL | re.MULTILINE)
_OPEN_FENCE = re.compile(r"^[ \t]*+```[^\n]*+\n", re.MULTILINE)


def code_of(text: str, containing: str = "") -> str | None:
    """The program in a Markdown answer: of its fenced blocks the last that contains this text, Python before others.

    A block that is never closed ends with the text. None where there is no block.
    """
    blocks = [(found[1].lower(), found[2]) for found in _FENCE.finditer(text)]
    if not blocks:
        opened = _OPEN_FENCE.search(text)
        return text[opened.end() :] if opened else None
    python = [block for language, block in blocks if language in ("python", "py", "python3", "")]
    for candidates in (python, [block for _, block in blocks]):
        for block in reversed(candidates):
            if containing in block:
                return block
    return (python or [block for _, block in blocks])[-1]


def boxed(text: str) -> str | None:
    r"""What the last \boxed{…} of a text holds, with its inner braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212])?[ ]?[$€£¥]?[ ]?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,100})?(?P<decimals>\.[0-9]{1,100})?"
    r"(?P<exponent>[eE][-+]?[0-9]{1,2}(?![0-9]))?"
    r"(?:[ ]?/[ ]?(?P<below>[0-9]{1,100})(?!\.?[0-9]))?"
)
_BEFORE_ANSWER = re.compile(r"####|\banswer(?:\s+is\b|\s*:|\s*=)", re.IGNORECASE)


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a text: signs, thousands set apart by commas, decimals, exponents of two digits, fractions.

    A sign counts where nothing stands directly before it: `5-3` holds 5 and 3. Currency signs, per cent and units are no part
    of a number.
    """
    found = []
    for match in _NUMBER.finditer(text):
        if match["whole"] is None and match["decimals"] is None:
            continue
        value = Fraction(
            (match["whole"] or "0").replace(",", "") + (match["decimals"] or "") + (match["exponent"] or "")
        )
        if match["below"] is not None and int(match["below"]) != 0:
            value /= int(match["below"])
        before = text[match.start() - 1 : match.start()] if match.start() else ""
        if match["sign"] in ("-", "\u2212") and not (before.isalnum() or before in (")", "]")):
            value = -value
        found.append(value)
    return found


def final_number(text: str) -> Fraction | None:
    """The number a text gives as its result: boxed, or the first behind its last `####` or "answer is", or its last."""
    inside = boxed(text)
    if inside is not None:
        inside = re.sub(
            r"\\[dt]?frac\{(-?\d{1,50})\}\{(\d{1,50})\}", r"\1/\2", inside.replace("{,}", ",").replace("\\!", "")
        )
        if found := numbers_in(inside):
            return found[-1]
    marks = list(_BEFORE_ANSWER.finditer(text))
    if marks and (found := numbers_in(text[marks[-1].end() :])):
        return found[0]
    found = numbers_in(text)
    return found[-1] if found else None


def is_same_number(one: Fraction, other: Fraction) -> bool:
    """Whether two numbers are equal; where one has decimals, to one part in a million."""
    if one == other:
        return True
    if one.denominator == 1 and other.denominator == 1:
        return False
    return abs(one - other) <= Fraction(1, 1_000_000) * max(abs(one), abs(other))


# ---- judges ---------------------------------------------------------------------------------------------------------


def _listed(answer: Any) -> list[str]:
    return [str(item) for item in answer] if isinstance(answer, list) else [str(answer)]


def _exact(text: str, answer: Any) -> Verdict:
    given = " ".join(text.split())
    if any(given == " ".join(one.split()) for one in _listed(answer)):
        return RIGHT
    return wrong(f"expected {shortened(_listed(answer)[0])!r}, got {shortened(given)!r}")


def _number(text: str, answer: Any) -> Verdict:
    expected = final_number(str(answer))
    assert expected is not None, answer
    given = final_number(text)
    if given is None:
        return wrong(f"expected {answer}, got no number in {shortened(text)!r}")
    if is_same_number(given, expected):
        return RIGHT
    # str of a fraction can be as long as the text was
    return wrong(f"expected {answer}, got {shortened(_shown(given))}")


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    nearest = float(value)
    return repr(nearest) if math.isfinite(nearest) else str(value)


_CHOICES = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}"),
    re.compile(r"\b(?:[Aa]nswer|[Cc]hoice|[Oo]ption)\b[^A-Za-z\n]{0,10}(?:is\b[^A-Za-z\n]{0,10})?([A-J])(?![A-Za-z])"),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?:^|\n)[ \t*]{0,8}([A-J])[.):*\s]"),
    re.compile(r"(?<![A-Za-z'])([A-J])(?![A-Za-z'])"),
)


def chosen_letter(text: str) -> str | None:
    """The letter a text decides for: the text itself, boxed, behind "answer", in brackets, at a line's start, or alone.

    Of several the last.
    """
    bare = text.strip().strip("().:*` ").upper()
    if len(bare) == 1 and "A" <= bare <= "J":
        return bare
    for pattern in _CHOICES:
        if found := pattern.findall(text + "\n"):
            return found[-1]
    return None


def _choice(text: str, answer: Any) -> Verdict:
    given = chosen_letter(text)
    expected = str(answer).strip().strip("().").upper()
    return RIGHT if given == expected else wrong(f"expected {expected}, got {given or shortened(text)!r}")


def _contains(text: str, answer: Any) -> Verdict:
    folded = text.casefold()
    missing = [one for one in _listed(answer) if one.casefold() not in folded]
    return wrong(f"{shortened(missing[0])!r} does not occur") if missing else RIGHT


_SEARCH = """
import json, re, sys
pattern, text = json.load(sys.stdin)
print(re.search(pattern, text) is not None)
"""


def _regex(text: str, answer: Any) -> Verdict:
    outcome = run_python(_SEARCH, stdin=json.dumps([str(answer), text]), limits=SHORT_LIMITS)
    if outcome.stdout == "True\n":
        return RIGHT
    if outcome.stdout == "False\n":
        return wrong(f"{shortened(text)!r} does not match {shortened(str(answer))}")
    return wrong(f"the search for {shortened(str(answer))} was ended: {outcome.last_error or outcome.reason}")


def _json(text: str, answer: Any) -> Verdict:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    body = code_of(text)
    try:
        value = json.loads(text if body is None else body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return wrong(f"no JSON: {shortened(str(error), 100)}")
    if not isinstance(answer, dict):
        return RIGHT
    jsonschema = _needed("jsonschema", "json", "jsonschema")
    try:
        found = next(iter(jsonschema.Draft202012Validator(answer).iter_errors(value)), None)
    except RecursionError:
        return wrong("the JSON is nested too deeply")
    return RIGHT if found is None else wrong(f"the schema is not satisfied: {shortened(found.message, 100)}")


def _needed(module: str, verifier: str, package: str) -> Any:
    """An optional package.

    Raises:
        RequestError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f"the verifier {verifier!r} needs {package}: pip install {package} ({error})") from None


_EQUAL = """
import json, sys, logging
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
gold, text = json.load(sys.stdin)
answer = parse(text, parsing_timeout=2)
print(json.dumps([bool(verify(parse(gold, parsing_timeout=2), answer, timeout_seconds=2)), [str(a) for a in answer][:1]]))
"""
# The parser builds its tables at first use, which takes a quarter of a second.
_WARM = r"""
import logging
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
for text in (r"\boxed{\frac{x^2+1}{2}}", r"the answer is $3\sqrt{2}$ or 5%", r"\boxed{(1,2]}"):
    verify(parse(text), parse(r"\boxed{x+1}"))
"""
_MATH_PACKAGES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")


@cache
def _math_folders() -> tuple[str, ...]:
    """Where math-verify and what it needs lie.

    Raises:
        RequestError: it is not installed.
    """
    folders = set()
    for name in _MATH_PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise RequestError(
                f"problems judged by mathematical equality need math-verify, and {name} is not installed: "
                f"pip install 'longreach[post]'"
            )
        folders.add(str(Path(found.origin).parents[1]))
    return tuple(sorted(folders))


def math_sandbox() -> Sandbox:
    """A sandbox with math-verify loaded. It reads formulas by executing text, so it does not run in this process."""
    return sandbox(preload=("math_verify",), packages=_math_folders(), warm=_WARM)


def _math(text: str, answer: Any) -> Verdict:
    gold = str(answer)
    if boxed(gold) is None:
        gold = f"\\boxed{{{gold}}}"
    outcome = math_sandbox().run(_EQUAL, stdin=json.dumps([gold, text]), limits=MATH_LIMITS)
    try:
        is_equal, given = json.loads(outcome.stdout)
    except (ValueError, RecursionError):
        return wrong(f"the comparison with {shortened(str(answer))} was ended: {outcome.last_error or outcome.reason}")
    if is_equal is True:
        return RIGHT
    return wrong(f"expected {shortened(str(answer))}, got {shortened(str((given or ['nothing'])[0]))}")


# The tests run in the interpreter that the answer runs in, for they call it. The mark is printed when the last of them has
# passed, so that a program that ends before does not pass.
_TESTED = """
import json, sys
def main(task, write):
    space = {"__name__": "answer"}
    for name in ("code", "tests"):
        exec(compile(task[name], name + ".py", "exec"), space)
    write(task["mark"])
task = json.loads(sys.stdin.readline())
del sys.stdin
main(task, sys.__stdout__.write)
"""


def run_tests(code: str, tests: str) -> Verdict:
    """Execute a program and, behind it, its tests, which raise where it is wrong.

    An answer that attacks its judge (by objects equal to everything, say) can pass: the tests of these benchmarks run beside
    it. One that ends early cannot.

    Raises:
        SandboxError: no program can be run on this machine.
    """
    mark = secrets.token_hex(16)
    told = json.dumps({"code": code, "tests": tests, "mark": mark})
    outcome = run_python(_TESTED, stdin=told + "\n", limits=CODE_LIMITS)
    if outcome.reason == "ok" and outcome.stdout.endswith(mark):
        return RIGHT
    if outcome.reason in ("ok", "exit"):
        return wrong(outcome.last_error or "the program ended before its tests")
    return wrong(f"the program was ended: {outcome.reason}")


def _python(text: str, answer: Any) -> Verdict:
    code = code_of(text)
    return run_tests(text if code is None else code, str(answer))


Verifier = Callable[[str, Any], Verdict]

_JUDGES: dict[str, Verifier] = {
    "exact": _exact, "number": _number, "choice": _choice, "contains": _contains, "regex": _regex, "json": _json,
    "math": _math, "python": _python,
}  # fmt: skip


def _bounded(judge: Verifier) -> Verifier:
    return lambda text, answer: judge(text[-MOST_TEXT:], answer)


IN_SANDBOX = ("regex", "math", "python")
"""Those that run something and take milliseconds to seconds; the others take microseconds."""

VERIFIERS: dict[str, Verifier] = {name: _bounded(judge) for name, judge in _JUDGES.items()}


def check_answer(verifier: str, answer: Any) -> str | None:
    """Why this judge cannot use this answer of a file; None if it can."""
    if answer is None or answer == "" or answer == []:
        return None if verifier == "json" else "has no answer"
    if isinstance(answer, list) and verifier not in ("exact", "contains", "json"):
        return "has a list as its answer"
    if verifier == "number" and final_number(str(answer)) is None:
        return f"has an answer without a number: {shortened(str(answer))!r}"
    if verifier == "choice" and not re.fullmatch(r"\(?[A-Ja-j]\)?\.?", str(answer).strip()):
        return f"has the answer {shortened(str(answer))!r}, which is no letter from A to J"
    if verifier == "regex":
        try:
            re.compile(str(answer))
        except (re.error, RecursionError, OverflowError) as error:
            return f"has an answer that is no regular expression: {error}"
    return None


def prepare(verifier: str) -> None:
    """Say at the start what is missing, not at the first answer.

    Raises:
        RequestError: a package that this judge needs is not installed.
        SandboxError: it needs the sandbox and this machine has none.
    """
    if verifier == "math":
        math_sandbox().protections()
    elif verifier in ("python", "regex"):
        sandbox().protections()


def verifier_names() -> Sequence[str]:
    return list(VERIFIERS)
