"""What all generated tasks promise: names, options, splits, the same problem everywhere; and `longreach tasks`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
from fractions import Fraction

import pytest

from longreach.chat.messages import Message, ToolCall
from longreach.chat.modes import MODES, in_mode
from longreach.chat.parser import parse
from longreach.chat.renderer import render
from longreach.errors import RequestError
from longreach.tasks.answers import bare_answer, read_number
from longreach.tasks.base import HELD_OUT, problem_at
from longreach.tasks.registry import TASKS, open_task
from longreach.tasks.tasks_command import ShowOptions, TasksOptions, main, show
from longreach.tokenizer.bpe import Tokenizer

LEVELS = {"arithmetic": 5, "science": 3, "instructions": 3}
CHOICES = {
    "arithmetic": ("form", ("sum", "difference", "product", "chain")),
    "science": ("topic", ("quantities", "mixtures", "causes")),
    "instructions": ("form", ("words", "lines", "json", "repeat", "sort")),
}
NAMES = tuple(CHOICES)
EVERY_LEVEL = [f"{name}:level={level}" for name in NAMES for level in range(1, LEVELS[name] + 1)]
EVERY = [
    f"{name}:{option}={choice}:level={level}"
    for name, (option, choices) in CHOICES.items()
    for choice in choices
    for level in range(1, LEVELS[name] + 1)
]


def answer(content: str) -> tuple[Message, ...]:
    return (Message("assistant", content, reasoning=""),)


# ---- worked solutions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specification", EVERY)
def test_every_worked_solution_is_right_in_each_mode(specification):
    task, rng = open_task(specification), random.Random(specification)
    for _ in range(200):
        problem = task.draw(rng)
        for mode in MODES:
            (message,) = task.demonstrate(problem, mode, rng)
            assert task.verify(problem, (message,)) == (1.0, True, "")
            assert (message.reasoning is None) == (mode == "non-think")
            assert message.content == message.content.strip()


@pytest.mark.parametrize("specification", EVERY)
def test_thinking_longer_begins_with_thinking_and_goes_on_to_a_check(specification):
    task = open_task(specification)
    for index in range(50):
        problem = task.draw(random.Random(index))
        (high,) = task.demonstrate(problem, "think-high", random.Random(index))
        (longest,) = task.demonstrate(problem, "think-max", random.Random(index))
        assert longest.reasoning.startswith(f"{high.reasoning}\ncheck:")
        assert longest.content == high.content


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_answer_earns_nothing(name):
    task = open_task(name)
    problem = problem_at(task, "train", 0, 0)
    (right,) = task.demonstrate(problem, "think-high", random.Random(0))
    only_thought = Message("assistant", "", reasoning=right.content)
    still_calling = dataclasses.replace(right, tool_calls=(ToolCall("f", "{}"),))
    for reply in ((), (only_thought,), (still_calling,), (right, Message("tool", right.content))):
        verdict = task.verify(problem, reply)
        assert verdict.reward == 0 and not verdict.is_right and verdict.why == "no answer"


@pytest.mark.parametrize("name", NAMES)
def test_no_text_makes_a_judge_raise_or_wait(name):
    rng, task = random.Random(1), open_task(name)
    problems = [problem_at(task, "train", 0, index) for index in range(40)]
    texts = [" " * 50_000, "9" * 50_000, "[" * 50_000, '{"a":' * 20_000, "$" * 10_000, "\\boxed{" * 5_000 + "1" + "}" * 5_000,
             "1," * 30_000, "\x00", "\ud800", "٣", "½", "NaN", "1e999", "-", "=", ".", "**", "\\text{" * 100]  # fmt: skip
    texts += ["".join(rng.choice("019.,-=+ \n${}\\*`mskg/%aetr\"':[]") for _ in range(rng.randrange(1, 30)))
              for _ in range(500)]  # fmt: skip
    for number, text in enumerate(texts):
        verdict = task.verify(problems[number % 40], answer(text))
        assert 0 <= verdict.reward <= 1 and (verdict.is_right or verdict.why)
        assert len(verdict.why) < 400


# ---- answers as models dress them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["1776", " 1776\n", "1776.", "= 1776", "=1776", "$1776$", "\\boxed{1776}", "$\\boxed{1776}$.", "**1776**", "`1776`",
     "Answer: 1776", "The answer is 1776.", "Final answer: **1776**", "the answer is: $\\boxed{\\text{1776}}$."],
)  # fmt: skip
def test_an_answer_is_found_in_what_models_put_around_it(text):
    assert bare_answer(text) == "1776"


@pytest.mark.parametrize(
    "text",
    ["I think 1776 is right", "1776 or 1777", "not 1776", "1776\n1777", "12 1776", "$1$7$76$", "\\boxed{1776} or 5", "1776!",
     "It is 1776"],
)  # fmt: skip
def test_a_number_inside_a_longer_text_is_no_answer(text):
    assert read_number(bare_answer(text)) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("1776", 1776), ("1,776", 1776), ("1 776", 1776), ("1\u202f776", 1776), ("-12", -12), ("\u221212", -12), ("+3", 3),
     ("007", 7), ("12.0", 12), ("2.16", Fraction(54, 25)), ("1,234,567", 1234567), ("12,345.5", Fraction(24691, 2))],
)  # fmt: skip
def test_numbers_are_read_exactly(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize("text", ["", "1,77", "17,76", ",776", "1,7766", "1e3", "1.2.3", "1/2", "--3", "0x10", "١٢"])
def test_what_is_not_quite_a_number_is_none(text):
    assert read_number(text) is None


# ---- problems and parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specification", EVERY)
def test_the_held_out_part_is_a_fifth_of_the_problems_of_every_level_and_form(specification):
    task, rng = open_task(specification), random.Random(0)
    problems = {problem.id: problem for problem in (task.draw(rng) for _ in range(3000))}
    share = sum(problem.split == "held-out" for problem in problems.values()) / len(problems)
    assert len(problems) > 1000, "a level with few problems is learned by heart"
    # four standard errors: one specification in sixteen thousand would be beyond them by chance
    assert abs(share - HELD_OUT) < 4 * math.sqrt(HELD_OUT * (1 - HELD_OUT) / len(problems))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_level_has_thousands_of_problems(name):
    task, rng = open_task(f"{name}:level=1"), random.Random(0)
    assert len({task.draw(rng).id for _ in range(20_000)}) >= 5_000


@pytest.mark.parametrize("specification", EVERY_LEVEL)
def test_no_seed_trains_on_a_held_out_problem(specification):
    task = open_task(specification)
    trained = {problem_at(task, "train", seed, index).id for seed in range(4) for index in range(150)}
    held_out = {problem_at(task, "held-out", seed, index).id for seed in range(4, 8) for index in range(150)}
    assert len(trained) > 300 and len(held_out) > 100
    assert not trained & held_out


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_is_the_same_under_every_specification_that_can_draw_it(name):
    option, choices = CHOICES[name]
    wide, narrow = open_task(name), open_task(f"{name}:{option}={choices[0]}:level=2")
    seed = next(s for s in range(1000) if wide.draw(random.Random(s)).extra[option] == choices[0])
    problem = wide.draw(random.Random(seed))
    assert problem.task == narrow.draw(random.Random(0)).task == name
    again = dataclasses.replace(problem, level=9, extra={})
    assert again.id == problem.id and again.split == problem.split


def test_problems_are_the_same_in_another_process():
    program = (
        "from longreach.tasks.base import problem_at\n"
        "from longreach.tasks.registry import open_task\n"
        "import random\n"
        f"for name in {EVERY_LEVEL!r}:\n"
        "    task = open_task(name)\n"
        "    for split in ('train', 'held-out'):\n"
        "        problem = problem_at(task, split, 3, 17)\n"
        "        print(problem.id, problem.answer, task.demonstrate(problem, 'think-max', random.Random(5)))\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and len(printed[0].splitlines()) == 2 * len(EVERY_LEVEL)


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_written_to_a_file_can_be_judged_and_shown_again(name):
    task = open_task(name)
    for index in range(50):
        problem = problem_at(task, "train", 0, index)
        answer_, extra = json.loads(json.dumps([problem.answer, problem.extra]))
        read = dataclasses.replace(problem, answer=answer_, extra=extra)
        assert task.verify(read, task.demonstrate(read, "think-max", random.Random(0))).is_right


# ---- lengths --------------------------------------------------------------------------------------------------------

MOST_TOKENS = {  # median of the question, of a whole think-high answer, of a whole think-max answer
    "arithmetic": ((8, 26, 62), (10, 44, 95), (12, 65, 126), (13, 96, 200), (21, 136, 266)),
    "science": ((23, 40, 71), (27, 63, 123), (35, 116, 218)),
    "instructions": ((10, 21, 32), (14, 26, 44), (20, 34, 56)),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Learned from worked solutions of the three tasks, as a run that starts from nothing does."""
    texts = []
    for name in NAMES:
        task = open_task(name)
        for index in range(1500):
            problem = problem_at(task, "train", 1, index)
            (message,) = task.demonstrate(problem, MODES[index % 3], random.Random(index))
            texts.append(
                "\n".join((problem.conversation.messages[0].content, message.reasoning or "", message.content))
            )
    return Tokenizer.train(texts, vocab_size=1024)


def lengths(task, tokenizer, count=150):
    """Median tokens of the prompt, and of the answers in the two thinking modes, end mark included."""
    prompts, answers = [], {"think-high": [], "think-max": []}
    for index in range(count):
        problem = problem_at(task, "train", 0, index)
        prompts.append(len(tokenizer.encode(problem.conversation.messages[0].content)))
        for mode, found in answers.items():
            asked = in_mode(problem.conversation, mode)
            (message,) = task.demonstrate(problem, mode, random.Random(index))
            whole = dataclasses.replace(asked, messages=(*asked.messages, message))
            _, learned = render(whole, texts="preview", for_training=True).encode_with_loss(tokenizer)
            found.append(sum(learned))
    return tuple(statistics.median(found) for found in (prompts, *answers.values()))


@pytest.mark.parametrize("specification", EVERY_LEVEL)
def test_problems_and_worked_solutions_are_short_in_tokens(specification, tokenizer):
    name, level = specification.split(":level=")
    found = lengths(open_task(specification), tokenizer)
    assert all(n <= most for n, most in zip(found, MOST_TOKENS[name][int(level) - 1], strict=True)), found


def test_every_digit_of_a_worked_solution_is_one_token(tokenizer):
    task = open_task("arithmetic")
    for index in range(50):
        (message,) = task.demonstrate(problem_at(task, "train", 0, index), "think-max", random.Random(0))
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(message.reasoning)]
        assert all(len(piece) == 1 for piece in pieces if any(map(str.isdigit, piece)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_worked_solution_written_token_by_token_is_judged_right(name, mode, tokenizer):
    task = open_task(name)
    for index in range(30):
        problem = problem_at(task, "train", 0, index)
        asked = in_mode(problem.conversation, mode)
        solution = task.demonstrate(problem, mode, random.Random(index))
        whole = dataclasses.replace(asked, messages=asked.messages + solution)
        ids, learned = render(whole, texts="preview", for_training=True).encode_with_loss(tokenizer)
        written = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
        assert task.verify(problem, (parse(written, thinking=mode != "non-think", tokenizer=tokenizer),)).is_right


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("arithmetic:level=6", "task arithmetic has no level '6'; give one of 1 to 5, or a range like 1-2"),
        ("science:level=3-2", "task science has no level '3-2'; give one of 1 to 3, or a range like 1-2"),
        ("arithmetic:form=power", "task arithmetic has no form 'power'; give one or several of sum, difference, product, "
                                  "chain, joined by +"),
        ("arithmetic:form=sum+", "task arithmetic has no form ''; give one or several of sum, difference, product, chain, "
                                 "joined by +"),
        ("instructions:form=sort+json+sort", "task instructions: form=sort+json+sort names one twice; name each once"),
        ("science:topic=magic", "task science has no topic 'magic'; give one or several of quantities, mixtures, causes, "
                                "joined by +"),
        ("science:form=sum", "task science has no option 'form'; its options are level, topic"),
        ("arithmetic:level=two", "task arithmetic has no level 'two'; give one of 1 to 5, or a range like 1-2"),
    ],
)  # fmt: skip
def test_an_option_that_makes_no_sense_is_one_clear_line(specification, message):
    with pytest.raises(RequestError) as caught:
        open_task(specification)
    assert str(caught.value) == message


def test_options_narrow_what_is_drawn():
    task = open_task("arithmetic:form=sum+chain:level=2-3")
    drawn = [task.draw(random.Random(seed)) for seed in range(200)]
    assert {problem.extra["form"] for problem in drawn} == {"sum", "chain"}
    assert {problem.level for problem in drawn} == {2, 3}
    assert {task.draw(random.Random(seed), level=5).level for seed in range(20)} == {5}


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_list_names_every_task_and_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from longreach.tasks.tasks_command import TasksOptions, main\n"
        "main(TasksOptions())\n"
        "heavy = {'torch', 'numpy', 'transformers', 'math_verify', 'sympy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(TASKS) + 1]] == list(TASKS)
    assert "arithmetic    mathematics   1-5" in done.stdout


def test_the_list_as_json_gives_levels_and_options(capsys):
    main(TasksOptions(json=True))
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["tasks"]}
    assert list(entries) == list(TASKS)
    assert entries["science"]["levels"] == [1, 2, 3] and entries["science"]["options"] == ["level", "topic"]
    assert entries["gsm8k"]["levels"] is None and "path" in entries["gsm8k"]["options"]
    assert all(entry["summary"] for entry in entries.values())
    assert [name for name, entry in entries.items() if entry["domain"] is None] == ["jsonl"]


def test_show_prints_problems_with_their_solution_and_verdict(capsys):
    show(ShowOptions(task="arithmetic:form=product:level=2", count=2, mode="think-max", split="train"))
    printed = capsys.readouterr().out
    assert printed.startswith("arithmetic:form=product:level=2 (mathematics): ")
    assert printed.count("verdict    right") == 2 and printed.count("level 2, train") == 2
    assert printed.count("thinks ") == 2 and printed.count("check:") == 2


def test_show_as_json_gives_the_problems_that_an_evaluation_would_ask(capsys):
    show(ShowOptions(task="science", count=3, json=True))
    shown = json.loads(capsys.readouterr().out)
    task = open_task("science")
    assert [p["id"] for p in shown["problems"]] == [problem_at(task, "held-out", 0, index).id for index in range(3)]
    assert all(p["verdict"]["is_right"] for p in shown["problems"]) and shown["mode"] == "think-high"


def test_show_works_for_a_task_with_tools(capsys):
    show(ShowOptions(task="agent", count=1))
    printed = capsys.readouterr().out
    assert "  tool " in printed and "  calls " in printed and "verdict    right" in printed


def test_show_of_a_task_without_worked_solutions_says_so(capsys, monkeypatch):
    from longreach.tasks.base import GeneratedTask
    from longreach.tasks.science import Science

    monkeypatch.setattr(Science, "demonstrate", GeneratedTask.demonstrate)
    show(ShowOptions(task="science", count=1))
    assert "task science has no worked solutions" in capsys.readouterr().out


def test_show_refuses_what_makes_no_sense():
    with pytest.raises(RequestError, match="--count 0 must be at least 1"):
        show(ShowOptions(task="science", count=0))
    with pytest.raises(RequestError, match="task 'scence' is unknown; did you mean science"):
        show(ShowOptions(task="scence"))
