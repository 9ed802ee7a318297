"""What a pretraining run is asked to be: the command's options, and the recipe they resolve to.

The recipe is what a resumed run must share with its beginning; RUN/config.json holds it. Budget, threads and device may
differ from one sitting to the next.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.train.schedule import Budget

PEAK_LR_AT_128 = 0.008
"""Peak learning rate of a model 128 wide; wider ones take less, by the square root."""


@dataclass(frozen=True)
class PretrainOptions:
    """Train a model from nothing on text.

    Reads text, learns a tokenizer from it, trains, and leaves a run directory: model, metrics, loss curve, and what is
    needed to go on. Ctrl-C saves first.
    """

    out: Path
    """Run directory to make, or with --resume to go on with."""
    data: str | None = None
    """A text file, a folder, a .jsonl file with a "text" field, or `stdlib`: the sources of Python's own library."""
    preset: str | None = None
    """Shape of the model: tiny (default), small, bench."""
    minutes: float | None = None
    """Train for this long; the learning rate ends on time."""
    steps: int | None = None
    """Train for this many steps. Without --minutes and --steps: once through the data."""
    batch_tokens: int | None = None
    """Tokens per step (default 1024: on a CPU small steps cost no more per token, and a short run needs many)."""
    seq_len: int | None = None
    """Tokens per row (default 128: in a short run more rows teach more than longer ones)."""
    lr: float | None = None
    """Peak learning rate (default: 0.008 at width 128, falling with the square root of the width)."""
    seed: int | None = None
    """Decides the initial weights and the order of the data (default 0)."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of learning one from the data."""
    resume: bool = False
    """Go on with the run in --out: same data, same options, from its last checkpoint."""
    threads: int | None = None
    """CPU threads (default: one per core)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """End with one JSON object on stdout."""


@dataclass(frozen=True)
class Recipe:
    """The options that decide what is learned, all of them filled in."""

    data: str
    preset: str = "tiny"
    batch_tokens: int = 1024
    seq_len: int = 128
    lr: float = 0.0
    seed: int = 0
    tokenizer: str | None = None

    @property
    def rows_per_batch(self) -> int:
        return self.batch_tokens // self.seq_len

    @property
    def config(self) -> ModelConfig:
        """The preset's shape, with initial weights of standard deviation 1 / sqrt(width).

        The released models' 0.02 suits widths of thousands. For 128 it is four times too small: after 0.3M tokens the
        validation loss of `tiny` was 4.53 nats with 0.02, 4.37 with 0.06, 4.28 with 0.1.
        """
        preset = ModelConfig.preset(self.preset)
        return preset.replace(initializer_range=round(preset.hidden_size**-0.5, 4))


def new_recipe(options: PretrainOptions) -> Recipe:
    """Options with the defaults filled in, checked as far as that goes without reading the data.

    Raises:
        RequestError, ConfigError: a value that cannot work; the line names the option.
    """
    if options.data is None:
        raise RequestError("--data is missing; give a text file, a folder, a .jsonl file, or stdlib")
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe)}
    given["tokenizer"] = None if options.tokenizer is None else str(options.tokenizer)
    recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
    config = recipe.config
    if options.lr is None:
        recipe = dataclasses.replace(recipe, lr=round(PEAK_LR_AT_128 * math.sqrt(128 / config.hidden_size), 6))
    if not 0 < recipe.lr < 1:
        raise RequestError(f"--lr {recipe.lr:g} must be above 0 and below 1")
    if not 3 <= recipe.seq_len <= config.max_position_embeddings:
        raise RequestError(
            f"--seq-len {recipe.seq_len} must be from 3 to {config.max_position_embeddings}, the longest this preset allows"
        )
    if recipe.batch_tokens < recipe.seq_len:
        raise RequestError(f"--batch-tokens {recipe.batch_tokens} must be at least one row, --seq-len {recipe.seq_len}")
    if recipe.seed < 0:
        raise RequestError(f"--seed {recipe.seed} must not be negative")
    return recipe


def resumed_recipe(options: PretrainOptions, saved: dict[str, Any]) -> Recipe:
    """The recipe a run began with, from its config.json.

    Raises:
        RequestError: an option given again differs from it; only budget, threads and device may be new.
    """
    try:
        recipe = Recipe(**{f.name: saved[f.name] for f in dataclasses.fields(Recipe)})
    except KeyError as missing:
        raise RequestError(f"{options.out} is not a pretraining run: its config.json has no {missing}") from None
    for name, value in dataclasses.asdict(recipe).items():
        given = getattr(options, name)
        if given is not None and str(given) != str(value):
            flag = "--" + name.replace("_", "-")
            raise RequestError(
                f"{flag} {given} differs from this run's {value}; leave it out, a resumed run keeps its own"
            )
    return recipe


def budget_of(options: PretrainOptions) -> Budget | None:
    """The budget asked for, None if none was."""
    if options.steps is not None and options.minutes is not None:
        raise RequestError("--steps and --minutes exclude each other; give one")
    if options.steps is not None and options.steps < 1:
        raise RequestError(f"--steps {options.steps} must be at least 1")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise RequestError(f"--minutes {options.minutes:g} must be above 0")
    if options.steps is None and options.minutes is None:
        return None
    return Budget(options.steps, options.minutes)
