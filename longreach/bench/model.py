"""Speed and memory of the model itself, beside transformers on the same weights in the same run.

    longreach bench model                               ours alone
    longreach bench model --against transformers        both, call by call in turn, median of three
    longreach bench model --against transformers --json the same as one JSON object on the last line

Prefill in one call and in chunks, decoding behind a prompt, both arithmetics, peak memory of a long call, bytes of the
cache against its arithmetic, and the fraction of the best large matmul that prefill reaches. Other processes' use of the
machine is printed with every figure: two-thread runs beside a busy core mean little.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from longreach.bench.measure import Record, matmul_peak, short
from longreach.bench.memory import measure_in_process
from longreach.bench.peer import TransformersPeer
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.errors import RequestError
from longreach.model.cache import expected_nbytes
from longreach.model.config import ModelConfig
from longreach.model.decode import NativeStep
from longreach.model.transformer import Transformer
from longreach.native import status
from longreach.plan.flops import prefill_macs
from longreach.runtime import choose_device, json_line, set_threads

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class BenchOptions:
    """Measure prefill, decoding and memory, alone or beside transformers."""

    preset: str = "bench"
    """Shape to measure, with random weights."""
    against: Literal["nothing", "transformers"] = "nothing"
    """Whom to measure in the same run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of both sides."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    repeats: int = 3
    """Calls of each side per figure; the median counts."""
    prefill: tuple[int, ...] = (1024, 4096, 8192, 16384)
    """Prompt lengths."""
    oneshot_limit: int = 8192
    """Longest prompt the other side is given in one call (its memory grows with the square)."""
    decode_at: int = 4096
    """Prompt length behind which decoding is measured."""
    decode_tokens: int = 32
    """Tokens decoded per measurement."""
    memory: tuple[int, ...] = (16384, 65536)
    """Lengths whose peak memory is measured, each in one call in a process of its own; 262144 takes a quarter of an hour."""
    threads: int | None = None
    """CPU threads; default one per core."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


@dataclass
class Bench(Record):
    """One run: both sides and the text."""

    options: BenchOptions
    model: Transformer
    invariant: Transformer
    peer: TransformersPeer | None
    text: Tensor


def main(options: BenchOptions) -> int:
    """Run the bench and print its table."""
    if options.repeats < 1 or options.decode_tokens < 1:
        raise RequestError("--repeats and --decode-tokens must be at least 1")
    choice, threads = choose_device(options.device), set_threads(options.threads)
    device, dtype = choice.value, getattr(torch, options.dtype)
    config = ModelConfig.preset(options.preset)
    longest = max((*options.prefill, options.decode_at + options.decode_tokens))
    if longest > config.max_position_embeddings:
        raise RequestError(f"{longest} tokens are more than the context of {options.preset}; choose shorter lengths")
    print(f"device {choice}, {threads.value} threads, {options.dtype}, preset {options.preset}", flush=True)
    with tempfile.TemporaryDirectory(prefix="longreach-bench-") as folder:
        directory = Path(folder)
        save_model(Transformer(config, seed=0), directory / "model", layout="transformers")
        bench = Bench(
            device,
            options.repeats,
            options,
            load_model(directory / "model", dtype=dtype, device=device).eval(),
            load_model(directory / "model", dtype=dtype, device=device, arithmetic="invariant").eval(),
            TransformersPeer(directory / "model", dtype, device) if options.against == "transformers" else None,
            torch.randint(0, config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0)).to(device),
        )
        with torch.no_grad():
            peak = bench.record("matmul_gflops", matmul_peak(dtype, device) / 1e9)
            bench.say(f"best large matmul: {peak:.0f} GFLOP/s\n")
            _agree(bench)
            _prefill(bench, peak)
            _decode(bench)
            _arithmetics(bench)
            _cache(bench)
            _memory(bench, directory / "model", threads.value)
    bench.say_load()
    if bench.peer is not None:
        bench.say("next: longreach bench model --memory 16384 65536 262144   (growth of memory to 256K tokens)")
    if options.json:
        where = {"device": str(choice), "threads": threads.value, "dtype": options.dtype, "preset": options.preset}
        print(json_line({"command": "bench model", **where, "figures": bench.figures}))
    return 0


def _agree(bench: Bench) -> None:
    """Both sides must say the same before their speeds mean anything."""
    if bench.peer is None:
        return
    text = bench.text[:, :300]
    ours, theirs = bench.model(text, logits_to_keep=1), bench.peer.prefill(text).float()
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    bench.record("logits_difference", difference)
    bench.peer.tune(bench.text[:, : min(4096, bench.text.shape[1])])
    bench.say(
        f"{bench.peer.name}: same weights, logits differ by {difference:.1e} of the largest; "
        f"its best chunk here is {bench.peer.chunk}, its best experts are {bench.peer.experts}"
    )


def _prefill(bench: Bench, peak: float) -> None:
    bench.say(
        f"{'prefill':>9} {'ours':>12} {'of peak':>8} {'one call':>12} {'chunked':>12} {'ratios':>14} {'others':>7}"
    )
    bench.model(bench.text[:, :512], logits_to_keep=1)
    for tokens in bench.options.prefill:
        text = bench.text[:, :tokens]
        calls = [lambda text=text: bench.model(text, logits_to_keep=1)]
        if (peer := bench.peer) is not None:
            calls.append(lambda text=text, peer=peer: peer.prefill(text, peer.chunk))
            if tokens <= bench.options.oneshot_limit:
                calls.append(lambda text=text, peer=peer: peer.prefill(text))
        clocks = bench.alternate(*calls)
        name = short(tokens)
        rate = bench.record(f"prefill_{name}_tok_s", tokens / clocks[0].median)
        useful = 2 * sum(prefill_macs(bench.model.config, tokens).values())
        fraction = bench.record(f"matmul_fraction_{name}", useful / clocks[0].median / 1e9 / peak)
        chunked = oneshot = ratios = ""
        if bench.peer is not None:
            value = bench.record(f"prefill_{name}_chunked_peer_tok_s", tokens / clocks[1].median)
            ratio = bench.record(f"prefill_{name}_over_chunked", clocks[1].median / clocks[0].median)
            chunked, ratios = f"{value:.0f} tok/s", f"{ratio:.2f}x"
            if len(clocks) > 2:
                value = bench.record(f"prefill_{name}_oneshot_peer_tok_s", tokens / clocks[2].median)
                ratio = bench.record(f"prefill_{name}_over_oneshot", clocks[2].median / clocks[0].median)
                oneshot, ratios = f"{value:.0f} tok/s", f"{ratio:.1f}x, {ratios}"
        load = max(clock.other_load for clock in clocks)
        bench.say(
            f"{name:>9} {rate:>6.0f} tok/s {fraction:>8.0%} {oneshot:>12} {chunked:>12} {ratios:>14} {load:>7.2f}"
        )


def _decode(bench: Bench) -> None:
    at, count = bench.options.decode_at, bench.options.decode_tokens
    prompt, new = bench.text[:, :at], bench.text[:, at : at + count]
    cache = bench.model.new_cache(1)
    bench.model(prompt, cache, logits_to_keep=1)

    def ours() -> None:
        for i in range(count):
            bench.model(new[:, i : i + 1], cache, logits_to_keep=1)
        cache.truncate(at)

    calls = [ours]
    if (peer := bench.peer) is not None:
        theirs_cache = peer.new_cache()
        peer.prefill(prompt, peer.chunk, theirs_cache)

        def theirs() -> None:  # it cannot rewind; a few dozen tokens more make no difference at this length
            for i in range(count):
                peer.step(new[:, i : i + 1], theirs_cache)

        calls.append(theirs)
    name = short(at)
    # One-row products are too small to share between threads on many machines: each side gets what suits it.
    threads, best = torch.get_num_threads(), [(float("inf"), 0, 0.0)] * len(calls)
    for n in sorted({1, threads}):
        torch.set_num_threads(n)
        for call in calls:
            call()
        for i, clock in enumerate(bench.alternate(*calls)):
            best[i] = min(best[i], (clock.median, n, clock.other_load))
    torch.set_num_threads(threads)
    rate = bench.record(f"decode_{name}_tok_s", count / best[0][0])
    bench.record("decode_is_compiled", float(NativeStep.of(bench.model) is not None))
    bench.say(f"\ncompiled decoding: {'used, ' if bench.figures['decode_is_compiled'] else 'not used, '}{status()}")
    line = f"decode behind {name}: {rate:.1f} tok/s on {best[0][1]} thread(s)"
    if bench.peer is not None:
        value = bench.record(f"decode_{name}_peer_tok_s", count / best[1][0])
        ratio = bench.record(f"decode_{name}_over_peer", best[1][0] / best[0][0])
        line += f"; {bench.peer.name} {value:.1f} tok/s on {best[1][1]}: {ratio:.2f}x"
    bench.say(f"{line}; others {max(load for _, _, load in best):.2f}")


def _arithmetics(bench: Bench) -> None:
    """The price of invariance: the same prompt and the same decoding in fixed tiles."""
    tokens = min(4096, bench.text.shape[1])
    text = bench.text[:, :tokens]
    fast, fixed = bench.alternate(
        lambda: bench.model(text, logits_to_keep=1), lambda: bench.invariant(text, logits_to_keep=1)
    )
    name = short(tokens)
    bench.record(f"prefill_{name}_invariant_tok_s", tokens / fixed.median)
    ratio = bench.record(f"invariant_over_fast_{name}", fixed.median / fast.median)
    cache = bench.invariant.new_cache(1)
    bench.invariant(text[:, :-8], cache, logits_to_keep=1)
    (step,) = bench.alternate(lambda: [bench.invariant(text[:, i : i + 1], cache) for i in range(tokens - 8, tokens)])
    rate = bench.record(f"decode_{name}_invariant_tok_s", 8 / step.median)
    bench.say(
        f"invariant arithmetic at {name}: prefill {tokens / fixed.median:.0f} tok/s, {ratio:.2f}x the time of fast; "
        f"decode {rate:.1f} tok/s"
    )


def _cache(bench: Bench) -> None:
    tokens = max(bench.options.prefill)
    cache = bench.model.new_cache(1)
    bench.model(bench.text[:, :tokens], cache, logits_to_keep=1)
    expected = expected_nbytes(bench.model.config, tokens, cache.precision)
    ratio = bench.record("cache_over_arithmetic", cache.nbytes / expected)
    bench.record("cache_mib", cache.nbytes / MIB)
    bench.say(
        f"cache at {tokens} tokens: {cache.nbytes / MIB:.1f} MiB, {ratio:.2f}x the arithmetic "
        f"(window, tails and spare room included)"
    )


def _memory(bench: Bench, directory: Path, threads: int) -> None:
    previous: tuple[int, float] | None = None
    for tokens in bench.options.memory:
        found = measure_in_process(directory, tokens, bench.options.dtype, threads, str(bench.device))
        extra = found["extra_bytes"] / GIB
        name = short(tokens)
        bench.record(f"extra_gib_{name}", extra)
        bench.record(f"one_call_{name}_tok_s", tokens / found["seconds"])
        growth = (
            f", {(extra - previous[1]) / (tokens - previous[0]) * GIB:.0f} bytes per further token" if previous else ""
        )
        bench.say(
            f"{name} tokens in one call: {extra:.3f} GiB above the weights{growth}; {tokens / found['seconds']:.0f} tok/s"
        )
        previous = tokens, extra
