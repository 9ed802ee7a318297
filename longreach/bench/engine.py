"""The engine: many requests at once, a prefix after a restart, what caching policies cost, speculation, and the walk.

    longreach bench engine                                   ours alone, on random weights
    longreach bench engine --against transformers --json     beside its `generate`, one JSON object on the last line
    longreach bench engine --run runs/small                  speculation with that model's own MTP block

Every figure names its arithmetic. "Fast" is what the engine does unless told otherwise; "invariant" gives each request the
same bits in any company.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from longreach.bench.measure import Clock, Record, short
from longreach.bench.peer import TransformersPeer
from longreach.bench.walk import walk
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.engine.engine import Engine, EngineOptions
from longreach.engine.llm import LLM
from longreach.engine.memory import POLICIES
from longreach.engine.sampler import token_logprobs
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.paged import page_nbytes, slot_nbytes
from longreach.model.transformer import Transformer
from longreach.native import status
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line, set_threads
from longreach.tokenizer.bpe import Tokenizer

MIB = 2**20
GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
PARTS = ("batch", "arithmetic", "prefix", "policies", "speculation", "walk")


@dataclass(frozen=True)
class EngineBenchOptions:
    """Measure the engine: batches, prefix hits, caching policies, speculation, and that no hit is ever wrong."""

    preset: str = "bench"
    """Shape to measure, with random weights."""
    against: Literal["nothing", "transformers"] = "nothing"
    """Whom to measure in the same run."""
    run: Path | None = None
    """Run or checkpoint with a tokenizer and a trained MTP block, for speculation."""
    prompts: Path | None = None
    """Text file whose pieces are speculation's prompts; default: Python files of the standard library."""
    only: tuple[Literal["batch", "arithmetic", "prefix", "policies", "speculation", "walk"], ...] = PARTS
    """Parts to measure."""
    context: int = 1024
    """Tokens each request has read before decoding is measured."""
    batch: int = 16
    """Requests at once."""
    decode_tokens: int = 32
    """Tokens decoded per request and measurement."""
    prefix: int = 32768
    """Tokens of the prefix that is repeated after a restart."""
    walk: int = 2000
    """Operations of the random walk; 10000 take some minutes."""
    repeats: int = 3
    """Measurements per figure; the median counts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; default one per core."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


@dataclass
class Bench(Record):
    """One run."""

    options: EngineBenchOptions
    config: ModelConfig
    directory: Path
    threads: int

    def model(self, arithmetic: str = "fast") -> Transformer:
        return load_model(self.directory, device=self.device, arithmetic=arithmetic).eval()

    def prompts(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config.vocab_size, (count, length), generator=generator).tolist()


def main(options: EngineBenchOptions) -> int:
    """Run the bench."""
    for name in ("context", "batch", "decode_tokens", "prefix", "walk", "repeats"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more")
    choice, threads = choose_device(options.device), set_threads(options.threads)
    config = ModelConfig.preset(options.preset)
    longest = max(options.context + options.decode_tokens + 2, options.prefix + 2)
    if longest > config.max_position_embeddings:
        raise RequestError(f"{longest} tokens are more than the context of {options.preset}; choose shorter lengths")
    print(
        f"device {choice}, {threads.value} threads, float32, preset {options.preset}; compiled: {status()}", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="longreach-bench-") as folder:
        directory = Path(folder) / "model"
        save_model(Transformer(config, seed=0), directory, layout="transformers")
        bench = Bench(choice.value, options.repeats, options, config, directory, threads.value)
        parts = {
            "batch": _batch, "arithmetic": _arithmetic, "prefix": _prefix, "policies": _policies,
            "speculation": _speculation, "walk": _walk,
        }  # fmt: skip
        for name in PARTS:
            if name in options.only:
                parts[name](bench)
    bench.say_load()
    bench.say("next: longreach generate RUN PROMPT --speculation lookup   or   longreach chat RUN --disk-cache DIR")
    if options.json:
        where = {"device": str(choice), "threads": threads.value, "dtype": "float32", "preset": options.preset}
        print(json_line({"command": "bench engine", **where, "figures": bench.figures}))
    return 0


# ---- decoding many at once ---------------------------------------------------------------------------------------------


class Batch:
    """Requests that have read their prompts and now decode, a token each per step."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        tokens += 2 * len(prompts)  # the first to be read decode while the last are
        pages = sum(-(-(len(p) + tokens + 2) // 128) + 1 for p in prompts)
        room = len(prompts) * slot_nbytes(model.config, "float32") + pages * page_nbytes(model.config, "float32")
        options = EngineOptions(
            max_running=len(prompts),
            memory_gib=(room + MIB) / 2**30,
            prefix_cache=False,
            step_tokens=model.chunk_tokens,
        )
        self.engine = Engine(model, None, options)
        for prompt in prompts:
            self.engine.submit(prompt, SamplingParams(max_tokens=tokens + 1, temperature=0.0))
        self.count = len(prompts)
        while sum(request.is_decoding for request in self.engine.scheduler.running) < self.count:
            self.engine.step()

    def steps(self, count: int) -> tuple[float, float]:
        """Tokens per second, and the share of the time that was not the model's forward."""
        forward, began = self.engine.runner.forward_s, time.perf_counter()
        made = sum(len(output.tokens) for _ in range(count) for output in self.engine.step())
        took = time.perf_counter() - began
        assert made == count * self.count
        return made / took, 1 - (self.engine.runner.forward_s - forward) / took


def _decode(bench: Bench, model: Transformer, batch: int) -> tuple[float, float, int]:
    """Best tokens/s over thread counts (median of the repeats), its overhead, and its threads."""
    o, best = bench.options, (0.0, 0.0, 0)
    prompts = bench.prompts(batch, o.context)
    rounds = Batch(model, prompts, o.decode_tokens * (o.repeats * 2 + 1))
    rounds.steps(2)
    for threads in sorted({1, bench.threads}):
        torch.set_num_threads(threads)
        found: list[tuple[float, float]] = []
        (clock,) = bench.alternate(lambda found=found: found.append(rounds.steps(o.decode_tokens)))
        del clock
        middle = sorted(found)[len(found) // 2]
        best = max(best, (*middle, threads))
    torch.set_num_threads(bench.threads)
    return best


def _batch(bench: Bench) -> None:
    o, name = bench.options, short(bench.options.context)
    model = bench.model()
    one, _, one_threads = _decode(bench, model, 1)
    many, overhead, many_threads = _decode(bench, model, o.batch)
    bench.record("decode_batch1_tok_s", one)
    bench.record(f"decode_batch{o.batch}_tok_s", many)
    ratio = bench.record(f"batch{o.batch}_over_batch1", many / one)
    bench.record("engine_overhead", overhead)
    bench.say(
        f"\ndecode behind {name}, fast arithmetic: one request {one:.1f} tok/s ({one_threads} threads), {o.batch} requests "
        f"{many:.1f} tok/s ({many_threads} threads): {ratio:.2f}x; {overhead:.1%} of a step is not the model"
    )
    if o.against == "transformers":
        peer = TransformersPeer(bench.directory, torch.float32, bench.device)
        text = torch.tensor(bench.prompts(o.batch, o.context), device=bench.device)
        best = (0.0, 0)
        for threads in sorted({1, bench.threads}):
            torch.set_num_threads(threads)
            peer.tune_generation(text[:, :128])
            steps: list[float] = []
            clock = Clock()
            with clock.measure(bench.device):
                steps += peer.generate(text, 1 + o.decode_tokens)
            bench.loads += clock.others
            best = max(best, (o.batch / statistics.median(steps), threads))
        torch.set_num_threads(bench.threads)
        theirs = bench.record(f"decode_batch{o.batch}_peer_tok_s", best[0])
        ratio = bench.record(f"batch{o.batch}_over_peer", many / theirs)
        bench.say(
            f"{peer.name} generate, {o.batch} rows, {peer.experts} experts: {theirs:.1f} tok/s ({best[1]} threads), "
            f"reading the prompt not counted: ours is {ratio:.2f}x"
        )


def _arithmetic(bench: Bench) -> None:
    """What independence from one's company costs."""
    o = bench.options
    fast, fixed = bench.model(), bench.model("invariant")
    tokens = min(4096, bench.config.max_position_embeddings)
    (prompt,) = bench.prompts(1, tokens)

    def read(model: Transformer) -> None:
        LLM(model, prefix_cache=False, max_running=1, memory_gib=0.2).generate(prompt, GREEDY)

    for model in (fast, fixed):
        read(model)
    clocks = bench.alternate(lambda: read(fast), lambda: read(fixed))
    name = short(tokens)
    part = bench.record("invariant_over_fast_prefill", clocks[0].median / clocks[1].median)
    bench.record(f"prefill_{name}_invariant_tok_s", tokens / clocks[1].median)
    bench.say(
        f"\ninvariant arithmetic: prefill of {name} at {tokens / clocks[1].median:.0f} tok/s, {part:.0%} of the fast "
        f"arithmetic's speed ({tokens / clocks[0].median:.0f} tok/s)"
    )
    for batch in (1, o.batch):
        a, b = _decode(bench, fast, batch)[0], _decode(bench, fixed, batch)[0]
        part = bench.record(f"invariant_over_fast_batch{batch}", b / a)
        bench.say(f"decoding {batch} request(s): {b:.1f} tok/s, {part:.0%} of fast ({a:.1f} tok/s)")
    _rollout(bench, fixed)


def _rollout(bench: Bench, model: Transformer) -> None:
    """Log-probabilities as the engine reports them beside those a trainer computes, with gradients, for the same tokens."""
    (prompt,) = bench.prompts(1, 200, seed=5)
    params = SamplingParams(max_tokens=64, temperature=1.0, seed=1, logprobs=0)
    (rollout,) = LLM(model, max_running=1, memory_gib=0.2).generate(prompt, params)
    tokens = torch.tensor([prompt + rollout.token_ids], device=bench.device)
    logits = model.head(model.features(tokens[:, :-1]).hidden)[0, len(prompt) - 1 :]
    trained = token_logprobs(logits, tokens[0, len(prompt) :]).detach().cpu()
    reported = torch.tensor([s.logprob for s in rollout.logprobs or ()])
    difference = bench.record("rollout_training_difference", float((trained - reported).abs().max()))
    bench.say(
        f"log-probabilities of 64 sampled tokens, engine against training forward: largest difference {difference:g}"
    )


# ---- prefixes ----------------------------------------------------------------------------------------------------------


def _prefix(bench: Bench) -> None:
    """The same long prompt in two processes, one after the other, with a disk tier between them."""
    name = short(bench.options.prefix)
    for arithmetic in ("fast", "invariant"):
        with tempfile.TemporaryDirectory(prefix="longreach-bench-disk-") as disk:
            found = [_in_process(bench, disk, arithmetic) for _ in range(2)]
            size = sum(path.stat().st_size for path in Path(disk).rglob("*") if path.is_file())
        cold, warm = found
        bench.loads += [process["other_load"] for process in found]
        suffix = "" if arithmetic == "fast" else "_invariant"
        bench.record(f"cold_{name}_s{suffix}", cold["first_token_s"])
        bench.record(f"warm_{name}_s{suffix}", warm["first_token_s"])
        ratio = bench.record(f"warm_over_cold_{name}{suffix}", cold["first_token_s"] / warm["first_token_s"])
        same = cold["token"] == warm["token"] and (arithmetic == "fast" or cold["logprob"] == warm["logprob"])
        bench.record(f"warm_equals_cold{suffix}", float(same))
        bench.say(
            f"\nprefix of {name} tokens, {arithmetic} arithmetic: first token cold after {cold['first_token_s']:.2f} s; after "
            f"a restart, from {size / MIB:.0f} MiB on disk, after {warm['first_token_s']:.3f} s ({ratio:.0f}x sooner, "
            f"{warm['cached']:.0f} tokens cached, engine opened in {warm['open_s']:.2f} s); log-probability differs by "
            f"{abs(cold['logprob'] - warm['logprob']):.1e}"
        )


def _in_process(bench: Bench, disk: str, arithmetic: str) -> dict[str, float]:
    command = [sys.executable, "-m", "longreach.bench.engine", str(bench.directory), disk, arithmetic]
    command += [str(bench.options.prefix), str(bench.threads), str(bench.device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _first_token(directory: str, disk: str, arithmetic: str, tokens: int, threads: int, device: str) -> None:
    """The child process of `_in_process`: one request, from the loaded model to its first token."""
    torch.set_num_threads(threads)
    model = load_model(directory, device=device, arithmetic=arithmetic).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (tokens,), generator=generator).tolist()
    pages = tokens // 128 + 8
    room = slot_nbytes(model.config, "float32") + pages * page_nbytes(model.config, "float32")
    began = time.perf_counter()
    llm = LLM(model, max_running=1, memory_gib=room / 2**30 + 0.01, disk_cache=Path(disk))
    opened = time.perf_counter() - began
    model(torch.tensor([prompt[:8]], device=device))  # what a process does once: compiled code is loaded, buffers made
    clock = Clock()
    with clock.measure(torch.device(device)):
        (answer,) = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0, logprobs=0))
    llm.close()
    assert answer.logprobs is not None and answer.logprobs[0].logprob is not None
    found = {
        "first_token_s": clock.median, "open_s": opened, "cached": answer.cached_tokens, "token": answer.token_ids[0],
        "logprob": answer.logprobs[0].logprob, "other_load": clock.other_load,
    }  # fmt: skip
    print(json.dumps(found))


def _policies(bench: Bench) -> None:
    """What each policy keeps, and what a text that leaves an earlier one in its middle must read again."""
    tokens = min(8192, bench.config.max_position_embeddings // 2)
    shared = tokens * 5 // 8 + 37
    first, other = bench.prompts(2, tokens, seed=2)
    branch = first[:shared] + other[: tokens // 64]
    model = bench.model()
    bench.say(
        f"\npolicies: a text of {short(tokens)} tokens is read, then one that shares its first {shared} and has "
        f"{len(branch) - shared} of its own (fast arithmetic)\n{'policy':>10} {'state MiB':>10} {'read again':>11} {'seconds':>8}"
    )
    for policy in POLICIES:
        llm = LLM(model, max_running=2, memory_gib=0.5, checkpoint_gib=4.0, checkpoints=policy, period=2048)
        llm.generate(first, GREEDY)
        kept = llm.engine.memory.index.checkpoint_bytes / MIB
        began = time.perf_counter()
        (answer,) = llm.generate(branch, GREEDY)
        took = time.perf_counter() - began
        again = shared - answer.cached_tokens
        bench.record(f"policy_{policy}_state_mib", kept)
        bench.record(f"policy_{policy}_read_again", again)
        bench.record(f"policy_{policy}_s", took)
        bench.say(f"{policy:>10} {kept:>10.1f} {again:>11} {took:>8.2f}")
    pages = tokens // 128 * page_nbytes(bench.config, "float32") / MIB
    bench.record("policy_pages_mib", pages)
    bench.say(f"the compressed entries and index keys of the first text are {pages:.1f} MiB in every policy")


# ---- speculation and truth -----------------------------------------------------------------------------------------------


def _speculation(bench: Bench) -> None:
    """Decoding with and without guesses, one request at a time, on real text with a trained model."""
    o = bench.options
    if o.run is None:
        bench.say("\nspeculation: not measured; give --run a trained model with an MTP block")
        return
    directory = find_model(o.run)
    tokenizer, model = Tokenizer.load(directory), load_model(directory, device=bench.device).eval()
    prompts = [tokenizer.encode(text)[:192] for text in _texts(o.prompts, 8)]
    kinds = ["off", "lookup", *(["mtp"] if model.mtp else [])]
    tokens = 96
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    bench.say(
        f"\nspeculation with {o.run}, {len(prompts)} prompts of 192 tokens of text, {tokens} new ones each, one request at a "
        f"time, greedy, fast arithmetic"
    )
    best: dict[str, tuple[float, int]] = {}
    texts: dict[str, list[list[int]]] = {}
    for kind in kinds:
        for drafts in (1, 2, 3) if kind != "off" else (1,):
            llm = LLM(model, tokenizer=tokenizer, max_running=1, memory_gib=0.2, speculation=kind, draft_tokens=drafts)
            made: list[list[int]] = []
            llm.generate(prompts[0], params)

            def decode(llm: LLM = llm, made: list[list[int]] = made) -> None:
                made[:] = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]

            decode()  # every prompt is in the prefix cache now: what is timed is decoding
            (clock,) = bench.alternate(decode)
            rate = len(prompts) * tokens / clock.median
            stats = llm.engine.stats
            acceptance = stats.accepted / stats.drafted if stats.drafted else 0.0
            texts.setdefault(kind, made)
            assert made == texts["off"], "guessing changed a token"
            if kind != "off":
                bench.record(f"acceptance_{kind}_{drafts}", acceptance)
                bench.record(f"speculation_{kind}_{drafts}", rate / best["off"][0])
                bench.say(
                    f"{kind:>8}, {drafts} guessed: {rate:7.1f} tok/s, {rate / best['off'][0]:.2f}x, {acceptance:.0%} accepted"
                )
            else:
                bench.record("speculation_off_tok_s", rate)
                bench.say(f"{kind:>8}           : {rate:7.1f} tok/s")
            best[kind] = max(best.get(kind, (0.0, 0)), (rate, drafts))
    for kind in kinds[1:]:
        bench.record(f"speculation_{kind}_best", best[kind][0] / best["off"][0])
    bench.say("the tokens are the same in every row")


def _texts(path: Path | None, count: int) -> list[str]:
    """Pieces of text to continue: of the given file, or of modules of the standard library."""
    if path is not None:
        try:
            whole = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read prompts from {path}: {error}") from None
        size = max(1, len(whole) // count)
        return [whole[i * size : (i + 1) * size] for i in range(count)]
    folder = Path(json.__file__).parent.parent
    names = ("argparse", "heapq", "tarfile", "statistics", "textwrap", "shlex", "zipapp", "sched")
    return [(folder / f"{name}.py").read_text(encoding="utf-8")[2000:6000] for name in names[:count]]


def _walk(bench: Bench) -> None:
    began = time.perf_counter()
    result, lies = walk(bench.options.walk)
    bench.record("wrong_hits", result.wrong_hits)
    bench.record("wrong_reports", result.wrong_reports)
    bench.record("crossed_tenants", result.crossed)
    bench.record("walk_operations", result.operations)
    bench.record("walk_hit_tokens", result.hit_tokens)
    bench.say(
        f"\nrandom walk of {result.operations} operations, invariant arithmetic: {result.finished} requests, {result.hits} with "
        f"a hit ({result.hit_tokens} tokens), {result.restarts} restarts, {result.preemptions} set aside, {result.damaged} files "
        f"damaged; {result.wrong_hits} wrong hits, {result.wrong_reports} wrong reports, {result.crossed} across tenants, "
        f"in {time.perf_counter() - began:.0f} s"
    )
    for line in lies[:10]:
        bench.say(f"  {line}")


if __name__ == "__main__":
    _first_token(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
