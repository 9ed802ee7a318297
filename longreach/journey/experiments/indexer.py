"""How much of dense attention does a trained indexer keep?  `longreach experiment indexer`

    recall = share of a query's dense attention on compressed entries that falls on the indexer's top k of them
    chance = k / visible entries, what a random choice keeps

Measured on held-out data, over queries that see more than k entries, the model and its dense attention being the same for
all: the indexer before its training (random), and after a warm-up in which nothing else learns. Two models:

- the one of `lookup.py`, at the questions, where attention has something to find, 8 and 64 windows behind the facts;
  and over all of its queries, most of them filler, whose attention nothing ever made sharp
- `tiny` after a few steps on text, over all queries: what little such a short training makes sharp
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from longreach.data.corpus import Corpus
from longreach.data.stream import MixtureStream, in_order
from longreach.errors import RequestError
from longreach.journey.experiment import (
    Curve,
    Ledger,
    Outcome,
    above,
    at_least,
    folder_of,
    interval,
    run_study,
    settings_of,
)
from longreach.journey.experiments import lookup
from longreach.journey.experiments.lookup import FAR, MEASURING_SEED, NEAR, Task, TaskOptions
from longreach.journey.experiments.muon import MuonOptions, corpus_of
from longreach.journey.experiments.muon import config_of as text_config_of
from longreach.model.transformer import Transformer
from longreach.ops.index_loss import Recall
from longreach.optim.hybrid import make_optimizers
from longreach.runtime import log, seed_everything
from longreach.train.balance import balance_experts
from longreach.train.losses import mean_loss
from longreach.train.recipe import PEAK_LR_AT_128
from longreach.train.schedule import learning_rate
from longreach.train.working import CLIP_NORM, frozen_but_indexer, unfrozen

TARGET = 0.9
ROWS_AT_ONCE = 64
MEASURE_EVERY = 25
"""Steps of the warm-up between two measurements, for the picture."""

TEXT_TOKENS = 16_384
QUESTION = "how much of dense attention does a trained indexer keep, where a random one keeps what chance gives?"


@dataclass(frozen=True)
class IndexerOptions(TaskOptions):
    """Measure what share of the dense attention on entries an indexer's choice keeps, untrained and trained.

    Results are kept per seed: the same command again goes on where the last one stopped.
    """

    text_steps: int = 150
    """Dense steps of the model of text (preset tiny, Python's library); 0 leaves it out."""
    text_warmup: int = 60
    """Steps in which its indexers alone learn."""
    text_row: int = 512
    text_topk: int = 16
    """Entries its indexers choose."""
    text_data: tuple[str, ...] = ("stdlib",)
    """Text, as for longreach pretrain."""


# ---- the model of lookups -------------------------------------------------------------------------------------------


@torch.no_grad()
def at_questions(model: Transformer, options: TaskOptions, windows: int) -> Recall:
    """Recall of the first question of many contexts: the context goes through a cache, the question alone is measured."""
    tokens = Task(options, MEASURING_SEED).far(options.contexts, windows * options.window).tokens_BT
    last = tokens.shape[1] - 2 * options.facts
    recalls = []
    for rows in tokens.split(ROWS_AT_ONCE):
        cache = model.new_cache(len(rows))
        model.features(rows[:, :last], cache, attention="dense")
        asked = model.features(rows[:, last : last + 1], cache, attention="dense", keep=("index_recall",))
        recalls += [part.recall for part in asked.index_loss.values()]
    return joined(recalls)


@torch.no_grad()
def at_all_queries(model: Transformer, options: TaskOptions, windows: int) -> Recall:
    """The same over every query of such contexts."""
    tokens = Task(options, MEASURING_SEED).far(ROWS_AT_ONCE, windows * options.window).tokens_BT
    features = model.features(tokens, attention="dense", keep=("index_recall",))
    return joined([part.recall for part in features.index_loss.values()])


def joined(recalls: list[Recall]) -> Recall:
    total = recalls[0]
    for recall in recalls[1:]:
        total += recall
    return total


def of_lookups(options: TaskOptions, seed: int) -> dict[str, Any]:
    """Train the model, measure its random indexer, train that, measure again."""
    seed_everything(seed)
    task = Task(options, seed)
    model = Transformer(lookup.config_of(options), seed=seed)
    lookup.learn_dense(model, options, task)
    result: dict[str, Any] = {
        f"dense_{windows}x": lookup.accuracy(model, options, windows, "dense") for windows in (NEAR, FAR)
    }
    places = (("", at_questions), ("_all", at_all_queries))

    def look(kind: str) -> None:
        for suffix, measure in places:
            for windows in (NEAR, FAR):
                recall = measure(model, options, windows)
                result[f"{kind}_{windows}x{suffix}"] = _figure(recall.mean)
                result[f"chance_{windows}x{suffix}"] = _figure(recall.mean_chance)

    look("frozen")
    lookup.warm_up(model, options, task)
    look("trained")
    log.info("seed %d     %s", seed, "  ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return result


def _figure(value: torch.Tensor) -> float:
    return round(value.item(), 5)


# ---- the model of text ----------------------------------------------------------------------------------------------


def of_text(options: IndexerOptions, corpus: Corpus, seed: int) -> dict[str, Any]:
    """The same for `tiny` after some steps on text."""
    seed_everything(seed)
    config = text_config_of(MuonOptions()).replace(index_topk=options.text_topk)
    model = Transformer(config, seed=seed)
    stream = MixtureStream(corpus.training, corpus.weights, seed=seed)
    rows, lr = max(1, options.batch_tokens // options.text_row), PEAK_LR_AT_128["muon"]
    optimizer = make_optimizers(model, lr)
    loss = torch.zeros(())
    for step in range(options.text_steps):
        tokens, documents = stream.next_batch(rows, options.text_row)
        features = model.features(tokens, documents=documents, attention="dense")
        loss = mean_loss(features.hidden, model.head.weight, tokens, documents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.scale_lr(learning_rate(step, options.text_steps, 0.25))
        optimizer.step()
        optimizer.zero_grad()
        balance_experts(model, features.routing, documents >= 0)
    before = _recall_of_text(model, corpus, options.text_row)
    frozen_but_indexer(model)
    optimizer = make_optimizers(model, lr)
    course: list[tuple[int, float]] = [(0, _figure(before.mean))]
    for step in range(options.text_warmup):
        tokens, documents = stream.next_batch(rows, options.text_row)
        features = model.features(tokens, documents=documents, attention="dense", keep=("index_loss",))
        torch.stack([part.mean for part in features.index_loss.values()]).sum().backward()
        optimizer.scale_lr(lookup.falling(step, options.text_warmup))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % MEASURE_EVERY == 0:
            course.append((step + 1, _figure(_recall_of_text(model, corpus, options.text_row).mean)))
    unfrozen(model)
    after = _recall_of_text(model, corpus, options.text_row)
    result = {
        "frozen": _figure(before.mean), "trained": _figure(after.mean), "chance": _figure(after.mean_chance),
        "loss": loss.item(), "course": course,
    }  # fmt: skip
    log.info("seed %d     text %s", seed, "  ".join(f"{k} {v:.3f}" for k, v in result.items() if k != "course"))
    return result


@torch.no_grad()
def _recall_of_text(model: Transformer, corpus: Corpus, row: int) -> Recall:
    recalls = []
    for tokens, documents in in_order(corpus.validation, row, 4, TEXT_TOKENS):
        features = model.features(tokens, documents=documents, attention="dense", keep=("index_recall",))
        recalls += [part.recall for part in features.index_loss.values()]
    return joined(recalls)


# ---- the study ------------------------------------------------------------------------------------------------------


def study(options: IndexerOptions, ledger: Ledger) -> Outcome:
    """Both models, all seeds, and what follows."""
    settings = settings_of(options)
    task = {name: value for name, value in settings.items() if not name.startswith("text_")}
    seeds = range(options.seeds)
    found = [ledger.measured(task, seed, partial(of_lookups, options, seed)) for seed in seeds]

    def all_of(name: str) -> list[float]:
        return [result[name] for result in found]

    rows = [["share of dense attention on entries that is kept", "trained", "frozen", "chance"]]
    figures: dict[str, float] = {}
    conclusion = []
    for suffix, where in (("", "questions"), ("_all", "all queries")):
        for windows in (NEAR, FAR):
            tail = f"_{windows}x{suffix}"
            of = {kind: all_of(kind + tail) for kind in ("trained", "frozen", "chance")}
            rows.append([f"{where}, {windows} windows", *(str(interval(values)) for values in of.values())])
            figures |= {f"{kind}{'' if kind == 'chance' else '_recall'}{tail}": fmean(v) for kind, v in of.items()}
            if not suffix:
                conclusion.append(
                    at_least(f"trained recall at {where}, {windows} windows", interval(of["trained"]), TARGET)
                )
                conclusion.append(above(f"frozen against chance there, {windows} windows", of["frozen"], of["chance"]))
    near = f"_{NEAR}x"
    figures = {
        "trained_recall": figures["trained_recall" + near], "frozen_recall": figures["frozen_recall" + near],
        "chance": figures["chance" + near], **figures,
    }  # fmt: skip
    curves: list[Curve] = []
    if options.text_steps:
        corpus: Corpus | None = None

        def measured_text(seed: int) -> dict[str, Any]:
            nonlocal corpus
            corpus = corpus or corpus_of(MuonOptions(data=options.text_data), folder_of("indexer", options))
            return of_text(options, corpus, seed)

        text = {name: value for name, value in settings.items() if name.startswith("text_")}
        text["batch_tokens"] = options.batch_tokens
        texts = [ledger.measured(text, seed, partial(measured_text, seed)) for seed in seeds]
        of = {kind: [result[kind] for result in texts] for kind in ("trained", "frozen", "chance")}
        rows.append(["text, all queries", *(str(interval(values)) for values in of.values())])
        figures |= {f"{kind}_text": fmean(values) for kind, values in of.items()}
        conclusion.append(
            at_least(f"trained recall on text after {options.text_steps} steps", interval(of["trained"]), TARGET)
        )
        conclusion.append(above("trained against frozen on text", of["trained"], of["frozen"]))
        curves = [
            Curve(f"text, seed {seed}", *map(list, zip(*result["course"], strict=True)))
            for seed, result in enumerate(texts)
        ]
    return Outcome(
        rows, figures, conclusion, curves, ("step of the indexer's warm-up", "recall"), "longreach experiment lookup"
    )  # fmt: skip


def main(options: IndexerOptions) -> int:
    """Run the command; returns the exit code."""
    lookup.check(options)
    if options.text_row < 3 or options.text_topk < 1:
        raise RequestError(
            f"--text-row {options.text_row} --text-topk {options.text_topk}: give 3 or more, and 1 or more"
        )
    return run_study("indexer", QUESTION, study, options)
