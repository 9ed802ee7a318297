"""Reading the attempts of a run on the terminal, as JSON and as a page."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from longreach.errors import RequestError
from longreach.train.samples import SamplesOptions, main


def attempt(step: int, problem: int, member: int, reward: float, **changes) -> dict:
    """As the rollouts of a run keep it."""
    task = "arithmetic:level=1" if problem % 2 == 0 else "agent"
    given = {
        "step": step, "key": f"{step}/{problem}/{member}", "task": task, "domain": "mathematics", "problem": f"id{problem}",
        "level": 1, "mode": "think-high" if problem < 3 else "non-think", "member": member, "window": 64, "seed": 1,
        "weights": step, "prompt": f"<｜User｜>{problem}+1=<｜Assistant｜><think>", "text": "raw",
        "reply": [{"role": "assistant", "reasoning": f"count on from {problem}", "content": f"{problem + member}"}],
        "finish": "stop", "reward": reward, "right": reward == 1, "why": "" if reward == 1 else "expected more", "tokens": 9,
        "prompt_ids": [1], "token_ids": [2, 3], "written": [2], "logprobs": [-0.5, -0.25],
    }  # fmt: skip
    return given | changes


@pytest.fixture
def run(tmp_path) -> Path:
    """Two steps of four problems with two attempts each; the second attempts at problems 1 to 3 are right."""
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for step in (0, 1):
        made = [
            attempt(step, problem, member, 1.0 if member and problem else 0.1 * problem)
            for problem in range(4) for member in range(2)
        ]  # fmt: skip
        write(tmp_path / "run", step, made)
    return tmp_path / "run"


def write(run: Path, step: int, attempts: list[dict]) -> None:
    lines = "".join(json.dumps(one) + "\n" for one in attempts)
    (run / "samples" / f"step-{step:08d}.jsonl.gz").write_bytes(gzip.compress(lines.encode("ascii")))


def shown(capsys, run: Path, **options) -> list[str]:
    """Head lines of what is printed."""
    main(SamplesOptions(run=run, **options))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_an_attempt_shows_question_reasoning_answer_verdict_and_how_its_group_did(run, capsys):
    main(SamplesOptions(run=run, count=1, wrong=True))
    assert capsys.readouterr().out.splitlines() == [
        "step 1  agent  level 1  non-think  attempt 1: wrong, reward 0.3, 9 tokens; 1 of 2 at this problem right",
        "prompt     <｜User｜>3+1=<｜Assistant｜><think>",
        "reasoning  count on from 3",
        "answer     3",
        "verdict    expected more",
    ]


def test_the_last_attempts_are_shown_in_their_order(run, capsys):
    lines = shown(capsys, run, count=3)
    assert [line[: line.index(":")] for line in lines[1:]] == [
        "step 1  agent  level 1  non-think  attempt 1", "step 1  agent  level 1  non-think  attempt 2",
    ]  # fmt: skip
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("options", "count"),
    [({"step": 0}, 8), ({"task": "arith"}, 8), ({"mode": "non-think"}, 4), ({"right": True}, 6), ({"wrong": True}, 10),
     ({"right": True, "task": "agent", "step": 1}, 2)],
)  # fmt: skip
def test_attempts_are_chosen_by_step_task_mode_and_verdict(run, capsys, options, count):
    assert len(shown(capsys, run, count=99, **options)) == count


def test_best_and_worst_go_by_the_reward(run, capsys):
    assert all("reward 1" in line for line in shown(capsys, run, best=True, count=6))
    assert ["reward 0," in line for line in shown(capsys, run, worst=True, count=5)] == [True] * 4 + [False]


def test_json_gives_each_attempt_with_its_tokens_and_log_probabilities(run, capsys):
    main(SamplesOptions(run=run, json=True, count=2))
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["key"] for one in made] == ["1/3/0", "1/3/1"]
    assert made[0]["token_ids"] == [2, 3] and made[0]["written"] == [True, True] and made[0]["group"] == [1, 2]


def test_tool_calls_results_and_an_attempt_that_was_cut_off_are_shown(run, capsys):
    reply = [
        {"role": "assistant", "content": "", "reasoning": "look", "tool_calls": [["add", '{"a": 1}', "c1"]]},
        {"role": "tool", "content": "two\nlines"},
        {"role": "assistant", "content": ""},
    ]
    write(run, 2, [attempt(2, 0, 0, 0.0, reply=reply, finish="length")])
    main(SamplesOptions(run=run, count=1))
    lines = capsys.readouterr().out.splitlines()
    assert "9 tokens, cut off" in lines[0]
    assert [line.split(maxsplit=1) for line in lines[2:]] == [
        ["reasoning", "look"], ["call", 'add({"a": 1})'], ["result", "two"], ["lines"], ["answer"],
        ["verdict", "expected more"],
    ]  # fmt: skip


def test_control_characters_of_a_model_do_not_reach_the_terminal(run, capsys):
    reply = [{"role": "assistant", "content": "a\x1b[2Jb\x07c\r\x9bd"}]
    write(run, 2, [attempt(2, 0, 0, 0.0, reply=reply)])
    main(SamplesOptions(run=run, count=1))
    assert "answer     a\\x1b[2Jb\\x07c\\x0d\\x9bd\n" in capsys.readouterr().out


def test_the_page_holds_every_attempt_with_what_its_filters_need_and_loads_nothing(run, tmp_path, capsys):
    main(SamplesOptions(run=run, html=tmp_path / "s.html", count=99))
    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert text.count("<article") == 16 and text.count('class="right"') == 6
    assert "<option>agent</option>" in text and "<option>think-high</option>" in text
    assert "&quot;task&quot;: &quot;agent&quot;" in text
    assert "http" not in text and "src=" not in text and "prefers-color-scheme: dark" in text
    assert capsys.readouterr().out == f"page: {tmp_path / 's.html'}\n"


def test_what_a_model_writes_stays_text_in_the_page(run, tmp_path):
    reply = [{"role": "assistant", "content": '<script>alert("x")</script><!--CARDS--><!--TITLE-->'}]
    write(run, 2, [attempt(2, 0, 0, 0.0, reply=reply, task='"><img src=x onerror=alert(1)>')])
    main(SamplesOptions(run=run, html=tmp_path / "s.html"))
    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and "<img" not in text and "&lt;!--CARDS--&gt;" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"right": True, "wrong": True}, "--right and --wrong exclude each other"),
        ({"best": True, "worst": True}, "--best and --worst exclude each other"),
        ({"json": True, "html": Path("x.html")}, "--json and --html exclude each other"),
        ({"count": 0}, "--count 0 must be at least 1"),
        ({"mode": "loud"}, "--mode loud: there is no such mode"),
        ({"step": 7}, "has no attempt of step 7"),
        ({"task": "nothing"}, "none of 16 attempts is such a one"),
        ({"html": Path("/dev/null/x.html")}, "--html /dev/null/x.html cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(run, options, message):
    with pytest.raises(RequestError) as refused:
        main(SamplesOptions(run=run, **options))
    assert message in str(refused.value)


def test_a_folder_that_is_no_run_with_rollouts_is_refused(tmp_path):
    with pytest.raises(RequestError, match="give the run directory of longreach grpo or distill"):
        main(SamplesOptions(run=tmp_path))
