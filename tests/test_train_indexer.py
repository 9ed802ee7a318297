"""`longreach train-indexer`: it teaches, it changes nothing but indexers, it resumes exactly, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_cache import shape

from longreach.checkpoint.load import load_model
from longreach.checkpoint.reader import Checkpoint
from longreach.checkpoint.save import save_model
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.tokenizer.bpe import Tokenizer
from longreach.train import train_indexer
from longreach.train.indexer_recipe import IndexerRecipe

SMALL = shape(vocab_size=400, num_hidden_layers=3, compress_ratios=(0, 4, 24, 0), index_n_heads=8, index_topk=4,
              num_nextn_predict_layers=1)  # fmt: skip
QUICK = ("--seq-len", 64, "--batch-tokens", 128, "--threads", 1)


@pytest.fixture(autouse=True)
def _short_validation(monkeypatch):
    monkeypatch.setattr(train_indexer, "VALIDATION_TOKENS", 512)


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    return Tokenizer.train([file.read_text() for file in sorted(corpus.iterdir())], vocab_size=400)


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """A small random model, float32 in the official layout."""
    return save_model(Transformer(SMALL, seed=1), tmp_path / "checkpoint", tokenizer=tokenizer)


@pytest.fixture
def train(longreach_command, corpus, tmp_path):
    """`longreach train-indexer` on the corpus, into `tmp_path/run` unless another `--out` is given."""

    def run(*arguments, quick=QUICK):
        where = () if "--out" in arguments else ("--out", tmp_path / "run")
        data = () if "--resume" in arguments or "--data" in arguments else ("--data", corpus)
        return longreach_command(
            "train-indexer", *arguments, *where, *data, *(() if "--resume" in arguments else quick)
        )

    return run


def stored(directory: Path) -> dict[str, tuple]:
    """Every matrix as it is on disk: encoding, dtype, codes, scales."""
    directory = find_model(directory)
    with Checkpoint.open(directory) as checkpoint:
        return {
            s.unit.label: (s.encoding, s.dtype, *(None if t is None else t.clone() for t in checkpoint.read_raw(s)))
            for s in checkpoint.match(read_config(directory))
        }


def same(a: tuple, b: tuple) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().flatten().view(torch.uint8)

    return a[:2] == b[:2] and all((x is None and y is None) or torch.equal(bits(x), bits(y))
                                  for x, y in zip(a[2:], b[2:], strict=True))  # fmt: skip


def only_indexers_differ(before: Path, after: Path) -> None:
    a, b = stored(before), stored(after)
    assert a.keys() == b.keys()
    changed = {name for name in a if not same(a[name], b[name])}
    assert changed == {name for name in a if ".indexer." in name} != set()
    assert all(a[name][:2] == b[name][:2] for name in a), "every place keeps its storage format"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple]:
    return [(r["step"], r.get("index_loss"), r.get("val_index_loss"), r.get("val_index_recall"), r.get("text"))
            for r in records(run)]  # fmt: skip


# ---- it teaches -----------------------------------------------------------------------------------------------------


def test_recall_rises_well_above_chance_where_attention_is_sharp(train, tmp_path, tokenizer):
    model = Transformer(
        shape(vocab_size=400, num_hidden_layers=1, compress_ratios=(4,), num_attention_heads=2, index_n_heads=8,
              initializer_range=0.3), seed=3,
    )  # fmt: skip
    with torch.no_grad():  # attention of a model that has not learned looks almost everywhere; sharpen it
        model.layers[0].attn.compressor.norm.weight *= 3
    save_model(model, tmp_path / "sharp", tokenizer=tokenizer)
    sizes = ("--seq-len", 160, "--batch-tokens", 320, "--threads", 1)
    result = train(
        tmp_path / "sharp", "--warmup-steps", 30, "--lr", 0.05, "--optimizer", "adamw", "--json", quick=sizes
    )
    assert result.code == 0, result.err
    report = json.loads(result.out.splitlines()[-1])
    figures = report["figures"]
    assert abs(figures["recall_before"] - figures["chance"]) < 0.06
    assert figures["recall_after"] > figures["recall_before"] + 0.12
    assert figures["index_loss_after"] < 0.75 * figures["index_loss_before"]
    assert figures["tokens"] == 30 * 320 and report["finished"] is True

    # The figures are those of the model that was written.
    again = train(tmp_path / "run", "--out", tmp_path / "again", "--warmup-steps", 1, "--json", quick=sizes)
    assert json.loads(again.out)["figures"]["recall_before"] == pytest.approx(figures["recall_after"], rel=1e-6)


def test_both_stages_run_with_their_own_attention_and_learning_rate(train, checkpoint, tmp_path, monkeypatch):
    asked = []
    features = Transformer.features

    def spy(self, *arguments, **options):
        out = features(self, *arguments, **options)
        if torch.is_grad_enabled():
            assert not out.hidden.requires_grad, "the frozen model leaves a graph"
            asked.append(options["attention"])
        return out

    monkeypatch.setattr(Transformer, "features", spy)
    arguments = ("--steps", 4, "--sparse-steps", 2, "--lr", 0.01, "--sparse-lr", 0.002, "--eval-every", 3)
    result = train(checkpoint, *arguments)
    assert result.code == 0, result.err
    assert asked == ["dense", "dense", "sparse", "sparse"]
    lines = records(tmp_path / "run")
    assert [(r["step"], r["text"]) for r in lines if "event" in r] == [
        (1, "dense attention"), (3, "sparse attention"), (4, "4 steps"),
    ]  # fmt: skip
    assert [r["lr"] for r in lines if "lr" in r] == pytest.approx([0.01, 0.01, 0.002, 0.002])
    assert [r["step"] for r in lines if "val_index_recall" in r] == [0, 3, 4]
    words = result.out.split()
    assert [words.count(word) for word in ("before", "after", "chance", "KL", "recall")] == [1, 1, 1, 1, 1]
    run = tmp_path / "run"
    assert result.out.splitlines()[-2:] == [f"model: {run}/model", f'next: longreach generate {run} "def "']


def test_tokens_are_turned_into_steps():
    from longreach.train.indexer_recipe import TrainIndexerOptions, new_recipe

    def steps(**options) -> tuple[int, int]:
        recipe = new_recipe(
            TrainIndexerOptions(out=Path("x"), data=("stdlib",), seq_len=64, batch_tokens=200, **options), SMALL, "x"
        )
        return recipe.warmup_steps, recipe.sparse_steps

    assert steps(tokens=193) == (2, 0)  # a step is three rows, 192 tokens
    assert steps(tokens=1920, sparse_steps=4) == (6, 4)
    assert steps(steps=7, sparse_steps=7) == (0, 7)
    assert steps(warmup_steps=3, sparse_steps=5) == (3, 5)


def test_a_reset_begins_with_random_indexers_and_before_is_the_checkpoint_s(train, tmp_path, tokenizer):
    model = Transformer(SMALL, seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".indexer." in name:
                p.add_(3.0)
    save_model(model, tmp_path / "checkpoint", tokenizer=tokenizer)
    outcome = {}
    for name, arguments in {
        "kept": (),
        "reset": ("--reset-indexer",),
        "other": ("--reset-indexer", "--seed", 5),
    }.items():
        result = train(
            tmp_path / "checkpoint", "--out", tmp_path / name, "--steps", 1, "--lr", 1e-6, "--json", *arguments
        )
        outcome[name] = json.loads(result.out)["figures"], load_model(tmp_path / name).layers[1].attn.indexer
    assert outcome["kept"][0]["index_loss_before"] == outcome["reset"][0]["index_loss_before"]
    assert outcome["kept"][1].wq_b.weight.mean() > 2.5
    assert abs(outcome["reset"][1].wq_b.weight.mean()) < 0.1
    assert outcome["reset"][1].wq_b.weight.std().item() == pytest.approx(SMALL.initializer_range, rel=0.2)
    torch.testing.assert_close(outcome["reset"][1].compressor.norm.weight, torch.ones(16), atol=1e-4, rtol=0)
    assert not torch.allclose(outcome["reset"][1].wq_b.weight, outcome["other"][1].wq_b.weight, atol=0.1)


# ---- it changes nothing else ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_format", "layout", "written"),
    [
        ("float32", "official", "keep"),
        ("float32", "transformers", "keep"),
        ("float32", "official", "transformers"),
        ("bfloat16", "transformers", "official"),
        ("fp8", "official", "keep"),
        ("fp8-fp4", "official", "keep"),
        ("fp8-fp4", "transformers", "keep"),
        ("fp8-fp4", "official", "transformers"),
        ("fp8-fp4", "transformers", "official"),
    ],
)
def test_every_tensor_but_the_indexers_keeps_its_bits(train, tmp_path, tokenizer, weight_format, layout, written):
    quantised = weight_format.startswith("fp8")
    config = SMALL.replace(numerics="official", weight_format=weight_format) if quantised else SMALL
    dtype = torch.bfloat16 if weight_format == "bfloat16" else torch.float32
    source = save_model(Transformer(config, dtype=dtype, seed=1), tmp_path / "source", layout, tokenizer=tokenizer)
    (source / "generation_config.json").write_text('{"temperature": 1.0}')
    result = train(source, "--steps", 2, "--sparse-steps", 1, "--lr", 0.05, "--sparse-lr", 0.05, "--layout", written)
    assert result.code == 0, result.err
    out = tmp_path / "run" / "model"
    only_indexers_differ(source, out)
    if written == "keep":
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with Checkpoint.open(source) as a, Checkpoint.open(out) as b:
        expected = layout if written == "keep" else written
        quantised_spelling = expected == "transformers" and quantised
        assert b.layout == ("transformers-per-expert" if quantised_spelling else expected)
        assert (set(a.tensors.values()) == set(b.tensors.values())) == (expected == layout)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert load_model(tmp_path / "run").config == read_config(out)


def test_in_bfloat16_the_frozen_weights_on_disk_stay_float32(train, checkpoint, tmp_path):
    assert train(checkpoint, "--steps", 2, "--lr", 0.05, "--dtype", "bfloat16").code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bfloat16"
    only_indexers_differ(checkpoint, tmp_path / "run")


def test_an_indexer_in_the_mtp_block_learns_too(train, tmp_path, tokenizer):
    model = Transformer(SMALL.replace(compress_ratios=(0, 4, 24, 4)), seed=1)
    source = save_model(model, tmp_path / "source", tokenizer=tokenizer)
    assert train(source, "--steps", 2, "--lr", 0.05).code == 0
    only_indexers_differ(source, tmp_path / "run")
    assert any(name.startswith("mtp.0.attn.indexer.") for name in stored(source))


def test_quantised_scales_in_float32_and_unsigned_codes_are_kept(train, tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    config = SMALL.replace(numerics="official", weight_format="fp8-fp4")
    source = save_model(Transformer(config, seed=1), tmp_path / "source", tokenizer=tokenizer)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".attn." in name and name.endswith(".scale"):
            tensor = tensor.float()
        if name.endswith("tid2eid"):
            tensor = tensor.int()
        tensors[name] = tensor.view(torch.uint8) if tensor.dtype == torch.int8 else tensor
    save_file(tensors, source / "model.safetensors")
    expected = load_model(source)
    assert train(source, "--steps", 1, "--lr", 0.05).code == 0
    got = load_model(tmp_path / "run").state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, got[name]) == (".indexer." not in name), name
    assert float(got["layers.1.attn.indexer.wq_b.weight"].abs().max()) < 4


# ---- it resumes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", ["plain", "fp8"])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(
    train, tmp_path, tokenizer, monkeypatch, weight_format
):
    config = SMALL.replace(weight_format=weight_format)
    checkpoint = save_model(Transformer(config, seed=1), tmp_path / "checkpoint", tokenizer=tokenizer)
    arguments = ("--warmup-steps", 3, "--sparse-steps", 3, "--reset-indexer", "--checkpoint-every", 2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(checkpoint, "--out", whole, *arguments).code == 0

    rate = IndexerRecipe.rate
    asked = []

    def interrupt_in_step_3(self, step):
        asked.append(step)
        if step == 2 and asked.count(2) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(self, step)

    monkeypatch.setattr(IndexerRecipe, "rate", interrupt_in_step_3)
    stopped = train(checkpoint, "--out", broken, *arguments)
    assert stopped.code == 130
    assert stopped.out.splitlines() == [
        f"stopped and saved: {broken}/model", f"next: longreach train-indexer --out {broken} --resume",
    ]  # fmt: skip
    only_indexers_differ(checkpoint, broken)
    with (broken / "metrics.jsonl").open("a") as file:  # a step that no state has seen, as a crash leaves behind
        file.write('{"step": 4, "index_loss": 99.0}\n{"step": 5, "lo')
    # The checkpoint may move between the sittings.
    checkpoint.rename(tmp_path / "moved")
    resumed = train(tmp_path / "moved", "--out", broken, "--resume")
    assert resumed.code == 0, resumed.err
    assert asked == [0, 1, 2, 3, 4, 5], "no step was done twice"
    assert losses(broken) == losses(whole)
    assert (broken / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("left", ["no state", "state of step 4", "all steps but no model"])
def test_wherever_a_run_was_killed_it_goes_on(train, checkpoint, tmp_path, left):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(checkpoint, "--out", whole, "--steps", 5, "--sparse-steps", 2, "--checkpoint-every", 4).code == 0
    shutil.copytree(whole, killed)
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(killed / "model")
    if left != "all steps but no model":
        (killed / "state" / "step-00000005.pt").unlink()
    if left == "no state":
        shutil.rmtree(killed / "state")
    result = train("--out", killed, "--resume")
    assert result.code == 0, result.err
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    steps = [r["index_loss"] for r in records(killed) if "index_loss" in r]
    assert steps == [r["index_loss"] for r in records(whole) if "index_loss" in r]


def test_a_finished_run_says_so_and_a_resumed_one_keeps_its_recipe(train, checkpoint, corpus, tmp_path):
    run = tmp_path / "run"
    assert train(checkpoint, "--steps", 1).code == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    again = train("--resume")
    assert again.code == 0 and f"{run} is finished: 1 steps" in again.err
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    for arguments, expected in {
        ("--lr", "0.5"): "--lr 0.5 differs from this run's 0.01",
        ("--reset-indexer",): "--reset-indexer True differs",
        ("--steps", "9"): "--steps cannot be given again",
        ("--data", str(corpus / "file01.py")): "--data",
    }.items():
        result = train("--resume", *arguments)
        assert result.code == 2 and expected in result.err and result.err.count("\n") == 1
    with torch.no_grad():
        other = load_model(checkpoint)
        other.norm.weight += 1
    save_model(other, checkpoint, tokenizer=Tokenizer.load(checkpoint))
    assert "is not the checkpoint" in train("--resume").err
    (run / "metrics.jsonl").write_text("".join(lines))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


# ---- what it refuses: one line, exit code 2, nothing written --------------------------------------------------------


def make(name: str, tmp_path: Path, tokenizer: Tokenizer | None, config: ModelConfig = SMALL) -> str:
    save_model(Transformer(config, seed=1), tmp_path / name, tokenizer=tokenizer)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "CHECKPOINT is missing"),
        (["ABSENT"], "does not exist"),
        (["NO_CSA"], "has no CSA layer, so no indexer to train (its attention is hca and sliding)"),
        (["NO_TOKENIZER"], "tokenizer.json is missing; give the tokenizer.json this model was trained with"),
        (["NO_TOKENIZER", "--tokenizer", "LARGE"], "large.json has 450 tokens, the model"),
        (["GOOD", "--tokenizer", "nowhere.json"], "no tokenizer at nowhere.json"),
        (["NAN"], "the index loss of this checkpoint is nan"),
        (["CUT"], "is cut off"),
        (["GOOD", "--data", "absent"], "--data absent does not exist"),
        (["GOOD", "--data", "SHORT"], "tokens"),
        (["GOOD", "--seq-len", "16"], "--seq-len 16 is too short: 4 selected entries of 4 tokens cover 16"),
        (["GOOD", "--seq-len", "600"], "--seq-len 600 is longer than 512, the context of"),
        (["GOOD", "--batch-tokens", "32"], "--batch-tokens 32 must be at least one row, 64 tokens"),
        (["GOOD", "--steps", "2", "--tokens", "900"], "--steps and --tokens exclude each other"),
        (["GOOD", "--steps", "2", "--sparse-steps", "3"], "--sparse-steps 3 is more than the 2 steps"),
        (["GOOD", "--warmup-steps", "0"], "leaves nothing to do"),
        (["GOOD", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["GOOD", "--sparse-steps", "-1"], "--sparse-steps -1 must be at least 0"),
        (["GOOD", "--lr", "0"], "--lr 0 must be above 0"),
        (["GOOD", "--sparse-lr", "nan"], "--sparse-lr nan must be"),
        (["GOOD", "--seed", "-1"], "--seed -1"),
        (["GOOD", "--eval-every", "0"], "--eval-every 0"),
        (["GOOD", "--checkpoint-every", "0"], "--checkpoint-every 0"),
        (["GOOD", "--device", "tpu"], "unknown device 'tpu'"),
        (["GOOD", "--threads", "0"], "--threads 0"),
        (["GOOD", "--optimizer", "sgd"], "--optimizer"),
        (["GOOD", "--layout", "gguf"], "--layout"),
        (["GOOD", "--resume"], "holds no run to resume"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    longreach_command, corpus, tmp_path, tokenizer, arguments, expected
):
    config = SMALL.replace(max_position_embeddings=512)
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "short.txt").write_text("a b")
    Tokenizer.train(["some text"], vocab_size=450).save(inputs / "large.json")

    def broken(name: str) -> str:
        path = Path(make(name, inputs, tokenizer, config))
        if name == "cut":
            weights = path / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-7])
        else:
            model = load_model(path)
            with torch.no_grad():
                model.layers[0].attn.wkv.weight[0, 0] = torch.nan
            save_model(model, path, tokenizer=tokenizer)
        return str(path)

    made = {
        "GOOD": lambda: make("good", inputs, tokenizer, config),
        "NO_CSA": lambda: make("no_csa", inputs, tokenizer, config.replace(compress_ratios=(0, 24, 24, 0))),
        "NO_TOKENIZER": lambda: make("bare", inputs, None, config),
        "NAN": lambda: broken("nan"),
        "CUT": lambda: broken("cut"),
        "LARGE": lambda: str(inputs / "large.json"),
        "SHORT": lambda: str(inputs / "short.txt"),
        "ABSENT": lambda: str(inputs / "absent"),
    }
    given = [made[a]() if a in made else a for a in arguments]
    defaults = {"--data": str(corpus), "--seq-len": "64"}
    for name, value in defaults.items():
        if name not in given:
            given += [name, value]
    result = longreach_command("train-indexer", "--out", tmp_path / "run", *given)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_an_existing_output_is_left_alone(train, checkpoint, corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"command": "pretrain"}')
    assert "already holds a run" in train(checkpoint, "--out", other).err
    assert "is not a run of train-indexer" in train(checkpoint, "--out", other, "--resume").err
    assert [p.name for p in other.iterdir()] == ["config.json"]


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_what_to_change(train, checkpoint, tmp_path, monkeypatch):
    figures, calls = train_indexer.index_figures, []

    def nan_in_step_3(parts):
        calls.append(1)  # the first is the validation before
        return figures(parts) | ({"index_loss": float("nan")} if len(calls) == 4 else {})

    monkeypatch.setattr(train_indexer, "index_figures", nan_in_step_3)
    result = train(checkpoint, "--steps", 5, "--checkpoint-every", 2)
    assert result.code == 2
    assert result.err.splitlines()[-1].endswith(
        "the index loss became nan at step 3; the state of step 2 stays; start again with a --lr below 0.01"
    )
    assert not (tmp_path / "run" / "model").exists()


def test_documents_too_short_to_select_from_are_said_to_be(train, checkpoint, tmp_path):
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"text": f"x = {i}"}) + "\n" for i in range(300)))
    result = train(checkpoint, "--data", data, "--steps", 1, "--json")
    assert result.code == 0, result.err
    assert "no held-out document is long enough to leave an entry out" in result.err
    assert json.loads(result.out)["figures"]["recall_after"] is None
