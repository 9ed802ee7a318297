"""Rollouts of a training run: which problems a step asks, samples drawn once and for all, and kept to be read.

    jobs = group_jobs(tasks, weights, step=step, problems=32, group_size=8, seed=0, modes=("think-high",), windows={…}, …)
    with Roller(run, source, tokenizer, judging) as roller:
        samples = roller.roll(tuning.step, jobs, mark=weights_mark(model))
        …                                                    learn; tuning.update(…); source.weights_changed()
        if tuning.is_due:
            tuning.save({})
            roller.cover(tuning.step)                        steps before this one will not be asked for again

    RUN/rollouts/step-00000012.jsonl     journals of steps since the last checkpoint (longreach.train.journal)
    RUN/samples/step-00000012.jsonl.gz   samples of steps before it, one JSON object a line

A killed run goes on from its checkpoint, asks for the same jobs again, gets from the journals what was drawn already and
draws only the rest: no sample is lost and none comes twice, wherever it was killed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longreach.chat.modes import EffortTexts, Mode
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.episode import Job, Sample, Source
from longreach.evaluate.judging import Judging
from longreach.evaluate.play import play
from longreach.rundir import RunDirectory
from longreach.runtime import log, write_atomic
from longreach.tasks.base import Split, Task, problem_at
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.journal import RolloutJournal, expanded, read_records, sync_folder

# ---- which problems a step asks -------------------------------------------------------------------------------------

MOST_TURNS_OF_WEIGHTS = 10_000
"""Weights of tasks are followed exactly where they come round within this many problems, else to this precision."""


def group_jobs(
    tasks: Sequence[Task],
    weights: Sequence[float],
    *,
    step: int,
    problems: int,
    group_size: int,
    seed: int,
    modes: Sequence[Mode],
    windows: Mapping[Mode, int],
    params: SamplingParams,
    most_turns: int = 8,
    split: Split = "train",
) -> list[Job]:
    """The attempts of one step, group by group: the members of a problem stand side by side.

    A function of its arguments alone. Problems are numbered through the run, step after step; each goes to a task so that
    every task has its share at any time, and gets that task's next problem: none is skipped, and none comes twice before a
    task's file is through. A task's problems take the modes in turn.

    Args:
        weights: shares of the tasks, above 0.
        problems: of this step, over all tasks. group_size: attempts at each.
        windows: tokens of an episode at most, for each of `modes`.
        params: temperature and truncation.

    Returns:
        `problems * group_size` jobs with keys "step/number of the problem/member".

    Raises:
        RequestError: a number that makes no sense, a mode without a window, a task without problems.
    """
    _check_plan(tasks, weights, problems, group_size, modes, windows)
    order = task_order(weights)
    jobs = []
    for number in range(step * problems, (step + 1) * problems):
        turn, place = divmod(number, len(order))
        which = order[place]
        index = turn * order.count(which) + order[:place].count(which)
        task, mode = tasks[which], modes[index % len(modes)]
        problem = problem_at(task, split, seed, index)
        for member in range(group_size):
            key = f"{step}/{number}/{member}"
            jobs.append(Job(key, task, problem, mode, windows[mode], _seed_of(seed, key), params, most_turns))
    return jobs


def task_order(weights: Sequence[float]) -> list[int]:
    """Places of the tasks in the order in which they take problems, to be gone through again and again: whoever is
    furthest behind its share is next."""
    shares = _whole_shares(weights)
    total, counts, order = sum(shares), [0] * len(shares), []
    for number in range(1, total + 1):
        which = max(range(len(shares)), key=lambda task: shares[task] * number - counts[task] * total)
        counts[which] += 1
        order.append(which)
    return order


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in these proportions."""
    parts = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(part.denominator for part in parts))
    shares = [int(part * common) for part in parts]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) > MOST_TURNS_OF_WEIGHTS:
        total = sum(shares)
        shares = [max(1, round(share * MOST_TURNS_OF_WEIGHTS / total)) for share in shares]
    return shares


def _check_plan(tasks: Sequence[Task], weights: Sequence[float], problems: int, group_size: int,
                modes: Sequence[Mode], windows: Mapping[Mode, int]) -> None:  # fmt: skip
    if not tasks:
        raise RequestError("there is no task to draw problems from; name one with --task")
    if len(weights) != len(tasks):
        raise RequestError(f"{len(weights)} weights are given for {len(tasks)} tasks; give one for each")
    for task, weight in zip(tasks, weights, strict=True):
        if not 0 < weight < math.inf:
            raise RequestError(f"the weight {weight:g} of task {task.name} must be above 0; leave the task out instead")
    for name, number in (("problems per step", problems), ("group size", group_size)):
        if number < 1:
            raise RequestError(f"{name} {number} must be at least 1")
    if not modes:
        raise RequestError("there is no mode to answer in; give one of non-think, think-high, think-max")
    for mode in modes:
        if windows.get(mode, 0) < 1:
            raise RequestError(f"mode {mode} has no window; give the tokens that its episodes may have, such as 256")


def _seed_of(seed: int, key: str) -> int:
    """63 bits of their own for every attempt."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") >> 1


# ---- drawing them ---------------------------------------------------------------------------------------------------


def weights_mark(model: nn.Module, most: int = 4096) -> str:
    """A short text that another state of the weights does not have: a hash of up to `most` values of every tensor. Cheap
    beside a step, and no optimizer step leaves all of those values as they were."""
    parts = []
    for tensor in model.state_dict().values():
        flat = tensor.detach().reshape(-1)
        parts.append(flat[:: max(1, math.ceil(flat.numel() / most))].to(torch.float32))
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()[:32]


class Roller:
    """Draws the samples of each step of a run, from its engine or a server, and keeps them.

    Args:
        run: the run directory.
        source: supplies the tokens; the caller changes its weights between steps.
        judging: gives verdicts.
        texts: revision of the effort paragraphs in prompts.

    Attributes:
        seconds: that the last step's rollouts took.
        taken_up: samples of the last step that an earlier attempt had finished.
    """

    def __init__(self, run: RunDirectory | Path | str, source: Source, tokenizer: Tokenizer, judging: Judging, *,
                 texts: EffortTexts = "preview") -> None:  # fmt: skip
        self.path = run.path if isinstance(run, RunDirectory) else Path(run)
        self.source, self.tokenizer, self.judging = source, tokenizer, judging
        self.texts: EffortTexts = texts
        self.seconds, self.taken_up = 0.0, 0
        self._journal: RolloutJournal | None = None

    def roll(self, step: int, jobs: Sequence[Job], *, mark: str = "",
             on_sample: Callable[[Sample], None] | None = None) -> list[Sample]:  # fmt: skip
        """All samples of a step, in the order of its jobs; on return they are on the disk.

        Asked for again with the same jobs and weights it gives the same samples: from the journal what was drawn already,
        and drawn on from where it stopped what had begun.

        Args:
            step: optimizer steps done, which is the version of the weights.
            mark: `weights_mark` of the weights that draw. A journal of this step with another mark (arithmetic that does
                not repeat exactly, as on some GPUs) is set aside, and the step is drawn anew.
            on_sample: called with each sample as it is ready, those of the journal included.

        Raises:
            RequestError: the journal is of other jobs or cannot be written; the source fails.
        """
        begin = time.perf_counter()
        folder = self.path / "rollouts"
        self._journal = journal = RolloutJournal(folder, step, jobs, self.tokenizer, weights=step, mark=mark)
        try:
            self.taken_up = journal.num_ended
            samples = play(
                self.source, jobs, self.tokenizer, texts=self.texts, judging=self.judging, journal=journal, weights=step,
                on_sample=on_sample,
            )  # fmt: skip
            journal.complete()
        finally:
            journal.close()
        self.seconds = time.perf_counter() - begin
        return samples

    def cover(self, step: int) -> None:
        """The run now has a checkpoint of this step: rollouts of earlier steps become RUN/samples. Call it after every
        checkpoint, and when a run is resumed with the step it stands at.

        Raises:
            RequestError: they cannot be written.
        """
        keep_samples(self.path, step)

    def close(self) -> None:
        """Let go of what a step that failed had open."""
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Roller:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---- what is kept ---------------------------------------------------------------------------------------------------


def keep_samples(run: Path, before: int) -> None:
    """Turn the journals of steps below `before` into files of RUN/samples.

    Each file appears whole, and only then its journal goes: killed in between, the next call does it again from the
    journal. A journal that is not whole stays, and a line says so.

    Raises:
        RequestError: the disk refuses.
    """
    for leftover in (run / "samples").glob(".step-*.tmp"):  # of a write that was killed
        leftover.unlink(missing_ok=True)
    for step, path in _files(run / "rollouts", "jsonl"):
        if step >= before:
            continue
        header, samples = _journal_samples(path)
        if header.get("count") != len(samples):
            log.warning(
                "%s holds %d of %s samples; it stays where it is", path, len(samples), header.get("count", "its")
            )
            continue
        kept = _kept_path(run, step)
        lines = "".join(json.dumps(sample, separators=(",", ":")) + "\n" for sample in samples)
        try:
            # mtime 0: the same samples are the same bytes.
            write_atomic(kept, gzip.compress(lines.encode("ascii"), compresslevel=4, mtime=0))
            sync_folder(kept.parent)
            path.unlink()
        except OSError as error:
            raise RequestError(
                f"{kept} cannot be written: {error.strerror or error}; free some space and go on with --resume"
            ) from error


def read_samples(run: Path | str, step: int | None = None) -> Iterator[dict[str, Any]]:
    """The samples of a run, step by step in the order of their jobs, those of a step under way included.

    Args:
        run: the run directory. step: only this one.

    Yields:
        step, key, task, domain, problem (its id), level, mode, member (place in its group), window, seed, weights;
        prompt, text (all behind it, special tokens spelled out), reply (messages: role, content and where there are any
        reasoning, tool_calls as [name, arguments, id], tool_call_id); finish, reward, right, why; tokens (how many the model
        wrote), prompt_ids, token_ids, written (a bool for each of them), logprobs (None where the source told none).

    Raises:
        RequestError: the folder is no run that has rollouts, or a file is damaged.
    """
    run = Path(run)
    files = dict(_files(run / "samples", "jsonl.gz"))
    files |= dict(
        _files(run / "rollouts", "jsonl")
    )  # where both are there, the journal has not been turned yet, or newly
    if not files:
        what = "holds no rollouts" if run.is_dir() else "does not exist"
        raise RequestError(f"{run} {what}; give the run directory of longreach grpo or distill")
    for number, path in sorted(files.items()):
        if step is not None and number != step:
            continue
        for sample in _step_samples(run, number, path):
            yield {**sample, "written": expanded(sample["written"])}


def rollout_digest(run: Path | str) -> str:
    """A hash of all samples of a run, token and log-probability by bit, whatever order they were drawn in and wherever they
    are kept. A sample that is missing, or there twice, changes it."""
    names = ("step", "key", "task", "problem", "mode", "weights", "prompt_ids", "token_ids", "written", "logprobs", "reply",
             "finish", "reward", "right", "why")  # fmt: skip
    marks = sorted(
        hashlib.sha256(json.dumps([sample[name] for name in names]).encode("ascii")).digest()
        for sample in read_samples(run)
    )
    return hashlib.sha256(b"".join(marks)).hexdigest()


def _step_samples(run: Path, step: int, path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        try:
            return _journal_samples(path)[1]
        except FileNotFoundError:  # the run goes on and has kept them meanwhile
            path = _kept_path(run, step)
    return _kept_samples(path)


def _kept_path(run: Path, step: int) -> Path:
    return run / "samples" / f"step-{step:08d}.jsonl.gz"


def _journal_samples(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header of a journal, and its samples in the order of their jobs."""
    records = read_records(path)[0]
    ended = sorted((record["ended"] for record in records if "ended" in record), key=lambda sample: sample["job"])
    samples = [{name: value for name, value in sample.items() if name != "job"} for sample in ended]
    return records[0] if records else {}, samples


def _kept_samples(path: Path) -> list[dict[str, Any]]:
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RequestError(
            f"{path} is damaged ({error}); move it away to read the samples of the other steps"
        ) from None


def _files(folder: Path, ending: str) -> list[tuple[int, Path]]:
    """(step, file) of a folder; what has been set aside is not among them."""
    pattern = re.compile(rf"step-(\d+)\.{re.escape(ending)}")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [(int(match[1]), folder / name) for name in names if (match := pattern.fullmatch(name))]
