"""Text from a model: `longreach generate runs/quickstart "def read_lines(path):"`.

A face of the engine for one prompt, which may be continued several times at once (`--n`): the first continuation reads the
prompt, the others go on from its cached state. For programs there is `longreach.LLM`.

Here are also the options that every command speaking to the engine has, each declared once: `SamplingOptions` (how tokens
are chosen) and `RunOptions` (where and how the model runs, and the cache it uses).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longreach.engine.engine import Engine, EngineOptions, Output, Precision
from longreach.engine.grammar import compile_grammar
from longreach.engine.llm import LLM, Completion, completion
from longreach.engine.sampler import Sampled
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.native import status
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line, log, set_threads, setup_logging
from longreach.tokenizer.bpe import Tokenizer

AT_ONCE = 16
"""Continuations that run side by side; more of them wait for a place."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, as options of a command; names and meanings are those of `SamplingParams`."""

    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples as the model believes; higher is wilder."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together have this probability; 1 leaves none out."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 leaves none out."""
    min_p: float = 0.0
    """Leave out tokens with less than this fraction of the likeliest one's probability; 0 leaves none out."""
    repetition_penalty: float = 1.0
    """Make tokens of prompt and text less likely by this factor of their logit; 1 changes nothing."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time it was generated."""
    presence_penalty: float = 0.0
    """Subtract this once from the logit of every token that was generated."""
    max_tokens: int = 256
    """Stop after this many tokens, or sooner at the end of the text."""
    seed: int = 0
    """The same seed gives the same text."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End the text before this string. In bash $'\\n' is a line end."""
    regex: str | None = None
    """Only text that as a whole matches this regular expression."""
    json_schema: Path | None = None
    """Only JSON that the schema in this file accepts."""
    choice: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only this text, or one of several."""

    def params(self, tokenizer: Tokenizer, **more: Any) -> SamplingParams:
        """These options, and `more` fields of `SamplingParams`, checked.

        Raises:
            RequestError: a value out of range, a grammar that cannot be used, or a schema file that cannot be read.
        """
        params = SamplingParams(**{name: getattr(self, name) for name in SAMPLING_NAMES}, **more)
        params.check(tokenizer.vocab_size)
        if self.regex is None and self.json_schema is None and not self.choice:
            return params
        schema = _read_text(self.json_schema) if self.json_schema is not None else None
        grammar = compile_grammar(tokenizer, regex=self.regex, json_schema=schema, choice=self.choice or None)
        return dataclasses.replace(params, grammar=grammar)


SAMPLING_NAMES = tuple(
    field.name
    for field in dataclasses.fields(SamplingOptions)
    if field.name in {param.name for param in dataclasses.fields(SamplingParams)}
)
"""The options that are parameters of a request just as they are: all but the three forms of a grammar."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how the model runs, as options of a command."""

    arithmetic: Literal["fast", "invariant"] = "fast"
    """fast, or invariant: results independent, to the bit, of what runs beside them, of the cache and of speculation."""
    precision: Precision | None = None
    """How the cache keeps entries; released is FP8 and 4 bits, None the model's own data type."""
    memory_gib: float = 1.0
    """For the cache in memory."""
    disk_cache: Path | None = None
    """Directory where the cache outlives this command; None keeps it in memory alone."""
    speculation: Literal["off", "lookup", "mtp"] = "off"
    """Guess tokens and check several in one pass: lookup (from the text itself) or mtp (the model's draft block)."""
    draft_tokens: int = 3
    """Tokens guessed at a time."""
    threads: int | None = None
    """CPU threads; None takes one per core that other processes leave free."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def open(self, name: Path, tokenizer: Tokenizer, max_running: int = 1) -> LLM:
        """Load the model at `name` into an engine, and log what was decided and why.

        Args:
            max_running: requests at once.

        Raises:
            LongreachError: an option that makes no sense, or a model that cannot be loaded.
        """
        options = EngineOptions(
            max_running=max_running, memory_gib=self.memory_gib, precision=self.precision, disk_cache=self.disk_cache,
            speculation=self.speculation, draft_tokens=self.draft_tokens,
        )  # fmt: skip
        options.check()  # before the weights are read, which may take long
        device, threads = choose_device(self.device), set_threads(self.threads)
        llm = LLM(name, options, tokenizer=tokenizer, arithmetic=self.arithmetic, device=str(device.value))
        dtype = str(llm.engine.model.dtype).removeprefix("torch.")
        log.info("%s: %s on %s, threads: %s", name, dtype, device, threads)
        decided = [f"{self.arithmetic} arithmetic"]
        if device.value.type == "cpu":
            decided.append(f"compiled decoding: {status()}")
        tiers = "memory" if self.disk_cache is None else f"memory and {self.disk_cache}"
        decided.append(f"cache: {llm.engine.precision} in {tiers}")
        if self.speculation != "off":
            decided.append(f"speculation: {self.speculation}, {self.draft_tokens} tokens at a time")
        log.info("%s", "; ".join(decided))
        return llm


@dataclass(frozen=True)
class GenerateOptions(RunOptions, SamplingOptions):
    """Continue a prompt, token by token.

    The continuation goes to stdout as it is made, everything else to stderr.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Run directory, or checkpoint directory of either published layout."""
    prompt: Annotated[str, tyro.conf.Positional]
    """Text to continue; - reads it from standard input."""
    n: int = 1
    """Continue the prompt this many times at once, with seeds counted up from --seed."""
    logprobs: int | None = None
    """Show the log-probability of each token (0), and of this many likeliest alternatives."""
    json: bool = False
    """Print one JSON object at the end instead of the text as it comes."""


# ---- what the commands share ----------------------------------------------------------------------------------------


class Stopwatch:
    """When the first token of an answer came and how fast the others followed; several answers at once count as one.

    Attributes:
        tokens: how many came.
        seconds: from the start to the last of them; first_s: to the first, None before it.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._at_first = 0
        self.tokens, self.seconds = 0, 0.0
        self.first_s: float | None = None

    def push(self, tokens: int) -> None:
        """So many tokens came just now."""
        if not tokens:
            return
        self.seconds = time.perf_counter() - self._begin
        self.tokens += tokens
        if self.first_s is None:
            self.first_s, self._at_first = self.seconds, tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Of decoding: the first token comes out of the prompt's pass and does not count. None without a second one."""
        if self.first_s is None or self.tokens == self._at_first:
            return None
        return (self.tokens - self._at_first) / (self.seconds - self.first_s)

    def __str__(self) -> str:
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return f"{speed}, first after {self.first_s or 0:.2f} s".removeprefix(", ")


def counted_seed(seed: int, place: int) -> int:
    """The seed of the continuation, or answer, at `place`: counted up from `seed`, and round again after 2^63 - 1."""
    return (seed + place + 2**63) % 2**64 - 2**63


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: GenerateOptions) -> int:
    """Run the command."""
    setup_logging()
    if options.n < 1:
        raise RequestError(f"--n {options.n} must be 1 or more")
    tokenizer = Tokenizer.load(find_model(options.model))
    params = options.params(tokenizer, logprobs=options.logprobs)
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    with options.open(options.model, tokenizer, max_running=min(options.n, AT_ONCE)) as llm:
        screen = None if options.json else _Screen(prompt, options.n)
        texts = [""] * options.n
        done: dict[int, Completion] = {}
        watch = Stopwatch()
        for place, output in _continuations(llm.engine, prompt, params, options.n):
            watch.push(len(output.tokens))
            texts[place] += output.text
            if output.finish_reason is not None:
                done[place] = completion(output.request, texts[place])
            if screen is not None:
                screen.show(place, output.text, place in done)
        answers = [done[place] for place in range(options.n)]
        stats = llm.engine.stats
        if options.json:
            print(
                json_line(_record(answers, watch, stats.accepted / stats.drafted if stats.drafted else None, tokenizer))
            )
        else:
            _report(answers, watch, tokenizer)
            if stats.drafted:
                log.info("%d of %d guessed tokens were right", stats.accepted, stats.drafted)
    for answer in answers:
        if answer.error is not None:
            raise RequestError(f"the text with seed {answer.seed} is unfinished: {answer.error}")
    return 0


def _continuations(engine: Engine, prompt: str, params: SamplingParams, count: int) -> Iterator[tuple[int, Output]]:
    """Continue `prompt` so many times at once; yields which one moved and what it made.

    The others are submitted when the first has read the prompt, so that they find its state in the cache.
    """
    seed = params.seed or 0
    places = {engine.submit(prompt, dataclasses.replace(params, seed=seed)).id: 0}
    unfinished = count
    while unfinished:
        for output in engine.step():
            while len(places) < count:
                place = len(places)
                request = engine.submit(prompt, dataclasses.replace(params, seed=counted_seed(seed, place)))
                places[request.id] = place
            unfinished -= output.finish_reason is not None
            yield places[output.request.id], output


class _Screen:
    """Continuations on stdout one below the other: the first unfinished one as it comes, those behind it when it is over.

    The prompt goes to stderr, so that stdout is the continuation alone; on a terminal the two read as one text.
    """

    def __init__(self, prompt: str, count: int) -> None:
        self._prompt = prompt
        self._waiting = [""] * count
        self._is_done = [False] * count
        self._at, self._has_begun = 0, False

    def show(self, place: int, text: str, is_done: bool) -> None:
        self._waiting[place] += text
        self._is_done[place] = is_done
        while self._at < len(self._waiting):
            if not self._has_begun:
                if len(self._waiting) > 1:
                    log.info("%s%d of %d:", "\n" if self._at else "", self._at + 1, len(self._waiting))
                print(self._prompt, end="", file=sys.stderr, flush=True)
                self._has_begun = True
            print(self._waiting[self._at], end="", flush=True)
            self._waiting[self._at] = ""
            if not self._is_done[self._at]:
                return
            print(flush=True)
            self._at, self._has_begun = self._at + 1, False


def _report(answers: Sequence[Completion], watch: Stopwatch, tokenizer: Tokenizer) -> None:
    """What stderr says below the text."""
    for answer in answers:
        for token in answer.logprobs or ():
            top = ", ".join(f"{_spelled(tokenizer, i)} {logprob:.3f}" for i, logprob in token.top or ())
            likeliest = f"   likeliest: {top}" if top else ""
            log.info("%-20s %8.3f%s", _spelled(tokenizer, token.token_id), token.logprob, likeliest)
    reasons = ", ".join(dict.fromkeys(answer.finish_reason for answer in answers))
    first = answers[0]
    cached = f", {first.cached_tokens} of {first.prompt_tokens} prompt tokens cached" if first.cached_tokens else ""
    log.info("%d tokens (%s), %s%s", watch.tokens, reasons, watch, cached)


def _record(
    answers: Sequence[Completion], watch: Stopwatch, acceptance: float | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The first continuation and the figures of all, as one JSON object; further continuations are under `others`."""
    first, *others = answers
    tokens_per_s, first_s = watch.tokens_per_s, watch.first_s
    return {
        **_answer_record(first, tokenizer),
        "prompt_tokens": first.prompt_tokens,
        "seconds": round(watch.seconds, 3),
        "first_token_s": None if first_s is None else round(first_s, 3),
        "tokens_per_s": None if tokens_per_s is None else round(tokens_per_s, 1),
        "acceptance": None if acceptance is None else round(acceptance, 3),
        "others": [_answer_record(answer, tokenizer) for answer in others],
    }


def _answer_record(answer: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "seed": answer.seed,
        "cached_tokens": answer.cached_tokens,
    }
    if answer.logprobs is not None:
        record["logprobs"] = [_token_record(token, tokenizer) for token in answer.logprobs]
    return record


def _token_record(token: Sampled, tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token_id": token_id, "token": tokenizer.decode([token_id]), "logprob": logprob}

    return {**entry(token.token_id, token.logprob), "top": [entry(*pair) for pair in token.top or ()]}


def _spelled(tokenizer: Tokenizer, token_id: int) -> str:
    return repr(tokenizer.decode([token_id]))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: byte at offset {error.start}") from None


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: byte at offset {error.start}") from None
