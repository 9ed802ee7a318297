"""A run that is killed, runs into a spike, or meets a full disk loses nothing; training for FP8 and FP4 is what is stored."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.data.documents import MemoryDocuments
from longreach.data.stream import MixtureStream
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.rundir import RunDirectory
from longreach.train import pretrain, state
from longreach.train.losses import mean_loss
from longreach.train.recipe import PretrainOptions, new_recipe
from longreach.train.schedule import Schedule, parse_stages
from longreach.train.setup import load_corpus
from longreach.train.stability import Anticipation, Feed, SpikeDetector
from longreach.train.stopping import StopRequest
from longreach.train.working import WorkingCopy

PROGRAM = """
import sys
from longreach.model import presets
from longreach.train import pretrain
original = presets.tiny
presets.tiny = lambda: original().replace(
    vocab_size=512, hidden_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 32, 0), num_hash_layers=1, index_topk=4)
pretrain.VALIDATION_TOKENS = 256
pretrain.matmul_peak = lambda *_, **__: 1e11
from longreach.cli import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = ("--stages", "16@0 32@0.4 64@0.7", "--batch-tokens", "128", "--threads", "1", "--checkpoint-every", "2",
           "--eval-every", "6", "--fim-rate", "0.3", "--anticipatory", "always")  # fmt: skip


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "pretrain", *map(str, arguments)]


def losses(run: Path) -> list[dict]:
    """Every record without what the clock says."""
    timed = {"tokens_per_s", "mfu", "seconds"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_random_instants_the_log_is_that_of_an_unbroken_run(corpus, tmp_path, times):
    steps = 12 * times
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ("--data", corpus, "--steps", steps, *OPTIONS)
    done = subprocess.run(command("--out", whole, *arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([record for record in losses(whole) if "loss" in record]) == steps

    rng, kills = random.Random(0), 0
    while kills < times:
        started = (broken / "state" / "tokenizer.json").exists() and state.state_files(broken / "state")
        if broken.exists() and not started:  # killed before its first checkpoint: nothing to go on from
            for path in sorted(broken.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            broken.rmdir()
        given = ("--out", broken, "--resume") if started else ("--out", broken, *arguments)
        process = subprocess.Popen(command(*given), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = before = _count(broken)
        deadline = time.monotonic() + 60
        while lines <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # until it has trained a step, so that the twenty are spread over the run
            lines = _count(broken)
        time.sleep(rng.uniform(0, 1.6))
        if process.poll() is not None:
            break  # it was quicker than the kills
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert state.state_files(broken / "state"), "none of the kills came after a checkpoint"
    if state.state_files(broken / "state")[-1][0] < steps:
        done = subprocess.run(command("--out", broken, "--resume"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert kills == times
    assert losses(broken) == losses(whole)
    a, b = load_model(whole).state_dict(), load_model(broken).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _count(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_full_disk_is_said_in_one_line_and_the_last_checkpoint_stays(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ("--data", corpus, "--out", run, "--steps", 4, *OPTIONS)
    assert subprocess.run(command(*arguments), capture_output=True).returncode == 0
    before = {path: path.read_bytes() for path in (run / "state").iterdir()}

    def small_files() -> None:  # no file may grow beyond 64 KiB: what a full disk does to a checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    more = command("--out", run, "--resume", "--steps", 9)
    done = subprocess.run(more, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "could not be written" in last and "the checkpoint of step 4 stays" in last and "--resume" in last
    assert {path: path.read_bytes() for path in (run / "state").iterdir()} == before
    assert subprocess.run(more, capture_output=True).returncode == 0


# ---- spikes and anticipatory routing --------------------------------------------------------------------------------


def make_trainer(corpus: Path, out: Path, steps: int, **options) -> pretrain.Trainer:
    asked = dict(data=(str(corpus),), seq_len=32, batch_tokens=64, checkpoint_every=10, sparse_at=1.0, **options)
    recipe = new_recipe(PretrainOptions(out=out, steps=steps, **asked))
    run = RunDirectory(out)
    trainer = pretrain.Trainer(run, recipe, load_corpus(recipe, None), torch.device("cpu"))
    trainer.plan(PretrainOptions(out=out, steps=steps, **asked), None)
    run.create({"steps": steps})
    return trainer


@pytest.fixture
def _small_preset(monkeypatch):
    original = ModelConfig.preset("tiny")
    small = original.replace(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 32, 0),
        num_hash_layers=1,
        index_topk=4,
    )
    monkeypatch.setattr("longreach.model.presets.tiny", lambda: small)
    monkeypatch.setattr(pretrain, "matmul_peak", lambda *_, **__: 1e11)
    monkeypatch.setattr(pretrain, "VALIDATION_TOKENS", 128)


@pytest.mark.usefixtures("_small_preset")
def test_a_spike_goes_back_routes_ahead_for_a_while_and_returns(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path / "run", 90)
    real, poisoned = trainer.forward_backward, []

    def spike_once(plan, *arguments):
        record, features = real(plan, *arguments)
        if trainer.step == 27 and not poisoned:
            poisoned.append(record["loss"])
            record["loss"] += 50.0
        return record, features

    modes = []
    indices = trainer.anticipation.indices

    def watched(step, last):
        routing = indices(step, last)
        modes.append((step, routing is not None))
        return routing

    monkeypatch.setattr(trainer, "forward_backward", spike_once)
    monkeypatch.setattr(trainer.anticipation, "indices", watched)
    trainer.train(StopRequest())
    records = losses(tmp_path / "run")
    events = [record for record in records if record.get("event") == "rollback"]
    assert [event["step"] for event in events] == [28]
    assert "back to step 20" in events[0]["text"]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 91))
    assert [step for step, on in modes if on] == list(range(20, 70)), "fifty steps of the mode, then back"
    assert [step for step, on in modes if not on] == [*range(28), *range(70, 90)]


@pytest.mark.usefixtures("_small_preset")
def test_a_loss_that_is_no_number_goes_back_as_well_and_gives_up_the_second_time(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path / "run", 60)
    real = trainer.forward_backward

    def poison(plan, *arguments):
        record, features = real(plan, *arguments)
        if trainer.step == 27:
            record["loss"] = math.nan
        return record, features

    monkeypatch.setattr(trainer, "forward_backward", poison)
    with pytest.raises(RequestError, match="became nan at step 28; the checkpoint of step 20 stays"):
        trainer.train(StopRequest())
    assert [at for at, _ in state.state_files(tmp_path / "run" / "state")][-1] == 20


def test_the_detector_sees_what_stands_out_and_nothing_else():
    generator = random.Random(0)
    detector = SpikeDetector()
    assert not any(detector.is_spike(4 - i / 300 + generator.gauss(0, 0.1), "a") for i in range(300)), "noise and slope"
    assert detector.is_spike(5.5, "a")
    assert not detector.is_spike(2.9, "a"), "a fall is no spike"
    assert not detector.is_spike(9.0, "b"), "a new phase starts anew"
    assert detector.is_spike(math.inf, "b")
    twin = SpikeDetector()
    twin.load_state_dict(detector.state_dict())
    assert twin.state_dict() == detector.state_dict()


def test_routing_is_that_of_the_weights_some_steps_ago():
    asked = []
    anticipation = Anticipation(lambda step: asked.append(step) or {0: torch.tensor([step])}, lag=3)
    assert anticipation.indices(4, last=99) is None
    anticipation.begin(5, duration=6)
    assert [int(anticipation.indices(5, last=99)[0])] == [5]
    assert asked == [5, 6, 7, 8], "the first steps share the indices of the moment the mode began"
    for step in range(6, 11):
        assert int(anticipation.indices(step, last=99)[0]) == step
    assert asked == [5, 6, 7, 8, 9, 10], "one look ahead per step, none beyond the mode's end"
    assert anticipation.indices(11, last=99) is None


@pytest.mark.usefixtures("_small_preset")
def test_stale_indices_are_used_in_every_layer(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path / "run", 30, anticipatory="always")
    seen = []
    real = trainer.model.features
    monkeypatch.setattr(trainer.model, "features", lambda *a, **k: (seen.append(k.get("routing")), real(*a, **k))[1])
    trainer.train(StopRequest())
    used = [routing for routing in seen if routing is not None]
    assert len(used) == 30 and all(set(routing) == {0, 1, 2, 3} for routing in used), "three layers and the MTP block"


def test_looking_ahead_changes_no_batch():
    documents = MemoryDocuments([torch.arange(i, i + 23).numpy() for i in range(40)])
    schedule = Schedule(20, parse_stages("8@0 16@0.5"), batch_tokens=32)
    plain = Feed(MixtureStream([documents], seed=0), schedule.at, 0)
    ahead = Feed(MixtureStream([documents], seed=0), schedule.at, 0)
    for step in range(14):
        expected = plain.take()
        ahead.look(min(19, step + step % 5))
        saved = json.loads(json.dumps(ahead.state_dict()))
        again = Feed(MixtureStream([documents], seed=0), schedule.at, 0)
        again.load_state_dict(saved, step)
        for got in (ahead.take(), again.take()):
            assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.documents, expected.documents)


# ---- precision ------------------------------------------------------------------------------------------------------


def qat_config(**changes) -> ModelConfig:
    return ModelConfig.preset("tiny").replace(
        vocab_size=128, hidden_size=64, num_hidden_layers=3, compress_ratios=(0, 4, 32, 0), num_hash_layers=1,
        moe_intermediate_size=32, initializer_range=0.1, numerics="official", **changes,
    )  # fmt: skip


@pytest.mark.parametrize("weight_format", ["fp8", "fp8-fp4"])
def test_the_forward_of_training_is_that_of_the_saved_file_bit_for_bit(weight_format, tmp_path):
    master = Transformer(qat_config(), seed=3)
    with torch.no_grad():
        for p in master.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.03)
    working = WorkingCopy(master, qat_config(weight_format=weight_format), torch.float32)
    working.refresh()
    save_model(master, tmp_path / "saved", weight_format=weight_format)
    loaded = load_model(tmp_path / "saved", dtype=torch.float32)
    assert loaded.config.weight_format == weight_format
    held = dict(loaded.named_parameters())
    for name, p in working.model.named_parameters():
        assert torch.equal(p, held[name]), name
    tokens = torch.randint(0, 128, (2, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(working.model(tokens), loaded(tokens))
        assert not torch.equal(working.model(tokens), master(tokens))


def test_gradients_go_straight_through_to_the_master():
    master = Transformer(qat_config(), seed=3)
    working = WorkingCopy(master, qat_config(weight_format="fp8-fp4"), torch.float32)
    working.refresh()
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(2))
    documents = torch.zeros_like(tokens)
    mean_loss(working.model.features(tokens).hidden, working.model.head.weight, tokens, documents).backward()
    expected = {name: p.grad.clone() for name, p in working.model.named_parameters() if p.grad is not None}
    working.hand_gradients()
    for name, p in master.named_parameters():
        assert (p.grad is None) == (name not in expected)
        if p.grad is not None:
            assert torch.equal(p.grad, expected[name])
    assert {"layers.1.ffn.experts.w1", "layers.1.attn.wq_a.weight", "embed.weight"} <= expected.keys()
    assert all(p.grad is None for p in working.model.parameters())


def test_bfloat16_training_keeps_small_updates():
    master = Transformer(qat_config(), seed=3)
    working = WorkingCopy(master, master.config, torch.bfloat16)
    working.refresh()
    before = master.layers[0].attn.wq_a.weight.detach().clone()
    with torch.no_grad():
        master.layers[0].attn.wq_a.weight.mul_(1 + 1e-4)
    working.refresh()
    assert torch.equal(working.model.layers[0].attn.wq_a.weight, master.layers[0].attn.wq_a.weight.bfloat16())
    assert not torch.equal(master.layers[0].attn.wq_a.weight, before)
    bias = working.model.layers[1].ffn.gate.bias
    master.layers[1].ffn.gate.bias.add_(1.0)
    assert bool((bias == 1.0).all()), "one bias for both"


@pytest.mark.usefixtures("_small_preset")
@pytest.mark.parametrize(
    "how", [("--precision", "bfloat16"), ("--qat", "fp8"), ("--qat", "fp8-fp4"), ("--optimizer", "adamw")]
)
def test_each_precision_learns_resumes_and_writes_its_format(longreach_command, corpus, tmp_path, how):
    run = tmp_path / "run"
    arguments = ("--data", corpus, "--out", run, "--steps", 24, "--threads", 1, "--seq-len", 32, "--batch-tokens", 128)
    result = longreach_command("pretrain", *arguments, *how)
    assert result.code == 0, result.err
    curve = [record["loss"] for record in losses(run) if "loss" in record]
    assert sum(curve[-5:]) / 5 < curve[0] - 0.5
    stored = load_model(run).config.weight_format
    assert stored == (how[1] if how[0] == "--qat" else "plain")
    assert longreach_command("pretrain", "--out", run, "--resume", "--steps", 26).code == 0


def test_the_errno_of_a_full_disk_is_reported_from_the_metrics_too(corpus, tmp_path, monkeypatch):
    trainer = object.__new__(pretrain.Trainer)
    trainer.run, trainer.mirror = RunDirectory(tmp_path), None
    monkeypatch.setattr(
        RunDirectory,
        "append_metrics",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    )
    with pytest.raises(RequestError, match=r"No space left on device.*there is no checkpoint yet"):
        trainer.write({"step": 1})
