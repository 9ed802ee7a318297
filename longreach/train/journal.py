"""The write-ahead log of one step's episodes: what was drawn is on record before anything is done with it.

    RUN/rollouts/step-00000012.jsonl        one record a line: eight hexadecimal digits (CRC-32 of the rest), a blank, JSON
    {"format": …, "step": 12, "weights": 12, "mark": …, "jobs": …, "count": 256}      first, whose log this is
    {"wrote": [[job, [token, …], [logprob, …]], …]}     one engine step, all its episodes: one write
    {"inserted": [job, [token, …]]}                     results of tools and marks of turns
    {"ended": {"job": …, "prompt_ids": …, …}}           the whole sample with its verdict

Jobs are named by their place in the step's list. Numbers are JSON's shortest ones that read back as the same bits. Episodes
go on from here after an interruption instead of beginning again: answers that are drawn anew whenever something stops them
would be too short on average, because the short ones survive more often.

A process that is killed loses nothing that was written. A power failure loses at most the last second, and nothing of a step
that is complete (`complete`). A record that was cut off, and what stands behind a damaged one, is dropped and drawn again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreach.chat.messages import Message, ToolCall
from longreach.engine.sampling import FinishReason
from longreach.errors import RequestError
from longreach.evaluate.episode import Job, Partial, Sample
from longreach.runtime import log
from longreach.tasks.base import Verdict
from longreach.tokenizer.bpe import Tokenizer

FORMAT = "longreach rollouts, 1"

SYNC_S = 1.0
"""Seconds of records that a power failure may cost."""


# ---- one record -----------------------------------------------------------------------------------------------------


def packed_line(record: dict[str, Any]) -> bytes:
    """A record as it stands in the file."""
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    return b"%08x %b\n" % (zlib.crc32(text), text)


def unpacked_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line with its line end; None for one that is cut off or damaged."""
    if len(line) < 12 or line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    text = line[9:-1]
    if line[:8] != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """The records of a journal up to the first that is cut off or damaged.

    Returns:
        the records, the bytes they take, and the bytes behind them.
    """
    records, good = [], 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        record = unpacked_line(line)
        if record is None:
            break
        records.append(record)
        good += len(line)
    return records, good, len(data) - good


def jobs_mark(jobs: Sequence[Job]) -> str:
    """A hash of all that decides what these jobs ask for: tasks, problems, modes, windows, seeds, sampling."""
    told = []
    for job in jobs:
        params = {f.name: repr(getattr(job.params, f.name)) for f in dataclasses.fields(job.params)}
        params["grammar"] = str(job.params.grammar is not None)
        told.append([job.key, job.task.name, job.problem.id, job.mode, job.window, job.seed, job.most_turns, params])
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode("ascii")).hexdigest()[:32]


# ---- a sample as JSON -----------------------------------------------------------------------------------------------


def sample_record(sample: Sample, step: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """All of a sample as JSON values, its texts beside its tokens, so that it can be read without a tokenizer."""
    job, member = sample.job, sample.job.key.rpartition("/")[2]
    return {
        "step": step, "key": job.key, "task": job.task.name, "domain": job.task.domain, "problem": job.problem.id,
        "level": job.problem.level, "mode": job.mode, "member": int(member) if member.isdecimal() else 0,
        "window": job.window, "seed": job.seed, "weights": sample.weights,
        "prompt": tokenizer.decode(sample.prompt), "text": tokenizer.decode(sample.tokens),
        "reply": [message_record(message) for message in sample.reply], "finish": str(sample.finish),
        "reward": float(sample.verdict.reward), "right": bool(sample.verdict.is_right), "why": sample.verdict.why,
        "tokens": sample.num_written, "prompt_ids": list(map(int, sample.prompt)),
        "token_ids": list(map(int, sample.tokens)), "written": _runs(sample.written),
        "logprobs": None if sample.logprobs is None else list(map(float, sample.logprobs)),
    }  # fmt: skip


def sample_of(record: dict[str, Any], job: Job) -> Sample:
    """What `sample_record` was given."""
    return Sample(
        job, record["prompt_ids"], record["token_ids"], expanded(record["written"]), record["logprobs"],
        tuple(message_of(message) for message in record["reply"]), FinishReason(record["finish"]),
        Verdict(record["reward"], record["right"], record["why"]), record["weights"],
    )  # fmt: skip


def message_record(message: Message) -> dict[str, Any]:
    """A message of a reply; what is empty is left out."""
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        record["reasoning"] = message.reasoning
    if message.tool_calls:
        record["tool_calls"] = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    if message.tool_call_id:
        record["tool_call_id"] = message.tool_call_id
    if message.is_open:
        record["is_open"] = True
    return record


def message_of(record: dict[str, Any]) -> Message:
    """What `message_record` was given."""
    calls = tuple(ToolCall(*call) for call in record.get("tool_calls", ()))
    return Message(
        record["role"], record["content"], record.get("reasoning"), calls, record.get("tool_call_id", ""),
        is_open=record.get("is_open", False),
    )  # fmt: skip


def _runs(written: Sequence[bool]) -> list[int]:
    """Lengths of the runs, the first one of written tokens: True True False True is 2 1 1."""
    runs, kind = [0], True
    for is_written in written:
        if bool(is_written) != kind:
            runs.append(0)
            kind = not kind
        runs[-1] += 1
    return runs


def expanded(runs: Sequence[int]) -> list[bool]:
    """For each token whether the model wrote it, from the lengths of the runs."""
    return [place % 2 == 0 for place, count in enumerate(runs) for _ in range(count)]


# ---- the journal ----------------------------------------------------------------------------------------------------


class RolloutJournal:
    """`evaluate.episode.Journal` of one step in a file. Belongs to one thread.

    Opening reads what an earlier attempt at this step left behind. One that was drawn by other weights is set aside, and the
    step begins anew.

    Args:
        folder: RUN/rollouts, made where it is missing.
        step: whose rollouts these are; `weights` counts the optimizer steps of the weights that draw.
        jobs: all of this step.
        tokenizer: for the texts beside the tokens.
        mark: recognises the weights (`rollout.weights_mark`); "" trusts their version.

    Raises:
        RequestError: the file is of other jobs, or cannot be read or written.
    """

    def __init__(self, folder: Path, step: int, jobs: Sequence[Job], tokenizer: Tokenizer, *, weights: int,
                 mark: str = "") -> None:  # fmt: skip
        self.path = journal_path(folder, step)
        self.step, self._jobs, self._tokenizer = step, list(jobs), tokenizer
        self._places = {job.key: place for place, job in enumerate(jobs)}
        assert len(self._places) == len(jobs), "two jobs of a step have the same key"
        self._ended: dict[int, Sample] = {}
        self._begun: dict[int, Partial] = {}
        self._synced = time.monotonic()
        self._file = -1
        header = {"format": FORMAT, "step": step, "weights": weights, "mark": mark, "jobs": jobs_mark(jobs),
                  "count": len(jobs)}  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_new = not self._take_up(header)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RequestError(f"{self.path} cannot be opened: {error.strerror or error}") from error
        if is_new:
            self._append(header)
            self._sync()
            sync_folder(folder)

    def _take_up(self, header: dict[str, Any]) -> bool:
        """Read the file of an earlier attempt, cut off what is not whole; whether there is one to go on with."""
        if not self.path.exists():
            return False
        records, good, torn = read_records(self.path)
        if records and records[0] != header:
            self._check_header(records[0], header)
            self._set_aside(records[0])
            return False
        if torn:
            os.truncate(self.path, good)
            log.info("%s: the last %d bytes were not whole; what they held is drawn again", self.path, torn)
        for record in records[1:]:
            self._note(record)
        return bool(records)

    def _check_header(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise RequestError(
                f"{self.path} is not a rollout journal of this version ({found.get('format')!r}, not {FORMAT!r}); "
                "move it away to draw this step again"
            )
        if any(found[name] != header[name] for name in ("step", "jobs", "count")):
            raise RequestError(
                f"{self.path} was drawn for other jobs (tasks, problems, seeds or sampling differ); go on with the settings "
                "it was begun with, or move it away to draw this step again"
            )

    def _set_aside(self, found: dict[str, Any]) -> None:
        number = 1
        while (other := self.path.with_suffix(f".other-{number}.jsonl")).exists():
            number += 1
        os.replace(self.path, other)
        log.warning(
            "%s was drawn by other weights (version %s); it is kept as %s and the step is drawn again",
            self.path, found["weights"], other.name,
        )  # fmt: skip

    def _note(self, record: dict[str, Any]) -> None:
        """Know what a record of the file says."""
        if "wrote" in record:
            for place, tokens, logprobs in record["wrote"]:
                self._add(place, tokens, logprobs)
        elif "inserted" in record:
            place, tokens = record["inserted"]
            episode = self._episode(place)
            episode.tokens.extend(tokens)
            episode.written.extend([False] * len(tokens))
            episode.logprobs.extend([0.0] * len(tokens))
        else:
            place = record["ended"]["job"]
            self._ended[place] = sample_of(record["ended"], self._jobs[place])
            self._begun.pop(place, None)

    def _episode(self, place: int) -> Partial:
        return self._begun.setdefault(place, Partial([], [], [], []))

    def _add(self, place: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        episode = self._episode(place)
        if tokens and not (episode.written and episode.written[-1]):
            episode.turn_starts.append(len(episode.tokens))
        episode.tokens.extend(tokens)
        episode.written.extend([True] * len(tokens))
        episode.logprobs.extend(logprobs)

    # ---- what an interruption left --------------------------------------------------------------------------------------

    @property
    def num_ended(self) -> int:
        """Episodes that are over."""
        return len(self._ended)

    def finished(self, job: Job) -> Sample | None:
        return self._ended.get(self._places[job.key])

    def partial(self, job: Job) -> Partial | None:
        """As `Journal.partial`. A last turn may be whole: it ended just before the interruption. From a source that tells no
        log-probabilities `logprobs` holds only the zeros of inserted tokens."""
        episode = self._begun.get(self._places[job.key])
        return (
            None
            if episode is None
            else Partial(list(episode.tokens), list(episode.written), list(episode.logprobs), list(episode.turn_starts))
        )

    # ---- records --------------------------------------------------------------------------------------------------------

    def wrote(self, pieces: Sequence[tuple[Job, Sequence[int], Sequence[float]]]) -> None:
        made = [
            [self._places[job.key], list(map(int, tokens)), list(map(float, logprobs))]
            for job, tokens, logprobs in pieces
            if tokens
        ]
        if made:
            self._append({"wrote": made})

    def inserted(self, job: Job, tokens: Sequence[int]) -> None:
        self._append({"inserted": [self._places[job.key], list(map(int, tokens))]})

    def ended(self, sample: Sample) -> None:
        place = self._places[sample.job.key]
        assert place not in self._ended, f"episode {sample.job.key} has ended already"
        self._append({"ended": {"job": place, **sample_record(sample, self.step, self._tokenizer)}})
        self._ended[place] = sample

    def complete(self) -> None:
        """All that was recorded is on the disk, and the file is closed. May be called again."""
        if self._file >= 0:
            self._sync()
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Let go of the file without waiting for the disk."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, record: dict[str, Any]) -> None:
        assert self._file >= 0, "the journal is closed"
        line = packed_line(record)
        try:
            written = os.write(self._file, line)
            while written < len(line):  # a full disk takes a part and refuses the rest
                written += os.write(self._file, line[written:])
        except OSError as error:
            raise RequestError(
                f"{self.path} cannot be written: {error.strerror or error}; free some space and go on with --resume"
            ) from error
        if time.monotonic() - self._synced >= SYNC_S:
            self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise RequestError(
                f"{self.path} cannot be written: {error.strerror or error}; free some space and go on with --resume"
            ) from error
        self._synced = time.monotonic()


def journal_path(folder: Path, step: int) -> Path:
    """Of a step's journal."""
    return folder / f"step-{step:08d}.jsonl"


def sync_folder(folder: Path) -> None:
    """Make names that were made, changed or removed in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
