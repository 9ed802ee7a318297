"""GRPO as a whole: samples laid out and replayed, gradients through the model, the command, its metrics and its end."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from serving import make_tokenizer

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import in_mode
from longreach.chat.renderer import render
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.engine.sampler import Sampler, SampleRow
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Job, Sample
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.ops.logprobs import Kept
from longreach.rundir import RunDirectory
from longreach.tasks import registry
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, final_message, wrong
from longreach.train import grpo, policy
from longreach.train.grpo import GRPOOptions, main
from longreach.train.grpo_options import DEFAULTS, make_plan
from longreach.train.modes_option import open_weighted, read_by_mode, read_modes
from longreach.train.policy import Policy, split_groups
from longreach.train.replay import kept_ids, kept_mask, lay_out, record
from longreach.train.rollout import read_samples, rollout_digest
from longreach.train.tuning import Tuning, saved_settings, settle

WHOLE = 10**6
"""Rows up to this length are read with dense attention."""


class Digits(GeneratedTask):
    """Any digit will do, but only those from 5 on are rewarded."""

    kind, domain, summary, all_levels = "digits", "mathematics", "say a large digit", (1,)

    def make(self, rng, level):
        return Problem(self.name, Conversation((Message("user", f"{rng.randrange(10_000)}"),)), 5, level)

    def verify(self, problem, reply):
        final = final_message(reply)
        said = final.content if final is not None else ""
        return RIGHT if said in tuple("56789") else wrong(f"{said!r} is no digit from 5 on")

    def demonstrate(self, problem, mode, rng):
        return (Message("assistant", str(rng.randrange(10))),)


class Never(Digits):
    """Nothing is right."""

    kind = "never"

    def verify(self, problem, reply):
        return wrong("no")


@pytest.fixture(autouse=True)
def known_tasks(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "digits", f"{__name__}:Digits")
    monkeypatch.setitem(registry.TASKS, "never", f"{__name__}:Never")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def small_config(tokenizer) -> ModelConfig:
    return ModelConfig.preset("micro").replace(
        vocab_size=tokenizer.vocab_size, hidden_size=48, num_hidden_layers=2, compress_ratios=(0, 4), q_lora_rank=32,
        o_lora_rank=32, n_routed_experts=4, moe_intermediate_size=32, num_hash_layers=1, index_topk=8,
        initializer_range=0.14,
    )  # fmt: skip


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory) -> Path:
    """A model that has learned to answer with any digit and an end mark."""
    torch.manual_seed(0)
    model = Transformer(small_config(tokenizer), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rng = random.Random(0)
    task = Digits({})
    for _ in range(60):
        rows = []
        for _ in range(24):
            problem = task.draw(rng)
            asked = in_mode(problem.conversation, "non-think")
            whole = dataclasses.replace(asked, messages=asked.messages + task.demonstrate(problem, "non-think", rng))
            rows.append(render(whole, texts="preview", for_training=True).encode(tokenizer))
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [tokenizer.eos_id] * (longest - len(row)) for row in rows])
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def options(start: Path, out: Path, **changes) -> GRPOOptions:
    given = dict(
        run=start, out=out, task=(("digits",),), modes=(("non-think",),), windows="24", problems=6, group_size=4, steps=3,
        eval_count=20, threads=1, device="cpu", memory_gib=0.05, checkpoint_every=2,
    )  # fmt: skip
    return GRPOOptions(**(given | changes))


def resumed(given: GRPOOptions, **changes) -> GRPOOptions:
    return GRPOOptions(out=given.out, resume=True, threads=1, device="cpu", memory_gib=0.05, **changes)


def records(out: Path) -> list[dict]:
    return [record for record in RunDirectory(out).read_metrics() if "reward" in record]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_model(out / "model", dtype=torch.float32).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def drawn(prompt: list[int], tokens: list[int], written: list[bool] | None = None, **changes) -> Sample:
    """A sample as a source would have made it."""
    task = Digits({})
    problem = task.draw(random.Random(0))
    written = [True] * len(tokens) if written is None else written
    given = dict(
        job=Job("k", task, problem, "non-think", 64, 0), prompt=prompt, tokens=tokens, written=written,
        logprobs=[-0.5] * len(tokens), reply=(), finish=FinishReason.STOP, verdict=RIGHT,
    )  # fmt: skip
    return Sample(**(given | changes))


def some_samples(tokenizer, count: int = 8, seed: int = 0) -> list[Sample]:
    """Random samples of different lengths; every third has tokens in the middle that the model did not write."""
    rng = random.Random(seed)
    out = []
    for number in range(count):
        prompt = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(2, 7))]
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(4, 12))]
        written = [number % 3 != 0 or place not in (2, 3) for place in range(len(tokens))]
        out.append(drawn(prompt, tokens, written))
    return out


# ---- laying out -----------------------------------------------------------------------------------------------------


def test_written_tokens_are_predicted_from_the_position_before_them_and_inserted_ones_are_not():
    samples = [drawn([7, 8], [1, 2, 3, 4], [True, False, False, True]), drawn([9], [5])]
    [rows] = lay_out(samples, [0, 1], row_tokens=100, device=torch.device("cpu"))
    assert rows.samples == [1, 0]  # shortest first
    assert rows.tokens_BT.tolist() == [[9, 0, 0, 0, 0], [7, 8, 1, 2, 3]]
    assert rows.real_BT.tolist() == [[True] + [False] * 4, [True] * 5]
    assert rows.targets_M.tolist() == [5, 1, 4]
    assert rows.rows_M.tolist() == [0, 1, 1]
    assert rows.places_M.tolist() == [0, 5 + 1, 5 + 4]


def test_batches_keep_to_their_tokens_and_leave_out_samples_in_which_nothing_was_written(tokenizer):
    samples = [*some_samples(tokenizer, 20), drawn([1, 2, 3], []), drawn(list(range(90)), [4, 5])]
    batches = lay_out(samples, range(len(samples)), row_tokens=60, device=torch.device("cpu"))
    assert sorted(place for rows in batches for place in rows.samples) == [*range(20), 21]
    for rows in batches:
        assert rows.tokens_BT.numel() <= 60 or len(rows.samples) == 1
    again = lay_out(samples, reversed(range(len(samples))), row_tokens=60, device=torch.device("cpu"))
    assert [rows.samples for rows in again] == [rows.samples for rows in batches]


def test_groups_stay_whole_and_are_shared_out_evenly():
    parts = split_groups(24, 4, 4)
    assert [len(part) for part in parts] == [8, 8, 4, 4]
    assert sorted(place for part in parts for place in part) == list(range(24))
    assert parts[0] == [0, 1, 2, 3, 16, 17, 18, 19]


# ---- replay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
     {"top_p": 0.999, "temperature": 2.0}],
)  # fmt: skip
def test_kept_ids_are_those_the_sampler_draws_from(given):
    torch.manual_seed(0)
    logits = (torch.randn(40, 50) * 2).round(decimals=1)  # many equals
    params = SamplingParams(**given)
    row = SampleRow(params, seed=0, position=0)
    wanted = Sampler([]).distribution(logits, [row] * len(logits)) > 0
    assert torch.equal(kept_mask(logits, params), wanted)
    assert not wanted.all() and wanted.any(dim=1).all()


def test_sampling_mask_replay_by_hand():
    """Two likeliest of three ids at temperature 2; the third was drawn all the same, by other rounding, and stays."""
    head = torch.tensor([[4.0], [2.0], [0.0]])
    states = torch.ones(2, 1)
    kept = kept_ids(states, head, torch.tensor([1, 2]), SamplingParams(top_k=2, temperature=2.0))
    assert kept.offsets.tolist() == [0, 2, 5] and kept.ids.tolist() == [0, 1, 0, 1, 2]
    logprobs, _ = policy.head_logprobs(states, head, torch.tensor([1, 2]), 2.0, kept)
    assert logprobs[0].item() == pytest.approx(1 - math.log(math.exp(2) + math.exp(1)), abs=1e-6)
    assert logprobs[1].item() == pytest.approx(-math.log(math.exp(2) + math.exp(1) + 1), abs=1e-6)


def test_routing_replay_sends_tokens_to_the_experts_they_were_drawn_with_and_teaches_the_gate(tokenizer):
    model = Transformer(small_config(tokenizer), seed=0)
    samples = some_samples(tokenizer, 12)
    [rows] = lay_out(samples, range(12), row_tokens=10**4, device=torch.device("cpu"))
    record(model, rows, SamplingParams(), WHOLE)
    assert rows.routing is not None and list(rows.routing) == [1]  # layer 0 goes by token id
    with torch.no_grad():  # weights that learned
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    free = model.features(rows.tokens_BT, attention="dense").routing[1]
    assert not torch.equal(free, rows.routing[1])
    features = model.features(rows.tokens_BT, routing=rows.routing, attention="dense")
    assert torch.equal(features.routing[1], rows.routing[1])
    features.hidden.square().sum().backward()
    gate = model.get_submodule("layers.1.ffn.gate")
    assert gate.weight.grad is not None and gate.weight.grad.abs().sum() > 0


def test_the_scoring_pass_finds_the_log_probabilities_that_the_engine_reported(start, tokenizer):
    model = load_model(start, dtype=torch.float32)
    with EngineSource(model, tokenizer, memory_gib=0.05) as source:
        turns = [
            source.engine.submit([1, 2, 30 + n], SamplingParams(max_tokens=6, seed=n, logprobs=0)) for n in range(5)
        ]
        pieces: dict = {id(turn): ([], []) for turn in turns}
        while source.engine.has_work:
            for piece in source.step():
                pieces[id(piece.turn)][0].extend(piece.tokens)
                pieces[id(piece.turn)][1].extend(piece.logprobs)
    samples = [drawn([1, 2, 30 + n], pieces[id(turn)][0], logprobs=pieces[id(turn)][1]) for n, turn in enumerate(turns)]
    for params in (SamplingParams(), SamplingParams(temperature=0.5, top_p=0.9)):
        [rows] = lay_out(samples, range(5), row_tokens=10**4, device=torch.device("cpu"))
        gap = record(model, rows, params, WHOLE)
        assert gap is not None and gap < 1e-4
        if params.top_p < 1:
            assert isinstance(rows.kept, Kept) and (rows.old_M != rows.sampled_M).any()


# ---- gradients ------------------------------------------------------------------------------------------------------


def make_policy(model, is_elsewhere=False, reference=None, params=None, **settings) -> Policy:
    """A policy over a model alone; `update` keeps the gradients."""
    tuning = SimpleNamespace(model=model, master=model, settings=DEFAULTS | {"lr": 1e-3} | settings, step=4, grads=[],
                             device=torch.device("cpu"), end_step=lambda: None)  # fmt: skip

    def update(routing, lr_factor, ends_step):
        tuning.grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        tuning.routing = routing
        model.zero_grad()
        return 1.0

    tuning.update = update
    return Policy(tuning, params or SamplingParams(), reference, is_elsewhere)


@pytest.mark.parametrize("mean", ["tokens", "sequences", "windows"])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradients_of_all_weights_equal_a_plain_reference_sample_by_sample(tokenizer, monkeypatch, mean, truncated):
    """Laid out in batches, replayed and chunked, against whole logits of each sample alone under autograd."""
    monkeypatch.setattr(policy, "BALANCE", 0.0)
    torch.manual_seed(0)
    model = Transformer(small_config(tokenizer), seed=0).double()
    reference = Transformer(small_config(tokenizer), seed=1).double().requires_grad_(False)
    params = SamplingParams(temperature=1.5, top_k=40) if truncated else SamplingParams()
    samples = some_samples(tokenizer, 8)
    advantages = torch.tensor([0.5, -0.5, 0.25, -0.25, 1.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    beta, low, high, delta = 0.05, 0.2, 0.28, 0.1
    old = []
    with torch.no_grad():
        for n, sample in enumerate(samples):
            values, _ = plain_logprobs(model, sample, params)
            old.append(values + 0.3 * torch.randn(len(values), dtype=torch.float64) + (0.4 if n == 1 else 0.0))

    total = torch.zeros((), dtype=torch.float64)
    counts = torch.tensor([sample.num_written for sample in samples])
    left_out = 0
    for n, sample in enumerate(samples):
        new, kept = plain_logprobs(model, sample, params)
        against, _ = plain_logprobs(reference, sample, params, kept)
        ratio, gap = (new - old[n]).exp(), against - new
        gain = torch.min(ratio * advantages[n], ratio.clamp(1 - low, 1 + high) * advantages[n])
        far = bool(advantages[n] < 0 and (old[n] - new).mean() > delta)
        left_out += far
        terms = -gain * (not far) + beta * ratio * (gap.exp() - gap - 1)
        room = 64 - len(sample.prompt)
        share = {"tokens": 1 / counts.sum(), "sequences": 1 / (8 * counts[n]), "windows": 1 / (8 * room)}[mean]
        total = total + terms.sum() * share
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    learner = make_policy(model, reference=reference, params=params, kl=beta, delta=delta, mean=mean, row_tokens=60)
    kept_record = policy.record

    def with_old(model, rows, params, covered):
        gap = kept_record(model, rows, params, covered)
        values = torch.cat([old[place] for place in rows.samples])
        rows.old_M = values
        return gap

    monkeypatch.setattr(policy, "record", with_old)
    if not truncated:
        learner.settings = learner.settings | {"updates": 2}  # so that there is a scoring pass
    monkeypatch.setattr(policy, "is_plain", lambda params: False)
    figures = learner.learn(samples, advantages, 2)
    [grads, *_] = learner.tuning.grads
    assert left_out and figures["masked_samples"] >= left_out
    assert figures["policy_loss"] == pytest.approx(total.item(), abs=1e-6)
    assert set(grads) == set(expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-7, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def plain_logprobs(model, sample: Sample, params: SamplingParams, kept: torch.Tensor | None = None):
    """Of the written tokens, from whole logits; and the ids kept at each, bool."""
    ids = torch.tensor([sample.prompt + sample.tokens])
    hidden = model.features(ids[:, :-1], attention="dense").hidden[0]
    places = [len(sample.prompt) - 1 + at for at, mine in enumerate(sample.written) if mine]
    logits = hidden[places] @ model.head.weight.t()
    targets = ids[0, 1:][places]
    if kept is None:
        kept = kept_mask(logits.detach().float(), params)
        kept[torch.arange(len(places)), targets] = True
    tempered = (logits / params.temperature).masked_fill(~kept, -torch.inf)
    return tempered.log_softmax(-1)[torch.arange(len(places)), targets], kept


def test_an_update_by_the_weights_that_drew_has_ratio_one_and_needs_no_scoring_pass(start, tokenizer):
    learner = make_policy(load_model(start, dtype=torch.float32))
    assert learner.scoring == ""
    samples = some_samples(tokenizer, 8)
    [rows] = lay_out(samples, range(8), row_tokens=4096, device=torch.device("cpu"))
    record(learner.tuning.model, rows, SamplingParams(), WHOLE)
    told = dict(zip(rows.samples, rows.old_M.split(rows.rows_M.bincount().tolist()), strict=True))
    full = []
    for n, sample in enumerate(samples):
        values = iter(told[n].tolist())
        full.append(dataclasses.replace(sample, logprobs=[next(values) if mine else 0.0 for mine in sample.written]))
    figures = learner.learn(full, torch.tensor([1.0, -1.0] * 4), 2)
    assert figures["ratio_mean"] == pytest.approx(1, abs=1e-5) and figures["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert figures["clip_share"] == 0 and figures["logprob_gap"] < 1e-4


def test_samples_without_an_advantage_are_not_computed_unless_the_kl_needs_them(tokenizer):
    model = Transformer(small_config(tokenizer), seed=0)
    samples = some_samples(tokenizer, 8)
    advantages = torch.tensor([0.5, -0.5, 0, 0, 0, 0, 0, 0])
    assert make_policy(model).learn(samples, advantages, 2)["learned_samples"] == 2
    with_kl = make_policy(model, reference=model, kl=0.1)
    figures = with_kl.learn(samples, advantages, 2)
    assert figures["learned_samples"] == 8 and "kl" in figures


def test_old_log_probabilities_of_a_server_are_the_servers(tokenizer):
    """Its weights may be older; then bad samples that the policy has left behind are not learned from."""
    model = Transformer(small_config(tokenizer), seed=0)
    samples = [
        dataclasses.replace(s, logprobs=[0.0] * len(s.tokens)) for s in some_samples(tokenizer, 8)
    ]  # it was sure
    figures = make_policy(model, is_elsewhere=True, updates=2).learn(samples, torch.tensor([1.0, -1.0] * 4), 2)
    assert figures["masked_samples"] == 8 and figures["ratio_mean"] < 0.1  # the four bad ones, in both updates
    untold = [dataclasses.replace(s, logprobs=None) for s in samples]
    figures = make_policy(model, is_elsewhere=True).learn(untold, torch.tensor([1.0, -1.0] * 4), 2)
    assert figures["masked_samples"] == 0 and figures["ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_experts_that_padding_went_to_are_no_load(tokenizer):
    model = Transformer(small_config(tokenizer), seed=0)
    learner = make_policy(model)
    samples = some_samples(tokenizer, 8)
    learner.learn(samples, torch.tensor([1.0, -1.0] * 4), 2)
    tokens = sum(len(s.prompt) + len(s.tokens) - 1 for s in samples)
    assert all(len(chosen) == tokens for chosen in learner.tuning.routing.values())


def test_long_samples_are_read_with_sparse_attention_and_teach_the_indexers(tokenizer):
    model = Transformer(small_config(tokenizer), seed=0)
    rng = random.Random(0)
    samples = [
        drawn([3] * 5, [rng.randrange(512) for _ in range(40 + 9 * n)]) for n in range(4)
    ]  # 8 x 4 tokens are whole
    learner = make_policy(model)
    assert 32 <= learner.covered < 44
    figures = learner.learn(samples, torch.tensor([1.0, -1.0, 0.5, -0.5]), 2)
    assert figures["index_loss"] > 0
    [grads] = learner.tuning.grads
    assert any(".indexer." in name and grad.abs().sum() > 0 for name, grad in grads.items())


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_run_learns_to_earn_the_reward_of_a_simple_task(start, tmp_path, capsys):
    out = tmp_path / "rl"
    given = options(start, out, steps=15, problems=8, group_size=8, lr=3e-3, eval_count=100, json=True)
    assert main(given) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    [held_out] = figures["held_out"]
    assert 0.3 < held_out["before"]["accuracy"] < 0.7
    assert held_out["after"]["accuracy"] > 0.9 and held_out["difference"]["low"] > 0.2
    assert len(records(out)) == 15 and records(out)[-1]["samples"] == 15 * 64
    assert (out / "plot.html").read_text().count("<svg") >= 6
    assert len(list(read_samples(out))) == 15 * 64


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of four steps that nothing stopped, with several updates per step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    given = options(start, out, steps=4, updates=2, minibatches=2, kl=0.01, temperature=0.9, top_p=0.95, eval_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.TASKS, "digits", f"{__name__}:Digits")
        assert main(given) == 0
    return given


def test_the_record_of_a_step_tells_what_happened(whole):
    made = records(whole.out)
    assert [one["step"] for one in made] == [1, 2, 3, 4]
    for one in made:
        assert 0 <= one["reward"] <= 1 and one["accuracy"] == one["reward"]
        assert one["updates"] in (0, 2, 4) and one["logprob_gap"] < 1e-3
        assert one["ratio_max"] > 1 and one["kl"] >= -1e-6 and one["entropy"] > 0
        assert 0 <= one["clip_share"] < 1 and 0 <= one["useless_groups"] <= 1
        assert one["rollout_tokens_per_s"] > 0 and one["update_tokens_per_s"] > 0
    evals = [one for one in RunDirectory(whole.out).read_metrics() if "eval" in one]
    assert [one["step"] for one in evals] == [0, 2, 4]


def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_weights(whole, tmp_path):
    out = tmp_path / "parts"
    first = dataclasses.replace(whole, out=out, steps=2)
    assert main(first) == 0
    assert main(resumed(first, steps=4)) == 0
    assert same(weights(out), weights(whole.out))
    assert rollout_digest(out) == rollout_digest(whole.out)
    assert [r["reward"] for r in records(out)] == [r["reward"] for r in records(whole.out)]


@pytest.mark.parametrize("place", ["roll", "learn", "save", "cover"])
def test_a_run_that_fell_over_anywhere_ends_in_the_same_weights(whole, tmp_path, monkeypatch, place):
    out = tmp_path / "broken"
    given = dataclasses.replace(whole, out=out)
    owner = {"roll": grpo.Roller, "learn": Policy, "save": Tuning, "cover": grpo.Roller}[place]
    original, calls = getattr(owner, place), [0]

    def falling(self, *arguments, **named):
        calls[0] += 1
        result = original(self, *arguments, **named) if place in ("learn", "save") or calls[0] != 3 else None
        if calls[0] == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, place, falling)
    with pytest.raises(KeyboardInterrupt):
        main(given)
    monkeypatch.setattr(owner, place, original)
    assert main(resumed(given, steps=4)) == 0
    assert same(weights(out), weights(whole.out))
    assert rollout_digest(out) == rollout_digest(whole.out)
    assert len(list(read_samples(out))) == 4 * 24


def test_length_penalties_of_a_mode_lower_the_reward_and_not_the_accuracy(start, tmp_path):
    out = tmp_path / "short"
    assert main(options(start, out, steps=1, eval_count=0, penalties="non-think=0.6", penalty_cap=0.2)) == 0
    [record] = records(out)
    taken = [min(0.2, 0.6 * sample["tokens"] / 24) for sample in read_samples(out)]
    assert record["reward"] == pytest.approx(record["accuracy"] - sum(taken) / len(taken))


def test_modes_and_tasks_have_figures_of_their_own(start, tmp_path):
    out = tmp_path / "several"
    given = options(
        start, out, steps=2, eval_count=0, task=(("digits", "never@0.5"),), modes=(("non-think", "think-high"),)
    )
    assert main(given) == 0
    for one in records(out):
        assert {"length_non-think", "length_think-high", "accuracy_digits", "accuracy_never"} <= set(one)
        assert one["accuracy_never"] == 0


def test_steps_with_nothing_to_compare_change_no_weight_and_end_the_run_with_a_reason(
    start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(grpo, "MOST_USELESS_STEPS", 3)
    out = tmp_path / "useless"
    assert main(options(start, out, task=(("never",),), steps=9, problems=2, eval_count=0)) == 0
    said = capsys.readouterr().err
    made = records(out)
    assert len(made) == 3 and all(record["useless_groups"] == 1 and record["updates"] == 0 for record in made)
    assert "nothing is right" in said and "longreach sft" in said
    assert same(weights(out), load_model(start, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(
    start, tmp_path, monkeypatch, what
):
    out = tmp_path / "nan"
    given = options(start, out, steps=5, eval_count=0)
    assert main(dataclasses.replace(given, steps=2)) == 0
    before = weights(out)
    if what == "loss":
        monkeypatch.setattr(policy, "clipped_loss", lambda new, *_, **__: new * math.nan)
    else:
        update = Tuning.update
        monkeypatch.setattr(Tuning, "update", lambda self, *a, **n: update(self, *a, **n) * math.inf)
    with pytest.raises(RequestError, match=f"the {what} became .* step 3; the last checkpoint stays"):
        main(resumed(given, steps=5))
    assert same(weights(out), before)


def test_time_ends_a_run_between_steps(start, tmp_path):
    out = tmp_path / "timed"
    assert main(options(start, out, steps=None, minutes=0.02, eval_count=0)) == 0
    assert 1 <= len(records(out)) < 60


def test_attempts_of_a_server_come_from_the_weights_it_was_given(start, tmp_path, monkeypatch):
    told = []

    class Elsewhere(EngineSource):
        """A server, as far as the loop knows."""

        def __init__(self, url, name, tokenizer, *, key, update, at_once):
            assert (url, name, key, update) == ("http://there", "student", "secret", "vllm")
            super().__init__(load_model(start, dtype=torch.float32), tokenizer, memory_gib=0.05)

        def update_weights(self, folder):
            told.append(weights(Path(folder).parent))
            for name, value in told[-1].items():
                self.engine.model.state_dict()[name].copy_(value)
            self.weights_changed()

    monkeypatch.setattr(grpo, "ServerSource", Elsewhere)
    monkeypatch.setenv("LONGREACH_ROLLOUT_KEY", "secret")
    out = tmp_path / "server"
    given = options(
        start, out, steps=3, eval_count=0, rollouts="http://there", rollout_model="student", rollout_update="vllm"
    )
    assert main(given) == 0
    assert len(told) == 4 and same(told[0], load_model(start, dtype=torch.float32).state_dict())
    assert same(told[-1], weights(out)) and not same(told[1], told[2])
    assert all(record["ratio_max"] < 1.001 and record["logprob_gap"] < 1e-3 for record in records(out))


def test_a_judge_takes_the_place_of_verifiers(start, tmp_path, monkeypatch):
    class Grader:
        def grade(self, pairs):
            return [RIGHT if final_message(reply).content == "3" else wrong("not three", 0.25) for _, reply in pairs]

    monkeypatch.setattr(grpo, "open_judge", lambda where, rubric, **_: Grader())
    out = tmp_path / "judged"
    assert main(options(start, out, steps=1, eval_count=0, judge="self")) == 0
    for sample in read_samples(out):
        if sample["finish"] == "stop":
            assert sample["right"] == (sample["reply"][-1]["content"] == "3")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "--group-size 1 must be at least 2; a group of one"),
        ({"problems": 0}, "--problems 0 must be at least 1"),
        ({"minibatches": 7}, "--minibatches 7 is more than --problems 6"),
        ({"clip_low": 1.0}, "--clip-low 1 must be below 1"),
        ({"kl": -0.1}, "--kl -0.1 must be 0 or more"),
        ({"temperature": 0.0}, "--temperature 0 makes all attempts"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"windows": "non-think=64,think-high=8"}, "'think-high': this mode is not among --modes"),
        ({"windows": "a few"}, "'a few' is no number"),
        ({"windows": "20.5"}, "a token is not divided"),
        ({"windows": "999999"}, "beyond the model's context of 16384"),
        ({"penalties": "non-think=-1"}, "must be at least 0"),
        ({"modes": (("loud",),)}, "--modes loud: there is no such mode"),
        ({"task": ()}, "there is no task"),
        ({"task": (("digits@0",),)}, "the weight after @ must be above 0"),
        ({"task": (("digit",),)}, "did you mean"),
        ({"rubric": Path("r.txt")}, "--rubric and --judge-model are for a judge"),
        ({"judge": "http://there"}, "--judge-model"),
        ({"rollouts": "http://there"}, "--rollouts needs --rollout-model"),
        ({"rollout_update": "vllm"}, "are for a server"),
        ({"run": Path("nowhere")}, "nowhere does not exist"),
        ({"lr": 2.0}, "--lr 2 must be"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_that_names_the_option(start, tmp_path, changes, message):
    with pytest.raises(RequestError) as refused:
        main(options(start, tmp_path / "refused", **changes))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_resumed_run_keeps_its_options(whole):
    with pytest.raises(RequestError, match="--group-size 9 differs from this run's 4"):
        main(resumed(whole, steps=6, group_size=9))


def test_numbers_by_mode_are_read_and_modes_come_in_their_order():
    modes = read_modes(["think-max,non-think"])
    assert modes == ("non-think", "think-max")
    assert read_by_mode("5", modes, "--x", default={}) == {"non-think": 5, "think-max": 5}
    assert read_by_mode("think-max=7", modes, "--x", default={"non-think": 1}) == {"non-think": 1, "think-max": 7}
    with pytest.raises(RequestError, match="two numbers"):
        read_by_mode("5,think-max=7", modes, "--x", default={})
    with pytest.raises(RequestError, match="name each mode once"):
        read_modes(["non-think", "non-think"])


def test_tasks_with_weights_are_opened():
    tasks, shares = open_weighted(["digits@0.25", "never"])
    assert [task.name for task in tasks] == ["digits", "never"] and shares == [0.25, 1.0]


def test_settings_of_a_new_run_are_the_defaults(start, tmp_path):
    given = GRPOOptions(run=start, out=tmp_path / "x", task=(("digits",),))
    settings = settle(given, grpo.defaults(given, {}), saved_settings(given, "grpo"))
    plan = make_plan(settings)
    assert (
        plan.modes == ("think-high",) and plan.windows == {"think-high": 256} and plan.penalties == {"think-high": 0.0}
    )
    assert settings["lr"] == 1e-3 and settings["kl"] == 0
