"""Speed and memory of training, beside transformers on the same weights in the same run; and what Muon costs.

    longreach bench train                               ours alone
    longreach bench train --against transformers        both, step by step in turn
    longreach bench train --against transformers --json the same as one JSON object on the last line

A step is forward, next-token loss over all positions, backward, and torch's fused AdamW, the same on both sides. Their
first losses are compared before any speed is shown. Memory is each side's peak in a process of its own beyond weights,
gradients and AdamW's moments. transformers gets its fastest experts, and recomputes its layers (gradient checkpointing)
only where it must to fit. This side keeps everything at those lengths too; the long one alone is trained with recomputing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from longreach.bench.measure import Record, matmul_peak, short
from longreach.bench.memory import measure_in_process
from longreach.bench.peer import TransformersPeer
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.errors import LongreachError, RequestError
from longreach.model.config import ModelConfig
from longreach.model.recompute import recompute_layers
from longreach.model.transformer import Transformer
from longreach.ops.cross_entropy import head_cross_entropy
from longreach.optim.hybrid import make_optimizers
from longreach.optim.newton_schulz import newton_schulz_flops
from longreach.plan.flops import training_macs
from longreach.runtime import choose_device, json_line, set_threads

GIB = 2**30

AGREE = {"float32": 1e-3, "bfloat16": 2e-2}
"""How far the two first losses may be apart, over their size. What remains in float32 are equal index scores, among which
transformers chooses by chance."""

LEARNING_RATE = 1e-4
RECOMPUTE = ("--recompute",)


@dataclass(frozen=True)
class TrainBenchOptions:
    """Measure training steps and their memory, alone or beside transformers, and Muon's cost."""

    preset: str = "bench"
    """Shape to measure, with random weights."""
    against: Literal["nothing", "transformers"] = "nothing"
    """Whom to measure in the same run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of both sides."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    repeats: int = 3
    """Steps of each side per figure; the median counts."""
    lengths: tuple[int, ...] = (1024, 4096)
    """Tokens per step, one text, of both sides."""
    alone: tuple[int, ...] = (16384,)
    """Lengths at which only this side is measured, once, recomputing its layers to save memory."""
    threads: int | None = None
    """CPU threads; default one per core."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


class Trainee:
    """One side's model with its AdamW.

    Attributes:
        arguments: what `python -m longreach.bench.memory` needs to make the same in another process.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor], Tensor], vocabulary: int, arguments: tuple[str, ...]
    ) -> None:
        self.model, self.loss, self.vocabulary, self.arguments = model, loss, vocabulary, arguments
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, tokens: Tensor) -> float:
        """Train on `tokens` and return the loss there was before."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def our_trainee(directory: Path, dtype: torch.dtype, device: torch.device, recompute: bool = False) -> Trainee:
    model = load_model(directory, dtype=dtype, device=device).train()
    recompute_layers(model, recompute)

    def loss(tokens: Tensor) -> Tensor:
        hidden, targets = model.features(tokens).hidden[:, :-1], tokens[:, 1:]
        return head_cross_entropy(hidden.flatten(0, 1), model.head.weight, targets.flatten()) / targets.numel()

    arguments = ("--train", "longreach", *(RECOMPUTE if recompute else ()))
    return Trainee(model, loss, model.config.vocab_size, arguments)


def peer_trainee(
    directory: Path, dtype: torch.dtype, device: torch.device, experts: str | None = None, recompute: bool = False
) -> Trainee:
    """transformers' side; without a name of `experts` on its fastest ones."""
    peer = TransformersPeer(directory, dtype, device)
    vocabulary = peer.model.config.vocab_size
    if experts is None:
        text = torch.randint(0, vocabulary, (1, 512), generator=torch.Generator().manual_seed(1)).to(device)
        experts = peer.tune_training(text)
    peer.train(experts, recompute)
    arguments = ("--train", "transformers", "--experts", experts, *(RECOMPUTE if recompute else ()))
    return Trainee(peer.model, peer.loss, vocabulary, arguments)


@dataclass
class TrainBench(Record):
    """One run: both sides and the text."""

    options: TrainBenchOptions
    config: ModelConfig
    directory: Path
    threads: int
    ours: Trainee
    theirs: Trainee | None
    text: Tensor

    def memory_of(self, side: Trainee, tokens: int, more: tuple[str, ...] = ()) -> dict[str, float]:
        """`measure_in_process` of one step of this side."""
        arguments = (*side.arguments, *more)
        return measure_in_process(
            self.directory, tokens, self.options.dtype, self.threads, str(self.device), arguments
        )  # fmt: skip


def main(options: TrainBenchOptions) -> int:
    """Run the bench and print its table."""
    if options.repeats < 1 or min((*options.lengths, *options.alone), default=2) < 2:
        raise RequestError("--repeats must be at least 1, lengths at least 2 tokens")
    if not options.lengths:
        raise RequestError("--lengths is empty; give at least one")
    choice, threads = choose_device(options.device), set_threads(options.threads)
    device, dtype = choice.value, getattr(torch, options.dtype)
    config = ModelConfig.preset(options.preset)
    if max((*options.lengths, *options.alone)) > config.max_position_embeddings:
        raise RequestError(f"{options.preset} reads {config.max_position_embeddings} tokens; choose shorter lengths")
    print(f"device {choice}, {threads.value} threads, {options.dtype}, preset {options.preset}", flush=True)
    with tempfile.TemporaryDirectory(prefix="longreach-bench-") as folder:
        directory = Path(folder) / "model"
        save_model(Transformer(config, seed=0), directory, layout="transformers")
        generator = torch.Generator().manual_seed(0)
        bench = TrainBench(
            device,
            options.repeats,
            options,
            config,
            directory,
            threads.value,
            our_trainee(directory, dtype, device),
            peer_trainee(directory, dtype, device) if options.against == "transformers" else None,
            torch.randint(0, config.vocab_size, (1, max(options.lengths)), generator=generator).to(device),
        )
        peak = bench.record("matmul_gflops", matmul_peak(dtype, device) / 1e9)
        bench.say(f"best large matmul: {peak:.0f} GFLOP/s")
        _agree(bench)
        _steps(bench, peak)
        _alone(bench)
        _muon(bench, peak)
    bench.say_load()
    if options.json:
        where = {"device": str(choice), "threads": threads.value, "dtype": options.dtype, "preset": options.preset}
        print(json_line({"command": "bench train", **where, "figures": bench.figures}))
    return 0


def _agree(bench: TrainBench) -> None:
    """The first step of both: the same loss from the same weights, or their speeds mean nothing."""
    text = bench.text[:, : min(bench.options.lengths)]
    ours = bench.record("first_loss", bench.ours.step(text))
    if bench.theirs is None:
        bench.say(f"loss of the first step: {ours:.4f}")
        return
    theirs = bench.theirs.step(text)
    difference = bench.record("first_loss_difference", abs(ours - theirs) / theirs)
    bench.say(
        f"loss of the first step: {ours:.6f}, transformers {theirs:.6f}, apart by {difference:.1e} of it; "
        f"its fastest experts here are {bench.theirs.arguments[3]}"
    )
    if not difference <= AGREE[bench.options.dtype]:
        raise LongreachError(f"the two sides do not compute the same: first losses {ours} and {theirs}")


def _steps(bench: TrainBench, peak: float) -> None:
    """Tokens per second and memory at each length, both sides."""
    bench.say("\nforward + loss + backward + AdamW; memory beyond weights, gradients and moments")
    bench.say(
        f"{'tokens':>7} {'ours':>12} {'of peak':>8} {'theirs':>12} {'ratio':>7} "
        f"{'ours':>10} {'theirs':>10} {'ratio':>6} {'others':>7}"
    )
    for tokens in sorted(bench.options.lengths):
        name, text = short(tokens), bench.text[:, :tokens]
        memory = bench.record(f"train_{name}_extra_gib", bench.memory_of(bench.ours, tokens)["extra_bytes"] / GIB)
        their_memory = _peer_memory(bench, tokens) if bench.theirs is not None else None
        calls = [lambda text=text: bench.ours.step(text)]
        if (theirs := bench.theirs) is not None and their_memory is not None:
            calls.append(lambda text=text, theirs=theirs: theirs.step(text))
        clocks = bench.alternate(*calls)
        rate = bench.record(f"train_{name}_tok_s", tokens / clocks[0].median)
        useful = 2 * sum(training_macs(bench.config, tokens).values())
        fraction = bench.record(f"train_{name}_matmul_fraction", useful / clocks[0].median / 1e9 / peak)
        value = ratio = extra = extra_ratio = ""
        if their_memory is not None:
            value = f"{bench.record(f'train_{name}_peer_tok_s', tokens / clocks[1].median):.0f} tok/s"
            ratio = f"{bench.record(f'train_{name}_over_peer', clocks[1].median / clocks[0].median):.2f}x"
            extra = f"{bench.record(f'train_{name}_peer_extra_gib', their_memory):.2f} GiB"
            extra_ratio = f"{bench.record(f'train_{name}_memory_over_peer', memory / their_memory):.2f}"
        elif bench.theirs is not None:
            value = "too large"
        load = max(clock.other_load for clock in clocks)
        bench.say(
            f"{name:>7} {rate:>6.0f} tok/s {fraction:>8.0%} {value:>12} {ratio:>7} "
            f"{memory:>6.2f} GiB {extra:>10} {extra_ratio:>6} {load:>7.2f}"
        )


def _peer_memory(bench: TrainBench, tokens: int) -> float | None:
    """GiB the other side needs at this length, from which on it recomputes its layers if it did not fit without.

    None: it does not fit at all.
    """
    assert bench.theirs is not None
    try:
        return bench.memory_of(bench.theirs, tokens)["extra_bytes"] / GIB
    except RuntimeError:
        if RECOMPUTE[0] in bench.theirs.arguments:
            return None
    dtype = getattr(torch, bench.options.dtype)
    experts = bench.theirs.arguments[3]
    bench.theirs = peer_trainee(bench.directory, dtype, bench.device, experts, recompute=True)
    bench.say(f"transformers does not fit into memory at {tokens} tokens: it recomputes each layer from here on")
    return _peer_memory(bench, tokens)


def _alone(bench: TrainBench) -> None:
    for tokens in bench.options.alone:
        found, name = bench.memory_of(bench.ours, tokens, RECOMPUTE), short(tokens)
        total = bench.record(f"train_{name}_gib", found["peak_bytes"] / GIB)
        extra = bench.record(f"train_{name}_extra_gib", found["extra_bytes"] / GIB)
        rate = bench.record(f"train_{name}_tok_s", tokens / found["seconds"])
        bench.say(
            f"\n{name} tokens, this side only, recomputing its layers: {total:.2f} GiB in all, {extra:.2f} of them extra; "
            f"{rate:.0f} tok/s"
        )


def _muon(bench: TrainBench, peak: float) -> None:
    """One optimizer step: Muon on its share of the weights and AdamW on the rest, against AdamW on all."""
    model = bench.ours.model
    for parameter in model.parameters():
        if parameter.grad is None:  # the indexers, which a training run teaches by a loss of their own
            parameter.grad = torch.randn_like(parameter)
    hybrid = make_optimizers(model, LEARNING_RATE).optimizers
    for optimizer in hybrid.values():
        optimizer.step()  # makes the momentum
    clocks = bench.alternate(hybrid["muon"].step, hybrid["adamw"].step, bench.ours.optimizer.step)
    muon, rest, adamw = (clock.median for clock in clocks)
    weights = [p for group in hybrid["muon"].param_groups for p in group["params"]]
    matrices = [(p.shape[-2:], p.shape[0] if p.dim() == 3 else 1) for p in weights]
    flops = sum(count * newton_schulz_flops(*shape) for shape, count in matrices)
    bench.record("muon_step_seconds", muon)
    bench.record("muon_rest_step_seconds", rest)
    bench.record("adamw_step_seconds", adamw)
    fraction = bench.record("newton_schulz_matmul_fraction", flops / muon / 1e9 / peak)
    shortest = short(min(bench.options.lengths))
    tokens = muon * bench.figures[f"train_{shortest}_tok_s"]
    bench.say(
        f"\nMuon: {muon:.2f} s per optimizer step for {sum(count for _, count in matrices)} matrices, Newton-Schulz at "
        f"{fraction:.0%} of the matmul peak; as long as training on {tokens:.0f} tokens, whatever the batch\n"
        f"AdamW: {adamw:.3f} s for all weights, {rest:.3f} s for those that Muon leaves to it"
    )
