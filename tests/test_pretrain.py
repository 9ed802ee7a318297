"""Pretraining: the loss, the schedule, a run from nothing to a model, exact resume, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longreach.checkpoint.load import load_model
from longreach.errors import RequestError
from longreach.model import presets
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.ops.cross_entropy import CHUNK
from longreach.rundir import RunDirectory
from longreach.tokenizer.bpe import Tokenizer
from longreach.train import pretrain
from longreach.train.losses import balance_loss, mean_loss, predicted, summed_loss
from longreach.train.plot import smoothed
from longreach.train.pretrain import balance_experts
from longreach.train.recipe import PretrainOptions, new_recipe
from longreach.train.schedule import Schedule, Stage, StepPlan, learning_rate, parse_stages
from longreach.train.setup import load_corpus

# ---- losses ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_torch_with_the_same_gradients_over_several_chunks():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, CHUNK // 2, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    tokens = torch.randint(0, 11, hidden.shape[:2], generator=generator)
    documents = torch.zeros_like(tokens)
    loss = mean_loss(hidden, weight, tokens, documents)
    expected = F.cross_entropy((hidden[:, :-1] @ weight.t()).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, (hidden, weight)))


def test_no_target_crosses_from_one_document_into_the_next():
    documents = torch.tensor([[4, 4, 4, 7, 7, 9]])
    assert predicted(documents, 1).tolist() == [[True, True, False, True, False]]
    assert predicted(documents, 2).tolist() == [[True, False, False, False]]
    assert predicted(torch.tensor([[2, 2, -1, -1]]), 1).tolist() == [[True, False, False]], "padding is no target"
    hidden = torch.zeros(1, 6, 2)
    # Equal logits everywhere: each target costs log(vocabulary).
    total, count = summed_loss(hidden, torch.zeros(5, 2), torch.zeros(1, 6, dtype=torch.int64), documents)
    assert count == 3
    assert total.item() == pytest.approx(3 * math.log(5))


def test_positions_without_a_target_get_no_gradient():
    hidden = torch.randn(1, 4, 2, requires_grad=True)
    documents = torch.tensor([[0, 0, 1, 1]])
    mean_loss(hidden, torch.randn(5, 2), torch.zeros(1, 4, dtype=torch.int64), documents).backward()
    assert hidden.grad is not None
    assert hidden.grad[0].abs().sum(dim=1).bool().tolist() == [True, False, True, False]


def test_very_large_logits_overflow_nothing():
    hidden = torch.tensor([[[1e4], [0.0]]], requires_grad=True)
    loss = mean_loss(
        hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([[0, 1]]), torch.zeros(1, 2, dtype=torch.int64)
    )
    assert loss.item() == 20_000.0


# ---- schedule -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_stays_and_falls_to_a_tenth():
    rates = [learning_rate(step, 1000, 0.25) for step in range(1000)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert set(rates[99:750]) == {1.0}
    assert rates[875] == pytest.approx(0.55, abs=0.01)
    assert rates[999] == pytest.approx(0.1)
    assert learning_rate(0, 5, 0.25) == 1.0, "a run of five steps has no room to warm up"


def test_a_step_s_plan_follows_from_its_number():
    schedule = Schedule(
        100,
        parse_stages("16@0 64@0.5 256@0.8"),
        batch_tokens=256,
        sparse_at=0.8,
        indexer_warmup=0.05,
        decay=0.1,
        ramp=0.2,
    )
    plans = [schedule.at(step) for step in range(100)]
    assert [plan.seq_len for plan in plans] == [16] * 50 + [64] * 30 + [256] * 20
    assert [plan.attention for plan in plans] == ["dense"] * 80 + ["warmup"] * 5 + ["sparse"] * 15
    assert [plan.rows for plan in plans[:21:5]] == [4, 7, 10, 13, 16], "the batch grows from a quarter"
    assert plans[50].rows == 4 and plans[90].rows == 1
    assert {plan.mtp_weight for plan in plans[:90]} == {0.3} and {plan.mtp_weight for plan in plans[90:]} == {0.1}
    assert plans[82].lr_factor == 1.0 and plans[99].lr_factor == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", (Stage(128, 0.0),)),
        ("16@0, 64@0.5", (Stage(16, 0.0), Stage(64, 0.5))),
        ("64@0.5 16@0", "the first must begin at 0"),
        ("16@0 64@0", "after it"),
        ("16@0 64@1", "before 1"),
        ("", "the first must begin at 0"),
        ("2@0", "too short"),
        ("long@0", "LENGTH@START"),
    ],
)
def test_stages_are_read_or_refused(text, expected):
    if isinstance(expected, tuple):
        assert parse_stages(text) == expected
    else:
        with pytest.raises(RequestError, match=expected):
            parse_stages(text)


def test_the_balance_loss_is_the_equation_row_by_row():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 6, 4, generator=generator, requires_grad=True)
    chosen = torch.rand(2, 6, 4, generator=generator).argsort(-1)[..., :2]
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected = torch.zeros(())
    for row in range(2):
        tokens = int(real[row].sum())
        for e in range(4):
            f = 4 / (2 * tokens) * sum(e in chosen[row, t].tolist() for t in range(tokens))
            P = sum(scores[row, t, e] / scores[row, t].sum() for t in range(tokens)) / tokens
            expected = expected + f * P / 2
    got = balance_loss(scores, chosen, real)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(expected, scores))
    even = torch.arange(8).view(1, 4, 2) % 4
    assert float(balance_loss(torch.ones(1, 4, 4), even, torch.ones(1, 4, dtype=torch.bool))) == pytest.approx(1.0)


def test_smoothing_begins_at_the_first_value():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 0.0], keep=0.5) == pytest.approx([1.0, 1 / 3])


# ---- parts of a step ------------------------------------------------------------------------------------------------


def tiny(**changes) -> ModelConfig:
    return ModelConfig.preset("tiny").replace(**changes)


def test_balancing_raises_the_bias_of_experts_below_the_mean_load():
    model = Transformer(tiny(vocab_size=300))
    chosen = torch.tensor([[[0, 1], [0, 1], [0, 2], [0, 3]]])  # loads 4 2 1 1 0 0 0 0, mean 1
    balance_experts(model, {0: chosen, 1: chosen, 3: chosen})
    expected = torch.tensor([-1.0, -1, 0, 0, 1, 1, 1, 1]) * 0.001
    torch.testing.assert_close(model.get_buffer("layers.1.ffn.gate.bias"), expected)
    torch.testing.assert_close(model.get_buffer("mtp.0.ffn.gate.bias"), expected)
    assert not model.get_buffer("layers.2.ffn.gate.bias").any(), "a layer that reported nothing is left alone"
    assert "layers.0.ffn.gate.bias" not in model.state_dict(), "hash layers have none"


# ---- a run ----------------------------------------------------------------------------------------------------------

SMALL = ("--batch-tokens", 128, "--seq-len", 32, "--threads", 1)


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch):
    """The tiny preset with a small vocabulary and three layers: one of each attention."""
    original = presets.tiny

    def shrunk() -> ModelConfig:
        return original().replace(
            vocab_size=512, hidden_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 32, 0), num_hash_layers=1
        )

    monkeypatch.setattr(presets, "tiny", shrunk)
    monkeypatch.setattr(pretrain, "matmul_peak", lambda *_, **__: 1e11)  # only the MFU shown depends on it
    monkeypatch.setattr(pretrain, "VALIDATION_TOKENS", 512)


def tree(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run).state_dict()


def test_a_run_leaves_the_whole_run_directory_and_names_the_next_command(longreach_command, corpus, tmp_path):
    run = tmp_path / "run"
    result = longreach_command("pretrain", "--data", corpus, "--out", run, "--steps", 5, *SMALL)
    assert result.code == 0, result.err
    assert tree(run) == {
        "config.json", "metrics.jsonl", "loss.png", "state/step-00000005.pt", "state/tokenizer.json",
        "model/config.json", "model/model.safetensors", "model/tokenizer.json",
    }  # fmt: skip
    assert result.out.splitlines() == [f"model: {run}/model", f'next: longreach generate {run} "def "']
    assert "cpu (" in result.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["text"]) for r in records if "event" in r] == [
        (1, "rows of 32, dense attention"), (5, "rows of 32, sparse attention"),
    ]  # fmt: skip
    metrics = [record for record in records if "event" not in record]
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5, 5]
    assert metrics[4]["tokens"] == 5 * 128 and metrics[4]["index_loss"] >= 0
    # Initial logits have unit variance, which costs half a nat more than equal ones.
    assert metrics[0]["loss"] == pytest.approx(math.log(512) + 0.5, abs=0.3)
    assert metrics[0]["mtp_loss"] == pytest.approx(math.log(512) + 0.5, abs=0.3)
    # A byte of this text costs val_loss per token over bytes per token.
    validation = metrics[-1]
    assert 0 < validation["val_bits_per_byte"] < validation["val_loss"] / math.log(2)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Tokenizer.load(run / "model").vocab_size == 512
    assert longreach_command("generate", run, "def ", "--max-tokens", 3).code == 0


def test_training_learns(longreach_command, corpus, tmp_path):
    arguments = ("--data", corpus, "--out", tmp_path / "run", "--steps", 40, "--lr", "0.01", "--json", *SMALL)
    result = longreach_command("pretrain", *arguments)
    record = json.loads(result.out.splitlines()[-1])
    assert record["steps"] == 40
    assert record["finished"] is True
    assert record["tokens"] == 40 * 128
    assert record["loss"] < 0.75 * math.log(512)
    assert record["val_loss"] < 0.75 * math.log(512)


def test_the_held_out_loss_of_a_model_is_what_torch_computes_for_it(longreach_command, tmp_path):
    text = "value = 1234\nprint(value)\n" * 12
    (tmp_path / "one.txt").write_text(text)
    run = tmp_path / "run"
    longreach_command("pretrain", "--data", tmp_path / "one.txt", "--out", run, "--steps", 2, *SMALL)
    tokenizer, model = Tokenizer.load(run / "model"), load_model(run)
    held_out = text[len(text) - len(text) // 10 :]
    ids = torch.tensor([[0, *tokenizer.encode(held_out), 1]])[:, :32]
    with torch.no_grad():
        loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")
    validation = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert validation["val_loss"] == pytest.approx(loss.item() / (ids.shape[1] - 1), rel=1e-4)
    assert validation["val_bits_per_byte"] == pytest.approx(loss.item() / math.log(2) / len(held_out), rel=1e-4)


def test_two_runs_of_one_seed_are_the_same_and_of_another_are_not(longreach_command, corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        longreach_command("pretrain", "--data", corpus, "--out", tmp_path / name, "--steps", 3, "--seed", seed, *SMALL)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])


def test_a_stopped_and_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(
    longreach_command, corpus, tmp_path, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    longreach_command("pretrain", "--data", corpus, "--out", whole, "--steps", 6, *SMALL)

    real, steps = pretrain.balance_experts, []

    def interrupt_in_step_3(*arguments):
        real(*arguments)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pretrain, "balance_experts", interrupt_in_step_3)
    stopped = longreach_command("pretrain", "--data", corpus, "--out", broken, "--steps", 6, *SMALL)
    monkeypatch.setattr(pretrain, "balance_experts", real)
    assert stopped.code == 130
    assert stopped.out.splitlines()[-1] == f"next: longreach pretrain --out {broken} --resume"
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 4  # with the phase that began

    # A line of a step that no checkpoint has seen, as a crash leaves behind, is forgotten.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    assert longreach_command("pretrain", "--out", broken, "--resume", "--threads", 1).code == 0
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, broken)
    ]
    assert losses[0] == losses[1]
    assert (whole / "state" / "tokenizer.json").read_bytes() == (broken / "state" / "tokenizer.json").read_bytes()


def test_a_finished_run_says_so_and_goes_on_with_a_larger_budget(longreach_command, corpus, tmp_path):
    run = tmp_path / "run"
    longreach_command("pretrain", "--data", corpus, "--out", run, "--steps", 2, *SMALL)
    before = (run / "metrics.jsonl").read_bytes()
    again = longreach_command("pretrain", "--out", run, "--resume")
    assert again.code == 0
    assert f"{run} is finished: 2 steps" in again.err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert longreach_command("pretrain", "--out", run, "--resume", "--steps", 4, "--threads", 1).code == 0
    assert json.loads((run / "config.json").read_text())["steps"] == 4
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_minutes_are_turned_into_steps_once(longreach_command, corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ("--data", corpus, "--out", run, "--minutes", 0.05, "--json", *SMALL)
    record = json.loads(longreach_command("pretrain", *arguments).out)
    planned = json.loads((run / "config.json").read_text())["steps"]
    assert record["steps"] == planned > 3
    rates = [json.loads(line).get("lr") for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate]
    assert rates[-1] == pytest.approx(max(rates) / 10), "the schedule ended with the run"


def test_timing_a_step_changes_nothing(corpus, tmp_path):
    recipe = new_recipe(PretrainOptions(out=tmp_path / "run", data=(str(corpus),), seq_len=32, batch_tokens=128))
    trainer = pretrain.Trainer(RunDirectory(tmp_path / "run"), recipe, load_corpus(recipe, None), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in trainer.master.state_dict().items()}
    for attention in ("dense", "warmup", "sparse"):
        trainer.probe(StepPlan(32, 4, attention, 1.0, 0.3))
    after = trainer.master.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(optimizer.state for optimizer in trainer.optimizer.optimizers.values())
    assert all(p.grad is None for p in trainer.master.parameters())


def test_without_a_length_the_data_is_seen_once(longreach_command, corpus, tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("file00.py", "file01.py"):
        (tmp_path / "two" / name).write_text((corpus / name).read_text())
    record = json.loads(
        longreach_command("pretrain", "--data", tmp_path / "two", "--out", tmp_path / "run", "--json", *SMALL).out
    )
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    sizes = [len(tokenizer.encode((corpus / name).read_text())) + 2 for name in ("file00.py", "file01.py")]
    assert record["steps"] in {math.ceil(size / 128) for size in sizes}


def test_a_prepared_corpus_trains_as_its_texts_do(longreach_command, corpus, tmp_path):
    prepared = longreach_command(
        "prepare", "--data", corpus, "--vocab-size", 512, "--out", tmp_path / "corpus", "--json"
    )
    assert prepared.code == 0, prepared.err
    figures = json.loads(prepared.out.splitlines()[-1])["figures"]
    assert figures["documents"] + figures["held_out"] == 24
    curves = []
    for name, data in (("texts", corpus), ("shards", tmp_path / "corpus")):
        run = tmp_path / name
        assert longreach_command("pretrain", "--data", data, "--out", run, "--steps", 3, *SMALL).code == 0
        curves.append([json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert curves[0] == curves[1]


def test_preparing_overwrites_nothing_and_needs_data(longreach_command, corpus, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for arguments, expected in (
        (("--data", corpus, "--out", tmp_path / "full"), "is not empty"),
        (("--out", tmp_path / "new"), "--data is missing"),
        (("--data", corpus, "--out", tmp_path / "new", "--vocab-size", 10), "a vocabulary of 10 is too small"),
    ):
        result = longreach_command("prepare", *arguments)
        assert result.code == 2
        assert expected in result.err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_tokenizer_can_be_reused(longreach_command, corpus, tmp_path):
    mine = Tokenizer.train(["another text " * 50], vocab_size=400)
    mine.save(tmp_path / "mine.json")
    run = tmp_path / "run"
    arguments = ("--data", corpus, "--out", run, "--steps", 1, "--tokenizer", tmp_path / "mine.json")
    assert longreach_command("pretrain", *arguments, *SMALL).code == 0
    assert (run / "model" / "tokenizer.json").read_bytes() == (tmp_path / "mine.json").read_bytes()


# ---- what it refuses: one line, exit code 2, nothing written --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "huge"], "unknown preset 'huge'; presets are flash, pro"),
        (["--preset", "flash"], "needs 3,1"),
        (["--preset", "v32"], "V3.2 baseline"),
        (["--data", "absent"], "--data absent does not exist"),
        (["--data", "LATIN"], "is not UTF-8: byte 0xe9 at offset 3"),
        (["--data", "SHORT"], "fewer than one row of 32"),
        (["--data", "EMPTY"], "holds no text"),
        (["--data", "NOTEXT"], "line 2"),
        (["--stages", "16@0"], "exclude each other"),
        (["--sparse-at", "2"], "--sparse-at 2 is a fraction"),
        (["--sparse-at", "0.97"], "leave nothing of the run"),
        (["--fim-rate", "-1"], "--fim-rate -1 is a fraction"),
        (["--balance", "-1"], "--balance -1 must be 0 or more"),
        (["--bias-speed", "-1"], "--bias-speed -1 must be 0 or more"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0 must be at least 1"),
        (["--optimizer", "sgd"], "--optimizer"),
        (["--qat", "int4"], "--qat"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--steps", "5", "--minutes", "1"], "exclude each other"),
        (["--minutes", "0"], "--minutes 0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--lr", "0"], "--lr 0 must be"),
        (["--seq-len", "2"], "--seq-len 2 must be from 3"),
        (["--seq-len", "100000", "--batch-tokens", "100000"], "from 3 to 65536"),
        (["--batch-tokens", "16"], "at least one row"),
        (["--seed", "-1"], "--seed -1"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--tokenizer", "absent.json"], "no tokenizer at absent.json"),
        (["--tokenizer", "LARGE"], "has 600 tokens, preset tiny has room for 512"),
        (["--sped", "1"], "--sped"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(longreach_command, corpus, tmp_path, arguments, expected):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a b")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "notext.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    if "LARGE" in arguments:
        Tokenizer.train(["some text"], vocab_size=600).save(tmp_path / "large.json")
    names = {
        "LATIN": "latin.txt", "SHORT": "short.txt", "LARGE": "large.json", "EMPTY": "empty.txt", "NOTEXT": "notext.jsonl"
    }  # fmt: skip
    given = [str(tmp_path / names[a]) if a in names else a for a in arguments]
    defaults = {"--data": str(corpus), "--batch-tokens": "128", "--seq-len": "32"}
    for name, value in defaults.items():
        if name not in given:
            given += [name, value]
    result = longreach_command("pretrain", "--out", tmp_path / "run", *given)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert not (tmp_path / "run").exists()


def test_data_is_asked_for(longreach_command, tmp_path):
    result = longreach_command("pretrain", "--out", tmp_path / "run")
    assert result.code == 2
    assert (
        result.err == "longreach: --data is missing; give a text file, a folder, a .jsonl or .parquet file, or stdlib\n"
    )


def test_no_run_and_no_other_folder_is_overwritten(longreach_command, corpus, tmp_path):
    run, folder, file = tmp_path / "run", tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    file.write_text("precious")
    longreach_command("pretrain", "--data", corpus, "--out", run, "--steps", 1, *SMALL)
    before = {name: (run / name).read_bytes() for name in tree(run)}
    for path, expected in ((run, "add --resume"), (folder, "not empty and not a run"), (file, "is a file")):
        result = longreach_command("pretrain", "--data", corpus, "--out", path, "--steps", 1, *SMALL)
        assert result.code == 2
        assert expected in result.err
    assert {name: (run / name).read_bytes() for name in tree(run)} == before
    assert tree(folder) == {"thesis.txt"}


def test_a_resumed_run_keeps_its_recipe_and_its_data(longreach_command, corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in corpus.iterdir():
        (data / file.name).write_text(file.read_text())
    run = tmp_path / "run"
    longreach_command("pretrain", "--data", data, "--out", run, "--steps", 1, *SMALL)
    result = longreach_command("pretrain", "--out", run, "--resume", "--steps", 2, "--lr", 0.5)
    assert result.code == 2
    assert re.search(r"--lr 0.5 differs from this run's 0.0\d+; leave it out", result.err)
    (data / "file00.py").write_text("print('changed')\n" * 50)
    result = longreach_command("pretrain", "--out", run, "--resume", "--steps", 2)
    assert result.code == 2
    assert "has changed since" in result.err


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_state_file_is_named(longreach_command, corpus, tmp_path, damage):
    run = tmp_path / "run"
    longreach_command("pretrain", "--data", corpus, "--out", run, "--steps", 1, *SMALL)
    state = run / "state" / "step-00000001.pt"
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-1000])
    else:
        state.unlink()
    result = longreach_command("pretrain", "--out", run, "--resume", "--steps", 2)
    assert result.code == 2
    assert ("step-00000001.pt cannot be read" if damage == "cut" else "holds no checkpoint") in result.err
    assert result.err.count("\n") == 1


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_what_to_change(
    longreach_command, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "mean_loss", lambda hidden, *_, **__: hidden.sum() * math.nan)
    result = longreach_command("pretrain", "--data", corpus, "--out", tmp_path / "run", "--steps", 3, *SMALL)
    assert result.code == 2
    assert "the loss became nan at step 1; start again with a --lr below" in result.err
    assert not (tmp_path / "run" / "model").exists()


def test_without_matplotlib_a_line_says_how_to_get_the_picture(longreach_command, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = tmp_path / "run"
    result = longreach_command("pretrain", "--data", corpus, "--out", run, "--steps", 1, *SMALL)
    assert result.code == 0
    assert "no loss.png: matplotlib is not installed (pip install 'longreach[plot]')" in result.err
    assert not (run / "loss.png").exists()
