"""The task `needles`: texts of lines that look alike, one answer in each, and many questions about one text."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import MODES, in_mode
from longreach.chat.renderer import render
from longreach.errors import RequestError
from longreach.tasks.base import RIGHT, Problem, problem_at
from longreach.tasks.needles import KINDS, LENGTHS, LONGEST, Needles
from longreach.tasks.registry import open_task
from longreach.tokenizer.bpe import Tokenizer

LINE = re.compile(r"([0-9]+[a-z])=([0-9]{2}|[0-9]+[a-z])")
QUESTIONS = {
    "single": re.compile(r"Value of (\S+)\?"),
    "several": re.compile(r"Values of (\S+(?: \S+)+)\?"),
    "multihop": re.compile(r"Follow (\S+) to its number\."),
    "updates": re.compile(r"Last value of (\S+)\?"),
}


def read(problem: Problem) -> tuple[list[tuple[str, str]], str]:
    """The lines of a problem's text and its question, read as a stranger would."""
    text, _, question = problem.conversation.messages[0].content.partition("\n\n")
    lines = [LINE.fullmatch(line) for line in text.split("\n")]
    assert all(lines), "a line has another format"
    return [(line[1], line[2]) for line in lines if line], question


def solved(problem: Problem) -> list[str]:
    """The answer, worked out from the text of the prompt alone."""
    lines, question = read(problem)
    (names,) = [found[1].split() for kind in KINDS if (found := QUESTIONS[kind].fullmatch(question))]
    answer = []
    for name in names:
        while name[-1].isalpha():
            name = [value for key, value in lines if key == name][-1]
        answer.append(name)
    return answer


def draws(specification: str, count: int = 30) -> list[Problem]:
    task = open_task(specification)
    return [task.make(random.Random(f"{number}"), level) for level in task.levels for number in range(count)]


def whole(task, problem: Problem, mode: str) -> Conversation:
    asked = in_mode(problem.conversation, mode)
    return dataclasses.replace(asked, messages=asked.messages + task.demonstrate(problem, mode, random.Random(0)))


def says(text: str) -> list[Message]:
    return [Message("assistant", text)]


# ---- the text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stands_in_the_text_as_documented(kind):
    for problem in draws(f"needles:kind={kind}"):
        assert problem.extra["kind"] == kind and QUESTIONS[kind].fullmatch(read(problem)[1])
        assert problem.answer == solved(problem)
        assert all(re.fullmatch("[0-9]{2}", value) for value in problem.answer)


def test_all_kinds_come_up_by_themselves_and_only_those_asked_for():
    assert {problem.extra["kind"] for problem in draws("needles:level=1")} == set(KINDS)
    assert {p.extra["kind"] for p in draws("needles:level=1:kind=single+updates")} == {"single", "updates"}


@pytest.mark.parametrize("kind", ["single", "several"])
def test_every_name_has_one_value_and_could_have_been_asked_for(kind):
    for problem in draws(f"needles:kind={kind}"):
        lines, _ = read(problem)
        assert len({name for name, _ in lines}) == len(lines) > len(problem.answer)
        assert all(value.isdecimal() for _, value in lines)


@pytest.mark.parametrize("hops", [2, 3, 5])
def test_a_chain_has_its_hops_and_others_of_the_same_length_stand_beside_it(hops):
    for problem in draws(f"needles:kind=multihop:hops={hops}:level=2-4"):
        lines, _ = read(problem)
        values = dict(lines)
        lengths = Counter()
        for start in set(values) - set(values.values()):
            steps, name = 0, start
            while name in values:
                steps, name = steps + 1, values[name]
            lengths[steps] += 1
            if start == problem.extra["names"][0]:
                assert steps == hops == problem.extra["hops"]
        assert lengths[hops] >= 2 and set(lengths) <= {1, hops}
        assert lengths[1] < hops + 1, "single lines only fill what no chain fits into"


def test_chains_have_two_or_three_hops_by_themselves():
    assert {problem.extra["hops"] for problem in draws("needles:kind=multihop")} == {2, 3}


def test_of_updates_the_last_line_counts_and_other_names_are_written_again_too():
    first_is_wrong = 0
    for problem in draws("needles:kind=updates:level=2-4"):
        lines, _ = read(problem)
        (name,) = problem.extra["names"]
        values = [value for key, value in lines if key == name]
        assert len(values) in (2, 3) and len(set(values)) == len(values)
        assert problem.answer == values[-1:]
        first_is_wrong += values[0] != problem.answer[0]
        times = Counter(Counter(key for key, _ in lines).values())
        assert set(times) == {1, 2, 3} and times[2] + times[3] > 5
    assert first_is_wrong == 90


@pytest.mark.parametrize("kind", ["multihop", "updates"])
def test_lines_that_belong_together_stand_apart_in_any_order(kind):
    adjacent = backwards = 0
    for problem in draws(
        f"needles:kind={kind}:hops=2:level=3" if kind == "multihop" else f"needles:kind={kind}:level=3", 100
    ):
        lines, _ = read(problem)
        name = problem.extra["names"][0]
        first = next(place for place, (key, _) in enumerate(lines) if key == name)
        second = max(
            place for place, (key, _) in enumerate(lines) if key == (lines[first][1] if kind == "multihop" else name)
        )
        adjacent += abs(first - second) == 1
        backwards += second < first
    assert adjacent < 15 and (25 < backwards < 75 if kind == "multihop" else backwards == 0)


def test_needles_stand_everywhere_in_the_text():
    task = open_task("needles:kind=single:level=3")
    depths = [task.depth(problem) for problem in draws("needles:kind=single:level=3", 400)]
    tenths = Counter(int(10 * depth) for depth in depths)
    assert set(tenths) == set(range(10)) and min(tenths.values()) > 15
    text, (problem, *_) = task.context_and_questions(1, 1000, 3)
    line = f"{problem.extra['names'][0]}={problem.answer[0]}"
    assert abs(task.depth(problem) - text.index(line) / len(text)) < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [48, 100, 333, 5000, 60_000])
def test_a_length_is_kept_to_less_than_a_line(kind, length):
    task = open_task(f"needles:kind={kind}:length={length}")
    for number in range(5):
        problem = task.draw(random.Random(number))
        text = problem.conversation.messages[0].content.partition("\n\n")[0]
        assert length - 12 < len(text) < length and len(text) == problem.extra["length"]


def test_levels_are_lengths():
    for level, length in LENGTHS.items():
        problem = open_task("needles").draw(random.Random(1), level)
        assert problem.level == level and length - 10 < problem.extra["length"] < length
    assert open_task("needles:length=1000").draw(random.Random(1)).level == 3
    assert open_task(f"needles:length={LONGEST}").draw(random.Random(1)).level == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_characters_are_made_in_less_than_two_seconds(kind):
    task = open_task(f"needles:kind={kind}:length=1000000")
    start = time.process_time()
    problem = task.draw(random.Random(5))
    assert time.process_time() - start < 2
    assert problem.extra["length"] > 999_980
    assert problem.answer == solved(problem)
    assert task.verify(problem, task.demonstrate(problem, "think-max", random.Random(0))) == RIGHT


# ---- worked solutions and the judge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_worked_solution_is_right_in_every_mode_and_quotes_lines_of_the_text(kind):
    task = open_task(f"needles:kind={kind}")
    for problem in draws(f"needles:kind={kind}", 15):
        lines = {f"{name}={value}" for name, value in read(problem)[0]}
        told = {}
        for mode in MODES:
            reply = task.demonstrate(problem, mode, random.Random(0))
            assert task.verify(problem, reply) == RIGHT
            (message,) = reply
            assert message.content == " ".join(problem.answer) and (message.reasoning is None) == (mode == "non-think")
            told[mode] = message.reasoning
        quoted = told["think-high"].split("\n")
        assert set(quoted) <= lines
        assert {line.partition("=")[2] for line in quoted} >= set(problem.answer)
        checks = [line for line in told["think-max"].split("\n") if line not in lines]
        assert len(checks) == len(problem.extra["names"])
        assert all(re.fullmatch("later [0-9]+[a-z]: none", check) for check in checks)


def test_think_high_quotes_every_update_and_every_hop():
    for kind, number in (("updates", None), ("multihop", "hops")):
        for problem in draws(f"needles:kind={kind}:level=2"):
            reply = open_task("needles").demonstrate(problem, "think-high", random.Random(0))
            written = Counter(name for name, _ in read(problem)[0])
            expected = problem.extra[number] if number else written[problem.extra["names"][0]]
            assert len(reply[0].reasoning.split("\n")) == expected


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("83 20", 1.0), ("83\n20", 1.0), ("83, 20.", 1.0), ("5m=83 31b=20\n83 20", 1.0), ("**83** and **20**", 1.0),
        ("83", 0.0), ("20 83", 0.0), ("83 21", 0.25), ("83 20 11", 0.0), ("", 0.0), ("none", 0.0), ("8320", 0.0),
        ("47k=83 31b=20", 1.0), ("83k 20k", 0.0), ("８３ ２０", 0.0),
    ],
)  # fmt: skip
def test_several_values_count_in_their_order_and_part_of_them_earns_part(said, reward):
    problem = Problem("needles", Conversation((Message("user", "x"),)), ["83", "20"])
    verdict = open_task("needles").verify(problem, says(said))
    assert verdict.reward == reward and verdict.is_right == (reward == 1)
    assert verdict.is_right or verdict.why == "the answer is 83 20"


def test_no_value_but_the_right_one_is_right():
    task = open_task("needles")
    for problem in draws("needles:level=1-2", 10):
        for value in {value for _, value in read(problem)[0]} | {"00"}:
            reply = says(" ".join([*problem.answer[:-1], value]))
            assert task.verify(problem, reply).is_right == (value == problem.answer[-1])


def test_no_answer_is_wrong():
    task = open_task("needles")
    problem = draws("needles:level=1", 1)[0]
    for reply in ([], [Message("tool", "83")], [Message("user", " ".join(problem.answer))]):
        assert not task.verify(problem, reply).is_right
    assert task.environment(problem) is None


# ---- many questions about one text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [*KINDS, "single+updates", "+".join(KINDS)])
def test_questions_about_one_text_begin_with_it_and_are_all_different(kinds):
    task = open_task(f"needles:kind={kinds}")
    text, asked = task.context_and_questions(seed=4, length=4000, count=25)
    assert len(asked) == 25 and 3980 < len(text) < 4000
    contents = {problem.conversation.messages[0].content for problem in asked}
    assert len(contents) == 25 and all(content.startswith(text + "\n\n") for content in contents)
    assert Counter(problem.extra["kind"] for problem in asked) == Counter(
        [kind for _ in range(25) for kind in KINDS if kind in kinds.split("+")][:25]
    )
    for problem in asked:
        assert problem.answer == solved(problem)
        for mode in MODES:
            assert task.verify(problem, task.demonstrate(problem, mode, random.Random(0))) == RIGHT


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_one_text_are_the_same_in_all_its_questions(mode):
    task = open_task("needles")
    text, asked = task.context_and_questions(seed=4, length=2000, count=12)
    tokenizer = Tokenizer.train([text * 3, "Value of 4k?\n\nValues of"] * 5, vocab_size=400)
    prompts = [render(in_mode(p.conversation, mode), texts="preview").encode(tokenizer) for p in asked]
    shared = 0
    while len({tuple(prompt[: shared + 1]) for prompt in prompts}) == 1:
        shared += 1
    assert shared >= len(text) + 2, "the begin mark, the user's mark and every token of the text"
    assert max(map(len, prompts)) - shared < 40


def test_a_text_and_its_questions_are_a_function_of_seed_and_length():
    task = open_task("needles")
    assert task.context_and_questions(1, 500, 8) == task.context_and_questions(1, 500, 8)
    assert task.context_and_questions(1, 500, 8)[0] != task.context_and_questions(2, 500, 8)[0]
    text, more = task.context_and_questions(1, 500, 10)
    assert (text, more[:8]) == task.context_and_questions(1, 500, 8)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_questions_may_be_of_one_part(split):
    _, asked = open_task("needles").context_and_questions(1, 2000, 20, split=split)
    assert len(asked) == 20 and {problem.split for problem in asked} == {split}


def test_a_hundred_questions_about_a_million_characters_are_made_in_seconds():
    start = time.process_time()
    text, asked = open_task("needles").context_and_questions(1, 1_000_000, 100)
    assert time.process_time() - start < 5
    assert len(asked) == 100 and len(text) > 999_980


@pytest.mark.parametrize(
    ("specification", "length", "count", "says"),
    [
        ("needles:kind=single", 48, 9, "a length of 48 has only 8 different questions; ask for fewer than 9"),
        ("needles", 47, 1, "a length of 47 is impossible; give 48 to 1048576"),
        ("needles", LONGEST + 1, 1, f"a length of {LONGEST + 1} is impossible"),
        ("needles:kind=single+several:needles=5", 48, 1, "a length of 48 is too short for kind several"),
    ],
)
def test_a_text_too_short_for_its_questions_is_refused(specification, length, count, says):
    with pytest.raises(RequestError, match=r"^[^\n]*$") as caught:
        open_task(specification).context_and_questions(1, length, count)
    assert says in str(caught.value)


# ---- parts, options, lengths in tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fifth_is_held_out(kind):
    drawn = draws(f"needles:kind={kind}:level=1-2", 1500)
    assert 0.17 < sum(problem.split == "held-out" for problem in drawn) / len(drawn) < 0.23
    assert len({problem.id for problem in drawn}) == len(drawn)


def test_the_part_of_a_problem_does_not_depend_on_the_options_it_was_drawn_with():
    by_level, by_length = open_task("needles:kind=single:level=3"), open_task("needles:kind=single:length=1024")
    for number in range(20):
        assert by_level.draw(random.Random(number)).id == by_length.draw(random.Random(number)).id


def test_the_same_problems_come_in_another_process():
    program = (
        "from longreach.tasks.registry import open_task; from longreach.tasks.base import problem_at\n"
        "task = open_task('needles')\n"
        "for i in range(12):\n"
        "    p = problem_at(task, 'held-out', 3, i)\n"
        "    print(p.id, p.answer, p.level, dict(p.extra))\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = [problem_at(open_task("needles"), "held-out", 3, i) for i in range(12)]
    assert told.splitlines() == [f"{p.id} {p.answer} {p.level} {dict(p.extra)}" for p in here]


def test_options_do_what_they_say():
    assert {len(problem.answer) for problem in draws("needles:kind=several:needles=5")} == {5}
    assert {len(problem.answer) for problem in draws("needles:kind=several")} == {2, 3, 4}
    for problem in draws("needles:needles=3:hops=2:level=2"):
        assert len(problem.answer) == (3 if problem.extra["kind"] == "several" else 1)
        assert problem.extra.get("hops", 2) == 2


@pytest.mark.parametrize(
    ("specification", "says"),
    [
        ("needles:kind=hay", "has no kind 'hay'; give one or several of single, several, multihop, updates"),
        ("needles:length=47", "length=47 is impossible; give a whole number from 48 to 1048576"),
        ("needles:length=1e6", "length=1e6 is impossible"),
        ("needles:length=99999999999", "is impossible"),
        ("needles:length=٥٠٠", "is impossible"),
        ("needles:length=500:level=2", "give level or length, not both"),
        ("needles:needles=1", "needles=1 is impossible; give a whole number from 2 to 16"),
        ("needles:hops=9", "hops=9 is impossible; give a whole number from 2 to 8"),
        ("needles:kind=single:needles=2", "needles is an option of kind=several"),
        ("needles:kind=single:hops=2", "hops is an option of kind=multihop"),
        ("needles:needles=8", "needles=8 needs a length of 54, but here it may be 48"),
        ("needles:hops=5", "hops=5 needs a length of 60, but here it may be 48"),
        ("needles:level=6", "no level '6'; give one of 1 to 5"),
        ("needles:depth=1", "its options are level, kind, length, needles, hops"),
    ],
)
def test_an_impossible_option_is_refused_in_one_line(specification, says):
    with pytest.raises(RequestError, match=r"^[^\n]*$") as caught:
        open_task(specification)
    assert says in str(caught.value)


def test_each_character_of_the_text_is_one_token_and_the_rest_takes_few():
    task = open_task("needles:level=1-3")
    drawn = draws("needles:level=1-2", 60)
    texts = ["".join(piece.text for piece in render(whole(task, problem, mode), texts="preview", for_training=True).pieces
                     if not piece.is_special) for problem in drawn for mode in MODES]  # fmt: skip
    tokenizer = Tokenizer.train(texts, vocab_size=1024)
    for problem in draws("needles:level=1-3", 20):
        content = problem.conversation.messages[0].content
        text = content[: problem.extra["length"]]
        assert len(tokenizer.encode(text)) == len(text)
        assert len(tokenizer.encode(content)) <= len(text) + 7 + 4 * len(problem.answer) * 2
        prompt = render(in_mode(problem.conversation, "think-high"), texts="preview").encode(tokenizer)
        assert len(prompt) == len(tokenizer.encode(content)) + 4, "begin mark, user, assistant, think"
        if problem.level == 1:
            assert len(prompt) <= 75


def test_needles_is_in_the_table_of_tasks():
    task = open_task("needles")
    assert isinstance(task, Needles) and task.domain == "long-context" and task.size is None
