"""Finding lines in a text of lines that all look alike: `--task needles[:kind=multihop][:length=1000000][:level=1-5]`.

    47k=83                                     single       Value of 47k?                   83
    05m=47k                                    several      Values of 47k 31b?              83 20
    31b=12                                     multihop     Follow 05m to its number.       83
    31b=20                                     updates      Last value of 31b?              20

Every line that is not asked for is of the needle's own format, so that no line can be found by its looks: other names have
values, belong to chains of the same number of hops, or are written again further on, as those that are asked for are.

Lengths are counted in characters of the text of lines. A name is digits and one letter, a value two digits, so each
character of a line is one token for every tokenizer that keeps digits apart, as those trained here do; the question adds
about ten tokens, the frame four. Published tokenizers, which join up to three digits, need about two thirds as many.

    level       1     2      3       4       5
    length     48   256   1024    4096    8192
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Literal, NamedTuple, get_args

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.errors import RequestError
from longreach.tasks.base import (
    MOST_DRAWS,
    RIGHT,
    GeneratedTask,
    Problem,
    Split,
    Verdict,
    final_message,
    read_choices,
    wrong,
)

Kind = Literal["single", "several", "multihop", "updates"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LENGTHS = {1: 48, 2: 256, 3: 1024, 4: 4096, 5: 8192}
"""Characters of the text of lines, by level."""

SHORTEST, LONGEST = LENGTHS[1], 2**20
"""What `length` may be."""

HOPS = (2, 3)
"""Lines of a chain, where the task does not say."""

NEEDLES = (2, 4)
"""The fewest and the most values asked for at once, where the task does not say."""

MOST_HOPS, MOST_NEEDLES = 8, 16

PART = 0.5
"""The most that a wrong answer can earn: for the places where it is right."""

# A number that is no part of a name: a quoted line may stand before the answer.
_NUMBER = re.compile(r"(?<![0-9A-Za-z])[0-9]+(?![0-9A-Za-z])")


class Lines(NamedTuple):
    """A text of lines.

    Attributes:
        text: the lines `name=value`, without an end after the last.
        askable: names that questions of a kind may ask for.
        final: of each askable name the number that is the answer.
        hops: lines of each chain.
    """

    text: str
    askable: dict[Kind, list[str]]
    final: dict[str, str]
    hops: int


class Needles(GeneratedTask):
    """Problems of one kind or of all, of the levels' lengths or of one."""

    kind = "needles"
    domain = "long-context"
    summary = "finding values, chains of names and the last of several values in a text of lines that look alike"
    all_levels = tuple(LENGTHS)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        chosen = read_choices(self.kind, "kind", options.get("kind"), KINDS)
        self.kinds: list[Kind] = [kind for kind in KINDS if kind in chosen]
        self.length = _whole(options, "length", SHORTEST, LONGEST)
        self.needles = _whole(options, "needles", 2, MOST_NEEDLES)
        self.hops = _whole(options, "hops", 2, MOST_HOPS)
        for option, kind in (("needles", "several"), ("hops", "multihop")):
            if option in options and kind not in self.kinds:
                raise RequestError(f"task needles: {option} is an option of kind={kind}, which {self.name} leaves out")
        if self.length is not None:
            if "level" in options:
                raise RequestError("task needles: a level is a length; give level or length, not both")
            self.levels = [_level(self.length)]
        shortest = self.length or min(LENGTHS[level] for level in self.levels)
        form = _Format.of(shortest)
        needed = {"needles": ((self.needles or 0) + 1) * form.number, "hops": 2 * form.chain(self.hops or 1)}
        for option, characters in needed.items():
            if characters > shortest:
                raise RequestError(
                    f"task needles: {option}={options[option]} needs a length of {characters}, but here it may be {shortest}; "
                    f"give fewer {option} or a greater length"
                )

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("kind", "length", "needles", "hops")

    def make(self, rng: random.Random, level: int) -> Problem:
        """Of the length of this level, unless the task was opened with a length of its own."""
        kind = rng.choice(self.kinds)
        lines = make_lines(rng, self.length or LENGTHS[level], (kind,), self.hops or rng.randint(*HOPS))
        return self._ask(rng, lines, kind)

    def context_and_questions(
        self, seed: int, length: int, count: int, split: Split | None = None
    ) -> tuple[str, list[Problem]]:
        """One text of lines and questions about it: every question's user message begins with that text, so that its
        cache can be shared. The kinds take turns, and share the text evenly.

        Args:
            length: characters of the text; counts for this call in place of the task's.
            split: the part all of the problems are to belong to; None: either.

        Raises:
            RequestError: the length is out of bounds, or too short for that many questions.
        """
        if not SHORTEST <= length <= LONGEST:
            raise RequestError(f"task {self.name}: a length of {length} is impossible; give {SHORTEST} to {LONGEST}")
        rng = random.Random(f"{self.name}/context/{seed}/{length}")
        lines = make_lines(rng, length, self.kinds, self.hops or rng.randint(*HOPS))
        needed = max(2, self.needles or 0)
        if poor := [kind for kind in self.kinds if len(lines.askable[kind]) < (needed if kind == "several" else 1)]:
            raise RequestError(
                f"task {self.name}: a length of {length} is too short for kind {poor[0]}; give a greater one"
            )
        problems: dict[str, Problem] = {}
        for _ in range(MOST_DRAWS + 10 * count):
            if len(problems) == count:
                break
            problem = self._ask(rng, lines, self.kinds[len(problems) % len(self.kinds)])
            question = problem.conversation.messages[0].content[len(lines.text) :]
            if question not in problems and split in (None, problem.split):
                problems[question] = problem
        if len(problems) < count:
            raise RequestError(
                f"task {self.name}: a length of {length} has only {len(problems)} different questions; "
                f"ask for fewer than {count} or give a greater length"
            )
        return lines.text, list(problems.values())

    def _ask(self, rng: random.Random, lines: Lines, kind: Kind) -> Problem:
        names = lines.askable[kind]
        number = 1
        if kind == "several":
            number = self.needles or min(rng.randint(*NEEDLES), len(names))
        asked = rng.sample(names, number)
        question = {
            "single": f"Value of {asked[0]}?",
            "several": f"Values of {' '.join(asked)}?",
            "multihop": f"Follow {asked[0]} to its number.",
            "updates": f"Last value of {asked[0]}?",
        }[kind]
        conversation = Conversation((Message("user", f"{lines.text}\n\n{question}"),))
        extra = {"kind": kind, "names": asked, "length": len(lines.text)}
        if kind == "multihop":
            extra["hops"] = lines.hops
        return Problem(self.kind, conversation, [lines.final[name] for name in asked], _level(len(lines.text)), extra)

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        """The last numbers said are the answer, in order."""
        final = final_message(reply)
        wanted = problem.answer
        said = _NUMBER.findall(final.content)[-len(wanted) :] if final is not None else []
        if said == wanted:
            return RIGHT
        right = sum(a == b for a, b in zip(said, wanted, strict=True)) if len(said) == len(wanted) else 0
        return wrong(f"the answer is {' '.join(wanted)}", PART * right / len(wanted))

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        """The lines are quoted, then the answer is given. In think-max also what stands behind them is looked at."""
        quoted = []
        for name in problem.extra["names"]:
            for line in _path(problem, name):
                quoted.append(line)
            if mode == "think-max":
                quoted.append(f"later {line.partition('=')[0]}: none")
        reasoning = None if mode == "non-think" else "\n".join(quoted)
        return (Message("assistant", " ".join(problem.answer), reasoning),)

    @staticmethod
    def depth(problem: Problem) -> float:
        """Where the last line stands that the answer needs, as a share of the text: 0 at its beginning, 1 at its end."""
        lines = problem.conversation.messages[0].content[: problem.extra["length"]]
        needed = [line for name in problem.extra["names"] for line in _path(problem, name)]
        return max(f"\n{lines}\n".rindex(f"\n{line}\n") for line in needed) / len(lines)


def _path(problem: Problem, name: str) -> list[str]:
    """The lines that lead from a name to its number, in the order in which they are needed."""
    text = problem.conversation.messages[0].content[: problem.extra["length"]]
    path = []
    while name[-1].isalpha():
        found = re.findall(rf"^{name}=.*$", text, re.MULTILINE)
        path += found
        name = found[-1].partition("=")[2]
    return path


def _whole(options: Mapping[str, str], option: str, least: int, most: int) -> int | None:
    given = options.get(option)
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) < 9 and least <= int(given) <= most):
        raise RequestError(f"task needles: {option}={given} is impossible; give a whole number from {least} to {most}")
    return int(given)


def _level(length: int) -> int:
    """The first level whose texts are as long; the highest for all that is longer."""
    return next((level for level, of in LENGTHS.items() if length <= of), max(LENGTHS))


# ---- the text -------------------------------------------------------------------------------------------------------


class _Format(NamedTuple):
    """How long names and lines are.

    Attributes:
        digits: of a name.
        number, pointer: characters of a line with a number, and with another name, its end included.
    """

    digits: int

    @classmethod
    def of(cls, length: int) -> _Format:
        """For a text of this length: at least twice as many names as lines, so that no name stands there by necessity."""
        digits = 1
        while len(ascii_lowercase) * 10**digits < 2 * (length // cls(digits).number):
            digits += 1
        return cls(digits)

    @property
    def number(self) -> int:
        return self.digits + 5

    def chain(self, hops: int) -> int:
        """Characters of a chain of so many lines."""
        return (hops - 1) * self.pointer + self.number

    @property
    def pointer(self) -> int:
        return 2 * self.digits + 4


def make_lines(rng: random.Random, length: int, kinds: Sequence[Kind], hops: int) -> Lines:
    """Lines in random order, at most `length` characters with the last line's end, and less than a line fewer.

    Each kind has an equal share of the text; what is left over is filled with single values.
    """
    form = _Format.of(length)
    numbers = iter(rng.sample(range(len(ascii_lowercase) * 10**form.digits), length // min(form.number, form.pointer)))

    def new_name() -> str:
        digits, letter = divmod(next(numbers), len(ascii_lowercase))
        return f"{digits:0{form.digits}}{ascii_lowercase[letter]}"

    lines: list[tuple[str, str]] = []
    askable: dict[Kind, list[str]] = {kind: [] for kind in kinds}
    left = length
    for place, kind in enumerate(kinds):
        share = left // (len(kinds) - place)
        left -= share
        while True:
            # A name of `updates` is written once to three times; there is one at least that may be asked for.
            times = 1 if kind != "updates" else 2 if not askable[kind] else rng.randint(1, 3)
            size = form.chain(hops) if kind == "multihop" else times * form.number
            if size > share:
                break
            share -= size
            name = new_name()
            if kind != "updates" or times > 1:
                askable[kind].append(name)
            if kind == "multihop":
                for _ in range(hops - 1):
                    lines.append((name, name := new_name()))
            values = rng.sample(range(10, 100), times)
            lines += [(name, str(value)) for value in values]
        left += share
    while left >= form.number:
        lines.append((new_name(), str(rng.randint(10, 99))))
        left -= form.number
    rng.shuffle(lines)
    written = dict(lines)  # the last one wins
    final = {}
    for name in (name for names in askable.values() for name in names):
        value = name
        while value in written:
            value = written[value]
        final[name] = value
    return Lines("\n".join(f"{name}={value}" for name, value in lines), askable, final, hops)
