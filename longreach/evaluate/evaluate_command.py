"""What a model can do: `longreach evaluate runs/sft --task arithmetic:level=1-2 --task science --mode non-think,think-high`.

Problems are of the part that no training sees, each asked once, the same ones for every model that is asked with the same
`--task`, `--count` and `--seed`. Two models are compared problem by problem:

    longreach evaluate runs/sft --task arithmetic --out before.jsonl
    longreach evaluate runs/rl  --task arithmetic --against before.jsonl
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from longreach.chat.modes import MODES, EffortTexts, Mode
from longreach.checkpoint.load import load_model
from longreach.errors import RequestError
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Sample
from longreach.evaluate.judge import Judged, open_judge
from longreach.evaluate.judging import Judging, was_judged
from longreach.evaluate.play import reply_text
from longreach.evaluate.score import Score, score
from longreach.evaluate.stats import Difference, paired_difference
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line, log, set_threads, setup_logging
from longreach.tasks.base import Split, Task
from longreach.tasks.registry import open_tasks
from longreach.tokenizer.bpe import Tokenizer

WINDOW = 512
"""Tokens of an episode, where none are given and the model's context is not shorter."""

PLAIN_LINE_EVERY_S = 10.0
"""Seconds between two lines of progress where stderr is no terminal."""

OFTEN = 0.25
"""Share of answers cut off by their window that is worth a line."""

_SHOWN = 400
"""Characters of a prompt or an answer that --samples prints."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Ask a model problems that its training has not seen, and say how many it has right."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, or checkpoint directory of either published layout."""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Task, as NAME or NAME:key=value, such as arithmetic:level=1-2 or gsm8k:path=test.jsonl; may be given several times."""
    mode: str = "non-think,think-high"
    """How to answer: non-think, think-high, think-max, or several with commas."""
    count: int = 200
    """Problems of each task."""
    window: int | None = None
    """Tokens of a problem and its answer at most; None takes 512, or the model's context if that is shorter."""
    temperature: float = 1.0
    """1 samples as the model believes; 0 always takes the likeliest token."""
    seed: int = 0
    """Chooses the problems, and what is drawn."""
    split: Split = "held-out"
    """held-out, or train: the part that training draws from."""
    samples: int = 0
    """Print this many wrong and this many right answers of each task."""
    out: Path | None = None
    """File to write every attempt to, one JSON object a line."""
    against: Path | None = None
    """File that --out wrote for another model: compare with it problem by problem."""
    judge: str = ""
    """Who grades the answers in place of the tasks' verifiers: self, a run directory, or the address of a server."""
    judge_model: str = ""
    """Name of the judging model at that server. Its key is read from the environment variable LONGREACH_JUDGE_KEY."""
    rubric: Path | None = None
    """File that says what makes an answer good, for --judge."""
    verifier_timeout_s: float = 10.0
    """Seconds a verifier that runs in a process of its own may take."""
    max_running: int = 64
    """Answers that are written at once."""
    memory_gib: float = 1.0
    """For the cache in memory."""
    arithmetic: Literal["fast", "invariant"] = "fast"
    """fast, or invariant: answers independent, to the bit, of what is written beside them."""
    effort_texts: EffortTexts = "preview"
    """Revision of the weights, for the text that asks for thinking: preview (also models trained here), 0731, none."""
    threads: int | None = None
    """CPU threads; None takes one per core that other processes leave free."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object at the end instead of the table."""


def main(options: EvaluateOptions) -> int:
    """Run the command."""
    setup_logging()
    modes, tasks = read_modes(options.mode), _open_tasks(options)
    before = _read_earlier(options.against) if options.against is not None else {}
    directory = find_model(options.run)
    if options.out is not None and options.out.exists():
        raise RequestError(f"--out {options.out} is there already; give another name, or remove it")
    with ExitStack() as stack:
        tokenizer = Tokenizer.load(directory)
        source = stack.enter_context(_open_source(options, directory, tokenizer))
        window = _window(options.window, source.most_tokens)
        judging = stack.enter_context(Judging(timeout_s=options.verifier_timeout_s))
        if options.judge:
            judge = open_judge(
                options.judge, options.rubric, model=options.judge_model, source=source, tokenizer=tokenizer,
                texts=options.effort_texts, device=options.device, memory_gib=options.memory_gib,
            )  # fmt: skip
            tasks = [Judged(task, judge) for task in tasks]
        log.info(
            "%d problems of each of %s; %s; windows of %d tokens, temperature %g", options.count,
            ", ".join(task.name for task in tasks), ", ".join(modes), window, options.temperature,
        )  # fmt: skip
        out = _open_out(options.out, stack)
        watch = stack.enter_context(_Watch(options.count * len(tasks) * len(modes), options.samples, out, tokenizer))
        scores = score(
            source, tokenizer, tasks, modes=modes, count=options.count, seed=options.seed, window=dict.fromkeys(modes, window),
            judging=judging, split=options.split, temperature=options.temperature, texts=options.effort_texts,
            on_sample=watch.saw,
        )  # fmt: skip
    compared = [_compare(found, before) if options.against is not None else None for found in scores]
    _say_what_was_short(scores, options)
    if options.json:
        print(json_line(_record(options, scores, compared, window, watch)))
    else:
        watch.print_samples()
        print(_table(scores, compared))
        print(f"result: {options.out}" if options.out is not None else f"result: {'; '.join(map(str, scores))}")
        print(f"next: {_next(options)}")
    return 0


def read_modes(text: str) -> Sequence[Mode]:
    """Modes with commas between them.

    Raises:
        RequestError: none, an unknown one, or one twice.
    """
    named = [part.strip() for part in text.split(",") if part.strip()]
    modes: list[Mode] = [mode for mode in MODES if mode in named]
    if not named or len(modes) != len(named):
        raise RequestError(f"--mode {text!r}: name each once, of {', '.join(MODES)}, with commas between them")
    return modes


def _open_tasks(options: EvaluateOptions) -> list[Task]:
    if not options.task:
        raise RequestError("there is nothing to ask; name a task, as in --task arithmetic:level=1")
    for name in ("count", "samples", "max_running"):
        least = 0 if name == "samples" else 1
        if getattr(options, name) < least:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(options, name)} must be {least} or more")
    if not options.judge and (options.rubric is not None or options.judge_model):
        raise RequestError(
            "--rubric and --judge-model are for a judge; name one with --judge self, a run or an address"
        )
    return open_tasks(options.task)


def _open_source(options: EvaluateOptions, directory: Path, tokenizer: Tokenizer) -> EngineSource:
    device, threads = choose_device(options.device), set_threads(options.threads)
    model = load_model(directory, device=device.value, arithmetic=options.arithmetic).eval()
    dtype = str(model.dtype).removeprefix("torch.")
    log.info("%s: %s on %s, threads: %s; %s arithmetic", options.run, dtype, device, threads, options.arithmetic)
    return EngineSource(model, tokenizer, max_running=options.max_running, memory_gib=options.memory_gib)


def _window(given: int | None, most: int) -> int:
    if given is not None and not 2 <= given <= most:
        raise RequestError(
            f"--window {given} must be from 2 to {most}, the model's context or what --memory-gib holds of it"
        )
    return min(WINDOW, most) if given is None else given


# ---- while it runs --------------------------------------------------------------------------------------------------


class _Watch:
    """Follows the attempts as they are judged: progress on stderr, lines of --out, answers for --samples.

    Attributes:
        seconds: since the start. tokens: that the model wrote.
    """

    def __init__(self, total: int, keep: int, out: TextIO | None, tokenizer: Tokenizer) -> None:
        self.total, self.keep, self.out, self.tokenizer = total, keep, out, tokenizer
        self.done = self.right = self.tokens = 0
        self._begin = time.perf_counter()
        self._last_line = time.monotonic()
        self._live: Any = None
        self._line: Any = None
        self._kept: dict[tuple[str, bool], list[Sample]] = {}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def __enter__(self) -> _Watch:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._live = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=24), TextColumn("{task.description}"),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._live.start()
            self._line = self._live.add_task("", total=self.total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def saw(self, sample: Sample) -> None:
        """An attempt is judged."""
        self.done += 1
        self.right += sample.verdict.is_right
        self.tokens += sample.num_written
        if self.out is not None:
            self.out.write(json_line(attempt_record(sample, self.tokenizer)) + "\n")
        kept = self._kept.setdefault((sample.job.task.name, sample.verdict.is_right), [])
        if len(kept) < self.keep:
            kept.append(sample)
        line = f"{self.right} of {self.done} right  {self.tokens / self.seconds:,.0f} tokens/s"
        if self._live is not None:
            self._live.update(self._line, completed=self.done, description=line)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            log.info("%d/%d  %s", self.done, self.total, line)

    def print_samples(self) -> None:
        """The answers that were kept, wrong ones of each task first."""
        for (name, is_right), samples in sorted(self._kept.items()):
            for sample in samples:
                asked = sample.job.problem.conversation.messages[-1].content
                verdict = "right" if is_right else f"wrong: {sample.verdict.why}"
                print(
                    f"---- {name}, {sample.job.mode}, {verdict}\n{_short(asked)}\n>> {_short(reply_text(sample.reply))}"
                )


def _short(text: str) -> str:
    # What a model writes may hold characters that a terminal obeys.
    text = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"


def attempt_record(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample as a line of --out; the names are those of the samples that training runs keep."""
    job, problem = sample.job, sample.job.problem
    return {
        "key": job.key, "task": job.task.name, "domain": job.task.domain, "problem": problem.id, "level": problem.level,
        "mode": job.mode, "prompt": tokenizer.decode(sample.prompt), "text": tokenizer.decode(sample.tokens),
        "reply": reply_text(sample.reply), "tokens": sample.num_written, "finish": str(sample.finish),
        "reward": sample.verdict.reward, "right": sample.verdict.is_right, "judged": was_judged(sample.verdict),
        "why": sample.verdict.why,
    }  # fmt: skip


def _open_out(path: Path | None, stack: ExitStack) -> TextIO | None:
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"--out {path} cannot be written: {error.strerror or error}") from None


# ---- compared with another ------------------------------------------------------------------------------------------


def _read_earlier(path: Path) -> dict[tuple[str, str, str], bool]:
    """Whether each problem was right, by task, mode and problem."""
    found: dict[tuple[str, str, str], bool] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"--against {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RequestError(f"--against {path} is not UTF-8; give a file that --out wrote") from None
    for number, line in enumerate(lines, 1):
        try:
            attempt = json.loads(line)
            found[attempt["task"], attempt["mode"], attempt["problem"]] = bool(attempt["right"])
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"--against {path}, line {number} is no attempt; give a file that --out wrote") from None
    return found


def _compare(found: Score, before: dict[tuple[str, str, str], bool]) -> Difference | None:
    """With the earlier answers to the same problems; None where there are none."""
    both = [r for r in found.results if (found.task, found.mode, r.problem) in before]
    if len(both) < found.n:
        log.info("%s, %s: --against has %d of the %d problems", found.task, found.mode, len(both), found.n)
    if not both:
        return None
    return paired_difference(
        [before[found.task, found.mode, result.problem] for result in both], [result.is_right for result in both]
    )


# ---- what is said ---------------------------------------------------------------------------------------------------


def _say_what_was_short(scores: Sequence[Score], options: EvaluateOptions) -> None:
    for found in scores:
        if found.n < options.count:
            log.info("%s has only %d different %s problems", found.task, found.n, options.split)
        roomless = sum(result.is_cut_off and not result.tokens for result in found.results)
        if roomless:
            log.warning("%s, %s: %d of %d prompts leave no room for an answer in the window; give a larger --window",
                        found.task, found.mode, roomless, found.n)  # fmt: skip
        elif found.truncated >= OFTEN:
            log.warning("%s, %s: %.0f %% of the answers were cut off by the window, which counts as wrong",
                        found.task, found.mode, 100 * found.truncated)  # fmt: skip
        if found.unjudged:
            log.warning(
                "%s, %s: %d of %d answers could not be judged and count as wrong", found.task, found.mode, found.unjudged,
                found.n,
            )  # fmt: skip


def _table(scores: Sequence[Score], compared: Sequence[Difference | None]) -> str:
    rows = [["task", "mode", "problems", "right", "95 % interval", "tokens", "cut off"]]
    has_levels = {found.task for found in scores if len(found.by_level()) > 1}
    for found, difference in zip(scores, compared, strict=True):
        rows.append(_row(found, found.task) + ([_shown(difference)] if difference is not None else []))
        if found.task in has_levels:
            rows += [_row(part, f"  level {part.level}") for part in found.by_level()]
    if any(difference is not None for difference in compared):
        rows[0].append("against")
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(found: Score, name: str) -> list[str]:
    return [
        name, found.mode, str(found.n), f"{found.accuracy:.1%}", f"{100 * found.low:.1f} to {100 * found.high:.1f}",
        f"{found.mean_tokens:.0f}", f"{found.truncated:.1%}",
    ]  # fmt: skip


def _shown(difference: Difference) -> str:
    points = f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    return points if difference.is_certain else f"{points}, may be chance"


def _record(
    options: EvaluateOptions, scores: Sequence[Score], compared: Sequence[Difference | None], window: int, watch: _Watch
) -> dict[str, Any]:
    listed = [
        {**found.record(), "against": difference._asdict() if difference is not None else None}
        for found, difference in zip(scores, compared, strict=True)
    ]
    return {
        "command": "evaluate", "run": str(options.run), "split": options.split, "seed": options.seed,
        "temperature": options.temperature, "window": window, "seconds": round(watch.seconds, 1),
        "tokens": watch.tokens, "scores": listed,
        "figures": {f"{found.task}, {found.mode}": found.accuracy for found in scores},
    }  # fmt: skip


def _next(options: EvaluateOptions) -> str:
    run, tasks = shlex.quote(str(options.run)), " ".join(f"--task {shlex.quote(task)}" for task in options.task)
    if options.out is not None:
        return f"longreach evaluate OTHER {tasks} --against {shlex.quote(str(options.out))}"
    if options.samples:
        return f"longreach grpo {run} {tasks} --out NEW"
    return f"longreach evaluate {run} {tasks} --samples 3"
