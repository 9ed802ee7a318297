"""The training bench: what it prints and records, and that it shows no speed of two sides that compute different things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longreach.bench import train
from longreach.bench.train import our_trainee
from longreach.checkpoint.save import save_model
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
SHORT = ("--preset", "tiny", "--repeats", 1, "--lengths", 96, "--threads", 1, "--device", "cpu")


@needs_proc
def test_both_sides_start_from_the_same_loss_and_every_figure_is_there(longreach_command):
    pytest.importorskip("transformers")
    result = longreach_command("bench", "train", *SHORT, "--alone", 300, "--against", "transformers", "--json")
    assert result.code == 0, result.err
    last = json.loads(result.out.splitlines()[-1])
    assert (last["command"], last["preset"], last["dtype"]) == ("bench train", "tiny", "float32")
    figures = last["figures"]
    assert figures["first_loss_difference"] < 1e-5
    expected = {"train_96_over_peer", "train_96_memory_over_peer", "train_96_matmul_fraction", "train_300_gib"}
    assert expected | {"muon_step_seconds", "adamw_step_seconds", "newton_schulz_matmul_fraction"} <= figures.keys()
    assert figures["train_96_over_peer"] == pytest.approx(figures["train_96_tok_s"] / figures["train_96_peer_tok_s"])
    ratio = figures["train_96_extra_gib"] / figures["train_96_peer_extra_gib"]
    assert figures["train_96_memory_over_peer"] == pytest.approx(ratio)
    # In all: the process with its libraries, 3.1M weights, their gradients and two moments.
    assert 4 * 4 * 3.1e6 / 2**30 < figures["train_300_gib"] < 4


def test_different_first_losses_stop_the_bench_before_any_speed(longreach_command, monkeypatch):
    def other_side(directory, dtype, device):
        trainee = our_trainee(directory, dtype, device)
        loss, trainee.arguments = trainee.loss, ("--train", "transformers", "--experts", "eager")
        trainee.loss = lambda tokens: 1.01 * loss(tokens)
        return trainee

    monkeypatch.setattr(train, "peer_trainee", other_side)
    result = longreach_command("bench", "train", *SHORT, "--alone", 300, "--against", "transformers")
    assert result.code == 2
    assert "do not compute the same" in result.err
    assert "tok/s" not in result.out


def test_a_step_returns_the_loss_before_it_and_trains(tmp_path):
    save_model(Transformer(ModelConfig.preset("tiny"), seed=0), tmp_path / "m", layout="transformers")
    side = our_trainee(tmp_path / "m", torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = side.model(tokens)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    losses = [side.step(tokens) for _ in range(3)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lengths", 1], "lengths at least 2 tokens"),
        (["--repeats", 0], "--repeats must be at least 1"),
        (["--lengths"], "--lengths is empty"),
        (["--alone", 10_000_000], "choose shorter lengths"),
    ],
)
def test_lengths_that_cannot_be_measured_are_refused(longreach_command, arguments, expected):
    result = longreach_command("bench", "train", "--preset", "tiny", *arguments)
    assert result.code == 2
    assert expected in result.err
