"""One model from several by averaging their weights: `longreach average runs/math runs/code --out runs/mean`.

    w = Σ_i α_i w_i,    Σ α_i = 1                  every weight and every router bias, summed in float64

The cheapest way to join specialists, and the baseline beside distillation. It means something only for models that were
trained on from one start: those still lie in one valley, while two trainings from different starts number their experts and
channels differently. Tables that route tokens by id must be one and the same. Memory: one model and one matrix.
Source: Wortsman et al., "Model soups" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from longreach.checkpoint.load import load_model
from longreach.checkpoint.reader import Checkpoint
from longreach.checkpoint.save import save_model
from longreach.errors import RequestError
from longreach.model.config_io import read_config
from longreach.model.transformer import Transformer
from longreach.rundir import RunDirectory, find_model
from longreach.runtime import json_line, log, setup_logging
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.teachers import check_same_vocabulary


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Average the weights of models that were trained on from one start."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")]
    """Run or checkpoint directories, at least two, of one shape and one tokenizer."""
    out: Path
    """Run directory to make."""
    weights: str | None = None
    """Their shares, such as 0.5,0.3,0.2; they are divided by their sum. Default: equal ones."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(options: AverageOptions) -> int:
    """Run the command."""
    setup_logging()
    run = RunDirectory(options.out)
    run.check_new()
    shares = read_shares(options.weights, len(options.runs))
    sources = [find_model(path) for path in options.runs]
    tokenizer = Tokenizer.load(sources[0])
    for source in sources[1:]:
        check_same_vocabulary(sources[0], tokenizer, source, Tokenizer.load(source))
    model = averaged(sources, shares)
    run.create({"command": "average", "sources": [str(source) for source in sources], "weights": list(shares)})
    tokenizer.save(run.tokenizer_path)
    save_model(model, run.model_dir, tokenizer=tokenizer)
    for source, share in zip(sources, shares, strict=True):
        log.info("%6.3f  %s", share, source)
    if options.json:
        figures = {"models": len(sources), "parameters": sum(p.numel() for p in model.parameters())}
        print(json_line({"command": "average", "run": str(run.path), "model": str(run.model_dir), "weights": list(shares),
                         "figures": figures}))  # fmt: skip
    else:
        print(f"model: {run.model_dir}")
        print(f"next: longreach evaluate {run.path} --task arithmetic")
    return 0


def read_shares(text: str | None, count: int) -> tuple[float, ...]:
    """`0.5,0.3,0.2` as shares that sum to 1; None as equal ones.

    Raises:
        RequestError: fewer than two models, no numbers, another number of them, a negative one, or nothing but zeros.
    """
    if count < 2:
        raise RequestError(f"an average needs at least two models; {count} given")
    if text is None:
        return (1 / count,) * count
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--weights {text!r} are no numbers; write for example 0.5,0.5") from None
    if len(given) != count:
        raise RequestError(f"--weights {text} are {len(given)} for {count} models; give one for each")
    total = sum(given)
    if min(given) < 0 or not 0 < total < math.inf:
        raise RequestError(f"--weights {text}: shares must not be negative, and one at least must be above 0")
    return tuple(part / total for part in given)


@torch.no_grad()
def averaged(directories: Sequence[Path], shares: Sequence[float]) -> Transformer:
    """The weighted mean of checkpoints, in float32 (what the model keeps as whole numbers stays so).

    Args:
        shares: sum to 1.

    Raises:
        RequestError: the shapes or settings of two models differ, or their tables of hash-routed experts.
        ConfigError, CheckpointError: one cannot be read.
    """
    configs = [read_config(directory) for directory in directories]
    first = configs[0].to_dict()
    for directory, config in zip(directories[1:], configs[1:], strict=True):
        if names := [name for name, value in config.to_dict().items() if value != first[name]]:
            here, there = config.to_dict()[names[0]], first[names[0]]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RequestError(
                f"{directory} has {names[0]}={here!r}, {directories[0]} {there!r}{more}; only models of one config can be "
                "averaged"
            )
    model = load_model(directories[0], dtype=torch.float32)
    state = model.state_dict()
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(directory)) for directory in directories]
        kept = [checkpoint.match(configs[0]) for checkpoint in opened]
        for places in zip(*kept, strict=True):
            unit = places[0].unit
            target = state[unit.parameter.name]
            if unit.expert is not None:
                target = target[unit.expert]
            parts = [checkpoint.read(place) for checkpoint, place in zip(opened, places, strict=True)]
            if not target.dtype.is_floating_point:
                for directory, part in zip(directories[1:], parts[1:], strict=True):
                    if not torch.equal(part, parts[0]):
                        raise RequestError(
                            f"{directory} routes tokens by another table than {directories[0]} ({unit.label}); models that "
                            "did not start from the same weights cannot be averaged"
                        )
                continue
            mean = torch.zeros(target.shape, dtype=torch.float64)
            for share, part in zip(shares, parts, strict=True):
                mean.add_(part.double(), alpha=share)
            target.copy_(mean)
    return model
