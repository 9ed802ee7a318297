"""What a pretraining run is asked to be: the command's options, and the recipe they resolve to.

The recipe is what a resumed run must share with its beginning; RUN/config.json holds it. Length, threads and device may
differ from one sitting to the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.train.schedule import Schedule, parse_stages

PEAK_LR_AT_128 = {"muon": 0.02, "adamw": 0.008}
"""Peak learning rate of a model 128 wide; wider ones take less, by the square root."""

DEFAULT_STAGES = {"tiny": "128@0 512@0.6 2048@0.85"}
OTHER_STAGES = "512@0 2048@0.6 8192@0.85"
DEFAULT_BATCH = {"tiny": 2048}
DEFAULT_BIAS_SPEED = {"tiny": 0.01}
OTHER_BATCH = 8192


@dataclass(frozen=True)
class PretrainOptions:
    """Train a model from nothing on text, the V4 way.

    Reads text, learns a tokenizer from it, trains with Muon along a curriculum of row lengths, switches from dense to
    sparse attention with a trained indexer, and leaves a run directory: model, metrics, loss curve, and what is needed to
    go on. Ctrl-C saves first.
    """

    out: Path
    """Run directory to make, or with --resume to go on with."""
    data: tuple[str, ...] | None = None
    """Text files, folders, .jsonl, .parquet, saved Hugging Face datasets, a prepared corpus, or `stdlib`: the sources of
    Python's own library. PATH@WEIGHT weighs several."""
    text_field: str | None = None
    """Field of .jsonl records and column of .parquet files that holds the text (default: text)."""
    preset: str | None = None
    """Shape of the model: tiny (default), small, bench."""
    minutes: float | None = None
    """Train for about this long: turned into steps once, at the start, by timing a few."""
    steps: int | None = None
    """Train for this many steps. Without --minutes and --steps: once through the data."""
    optimizer: Literal["muon", "adamw"] | None = None
    """muon (default; AdamW keeps embedding, head and vectors) or adamw for everything."""
    lr: float | None = None
    """Peak learning rate (default at width 128: 0.02 with muon, 0.008 with adamw; falls with the square root of width)."""
    batch_tokens: int | None = None
    """Tokens per step (default 2048 for tiny, 8192 otherwise)."""
    seq_len: int | None = None
    """Rows of this length throughout, instead of --stages."""
    stages: str | None = None
    """Row lengths, each with the fraction of the run where it begins (default for tiny: 128@0 512@0.6 2048@0.85)."""
    sparse_at: float | None = None
    """Fraction of the run where attention becomes sparse (default: where the last stage begins, 0.8 if there is one
    only; 1 for never)."""
    indexer_warmup: float | None = None
    """Fraction of the run in which only the indexer learns, right after --sparse-at (default 0.05)."""
    decay: float | None = None
    """Fraction of the run, at its end, over which the learning rate falls to a tenth (default 0.25)."""
    ramp: float | None = None
    """Fraction of the run, at its start, over which the batch grows from a quarter to its full size (default 0)."""
    balance: float | None = None
    """Weight of the sequence-wise balance loss (default 0.0001)."""
    bias_speed: float | None = None
    """What a step adds to or takes from the choosing bias of an expert with too little or too much load (default 0.01 for
    tiny, whose runs are too short for the report's 0.001 to balance anything, 0.001 otherwise)."""
    fim_rate: float | None = None
    """Part of the documents whose middle is moved to their end, for filling in (default 0)."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of forward and backward (default float32); the weights that learn are float32 in either."""
    qat: Literal["plain", "fp8", "fp8-fp4"] | None = None
    """Train for weights stored in FP8, or FP8 with FP4 experts: forward computes with exactly what would be stored."""
    anticipatory: Literal["auto", "off", "always"] | None = None
    """Anticipatory routing: after a loss spike (default), never, or all the time."""
    seed: int | None = None
    """Decides the initial weights and the order of the data (default 0)."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of learning one from the data."""
    resume: bool = False
    """Go on with the run in --out: same data, same options, from its last checkpoint."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (default 100); also how far a run goes back after a loss spike."""
    eval_every: int | None = None
    """Steps between validations (default 250); there is always one at the end."""
    recompute: bool = False
    """Keep only what enters each layer and compute the rest again for the backward pass: a fifth of the memory for long
    rows, a third more time, the same bits."""
    mirror: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there as well."""
    threads: int | None = None
    """CPU threads (default: one per core that others leave free; a resumed run keeps its number)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """End with one JSON object on stdout."""


@dataclass(frozen=True)
class Recipe:
    """The options that decide what is learned, all of them filled in."""

    data: tuple[str, ...]
    text_field: str = "text"
    preset: str = "tiny"
    optimizer: str = "muon"
    lr: float = 0.0
    batch_tokens: int = 0
    stages: str = ""
    sparse_at: float = 1.0
    indexer_warmup: float = 0.05
    decay: float = 0.25
    ramp: float = 0.0
    balance: float = 1e-4
    bias_speed: float = 0.001
    fim_rate: float = 0.0
    precision: str = "float32"
    qat: str = "plain"
    anticipatory: str = "auto"
    seed: int = 0
    tokenizer: str | None = None
    checkpoint_every: int = 100
    eval_every: int = 250

    @property
    def config(self) -> ModelConfig:
        """The preset's shape, with initial weights of standard deviation 1 / sqrt(width).

        The released models' 0.02 suits widths of thousands. For 128 it is four times too small: after 0.3M tokens the
        validation loss of `tiny` was 4.53 nats with 0.02, 4.37 with 0.06, 4.28 with 0.1.
        """
        preset = ModelConfig.preset(self.preset)
        return preset.replace(initializer_range=round(preset.hidden_size**-0.5, 4))

    @property
    def has_indexer(self) -> bool:
        config = self.config
        return any(config.layer_kind(layer) == "csa" for layer in range(config.num_hidden_layers))

    def schedule(self, steps: int) -> Schedule:
        """The run of `steps` steps."""
        return Schedule(
            steps, parse_stages(self.stages), self.batch_tokens, self.sparse_at,
            self.indexer_warmup if self.has_indexer else 0.0, self.decay, self.ramp,
        )  # fmt: skip


def new_recipe(options: PretrainOptions) -> Recipe:
    """Options with the defaults filled in, checked as far as that goes without reading the data.

    Raises:
        RequestError, ConfigError: a value that cannot work; the line names the option.
    """
    if not options.data:
        raise RequestError("--data is missing; give a text file, a folder, a .jsonl or .parquet file, or stdlib")
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe)}
    given["tokenizer"] = None if options.tokenizer is None else str(options.tokenizer)
    recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
    config = recipe.config
    fill: dict[str, Any] = {}
    if options.lr is None:
        fill["lr"] = round(PEAK_LR_AT_128[recipe.optimizer] * math.sqrt(128 / config.hidden_size), 6)
    if options.bias_speed is None and recipe.preset in DEFAULT_BIAS_SPEED:
        fill["bias_speed"] = DEFAULT_BIAS_SPEED[recipe.preset]
    if options.batch_tokens is None:
        fill["batch_tokens"] = DEFAULT_BATCH.get(recipe.preset, OTHER_BATCH)
    if options.seq_len is not None:
        if options.stages is not None:
            raise RequestError("--seq-len and --stages exclude each other; give one")
        if not 3 <= options.seq_len <= config.max_position_embeddings:
            raise RequestError(
                f"--seq-len {options.seq_len} must be from 3 to {config.max_position_embeddings}, the longest this preset "
                "allows"
            )
        fill["stages"] = f"{options.seq_len}@0"
    elif options.stages is None:
        fill["stages"] = DEFAULT_STAGES.get(recipe.preset, OTHER_STAGES)
    recipe = dataclasses.replace(recipe, **fill)
    if options.sparse_at is None:
        stages = parse_stages(recipe.stages)
        recipe = dataclasses.replace(recipe, sparse_at=stages[-1].start if len(stages) > 1 else 0.8)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    stages, longest = parse_stages(recipe.stages), recipe.config.max_position_embeddings
    if not 0 < recipe.lr < 1:
        raise RequestError(f"--lr {recipe.lr:g} must be above 0 and below 1")
    if (most := max(stage.seq_len for stage in stages)) > longest:
        raise RequestError(f"--stages: rows of {most} tokens are longer than {longest}, the longest this preset allows")
    if recipe.batch_tokens < stages[0].seq_len:
        raise RequestError(
            f"--batch-tokens {recipe.batch_tokens} must be at least one row of the first stage, {stages[0].seq_len}"
        )
    for name in ("sparse_at", "indexer_warmup", "decay", "ramp", "fim_rate"):
        if not 0 <= getattr(recipe, name) <= 1:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} {getattr(recipe, name):g} is a fraction; give 0 to 1")
    if recipe.sparse_at < 1 and recipe.sparse_at + recipe.indexer_warmup >= 1:
        raise RequestError(
            f"--sparse-at {recipe.sparse_at:g} and --indexer-warmup {recipe.indexer_warmup:g} leave nothing of the run "
            "for sparse attention; together they must stay below 1"
        )
    for name in ("balance", "bias_speed"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(recipe, name):g} must be 0 or more")
    if recipe.seed < 0:
        raise RequestError(f"--seed {recipe.seed} must not be negative")


def resumed_recipe(options: PretrainOptions, saved: dict[str, Any]) -> Recipe:
    """The recipe a run began with, from its config.json.

    Raises:
        RequestError: an option given again differs from it; only length, threads and device may be new.
    """
    try:
        recipe = Recipe(**{f.name: _tupled(saved[f.name]) for f in dataclasses.fields(Recipe)})
    except KeyError as missing:
        raise RequestError(f"{options.out} is not a pretraining run: its config.json has no {missing}") from None
    for name, value in dataclasses.asdict(recipe).items():
        given = getattr(options, name)
        if given is not None and str(given) != str(value):
            flag = "--" + name.replace("_", "-")
            raise RequestError(
                f"{flag} {_shown(given)} differs from this run's {_shown(value)}; leave it out, a resumed run keeps its own"
            )
    return recipe


def check_length(options: PretrainOptions) -> None:
    """Refuse a length that is none.

    Raises:
        RequestError: both or neither sensible.
    """
    if options.steps is not None and options.minutes is not None:
        raise RequestError("--steps and --minutes exclude each other; give one")
    if options.steps is not None and options.steps < 1:
        raise RequestError(f"--steps {options.steps} must be at least 1")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise RequestError(f"--minutes {options.minutes:g} must be above 0")
    for name in ("checkpoint_every", "eval_every"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
