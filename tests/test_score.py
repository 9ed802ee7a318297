"""Scores and what can be said of them: intervals against published and hand-made figures, and pairs of models."""

from __future__ import annotations

import math
import random
import re

import pytest
from episodes import ScriptedSource, Sums
from serving import make_tokenizer

from longreach.errors import RequestError
from longreach.evaluate.judging import Judging
from longreach.evaluate.score import Score, paired, problems, score
from longreach.evaluate.stats import mean_interval, paired_difference, t_quantile, wilson

WINDOW = {"non-think": 200, "think-high": 200}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ask(tokenizer, say, tasks=None, **changes) -> list[Score]:
    options = {"modes": ["non-think"], "count": 30, "seed": 0, "window": WINDOW} | changes
    with Judging() as judging:
        return score(ScriptedSource(tokenizer, say), tokenizer, tasks or [Sums({})], judging=judging, **options)


def able(prompt: str) -> str:
    a, b = map(int, re.search(r"(\d+)\+(\d+)<", prompt).groups())
    return ("so</think>" if prompt.endswith("<think>") else "") + str(a + b)


def weak(prompt: str) -> str:
    """Cannot carry."""
    a, b = map(int, re.search(r"(\d+)\+(\d+)<", prompt).groups())
    return able(prompt) if a % 10 + b % 10 < 10 else "0"


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_wilsons_interval_is_the_published_one():
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    published = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718))
    for right, count, low, high in published:
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def pairs(both: int, first: int, second: int, none: int) -> tuple[list[bool], list[bool]]:
    return (
        [True] * (both + first) + [False] * (second + none),
        [True] * both + [False] * first + [True] * second + [False] * none,
    )


def test_the_paired_interval_is_that_of_newcombes_method_10():
    def plain(a, b, c, d):
        """The formula as published, difference of first minus second."""
        n = a + b + c + d
        p1, p2 = (a + b) / n, (a + c) / n
        (l1, u1), (l2, u2) = wilson(a + b, n), wilson(a + c, n)
        top = a * d - b * c
        top = max(top - n / 2, 0) if top > 0 else top
        bottom = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
        phi = top / bottom if bottom else 0.0
        low = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
        high = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
        return p1 - p2 - low, p1 - p2 + high

    for table in ((36, 12, 2, 0), (20, 12, 2, 16), (43, 0, 1, 0), (14, 5, 0, 22), (0, 0, 0, 9), (5, 0, 0, 0)):
        found = paired_difference(*pairs(*table))
        low, high = plain(*table)
        assert (-found.high, -found.low) == pytest.approx((max(low, -1), min(high, 1)), abs=1e-12)
        assert (found.only_first, found.only_second) == table[1:3]


def test_the_paired_interval_holds_the_truth_19_times_of_20():
    rng = random.Random(1)
    for both, first, second in ((0.5, 0.1, 0.05), (0.8, 0.02, 0.06), (0.1, 0.3, 0.1)):
        held = 0
        for _ in range(600):
            drawn = [rng.random() for _ in range(150)]
            found = paired_difference(
                [x < both + first for x in drawn],
                [x < both or both + first <= x < both + first + second for x in drawn],
            )
            held += found.low <= second - first <= found.high
        assert 0.93 <= held / 600 <= 0.985


def test_students_t_is_that_of_the_tables():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 120: 1.980}
    assert {n: round(t_quantile(n), 3) for n in table} == table
    assert t_quantile(2, 0.99) == pytest.approx(9.925, abs=5e-4)


def test_a_mean_comes_with_its_interval():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert mean_interval([5.0]) == (5.0, math.inf)
    with pytest.raises(RequestError, match="no mean of no values"):
        mean_interval([])


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_a_score_counts_right_answers_their_length_and_what_was_cut_off(tokenizer):
    def say(prompt: str) -> str:
        a, b = map(int, re.search(r"(\d+)\+(\d+)<", prompt).groups())
        return "1" * 300 if a < 3 else "x" if b < 3 else str(a + b)

    [found] = ask(tokenizer, say, [Sums({"level": "1"})], count=15)
    asked = list(problems(Sums({"level": "1"}), "held-out", 0, 15))
    pairs_ = [tuple(map(int, p.conversation.messages[0].content.split("+"))) for p in asked]
    assert found.n == 15 and found.right == sum(a >= 3 and b >= 3 for a, b in pairs_)
    assert found.truncated == sum(a < 3 for a, _ in pairs_) / 15 and found.unjudged == 0
    assert found.accuracy == found.right / 15 == found.reward
    assert found.mean_tokens == sum(r.tokens for r in found.results) / 15
    assert (found.low, found.high) == wilson(found.right, 15)
    assert str(found).startswith(f"sums:level=1, non-think: {found.right} of 15 right, ")


def test_every_task_is_asked_in_every_mode_with_the_same_problems(tokenizer):
    tasks = [Sums({"level": "1"}), Sums({"level": "2"})]
    scores = ask(tokenizer, able, tasks, modes=["non-think", "think-high"], count=10)
    assert [(s.task, s.mode) for s in scores] == [(t.name, m) for t in tasks for m in ("non-think", "think-high")]
    assert {s.accuracy for s in scores} == {1.0}
    assert [r.problem for r in scores[0].results] == [r.problem for r in scores[1].results]


def test_only_held_out_problems_are_asked_and_each_once(tokenizer):
    small = Sums({"level": "1"})  # a hundred problems, about twenty of them held out
    [found] = ask(tokenizer, able, [small], count=1000)
    held_out = {p.id for a in range(10) for b in range(10) if (p := made(small, a, b)).split == "held-out"}
    assert {r.problem for r in found.results} == held_out and found.n == len(held_out)
    [train] = ask(tokenizer, able, [small], count=1000, split="train")
    assert train.n + found.n == 100


def made(task, a, b):
    class Fixed(random.Random):
        def __init__(self):
            super().__init__()
            self.left = [a, b]

        def randrange(self, *_):
            return self.left.pop(0)

    return task.make(Fixed(), 1)


def test_levels_are_counted_apart(tokenizer):
    [found] = ask(tokenizer, weak, count=40)
    parts = found.by_level()
    assert [part.level for part in parts] == [1, 2] and sum(part.n for part in parts) == 40
    assert sum(part.right for part in parts) == found.right


def test_two_models_are_compared_on_the_same_problems(tokenizer):
    [a], [b] = ask(tokenizer, weak, count=60), ask(tokenizer, able, count=60)
    found = paired(a, b)
    assert found.count == 60 and found.only_first == 0 and found.only_second == 60 - a.right
    assert found.difference == pytest.approx(b.accuracy - a.accuracy) and found.is_certain
    assert not paired(a, a).is_certain and paired(a, a).difference == 0
    assert paired(b, a).low == pytest.approx(-found.high)


def test_scores_of_different_problems_are_not_compared(tokenizer):
    [a], [b] = ask(tokenizer, able, count=10), ask(tokenizer, able, count=10, seed=1)
    with pytest.raises(RequestError, match="are of different problems"):
        paired(a, b)


def test_answers_that_could_not_be_judged_count_as_wrong_and_are_counted(tokenizer):
    class Moody(Sums):
        def verify(self, problem, reply):
            return super().verify(problem, reply) if problem.answer % 2 else {}["even"]

    [found] = ask(tokenizer, able, [Moody({})])
    assert found.unjudged == sum(not r.is_judged for r in found.results) > 0
    assert found.right + found.unjudged == found.n


def test_the_same_seed_gives_the_same_score(tokenizer):
    assert ask(tokenizer, weak) == ask(tokenizer, weak)


def test_what_is_drawn_follows_the_seed_and_the_problem(tokenizer):
    def seeds(seed: int) -> list[int]:
        source, found = ScriptedSource(tokenizer, able), []
        submit = source.submit
        source.submit = lambda turn: found.append(turn.params.seed) or submit(turn)
        with Judging() as judging:
            score(
                source, tokenizer, [Sums({})], modes=["non-think"], count=20, seed=seed, window=WINDOW, judging=judging
            )
        return found

    assert seeds(1) == seeds(1) and len({*seeds(1), *seeds(2)}) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"count": 0}, "ask at least 1"), ({"modes": ["think-max"]}, "no window is given for mode think-max")],
)
def test_what_makes_no_sense_is_refused(tokenizer, changes, message):
    with pytest.raises(RequestError, match=message):
        ask(tokenizer, able, **changes)
