"""How many of AdamW's steps does Muon need?  `longreach experiment muon`

    ratio = the smallest r such that   loss(Muon, r · N steps)  ≤  loss(AdamW, N steps)

Loss is that of held-out text after a whole schedule of its own length: rise, constant, fall to a tenth. A run that is
looked at half-way has not had its fall yet, so a point on the curve of a longer run says nothing about a shorter one; Muon
is trained anew for each r. Model, initial weights, order of the data, batch, clipping and weight decay are the same for
both; each optimizer has the learning rate at which its loss is lowest on seed 0, found by doubling and halving until both
neighbours are worse. The model is a preset without MTP, with dense attention, on the sources of Python's library.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longreach.data.corpus import Corpus, is_prepared, open_corpus, prepare, tokenizer_sample
from longreach.data.sources import parse_sources
from longreach.data.split import Split
from longreach.data.stream import MixtureStream, in_order
from longreach.errors import RequestError
from longreach.journey.experiment import (
    Curve,
    ExperimentOptions,
    Ledger,
    Outcome,
    at_most,
    folder_of,
    interval,
    run_study,
    settings_of,
)
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.optim.groups import Kind
from longreach.optim.hybrid import make_optimizers
from longreach.runtime import log, seed_everything
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.balance import balance_experts
from longreach.train.losses import mean_loss, summed_loss
from longreach.train.recipe import PEAK_LR_AT_128
from longreach.train.schedule import learning_rate
from longreach.train.working import CLIP_NORM

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Lengths of Muon's runs, of AdamW's; the search begins in the middle."""

TARGET = 0.75
DECAY = 0.25
PER_DOCUMENT, GLANCE_DOCUMENTS, GLANCE_EVERY = 1024, 8, 20
SMALLEST_RATE, LARGEST_RATE = 1e-4, 0.5
QUESTION = "in what share of AdamW's steps does Muon reach its final loss?"


@dataclass(frozen=True)
class MuonOptions(ExperimentOptions):
    """Measure in what share of AdamW's steps Muon reaches its final loss, both with learning rates tuned.

    Results are kept per run: the same command again goes on where the last one stopped.
    """

    preset: str = "tiny"
    """Shape of the model: tiny, or small for a machine with a GPU or a free night."""
    data: tuple[str, ...] = ("stdlib",)
    """Text, as for longreach pretrain."""
    steps: int = 200
    """Of AdamW's run."""
    batch_tokens: int = 1024
    row: int = 256
    """Tokens per row."""
    held_out: float = 0.1
    """Share of the documents the losses are measured on, by the first 1,024 tokens of each: no file outweighs the others."""


def config_of(options: MuonOptions) -> ModelConfig:
    """The preset without its MTP block, initial weights as in pretraining."""
    preset = ModelConfig.preset(options.preset)
    return preset.replace(
        num_nextn_predict_layers=0,
        compress_ratios=preset.compress_ratios[: preset.num_hidden_layers],
        initializer_range=round(preset.hidden_size**-0.5, 4),
    )


def corpus_of(options: MuonOptions, folder: Path) -> Corpus:
    """The text as tokens, made once and kept beside the results."""
    vocab_size = ModelConfig.preset(options.preset).vocab_size
    name = f"corpus-{vocab_size}-{options.held_out:g}-{zlib.crc32(' '.join(options.data).encode()):08x}"
    if not 0 < options.held_out < 1:
        raise RequestError(
            f"--held-out {options.held_out:g} is a share of the documents; give more than 0 and less than 1"
        )
    if not is_prepared(folder / name):
        log.info("corpus     %s is read and encoded once, into %s", " ".join(options.data), folder / name)
        split = Split.of(parse_sources(options.data), options.held_out)
        tokenizer = Tokenizer.train(tokenizer_sample(split), vocab_size)
        return prepare(split, tokenizer, folder / name)
    return open_corpus(folder / name)


def train(options: MuonOptions, corpus: Corpus, kind: Kind, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """One run over `steps` steps; its loss on held-out text at the end, and glances on the way."""
    seed_everything(seed)
    model = Transformer(config_of(options), seed=seed)
    optimizer = make_optimizers(model, lr, kind=kind)
    stream = MixtureStream(corpus.training, corpus.weights, seed=seed)
    course: list[tuple[int, float]] = []
    for step in range(steps):
        tokens, documents = stream.next_batch(max(1, options.batch_tokens // options.row), options.row)
        features = model.features(tokens, documents=documents, attention="dense")
        mean_loss(features.hidden, model.head.weight, tokens, documents).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.scale_lr(learning_rate(step, steps, DECAY))
        optimizer.step()
        optimizer.zero_grad()
        balance_experts(model, features.routing, documents >= 0)
        if (step + 1) % GLANCE_EVERY == 0:
            course.append((step + 1, validation_loss(model, corpus, options.row, GLANCE_DOCUMENTS)))
    loss = validation_loss(model, corpus, options.row, len(corpus.validation))
    log.info("run        %s, rate %g, %d steps, seed %d: %.4f nats", kind, lr, steps, seed, loss)
    return {"loss": loss, "course": course}


@torch.no_grad()
def validation_loss(model: Transformer, corpus: Corpus, row: int, count: int) -> float:
    """Nats per token of the beginnings of the first `count` held-out documents."""
    beginnings = [corpus.validation[i][:PER_DOCUMENT] for i in range(min(count, len(corpus.validation)))]
    tokens_there = sum(map(len, beginnings))
    nats, targets = 0.0, 0
    for tokens, documents in in_order(beginnings, row, 8, tokens_there):
        hidden = model.features(tokens, documents=documents, attention="dense").hidden
        total, count = summed_loss(hidden, model.head.weight, tokens, documents)
        nats, targets = nats + total.item(), targets + count
    return nats / targets


# ---- the search -----------------------------------------------------------------------------------------------------


def tuned(loss_at: Callable[[float], float], start: float) -> float:
    """The rate, of `start` times powers of two, whose loss is lower than that of its half and its double."""
    best = start
    while True:
        near = [rate for rate in (best / 2, best, best * 2) if SMALLEST_RATE <= rate <= LARGEST_RATE]
        better = min(near, key=loss_at)
        if better == best:
            return best
        best = better


def crossing(loss_at: Callable[[float], float], goal: float) -> tuple[float, bool]:
    """The share of the steps at which the loss comes down to `goal`, on the line between two neighbours of `SHARES`.

    Returns:
        the share, and whether it was bracketed: where even the shortest run reaches the goal, or the longest does not,
        the share is that end of `SHARES` and only a bound.
    """
    at = len(SHARES) // 2
    if loss_at(SHARES[at]) <= goal:
        while at > 0 and loss_at(SHARES[at - 1]) <= goal:
            at -= 1
        if at == 0:
            return SHARES[0], False
    else:
        at += 1
        while at < len(SHARES) and loss_at(SHARES[at]) > goal:
            at += 1
        if at == len(SHARES):
            return SHARES[-1], False
    above, below = loss_at(SHARES[at - 1]), loss_at(SHARES[at])
    share = (above - goal) / (above - below)
    return SHARES[at - 1] + share * (SHARES[at] - SHARES[at - 1]), True


def study(options: MuonOptions, ledger: Ledger) -> Outcome:
    """Tune both on seed 0, then search on every seed."""
    corpus: Corpus | None = None

    def loss_of(kind: Kind, lr: float, steps: int, seed: int) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            nonlocal corpus
            corpus = corpus or corpus_of(options, folder_of("muon", options))
            return train(options, corpus, kind, lr, steps, seed)

        return ledger.measured(settings_of(options) | {"optimizer": kind, "lr": lr, "run_steps": steps}, seed, measure)

    N = options.steps
    lengths = {share: max(1, round(share * N)) for share in SHARES}
    start = {kind: PEAK_LR_AT_128[kind] for kind in ("adamw", "muon")}
    rate_a = tuned(lambda lr: loss_of("adamw", lr, N, 0)["loss"], start["adamw"])
    rate_m = tuned(lambda lr: loss_of("muon", lr, lengths[SHARES[len(SHARES) // 2]], 0)["loss"], start["muon"])
    rows = [["seed", "AdamW's loss", *(f"Muon, {share:g}" for share in SHARES), "ratio"]]
    ratios, bracketed, curves = [], [], []
    for seed in range(options.seeds):
        adamw = loss_of("adamw", rate_a, N, seed)
        looked_at: dict[float, float] = {}

        def loss_at(share: float, seed: int = seed, looked_at: dict[float, float] = looked_at) -> float:
            looked_at[share] = loss_of("muon", rate_m, lengths[share], seed)["loss"]
            return looked_at[share]

        ratio, inside = crossing(loss_at, adamw["loss"])
        ratios.append(ratio)
        bracketed.append(inside)
        cells = [f"{looked_at[share]:.3f}" if share in looked_at else "" for share in SHARES]
        rows.append([str(seed), f"{adamw['loss']:.3f}", *cells, f"{ratio:.3f}" + ("" if inside else " (bound)")])
        for label, run in [(f"AdamW, seed {seed}", adamw)] + [
            (f"Muon, {share:g} of the steps, seed {seed}", loss_of("muon", rate_m, lengths[share], seed))
            for share in sorted(looked_at)
        ]:
            if seed == 0 and run["course"]:
                curves.append(Curve(label, *map(list, zip(*run["course"], strict=True))))
    found = interval(ratios)
    conclusion = [
        f"preset {options.preset}, {N} steps of {options.batch_tokens} tokens; rates tuned on seed 0: "
        f"AdamW {rate_a:g}, Muon {rate_m:g}",
        at_most("Muon's share of AdamW's steps", found, TARGET),
    ]
    if not all(bracketed):
        conclusion.append("where a ratio is a bound, no length in the table lies on the other side of AdamW's loss")
    figures = {
        "muon_step_ratio": found.mean, "muon_step_ratios": ratios, "adamw_lr": rate_a, "muon_lr": rate_m,
        "adamw_loss": fmean(loss_of("adamw", rate_a, N, seed)["loss"] for seed in range(options.seeds)),
        "preset": options.preset, "steps": N,
    }  # fmt: skip
    again = partial("longreach pretrain --preset {} --data {} --steps {} --out runs/muon".format, options.preset)
    return Outcome(
        rows, figures, conclusion, curves, ("step", "loss on held-out text, nats per token"),
        again(" ".join(options.data), N),
    )  # fmt: skip


def main(options: MuonOptions) -> int:
    """Run the command; returns the exit code."""
    if options.preset not in ("tiny", "small", "bench"):
        raise RequestError(f"--preset {options.preset!r} is none of tiny, small, bench")
    if options.row < 3 or options.batch_tokens < 1:
        raise RequestError(f"--row {options.row} --batch-tokens {options.batch_tokens}: rows need 3 tokens or more")
    if options.steps < len(SHARES) + 1:
        raise RequestError(f"--steps {options.steps}: give {len(SHARES) + 1} or more, so that shorter runs differ")
    return run_study("muon", QUESTION, study, options)
