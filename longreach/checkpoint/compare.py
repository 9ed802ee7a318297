"""`longreach compare A B`: are two checkpoints the same model, and if not, where do they part?

    longreach compare models/official models/transformers        two layouts of one model: 0 everywhere
    longreach compare runs/base runs/fp8 --text "Hello"          which operator rounds first

Both are run on the same tokens, one after the other, and every module's output is compared in the order of execution;
the first one beyond the tolerance names the layer and the operator. Parameters are compared by name, matrix by
matrix. Exit code 0 when everything is within the tolerance, 1 when something is not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tokenizers
import torch
import tyro
from torch import Tensor, nn

from longreach.checkpoint.load import load_model
from longreach.checkpoint.reader import Checkpoint
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line, setup_logging

log = logging.getLogger("longreach")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float64": 1e-9}
"""Largest relative difference that the order of additions explains, by dtype."""


_SELECTION = ".selection"


@dataclass(frozen=True)
class CompareOptions:
    """Run two checkpoints on the same tokens and say where they first differ."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """Run directory or checkpoint directory."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """The other one."""
    text: str = ""
    """Text to run, through A's tokenizer. Empty: pseudo-random tokens, the same every time."""
    tokens: int = 256
    """Tokens to run; a longer text is cut."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What both compute in."""
    tolerance: float = 0.0
    """Largest relative difference that counts as equal; 0 takes 1e-4 (float32), 3e-2 (bfloat16) or 1e-9 (float64)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object, with every operator and parameter, instead of the report."""


@dataclass(frozen=True)
class OperatorDifference:
    """How far one operator's output in B is from A's.

    `layer` is None outside the layers. `relative` is the largest difference over the largest magnitude in A; for
    choices (experts, entries) both figures are the fraction of tokens whose set differs.
    """

    layer: int | None
    operator: str
    max_abs: float
    relative: float

    def __str__(self) -> str:
        where = self.operator if self.layer is None else f"layer {self.layer}, {self.operator}"
        return f"{where}: relative {self.relative:.3g}, absolute {self.max_abs:.3g}"


def main(options: CompareOptions) -> int:
    """Print the comparison; 0 when A and B agree within the tolerance, else 1."""
    setup_logging()
    report = compare(options)
    print(json_line(report) if options.json else _text(report))
    return 0 if report["same"] else 1


def compare(options: CompareOptions) -> dict[str, Any]:
    """The comparison as plain JSON values; `same` is the verdict."""
    if options.tokens < 1:
        raise RequestError(f"--tokens {options.tokens} must be at least 1")
    a, b = find_model(options.a), find_model(options.b)
    config_a, config_b = read_config(a), read_config(b)
    tolerance = options.tolerance or TOLERANCE[options.dtype]
    device = choose_device(options.device).value
    tokens = _choose_tokens(options, a, config_a, config_b).to(device)
    log.info(f"comparing parameters of {a} and {b}")
    parameters = compare_parameters(a, config_a, b, config_b)
    operators = compare_outputs(lambda path: load_model(path, DTYPES[options.dtype], device), a, b, tokens)
    beyond = [d for d in operators if not d.relative <= tolerance]
    worst = max(parameters["relative"].values(), default=0.0)
    same = not beyond and not parameters["missing"] and worst <= tolerance
    return {
        "a": str(a),
        "b": str(b),
        "tokens": tokens.shape[1],
        "dtype": options.dtype,
        "tolerance": tolerance,
        "config": _config_differences(config_a, config_b),
        "parameters": parameters,
        "operators": [dataclasses.asdict(d) for d in operators],
        "first_divergence": dataclasses.asdict(beyond[0]) if beyond else None,
        "logits": dataclasses.asdict(next(d for d in operators if d.operator == "head")),
        "same": same,
    }


# ---- parameters ---------------------------------------------------------------------------------------------------


def compare_parameters(a: Path, config_a: ModelConfig, b: Path, config_b: ModelConfig) -> dict[str, Any]:
    """{"compared": count, "relative": {name: largest difference / largest magnitude, if not 0}, "missing": [...]}.

    "missing" names what only one of them has, or has in another shape. Reads both files, one matrix at a time.
    """
    relative: dict[str, float] = {}
    with Checkpoint.open(a) as checkpoint_a, Checkpoint.open(b) as checkpoint_b:
        units_a = {stored.unit.label: stored for stored in checkpoint_a.match(config_a)}
        units_b = {stored.unit.label: stored for stored in checkpoint_b.match(config_b)}
        missing = [f"{label} (only in A)" for label in units_a if label not in units_b]
        missing += [f"{label} (only in B)" for label in units_b if label not in units_a]
        for label, stored_a in units_a.items():
            if (stored_b := units_b.get(label)) is None:
                continue
            if stored_a.unit.shape != stored_b.unit.shape:
                missing.append(f"{label} ({list(stored_a.unit.shape)} in A, {list(stored_b.unit.shape)} in B)")
                continue
            difference = _difference(checkpoint_a.read(stored_a), checkpoint_b.read(stored_b))[1]
            if difference:
                name = stored_a.unit.parameter.name
                relative[name] = max(relative.get(name, 0.0), difference)
    return {"compared": len(units_a), "relative": relative, "missing": missing}


# ---- outputs ------------------------------------------------------------------------------------------------------


def compare_outputs(load: Callable[[Path], Transformer], a: Path, b: Path, tokens: Tensor) -> list[OperatorDifference]:
    """Every operator that both models have, in A's order of execution.

    Only one model is in memory at a time; A's outputs are kept on the CPU.
    """
    log.info(f"running {a}")
    recorded: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int], value: Tensor) -> None:
        recorded[key] = value.to("cpu", copy=True)  # a copy: rotary positions are applied in place, after the hook

    run_recorded(load(a), tokens, keep)
    log.info(f"running {b}")
    figures: dict[tuple[str, int], tuple[float, float]] = {}

    def compare_one(key: tuple[str, int], value: Tensor) -> None:
        if key in recorded:
            figures[key] = _difference(recorded[key], value.cpu())

    run_recorded(load(b), tokens, compare_one)
    return [OperatorDifference(*_place(key[0]), *figures[key]) for key in _in_order(recorded) if key in figures]


def run_recorded(model: Transformer, tokens: Tensor, record: Callable[[tuple[str, int], Tensor], None]) -> None:
    """Run the model and call `record((operator, call), output)` for each output, in the order of execution.

    An operator is a module's name; a gate gives two, its choice and its weights. The selections of CSA layers, which
    are no module's output, follow at the end.
    """
    calls: dict[str, int] = {}

    def say(name: str, value: Tensor) -> None:
        calls[name] = calls.get(name, -1) + 1
        record((name, calls[name]), value.detach())

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                say(name, output)
            elif isinstance(output, tuple) and len(output) == 2 and not output[0].is_floating_point():
                chosen, order = output[0].sort(dim=-1)  # a gate: which of two equal sets comes first means nothing
                say(f"{name}.chosen", chosen)
                say(f"{name}.weights", output[1].gather(-1, order))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    keep = ["selection"] + (["mtp"] if model.mtp and tokens.shape[1] > 1 else [])
    try:
        with torch.no_grad():
            features = model.features(tokens, keep=keep)
            model.head(features.hidden)
    finally:
        for handle in handles:
            handle.remove()
    for layer, chosen in features.selection.items():
        say(f"layers.{layer}.attn{_SELECTION}", chosen.sort(dim=-1).values)


def _in_order(recorded: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """In the order of execution: selections are only known at the end but precede the attention's output."""
    ordered = [key for key in recorded if not key[0].endswith(_SELECTION)]
    for key in recorded:
        if key[0].endswith(_SELECTION):
            ordered.insert(ordered.index((key[0].removesuffix(_SELECTION) + ".wo_b", 0)), key)
    return ordered


def _place(name: str) -> tuple[int | None, str]:
    """(layer, operator) of a module's name; a layer's own output are the residual streams after it."""
    if name.startswith("layers."):
        _, layer, *rest = name.split(".", 2)
        return int(layer), rest[0] if rest else "streams"
    return None, name


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(largest difference, the same over the largest magnitude of `a`); infinite where shapes or NaNs differ."""
    if a.shape != b.shape:
        return math.inf, math.inf
    if a.numel() == 0:
        return 0.0, 0.0
    if not a.is_floating_point() or not b.is_floating_point():
        if a.dim() < 2:
            return (0.0, 0.0) if torch.equal(a.long(), b.long()) else (1.0, 1.0)
        fraction = (a.long() != b.long()).any(dim=-1).double().mean().item()
        return fraction, fraction
    if torch.equal(a, b):
        return 0.0, 0.0
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return math.inf, math.inf
    # equal infinities differ by 0, not by NaN
    largest = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=0.0, posinf=math.inf).max().item()
    magnitude = a.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max().item()
    return largest, largest / magnitude if magnitude else (math.inf if largest else 0.0)


def _choose_tokens(options: CompareOptions, a: Path, config_a: ModelConfig, config_b: ModelConfig) -> Tensor:
    vocab = min(config_a.vocab_size, config_b.vocab_size)
    if not options.text:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab, (1, options.tokens), generator=generator)
    path = a / "tokenizer.json"
    if not path.is_file():
        raise RequestError(f"--text needs {path}, which is absent; leave --text out to run pseudo-random tokens")
    try:
        ids = tokenizers.Tokenizer.from_file(str(path)).encode(options.text, add_special_tokens=False).ids
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise RequestError(f"{path} is no valid tokenizer ({' '.join(str(error).split())})") from None
    if not ids or max(ids) >= vocab:
        raise RequestError(f"--text gives {len(ids)} tokens of {path}, which do not fit the vocabulary of {vocab}")
    return torch.tensor([ids[: options.tokens]])


def _config_differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    of_a, of_b = a.to_dict(), b.to_dict()
    return [f"{name}: {of_a[name]!r} in A, {of_b[name]!r} in B" for name in of_a if of_a[name] != of_b[name]]


def _text(report: dict[str, Any]) -> str:
    lines = [f"A {report['a']}", f"B {report['b']}", ""]
    lines += [f"config differs, {line}" for line in report["config"]]
    parameters = report["parameters"]
    relative = sorted(parameters["relative"].items(), key=lambda item: -item[1])
    lines.append(f"{parameters['compared']:,} matrices compared, {len(relative)} parameters differ")
    lines += [f"  {name}: relative {value:.3g}" for name, value in relative[:5]]
    lines += [f"  missing: {name}" for name in parameters["missing"][:5]]
    if len(parameters["missing"]) > 5:
        lines.append(f"  and {len(parameters['missing']) - 5} more are missing")
    operators = [OperatorDifference(**entry) for entry in report["operators"]]
    lines += ["", f"{report['tokens']} tokens in {report['dtype']}; worst operator of each layer (relative, absolute)"]
    for layer in dict.fromkeys(d.layer for d in operators):
        worst = max((d for d in operators if d.layer == layer), key=lambda d: d.relative)
        place = "outside layers" if layer is None else f"layer {layer}"
        lines.append(f"  {place:<16}{worst.operator:<28}{worst.relative:>10.3g}{worst.max_abs:>12.3g}")
    lines += ["", f"logits: {OperatorDifference(**report['logits'])}"]
    if report["first_divergence"]:
        lines.append(
            f"first divergence beyond {report['tolerance']:g}: {OperatorDifference(**report['first_divergence'])}"
        )
    elif report["same"]:
        lines.append(f"same: nothing differs by more than {report['tolerance']:g}")
    else:
        lines.append(f"different: the outputs agree to {report['tolerance']:g}, the parameters do not")
    return "\n".join(lines)
