"""Reading what a model wrote in training: `longreach samples RUN`.

    longreach samples runs/rl --wrong --count 5         the last five wrong attempts
    longreach samples runs/rl --step 40 --worst         of one step, the least rewarded first
    longreach samples runs/rl --html samples.html       a page with filters, for a browser

Numbers say that something changed, samples say what: a reward that is earned without an answer, reasoning that has become
a habit, a verifier that is wrong. Works on runs of grpo and distill, also while they go on.
"""

from __future__ import annotations

import heapq
import json
import re
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro

from longreach.chat.modes import MODES
from longreach.errors import RequestError
from longreach.runtime import json_line, log, setup_logging, write_atomic
from longreach.train.rollout import read_samples

TEMPLATE = Path(__file__).with_name("samples.html")
WIDTH = 110

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class SamplesOptions:
    """Show attempts of a training run: question, reasoning, answer and verdict.

    The last ones, or with --best and --worst those with the highest and the lowest reward.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory of grpo or distill."""
    step: int | None = None
    """Only attempts of this step."""
    task: str | None = None
    """Only of tasks whose name begins like this."""
    mode: str | None = None
    """Only in this mode."""
    right: bool = False
    """Only right ones."""
    wrong: bool = False
    """Only wrong ones."""
    best: bool = False
    """Those with the highest reward first."""
    worst: bool = False
    """Those with the lowest reward first."""
    count: int = 10
    """How many."""
    html: Path | None = None
    """Write them into this page instead of the terminal."""
    json: bool = False
    """Print one JSON object per attempt, with its tokens and log-probabilities."""


def main(options: SamplesOptions) -> None:
    """Run the command."""
    setup_logging()
    check(options)
    chosen, seen = choose(options, read_samples(options.run, options.step))
    if not seen:
        raise RequestError(
            f"{options.run} has no attempt of step {options.step}; leave out --step to see the last ones"
        )
    if not chosen:
        raise RequestError(f"none of {seen:,} attempts is such a one; leave out --task, --mode, --right or --wrong")
    if options.html is not None:
        try:
            write_atomic(options.html, page(options.run, chosen, seen))
        except OSError as error:
            raise RequestError(f"--html {options.html} cannot be written: {error.strerror or error}") from error
        log.info("%d of %s attempts", len(chosen), f"{seen:,}")
        print(f"page: {options.html}")
    elif options.json:
        for sample in chosen:
            print(json_line(sample))
    else:
        print("\n\n".join(shown(sample) for sample in chosen))


def check(options: SamplesOptions) -> None:
    """Refuse what contradicts itself.

    Raises:
        RequestError: as said.
    """
    for one, other in (("right", "wrong"), ("best", "worst")):
        if getattr(options, one) and getattr(options, other):
            raise RequestError(f"--{one} and --{other} exclude each other; give one")
    if options.json and options.html is not None:
        raise RequestError("--json and --html exclude each other; give one")
    if options.count < 1:
        raise RequestError(f"--count {options.count} must be at least 1")
    if options.mode is not None and options.mode not in MODES:
        raise RequestError(f"--mode {options.mode}: there is no such mode; modes are {', '.join(MODES)}")


def choose(options: SamplesOptions, samples: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The attempts that were asked for, each with `group` (how many at its problem were right, of how many), and how many
    attempts there are in all."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    seen = 0

    def wanted() -> Iterator[dict[str, Any]]:
        nonlocal seen
        for sample in samples:
            seen += 1
            group = groups.setdefault(_group(sample), [0, 0])
            group[0] += bool(sample["right"])
            group[1] += 1
            if is_wanted(options, sample):
                yield sample

    if options.best or options.worst:
        take = heapq.nlargest if options.best else heapq.nsmallest
        chosen = take(options.count, wanted(), key=lambda sample: sample["reward"])
    else:
        chosen = list(deque(wanted(), maxlen=options.count))
    return [{**sample, "group": groups[_group(sample)]} for sample in chosen], seen


def _group(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    return sample["step"], sample["task"], sample["problem"], sample["mode"]


def is_wanted(options: SamplesOptions, sample: Mapping[str, Any]) -> bool:
    return (
        (options.task is None or sample["task"].startswith(options.task))
        and (options.mode is None or sample["mode"] == options.mode)
        and not (options.right and not sample["right"])
        and not (options.wrong and sample["right"])
    )


# ---- on the terminal ------------------------------------------------------------------------------------------------


def shown(sample: Mapping[str, Any]) -> str:
    """One attempt in a few lines. Control characters, which a model may write as well, are spelled out."""
    lines = [headline(sample)]
    for label, text in parts(sample):
        body = textwrap.indent(_wrapped(_visible(text)), " " * 11).lstrip()
        lines.append(f"{label:<10} {body}")
    return "\n".join(lines)


def headline(sample: Mapping[str, Any]) -> str:
    right, count = sample["group"]
    return (
        f"step {sample['step']}  {sample['task']}  level {sample['level']}  {sample['mode']}  attempt {sample['member'] + 1}: "
        f"{'right' if sample['right'] else 'wrong'}, reward {sample['reward']:g}, {sample['tokens']} tokens"
        f"{', cut off' if sample['finish'] == 'length' else ''}; {right} of {count} at this problem right"
    )


def parts(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked and said, with a label each."""
    out = [("prompt", sample["prompt"])]
    for message in sample["reply"]:
        if message["role"] == "tool":
            out.append(("result", message["content"]))
            continue
        if message.get("reasoning"):
            out.append(("reasoning", message["reasoning"]))
        calls = message.get("tool_calls") or []
        out += [("call", f"{name}({arguments})") for name, arguments, *_ in calls]
        if message["content"] or not calls:
            out.append(("answer", message["content"]))
    if sample["why"]:
        out.append(("verdict", sample["why"]))
    return out


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.expandtabs(4))


def _wrapped(text: str) -> str:
    lines = [
        textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""] for line in text.split("\n")
    ]
    return "\n".join(part for line in lines for part in line)


# ---- as a page ------------------------------------------------------------------------------------------------------


def page(run: Path, samples: list[dict[str, Any]], seen: int) -> str:
    """A page that needs nothing from elsewhere: every text is escaped, and there without JavaScript; filters need it."""
    tasks, modes = sorted({s["task"] for s in samples}), [m for m in MODES if any(s["mode"] == m for s in samples)]
    slots = {
        "TITLE": escape(f"Samples of {run}"),
        "COUNT": escape(f"{len(samples):,} of {seen:,} attempts"),
        "TASKS": "".join(f"<option>{escape(task)}</option>" for task in tasks),
        "MODES": "".join(f"<option>{escape(mode)}</option>" for mode in modes),
        "CARDS": "\n".join(card(sample) for sample in samples),
    }
    template = re.split(r"<!--([A-Z]+)-->", TEMPLATE.read_text(encoding="utf-8"))
    # Slots are filled where the template has them, never where a sample spells one.
    return "".join(slots[part] if place % 2 else part for place, part in enumerate(template))


def card(sample: Mapping[str, Any]) -> str:
    """One attempt."""
    verdict = "right" if sample["right"] else "wrong"
    data = json.dumps({"task": sample["task"], "mode": sample["mode"], "verdict": verdict})
    body = "".join(
        f'<dt>{label}</dt><dd class="{label}">{escape(text) or "<i>empty</i>"}</dd>' for label, text in parts(sample)
    )
    return f'<article class="{verdict}" data-of="{escape(data)}"><h2>{escape(headline(sample))}</h2><dl>{body}</dl></article>'
