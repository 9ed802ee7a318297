"""Does sparse attention find one fact far away?  `longreach experiment lookup`

    context   · · k₃ v₃ · · · · · k₁ v₁ · · k₂ v₂ · · · …  at least a window of filler  …  k₁ ? k₃ ? k₂ ?
    answer    the value that stood behind the key: at 8 and at 64 times the sliding window

The answer has to come through a compressed entry: the window of the question does not reach the fact, and two layers'
windows, one upon the other, only the nearest facts. A small model first learns with dense attention, gated from easy
to hard (facts aligned to the compressor's blocks and few keys; all keys; facts anywhere; one statement and a question
far behind it, at 8 windows); then the indexer alone learns; then all learn with sparse attention at lengths up to 64
windows. The twin with a frozen indexer gets the same sparse steps from the same weights, and can adapt everything but
the choice. Loss and accuracy count the tokens of answers only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.errors import RequestError
from longreach.journey.experiment import (
    Curve,
    ExperimentOptions,
    Ledger,
    Outcome,
    above,
    at_least,
    interval,
    run_study,
    settings_of,
)
from longreach.model.config import ModelConfig
from longreach.model.features import Features
from longreach.model.transformer import Transformer
from longreach.optim.hybrid import HybridOptimizer, make_optimizers
from longreach.runtime import log, seed_everything
from longreach.train.working import frozen_but_indexer, unfrozen

NEAR, FAR = 8, 64
"""Lengths of the two measurements, in windows."""

FIRST_FILLER, FILLERS = 2, 16
RATIO = 4
"""Tokens per compressed entry of a CSA layer."""

SLOT = 8
"""One fact in so many tokens: room enough that pooling 8 tokens (an entry and the block before it) mixes few facts."""

TARGET = 0.95
LEARNED, KEEP = 0.9, 0.95
"""Smoothed accuracy at which a lesson is over, and the weight of the past in it."""

RISE = 50
"""Steps over which the learning rate rises."""

CLIP_NORM, WEIGHT_DECAY = 1.0, 0.01
ROWS_AT_ONCE, MEASURING_SEED = 64, 1 << 20
QUESTION = "does a trained indexer find facts at 8 and 64 windows, where a frozen one does not?"


@dataclass(frozen=True)
class TaskOptions(ExperimentOptions):
    """The model of lookups and how it learns, for every study that uses it."""

    window: int = 16
    """Sliding window in tokens: facts are looked up at 8 and 64 times this."""
    keys: int = 64
    """Different keys, and different values."""
    facts: int = 8
    """Facts in a context, each asked for once."""
    topk: int = 8
    """Entries a query may attend to."""
    lesson_steps: int = 1500
    """Steps after which a lesson of the dense phase is given up if its gate has not opened."""
    polish_steps: int = 200
    """Steps after the last lesson, with a falling learning rate."""
    warmup_steps: int = 200
    """Steps in which the indexer alone learns."""
    batch_tokens: int = 2048
    """Tokens per step; a row longer than that makes the batch one row."""
    lr: float = 0.01
    """Peak learning rate of Muon."""
    contexts: int = 256
    """Contexts that each measurement asks about, the same for every model."""


@dataclass(frozen=True)
class LookupOptions(TaskOptions):
    """Measure whether a model with a trained indexer looks up facts at 8 and 64 windows, and its twin with a frozen one.

    Results are kept per seed: the same command again goes on where the last one stopped.
    """

    sparse_steps: int = 200
    """Steps with sparse attention, of each twin."""
    sparse_lr: float = 0.002
    """Learning rate where they begin; with half the peak rate one seed of three forgot a part of what it knew."""


class Questions(NamedTuple):
    """A batch. `asked_BT` is true where the next token is an answer to give."""

    tokens_BT: Tensor
    asked_BT: Tensor


class Task:
    """Facts to look up: tokens of filler, keys and values, from a generator of its own."""

    def __init__(self, options: TaskOptions, seed: int) -> None:
        self.window, self.keys, self.facts = options.window, options.keys, options.facts
        self.random = torch.Generator().manual_seed(seed)
        self.first_key = FIRST_FILLER + FILLERS
        self.first_value = self.first_key + self.keys

    def _facts(self, rows: int, count: int, keys: int) -> tuple[Tensor, Tensor]:
        """Token ids of `count` distinct keys per row, of the first `keys`, and their values."""
        key = torch.rand(rows, keys, generator=self.random).argsort(dim=1)[:, :count]
        return key + self.first_key, torch.randint(keys, (rows, count), generator=self.random) + self.first_value

    def _filler(self, *shape: int) -> Tensor:
        return torch.randint(FIRST_FILLER, self.first_key, shape, generator=self.random)

    def stream(self, rows: int, length: int, facts: int, keys: int, slot: int, anywhere: bool) -> Questions:
        """Every slot states one of a row's facts; asked is each that was stated before, though not inside the window."""
        key_BP, value_BP = self._facts(rows, facts, keys)
        slots = length // slot
        which = torch.randint(facts, (rows, slots), generator=self.random)
        tokens = self._filler(rows, slots, slot)
        at = torch.randint(slot - 1 if anywhere else 1, (rows, slots, 1), generator=self.random)
        tokens.scatter_(2, at, key_BP.gather(1, which)[..., None]).scatter_(
            2, at + 1, value_BP.gather(1, which)[..., None]
        )
        position = torch.arange(slots) * slot + at[..., 0]
        distance = position[:, :, None] - position[:, None, :]
        before = (which[:, :, None] == which[:, None, :]) & (distance > 0)
        far = before.any(dim=-1) & ~(before & (distance <= self.window)).any(dim=-1)
        asked = torch.zeros(rows, slots, slot, dtype=torch.bool).scatter_(2, at, far[..., None])
        return Questions(tokens.flatten(1), asked.flatten(1))

    def far(self, rows: int, length: int) -> Questions:
        """Each fact stated once in a slot of its own, a window of filler or more, then all asked in another order."""
        P = self.facts
        key_BP, value_BP = self._facts(rows, P, self.keys)
        tokens = self._filler(rows, length)
        slots = (length - 2 * P - self.window) // SLOT
        slot = torch.rand(rows, slots, generator=self.random).argsort(dim=1)[:, :P]
        at = slot * SLOT + torch.randint(SLOT - 1, (rows, P), generator=self.random)
        tokens.scatter_(1, at, key_BP).scatter_(1, at + 1, value_BP)
        order = torch.rand(rows, P, generator=self.random).argsort(dim=1)
        tokens[:, -2 * P :: 2], tokens[:, -2 * P + 1 :: 2] = key_BP.gather(1, order), value_BP.gather(1, order)
        asked = torch.zeros_like(tokens, dtype=torch.bool)
        asked[:, -2 * P :: 2] = True
        return Questions(tokens, asked)


def config_of(options: TaskOptions) -> ModelConfig:
    """A sliding layer and CSA, with plain residuals and a dense feed-forward layer: what the question is not about is small."""
    return ModelConfig(
        vocab_size=FIRST_FILLER + FILLERS + 2 * options.keys, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, head_dim=32, qk_rope_head_dim=8, q_lora_rank=64, o_groups=1, o_lora_rank=64,
        sliding_window=options.window, compress_ratios=(0, RATIO), index_n_heads=4, index_head_dim=16,
        index_topk=options.topk, feed_forward="dense", intermediate_size=64, residual="plain", initializer_range=0.1,
        max_position_embeddings=max(1024, FAR * options.window), numerics="transformers",
    )  # fmt: skip


def answers(
    model: Transformer, questions: Questions, attention: Literal["dense", "sparse"], keep: tuple[str, ...] = ()
) -> tuple[Tensor, float, Features]:
    """Mean loss over the answers, the share of them that is right, and what the model kept."""
    features = model.features(questions.tokens_BT, attention=attention, keep=keep)
    asked = questions.asked_BT[:, :-1]
    logits = model.head(features.hidden[:, :-1][asked])
    targets = questions.tokens_BT[:, 1:][asked]
    return F.cross_entropy(logits, targets), (logits.argmax(dim=-1) == targets).float().mean().item(), features


# ---- learning -------------------------------------------------------------------------------------------------------


def learn(
    model: Transformer,
    batch: Callable[[], Questions],
    optimizer: HybridOptimizer,
    factor: float,
    attention: Literal["dense", "warmup", "sparse"],
    indexer_learns: bool = True,
) -> float:
    """One step; returns the share of right answers before it."""
    keep = ("index_loss",) if attention != "dense" and indexer_learns else ()
    loss, right, features = answers(model, batch(), "sparse" if attention == "sparse" else "dense", keep)
    objective = loss if attention != "warmup" else loss.new_zeros(())
    for part in features.index_loss.values():
        objective = objective + part.mean
    objective.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP_NORM)
    optimizer.scale_lr(factor)
    optimizer.step()
    optimizer.zero_grad()
    return right


def lessons(options: TaskOptions, task: Task) -> list[tuple[str, Callable[[], Questions]]]:
    """From easy to hard; who has learned one goes on to the next.

    The first is what avoids the plateau: a fact at the start of every compressor block is learned within some 200 steps.
    Begun with several facts to a block, or with all facts of a row asked once (where it pays to name a value not yet named),
    models of this size were still guessing after 350 to 1,400 steps, when each attempt ended.
    """
    length, facts = NEAR * options.window, options.facts + 2
    rows = max(1, options.batch_tokens // length)
    few = min(16, options.keys)
    return [
        (f"{few} keys, at the start of blocks", lambda: task.stream(rows, length, facts, few, RATIO, False)),
        (f"{options.keys} keys", lambda: task.stream(rows, length, facts, options.keys, RATIO, False)),
        (f"anywhere in {RATIO} tokens", lambda: task.stream(rows, length, facts, options.keys, RATIO, True)),
        (f"anywhere in {SLOT} tokens", lambda: task.stream(rows, length, facts, options.keys, SLOT, True)),
        ("stated once, asked far away", lambda: task.far(rows, length)),
    ]


def learn_dense(model: Transformer, options: TaskOptions, task: Task) -> list[tuple[int, float]]:
    """All lessons with dense attention; returns the course of the smoothed accuracy, by step."""
    optimizer = make_optimizers(model, options.lr, weight_decay=WEIGHT_DECAY)
    course: list[tuple[int, float]] = []
    step = 0
    for name, batch in lessons(options, task):
        smoothed = 0.0
        for taken in range(1, options.lesson_steps + 1):
            right = learn(model, batch, optimizer, min(1.0, (step + 1) / RISE), "dense")
            smoothed = KEEP * smoothed + (1 - KEEP) * right
            step += 1
            course.append((step, smoothed))
            if smoothed > LEARNED:
                log.info("lesson     %s: %d steps", name, taken)
                break
        else:
            log.info("lesson     %s: given up at %.2f after %d steps", name, smoothed, options.lesson_steps)
    far = lessons(options, task)[-1][1]
    for taken in range(options.polish_steps):
        learn(model, far, optimizer, falling(taken, options.polish_steps), "dense")
    return course


def mixed_lengths(options: TaskOptions, task: Task) -> Callable[[], Questions]:
    """Batches of 8 to 64 windows."""
    lengths = [options.window * windows for windows in (NEAR, 2 * NEAR, 4 * NEAR, FAR)]

    def batch() -> Questions:
        length = lengths[int(torch.randint(len(lengths), (), generator=task.random))]
        return task.far(max(1, options.batch_tokens // length), length)

    return batch


def warm_up(model: Transformer, options: TaskOptions, task: Task) -> None:
    """Teach the indexer alone, attention being dense."""
    batch = mixed_lengths(options, task)
    frozen_but_indexer(model)
    optimizer = make_optimizers(model, options.lr, weight_decay=WEIGHT_DECAY)
    for step in range(options.warmup_steps):
        learn(model, batch, optimizer, falling(step, options.warmup_steps), "warmup")
    unfrozen(model)


def learn_sparse(model: Transformer, options: LookupOptions, task: Task, indexer_learns: bool) -> None:
    """The sparse phase, on rows of 8 to 64 windows. A frozen indexer stays as it is, everything else learns."""
    batch = mixed_lengths(options, task)
    for name, p in model.named_parameters():
        p.requires_grad_(indexer_learns or ".indexer." not in name)
    optimizer = make_optimizers(model, options.sparse_lr, weight_decay=WEIGHT_DECAY)
    for step in range(options.sparse_steps):
        learn(model, batch, optimizer, falling(step, options.sparse_steps), "sparse", indexer_learns)


def falling(step: int, steps: int) -> float:
    """From 1 to a tenth, in a straight line."""
    return 1.0 - 0.9 * step / steps


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: Transformer, options: TaskOptions, windows: int, attention: Literal["dense", "sparse"]) -> float:
    """Share of right answers at that length, on contexts that every model gets alike and none has seen."""
    questions = Task(options, MEASURING_SEED).far(options.contexts, windows * options.window)
    pieces = zip(*(part.split(ROWS_AT_ONCE) for part in questions), strict=True)
    right = [answers(model, Questions(*piece), attention)[1] * len(piece[0]) for piece in pieces]
    return sum(right) / options.contexts


def measure(options: LookupOptions, seed: int) -> dict[str, Any]:
    """Train one model and its twin, and ask both."""
    seed_everything(seed)
    task = Task(options, seed)
    model = Transformer(config_of(options), seed=seed)
    course = learn_dense(model, options, task)
    result: dict[str, Any] = {"course": course[::10], "dense_steps": len(course)}
    for windows in (NEAR, FAR):
        result[f"dense_{windows}x"] = accuracy(model, options, windows, "dense")
    for name, indexer_learns in (("lookup", True), ("frozen", False)):
        twin = copy.deepcopy(model)
        if indexer_learns:
            warm_up(twin, options, task)
        learn_sparse(twin, options, task, indexer_learns)
        for windows in (NEAR, FAR):
            result[f"{name}_{windows}x"] = accuracy(twin, options, windows, "sparse")
    log.info("seed %d     %s", seed, "  ".join(f"{k} {v:.3f}" for k, v in result.items() if k != "course"))
    return result


def study(options: LookupOptions, ledger: Ledger) -> Outcome:
    """All seeds, and what follows."""
    found = [
        ledger.measured(settings_of(options), seed, partial(measure, options, seed)) for seed in range(options.seeds)
    ]
    kinds = {"dense": "dense attention, before", "lookup": "trained indexer", "frozen": "frozen indexer"}
    of = {f"{kind}_{w}x": [r[f"{kind}_{w}x"] for r in found] for kind in kinds for w in (NEAR, FAR)}
    tokens = {w: w * options.window for w in (NEAR, FAR)}
    rows = [["right answers", *(f"{w} windows ({tokens[w]} tokens)" for w in (NEAR, FAR))]]
    rows += [[title, *(str(interval(of[f"{kind}_{w}x"])) for w in (NEAR, FAR))] for kind, title in kinds.items()]
    conclusion = [at_least(f"accuracy at {w} windows", interval(of[f"lookup_{w}x"]), TARGET) for w in (NEAR, FAR)]
    conclusion += [
        above(f"trained against frozen indexer at {w} windows", of[f"lookup_{w}x"], of[f"frozen_{w}x"])
        for w in (NEAR, FAR)
    ]
    curves = [
        Curve(f"seed {seed}", *map(list, zip(*r["course"], strict=True))) for seed, r in enumerate(found) if r["course"]
    ]
    return Outcome(
        rows,
        {name: fmean(values) for name, values in of.items()} | {"chance": 1 / options.keys},
        conclusion, curves, ("step of the dense phase", "right answers, smoothed"), "longreach experiment indexer",
    )  # fmt: skip


def check(options: TaskOptions) -> None:
    """Raise RequestError where no such task can be made."""
    for name in ("window", "keys", "facts", "topk", "lesson_steps", "batch_tokens", "contexts"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    if options.topk >= (NEAR - 1) * options.window // RATIO:
        raise RequestError(
            f"--topk {options.topk} leaves nothing to choose at {NEAR} windows of {options.window} tokens"
        )
    slots = max(0, NEAR * options.window - 2 * options.facts - options.window) // SLOT
    most = min(slots, min(16, options.keys) - 2)
    if options.facts > most:
        raise RequestError(
            f"--facts {options.facts}: {NEAR} windows of {options.window} tokens and {options.keys} keys have room for "
            f"{max(0, most)}; give fewer, or a longer --window and more --keys"
        )


def main(options: LookupOptions) -> int:
    """Run the command; returns the exit code."""
    check(options)
    return run_study("lookup", QUESTION, study, options)
