"""On-policy distillation: the loss through the whole model, teachers on demand, a run that survives its crashes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serving import make_tokenizer

from longreach.chat.messages import Message
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.data.examples import lay_out, make_example
from longreach.engine.sampling import FinishReason
from longreach.errors import RequestError
from longreach.evaluate.episode import Job, Sample
from longreach.evaluate.score import Result, Score
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.ops.logprobs import head_logprobs
from longreach.ops.reverse_kl import head_reverse_kl
from longreach.rundir import RunDirectory
from longreach.tasks.base import RIGHT, problem_at
from longreach.tasks.registry import open_task
from longreach.tokenizer.bpe import Tokenizer
from longreach.train import distill
from longreach.train.distill import Distillation, DistillOptions, Plan, defaults, main, planned_steps, token_level_loss
from longreach.train.kept import Exam, kept_share, load_scores, save_scores
from longreach.train.rollout import read_samples, rollout_digest
from longreach.train.sft import learned_targets
from longreach.train.teachers import Teachers, by_teacher
from longreach.train.tuning import Tuning, settle

TOKENIZER = make_tokenizer()
CONFIG = ModelConfig.preset("micro").replace(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=1024)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
MATH, SCIENCE = "arithmetic:level=1", "science:level=1"


def saved(folder: Path, seed: int, sharpness: float = 1.0, config: ModelConfig = CONFIG, tokenizer=TOKENIZER) -> Path:
    """A run of random weights; `sharpness` widens the logits, so that distributions differ."""
    model = Transformer(config, seed=seed)
    with torch.no_grad():
        model.head.weight.mul_(sharpness)
    return save_model(model, folder / "model", tokenizer=tokenizer).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A student and two teachers."""
    folder = tmp_path_factory.mktemp("runs")
    saved(folder / "student", 1)
    saved(folder / "math", 2, sharpness=8.0)
    saved(folder / "science", 3, sharpness=8.0)
    return folder


def options(runs: Path, out: Path, **changes) -> DistillOptions:
    given = {
        "run": runs / "student", "out": out, "steps": 2, "threads": 1, "device": "cpu", "problems": 4, "windows": "48",
        "eval_count": 0, "teacher": ((f"mathematics={runs / 'math'}", f"science={runs / 'science'}"),),
        "task": ((MATH,), (SCIENCE,)),
    }  # fmt: skip
    return DistillOptions(**(given | changes))


def records(out: Path) -> list[dict]:
    return [record for record in RunDirectory(out).read_metrics() if "divergence" in record]


# ---- the loss -------------------------------------------------------------------------------------------------------


def sample(task_name: str, prompt: list[int], tokens: list[int], written: list[bool], index: int = 0) -> Sample:
    """One that was made up."""
    task = open_task(task_name)
    job = Job(f"{task_name}/{index}", task, problem_at(task, "train", 0, index), "think-high", 64, 0)
    return Sample(job, prompt, tokens, written, None, (Message("assistant", ""),), FinishReason.STOP, RIGHT)


def made_up_samples() -> list[Sample]:
    """Of both teachers and different lengths, one with inserted tokens between two turns."""
    made = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(200, 500, (count,), generator=made).tolist()

    return [
        sample(MATH, ids(9), ids(14), [True] * 14, 0),
        sample(SCIENCE, ids(5), ids(20), [True] * 7 + [False] * 6 + [True] * 7, 1),
        sample(MATH, ids(21), ids(2), [True] * 2, 2),
        sample(SCIENCE, ids(11), ids(30), [True] * 30, 3),
    ]


def begun(runs: Path, out: Path, **changes) -> Distillation:
    """A run that is set up and has done nothing."""
    asked = options(runs, out, **changes)
    settings = settle(asked, defaults(asked, {}), {})
    plan = Plan.of(settings)
    teachers = Teachers(plan.runs, student=runs / "student", tokenizer=TOKENIZER, vocab_size=CONFIG.vocab_size,
                        resident=settings["resident"])  # fmt: skip
    return Distillation(Tuning.begin("distill", asked, settings, {}), plan, teachers)


def test_loss_and_gradients_of_the_whole_model_are_those_of_plain_logits(runs, tmp_path, monkeypatch):
    """Samples one by one, whole softmaxes of student and teacher, autograd."""
    monkeypatch.setattr(distill, "BALANCE", 0.0)
    distillation = begun(runs, tmp_path / "out", weight=(("science=0.25",),), micro_tokens=40)
    samples = made_up_samples()
    parts = distillation.read_by_teachers(samples)
    assert len(parts) == 4  # each of the two teachers' two samples is a part of its own at 40 tokens a part
    record, _ = distillation.backward(parts)

    student = load_model(runs / "student", dtype=torch.float32)
    teachers = {MATH: load_model(runs / "math"), SCIENCE: load_model(runs / "science")}
    total, divergence = torch.zeros(()), {MATH: [], SCIENCE: []}
    for one in samples:
        tokens = torch.tensor([one.prompt + one.tokens])
        with torch.no_grad():
            log_q = teachers[one.job.task.name](tokens).log_softmax(-1)[0]
        log_p = student.head(student.features(tokens, attention="dense").hidden).log_softmax(-1)[0]
        for place, is_written in enumerate(one.written):
            if is_written:
                at = len(one.prompt) + place - 1
                kl = (log_p[at].exp() * (log_p[at] - log_q[at])).sum()
                divergence[one.job.task.name].append(kl.item())
                total = total + kl * (0.25 if one.job.task.name == SCIENCE else 1.0)
    loss = total / sum(one.num_written for one in samples)
    loss.backward()

    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5) and loss > 0.1
    assert record["divergence_mathematics"] == pytest.approx(sum(divergence[MATH]) / 16, abs=1e-5)
    assert record["divergence_science"] == pytest.approx(sum(divergence[SCIENCE]) / 44, abs=1e-5)
    assert record["written_tokens"] == 60
    found = dict(distillation.tuning.model.named_parameters())
    largest = max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None)
    for name, p in student.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        mine = torch.zeros_like(p) if found[name].grad is None else found[name].grad
        torch.testing.assert_close(
            mine, expected, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_teachers_are_asked_at_written_tokens_alone(runs, tmp_path):
    distillation = begun(runs, tmp_path / "out")
    samples = made_up_samples()
    parts = distillation.read_by_teachers(samples)
    for part in parts:
        drawn = part.batch.tokens[:, 1:][part.where_BT].tolist()
        own = [one for one in samples if distillation.plan.teacher_of[one.job.task.name] == part.teacher]
        wanted = [token for one in own for token, w in zip(one.tokens, one.written, strict=True) if w]
        assert sorted(drawn) == sorted(wanted)
        assert part.states.shape == (len(wanted), CONFIG.hidden_size) and not part.states.requires_grad


def test_the_token_level_gradient_is_on_average_that_of_the_whole_divergence():
    """The mean over all tokens that could be drawn, each as often as it is drawn: exact, not sampled."""
    made = torch.Generator().manual_seed(3)
    hidden, teacher_hidden = (torch.randn(1, 5, generator=made, dtype=torch.float64) for _ in range(2))
    head, teacher_head = (torch.randn(7, 5, generator=made, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    drawn = torch.arange(7)
    logprobs, _ = head_logprobs(hidden.expand(7, -1), head, drawn)
    wanted, _ = head_logprobs(teacher_hidden.expand(7, -1), teacher_head, drawn)
    (token,) = torch.autograd.grad((logprobs.detach().exp() * token_level_loss(logprobs, wanted)).sum(), hidden)
    (whole,) = torch.autograd.grad(head_reverse_kl(hidden, head, teacher_hidden, teacher_head).total, hidden)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(token, whole)


def test_both_methods_report_the_same_divergence_on_average(runs, tmp_path):
    """The estimate from drawn tokens lies within a few of its standard errors of the exact mean."""
    kl = {}
    for method in ("full", "token"):
        main(options(runs, tmp_path / method, method=method, steps=1, problems=24))
        kl[method] = records(tmp_path / method)[0]["divergence"]
    assert rollout_digest(tmp_path / "full") == rollout_digest(tmp_path / "token")
    assert kl["full"] > 0.1
    assert kl["token"] == pytest.approx(kl["full"], rel=0.35)


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_learning_lowers_the_divergence_from_a_fixed_teacher(runs, tmp_path):
    main(
        options(
            runs, tmp_path / "out", teacher=((f"mathematics={runs / 'math'}",),), task=((MATH,),), steps=8, problems=8,
            lr=0.005,
        )
    )  # fmt: skip
    kl = [record["divergence"] for record in records(tmp_path / "out")]
    assert len(kl) == 8
    assert max(kl[4:]) < min(kl[:2]) and kl[-1] < 0.9 * kl[0], kl


def test_each_head_is_loaded_once_a_step_and_no_more_bodies_than_asked_for_stay(runs, tmp_path):
    """Two teachers and parts of 60 tokens, so each teacher has several parts."""
    heads, bodies = {}, {}
    for resident in (1, 2):
        out = tmp_path / str(resident)
        main(options(runs, out, steps=3, problems=6, micro_tokens=60, resident=resident))
        heads[resident] = [record["heads_loaded"] for record in records(out)]
        bodies[resident] = [record["bodies_loaded"] for record in records(out)]
        assert [record["teachers"] for record in records(out)] == [2, 2, 2]
    assert heads == {1: [2, 2, 2], 2: [2, 2, 2]}
    assert bodies == {1: [2, 4, 6], 2: [2, 2, 2]}
    one, two = (load_model(tmp_path / str(resident)).state_dict() for resident in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_single_teacher_is_loaded_once(runs, tmp_path):
    main(options(runs, tmp_path / "out", teacher=((f"mathematics={runs / 'math'}",),), task=((MATH,),), steps=3))
    assert [record["heads_loaded"] for record in records(tmp_path / "out")] == [1, 0, 0]
    assert [record["bodies_loaded"] for record in records(tmp_path / "out")] == [1, 1, 1]


def test_bodies_hold_no_head_and_the_one_unused_for_longest_goes_first(runs):
    three = {name: runs / run for name, run in (("a", "math"), ("b", "science"), ("c", "student"))}
    teachers = Teachers(three, student=runs / "student", tokenizer=TOKENIZER, vocab_size=CONFIG.vocab_size, resident=2)
    a = teachers.body("a")
    assert a.head.weight.numel() == 0
    teachers.body("b"), teachers.body("a"), teachers.body("c")
    assert teachers.bodies_loaded == 3
    assert teachers.body("a") is a
    teachers.body("b")
    assert teachers.bodies_loaded == 4
    whole = load_model(runs / "math").head.weight
    assert torch.equal(teachers.head("a"), whole)


def test_a_teacher_may_have_another_width_depth_and_an_mtp_block(runs, tmp_path):
    wide = CONFIG.replace(
        hidden_size=128, num_hidden_layers=3, compress_ratios=(0, 4, 32, 0), num_nextn_predict_layers=1
    )
    saved(tmp_path / "wide", 5, config=wide)
    main(options(runs, tmp_path / "out", teacher=((f"mathematics={tmp_path / 'wide'}",),), task=((MATH,),), steps=1))
    assert records(tmp_path / "out")[0]["divergence"] > 0


def test_a_students_mtp_block_and_indexers_learn_along(tmp_path, runs):
    """Answers longer than what the selection covers are read sparsely; an indexer has something to learn there."""
    config = CONFIG.replace(num_nextn_predict_layers=1, compress_ratios=(0, 4, 32, 0, 0), index_topk=8)
    student = saved(tmp_path / "student", 1, config=config)
    before = load_model(student).state_dict()
    main(options(runs, tmp_path / "out", run=student, steps=1, windows="80"))
    after, record = load_model(tmp_path / "out").state_dict(), records(tmp_path / "out")[0]
    assert record["mtp_loss"] > 1 and record["index_loss"] > 0
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("mtp.0.") for name in moved) and any(".indexer." in name for name in moved)


def test_bfloat16_and_quantised_training_measure_nearly_the_same_divergence(runs, tmp_path):
    found = {}
    for precision, qat in (("float32", "plain"), ("bfloat16", "plain"), ("float32", "fp8")):
        out = tmp_path / f"{precision}-{qat}"
        main(options(runs, out, steps=1, precision=precision, qat=qat))
        found[precision, qat] = records(out)[0]["divergence"]
    exact = found["float32", "plain"]
    assert all(value == pytest.approx(exact, rel=0.3) for value in found.values()), found


def test_several_tasks_of_a_domain_share_its_teacher_and_a_kind_goes_before_a_domain(runs):
    teachers = ("science=a", "arithmetic=b", "mathematics=c")
    asked = options(runs, Path("out"), teacher=(teachers,), task=((SCIENCE,), (MATH,)))
    settings = settle(asked, defaults(asked, {}), {})
    with pytest.raises(RequestError, match="--teacher mathematics=c has nothing to teach"):
        Plan.of(settings)
    settings["teacher"] = ["science=a", "arithmetic=b"]
    assert Plan.of(settings).teacher_of == {SCIENCE: "science", MATH: "arithmetic"}
    settings["teacher"], settings["task"] = ["mathematics=c"], [MATH, "arithmetic:level=2@3"]
    plan = Plan.of(settings)
    assert set(plan.teacher_of.values()) == {"mathematics"} and plan.shares == [1.0, 3.0]


def test_samples_are_ordered_by_teacher():
    assert by_teacher(["b", "a", "b", "c", "a"]) == [("b", [0, 2]), ("a", [1, 4]), ("c", [3])]


def test_modes_and_shares_decide_what_is_asked(runs, tmp_path):
    main(options(runs, tmp_path / "out", task=((f"{MATH}@3", f"{SCIENCE}@1"),), problems=8, steps=1,
                 modes=(("non-think,think-high",),), windows="non-think=32,think-high=48", group_size=2))  # fmt: skip
    samples = list(read_samples(tmp_path / "out"))
    assert len(samples) == 16
    assert sum(one["task"] == MATH for one in samples) == 12
    assert {(one["mode"], one["window"]) for one in samples} == {("non-think", 32), ("think-high", 48)}
    record = records(tmp_path / "out")[0]
    assert record["samples"] == 16 and record["accuracy"] == 0.0 and record["length_non-think"] < 32


# ---- crashes --------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """As if the power failed."""


def crash_at(monkeypatch, owner: type, name: str, call: int, after: bool) -> None:
    """Let the `call`-th call of a method be the last thing that happens, before or after its work."""
    method, count = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call and not after:
            raise Crash
        result = method(*args, **kwargs)
        if count == call and after:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, counted)


CRASHES = [
    ("longreach.evaluate.engine_source:EngineSource.step", 5, True),
    ("longreach.evaluate.engine_source:EngineSource.step", 130, False),
    ("longreach.train.distill:Distillation.read_by_teachers", 2, False),
    ("longreach.train.distill:Distillation.backward", 3, True),
    ("longreach.train.tuning:Tuning.update", 3, True),
    ("longreach.train.tuning:Tuning.save", 2, False),
    ("longreach.train.tuning:Tuning.save", 2, True),
    ("longreach.train.rollout:Roller.cover", 2, True),
    ("longreach.train.rollout:Roller.cover", 3, False),
]


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    main(options(runs, out, steps=4, checkpoint_every=2))
    return out


@pytest.mark.parametrize(("where", "call", "after"), CRASHES)
def test_a_run_that_was_interrupted_anywhere_ends_with_the_same_samples_and_weights(
    runs, tmp_path, uninterrupted, where, call, after
):
    module, _, path = where.partition(":")
    owner, _, name = path.partition(".")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, getattr(importlib.import_module(module), owner), name, call, after)
        with pytest.raises(Crash):
            main(options(runs, tmp_path / "out", steps=4, checkpoint_every=2))
    main(DistillOptions(out=tmp_path / "out", steps=4, resume=True, device="cpu"))
    assert rollout_digest(tmp_path / "out") == rollout_digest(uninterrupted)
    one, two = load_model(tmp_path / "out").state_dict(), load_model(uninterrupted).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    drop = {"seconds", "bodies_loaded", "tokens_per_s"}
    drop |= {f"{part}_tokens_per_s" for part in ("rollout", "teacher", "update")}
    drop |= {"heads_loaded"}  # a new process has no head yet
    mine, whole = (
        [{k: v for k, v in r.items() if k not in drop} for r in records(p)] for p in (tmp_path / "out", uninterrupted)
    )
    assert mine == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_killed_ten_times_at_random_instants_gives_the_same_samples_and_weights(
    runs, tmp_path, uninterrupted, seed
):
    """SIGKILL, as a power failure would end it; each start goes on where the last one was."""
    out, pick, kills, code = tmp_path / "out", random.Random(seed), 0, None
    given = [f"--teacher=mathematics={runs / 'math'}", f"--teacher=science={runs / 'science'}", f"--task={MATH}",
             f"--task={SCIENCE}", "--problems=4", "--windows=48", "--eval-count=0", "--checkpoint-every=2"]  # fmt: skip
    program = "import longreach.train.distill, sys; print('ready', flush=True); from longreach.cli import main; sys.exit(main())"
    while code != 0:
        begun = (out / "config.json").exists()
        if out.exists() and not begun:
            shutil.rmtree(out)  # killed before there was a run
        start = ["--resume"] if begun else [str(runs / "student"), *given]
        command = [sys.executable, "-c", program, "distill", *start, f"--out={out}", "--steps=4", "--threads=1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ONE_THREAD)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if kills < 10:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(pick.uniform(0, 2.0))
            process.kill()
        process.stdout.read()
        code = process.wait()
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
    assert kills >= 5
    assert rollout_digest(out) == rollout_digest(uninterrupted)
    one, two = load_model(out).state_dict(), load_model(uninterrupted).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert main(DistillOptions(out=uninterrupted, steps=4, resume=True, device="cpu")) == 0
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_minutes_become_steps_once(runs, tmp_path, monkeypatch):
    """6 s, of which four steps took 3.5, at 0.5 s for each but the slower first: 5 more."""
    paces = [2.0, 0.5, 0.5, 0.5]
    tuning = begun(runs, tmp_path / "out").tuning
    asked = options(runs, tmp_path / "out", steps=None, minutes=0.1)
    assert planned_steps(asked, tuning, paces[:3]) == 0
    tuning.step = 4
    assert planned_steps(asked, tuning, paces) == 9
    assert RunDirectory(tmp_path / "out").read_config()["planned_steps"] == 9
    resumed = DistillOptions(out=tmp_path / "out", resume=True)
    assert planned_steps(resumed, tuning) == 9
    assert planned_steps(dataclasses.replace(resumed, steps=12), tuning) == 12
    tuning.seconds = 8.0
    assert planned_steps(dataclasses.replace(resumed, minutes=0.5), tuning) == 15


# ---- scores ---------------------------------------------------------------------------------------------------------


def scored(rights: list[bool]) -> Score:
    results = tuple(Result(f"p{i}", 1, right, float(right), 5, False, True) for i, right in enumerate(rights))
    return Score("arithmetic", "mathematics", "think-high", results)


def test_the_share_kept_of_a_teachers_score_and_its_interval_are_those_computed_by_hand():
    """80 and 76 of 100 right, 10 problems decided differently: 0.95, and ln has standard error √(10 / (80 · 76))."""
    teacher = scored([True] * 80 + [False] * 20)
    student = scored([True] * 73 + [False] * 7 + [True] * 3 + [False] * 17)
    kept = kept_share(teacher, student)
    assert kept is not None
    half = 1.959963984540054 * math.sqrt(10 / 6080)
    assert kept == pytest.approx((0.95, 0.95 * math.exp(-half), 0.95 * math.exp(half)))
    assert str(kept) == "95.0% (87.7 to 102.9)"


def test_equal_answers_are_not_certainty_and_a_teacher_with_nothing_right_has_no_share():
    kept = kept_share(scored([True] * 10), scored([True] * 10))
    assert kept is not None and kept.share == 1 and kept.low < 0.9
    assert kept_share(scored([False] * 5), scored([True] * 5)) is None


def test_scores_come_back_from_their_file_as_they_were(tmp_path):
    path = tmp_path / "scores.json"
    assert load_scores(path) == {}
    save_scores(path, {"student": [scored([True, False])]})
    assert load_scores(path) == {"student": [scored([True, False])]}
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RequestError, match=r"scores\.json is damaged .* delete it"):
        load_scores(path)


def test_teachers_and_student_are_scored_on_the_same_held_out_problems_before_and_after(runs, tmp_path, capsys):
    main(options(runs, tmp_path / "out", eval_count=3, steps=1, json=True))
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [(row["teacher_name"], row["task"], row["n"]) for row in figures["scores"]] == [
        ("mathematics", MATH, 3), ("science", SCIENCE, 3),
    ]  # fmt: skip
    kept = load_scores(tmp_path / "out" / "scores.json")
    assert sorted(kept) == ["mathematics", "science", "step 1", "student"]
    assert [score.accuracy for score in kept["step 1"]] == [row["after"] for row in figures["scores"]]
    ids = [[result.problem for result in score.results] for score in (kept["mathematics"][0], kept["student"][0])]
    task = open_task(MATH)
    assert ids[0] == ids[1] == [problem_at(task, "held-out", 0, index).id for index in range(3)]


def test_a_run_that_was_killed_before_its_last_scores_takes_them_when_resumed(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, Exam, "take", 4, False)  # the student and two teachers before, the student after
        with pytest.raises(Crash):
            main(options(runs, out, eval_count=2, steps=1))
    weights = (out / "model" / "model.safetensors").read_bytes()
    main(DistillOptions(out=out, steps=1, resume=True, device="cpu"))
    assert "held-out problems" in capsys.readouterr().out
    assert "step 1" in load_scores(out / "scores.json")
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert len(records(out)) == 1


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ()}, "there is no teacher; give --teacher DOMAIN=RUN"),
        ({"task": ()}, "there is no task"),
        ({"teacher": (("mathematics",),)}, "--teacher mathematics: write NAME=VALUE, each name once"),
        ({"teacher": (("mathematics=a", "mathematics=b"),)}, "each name once"),
        ({"task": ((MATH, "programs"),), "teacher": (("mathematics=a",),)},
         r"task programs has no teacher; add --teacher code=RUN \(its domain\) or --teacher programs=RUN"),
        ({"task": ((MATH,),)}, r"--teacher science=.* has nothing to teach; the tasks are arithmetic:level=1 \(mathematics\)"),
        ({"weight": (("code=1",),)}, "--weight code=1 is for no teacher; there are mathematics, science"),
        ({"weight": (("science=0",),)}, "give a number above 0"),
        ({"weight": (("science=many",),)}, "many is no weight"),
        ({"modes": (("quickly",),)}, "quickly"),
        ({"windows": "4000"}, r"--windows: 4000 tokens are more than the context of .*student.*, 1024"),
        ({"windows": "10.5"}, "a token is not divided"),
        ({"problems": 0}, "--problems 0 must be at least 1"),
        ({"resident": 0}, "--resident 0 must be at least 1"),
        ({"decay": 2.0}, "--decay 2 is a fraction"),
        ({"memory_gib": 0.0}, "--memory-gib 0 must be above 0"),
        ({"run": None}, "RUN is missing"),
        ({"windows": "3"}, "no prompt leaves room for an answer; --windows must be larger"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(runs, tmp_path, changes, message):
    with pytest.raises(RequestError, match=message):
        main(options(runs, tmp_path / "out", **changes))


def bad_teacher(tmp_path: Path, kind: str) -> Path:
    folder = tmp_path / kind
    if kind == "missing":
        return folder
    if kind == "no-run":
        folder.mkdir()
    elif kind == "other-tokenizer":
        saved(folder, 2, tokenizer=Tokenizer.train(["quite another text of other words " * 20], CONFIG.vocab_size))
    elif kind == "larger-tokenizer":
        larger = Tokenizer.train(["quite another text of other words " * 20], 600)
        saved(folder, 2, config=CONFIG.replace(vocab_size=600), tokenizer=larger)
    elif kind == "other-vocabulary":
        saved(folder, 2, config=CONFIG.replace(vocab_size=CONFIG.vocab_size + 64))
    elif kind == "short-context":
        saved(folder, 2, config=CONFIG.replace(max_position_embeddings=32))
    elif kind == "no-tokenizer":
        saved(folder, 2)
        (folder / "model" / "tokenizer.json").unlink()
    elif kind == "damaged":
        saved(folder, 2)
        [weights] = (folder / "model").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing does not exist; give a run directory"),
        ("no-run", r"no-run holds no model"),
        (
            "other-tokenizer",
            r"other-tokenizer.* has another tokenizer than .*student.*: token \d+ is '.*' against '.*'; both",
        ),
        ("larger-tokenizer", r"larger-tokenizer.* another tokenizer than .*: 600 tokens against 512"),
        ("other-vocabulary", r"other-vocabulary.* predicts 576 tokens, the student .* 512"),
        ("short-context", r"48 tokens are more than the context of .*short-context.*, 32"),
        ("no-tokenizer", r"no tokenizer at .*no-tokenizer"),
        ("damaged", r"damaged"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(runs, tmp_path, kind, message):
    teacher = bad_teacher(tmp_path, kind)
    with pytest.raises(Exception, match=message) as caught:
        main(options(runs, tmp_path / "out", teacher=((f"mathematics={teacher}", f"science={runs / 'science'}"),)))
    assert type(caught.value).__mro__[1].__name__ in ("LongreachError",), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_its_checkpoint(runs, tmp_path, monkeypatch):
    compare = Distillation.compare

    def broken(self, part, features, head):
        objective, divergence = compare(self, part, features, head)
        return objective, math.nan if self.tuning.step == 1 else divergence

    monkeypatch.setattr(Distillation, "compare", broken)
    with pytest.raises(RequestError, match=r"the loss became nan at step 2; .* --lr below 0.004"):
        main(options(runs, tmp_path / "out", checkpoint_every=1))
    weights = load_model(tmp_path / "out").state_dict()
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_a_resumed_run_keeps_its_own_options(runs, tmp_path):
    main(options(runs, tmp_path / "out", steps=1))
    again = DistillOptions(out=tmp_path / "out", steps=2, resume=True, device="cpu", problems=8)
    with pytest.raises(RequestError, match="--problems 8 differs from this run's 4"):
        main(again)
    main(dataclasses.replace(again, problems=None))
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2]


def test_a_batch_is_laid_out_so_that_each_written_token_is_predicted_once():
    examples = [
        make_example([1, 2, 3, 4, 5], [False, False, True, False, True]),
        make_example([6, 7, 8], [False, True, True]),
    ]
    batch = lay_out(examples)
    where = learned_targets(batch)
    assert sorted(batch.tokens[:, 1:][where].tolist()) == [3, 5, 7, 8]
