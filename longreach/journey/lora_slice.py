"""Adapters beside released weights at their full width, on a machine that most people have: `longreach bench lora`

    slice     2 layers of DeepSeek-V4-Flash (one CSA, one HCA), embedding and head, FP8 and FP4 as released, random codes
    a step    forward, next-token loss, backward, AdamW on the adapters; the same tokens every time

The slice is written matrix by matrix to a folder that is deleted afterwards (9 GB), and trained in a process of its own. Codes
stay in the files: what counts as its memory is every page of them that a step has read, and what it allocated itself.
Random weights cost what trained ones cost; that the loss of repeated tokens falls says that gradients are right.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longreach.bench.measure import peak_bytes
from longreach.checkpoint.frozen import load_frozen
from longreach.checkpoint.names import locate
from longreach.checkpoint.save import config_text
from longreach.checkpoint.table import Unit, encoding_of, stored_shapes, tensor_table, units
from longreach.checkpoint.writer import CheckpointWriter
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.feedforward import spread_table
from longreach.model.hyper_connection import HyperConnection, StreamCollapse
from longreach.ops.cross_entropy import head_cross_entropy
from longreach.optim.hybrid import make_optimizers
from longreach.runtime import json_line, log, set_threads, setup_logging
from longreach.train.lora import DEFAULT_TARGETS, TARGETS, Adaptation, adapt

GIB = 2**30
LIMIT_GIB = 12.0
"""What is asked for at Flash's width and 2 layers."""

FP4_RMS, FP8_RMS = 2.93, 0.6
"""Of uniformly random codes: E2M1; E4M3 with exponents of the lower half, so that none is NaN."""


@dataclass(frozen=True)
class LoraBenchOptions:
    """Train adapters on a slice of a released model at its full width, with random weights, and measure memory and time."""

    preset: str = "flash"
    """Shape whose width is kept: flash, pro, or a small one to try the bench itself."""
    layers: int = 2
    """Layers of the slice: CSA and HCA in turn."""
    tokens: int = 512
    """Tokens of a step."""
    steps: int = 4
    """Steps on the same tokens."""
    rank: int = 8
    """Of the adapters."""
    targets: tuple[str, ...] = DEFAULT_TARGETS
    """What gets adapters: attention, shared, experts, head."""
    lr: float = 3e-3
    """Learning rate."""
    folder: Path | None = None
    """Where the slice is written for the time of the bench (default: the system's temporary folder)."""
    threads: int | None = None
    """CPU threads (default: one per core that others leave free)."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(options: LoraBenchOptions) -> int:
    """Run the bench and print its table."""
    setup_logging()
    for name, least in (("layers", 1), ("tokens", 2), ("steps", 2)):
        if getattr(options, name) < least:
            raise RequestError(f"--{name} {getattr(options, name)} must be at least {least}")
    adaptation = Adaptation(options.rank, targets=options.targets)
    config = slice_config(options.preset, options.layers)
    threads = set_threads(options.threads)
    log.info("%-10s %s", "threads", threads)
    folder = Path(tempfile.mkdtemp(prefix="longreach-slice-", dir=options.folder))
    try:
        began = time.perf_counter()
        write_slice(config, folder / "slice")
        written_s = time.perf_counter() - began
        size = sum(path.stat().st_size for path in (folder / "slice").iterdir())
        log.info("%-10s %d layers at width %d, %.2f GB written in %.0f s", "slice", options.layers, config.hidden_size,
                 size / 1e9, written_s)  # fmt: skip
        found = _in_a_process(folder / "slice", options, adaptation, threads.value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {"slice_bytes": size, "write_s": round(written_s, 1), **found}
    losses = found["losses"]
    rows = [
        ("learning", f"{found['learning']:,} of {found['parameters']:,} weights"),
        ("loss", " -> ".join(f"{loss:.3f}" for loss in losses)),
        ("a step", f"{found['step_s']:.1f} s for {options.tokens} tokens; the first {found['first_step_s']:.1f} s"),
        ("loading", f"{found['load_s']:.1f} s"),
        ("memory", f"{found['peak_bytes'] / GIB:.2f} GiB at most, of which {found['anonymous_bytes'] / GIB:.2f} allocated, "
                   "the rest pages of the files"),
    ]  # fmt: skip
    for name, text in rows:
        print(f"{name:<10} {text}")
    if options.preset == "flash" and options.layers == 2:
        verdict = "met" if found["peak_bytes"] <= LIMIT_GIB * GIB else "not met"
        print(f"{'':<10} at most {LIMIT_GIB:g} GiB: {verdict}")
    print(f"{'':<10} loss falls on repeated tokens: {'yes' if losses[-1] < losses[0] else 'no'}")
    if options.json:
        print(json_line({"command": "bench lora", "preset": options.preset, "layers": options.layers,
                         "tokens": options.tokens, "rank": options.rank, "targets": list(options.targets),
                         "threads": threads.value, "figures": figures}))  # fmt: skip
    return 0


# ---- the slice ------------------------------------------------------------------------------------------------------


def slice_config(preset: str, layers: int) -> ModelConfig:
    """A few layers of a shape, CSA and HCA in turn, the first one routed by token id where there is another; no MTP block.

    Raises:
        RequestError: the shape has no such layers.
    """
    whole = ModelConfig.preset(preset)
    kinds = {whole.layer_kind(i): ratio for i, ratio in enumerate(whole.compress_ratios)}
    if whole.attention == "mla" or not {"csa", "hca"} <= kinds.keys():
        raise RequestError(f"--preset {preset} has no CSA and HCA layers; take flash, pro, small or tiny")
    ratios = tuple(kinds["hca" if layer % 2 else "csa"] for layer in range(layers))
    return whole.replace(
        num_hidden_layers=layers, compress_ratios=ratios, num_hash_layers=min(1, layers - 1), num_nextn_predict_layers=0,
        weight_format="fp8-fp4", numerics="official",
    )  # fmt: skip


def write_slice(config: ModelConfig, directory: Path, seed: int = 0) -> None:
    """Write a checkpoint of random weights, never holding more than one matrix: codes are drawn as codes, with scales that give
    each matrix the variance 1 / inputs; everything else as a new model has it."""
    numbers = np.random.Generator(np.random.SFC64(seed))
    streams = HyperConnection(config.hidden_size, config.hc_mult), StreamCollapse(config.hidden_size, config.hc_mult)
    with CheckpointWriter(directory, tensor_table(config, "official"), overwrite=True) as writer:
        for unit in units(config):
            place = locate(unit.parameter.name, unit.expert, is_mla=False, layout="official")
            writer.write_unit(place, *_drawn(unit, config, numbers, *streams))
        writer.write_text("config.json", config_text(config, "official", "BF16"))


def _drawn(
    unit: Unit, config: ModelConfig, numbers: np.random.Generator, connection: HyperConnection, collapse: StreamCollapse
) -> tuple[Tensor, Tensor | None]:
    """(values, scales) of one matrix or vector."""
    name, shape = unit.parameter.name, unit.shape
    owner, leaf = name.split(".")[-2:]
    encoding = encoding_of(unit.parameter, config.weight_format)
    codes, scales = stored_shapes(shape, encoding)
    if scales is not None:
        drawn = torch.from_numpy(numbers.integers(0, 256, codes, dtype=np.uint8))
        rms = FP4_RMS
        if encoding == "fp8":
            drawn, rms = (drawn & 0xBF).view(torch.float8_e4m3fn), FP8_RMS
        byte = 127 + round(math.log2(shape[1] ** -0.5 / rms))
        return drawn.view(torch.int8) if encoding == "fp4" else drawn, torch.full(scales, byte, dtype=torch.uint8)
    if unit.parameter.kind == "int64":
        return spread_table(config.vocab_size, config.n_routed_experts, config.num_experts_per_tok, seed=0), None
    if owner in ("attn_hc", "ffn_hc", "collapse"):
        return getattr(collapse if owner == "collapse" else connection, leaf).detach(), None
    if unit.parameter.kind == "float32":  # sinks, biases of positions and of the router
        return torch.zeros(shape), None
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16), None
    std = config.initializer_range if owner in ("embed", "head") else shape[1] ** -0.5
    generator = torch.Generator().manual_seed(int(numbers.integers(2**31)))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, std, generator=generator), None


# ---- training it ----------------------------------------------------------------------------------------------------


def _in_a_process(directory: Path, options: LoraBenchOptions, adaptation: Adaptation, threads: int) -> dict[str, Any]:
    """What `learn` returns, from a fresh process.

    Raises:
        RequestError: it failed, most often because the machine's free memory did not suffice.
    """
    command = [sys.executable, "-m", "longreach.journey.lora_slice", str(directory), "--threads", str(threads)]
    command += ["--tokens", str(options.tokens), "--steps", str(options.steps), "--lr", str(options.lr)]
    command += ["--rank", str(adaptation.rank), "--targets", *adaptation.targets]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RequestError(f"training the slice failed with exit code {done.returncode}; its last words stand above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def learn(directory: Path, adaptation: Adaptation, tokens: int, steps: int, lr: float) -> dict[str, Any]:
    """Train adapters on repeated random tokens; what it took.

    Returns:
        losses in nats before each step and after the last; seconds; `peak_bytes`, the most that was resident, and of that
        the most that was `anonymous_bytes`, allocated and not mapped.
    """
    began = time.perf_counter()
    model = adapt(load_frozen(directory), adaptation)
    loaded_s = time.perf_counter() - began
    optimizer = make_optimizers(model, lr)
    config = model.config
    text = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        hidden = model.features(text, keep=()).hidden[0, :-1]
        return head_cross_entropy(hidden, model.head.weight, text[0, 1:]) / (tokens - 1)

    losses, seconds = [], []
    with _anonymous_memory() as most:
        for step in range(steps):
            began = time.perf_counter()
            now = loss()
            now.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(now.item())
            seconds.append(time.perf_counter() - began)
            log.info("step %d/%d  loss %.3f  %.1f s", step + 1, steps, losses[-1], seconds[-1])
        with torch.no_grad():
            losses.append(loss().item())
    frozen = sum(math.prod(unit.shape) for unit in units(config) if unit.parameter.kind != "int64")
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "losses": losses, "first_step_s": seconds[0], "step_s": median(seconds[1:]), "load_s": loaded_s,
        "learning": learning, "parameters": frozen + learning, "peak_bytes": peak_bytes(torch.device("cpu")),
        "anonymous_bytes": max(most),
    }  # fmt: skip


@contextmanager
def _anonymous_memory() -> Iterator[list[int]]:
    """Bytes that are allocated and not mapped from files, looked at every twentieth of a second; 0 where nobody says."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            try:
                lines = Path("/proc/self/status").read_text().splitlines()
            except OSError:
                return
            most.append(next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def _child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    for name, kind in (("threads", int), ("tokens", int), ("steps", int), ("rank", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, required=True)
    given = parser.parse_args()
    setup_logging()
    torch.set_num_threads(given.threads)
    adaptation = Adaptation(given.rank, targets=tuple(given.targets))
    print(json.dumps(learn(given.directory, adaptation, given.tokens, given.steps, given.lr)))


if __name__ == "__main__":
    _child()
