"""Adapters and their base as one model: `longreach merge RUN`, for runs with --lora that keep the two apart.

The merged model is written matrix by matrix; the base is never in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longreach.checkpoint.frozen import load_frozen
from longreach.checkpoint.merge import write_merged
from longreach.errors import RequestError
from longreach.rundir import RunDirectory
from longreach.runtime import json_line, log, setup_logging
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.lora import adapt, deltas, read_adapters
from longreach.train.tuning import ADAPTERS, adaptation_of


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Make an ordinary model of a run with --lora: the weights it began with, and its adapters added to them.

    Matrices with an adapter are written in BF16 where they were stored in FP8 or FP4, because rounding them back would lose
    most of what was learned; all others stay as they are. `longreach convert` makes any other format of the result.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory with adapters."""
    out: Path | None = None
    """Checkpoint directory to write (default RUN/model)."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(options: MergeOptions) -> int:
    """Run the command; returns the exit code."""
    setup_logging()
    run = RunDirectory(options.run)
    saved = run.read_config()
    adaptation = adaptation_of(saved)
    if adaptation is None:
        raise RequestError(f"{options.run} is no run with --lora: there is nothing to merge")
    source = Path(saved["source"])
    model = adapt(load_frozen(source), adaptation)
    read_adapters(model, run.path / ADAPTERS)
    changed = deltas(model)
    log.info("%-10s %s and %d adapters of %s", "merging", source, len(changed), run.path / ADAPTERS)
    made = write_merged(source, options.out or run.model_dir, changed, Tokenizer.load(run.tokenizer_path))
    if options.json:
        print(json_line({"command": "merge", "run": str(run.path), "model": str(made), "matrices": len(changed)}))
    else:
        print(f"model: {made}")
        print(f"next: longreach chat {options.out or run.path}")
    return 0
