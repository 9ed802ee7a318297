"""The instructions task: every constraint judged by hand-written cases and by a second reading of the question."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise

import pytest

from longreach.chat.messages import Conversation, Message
from longreach.tasks.base import Problem
from longreach.tasks.instructions import FORMS, WORDS, holds, phrase
from longreach.tasks.registry import open_task

CASES = [(form, level) for form in FORMS for level in (1, 2, 3)]


def drawn(form, level, count=200):
    task, rng = open_task(f"instructions:form={form}:level={level}"), random.Random(f"{form}{level}")
    return task, [task.draw(rng) for _ in range(count)]


def question(problem) -> str:
    return problem.conversation.messages[0].content


def judged(task, problem, content):
    return task.verify(problem, (Message("assistant", content, reasoning=""),))


@pytest.mark.parametrize(
    ("constraint", "said", "right", "wrong"),
    [
        ({"kind": "words", "count": 3}, "3 words", ["a b c", "Sun,\nmoon star."], ["a b", "a b c d", "a b - "]),
        ({"kind": "words", "count": 1}, "1 word", ["tree"], ["a tree"]),
        ({"kind": "lines", "count": 2}, "2 lines", ["a\nb", "a b\n\nc"], ["a b", "a\nb\nc"]),
        ({"kind": "width", "count": 2}, "2 words a line", ["a b\nc d", "a b"], ["a b\nc", "a"]),
        ({"kind": "letters", "count": 4}, "4 letters a word", ["moon, tree"], ["moon sun", "moons"]),
        ({"kind": "case", "case": "lower"}, "lower case", ["a b, 3"], ["A b", "123"]),
        ({"kind": "case", "case": "upper"}, "upper case", ["A B!"], ["A b", "..."]),
        ({"kind": "first", "word": "tree"}, "first tree", ["Tree sun", "tree"], ["a tree", "trees"]),
        ({"kind": "last", "word": "tree"}, "last tree", ["a TREE."], ["tree a", "subtree"]),
        ({"kind": "with", "word": "tree"}, "with tree", ["a Tree, b"], ["treehouse"]),
        ({"kind": "without", "letter": "e"}, "no letter e", ["moon"], ["tree", "TREE"]),
        ({"kind": "order", "before": "ant", "after": "tree"}, "ant before tree", ["ant x tree"], ["tree ant", "ant", "tree"]),
        ({"kind": "once"}, "no word twice", ["a b c"], ["a b a", "A a"]),
        ({"kind": "keys", "keys": ["b", "a"], "listed": "b a"}, "keys b a", ['{"a": 1, "b": []}'],
         ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '["a", "b"]', 'x {"a": 1, "b": 2}', '{"a": 1, "b": 2, "a": 3}', "{"]),
        ({"kind": "values", "of": "numbers"}, "values numbers", ['{"a": 1, "b": 2.5}'],
         ['{"a": "1"}', '{"a": true}', '{"a": NaN}', "{}", "5", '{"a": null}']),
        ({"kind": "values", "of": "words"}, "values words", ['{"a": "sun"}'], ['{"a": 1}', '{"a": ""}', '{"a": "b c"}']),
        ({"kind": "value", "key": "a", "value": 7}, "a is 7", ['{"a": 7}'], ['{"a": "7"}', '{"a": 7.0}', '{"b": 7}', "7"]),
        ({"kind": "value", "key": "a", "value": 1}, "a is 1", ['{"a": 1}'], ['{"a": true}']),
        ({"kind": "exactly", "words": ["a", "b"], "said": "sort b a"}, "sort b a", ["a b", "A\nB."], ["b a", "a", "a b b"]),
        ({"kind": "separated", "count": 3}, "commas between", ["a, b, c"], ["a b c", "a, b, c,"]),
    ],
)  # fmt: skip
def test_each_constraint_means_what_it_says(constraint, said, right, wrong):
    assert phrase(constraint) == said
    assert all(holds(constraint, text) for text in right)
    assert not any(holds(constraint, text) for text in wrong)


def fulfils(clause, text):
    """A second reading of one clause of a question, by other means than the task's."""
    words = re.findall(r"[a-z]+", text.lower())
    lines = text.split("\n")
    readings = {
        r"write (\d+) words?": lambda n: len(words) == int(n),
        r"(?:write )?(\d+) lines?": lambda n: len(lines) == int(n),
        r"(\d+) words? a line": lambda n: {len(line.split()) for line in lines} == {int(n)},
        r"(\d+) letters a word": lambda n: {len(word) for word in words} == {int(n)},
        r"upper case": lambda: text.isupper(),
        r"lower case": lambda: text.islower(),
        r"first (\w+)": lambda w: words[0] == w,
        r"last (\w+)": lambda w: words[-1] == w,
        r"with (\w+)": lambda w: w in words,
        r"no letter (\w)": lambda c: c not in text.lower(),
        r"(\w+) before (\w+)": lambda a, b: words.index(a) < words.index(b),
        r"no word twice": lambda: len(words) == len(set(words)),
        r"commas between": lambda: re.fullmatch(r"[^,\n]+(, [^,\n]+)+", text) is not None,
        r"json object": lambda: isinstance(json.loads(text), dict),
        r"keys (.+)": lambda keys: list(json.loads(text)) == keys.split(),
        r"values numbers": lambda: all(type(value) is int for value in json.loads(text).values()),
        r"values words": lambda: all(value in WORDS for value in json.loads(text).values()),
        r"(\w+) is (\w+)": lambda key, value: str(json.loads(text)[key]) == value,
        r"repeat (\d+) times (.+)": lambda n, said: words == said.split() * int(n),
        r"sort z to a (.+)": lambda said: words == sorted(said.split())[::-1],
        r"sort (.+)": lambda said: words == sorted(said.split()),
    }
    for pattern, reading in readings.items():
        if found := re.fullmatch(pattern, clause.lower()):
            return reading(*found.groups())
    raise AssertionError(f"no reading of {clause!r}")


@pytest.mark.parametrize(("form", "level"), CASES)
def test_worked_solutions_satisfy_the_words_of_the_question(form, level):
    task, problems = drawn(form, level)
    for problem in problems:
        text = question(problem)
        (message,) = task.demonstrate(problem, "think-max", random.Random(problem.id))
        assert text.endswith(".") and all(fulfils(clause, message.content) for clause in text[:-1].split(", ")), text
        for constraint in problem.answer:
            assert f"{phrase(constraint)} ok" in message.reasoning


@pytest.mark.parametrize(("form", "level"), CASES)
def test_a_reply_to_another_question_is_rarely_right(form, level):
    task, problems = drawn(form, level, 100)
    rights = 0
    for problem, other in pairwise(problems):
        (message,) = task.demonstrate(other, "non-think", random.Random(0))
        rights += task.verify(problem, (message,)).is_right
    assert rights <= 5


@pytest.mark.parametrize("level", [1, 2, 3])
def test_more_instructions_make_a_higher_level(level):
    for form in ("words", "lines"):
        _, problems = drawn(form, level)
        shape = 1 if form == "words" else 2
        counts = {len(problem.answer) - shape for problem in problems}
        assert counts <= ({1, 2} if level == 1 else {level})


def test_the_reward_is_the_share_of_instructions_fulfilled():
    constraints = [{"kind": "words", "count": 3}, {"kind": "case", "case": "lower"}, {"kind": "last", "word": "tree"},
                   {"kind": "without", "letter": "o"}]  # fmt: skip
    problem = Problem("instructions", Conversation((Message("user", "Write 3 words, …"),)), constraints)
    task = open_task("instructions")
    assert judged(task, problem, "a big tree") == (1.0, True, "")
    verdict = judged(task, problem, "a big tree house")
    assert verdict.reward == 0.25 and not verdict.is_right
    assert verdict.why == "not fulfilled: 3 words; last tree; no letter o; got 'a big tree house'"
    assert judged(task, problem, "A big tree").reward == 0.75
    assert judged(task, problem, " \n").reward == 0
