"""`longreach evaluate` on a small untrained model: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from episodes import Sums
from serving import save_run

from longreach.cli import _parse
from longreach.engine.engine import Engine
from longreach.engine.sampler import Sampled
from longreach.errors import LongreachError
from longreach.evaluate import evaluate_command
from longreach.evaluate.evaluate_command import EvaluateOptions, main
from longreach.tasks import registry
from longreach.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), context=256).parent


@pytest.fixture(autouse=True)
def _sums(monkeypatch):
    """`--task sums` is the tests' own."""
    monkeypatch.setitem(registry.TASKS, "sums", f"{Sums.__module__}:{Sums.__qualname__}")


@pytest.fixture
def evaluate(capsys, run):
    """Run the command with these arguments; returns what it printed to stdout and to stderr."""

    def call(text: str, name=None):
        capsys.readouterr()
        arguments = [str(name or run), *shlex.split(text), "--memory-gib", "0.1", "--threads", "1"]
        options = _parse("longreach evaluate", EvaluateOptions, arguments)
        assert isinstance(options, EvaluateOptions), capsys.readouterr().err
        assert main(options) == 0
        return capsys.readouterr()

    return call


@pytest.fixture
def able(monkeypatch, run):
    """The model knows its sums; where `fails` says so, it ends its answer at once."""
    able = SimpleNamespace(fails=lambda a, b: False)
    tokenizer = Tokenizer.load(run / "model")
    submit = Engine.submit

    def remember(engine, prompt, params=None, **more):
        request = submit(engine, prompt, params, **more)
        a, b = map(int, re.search(r"(\d+)\+(\d+)", tokenizer.decode(prompt)).groups())
        request.told = [] if able.fails(a, b) else tokenizer.encode(str(a + b))
        return request

    def settled(engine, request, answer, question, logits):
        place = request.num_generated
        token = request.told[place] if place < len(request.told) else tokenizer.eos_id
        return Sampled(token, answer.logprob, answer.top)

    monkeypatch.setattr(Engine, "submit", remember)
    monkeypatch.setattr(Engine, "_settled", settled)
    return able


def test_the_table_the_result_and_the_next_command_are_printed(evaluate, run):
    said = evaluate("--task sums:level=1 --mode non-think,think-high --count 6 --window 40")
    lines = said.out.splitlines()
    assert lines[0].split() == ["task", "mode", "problems", "right", "95", "%", "interval", "tokens", "cut", "off"]
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["sums:level=1", mode, "6"] for mode in ("non-think", "think-high")
    ]
    assert lines[-2].startswith("result: sums:level=1, non-think: 0 of 6 right, 0.0% (0.0 to 39.0); sums")
    assert lines[-1] == f"next: longreach evaluate {run} --task sums:level=1 --samples 3"
    assert "6 problems of each of sums:level=1; non-think, think-high; windows of 40 tokens, temperature 1" in said.err
    assert re.search(r"float32 on cpu .*, threads: 1 \(asked for\)", said.err)


def test_right_answers_are_counted_and_every_attempt_is_written(evaluate, able, tmp_path):
    able.fails = lambda a, b: a % 2
    out = tmp_path / "deep" / "first.jsonl"
    said = evaluate(f"--task sums:level=1 --mode non-think --count 10 --out {out} --samples 1")
    attempts = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    right = [attempt["right"] for attempt in attempts]
    assert len(attempts) == 10 and 0 < sum(right) < 10
    for attempt in attempts:
        a, b = map(int, re.search(r"(\d+)\+(\d+)", attempt["prompt"]).groups())
        assert attempt["right"] == (a % 2 == 0) and attempt["reward"] == float(attempt["right"])
        assert attempt["judged"] and attempt["mode"] == "non-think" and attempt["finish"] == "stop"
        assert attempt["why"] == ("" if attempt["right"] else f" is not {a + b}")
        assert attempt["reply"] == (str(a + b) if attempt["right"] else "")
    assert f"result: {out}" in said.out and f"--against {out}" in said.out
    assert len(re.findall(r"---- sums:level=1, non-think, wrong:  is not \d+", said.out)) == 1
    assert len(re.findall(r"---- sums:level=1, non-think, right\n(\d)\+(\d)\n>> \d+", said.out)) == 1


def test_two_models_are_compared_problem_by_problem(evaluate, able, tmp_path):
    able.fails = lambda a, b: a % 2
    out = tmp_path / "before.jsonl"
    evaluate(f"--task sums --mode non-think --count 40 --out {out}")
    able.fails = lambda a, b: False
    said = evaluate(f"--task sums --mode non-think --count 40 --against {out}")
    assert re.search(r"against\n.*100\.0%.*\+\d\d\.\d \(\+\d+\.\d to \+\d+\.\d\)\n", said.out)
    record = json.loads(evaluate(f"--task sums --mode non-think --count 40 --against {out} --json").out)
    [figure] = record["scores"]
    assert record["figures"] == {f"{figure['task']}, {figure['mode']}": pytest.approx(figure["accuracy"], abs=1e-3)}
    assert figure["accuracy"] == 1.0 and figure["against"]["count"] == 40 and figure["against"]["only_first"] == 0
    said = evaluate(f"--task sums --mode non-think --count 45 --against {out}")
    assert "--against has 40 of the 45 problems" in said.err
    said = evaluate(f"--task sums --mode think-high --count 5 --against {out}")
    assert "--against has 0 of the 5 problems" in said.err


def test_json_is_one_object_on_the_last_line(evaluate):
    said = evaluate("--task sums --task sums:level=1 --mode think-high --count 3 --json --seed 5 --temperature 0")
    [line] = said.out.splitlines()
    record = json.loads(line)
    assert record["command"] == "evaluate" and record["seed"] == 5 and record["window"] == 256
    assert [(f["task"], f["mode"], f["n"]) for f in record["scores"]] == [
        ("sums", "think-high", 3), ("sums:level=1", "think-high", 3),
    ]  # fmt: skip
    assert record["tokens"] > 0


def test_levels_are_shown_where_there_are_several(evaluate):
    lines = evaluate("--task sums --mode non-think --count 20 --window 60").out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["sums", "level", "level"]


def test_a_part_with_fewer_problems_is_said_to_have_fewer(evaluate, able):
    said = evaluate("--task sums:level=1 --mode non-think --count 400")
    assert re.search(r"sums:level=1 has only \d\d different held-out problems", said.err)


def test_what_a_model_writes_cannot_command_the_terminal():
    assert evaluate_command._short("a\x1b[2Jb\rc\nd\u202e") == "a\ufffd[2Jb\ufffdc\nd\ufffd"
    assert len(evaluate_command._short("x" * 10_000)) < 500


def test_windows_that_are_too_small_are_said_to_be(evaluate):
    said = evaluate("--task sums --mode think-high,think-max --count 4 --window 12")
    assert (
        "sums, think-max: 4 of 4 prompts leave no room for an answer in the window; give a larger --window" in said.err
    )
    assert re.search(
        r"sums, think-high: \d+ % of the answers were cut off by the window, which counts as wrong", said.err
    )


def test_the_model_may_grade_itself(evaluate, tmp_path):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Short answers are good.\n", encoding="utf-8")
    said = evaluate(f"--task sums:level=1 --mode non-think --count 2 --window 60 --judge self --rubric {rubric}")
    assert "could not be judged and count as wrong" in said.err or "0 of 2 right" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "there is nothing to ask; name a task"),
        ("--task nonsense", "task 'nonsense' is unknown"),
        ("--task sums --task sums", "is given twice"),
        ("--task sums:level=9", "has no level '9'"),
        ("--task sums --mode loud", "--mode 'loud': name each once"),
        ("--task sums --mode non-think,non-think", "name each once"),
        ("--task sums --mode ,", "name each once"),
        ("--task sums --count 0", "--count 0 must be 1 or more"),
        ("--task sums --samples -1", "--samples -1 must be 0 or more"),
        ("--task sums --window 300", "--window 300 must be from 2 to 256"),
        ("--task sums --window 1", "--window 1 must be from 2 to 256"),
        ("--task sums --temperature -1", "temperature -1"),
        ("--task sums --verifier-timeout-s 0", "give more than 0"),
        ("--task sums --against nowhere.jsonl", "--against nowhere.jsonl cannot be read"),
        ("--task sums --rubric r.txt", "are for a judge"),
        ("--task sums --judge http://x/v1", "say which of its models"),
        ("--task sums --judge self --rubric nowhere.txt", "--rubric nowhere.txt cannot be read"),
        ("--task sums --max-running 0", "--max-running 0 must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(evaluate, arguments, message):
    with pytest.raises(LongreachError) as caught:
        evaluate(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_is_overwritten_and_a_file_of_something_else_is_not_compared_with(evaluate, tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text('{"task": "sums"}\n', encoding="utf-8")
    with pytest.raises(LongreachError, match="is there already"):
        evaluate(f"--task sums --out {there}")
    with pytest.raises(LongreachError, match="line 1 is no attempt"):
        evaluate(f"--task sums --against {there}")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_no_run_is_refused(evaluate, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LongreachError, match=r"does not exist|holds no model"):
        evaluate("--task sums", name)


def test_progress_is_said_now_and_then(evaluate, monkeypatch):
    monkeypatch.setattr(evaluate_command, "PLAIN_LINE_EVERY_S", 0.0)
    said = evaluate("--task sums --mode non-think --count 5 --window 30")
    assert re.search(r"^5/5  0 of 5 right  [\d,]+ tokens/s$", said.err, re.MULTILINE)
