"""SFT: batches of whole examples, the loss, runs from nothing and from a run, exact resume, export, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import MODES
from longreach.checkpoint import convert
from longreach.checkpoint.load import load_model
from longreach.data.examples import Example, ExampleFeed, Fitting, lay_out, make_example
from longreach.errors import RequestError
from longreach.model import presets
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.rundir import RunDirectory
from longreach.tasks import registry
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, final_message, wrong
from longreach.tokenizer.bpe import Tokenizer
from longreach.train import sft, state, tuning
from longreach.train.balance import is_hashed
from longreach.train.demonstrations import Demonstrations
from longreach.train.losses import balance_loss
from longreach.train.material import parse_modes
from longreach.train.metrics import TrainingProgress
from longreach.train.sft import SFT, SFTOptions, covered_tokens, learned_loss, learned_targets, main

# ---- a small model, task and conversations --------------------------------------------------------------------------

MICRO = ModelConfig.preset("micro").replace(
    hidden_size=32, num_hidden_layers=3, compress_ratios=(4, 32, 0), num_attention_heads=2, head_dim=24, q_lora_rank=16,
    o_groups=1, o_lora_rank=16, index_n_heads=32, index_head_dim=16, n_routed_experts=4, moe_intermediate_size=24,
)  # fmt: skip


class Doubling(GeneratedTask):
    """Twice a number below 100, with the digits added one by one in the reasoning."""

    kind, domain, summary, all_levels = "doubling", "mathematics", "twice a number", (1,)

    def make(self, rng: random.Random, level: int) -> Problem:
        number = rng.randint(0, 99)
        return Problem("doubling", Conversation((Message("user", f"2*{number}="),)), 2 * number)

    def verify(self, problem, reply):
        message = final_message(reply)
        return RIGHT if message and message.content == str(problem.answer) else wrong(f"it is {problem.answer}")

    def demonstrate(self, problem, mode, rng):
        number = problem.answer // 2
        reasoning = None if mode == "non-think" else f"{number}+{number}"
        if mode == "think-max":
            reasoning = f"{reasoning} check {problem.answer}-{number}={number}"
        return (Message("assistant", str(problem.answer), reasoning),)


class Unknowable(Doubling):
    kind = "unknowable"
    demonstrate = GeneratedTask.demonstrate


@pytest.fixture(autouse=True)
def _small_things(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_things(monkeypatch)


def use_small_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TASKS, "doubling", f"{__name__}:Doubling")
    monkeypatch.setitem(registry.TASKS, "unknowable", f"{__name__}:Unknowable")
    monkeypatch.setattr(presets, "micro", lambda: MICRO)


def write_chats(path: Path, count: int = 40) -> Path:
    records = []
    for n in range(count):
        records.append({"messages": [
            {"role": "user", "content": f"{n}+{n}?"},
            {"role": "assistant", "content": str(2 * n), **({"reasoning_content": f"2*{n}"} if n % 2 else {})},
        ]})  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def options(folder: Path, **given: Any) -> SFTOptions:
    base: dict[str, Any] = dict(
        out=folder,
        preset="micro",
        vocab=420,
        batch_tokens=120,
        threads=1,
        device="cpu",
        checkpoint_every=3,
        eval_every=4,
    )
    return SFTOptions(**(base | given))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "model", dtype=torch.float32).state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    assert not [name for name, weight in ours.items() if not torch.equal(weight, theirs[name])]


def random_examples(lengths: list[int], vocabulary: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        learned = rng.random(length) < 0.4
        learned[:2], learned[-1] = False, True
        found.append(Example(rng.integers(3, vocabulary, length).astype(np.int32), learned))
    return found


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_is_whole_examples_in_slots_with_padding_marked():
    texts = {"a": 9, "b": 6, "c": 4, "d": 5, "e": 3}
    examples = [make_example([ord(name)] * size, [False] + [True] * (size - 1)) for name, size in texts.items()]
    tokens, slots, real, learned = lay_out(examples, grid=4, widths=(1,))
    rows = ["".join(chr(token) if token else "." for token in row) for row in tokens.tolist()]
    assert rows == ["aaaaaaaaa...", "bbbbbb..cccc", "ddddd...eee."]
    assert slots.tolist() == [[0] * 12, [0] * 8 + [1] * 4, [0] * 8 + [1] * 4], "padding belongs to the slot before it"
    assert real.tolist() == [[letter != "." for letter in row] for row in rows]
    assert ["".join("x" if flag else "-" for flag in row) for row in learned.tolist()] == [
        "-xxxxxxxx---", "-xxxxx---xxx", "-xxxx----xx-",
    ]  # fmt: skip
    assert lay_out(examples, grid=4, widths=(1,)).longest_slot == 9


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_the_batch_once_and_whole(seed):
    rng = random.Random(seed)
    examples = random_examples([rng.randint(3, rng.choice([12, 60])) for _ in range(rng.randint(1, 40))], 500, seed)
    batch = lay_out(examples)
    found = []
    for row in range(len(batch.tokens)):
        for slot in batch.slots[row].unique().tolist():
            here = (batch.slots[row] == slot) & batch.real[row]
            found.append((batch.tokens[row][here].tolist(), batch.learned[row][here].tolist()))
            columns = here.nonzero().flatten().tolist()
            assert columns == list(range(columns[0], columns[-1] + 1)) and columns[0] % 8 == 0
    assert sorted(found) == sorted((e.tokens.tolist(), e.learned.tolist()) for e in examples)
    assert not batch.learned[~batch.real].any() and not batch.tokens[~batch.real].any()
    assert batch.longest_slot == max(len(e.tokens) for e in examples)


def test_rows_are_as_wide_as_is_cheapest():
    few = lay_out(random_examples([16, *[10] * 3], 500), grid=2)
    assert few.tokens.shape == (4, 16), "a few more positions cost less than more runs of attention"
    many = lay_out(random_examples([16, *[10] * 300], 500), grid=2)
    assert many.tokens.shape[1] > 16 and many.real.float().mean() > 0.9


class Numbers:
    """Examples that tell where they are from; those whose number is in `left_out` are left out."""

    def __init__(self, first: int, lengths: list[int], size: int | None = None, left_out: tuple[int, ...] = ()) -> None:
        self.name, self.identity, self.size = f"numbers {first}", f"numbers {first}", size
        self.first, self.lengths, self.left_out = first, lengths, left_out
        self.asked: Counter[int] = Counter()

    def example(self, index: int) -> Example | None:
        self.asked[index] += 1
        if index in self.left_out:
            return None
        return make_example([self.first + index] * self.lengths[index % len(self.lengths)], [True])


def numbers_in(examples: list[Example]) -> list[int]:
    return [int(example.tokens[0]) for example in examples]


def test_a_feed_hands_out_every_example_once_in_order_whatever_fits():
    source = Numbers(0, [5, 9, 3, 20, 8])
    feed = ExampleFeed([source], [1.0], batch_tokens=17)
    batches = [feed.take() for _ in range(40)]
    assert [n for batch in batches for n in numbers_in(batch)] == list(range(sum(map(len, batches))))
    assert numbers_in(batches[0]) == [0, 1, 2] and numbers_in(batches[1]) == [3], "one longer than a batch is one"
    assert all(sum(len(e.tokens) for e in batch) <= 17 or len(batch) == 1 for batch in batches)
    assert set(source.asked.values()) == {1}, "what did not fit is not made again"


def test_a_feed_goes_on_from_any_position_as_if_it_had_never_stopped():
    def make() -> ExampleFeed:
        sources = [Numbers(0, [5, 9, 3, 20, 8], left_out=(2, 11)), Numbers(1000, [4, 30], size=7)]
        return ExampleFeed(sources, [1.0, 2.0], batch_tokens=40)

    whole = make()
    expected = [numbers_in(whole.take()) for _ in range(12)]
    for cut in range(12):
        feed = make()
        for _ in range(cut):
            feed.take()
        position = json.loads(json.dumps(feed.state_dict()))
        again = make()
        again.load_state_dict(position)
        assert [numbers_in(again.take()) for _ in range(12 - cut)] == expected[cut:]
        assert again.left_out == whole.left_out
    assert whole.left_out == 2
    other = ExampleFeed([Numbers(5, [3]), Numbers(1000, [4])], [1.0, 2.0], batch_tokens=40)
    with pytest.raises(RequestError, match="numbers 5 has changed since this run began"):
        other.load_state_dict(whole.state_dict())


def test_a_mixture_keeps_its_proportions_in_tokens():
    feed = ExampleFeed([Numbers(0, [5, 7]), Numbers(10_000, [40, 60])], [3.0, 1.0], batch_tokens=200)
    for _ in range(50):
        feed.take()
    assert feed.drawn[0] / feed.drawn[1] == pytest.approx(3, rel=0.05)


def test_passes_end_when_every_file_has_been_gone_through_and_weighted_ones_repeat_meanwhile():
    def seen(**more: Any) -> Counter[int]:
        feed = ExampleFeed([Numbers(0, [5], 6), Numbers(1000, [5], 2)], [1.0, 1.0], batch_tokens=12, passes=2, **more)
        steps = feed.count_steps()
        batches = [feed.take() for _ in range(steps)]
        assert all(batches) and not feed.take() and feed.is_over
        return Counter(n for batch in batches for n in numbers_in(batch))

    assert seen(repeats=False) == Counter([*range(12), *range(1000, 1004)])
    repeated = seen(repeats=True)
    assert [repeated[n] for n in range(12)] == [1] * 12 and sum(repeated[n] for n in range(1000, 1012)) > 4


def test_a_source_whose_examples_are_all_too_long_says_so():
    feed = ExampleFeed([Numbers(0, [5], left_out=tuple(range(5000)))], [1.0], batch_tokens=12)
    with pytest.raises(RequestError, match="numbers 0 in a row are too long; raise --longest"):
        feed.take()
    with pytest.raises(RequestError, match="numbers 5000 in a row are too long"):
        ExampleFeed(
            [Numbers(0, [5]), Numbers(5000, [5], left_out=tuple(range(5000)))], [1.0, 1.0], batch_tokens=12
        ).check()


# ---- the loss -------------------------------------------------------------------------------------------------------


def small_model(**changes: Any) -> Transformer:
    config = ModelConfig.preset("tiny").replace(vocab_size=97, hidden_size=32, moe_intermediate_size=16, **changes)
    return Transformer(config, seed=3)


def run_of(model: Transformer, step: int = 0, sparse_at: float = 0.0) -> SFT:
    about: Any = SimpleNamespace(model=model, master=model, settings={"sparse_at": sparse_at}, extra={}, step=step)
    return SFT(about, None, [], steps=10)  # pyright: ignore[reportArgumentType]


def test_the_objective_is_that_of_a_plain_reference_on_full_logits():
    model, examples = small_model(), random_examples([9, 30, 17, 12, 41], 97)
    objective, record, features = run_of(model).objective(lay_out(examples))
    nats, count, mtp_nats, mtp_count = torch.zeros(()), 0, torch.zeros(()), 0
    for example in examples:  # each by itself, position by position
        tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
        alone = model.features(tokens, attention="dense", keep=("mtp",))
        logits, mtp_logits = model.head(alone.hidden)[0], model.head(alone.mtp)[0]
        for place in range(tokens.shape[1]):
            if example.learned[place]:
                nats = nats - F.log_softmax(logits[place - 1], -1)[tokens[0, place]]
                count += 1
                mtp_nats = mtp_nats - F.log_softmax(mtp_logits[place - 2], -1)[tokens[0, place]]
                mtp_count += 1
    assert record["loss"] == pytest.approx(float(nats.detach() / count), rel=1e-5)
    assert record["mtp_loss"] == pytest.approx(float(mtp_nats.detach() / mtp_count), rel=1e-5)
    real = lay_out(examples).real
    balanced = [
        balance_loss(scores, features.routing[layer], real)
        for layer, scores in features.router_scores.items() if not is_hashed(model, layer)
    ]  # fmt: skip
    balance = float(torch.stack(balanced).sum().detach())
    assert balance > 0 and record["learned_tokens"] == count == sum(int(e.learned.sum()) for e in examples)
    assert objective.item() == pytest.approx(
        float((nats / count + 0.1 * mtp_nats / mtp_count).detach()) + 1e-4 * balance, rel=1e-5
    )


def test_the_gradient_is_that_of_the_plain_reference_too():
    model, examples = (
        small_model(num_nextn_predict_layers=0, compress_ratios=(0, 0, 4, 32, 4, 32)),
        random_examples([9, 30, 17], 97),
    )
    batch = lay_out(examples)
    total, count = learned_loss(model.features(batch.tokens, documents=batch.slots, attention="dense").hidden,
                                model.head.weight, batch)  # fmt: skip
    (total / count).backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = torch.zeros(())
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
        hidden = model.features(tokens, attention="dense").hidden
        targets = torch.where(torch.from_numpy(example.learned), tokens[0], -100)
        plain = plain + F.cross_entropy(model.head(hidden)[0, :-1], targets[1:], reduction="sum")
    (plain / count).backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(mine[name], p.grad, atol=1e-5 * largest, rtol=1e-4, msg=name)
    assert len(mine) > 50


def test_no_token_is_predicted_from_another_example_or_from_before_its_own():
    examples = [make_example([7, 8, 9], [False, True, True]), make_example([5, 6], [False, True])]
    batch = lay_out(examples, grid=1, widths=(2,))
    assert batch.tokens.tolist() == [[7, 8, 9, 5, 6, 0]]
    assert learned_targets(batch).tolist() == [[True, True, False, True, False]]
    assert learned_targets(batch, ahead=2).tolist() == [[True, False, False, False]], (
        "8 and 6 stand too early in theirs"
    )


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_examples_learn_the_same_packed_and_alone(attention):
    model, examples = small_model(index_topk=4), random_examples([70, 30, 17, 64, 12, 41, 5], 97)

    def nats(batch):
        hidden = model.features(batch.tokens, documents=batch.slots, attention=attention).hidden
        return float(learned_loss(hidden, model.head.weight, batch)[0].detach())

    alone = sum(nats(lay_out([example], grid=1)) for example in examples)
    assert nats(lay_out(examples)) == pytest.approx(alone, rel=1e-5)
    changed = [Example(examples[0].tokens[::-1].copy(), np.zeros(70, dtype=bool)), *examples[1:]]
    without = alone - nats(lay_out(examples[:1], grid=1))
    assert nats(lay_out(changed)) == pytest.approx(without, rel=1e-5), "no example sees another"


def test_indexers_are_asked_only_where_there_is_something_to_choose():
    model = small_model(index_topk=4)
    assert covered_tokens(model.config) == 19, "the fifth entry of four tokens is one too many"
    short, long = lay_out(random_examples([19, 9], 97)), lay_out(random_examples([20, 9], 97))
    run = run_of(model, step=4, sparse_at=0.5)
    assert run.attention(short) is None and run.attention(long) is False
    assert run_of(model, step=5, sparse_at=0.5).attention(long) is True
    dense = model.features(short.tokens, documents=short.slots, attention="dense").hidden
    sparse = model.features(short.tokens, documents=short.slots, attention="sparse").hidden
    torch.testing.assert_close(dense[short.real], sparse[short.real])
    objective, record, _ = run_of(model, step=5).objective(long)
    objective.backward()
    longer, losses = lay_out(random_examples([60, 9], 97)), set()
    for at, attention in ((4, "dense"), (5, "sparse")):
        hidden = model.features(longer.tokens, documents=longer.slots, attention=attention).hidden
        nats, count = learned_loss(hidden, model.head.weight, longer)
        _, record, _ = run_of(model, step=at, sparse_at=0.5).objective(longer)
        assert record["loss"] == pytest.approx(float(nats.detach()) / count, rel=1e-6), attention
        losses.add(record["loss"])
    assert len(losses) == 2
    assert record["index_loss"] > 0
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".indexer." in name)


def test_a_demonstration_is_a_function_of_its_number_and_modes_are_drawn_in_proportion():
    task = Doubling({})
    tokenizer = Tokenizer.train(["2*17= 17+17 check"] * 20, vocab_size=420)
    modes = parse_modes(["non-think,think-high@2", "think-max@1"])
    source, again = (Demonstrations(task, modes, 5, tokenizer, Fitting(400, False)) for _ in range(2))
    for index in (0, 7, 3):
        assert source.example(index).tokens.tolist() == again.example(index).tokens.tolist()
    counts = Counter(source.mode(index) for index in range(4000))
    assert counts["think-high"] == pytest.approx(2000, abs=120) and counts["think-max"] == pytest.approx(1000, abs=120)
    texts = [tokenizer.decode(example.tokens[example.learned].tolist()) for example in source.held_out(30)]
    assert any(text.startswith("</think>") is False and "</think>" in text for text in texts)
    asked = {source.prompt(index).text for index in range(200)}
    held = {tokenizer.decode(example.tokens.tolist()) for example in source.held_out(60)}
    asked_numbers, held_numbers = ({text.split("2*")[1].split("=")[0] for text in texts} for texts in (asked, held))
    assert not asked_numbers & held_numbers, "what is held out is never learned"
    assert set(source.modes) == set(MODES)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_model_from_nothing_learns_a_task(tmp_path, capsys):
    run = tmp_path / "run"
    given = options(run, task=("doubling",), modes=("non-think",), steps=60, batch_tokens=400, eval_every=30, json=True)
    assert main(given) == 0
    said = json.loads(capsys.readouterr().out)
    records = RunDirectory(run).read_metrics()
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 60 and said["steps"] == 60 and said["finished"]
    assert losses[0] > 4 and said["val_loss"] < 0.4 * losses[0]
    assert [record["step"] for record in records if "val_loss" in record] == [30, 60]
    assert 0 < said["val_accuracy"] <= 1 and said["examples"] == records[-2]["examples"] > 60
    assert Tokenizer.load(run / "model").vocab_size == 420 == load_model(run / "model").config.vocab_size
    assert (run / "loss.png").is_file()


def test_a_run_goes_on_from_another_s_model_with_its_tokenizer(tmp_path, longreach_sft):
    chats = write_chats(tmp_path / "chats.jsonl")
    base = tmp_path / "base"
    longreach_sft(options(base, data=(str(chats),), epochs=1))
    before = (base / "model" / "model.safetensors").read_bytes()
    said = longreach_sft(options(tmp_path / "next", run=base, preset=None, vocab=None, data=(str(chats),), epochs=2))
    assert "next: longreach chat" in said
    assert (tmp_path / "next" / "model" / "tokenizer.json").read_text() == (
        base / "model" / "tokenizer.json"
    ).read_text()
    assert (base / "model" / "model.safetensors").read_bytes() == before
    config = RunDirectory(tmp_path / "next").read_config()
    assert config["lr"] == pytest.approx(sft.default_lr("muon", 32, is_new=False)) and config["lr"] < sft.default_lr(
        "muon", 32, is_new=True
    )
    first, second = (RunDirectory(tmp_path / name).read_metrics() for name in ("base", "next"))
    assert second[0]["loss"] < first[0]["loss"]
    assert second[-2]["examples"] == 2 * first[-2]["examples"], "two passes and one"


@pytest.fixture
def longreach_sft(capsys):
    def run(given: SFTOptions) -> str:
        capsys.readouterr()
        assert main(given) == 0
        return capsys.readouterr().out

    return run


def test_minutes_become_steps_once(tmp_path, longreach_sft, monkeypatch):
    monkeypatch.setattr(SFT, "seconds_per_step", lambda self: 0.5)
    run = tmp_path / "run"
    longreach_sft(options(run, task=("doubling",), minutes=0.05))
    assert RunDirectory(run).read_config()["planned_steps"] in (5, 6)


def test_timing_steps_changes_nothing(tmp_path, longreach_sft, monkeypatch):
    longreach_sft(options(tmp_path / "plain", task=("doubling",), steps=3))
    planned = sft.planned_steps

    def timed(given, saved, tuning, feed):
        assert SFT(tuning, feed, [], 1000).seconds_per_step() > 0
        return planned(given, saved, tuning, feed)

    monkeypatch.setattr(sft, "planned_steps", timed)
    longreach_sft(options(tmp_path / "timed", task=("doubling",), steps=3))
    assert_same_weights(tmp_path / "plain", tmp_path / "timed")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_trains_for_stored_formats_and_in_bfloat16(precision, tmp_path, longreach_sft):
    run = tmp_path / "run"
    longreach_sft(options(run, task=("doubling",), steps=3, precision=precision, qat="fp8"))
    losses = [record["loss"] for record in RunDirectory(run).read_metrics() if "loss" in record]
    assert losses[-1] < losses[0]
    assert load_model(run / "model").config.weight_format == "fp8"


# ---- resume ---------------------------------------------------------------------------------------------------------


class PowerFailure(BaseException):
    """Ends a run where a kill -9 might."""


def mixed(folder: Path, tmp_path: Path, **given: Any) -> SFTOptions:
    chats = tmp_path / "chats.jsonl"
    if not chats.exists():
        write_chats(chats, 25)
    return options(folder, data=(f"{chats}@1",), task=("doubling@2",), steps=8, **given)


def fail_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, *, after: bool) -> None:
    """Let call `number` of a function end the run, before or after it has done its work."""
    real, calls = getattr(owner, name), 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise PowerFailure
        result = real(*arguments, **named)
        if calls == number:
            raise PowerFailure
        return result

    monkeypatch.setattr(owner, name, failing)


CRASHES = {
    "before anything is saved": (tuning.Tuning, "save", 1, False),
    "between the first state and its model": (tuning, "save_model", 1, False),
    "before the length is noted": (RunDirectory, "write_config", 2, False),
    "before the first step": (tuning.Tuning, "update", 1, False),
    "in the second step, after it was done": (tuning.Tuning, "update", 2, True),
    "after a step is noted": (tuning.Tuning, "write", 3, True),
    "while a state is put in place": (state.os, "replace", 5, False),
    "between a state and its model": (tuning, "save_model", 2, False),
    "after a checkpoint": (tuning.Tuning, "save", 2, True),
    "in the display": (TrainingProgress, "show", 5, True),
    "before the last checkpoint": (tuning.Tuning, "save", 4, False),
    "after the last step": (SFT, "validate", 2, True),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_small_things(patch)
        assert main(mixed(folder / "run", folder)) == 0
    return folder


@pytest.mark.parametrize("name", CRASHES)
def test_a_run_that_was_killed_ends_with_the_same_weights_and_record(name, uninterrupted, monkeypatch):
    folder, run = uninterrupted, uninterrupted / name.replace(" ", "-")
    owner, function, number, after = CRASHES[name]
    with monkeypatch.context() as patch:
        fail_at_call(patch, owner, function, number, after=after)
        with pytest.raises(PowerFailure):
            main(mixed(run, folder))
    assert main(SFTOptions(out=run, resume=True, device="cpu")) == 0
    assert_same_weights(run, folder / "run")
    drop = ("seconds", "tokens_per_s")
    ours, theirs = ([{key: value for key, value in record.items() if key not in drop}
                     for record in RunDirectory(path).read_metrics()] for path in (run, folder / "run"))  # fmt: skip
    assert ours == theirs


def test_a_finished_run_says_so_and_goes_on_for_more_steps(tmp_path, longreach_sft):
    run = tmp_path / "run"
    longreach_sft(mixed(run, tmp_path))
    assert longreach_sft(SFTOptions(out=run, resume=True, device="cpu")) == ""
    longreach_sft(SFTOptions(out=run, resume=True, device="cpu", steps=10))
    assert [record["step"] for record in RunDirectory(run).read_metrics() if "loss" in record] == list(range(1, 11))


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd() / "tests"))
from test_sft import MICRO, SFTOptions, main, presets
presets.micro = lambda: MICRO
out, data, resume = sys.argv[1:]
more = {} if resume == "resume" else dict(
    data=(data,), preset="micro", vocab=420, batch_tokens=120, steps=14, checkpoint_every=2, threads=1)
sys.exit(main(SFTOptions(out=Path(out), device="cpu", resume=resume == "resume", **more)))
"""


def test_kill_9_at_random_instants_loses_and_repeats_nothing(tmp_path):
    data = write_chats(tmp_path / "chats.jsonl")

    def start(run: Path, resume: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(run), str(data), resume], stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    assert start(tmp_path / "whole", "new").wait(120) == 0
    run, rng = tmp_path / "killed", random.Random(int(time.time()))
    process = start(run, "new")
    kills = 0
    for _ in range(3):
        until = time.monotonic() + 60
        known = len(RunDirectory(run).read_metrics())
        while process.poll() is None and len(RunDirectory(run).read_metrics()) <= known + rng.randint(0, 3):
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            process = start(run, "resume")
    assert process.wait(120) == 0 and kills >= 1
    assert_same_weights(run, tmp_path / "whole")
    assert [r["tokens"] for r in RunDirectory(run).read_metrics() if "loss" in r] == [
        r["tokens"] for r in RunDirectory(tmp_path / "whole").read_metrics() if "loss" in r
    ]


def test_changed_data_is_refused_on_resume(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at_call(patch, tuning.Tuning, "save", 2, after=True)
        with pytest.raises(PowerFailure):
            main(mixed(run, tmp_path))
    write_chats(tmp_path / "chats.jsonl", 24)
    with pytest.raises(
        RequestError, match=r"chats.jsonl has changed since this run began; a resumed run needs the same"
    ):
        main(SFTOptions(out=run, resume=True, device="cpu"))
    with pytest.raises(RequestError, match=r"--lr 0\.5 differs from this run's"):
        main(SFTOptions(out=run, resume=True, device="cpu", lr=0.5))


# ---- export ---------------------------------------------------------------------------------------------------------


def test_a_model_taught_tools_is_exported_to_both_layouts_and_transformers_gives_the_same_logits(
    tmp_path, longreach_sft
):
    transformers = pytest.importorskip("transformers", reason="transformers is a dev dependency")
    add = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}
    lines = []
    for n in range(12):
        call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": n, "b": n})}}
        lines.append({"tools": [add], "messages": [
            {"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": str(2 * n)}, {"role": "assistant", "content": f"It is {2 * n}."},
        ]})  # fmt: skip
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    longreach_sft(options(run, data=(str(data),), vocab=600, epochs=2, batch_tokens=1000))
    ids = torch.randint(0, 600, (2, 150), generator=torch.Generator().manual_seed(0))
    model = load_model(run / "model", dtype=torch.float32)
    with torch.no_grad():
        mine = model(ids)
        for layout in ("official", "transformers"):
            convert.main(convert.ConvertOptions(run, tmp_path / layout, to=layout))
            assert torch.equal(load_model(tmp_path / layout, dtype=torch.float32)(ids), mine), layout
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers", dtype=torch.float32)(
            ids
        ).logits
    assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "transformers")
    assert words.encode("3+3?", add_special_tokens=False) == Tokenizer.load(run / "model").encode("3+3?")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 5}, "nothing to learn from; give --data"),
        ({"task": ("doubling",)}, "tasks have no end; say how long to learn with --steps or --minutes"),
        ({"task": ("doubling",), "epochs": 2}, "--epochs counts passes through --data"),
        ({"data": ("CHATS",), "epochs": 2, "steps": 5}, "--epochs, --steps and --minutes exclude one another"),
        ({"data": ("CHATS",), "epochs": 0}, "--epochs 0 must be at least 1"),
        ({"data": ("CHATS",), "task": ("doubling@1",), "steps": 5}, "chats.jsonl has no weight; where files and tasks"),
        ({"data": ("CHATS@0",)}, "the weight after @ must be a number above 0"),
        ({"data": ("none.jsonl",)}, "none.jsonl cannot be read"),
        ({"data": ("CHATS",), "modes": ("non-think",)}, "--modes is for the demonstrations of --task"),
        ({"task": ("doubling",), "modes": ("fast",), "steps": 5}, "--modes 'fast' is unknown or named twice"),
        ({"task": ("doubling",), "modes": ("non-think,non-think",), "steps": 5}, "is unknown or named twice"),
        ({"task": ("doubling", "doubling"), "steps": 5}, "is given twice"),
        ({"task": ("dubling",), "steps": 5}, "task 'dubling' is unknown; did you mean doubling"),
        ({"task": ("unknowable",), "steps": 5}, "has no worked solutions to learn from"),
        ({"task": ("doubling",), "steps": 5, "longest": 5}, "in a row are too long; raise --longest"),
        ({"task": ("doubling",), "steps": 5, "run": Path("base")}, "RUN base and --preset micro exclude each other"),
        ({"task": ("doubling",), "steps": 5, "preset": None, "vocab": None}, "RUN is missing"),
        ({"task": ("doubling",), "steps": 5, "vocab": 100}, "a vocabulary of 100 is too small"),
        ({"task": ("doubling",), "steps": 5, "tokenizer": Path("t")}, "--vocab and --tokenizer exclude each other"),
        ({"task": ("doubling",), "steps": 5, "decay": 2.0}, "--decay 2 is a fraction; give 0 to 1"),
        ({"task": ("doubling",), "steps": 5, "batch_tokens": 0}, "--batch-tokens 0 must be at least 1"),
        ({"task": ("doubling",), "steps": 5, "lr": 1.5}, "--lr 1.5 must be from 0 to below 1"),
        ({"task": ("doubling",), "steps": 5, "bias_speed": -1.0}, "--bias-speed -1 must be 0 or more"),
        ({"task": ("doubling",), "steps": 5, "preset": "huge"}, "unknown preset 'huge'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written(given, expected, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", 5)
    if "data" in given:
        given = given | {"data": tuple(name.replace("CHATS", str(chats)) for name in given["data"])}
    with pytest.raises(ValueError, match=expected) as caught:
        main(options(tmp_path / "run", **given))
    assert isinstance(caught.value, RequestError) or "preset" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_options_of_a_new_model_are_refused_for_one_that_exists(tmp_path, longreach_sft):
    longreach_sft(options(tmp_path / "base", task=("doubling",), steps=1))
    with pytest.raises(RequestError, match="--vocab is for a new model"):
        main(options(tmp_path / "run", run=tmp_path / "base", preset=None, task=("doubling",), steps=1))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def broken(hidden, weight, batch, ahead=1):
        total, count = learned_loss(hidden, weight, batch, ahead)
        return total * float("nan"), count

    monkeypatch.setattr(sft, "learned_loss", broken)
    with pytest.raises(RequestError, match=r"the loss became nan at step 1; .* --lr below"):
        main(options(run, task=("doubling",), steps=5))
    assert (run / "model" / "model.safetensors").is_file()
