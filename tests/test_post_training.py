"""The bench of post-training: its commands are ones the command line takes, its sentences follow from the scores."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from longreach import cli
from longreach.errors import RequestError
from longreach.journey import post_training
from longreach.journey.post_training import Bench, PostTrainingOptions, main

SCORES = {"start-0": 0.4, "grpo-0": 0.6, "sft-0": 0.9, "start-1": 0.5, "grpo-1": 0.58, "sft-1": 0.95, "mixed": 0.5,
          "teacher-0": 0.9, "teacher-1": 0.8, "distill": 0.88, "average": 0.3, "mixture": 0.85, "mixed-rl": 0.6}  # fmt: skip


def parsed(words: list[str]):
    """The options of a command line, as `longreach` itself reads them."""
    verb = words[0]
    command = cli.COMMANDS[verb]
    options = cli._parse(
        f"longreach {verb}", getattr(importlib.import_module(command.module), command.options), words[1:]
    )
    assert not isinstance(options, int), words
    return options


@pytest.fixture
def commands(monkeypatch) -> list[tuple[int, list[str]]]:
    """What would have been run, with made-up scores that differ a little by seed."""
    said: list[tuple[int, list[str]]] = []

    def command(self: Bench, *words: str):
        said.append((self.seed, list(words)))
        options = parsed([*words, "--json"])
        if words[0] == "evaluate":
            score = SCORES[Path(options.run).name] + 0.01 * self.seed
            return {"scores": [{"task": task, "accuracy": score} for task in options.task]}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "config.json").write_text("{}")
        return {}

    monkeypatch.setattr(Bench, "command", command)
    return said


def run(tmp_path, capsys, **options):
    assert main(PostTrainingOptions(out=tmp_path, json=True, seeds=2, threads=1, **options)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_gains_and_standard_errors_come_from_the_scores(tmp_path, capsys, commands):
    result = run(tmp_path, capsys, only="grpo", tasks=("programs:level=1", "arithmetic:level=2"))
    figures = result["figures"]
    assert figures["programs_grpo_gain"] == pytest.approx(0.2) and figures["programs_sft_gain"] == pytest.approx(0.5)
    assert figures["arithmetic_grpo_gain"] == pytest.approx(0.08)
    reached, missed = (next(s for s in result["conclusion"] if s.startswith(f"{task}: points gained"))
                       for task in ("programs:level=1", "arithmetic:level=2"))  # fmt: skip
    assert reached.endswith("reached") and "missed by" in missed
    kinds = [words[0] for seed, words in commands if seed == 0]
    assert kinds == ["sft", "grpo", "sft", "evaluate", "evaluate", "evaluate"] * 2


def test_the_student_is_compared_with_each_teacher_and_with_the_baselines(tmp_path, capsys, commands):
    result = run(tmp_path, capsys, only="distill", tasks=("programs:level=1", "arithmetic:level=2"))
    figures = result["figures"]
    assert figures["programs_kept_distill"] == pytest.approx((0.88 / 0.9 + 0.89 / 0.91) / 2)
    assert figures["arithmetic_kept_average"] == pytest.approx((0.3 / 0.8 + 0.31 / 0.81) / 2)
    # Both tasks score alike here, so a student's worse domain is the one with the better teacher.
    assert any("distill against average: higher" in sentence for sentence in result["conclusion"])
    taught = next(words for _, words in commands if words[0] == "distill")
    options = parsed([*taught, "--json"])
    assert [given.partition("=")[0] for part in options.teacher for given in part] == ["programs", "arithmetic"]


def test_a_bench_that_was_stopped_goes_on_and_measures_nothing_twice(tmp_path, capsys, commands):
    first = run(tmp_path, capsys, only="grpo")
    count = len(commands)
    assert run(tmp_path, capsys, only="grpo")["figures"] == first["figures"] and len(commands) == count
    (tmp_path / "results.jsonl").unlink()
    run(tmp_path, capsys, only="grpo")
    assert all(words[0] == "evaluate" for _, words in commands[count:]), "finished runs stay"


def test_a_command_that_fails_ends_the_bench_with_its_line(tmp_path):
    with pytest.raises(RequestError, match=r"longreach evaluate nowhere --task arithmetic ended with code 2"):
        Bench(PostTrainingOptions(out=tmp_path), 0).command("evaluate", "nowhere", "--task", "arithmetic")


@pytest.mark.parametrize("name", ["minutes", "pairs"])
def test_lengths_of_nothing_are_refused(tmp_path, name):
    with pytest.raises(RequestError, match=f"--{name} 0"):
        main(PostTrainingOptions(out=tmp_path, **{name: 0}))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_bench_runs_small(tmp_path):
    words = ["bench", "post-training", "--seeds", "1", "--minutes", "0.1", "--teacher-minutes", "0.1", "--mixed-steps", "5",
             "--start-steps", "5", "5", "--count", "8", "--pairs", "8", "--threads", "1",
             "--out", str(tmp_path), "--json"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "longreach", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "programs_kept_distill" in json.loads(done.stdout.splitlines()[-1])["figures"]
    assert post_training.NAME == "post-training"
