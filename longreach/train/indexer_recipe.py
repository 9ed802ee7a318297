"""What training of the indexers is asked to be: the command's options, and the recipe they resolve to.

The recipe is what a resumed run must share with its beginning; RUN/config.json holds it. Threads, device and the
checkpoint's place may differ from one sitting to the next.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.train.schedule import learning_rate

PEAK_LR = 0.01
"""Of the dense stage, for models a machine at home trains; DeepSeek-V3.2 took 0.001 with AdamW over 2.1B tokens.

Held-out KL of `tiny` after 0.2M tokens, fresh indexers, 0.148 before: Muon 0.042 with 0.01, 0.043 with 0.03; AdamW 0.065 with
0.001, 0.048 with 0.003, 0.043 with 0.01.
"""

SPARSE_SHARE = 0.1
"""Learning rate of the sparse stage relative to the dense one's: it only refines. V3.2's, 7.3e-6, is lower by far, but
over 943B tokens."""

WARMUP_STEPS = 200
ROW_OF_SELECTIONS = 4
"""Default row length in multiples of what the selection covers."""

BATCH_ROWS = 4
DECAY = 0.25
"""Fraction of each stage, at its end, in which the rate falls to a tenth."""


@dataclass(frozen=True)
class TrainIndexerOptions:
    """Train the lightning indexers of a checkpoint, and nothing else in it.

    While attention is dense each indexer learns where it looks; then, if asked for, it goes on over the entries it selects
    itself. Every other tensor of the result is that of the checkpoint, bit for bit, FP8 and FP4 codes included. Ctrl-C
    saves first.
    """

    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Run directory, or checkpoint directory of either published layout. With --resume only if it has moved."""
    out: Annotated[Path, tyro.conf.arg()] = dataclasses.field(kw_only=True)
    """Run directory to make, or with --resume to go on with."""
    data: tuple[str, ...] | None = None
    """Text files, folders, .jsonl, .parquet, saved Hugging Face datasets, a prepared corpus, or `stdlib`. PATH@WEIGHT
    weighs several. Documents must be long: only what a query does not select teaches it to select."""
    text_field: str | None = None
    """Field of .jsonl records and column of .parquet files that holds the text (default: text)."""
    tokenizer: Path | None = None
    """The tokenizer.json the model was trained with (default: the checkpoint's own)."""
    warmup_steps: int | None = None
    """Steps with dense attention, over all visible entries (default: 200, or what --sparse-steps leaves of --steps)."""
    sparse_steps: int | None = None
    """Steps with sparse attention after them, over the selected entries (default: 0)."""
    steps: int | None = None
    """Steps in all, instead of --warmup-steps."""
    tokens: int | None = None
    """The same, counted in tokens."""
    seq_len: int | None = None
    """Tokens per row (default: four times what the selection covers, index_topk x ratio)."""
    batch_tokens: int | None = None
    """Tokens per step (default: four rows)."""
    optimizer: Literal["muon", "adamw"] | None = None
    """muon (default; AdamW keeps norms and position biases) or adamw for everything."""
    lr: float | None = None
    """Peak learning rate of the dense steps (default 0.01, for small models; 0.001 was used for the released ones)."""
    sparse_lr: float | None = None
    """Of the sparse steps (default: a tenth of --lr; 7.3e-6 was used for the released ones)."""
    reset_indexer: bool = False
    """Begin with random indexers instead of the checkpoint's."""
    seed: int | None = None
    """Decides the order of the data, and the weights of --reset-indexer (default 0)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the frozen model (default: bfloat16 on a GPU if the checkpoint loses nothing by it, else float32).
    The weights that learn are float32 in either."""
    layout: Literal["keep", "official", "transformers"] | None = None
    """Names and config.json of the result (default keep: the checkpoint's)."""
    checkpoint_every: int | None = None
    """Steps between saved states (default 100)."""
    eval_every: int = 100
    """Steps between validations; there is always one before and one at the end."""
    resume: bool = False
    """Go on with the run in --out: same data, same options, from its last saved state."""
    threads: int | None = None
    """CPU threads (default: one per core that others leave free; a resumed run keeps its number)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """End with one JSON object on stdout."""


@dataclass(frozen=True)
class IndexerRecipe:
    """The options that decide what is learned, all of them filled in."""

    data: tuple[str, ...]
    warmup_steps: int
    sparse_steps: int
    seq_len: int
    batch_tokens: int
    lr: float
    sparse_lr: float
    text_field: str = "text"
    tokenizer: str | None = None
    optimizer: Literal["muon", "adamw"] = "muon"
    reset_indexer: bool = False
    seed: int = 0
    dtype: str = "auto"
    layout: Literal["keep", "official", "transformers"] = "keep"
    checkpoint_every: int = 100

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.sparse_steps

    @property
    def rows(self) -> int:
        """Rows per step."""
        return self.batch_tokens // self.seq_len

    def is_dense(self, step: int) -> bool:
        """Whether attention is dense in step `step`, from 0."""
        return step < self.warmup_steps

    def rate(self, step: int) -> float:
        """The learning rate of step `step`: each stage warms up, stays, and falls to a tenth."""
        if self.is_dense(step):
            return self.lr * learning_rate(step, self.warmup_steps, DECAY)
        return self.sparse_lr * learning_rate(step - self.warmup_steps, self.sparse_steps, DECAY)


def new_recipe(options: TrainIndexerOptions, config: ModelConfig, name: str) -> IndexerRecipe:
    """Options with the defaults filled in, checked as far as that goes without reading data and weights.

    Args:
        config: of the checkpoint.
        name: of the checkpoint, for messages.

    Raises:
        RequestError: a value that cannot work, or a model with no indexer; the line names it.
    """
    if not has_indexer(config):
        kinds = sorted({config.layer_kind(layer) for layer in range(config.num_hidden_layers)})
        raise RequestError(
            f"{name} has no CSA layer, so no indexer to train (its attention is {' and '.join(kinds)}); give a V4 "
            "checkpoint with CSA layers"
        )
    if not options.data:
        raise RequestError("--data is missing; give a text file, a folder, a .jsonl or .parquet file, or stdlib")
    seq_len = _row_length(options, config, name)
    batch_tokens = options.batch_tokens if options.batch_tokens is not None else BATCH_ROWS * seq_len
    if batch_tokens < seq_len:
        raise RequestError(f"--batch-tokens {batch_tokens} must be at least one row, {seq_len} tokens")
    warmup_steps, sparse_steps = _lengths(options, batch_tokens // seq_len * seq_len)
    lr = options.lr if options.lr is not None else PEAK_LR
    recipe = IndexerRecipe(
        **_given(options, "text_field", "optimizer", "reset_indexer", "seed", "dtype", "layout", "checkpoint_every"),
        data=options.data,
        tokenizer=None if options.tokenizer is None else str(options.tokenizer),
        warmup_steps=warmup_steps,
        sparse_steps=sparse_steps,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        lr=lr,
        sparse_lr=options.sparse_lr if options.sparse_lr is not None else lr * SPARSE_SHARE,
    )
    for flag, value in (("--lr", recipe.lr), ("--sparse-lr", recipe.sparse_lr)):
        if not 0 < value < 1:
            raise RequestError(f"{flag} {value:g} must be above 0 and below 1")
    if recipe.seed < 0:
        raise RequestError(f"--seed {recipe.seed} must not be negative")
    if recipe.checkpoint_every < 1:
        raise RequestError(f"--checkpoint-every {recipe.checkpoint_every} must be at least 1")
    return recipe


def _row_length(options: TrainIndexerOptions, config: ModelConfig, name: str) -> int:
    covered, longest = config.index_topk * config.csa_ratio, config.max_position_embeddings
    least = covered + config.csa_ratio
    if least > longest:
        raise RequestError(
            f"{name} selects {config.index_topk} entries of {config.csa_ratio} tokens, all that its context of {longest} "
            "tokens holds; there is nothing to learn"
        )
    seq_len = options.seq_len if options.seq_len is not None else min(longest, ROW_OF_SELECTIONS * covered)
    if seq_len < least:
        raise RequestError(
            f"--seq-len {seq_len} is too short: {config.index_topk} selected entries of {config.csa_ratio} tokens cover "
            f"{covered}, so nothing would be left out; give at least {least}, better {ROW_OF_SELECTIONS * covered}"
        )
    if seq_len > longest:
        raise RequestError(f"--seq-len {seq_len} is longer than {longest}, the context of {name}")
    return seq_len


def _lengths(options: TrainIndexerOptions, step_tokens: int) -> tuple[int, int]:
    """(dense steps, sparse steps)."""
    whole = {"--steps": options.steps, "--tokens": options.tokens, "--warmup-steps": options.warmup_steps}
    given = [flag for flag, value in whole.items() if value is not None]
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} exclude each other; give one")
    for flag, value in (*whole.items(), ("--sparse-steps", options.sparse_steps)):
        least = 1 if flag in ("--steps", "--tokens") else 0
        if value is not None and value < least:
            raise RequestError(f"{flag} {value} must be at least {least}")
    sparse_steps = options.sparse_steps or 0
    total = options.steps if options.tokens is None else math.ceil(options.tokens / step_tokens)
    if total is None:
        warmup_steps = WARMUP_STEPS if options.warmup_steps is None else options.warmup_steps
    else:
        warmup_steps = total - sparse_steps
    if warmup_steps < 0:
        raise RequestError(f"--sparse-steps {sparse_steps} is more than the {total} steps of {given[0]}")
    if warmup_steps + sparse_steps == 0:
        raise RequestError("--warmup-steps 0 leaves nothing to do without --sparse-steps")
    return warmup_steps, sparse_steps


def resumed_recipe(options: TrainIndexerOptions, saved: dict[str, Any]) -> IndexerRecipe:
    """The recipe a run began with, from its config.json.

    Raises:
        RequestError: it is another command's run, or an option given again differs from it.
    """
    fields = [field.name for field in dataclasses.fields(IndexerRecipe)]
    if saved.get("command") != "train-indexer" or not set(fields) <= set(saved):
        raise RequestError(f"{options.out} is not a run of train-indexer; leave out --resume and give another --out")
    recipe = IndexerRecipe(**{name: _tupled(saved[name]) for name in fields})
    for name in fields:
        value, kept = getattr(options, name), getattr(recipe, name)
        if value is None or value is False or (name, value) == ("dtype", "auto"):
            continue
        if str(value) != str(kept):
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} {_shown(value)} differs from this run's {_shown(kept)}; leave it out, a resumed run "
                               "keeps its own")  # fmt: skip
    # Another way to say --warmup-steps; what they came to is fixed.
    for flag, value in (("--steps", options.steps), ("--tokens", options.tokens)):
        if value is not None:
            raise RequestError(f"{flag} cannot be given again; a resumed run keeps its {recipe.steps} steps")
    return recipe


def has_indexer(config: ModelConfig, first: int = 0) -> bool:
    """Whether a layer from `first` on, MTP blocks included, has one."""
    return any(config.layer_kind(i) == "csa" for i in range(first, len(config.compress_ratios)))


def _given(options: TrainIndexerOptions, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
