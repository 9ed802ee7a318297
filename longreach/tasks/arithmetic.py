"""Arithmetic beyond what a small model knows by heart: sums, differences, products and chains of them.

    --task arithmetic                      all forms, all levels
    --task arithmetic:form=product:level=2
    --task arithmetic:form=sum+chain:level=1-3

    level                1             2             3             4              5
    sum                  2 of 2 digits 3 of 2        3 of 3        4 of 3         5 of 4
    difference           2 digits      3             3, signed     4, signed      5, signed
    product              2 × 1 digits  2 × 2         3 × 2         3 × 3          4 × 3
    chain (operations)   2, one digit  2, two digits 3             4              5, up to three digits

The worked solutions are written for small models: digit by digit from the right, and no step needs more than a product of
two digits or a sum with its carry.

    37+48+56    7+8=15+6=21;2+3=5+4=9+5=14:141                column by column, the carry first
    523-168     13-8=5;12-6=6-1=5;5-1=4-1=3:355               ten is borrowed where needed and paid back one column on
    37*48       7*8=56;3*8=24:296;7*4=28:576;3*4=12:1776      digit by digit, behind each colon the sum so far
    (37+48)*6   37+48:7+8=15;1+3=4+4=8:85                     one operation a line
                85*6:5*6=30;8*6=48:510

think-max goes on with `check:`, a second route: the sum in reverse order, the difference added back, the product by casting
out nines, the chain undone from its end.

The answer is an integer; see `longreach.tasks.answers` for what may stand around it, and the question itself may
(`37*48=1776`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.tasks.answers import bare_answer, read_number, shortened
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, read_choices, wrong

FORMS = ("sum", "difference", "product", "chain")

_SUMS = {1: (2, 2), 2: (3, 2), 3: (3, 3), 4: (4, 3), 5: (5, 4)}  # how many numbers, digits of each
_DIFFERENCES = {1: (2, False), 2: (3, False), 3: (3, True), 4: (4, True), 5: (5, True)}  # digits, may be negative
_PRODUCTS = {1: (2, 1), 2: (2, 2), 3: (3, 2), 4: (3, 3), 5: (4, 3)}  # digits
_CHAINS = {1: (2, 9), 2: (2, 99), 3: (3, 99), 4: (4, 99), 5: (5, 999)}  # operations, largest number added or taken away

MOST_IN_CHAIN = 9999
"""No value on the way of a chain is larger; none is below 1."""


class Arithmetic(GeneratedTask):
    """Integers, four forms. `extra` holds the form and the steps: [[left, sign, right], …] in the order of evaluation."""

    kind = "arithmetic"
    domain = "mathematics"
    summary = "sums, differences, products and chains of several steps"
    all_levels = (1, 2, 3, 4, 5)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        self.forms = read_choices(self.kind, "form", options.get("form"), FORMS)

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("form",)

    def make(self, rng: random.Random, level: int) -> Problem:
        form = rng.choice(self.forms)
        if form == "chain":
            text, steps = _chain(rng, level)
        else:
            numbers, sign = _numbers(rng, form, level)
            text = sign.join(map(str, numbers))
            steps = [[numbers[0], sign, numbers[1]]]
            for number in numbers[2:]:
                steps.append([operate(*steps[-1]), sign, number])
        return Problem(
            self.kind, Conversation((Message("user", text + "="),)), operate(*steps[-1]), level,
            {"form": form, "steps": steps},
        )  # fmt: skip

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        message = final_message(reply)
        if message is None or not message.content.strip():
            return wrong("no answer")
        question = problem.conversation.messages[-1].content
        given = bare_answer(message.content)
        if given.replace(" ", "").startswith(question):
            given = given.replace(" ", "")[len(question) :]
        if read_number(given) == problem.answer:
            return RIGHT
        return wrong(f"expected {problem.answer}, got {shortened(message.content)!r}")

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        reasoning = None
        if mode != "non-think":
            reasoning = _worked(problem)
            if mode == "think-max":
                reasoning += f"\ncheck:{_check(problem)};ok"
        return (Message("assistant", str(problem.answer), reasoning=reasoning),)


# ---- problems -------------------------------------------------------------------------------------------------------


def operate(left: int, sign: str, right: int) -> int:
    """The exact result of one operation; `/` is for numbers that divide."""
    assert sign in "+-*/", sign
    if sign == "/":
        assert left % right == 0, (left, right)
        return left // right
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def _numbers(rng: random.Random, form: str, level: int) -> tuple[list[int], str]:
    if form == "sum":
        count, digits = _SUMS[level]
        return [_of_digits(rng, digits) for _ in range(count)], "+"
    if form == "difference":
        digits, signed = _DIFFERENCES[level]
        pair = [_of_digits(rng, digits), _of_digits(rng, digits)]
        return pair if signed else sorted(pair, reverse=True), "-"
    assert form == "product", form
    pair = [_of_digits(rng, digits) for digits in _PRODUCTS[level]]
    rng.shuffle(pair)
    return pair, "*"


def _of_digits(rng: random.Random, digits: int) -> int:
    # One-digit numbers begin at 2: nothing is to be learned from times 1.
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 2, 10**digits)


def _chain(rng: random.Random, level: int) -> tuple[str, list[list]]:
    """An expression that is worked out from the inside, each operation between the value so far and one new number."""
    count, largest = _CHAINS[level]
    signs = "+-"
    while "*" not in signs or signs == "*" * count:
        signs = "".join(rng.choice("+-*") for _ in range(count))
    value = rng.randrange(2, largest + 1)
    text, outer, steps = str(value), "", []
    for sign in signs:
        most = min(largest, MOST_IN_CHAIN // max(value, 1), 9) if sign == "*" else min(largest, MOST_IN_CHAIN - value)
        number = rng.randrange(2, max(most, 2) + 1)
        # Whether the new number stands on the left. A difference has to: it may not fall below zero.
        on_left = number > value if sign == "-" else rng.random() < 0.5
        loose = outer in ("+", "-")
        if (loose and (sign == "*" or on_left)) or (outer == "*" == sign and on_left):
            text = f"({text})"
        steps.append([number, sign, value] if on_left else [value, sign, number])
        text = f"{number}{sign}{text}" if on_left else f"{text}{sign}{number}"
        value, outer = operate(*steps[-1]), sign
        if not 0 < value <= MOST_IN_CHAIN:
            return _chain(rng, level)
    return text, steps


# ---- worked solutions -----------------------------------------------------------------------------------------------


def _worked(problem: Problem) -> str:
    form, steps = problem.extra["form"], problem.extra["steps"]
    if form == "chain":
        return "\n".join(worked_line(*step) for step in steps)
    if form == "sum":
        return worked_sum([steps[0][0], *(right for _, _, right in steps)])
    (left, _, right) = steps[0]
    return worked_difference(left, right) if form == "difference" else worked_product(left, right)


def _check(problem: Problem) -> str:
    form, steps = problem.extra["form"], problem.extra["steps"]
    if form == "sum":
        return worked_sum([*(right for _, _, right in reversed(steps)), steps[0][0]])
    left, sign, right = steps[0]
    if form == "difference":
        # left - right = answer, so the smaller of the two and the distance make the larger
        return worked_line(abs(problem.answer), "+", min(left, right))
    if form == "product":
        nines = [left % 9, right % 9]
        return "\n".join((
            f"{left}:{_nines(left)}", f"{right}:{_nines(right)}",
            f"{nines[0]}*{nines[1]}={nines[0] * nines[1]}:{nines[0] * nines[1] % 9}",
            f"{problem.answer}:{_nines(problem.answer)}",
        ))  # fmt: skip
    assert form == "chain", form
    # The chain may be taken to begin with either number of its first operation; a factor to divide by needs one digit.
    start = max(left, right) if sign == "*" else left
    befores = [start, *(operate(*step) for step in steps[:-1])]
    pairs = reversed(list(zip(steps, befores, strict=True)))
    return "\n".join(worked_line(*_undone(left, sign, right, before)) for (left, sign, right), before in pairs)


def _undone(left: int, sign: str, right: int, before: int) -> tuple[int, str, int]:
    """The operation that leads from the result of a step back to the value before it."""
    after, number = operate(left, sign, right), right if left == before else left
    if sign == "-" and left != before:
        undone = number, "-", after
    else:
        undone = after, {"+": "-", "-": "+", "*": "/"}[sign], number
    assert operate(*undone) == before, (undone, before)
    return undone


def worked_line(left: int, sign: str, right: int) -> str:
    """One operation with its name before it, unless it is a single step: `85*6:5*6=30;8*6=48:510`, `7+8=15`."""
    if left < 10 and right < 10 and left >= right * (sign in "-/"):
        return f"{left}{sign}{right}={operate(left, sign, right)}"
    worked = {
        "+": lambda: worked_sum([left, right]),
        "-": lambda: worked_difference(left, right),
        "*": lambda: worked_product(left, right),
        "/": lambda: worked_quotient(left, right),
    }[sign]()
    return f"{left}{sign}{right}:{worked}"


def worked_sum(numbers: Sequence[int]) -> str:
    """Column by column from the right; a column begins with what was carried. Ends with the sum."""
    assert numbers and min(numbers) >= 0, numbers
    reversed_digits = [str(number)[::-1] for number in numbers]
    columns, carried = [], 0
    for place in range(max(map(len, reversed_digits))):
        terms = [int(digits[place]) for digits in reversed_digits if place < len(digits)]
        if carried:
            terms.insert(0, carried)
        total, text = terms[0], str(terms[0])
        for term in terms[1:]:
            total += term
            text += f"+{term}={total}"
        columns.append(text)
        carried = total // 10
    return ";".join(columns) + (f":{sum(numbers)}" if len(columns) > 1 else "")


def worked_difference(left: int, right: int) -> str:
    """Column by column from the right. Where the right number is larger, the two change places first and the sign comes
    last. Ends with the difference."""
    assert min(left, right) >= 0, (left, right)
    if left < right:
        return f"{right}-{left}:{worked_difference(right, left)}:{left - right}"
    tops, bottoms = str(left)[::-1], str(right)[::-1]
    columns, borrowed = [], 0
    for place, digit in enumerate(tops):
        bottom = int(bottoms[place]) if place < len(bottoms) else 0
        raised = int(digit) + (10 if int(digit) < bottom + borrowed else 0)
        columns.append(
            str(raised)
            + (f"-{bottom}={raised - bottom}" if place < len(bottoms) else "")
            + (f"-1={raised - bottom - 1}" if borrowed else "")
        )
        borrowed = int(raised >= 10)
    return ";".join(columns) + (f":{left - right}" if len(columns) > 1 else "")


def worked_product(left: int, right: int) -> str:
    """Every digit of the left number times every digit of the right one, from the right; behind each the sum so far, which
    the first does not need. Ends with the product."""
    assert min(left, right) >= 0, (left, right)
    parts, total = [], 0
    for i, by in enumerate(reversed(str(right))):
        for j, digit in enumerate(reversed(str(left))):
            product = int(digit) * int(by)
            total += product * 10 ** (i + j)
            parts.append(f"{digit}*{by}={product}" + (f":{total}" if parts else ""))
    return ";".join(parts)


def worked_quotient(left: int, right: int) -> str:
    """Long division by one digit, with each remainder taken to the next: `21/6=3r3;36/6=6r0:36`. Ends with the quotient."""
    assert 0 < right < 10 and left >= 0 and left % right == 0, (left, right)
    digits = str(left)
    first = 2 if len(digits) > 1 and int(digits[0]) < right else 1
    current, parts = int(digits[:first]), []
    for following in (*digits[first:], None):
        parts.append(f"{current}/{right}={current // right}r{current % right}")
        current = current % right * 10 + int(following or 0)
    return ";".join(parts) + f":{left // right}"


def _nines(number: int) -> str:
    """The digits added up, and what is left of that by nines."""
    if number < 10:
        return str(number % 9)
    first, *rest = map(int, str(number))
    total, text = first, str(first)
    for digit in rest:
        total += digit
        text += f"+{digit}={total}"
    return f"{text}:{number % 9}"
