"""Problems from files: the published sets are read as they are, bad lines are named, and judges never raise."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from longreach.chat.messages import Message
from longreach.errors import RequestError
from longreach.tasks.base import problem_at
from longreach.tasks.registry import open_task
from longreach.tasks.sandbox import Limits
from longreach.tasks.verifiers import (
    IN_SANDBOX,
    MATH_LIMITS,
    VERIFIERS,
    chosen_letter,
    code_of,
    final_number,
    numbers_in,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are run on Linux only")

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "benchmarks"


def published(name: str) -> Path:
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    return path


def write(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


# GSM8K.


def test_every_published_answer_of_gsm8k_is_read_and_right():
    task = open_task(f"gsm8k:path={published('gsm8k_test.jsonl')}")
    assert task.size == 1319 and task.levels == [1]
    for problem in task.problems():
        number = problem.answer
        shown = task.demonstrate(problem, "think-high", random.Random(0))
        assert shown[0].content == number and "<<" not in shown[0].reasoning and shown[0].reasoning
        plain = number.replace(",", "")
        value = final_number(number)
        for text in (shown[0].content, f"#### {number}", f"So he needs 12 of 99, and the answer is ${plain}.00."):
            assert task.verify(problem, said(text)).is_right, (text, number)
        assert not task.verify(problem, said(f"The answer is {value + 1}.")).is_right
    held_out = sum(problem.split == "held-out" for problem in task.problems())
    assert 0.16 < held_out / 1319 < 0.24


def test_the_order_of_a_file_is_a_permutation_by_the_seed_again_and_again():
    task = open_task(f"gsm8k:path={published('gsm8k_test.jsonl')}")
    number = sum(problem.split == "held-out" for problem in task.problems())
    rounds = [[problem_at(task, "held-out", 3, turn * number + i).id for i in range(number)] for turn in (0, 1)]
    assert rounds[0] != rounds[1] and sorted(rounds[0]) == sorted(rounds[1])
    assert len(set(rounds[0])) == number


def test_a_problem_stays_in_its_part_when_its_file_moves(tmp_path):
    record = {"question": "How many?", "answer": "It is 3.\n#### 3"}
    one, other = write(tmp_path / "a.jsonl", record), write(tmp_path / "b.jsonl", record)
    assert open_task(f"gsm8k:path={one}").problems()[0].id == open_task(f"gsm8k:path={other}").problems()[0].id


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("$1,234.50", Fraction(2469, 2)), ("50%", 50), ("3/4", Fraction(3, 4)), ("-7", -7),
        ("\u22127", -7), ("It is -$5.", -5), ("5-3", 3), ("18 dollars a day", 18), ("about 1e3", 1000), (".5", Fraction(1, 2)),
        ("#### 12\nThat was 3 steps", 12), ("The answer is 7, not 8.", 7), ("**Answer:** 42", 42), ("x = 3, y = 4", 4),
        ("\\boxed{1,000}", 1000), ("\\boxed{\\frac{3}{4}} of 9", Fraction(3, 4)), ("\\boxed{1{,}000}", 1000),
        ("10.", 10), ("1,23", 23), ("3/0", 3), ("2024-05-01", 1), ("", None), ("none", None), ("1" * 5000, None),
        ("1e999999999", 1), ("$ 5", 5), ("12,345,678", 12345678), ("0.1", Fraction(1, 10)),
    ],
)  # fmt: skip
def test_the_number_of_a_text(text, value):
    if len(text) == 5000:
        assert numbers_in(text)  # in pieces; what matters is that it neither fails nor takes long
    elif text == "1e999999999":
        assert final_number(text) is not None
    else:
        assert final_number(text) == value


def test_whole_numbers_are_compared_exactly_and_decimals_closely():
    judge = VERIFIERS["number"]
    assert judge("0.3333", "1/3").is_right is False and judge("0.33333333", "1/3").is_right
    assert judge("10000001", "10000002").is_right is False
    assert judge("5.0", "5").is_right and judge("5", 5).is_right and judge("2.50", 2.5).is_right


# HumanEval.


@pytest.fixture(scope="module")
def humaneval():
    return open_task(f"humaneval:path={published('HumanEval.jsonl.gz')}")


def test_every_published_solution_of_humaneval_passes(humaneval):
    assert humaneval.size == 164
    for problem in humaneval.problems():
        shown = humaneval.demonstrate(problem, "non-think", random.Random(0))
        verdict = humaneval.verify(problem, shown)
        assert verdict.is_right, (problem.extra["name"], verdict)


PERTURB = """
_right = {name}
def {name}(*given):
    value = _right(*given)
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, (str, list, tuple)): return value + type(value)("x")
    return None if value is not None else 0
"""


def test_every_published_solution_fails_once_its_results_are_perturbed(humaneval):
    for problem in humaneval.problems():
        code = problem.extra["prompt"] + problem.extra["solution"] + PERTURB.format(name=problem.extra["name"])
        verdict = humaneval.verify(problem, said(f"```python\n{code}\n```"))
        # dict, the one type left, becomes None
        assert not verdict.is_right and verdict.reward == 0.0 and verdict.why, problem.extra["name"]


def test_a_body_alone_a_bare_function_and_a_block_are_all_read(humaneval):
    problem = next(p for p in humaneval.problems() if p.extra["name"] == "poly" or "has_close" in p.extra["name"])
    body = problem.extra["solution"]
    whole = problem.extra["prompt"] + body
    name = problem.extra["name"]
    bare = whole[whole.index(f"def {name}(") :]  # without the import that only the prompt has
    for text in (
        body,
        bare,
        f"```python\n{bare}```",
        f"Sure!\n```\n{bare}\n```\nand\n```python\nprint({name}([1.0], 2.0))\n```",
        f"```python\n{bare}",
        f"```python\n{body}```",
    ):
        assert humaneval.verify(problem, said(text)).is_right, text


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nos._exit(0)", "ended before its tests"),
        ("raise SystemExit", "ended before its tests"),
        ("while True: pass", "ended: cpu"),
        ("def has_close_elements(*a): import sys; sys.exit()", "ended before its tests"),
        ("def has_close_elements(*a): import os; os.kill(os.getpid(), 9)", "ended: signal"),
        ("x = [0] * 10**10", "ended: memory"),
        ("def has_close_elements(*a): return None", "AssertionError"),
    ],
)
def test_programs_that_end_early_do_not_pass(humaneval, code, why, monkeypatch):
    monkeypatch.setattr("longreach.tasks.verifiers.CODE_LIMITS", Limits(cpu_s=1, wall_s=60.0))
    verdict = humaneval.verify(humaneval.problems()[0], said(f"```python\n{code}\n```"))
    assert not verdict.is_right and why in verdict.why


# MATH, MBPP.


MATH = [
    {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Prealgebra"},
    {"problem": "Square of a+1?", "solution": "We get \\boxed{a^2+2a+1}.", "level": "Level 3", "type": "Algebra"},
]


@pytest.fixture
def math_folder(tmp_path):
    pytest.importorskip("math_verify")
    for number, record in enumerate(MATH):
        folder = tmp_path / "MATH" / record["type"]
        folder.mkdir(parents=True)
        (folder / f"{number}.json").write_text(json.dumps(record, indent=1))
    return tmp_path / "MATH"


def test_math_is_read_from_folders_and_judged_by_equality(math_folder):
    task = open_task(f"math:path={math_folder}")
    assert task.size == 2 and task.levels == [1, 3]
    square, half = task.problems()
    assert half.answer == "\\frac{1}{2}" and square.level == 3
    for text in ("\\boxed{0.5}", "The answer is $\\frac{2}{4}$.", "$$\\boxed{\\dfrac12}$$"):
        assert task.verify(half, said(text)).is_right, text
    assert task.verify(square, said("So it is \\boxed{(a+1)^2}")).is_right
    for text in ("\\boxed{2}", "", "I do not know", "\\boxed{" * 1000, "\\boxed{0.5"):
        assert not task.verify(half, said(text)).is_right, text
    shown = task.demonstrate(half, "think-high", random.Random(0))[0]
    assert shown.reasoning == MATH[0]["solution"] and shown.content == "\\boxed{\\frac{1}{2}}"
    assert open_task(f"math:path={math_folder}:level=3").size == 1


def test_math_that_takes_forever_is_ended(math_folder):
    task = open_task(f"math:path={math_folder}")
    for text in ("\\boxed{10^{10^{10^{10}}}}", "\\boxed{9^{9^{9^{9^9}}}!}", "\\boxed{" + "(" * 5000 + "}"):
        begin = time.monotonic()
        assert not task.verify(task.problems()[0], said(text)).is_right
        assert time.monotonic() - begin < MATH_LIMITS.wall_s + 10


def test_math_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    from longreach.tasks import verifiers

    monkeypatch.setattr(verifiers, "_MATH_PACKAGES", ("no_such_package",))
    monkeypatch.setattr(verifiers, "_math_folders", verifiers._math_folders.__wrapped__)
    path = write(tmp_path / "m.jsonl", MATH[0])
    with pytest.raises(RequestError, match=r"no_such_package is not installed: pip install 'longreach\[post\]"):
        open_task(f"math:path={path}")


def test_mbpp_is_judged_by_its_assertions(tmp_path):
    records = [
        {
            "task_id": 1, "text": "Write a function to add.", "code": "def add(a, b):\r\n    return OFF + a + b",
            "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "OFF = 0",
            "challenge_test_list": ["assert add(-1, 1) == 0"],
        },
        {"prompt": "Write pi.", "code": "def pi(): return 3", "test_list": ["assert math.floor(pi()) == 3"],
         "test_imports": ["import math"]},
    ]  # fmt: skip
    task = open_task(f"mbpp:path={write(tmp_path / 'mbpp.jsonl', *records)}")
    add, pi = task.problems()
    # The setup comes with the tests, so a function may use it when it is called.
    assert task.verify(add, task.demonstrate(add, "think-high", random.Random(0))).is_right
    assert task.verify(pi, said("```python\ndef pi():\n    return 3.14\n```")).is_right
    assert "assert add(1, 2) == 3" in add.conversation.messages[0].content
    assert "add(-1, 1)" not in add.conversation.messages[0].content
    verdict = task.verify(add, said("```python\ndef add(a, b):\n    return a * b\n```"))
    assert not verdict.is_right and verdict.why == "AssertionError"


# Any JSONL.


def test_a_file_of_the_users_own_fields_is_judged_by_name(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"q": "Largest planet?", "a": ["Jupiter", "the planet Jupiter"], "level": 2, "why": "It has most mass."},
        {"q": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Smallest?"}], "a": "Mercury",
         "why": "By radius."},
    )  # fmt: skip
    task = open_task(f"jsonl:path={path}:verifier=exact:prompt=q:answer=a:solution=why:domain=astronomy")
    assert (task.domain, task.size, task.levels) == ("astronomy", 2, [1, 2])
    first, second = task.problems()
    assert task.verify(first, said(" the planet\nJupiter")).is_right and not task.verify(first, said("Mars")).is_right
    assert [message.role for message in second.conversation.messages] == ["system", "user"]
    shown = task.demonstrate(first, "think-high", random.Random(0))[0]
    assert (shown.reasoning, shown.content) == ("It has most mass.", "Jupiter")
    assert task.draw(random.Random(0), 2) is first


def test_a_compressed_file_with_blank_lines_and_a_mark_of_byte_order_is_read(tmp_path):
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(
        gzip.compress('\ufeff{"question": "é?", "answer": 1}\r\n\r\n{"question": "b?", "answer": 2}'.encode())
    )
    assert open_task(f"jsonl:path={path}:verifier=number").size == 2


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (['{"question": "a", "answer": 1}', "{broken"], "verifier=number", "line 2: no JSON"),
        (["[1]"], "verifier=number", "line 1: .* is no JSON object"),
        (['{"question": "a"}'], "verifier=number", "line 1: there is no field 'answer'; fields are 'question'"),
        (['{"question": "", "answer": 1}'], "verifier=number", "line 1: field 'question' is \"\"; it should be a text"),
        (
            ['{"question": "a", "answer": "x"}'],
            "verifier=number",
            "line 1: field 'answer' has an answer without a number",
        ),
        (['{"question": "a", "answer": null}'], "verifier=exact", "line 1: field 'answer' has no answer"),
        (['{"question": "a", "answer": "("}'], "verifier=regex", "line 1: .* no regular expression"),
        (['{"question": "a", "answer": "K"}'], "verifier=choice", "line 1: .* no letter from A to J"),
        (['{"question": "a", "answer": "assert ("}'], "verifier=python", "line 1: .* tests that are no Python"),
        (['{"question": "a", "answer": 1, "level": "x"}'], "verifier=number", "line 1: field 'level' is \"x\""),
        (
            ['{"question": [{"role": "bot"}], "answer": 1}'],
            "verifier=number",
            "line 1: .* messages are objects with a role",
        ),
        (['{"question": [], "answer": 1}'], "verifier=number", "line 1: .* should end with a user's message"),
        (['{"question": "a", "answer": 1}'], "verifier=number:solution=s", "line 1: there is no field 's'"),
        ([], "verifier=number", "holds no problem"),
        ([], "verifier=best", "verifier 'best' is unknown; verifiers are exact, number"),
        ([], "domain=x", "needs a judge"),
        ([], "verifier=number:domain=A B", "domain=A B is no name"),
        ([], "verifier=number:size=3", "has no option 'size'; its options are path, verifier"),
    ],
)
def test_a_line_that_does_not_fit_is_named_with_its_reason(tmp_path, lines, options, message):
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(RequestError, match=message):
        open_task(f"jsonl:path={path}:{options}")


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (
            "gsm8k",
            {"question": "a", "answer": "It is 3"},
            "line 1: the answer ends with 'It is 3'; it should end with ####",
        ),
        ("math", {"problem": "a", "solution": "3"}, r"line 1: the solution has no \\boxed"),
        (
            "humaneval",
            {"prompt": "def g(): 1", "entry_point": "f", "test": "x"},
            "line 1: the prompt defines no function 'f'",
        ),
        ("mbpp", {"text": "a", "test_list": "assert 1"}, "line 1: field 'test_list' is \"assert 1\""),
    ],
)
def test_a_record_of_another_set_is_refused(tmp_path, kind, record, message):
    path = write(tmp_path / "bad.jsonl", record)
    with pytest.raises(RequestError, match=message):
        open_task(f"{kind}:path={path}")


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"cannot be read: .*No such file"):
        open_task(f"gsm8k:path={tmp_path / 'none.jsonl'}")
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(RequestError, match="cannot be read"):
        open_task(f"gsm8k:path={tmp_path / 'x.gz'}")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match=r"cannot be read: .*utf-8"):
        open_task(f"gsm8k:path={tmp_path / 'x.jsonl'}")
    with pytest.raises(RequestError, match="reads a file; write gsm8k:path=FILE"):
        open_task("gsm8k")


# Judges.


@pytest.mark.parametrize(
    ("verifier", "answer", "right", "no"),
    [
        ("exact", "a b", [" a\n b "], ["a", "", "A b"]),
        ("choice", "B", ["B", "(b)", "**B**", "The answer is B.", "Answer: (B)", "\\boxed{B}", "B. because A is no",
                         "A is wrong, so I choose option B", "\\boxed{\\text{B}}"],
         ["A", "", "C", "The answer is C, not B", "Because", "\\boxed{C} B"]),
        ("contains", ["red", "Blue"], ["blue and RED"], ["red", ""]),
        ("regex", "^[a-z]+\\d$", ["abc1"], ["abc", "", "ABC1"]),
        ("json", None, ['{"a": 1}', "[1]", "```json\n[1, 2]\n```"], ["{", "", "NaN", "{'a': 1}", "1 2"]),
        ("json", {"type": "object", "required": ["a"]}, ['{"a": null}'], ["{}", "[1]", "{"]),
        ("python", "assert f(2) == 4", ["def f(x): return x * x", "```python\nf = lambda x: x + x\n```"],
         ["def f(x): return x", "", "import sys; sys.exit(0)"]),
        ("number", "1,500", ["$1500", "It costs 1,500.00 dollars"], ["150", "", "1.5"]),
    ],
)  # fmt: skip
def test_a_judge_tells_right_from_wrong(verifier, answer, right, no):
    for text in right:
        assert VERIFIERS[verifier](text, answer).is_right, text
    for text in no:
        verdict = VERIFIERS[verifier](text, answer)
        assert not verdict.is_right and verdict.reward == 0.0 and verdict.why, text


ANSWERS = {
    "exact": "a", "number": "7", "choice": "B", "contains": "a", "regex": "(a+)+$", "json": {"type": "object"},
    "math": "x+1", "python": "assert f(1)",
}  # fmt: skip

NASTY = [
    "```" + " " * 50_000, "```" + "a" * 50_000, "```py\n" + "``" * 50_000,
    "", "\x00", "\ud800", "{" * 3000, "[" * 100_000, "(" * 100_000, "\\boxed{" * 2000, "1" * 100_000, "1," * 50_000,
    "-" * 100_000, "```" * 10_000, "```python\n" * 5000, "a" * 30 + "!", "9" * 50 + "e99", "1/" * 50_000, "\\frac{1}{0}",
    "$" * 10_000, "####" * 10_000, "answer is " * 10_000, "\u0661\u0662", "1e", "∞", "\\boxed{\\frac{1}{0}}",
    "import os; os.abort()", "__import__('os').system('true')", "\n" * 100_000, " " * 100_000 + "x", "answer" + " " * 50_000,
    "```python\n" + "\t" * 50_000,
    "f=lambda x:x\nf" + "(f" * 200 + ")" * 200, '{"a": ' * 5000, "1" + "e9" * 1000, "\r\n```\r\n", "\u2028```\u2028",
]  # fmt: skip


@pytest.mark.parametrize("verifier", sorted(VERIFIERS))
def test_no_text_makes_a_judge_raise_or_wait(verifier):
    if verifier == "math":
        pytest.importorskip("math_verify")
    in_sandbox = verifier in IN_SANDBOX
    rng = random.Random(1)
    pieces = [
        "1",
        "-",
        ",",
        ".",
        "$",
        "\\boxed{",
        "}",
        "####",
        "answer",
        " is ",
        "\n",
        "```",
        "python\n",
        "(",
        "B",
        "é",
        "/",
        "e",
    ]
    texts = NASTY + ["".join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(10 if in_sandbox else 2000)]
    for text in texts:
        begin = time.monotonic()
        verdict = VERIFIERS[verifier](text, ANSWERS[verifier])
        assert 0.0 <= verdict.reward <= 1.0 and isinstance(verdict.why, str) and len(verdict.why) < 500
        assert time.monotonic() - begin < (60 if in_sandbox else 5), text[:50]


def test_an_expression_that_never_ends_its_search_is_ended(monkeypatch):
    monkeypatch.setattr("longreach.tasks.verifiers.SHORT_LIMITS", Limits(cpu_s=1, wall_s=60.0))
    assert "was ended: cpu" in VERIFIERS["regex"]("a" * 60 + "!", "(a+)+$").why


def test_blocks_of_code_are_found():
    assert code_of("no block") is None
    assert code_of("```python\na\n```\ntext\n```python\nb\n```") == "b\n"
    assert code_of("```python\ndef f(): 1\n```\n```python\nf()\n```", containing="def f(") == "def f(): 1\n"
    assert code_of("```python\na\n```\n```text\nb\n```") == "a\n"
    assert code_of("```\nopen") == "open"


def test_a_letter_is_read_where_it_is_decided():
    assert chosen_letter("A or B? I think the answer is (C).") == "C"
    assert chosen_letter("I'd say D") == "D"
    assert chosen_letter("nothing here") is None


def test_json_with_a_schema_names_its_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(RequestError, match="needs jsonschema: pip install jsonschema"):
        VERIFIERS["json"]("{}", {"type": "object"})


@pytest.mark.parametrize(("options", "is_apart"), [("verifier=regex", True), ("verifier=number", False)])
def test_a_task_of_a_file_can_be_sent_to_another_process(tmp_path, options, is_apart):
    task = open_task(f"jsonl:path={write(tmp_path / 'a.jsonl', {'question': 'a', 'answer': '12'})}:{options}")
    assert task.judged_apart is is_apart
    sent = pickle.loads(pickle.dumps(task))
    assert sent.verify(sent.problems()[0], said("It is 12")).is_right
