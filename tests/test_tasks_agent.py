"""The task `agent`: worlds that answer every call in words, and a judge that believes no transcript."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import subprocess
import sys

import pytest
from episodes import ScriptedSource

from longreach.chat.messages import Conversation, Message, ToolCall
from longreach.chat.modes import MODES, in_mode
from longreach.chat.parser import parse
from longreach.chat.renderer import render
from longreach.errors import RequestError
from longreach.evaluate.episode import Job
from longreach.evaluate.judging import Judging
from longreach.evaluate.play import play
from longreach.tasks.agent import PART, WORLDS, Agent
from longreach.tasks.base import RIGHT, Problem, problem_at
from longreach.tasks.registry import open_task
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import EOS

EVERY_GOAL = [(world, goal.name) for world, (_, goals) in WORLDS.items() for goal in goals]
TASK = open_task("agent")


@functools.cache
def problems(world: str, goal: str, count: int = 40) -> list[Problem]:
    """Problems of one goal."""
    (found,) = [known for known in WORLDS[world][1] if known.name == goal]
    task = open_task(f"agent:world={world}:level={found.level}")
    drawn = (task.draw(random.Random(f"{goal}{number}")) for number in itertools.count())
    return list(itertools.islice((problem for problem in drawn if problem.extra["goal"] == goal), count))


def shown(problem: Problem, mode: str = "think-high") -> tuple[Message, ...]:
    return TASK.demonstrate(problem, mode, random.Random(0))


def whole(problem: Problem, mode: str) -> Conversation:
    """The problem in a mode, with its worked solution."""
    asked = in_mode(problem.conversation, mode)
    return dataclasses.replace(asked, messages=asked.messages + shown(problem, mode))


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name, json.dumps(arguments))


def turn(*calls: ToolCall, results: list[str] | None = None, world=None) -> list[Message]:
    """A turn of calls and their results, those of `world` unless given."""
    said = [world.call(made) for made in calls] if results is None else results
    return [Message("assistant", tool_calls=calls), *(Message("tool", text) for text in said)]


def cells_problem(goal: str, start: dict, end: dict, asks: list, answer=None) -> Problem:
    extra = {"world": "cells", "goal": goal, "start": start, "end": end, "asks": asks, "given": []}
    return Problem("agent", Conversation((Message("user", goal),)), answer, 1, extra)


SUM = cells_problem("sum", {"101": 3, "102": 4, "103": 9}, {"101": 3, "102": 4, "103": 9, "200": 7}, ["101", "102"])
READ = cells_problem("read", {"101": 38, "103": 9}, {"101": 38, "103": 9}, ["101"], 38)


# ---- worked solutions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "goal"), EVERY_GOAL)
def test_every_worked_solution_is_right_in_every_mode(world, goal):
    drawn = problems(world, goal)
    assert len(drawn) == 40
    for problem in drawn:
        for mode in MODES:
            reply = shown(problem, mode)
            assert TASK.verify(problem, reply) == (1.0, True, ""), (problem, reply)
            turns = [message for message in reply if message.role == "assistant"]
            assert len(turns) <= 8, "an episode has 8 turns by default"
            assert all((turn.reasoning is None) == (mode == "non-think") for turn in turns)
            assert all(turn.reasoning for turn in turns if mode != "non-think")


@pytest.mark.parametrize(("world", "goal"), EVERY_GOAL)
def test_think_max_thinks_longer_than_think_high(world, goal):
    for problem in problems(world, goal, 10):
        high, most = (sum(len(m.reasoning or "") for m in shown(problem, mode)) for mode in MODES[1:])
        assert high < most


@pytest.mark.parametrize(("world", "goal"), EVERY_GOAL)
def test_a_worked_solution_comes_back_from_the_rendered_text(world, goal):
    for problem in problems(world, goal, 5):
        for mode in MODES:
            conversation = whole(problem, mode)
            told = render(conversation, texts="preview", for_training=True).text
            at = 0
            for place, message in enumerate(conversation.messages):
                if message.role != "assistant":
                    continue
                before = dataclasses.replace(conversation, messages=conversation.messages[:place])
                prompt = render(before, texts="preview")
                assert told.startswith(prompt.text, 0) and len(prompt.text) > at
                at = len(prompt.text)
                read = parse(told[at:], thinking=prompt.begins_thinking, tools=conversation.tools)
                assert (read.content, read.reasoning) == (message.content, message.reasoning)
                assert [(c.name, json.loads(c.arguments)) for c in read.tool_calls] == [
                    (c.name, json.loads(c.arguments)) for c in message.tool_calls
                ]


def test_full_boxes_and_empty_cells_come_up_and_are_overcome():
    met = {"error: ": 0, "empty": 0}
    for goal in ("fit", "color", "gather"):
        met["error: "] += sum("is full" in m.content for problem in problems("boxes", goal) for m in shown(problem))
    met["empty"] += sum(m.content == "empty" for problem in problems("cells", "otherwise") for m in shown(problem))
    assert min(met.values()) > 10


def test_levels_ask_for_more_calls():
    means = []
    for level in TASK.levels:
        drawn = [TASK.make(random.Random(f"{level}/{number}"), level) for number in range(200)]
        assert {problem.level for problem in drawn} == {level}
        means.append(sum(len(m.tool_calls) for problem in drawn for m in shown(problem)) / 200)
    assert means[0] == 1 and means == sorted(means) and means[-1] > 4


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_that_follows_a_worked_solution_is_right_and_has_its_tokens(mode):
    drawn = [problems(world, goal, 1)[0] for world, goal in EVERY_GOAL]
    tokenizer = Tokenizer.train(["error: F is full 0123456789"] * 5, vocab_size=300)
    turns = {}  # the text of each turn by that of its prompt
    for problem in drawn:
        conversation = whole(problem, mode)
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant":
                prompt, up_to = (
                    render(dataclasses.replace(conversation, messages=conversation.messages[:end]), texts="preview",
                           for_training=True).text for end in (place, place + 1)
                )  # fmt: skip
                turns[prompt] = up_to[len(prompt) :].removesuffix(EOS)
    jobs = [Job(str(n), TASK, problem, mode, window=9999, seed=n) for n, problem in enumerate(drawn)]
    with Judging() as judging:
        samples = play(ScriptedSource(tokenizer, turns.__getitem__), jobs, tokenizer, judging=judging)
    for problem, sample in zip(drawn, samples, strict=True):
        assert sample.verdict == RIGHT, (problem, sample.reply, sample.verdict)
        rendered = render(whole(problem, mode), texts="preview", for_training=True)
        assert sample.prompt + sample.tokens == rendered.encode(tokenizer)


# ---- the judge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "goal"), EVERY_GOAL)
def test_the_answer_without_the_calls_is_wrong(world, goal):
    for problem in problems(world, goal):
        verdict = TASK.verify(problem, shown(problem)[-1:])
        assert not verdict.is_right and verdict.reward == 0 and verdict.why


@pytest.mark.parametrize(("world", "goal"), EVERY_GOAL)
def test_the_calls_without_the_answer_are_wrong_and_earn_half(world, goal):
    for problem in problems(world, goal):
        assert TASK.verify(problem, shown(problem)[:-1]) == (PART, False, "there is no answer")


@pytest.mark.parametrize(("world", "goal"), EVERY_GOAL)
def test_every_forged_result_is_found(world, goal):
    for problem in problems(world, goal, 10):
        reply = shown(problem)
        for place, message in enumerate(reply):
            if message.role == "tool":
                forged = (*reply[:place], dataclasses.replace(message, content="none"), *reply[place + 1 :])
                verdict = TASK.verify(problem, forged)
                assert not verdict.is_right and verdict.reward == 0 and "'none'" in verdict.why


def test_a_forged_result_helps_no_wrong_answer():
    forged = [*turn(call("get", cell=101), results=["55"]), Message("assistant", "55")]
    assert TASK.verify(READ, forged) == (0.0, False, "a result of 'get' reads '55'; it was '38'")


@pytest.mark.parametrize(
    "reply",
    [
        [Message("tool", "38"), Message("assistant", "38")],
        [Message("user", "go on"), Message("assistant", "38")],
        [Message("assistant", "38"), Message("assistant", "38")],
        [*turn(call("get", cell=101), results=["38"]), Message("assistant", "83"), Message("assistant", "38")],
        [Message("assistant", tool_calls=(call("get", cell=101),)), Message("assistant", "38")],
        [Message("assistant", "wait"), Message("tool", "38"), Message("assistant", "38")],
        [*turn(call("get", cell=101), results=["38", "38"]), Message("assistant", "38")],
        [*turn(call("get", cell=101), call("list"), results=["38"]), Message("assistant", "38")],
        [
            Message("assistant", tool_calls=(ToolCall("get", '{"cell": 101}', "a"),)),
            Message("tool", "38", tool_call_id="b"),
            Message("assistant", "38"),
        ],
    ],
)  # fmt: skip
def test_a_transcript_in_disorder_is_wrong(reply):
    verdict = TASK.verify(READ, reply)
    assert not verdict.is_right and verdict.reward == 0 and verdict.why not in ("", "101 was not looked up")


def test_no_reply_at_all_is_wrong():
    assert TASK.verify(READ, []) == (0.0, False, "101 was not looked up")


def test_results_may_come_in_another_order_if_they_carry_ids():
    calls = (ToolCall("get", '{"cell": 101}', "a"), ToolCall("get", '{"cell": 103}', "b"))
    results = [Message("tool", "9", tool_call_id="b"), Message("tool", "38", tool_call_id="a")]
    reply = [Message("assistant", tool_calls=calls), *results, Message("assistant", "38")]
    assert TASK.verify(READ, reply).is_right
    without = [dataclasses.replace(message, tool_call_id="") for message in reply]
    assert not TASK.verify(READ, without).is_right


def test_calls_that_were_cut_off_do_not_count():
    world = TASK.environment(SUM)
    reply = turn(call("get", cell=101), call("get", cell=102), world=world)
    reply.append(Message("assistant", tool_calls=(call("set", cell=200, value=7),)))
    verdict = TASK.verify(SUM, reply)
    assert not verdict.is_right and verdict.reward == PART * 2 / 3 and verdict.why == "200 should be 7, not empty"


def test_a_lucky_guess_is_not_right():
    reply = [*turn(call("set", cell=200, value=7), results=["ok"]), Message("assistant", "done")]
    verdict = TASK.verify(SUM, reply)
    assert not verdict.is_right and verdict.reward == PART / 3 and verdict.why == "101 was not looked up"


def test_what_is_spoiled_beside_the_goal_makes_it_wrong_and_costs_reward():
    world = TASK.environment(SUM)
    calls = [call("get", cell=101), call("get", cell=102), call("set", cell=200, value=7)]
    reply = turn(*calls, call("set", cell=103, value=1), world=world)
    verdict = TASK.verify(SUM, [*reply, Message("assistant", "done")])
    assert verdict == (PART * 2 / 3, False, "103 should not have been changed")
    mended = [*reply, *turn(call("set", cell=103, value=9), world=world), Message("assistant", "done")]
    assert TASK.verify(SUM, mended).is_right


def test_a_list_of_the_cells_tells_which_are_empty():
    task = cells_problem("otherwise", {"102": 4}, {"102": 4, "200": 4}, ["101", "102"])
    world = TASK.environment(task)
    reply = [
        *turn(call("list"), world=world), *turn(call("get", cell=102), world=world),
        *turn(call("set", cell=200, value=4), world=world), Message("assistant", "done"),
    ]  # fmt: skip
    assert TASK.verify(task, reply).is_right
    reply[:2] = []
    assert TASK.verify(task, reply).why == "101 was not looked up"


@pytest.mark.parametrize(
    ("said", "is_right"),
    [("38", True), ("It is 38.", True), ("**38**", True), ("038", True), ("83", False), ("38 or 39", False),
     ("", False), (" ", False), ("thirty-eight", False), ("3 8", False), ("９３８", False)],
)  # fmt: skip
def test_a_number_is_the_last_one_said(said, is_right):
    reply = [*turn(call("get", cell=101), world=TASK.environment(READ)), Message("assistant", said)]
    assert TASK.verify(READ, reply).is_right == is_right


@pytest.mark.parametrize(
    ("answer", "said", "is_right"),
    [("F", "F", True), ("F", "It is in box F.", True), ("F", "not A but F", True), ("F", "F or A", False),
     ("F", "f", False), ("F", "K", False), ("F", "nowhere", False), ("nowhere", "nowhere", True),
     ("nowhere", "Nowhere.", True), ("nowhere", "F", False), (["red cup", "blue pen"], "red cup, blue pen", True),
     (["red cup", "blue pen"], "A pen and a cup.", True), (["red cup"], "cup, pen", False),
     (["red cup", "blue pen"], "cup", False), ([], "nothing", True), ([], "pen", False), ([], "", False)],
)  # fmt: skip
def test_boxes_and_things_are_those_that_are_named(answer, said, is_right):
    start = {"red cup": "A", "blue pen": "F"}
    extra = {"world": "boxes", "start": start, "end": start, "asks": ["A"], "boxes": ["A", "F"], "room": 3}
    problem = Problem("agent", Conversation((Message("user", "x"),)), answer, 1, extra)
    reply = [*turn(call("look", box="A"), world=TASK.environment(problem)), Message("assistant", said)]
    assert TASK.verify(problem, reply).is_right == is_right


# ---- the worlds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("get", '{"cell": 101}', "38"),
        ("get", '{"cell": 555}', "empty"),
        ("list", "{}", "101 103"),
        ("set", '{"cell": 101, "value": 1}', "ok"),
        ("got", '{"cell": 101}', "error: no such tool; there are get, set, list"),
        ("get", "101", "error: the arguments are no JSON object"),
        ("get", '{"cell": 101', "error: the arguments are not JSON"),
        ("get", "", "error: the arguments are not JSON"),
        ("get", "[" * 100_000, "error: the arguments are not JSON"),
        ("get", '{"cell": ' + "9" * 5000 + "}", "error: the arguments are not JSON"),
        ("get", '{"cell": 101, "cell": 103}', "error: an argument is given twice"),
        ("get", "{}", "error: cell is missing"),
        ("set", '{"cell": 101}', "error: value is missing"),
        ("get", '{"cell": 101, "more": 1}', "error: get takes cell, no more"),
        ("list", '{"cell": 101}', "error: list takes nothing, no more"),
        ("get", '{"cell": "101"}', "error: cell must be an integer"),
        ("get", '{"cell": 101.0}', "error: cell must be an integer"),
        ("get", '{"cell": true}', "error: cell must be an integer"),
        ("get", '{"cell": NaN}', "error: cell must be an integer"),
        ("get", '{"cell": 99}', "error: cells are 100 to 999"),
        ("set", '{"cell": 1000, "value": 1}', "error: cells are 100 to 999"),
        ("set", '{"cell": 101, "value": -1}', "error: values are 0 to 999"),
        ("set", '{"cell": 101, "value": 1000}', "error: values are 0 to 999"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_cell_tool_answers_in_words(name, arguments, said):
    world = TASK.environment(READ)
    before = dict(world.state)
    assert world.call(ToolCall(name, arguments)) == said
    assert said == "ok" or world.state == before


def test_a_box_tool_answers_in_words():
    start = {"cup": "A", "pen": "F", "hat": "F"}
    problem = Problem(
        "agent", Conversation(()), None, 1, {"world": "boxes", "start": start, "boxes": ["A", "F"], "room": 2}
    )
    world = TASK.environment(problem)
    for made, said in [
        (call("look", box="F"), "pen, hat"),
        (call("move", thing="cup", box="F"), "error: F is full"),
        (call("move", thing="pen", box="F"), "ok"),
        (call("move", thing="pen", box="A"), "ok"),
        (call("move", thing="cup", box="F"), "ok"),
        (call("look", box="A"), "pen"),
        (call("move", thing="pen", box="F"), "error: F is full"),
        (call("move", thing="rug", box="A"), "error: no such thing"),
        (call("move", thing="cup", box="Q"), "error: no such box; there are A F"),
        (call("look", box=3), "error: box must be a string"),
        (call("look", box="\ud800"), "error: no such box; there are A F"),
    ]:
        assert world.call(made) == said
    assert world.state == {"cup": "F", "pen": "A", "hat": "F"}
    assert start == {"cup": "A", "pen": "F", "hat": "F"}


def test_attempts_at_one_problem_do_not_see_each_other():
    for world, goal in EVERY_GOAL:
        for problem in problems(world, goal, 5):
            before = json.dumps(problem.extra)
            other = TASK.environment(problem)
            untouched = dict(other.state), set(other.asked)
            assert [shown(problem) == shown(problem) for _ in range(2)] == [True, True]
            assert TASK.verify(problem, shown(problem)).is_right
            assert (other.state, other.asked) == untouched and json.dumps(problem.extra) == before


def odd_value(rng: random.Random, depth: int = 0):
    plain = [0, 101, -5, 10**400, 1.5, float("nan"), float("-inf"), True, None, "", "A", "101", "cup", "\ud800", "\u0000",
             "</think>", "<｜end▁of▁sentence｜>", "é中👩‍🚀", "x" * 1000]  # fmt: skip
    if depth < 3 and rng.random() < 0.2:
        return [odd_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return rng.choice(plain)


def odd_call(rng: random.Random) -> ToolCall:
    names = ["get", "set", "list", "look", "move", "", "call", "__init__", "state", "\ud800", "get\n", "外"]
    keys = ["cell", "value", "box", "thing", "self", "name", "", "\ud800", "é", "__class__"]
    text = json.dumps(
        {rng.choice(keys): odd_value(rng) for _ in range(rng.randint(0, 3))}, ensure_ascii=rng.random() < 0.5
    )
    cut = rng.random()
    if cut < 0.2:
        text = text[: rng.randint(0, len(text))]
    elif cut < 0.3:
        text = "".join(rng.choice('{}[]",:\\u1eE-+ntf\ud800中\x00') for _ in range(rng.randint(0, 40)))
    elif cut < 0.35:
        text = rng.choice(["[" * 5000, '{"cell":' * 3000, "1e999", '"', "null", '{"cell": 1e5}', '{"cell": 101,}'])
    return ToolCall(rng.choice(names), text, rng.choice(["", "call_1", "\ud800"]))


def test_two_thousand_random_calls_are_answered_with_short_text_and_judged():
    rng = random.Random(7)
    answers = set()
    for world, goal in EVERY_GOAL:
        problem = problems(world, goal, 1)[0]
        environment = TASK.environment(problem)
        reply: list[Message] = []
        for _ in range(2000 // len(EVERY_GOAL) + 1):
            made = odd_call(rng)
            result = environment.call(made)
            assert 0 < len(result) <= 80 and result.encode("utf-8")
            assert result.startswith("error: ") or made.name in environment.parameters
            reply += turn(made, results=[result])
            answers.add(result)
        assert TASK.verify(problem, [*reply, Message("assistant", "done")]).why != ""
    assert len(answers) > 12, "few kinds of errors were met"


# ---- parts, options, lengths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [*WORLDS, "cells+boxes"])
def test_a_fifth_of_every_level_is_held_out(world):
    task = open_task(f"agent:world={world}")
    for level in task.levels:
        drawn = [task.make(random.Random(number), level) for number in range(3000)]
        share = sum(problem.split == "held-out" for problem in drawn) / len(drawn)
        assert 0.16 < share < 0.24, (level, share)
        for goal in {problem.extra["goal"] for problem in drawn}:
            splits = {problem.split for problem in drawn if problem.extra["goal"] == goal}
            assert splits == {"train", "held-out"}, goal


def test_the_part_of_a_problem_does_not_depend_on_the_options_it_was_drawn_with():
    narrow, wide = open_task("agent:world=cells:level=1"), open_task("agent:world=cells")
    for number in range(50):
        assert narrow.draw(random.Random(number), 1).id == wide.draw(random.Random(number), 1).id


def test_the_same_problems_come_in_another_process():
    program = (
        "from longreach.tasks.registry import open_task; from longreach.tasks.base import problem_at; import json\n"
        "task = open_task('agent')\n"
        "for i in range(20):\n"
        "    p = problem_at(task, 'train', 3, i)\n"
        "    print(json.dumps([p.id, p.answer, p.level, dict(p.extra)]))\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = [problem_at(TASK, "train", 3, i) for i in range(20)]
    assert told.splitlines() == [json.dumps([p.id, p.answer, p.level, dict(p.extra)]) for p in here]


def test_a_problem_survives_being_written_as_json():
    for world, goal in EVERY_GOAL:
        for problem in problems(world, goal, 3):
            answer, extra = json.loads(json.dumps([problem.answer, problem.extra]))
            again = dataclasses.replace(problem, answer=answer, extra=extra)
            assert TASK.verify(again, shown(problem)).is_right and shown(again) == shown(problem)


@pytest.mark.parametrize(
    ("specification", "says"),
    [
        ("agent:world=moon", "has no world 'moon'; give one or several of cells, boxes"),
        ("agent:world=cells+cells", "names one twice"),
        ("agent:level=5", "no level '5'; give one of 1 to 4"),
        ("agent:size=3", "no option 'size'; its options are level, world"),
    ],
)
def test_an_impossible_option_is_refused_in_one_line(specification, says):
    with pytest.raises(RequestError, match=r"^[^\n]*$") as caught:
        open_task(specification)
    assert says in str(caught.value)


def test_prompts_stay_short_for_a_tokenizer_trained_on_worked_solutions():
    drawn = [TASK.draw(random.Random(f"tokens{number}")) for number in range(200)]
    texts = ["".join(piece.text for piece in render(whole(problem, mode), texts="preview", for_training=True).pieces
                     if not piece.is_special) for problem in drawn for mode in MODES]  # fmt: skip
    tokenizer = Tokenizer.train(texts, vocab_size=1024)
    for level, most in [(1, 450), (2, 550), (3, 650), (4, 1000)]:
        for number in range(60):
            problem = TASK.make(random.Random(f"other{number}"), level)
            question = tokenizer.encode(problem.conversation.messages[0].content)
            assert len(question) <= 30
            assert len(render(in_mode(problem.conversation, "think-high"), texts="preview").encode(tokenizer)) <= 350
            ids, mask = render(whole(problem, "think-high"), texts="preview", for_training=True).encode_with_loss(
                tokenizer
            )
            assert len(ids) <= most and sum(mask) > 0


def test_agent_is_in_the_table_of_tasks():
    assert isinstance(TASK, Agent) and TASK.domain == "agentic" and TASK.size is None
