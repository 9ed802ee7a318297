"""Following instructions that can be checked: so many words, this one last, no letter e, a JSON object with these keys.

    --task instructions
    --task instructions:form=words+json:level=1-2

    form      level 1                         levels 2 and 3 add
    words     number of words and one more    two, then three more
    lines     lines, words in each, one more  two, then three more
    json      an object with these keys       kind of the values, then one given value
    repeat    a text so many times            a separator, then upper or lower case
    sort      words by the alphabet           more words, backwards or one on a line, then case

A reply gets as reward the share of its instructions that are fulfilled, and is right if all are. Words are set apart by white
space; punctuation at their ends does not count, nor does case where they are compared. An empty reply fulfils nothing. A JSON
object stands alone, without a fence, and has no key twice.

The worked solution is a numbered draft; think-max goes over the instructions once more.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.tasks.answers import shortened
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, read_choices, wrong

FORMS = ("words", "lines", "json", "repeat", "sort")

_NOUNS = """
ant bag bed bee bus cap car cat cow cup day dog ear egg fan fox hat hen ice jar key leg map
ball bank bird boat book cake card city door duck farm fish game gold hand hill home king lake leaf lion moon nest
road rock roof room rope rose salt seed ship shoe snow song star tree wall wind wood
apple beach bread chair cloud fruit glass grass horse house light mouse music night paper piano queen river stone
table train water
"""

WORDS = _NOUNS.split()
"""What worked solutions are made of; a reply may use any words."""

_LETTERS = "aeiorstln"

Constraint = Mapping[str, Any]
"""`kind` and what it needs; JSON values."""


class Instructions(GeneratedTask):
    """Five forms. The answer is the list of constraints."""

    kind = "instructions"
    domain = "instructions"
    summary = "texts, lists and JSON that have to satisfy several constraints"
    all_levels = (1, 2, 3)

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        self.forms = read_choices(self.kind, "form", options.get("form"), FORMS)

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("form",)

    def make(self, rng: random.Random, level: int) -> Problem:
        form = rng.choice(self.forms)
        question, constraints = {
            "words": _words, "lines": _lines, "json": _json, "repeat": _repeat, "sort": _sort,
        }[form](rng, level)  # fmt: skip
        return Problem(
            self.kind, Conversation((Message("user", question),)), constraints, level, {"form": form}
        )  # fmt: skip

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        message = final_message(reply)
        if message is None or not message.content.strip():
            return wrong("no answer")
        text = message.content.strip()
        missed = [constraint for constraint in problem.answer if not holds(constraint, text)]
        if not missed:
            return RIGHT
        share = 1 - len(missed) / len(problem.answer)
        return wrong(f"not fulfilled: {'; '.join(map(phrase, missed))}; got {shortened(text)!r}", share)

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        content, draft = _solve(problem.extra["form"], problem.answer, rng)
        reasoning = None if mode == "non-think" else draft
        if mode == "think-max":
            reasoning = f"{draft}\ncheck:" + ";".join(f"{phrase(constraint)} ok" for constraint in problem.answer)
        return (Message("assistant", content, reasoning=reasoning),)


# ---- constraints ----------------------------------------------------------------------------------------------------


def phrase(constraint: Constraint) -> str:
    """As the question says it."""
    text = _CHECKS[constraint["kind"]][0].format(**constraint)
    return text.replace("1 lines", "1 line").replace("1 words", "1 word") if constraint.get("count") == 1 else text


def holds(constraint: Constraint, text: str) -> bool:
    """Whether a reply, stripped of white space around it, fulfils this constraint."""
    return _CHECKS[constraint["kind"]][1](text, constraint)


_PUNCTUATION = string.punctuation + "…“”‘’–—"


def _plain(text: str) -> list[str]:
    """The words, for comparison."""
    words = [word.strip(_PUNCTUATION).casefold() for word in text.split()]
    return [word for word in words if word]


def _has_case(text: str, case: str) -> bool:
    changed = text.lower() if case == "lower" else text.upper()
    return text == changed and text.lower() != text.upper()


def _in_order(text: str, constraint: Constraint) -> bool:
    words = _plain(text)
    before, after = constraint["before"], constraint["after"]
    return before in words and after in words and words.index(before) < words.index(after)


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is none, or has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _has_values(text: str, constraint: Constraint) -> bool:
    values = (_object(text) or {}).values()
    if constraint["of"] == "numbers":
        return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return bool(values) and all(isinstance(v, str) and v.isalpha() for v in values)


def _is_value(found: Any, wanted: Any) -> bool:
    return type(found) is type(wanted) and found == wanted


_CHECKS: dict[str, tuple[str, Callable[[str, Constraint], bool]]] = {
    "words": ("{count} words", lambda text, c: len(_plain(text)) == c["count"]),
    "lines": ("{count} lines", lambda text, c: sum(bool(line.strip()) for line in text.splitlines()) == c["count"]),
    "width": (
        "{count} words a line",
        lambda text, c: all(len(_plain(line)) == c["count"] for line in text.splitlines() if line.strip()),
    ),
    "letters": ("{count} letters a word", lambda text, c: all(len(word) == c["count"] for word in _plain(text))),
    "case": ("{case} case", lambda text, c: _has_case(text, c["case"])),
    "first": ("first {word}", lambda text, c: _plain(text)[:1] == [c["word"]]),
    "last": ("last {word}", lambda text, c: _plain(text)[-1:] == [c["word"]]),
    "with": ("with {word}", lambda text, c: c["word"] in _plain(text)),
    "without": ("no letter {letter}", lambda text, c: c["letter"] not in text.casefold()),
    "order": ("{before} before {after}", _in_order),
    "once": ("no word twice", lambda text, c: len(set(_plain(text))) == len(_plain(text))),
    "keys": ("keys {listed}", lambda text, c: sorted(_object(text) or {}) == sorted(c["keys"])),
    "values": ("values {of}", _has_values),
    "value": ("{key} is {value}", lambda text, c: _is_value((_object(text) or {}).get(c["key"]), c["value"])),
    "exactly": ("{said}", lambda text, c: _plain(text) == c["words"]),
    "separated": ("commas between", lambda text, c: text.count(",") == c["count"] - 1),
}
"""Kind of constraint: how a question says it, and whether a text fulfils it."""


# ---- questions ------------------------------------------------------------------------------------------------------

_Made = tuple[str, list[dict[str, Any]]]


def _words(rng: random.Random, level: int) -> _Made:
    count = rng.randrange(3, 5 + level)
    return _text(rng, level, [{"kind": "words", "count": count}])


def _lines(rng: random.Random, level: int) -> _Made:
    lines, width = rng.randrange(2, 3 + level), rng.randrange(1, 3 + level // 2)
    return _text(rng, level, [{"kind": "lines", "count": lines}, {"kind": "width", "count": width}])


def _text(rng: random.Random, level: int, shape: list[dict[str, Any]]) -> _Made:
    """A text of this shape with further constraints, drawn again until some text fulfils them all."""
    while True:
        more = [_more(rng, kind) for kind in rng.sample(_MORE, level)]
        # A lone `lower case` or `no word twice` would leave few different questions.
        if level == 1 and more[0]["kind"] in ("case", "once", "letters", "without"):
            more.append(_more(rng, rng.choice(("first", "last", "with", "order"))))
        constraints = [*shape, *more]
        if _fill(constraints, rng):
            return f"Write {', '.join(map(phrase, constraints))}.", constraints


_MORE = ("letters", "case", "first", "last", "with", "without", "order", "once")


def _more(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind in ("first", "last", "with"):
        return {"kind": kind, "word": rng.choice(WORDS)}
    if kind == "order":
        before, after = rng.sample(WORDS, 2)
        return {"kind": kind, "before": before, "after": after}
    drawn = {
        "letters": {"count": rng.choice((3, 4, 5))},
        "case": {"case": rng.choice(("lower", "upper"))},
        "without": {"letter": rng.choice(_LETTERS)},
        "once": {},
    }
    return {"kind": kind, **drawn[kind]}


def _json(rng: random.Random, level: int) -> _Made:
    keys = rng.sample(WORDS, rng.randrange(2, 4) + (level > 2))
    constraints: list[dict[str, Any]] = [{"kind": "keys", "keys": keys, "listed": " ".join(keys)}]
    of = rng.choice(("numbers", "words"))
    if level > 1:
        constraints.append({"kind": "values", "of": of})
    if level > 2:
        value = rng.randrange(100) if of == "numbers" else rng.choice(WORDS)
        constraints.append({"kind": "value", "key": rng.choice(keys), "value": value})
    return f"JSON object, {', '.join(map(phrase, constraints))}.", constraints


def _repeat(rng: random.Random, level: int) -> _Made:
    words, times = rng.sample(WORDS, rng.randrange(1, 3) + (level > 1)), rng.randrange(2, 4 + level)
    said = f"repeat {times} times {' '.join(words)}"
    constraints: list[dict[str, Any]] = [{"kind": "exactly", "words": words * times, "said": said}]
    if level > 1:
        separators = ({"kind": "lines", "count": times}, {"kind": "separated", "count": times})
        constraints.append(rng.choice(separators))
    if level > 2:
        constraints.append({"kind": "case", "case": rng.choice(("lower", "upper"))})
    return _sentence(constraints), constraints


def _sort(rng: random.Random, level: int) -> _Made:
    words = rng.sample(WORDS, rng.randrange(2, 4) + level)
    is_backwards = level > 1 and rng.random() < 0.5
    said = f"{'sort z to a' if is_backwards else 'sort'} {' '.join(words)}"
    constraints: list[dict[str, Any]] = [
        {"kind": "exactly", "words": sorted(words, reverse=is_backwards), "said": said}
    ]
    if level > 1:
        constraints.append({"kind": "lines", "count": rng.choice((1, len(words)))})
    if level > 2:
        constraints.append({"kind": "case", "case": rng.choice(("lower", "upper"))})
    return _sentence(constraints), constraints


def _sentence(constraints: Sequence[Constraint]) -> str:
    text = ", ".join(map(phrase, constraints))
    return text[0].upper() + text[1:] + "."


# ---- worked solutions -----------------------------------------------------------------------------------------------


def _solve(form: str, constraints: Sequence[Constraint], rng: random.Random) -> tuple[str, str]:
    """A text that fulfils the constraints, and the draft that leads to it."""
    by_kind = {constraint["kind"]: constraint for constraint in constraints}
    if form == "json":
        return _object_for(by_kind, rng)
    if form in ("words", "lines"):
        lines = None
        while lines is None:  # questions are made so that there is one
            lines = _fill(constraints, rng)
    else:
        words = by_kind["exactly"]["words"]
        count = by_kind.get("lines", by_kind.get("separated", {"count": 1}))["count"]
        width = len(words) // count
        lines = [words[start : start + width] for start in range(0, len(words), width)]
    if by_kind.get("case", {}).get("case") == "upper":
        lines = [[word.upper() for word in line] for line in lines]
    separator = ", " if "separated" in by_kind else "\n"
    texts = [" ".join(line) for line in lines]
    numbered = texts if len(texts) > 1 else texts[0].split()
    return separator.join(texts), " ".join(f"{number} {text}" for number, text in enumerate(numbered, 1))


def _object_for(by_kind: Mapping[str, Constraint], rng: random.Random) -> tuple[str, str]:
    of = by_kind.get("values", {"of": "words"})["of"]
    found: dict[str, Any] = {}
    for key in by_kind["keys"]["keys"]:
        found[key] = rng.randrange(10) if of == "numbers" else rng.choice(WORDS)
    if fixed := by_kind.get("value"):
        found[fixed["key"]] = fixed["value"]
    return json.dumps(found), " ".join(f"{key} {value}" for key, value in found.items())


def _fill(constraints: Sequence[Constraint], rng: random.Random) -> list[list[str]] | None:
    """Lines of words for the constraints of a text; None if the words they name do not go together."""
    by_kind = {constraint["kind"]: constraint for constraint in constraints}
    height = by_kind["lines"]["count"] if "lines" in by_kind else 1
    width = by_kind["width"]["count"] if "width" in by_kind else by_kind["words"]["count"]
    slots: list[str | None] = [None] * (height * width)
    if "first" in by_kind:
        slots[0] = by_kind["first"]["word"]
    if "last" in by_kind:
        if slots[-1] is not None:
            return None
        slots[-1] = by_kind["last"]["word"]
    inner = [by_kind["with"]["word"]] if "with" in by_kind else []
    ordered = [by_kind["order"]["before"], by_kind["order"]["after"]] if "order" in by_kind else []
    free = [place for place, word in enumerate(slots) if word is None]
    if len(free) < len(inner) + len(ordered):
        return None
    places = rng.sample(free, len(inner) + len(ordered))
    for place, word in zip(places, inner, strict=False):
        slots[place] = word
    for place, word in zip(sorted(places[len(inner) :]), ordered, strict=True):
        slots[place] = word
    named = [word for word in slots if word is not None]
    pool = [word for word in WORDS if word not in named]
    rng.shuffle(pool)
    for constraint in constraints:
        if constraint["kind"] in ("letters", "without"):
            if not all(holds(constraint, word) for word in named):
                return None
            pool = [word for word in pool if holds(constraint, word)]
    if len(set(named)) < len(named) or len(pool) < slots.count(None):
        return None
    filled = [word if word is not None else pool.pop() for word in slots]
    return [filled[start : start + width] for start in range(0, len(filled), width)]
