"""`longreach experiment`: what is measured once is kept, and conclusions follow from intervals."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from longreach.errors import RequestError
from longreach.journey.experiment import BudgetSpent, Ledger, above, at_least, at_most, interval, table
from longreach.journey.experiments import indexer, lookup, muon
from longreach.journey.experiments.indexer import IndexerOptions, at_all_queries, at_questions
from longreach.journey.experiments.lookup import LookupOptions, Task
from longreach.journey.experiments.muon import SHARES, crossing, tuned
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer

TASK = ("--window", 8, "--facts", 2, "--keys", 8, "--topk", 4, "--lesson-steps", 2, "--polish-steps", 1,
        "--warmup-steps", 1, "--batch-tokens", 128, "--contexts", 4, "--threads", 1)  # fmt: skip

TWO_LAYERS = ModelConfig.preset("tiny").replace(
    num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=1, num_nextn_predict_layers=0, hc_sinkhorn_iters=2
)


@pytest.fixture
def shrunk(corpus):
    """Every study's options for a run of seconds."""
    return {
        "lookup": (*TASK, "--sparse-steps", 1),
        "indexer": (*TASK, "--text-steps", 1, "--text-warmup", 1, "--text-row", 64, "--text-topk", 4,
                    "--text-data", corpus),
        "muon": ("--data", corpus, "--steps", 8, "--batch-tokens", 16, "--row", 16, "--threads", 1),
    }  # fmt: skip


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "indexer", "muon"])
def test_a_study_prints_its_table_and_measures_nothing_twice(name, shrunk, tmp_path, longreach_command, monkeypatch):
    monkeypatch.setattr(muon, "config_of", lambda options: TWO_LAYERS)
    monkeypatch.setattr(indexer, "text_config_of", lambda options: TWO_LAYERS)
    out = tmp_path / "results"
    command = ("experiment", name, *shrunk[name], "--seeds", 1, "--out", out)
    first = longreach_command(*command)
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    assert lines[-1].startswith(f"results: {out / 'results.jsonl'}")
    assert "; next: longreach " in lines[-1]
    records = (out / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["study"] for line in records} == {name}

    again = longreach_command(*command)
    assert again.out == first.out
    assert "measured   0 new" in again.err
    assert (out / "results.jsonl").read_text().splitlines() == records

    told = json.loads(longreach_command(*command, "--json").out.splitlines()[-1])
    assert told["experiment"] == name and told["finished"] is True
    wanted = {
        "lookup": ["lookup_8x", "lookup_64x", "frozen_8x", "frozen_64x"],
        "indexer": ["trained_recall", "frozen_recall", "chance"],
        "muon": ["muon_step_ratio"],
    }[name]
    assert all(0 <= told["figures"][figure] <= 1 for figure in wanted)


def test_more_seeds_add_to_what_is_there_and_a_spent_budget_goes_on_later(shrunk, tmp_path, longreach_command):
    command = ("experiment", "lookup", *shrunk["lookup"], "--out", tmp_path / "r")
    stopped = longreach_command(*command, "--seeds", 3, "--budget", 1e-6)
    assert stopped.code == 0
    assert stopped.out.startswith("not finished: ") and "keeps 1 measurements" in stopped.out
    assert (
        "next" not in stopped.out
        and "budget" not in stopped.out
        and "--facts 2 --topk 4 --lesson-steps 2" in stopped.out
    )
    assert "measured   1 new, 1 were on file" in longreach_command(*command, "--seeds", 2).err
    assert "measured   1 new, 2 were on file" in longreach_command(*command, "--seeds", 3).err
    assert "measured   3 new, 0 were on file" in longreach_command(*command, "--topk", 3).err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["experiment", "nothing"], "unknown command"),
        (["experiment", "lookup", "--seeds", "0"], "--seeds 0: give 1 or more"),
        (["experiment", "lookup", "--budget", "0"], "--budget 0: give minutes above 0"),
        (["experiment", "lookup", "--warmup-steps", "-1"], "--warmup-steps -1 must not be negative"),
        (["experiment", "lookup", "--facts", "40"], "--facts 40: 8 windows of 16 tokens"),
        (["experiment", "lookup", "--topk", "99"], "--topk 99 leaves nothing to choose"),
        (["experiment", "indexer", "--text-row", "2"], "--text-row 2"),
        (["experiment", "muon", "--preset", "pro"], "--preset 'pro' is none of tiny, small, bench"),
        (["experiment", "muon", "--steps", "3"], "--steps 3: give 8 or more"),
        (["experiment", "muon", "--preset", "tiny", "--data", "/nowhere"], "--data /nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, line, tmp_path, longreach_command):
    out = [] if arguments[1] == "nothing" else ["--out", tmp_path / "r"]
    result = longreach_command(*arguments, *out)
    assert result.code == 2
    assert line in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_a_folder_of_results_must_not_be_a_file(tmp_path, longreach_command):
    (tmp_path / "taken").write_text("")
    result = longreach_command("experiment", "lookup", "--out", tmp_path / "taken")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is a file; give a folder" in result.err


# ---- kept results ---------------------------------------------------------------------------------------------------


def test_a_measurement_is_known_by_study_settings_and_seed(tmp_path):
    calls = []

    def measured(study, settings, seed):
        return Ledger(tmp_path / "r.jsonl", study).measured(
            settings, seed, lambda: calls.append(1) or {"n": len(calls)}
        )

    first = measured("a", {"x": 1, "y": [2, 3]}, 0)
    assert measured("a", {"y": [2, 3], "x": 1}, 0) == first == {"n": 1}
    assert [measured(*key)["n"] for key in (("a", {"x": 1}, 0), ("b", {"x": 1}, 0), ("a", {"x": 1}, 1))] == [2, 3, 4]


def test_a_line_cut_short_costs_its_own_measurement_only(tmp_path):
    path = tmp_path / "r.jsonl"
    ledger = Ledger(path, "a")
    for seed in range(2):
        ledger.measured({}, seed, lambda seed=seed: {"seed": seed})
    path.write_bytes(path.read_bytes()[:-9])
    ledger = Ledger(path, "a")
    assert ledger.measured({}, 0, lambda: pytest.fail("measured again")) == {"seed": 0}
    assert ledger.measured({}, 1, lambda: {"seed": 7}) == {"seed": 7}
    assert Ledger(path, "a").measured({}, 1, lambda: pytest.fail("measured again")) == {"seed": 7}


def test_a_budget_stops_new_measurements_but_not_known_ones(tmp_path):
    ledger = Ledger(tmp_path / "r.jsonl", "a", budget_s=0.01)
    ledger.measured({}, 0, lambda: time.sleep(0.02) or {})
    assert ledger.measured({}, 0, lambda: pytest.fail("measured again")) == {}
    with pytest.raises(BudgetSpent):
        ledger.measured({}, 1, lambda: {})


def test_results_that_cannot_be_written_are_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        Ledger(tmp_path / "file" / "r.jsonl", "a").measured({}, 0, lambda: {})


# ---- intervals and conclusions --------------------------------------------------------------------------------------


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt(3)
    assert (found.mean, found.high - found.mean) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert interval([0.5]).low == -math.inf
    narrow = interval([0.0, 1.0] * 8)
    assert narrow.high - narrow.mean == pytest.approx(2.131 * math.sqrt(4 / 15 / 16), rel=0.02)


def test_a_conclusion_follows_from_the_whole_interval():
    sure, unsure, alone = interval([0.96, 0.97, 0.98]), interval([0.90, 0.97, 0.99]), interval([0.97])
    assert at_least("accuracy", sure, 0.94).endswith("asked for at least 0.94: reached")
    assert at_least("accuracy", sure, 0.999).endswith("missed by 0.029")
    assert at_least("accuracy", unsure, 0.95).endswith("undecided over 3 seeds, the mean is inside by 0.003")
    assert at_least("accuracy", alone, 0.99).endswith("undecided over 1 seed, the mean is outside by 0.020")
    assert at_most("ratio", sure, 1.0).endswith("reached")
    assert at_most("ratio", sure, 0.75).endswith("missed by 0.220")


def test_two_figures_are_compared_seed_by_seed():
    assert above("a over b", [0.5, 0.9, 0.7], [0.4, 0.8, 0.6]).startswith("a over b: higher, by 0.100")
    assert above("a over b", [0.4, 0.8, 0.6], [0.5, 0.9, 0.7]).startswith("a over b: lower")
    assert above("a over b", [0.4, 0.8], [0.5, 0.7]).startswith("a over b: no difference shown over 2 seeds")


def test_a_table_lines_up():
    assert table([["name", "x"], ["a", "10"]]) == "name   x\na     10"


# ---- the studies ----------------------------------------------------------------------------------------------------


def test_a_fact_asked_far_away_is_stated_once_beyond_the_window():
    options = LookupOptions(window=8, facts=4, keys=16)
    task = Task(options, 0)
    tokens, asked = task.far(32, 64)
    assert asked.sum(dim=1).tolist() == [4] * 32
    for row, (ids, places) in enumerate(zip(tokens.tolist(), asked.tolist(), strict=True)):
        for at in (t for t, is_asked in enumerate(places) if is_asked):
            stated = [t for t in range(at) if ids[t] == ids[at]]
            assert len(stated) == 1, row
            assert at - stated[0] > options.window
            assert ids[stated[0] + 1] == ids[at + 1] >= task.first_value


@pytest.mark.parametrize(("slot", "anywhere"), [(4, False), (4, True), (8, True)])
def test_a_stream_asks_what_was_stated_before_but_not_inside_the_window(slot, anywhere):
    options = LookupOptions(window=8, keys=16)
    tokens, asked = Task(options, 0).stream(16, 64, 4, 16, slot, anywhere)
    keys = range(lookup.FIRST_FILLER + lookup.FILLERS, lookup.FIRST_FILLER + lookup.FILLERS + 16)
    for ids, places in zip(tokens.tolist(), asked.tolist(), strict=True):
        for at in range(64):
            before = [t for t in range(at) if ids[t] == ids[at]]
            should = ids[at] in keys and bool(before) and at - before[-1] > options.window
            assert places[at] == should
            assert not before or ids[at] not in keys or ids[before[0] + 1] == ids[at + 1]


def test_recall_at_questions_counts_one_query_per_context():
    options = IndexerOptions(window=8, facts=2, keys=8, topk=4, contexts=6)
    model = Transformer(lookup.config_of(options))
    recall = at_questions(model, options, 8)
    assert int(recall.queries) == 6
    # 61 tokens are 15 entries, of which 4 are chosen
    assert recall.mean_chance.item() == pytest.approx(4 / 15)
    everything = at_all_queries(model, options, 8)
    assert int(everything.queries) == lookup.ROWS_AT_ONCE * (64 - 4 * 5 + 1)


def test_the_frozen_twin_keeps_its_indexer_and_the_trained_one_its_model():
    options = LookupOptions(window=8, facts=2, keys=8, topk=4, warmup_steps=2, sparse_steps=2, batch_tokens=128)
    task = Task(options, 0)
    for change, kept in (
        (lambda m: lookup.warm_up(m, options, task), lambda name: ".indexer." not in name),
        (lambda m: lookup.learn_sparse(m, options, task, False), lambda name: ".indexer." in name),
    ):
        model, start = (Transformer(lookup.config_of(options)) for _ in range(2))
        change(model)
        pairs = zip(model.named_parameters(), start.parameters(), strict=True)
        same = {name: torch.equal(now, was) for (name, now), was in pairs}
        assert all(is_same for name, is_same in same.items() if kept(name))
        assert not all(same.values())


@pytest.mark.parametrize(
    ("goal", "share", "bracketed"), [(2.6, 0.4, True), (2.25, 0.75, True), (3.5, 0.25, False), (1.0, 1.0, False)]
)
def test_the_crossing_lies_on_the_line_between_two_lengths(goal, share, bracketed):
    asked = []

    def loss_at(x: float) -> float:
        asked.append(x)
        return 3.0 - x

    assert crossing(loss_at, goal) == (pytest.approx(share), bracketed)
    assert set(asked) <= set(SHARES)


def test_a_rate_is_tuned_when_its_half_and_its_double_are_worse():
    assert tuned(lambda rate: abs(math.log2(rate / 0.04)), 0.005) == pytest.approx(0.04)
    assert tuned(lambda rate: rate, 0.01) <= 2e-4  # as far as the search goes
