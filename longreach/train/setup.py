"""What stands before a training loop: data and tokenizer, the check that the model fits, and how many steps a time buys."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from longreach.data.corpus import Corpus, is_prepared, open_corpus, read_corpus, tokenizer_sample
from longreach.data.sources import parse_sources
from longreach.data.split import Split
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.count import count_parameters
from longreach.runtime import log, synchronise, total_memory_bytes
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.recipe import Recipe
from longreach.train.schedule import Schedule, StepPlan

PROBES = 2
"""Steps timed per phase; the first is slower, because memory is still being asked for."""


def load_corpus(recipe: Recipe, saved_tokenizer: Path | None) -> Corpus:
    """The run's documents, encoded.

    Args:
        saved_tokenizer: of a run that is resumed; otherwise `recipe.tokenizer` or one learned from the data.

    Raises:
        RequestError: the data cannot be read, or a tokenizer of another vocabulary.
    """
    given = saved_tokenizer or (Path(recipe.tokenizer) if recipe.tokenizer is not None else None)
    tokenizer = Tokenizer.load(given) if given is not None else None
    if len(recipe.data) == 1 and is_prepared(recipe.data[0]):
        corpus = open_corpus(recipe.data[0], tokenizer)
        check_tokenizer(corpus.tokenizer, str(given or recipe.data[0]), recipe)
        return corpus
    if tokenizer is not None:
        check_tokenizer(tokenizer, str(given), recipe)
    split = Split.of(parse_sources(recipe.data, recipe.text_field))
    if tokenizer is None:
        tokenizer = Tokenizer.train(tokenizer_sample(split), recipe.config.vocab_size)
    return read_corpus(split, tokenizer)


def check_tokenizer(tokenizer: Tokenizer, name: str, recipe: Recipe) -> None:
    """Raise RequestError if this model cannot use the tokenizer."""
    config = recipe.config
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"{name} has {tokenizer.vocab_size} tokens, preset {recipe.preset} has room for {config.vocab_size}"
        )
    if (tokenizer.bos_id, tokenizer.eos_id) != (config.bos_token_id, config.eos_token_id):
        raise RequestError(
            f"{name} begins and ends texts with ids {tokenizer.bos_id} and {tokenizer.eos_id}; "
            f"this model needs {config.bos_token_id} and {config.eos_token_id}"
        )


def check_memory(recipe: Recipe, device: torch.device) -> None:
    """Refuse a model that cannot fit rather than be killed half-way.

    Weight, gradient and momentum, 4 bytes each, and another moment with AdamW; a working copy where there is one.
    """
    config: ModelConfig = recipe.config
    if config.attention == "mla":
        raise RequestError(f"preset {recipe.preset} is the V3.2 baseline, for comparisons only; train tiny or small")
    per_parameter = 12 if recipe.optimizer == "muon" else 16
    if recipe.precision != "float32" or recipe.qat != "plain":
        per_parameter += 4 if recipe.precision == "bfloat16" else 8
    needed, there = per_parameter * count_parameters(config).total, total_memory_bytes(device)
    if there is not None and needed > there:
        raise RequestError(
            f"training preset {recipe.preset} needs {needed / 2**30:,.0f} GiB for weights and optimizer, "
            f"{device} has {there / 2**30:,.0f} GiB; choose a smaller preset: tiny or small"
        )


def steps_in(minutes: float, schedule_of: Callable[[int], Schedule], probe: Callable[[StepPlan], None],
             device: torch.device) -> int:  # fmt: skip
    """How many steps fit into `minutes`, from timing each phase of the run.

    A run is planned once: its schedule and its repetition after a crash then depend on no clock.

    Args:
        schedule_of: number of steps → schedule; phases are fractions, so any number will do to find them.
        probe: does all the work of a step of this plan, and undoes it.
    """
    sample = schedule_of(1000)
    counts: dict[tuple[int, int, str], int] = {}
    plans: dict[tuple[int, int, str], StepPlan] = {}
    for step in range(sample.steps):
        plan = sample.at(step)
        key = plan.seq_len, plan.rows, plan.attention
        counts[key] = counts.get(key, 0) + 1
        plans[key] = plan
    seconds, began = 0.0, time.perf_counter()
    for key, plan in plans.items():
        if counts[key] < 5 and len(plans) > 1:  # a moment of a ramp
            seconds += counts[key] / sample.steps * seconds
            continue
        for _ in range(PROBES):
            synchronise(device)
            start = time.perf_counter()
            probe(plan)
            synchronise(device)
            elapsed = time.perf_counter() - start
        seconds += counts[key] / sample.steps * elapsed  # pyright: ignore[reportPossiblyUnboundVariable]
    left = max(0.1 * minutes * 60, minutes * 60 - (time.perf_counter() - began))
    steps = max(1, round(left / seconds))
    log.info("length     %g minutes are about %d steps of %.2f s", minutes, steps, seconds)
    return steps
