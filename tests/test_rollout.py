"""The journal of rollouts, what a step asks, and the samples that are kept."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import json
import logging
import math
import os
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from serving import make_tokenizer

from longreach.chat.messages import Conversation, Message, Tool, ToolCall
from longreach.chat.renderer import answer_parts
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Job, Piece, Sample, Turn
from longreach.evaluate.judging import Judging
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.optim.hybrid import make_optimizers
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, problem_at, wrong
from longreach.train import journal as journal_module
from longreach.train.journal import RolloutJournal, packed_line, read_records
from longreach.train.rollout import (
    Roller,
    group_jobs,
    keep_samples,
    read_samples,
    rollout_digest,
    task_order,
    weights_mark,
)

WINDOWS = {"non-think": 900, "think-high": 1000, "think-max": 1100}


class Counting(GeneratedTask):
    """How many letters; right by the length of the answer, so that untrained models are sometimes right."""

    kind, domain, summary, all_levels = "counting", "mathematics", "letters of a word", (1, 2)

    def make(self, rng, level):
        word = "".join(rng.choice("abcdef") for _ in range(2 + level))
        return Problem(self.name, Conversation((Message("user", f"{word}?"),)), len(word), level)

    def verify(self, problem, reply):
        length = len(reply[-1].content)
        return RIGHT if length % problem.answer == 0 else wrong(f"expected {problem.answer}, got {length}", 0.25)


class Adder(GeneratedTask):
    """A sum with a tool."""

    kind, domain, summary, all_levels = "adder", "agentic", "sums by a tool", (1,)

    def make(self, rng, level):
        a, b = rng.randrange(90), rng.randrange(90)
        tool = Tool({"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}})
        return Problem(self.name, Conversation((Message("user", f"{a} and {b}"),), (tool,)), a + b, level)

    def verify(self, problem, reply):
        return Verdict(1.0, True) if str(problem.answer) in reply[-1].content else wrong(f"expected {problem.answer}")

    def environment(self, problem):
        class World:
            def call(self, call: ToolCall) -> str:
                given = json.loads(call.arguments)
                return str(given["a"] + given["b"])

        return World()


class Scripted:
    """A source without a model: each turn's text is a function of its prompt and seed, and comes in small pieces.

    The first turn of a prompt with a tool calls it; all others answer. Log-probabilities are float32 values of a hash.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.turns, self.submitted = tokenizer, {}, 0

    def submit(self, turn: Turn) -> object:
        handle = object()
        self.submitted += 1
        self.turns[handle] = [turn, self.tokens_of(turn), len(turn.begun)]
        assert tuple(self.turns[handle][1][: len(turn.begun)]) == turn.begun
        return handle

    def tokens_of(self, turn: Turn) -> list[int]:
        text, rng = self.tokenizer.decode(turn.prompt), random.Random(turn.params.seed)
        if '"name": "add"' in text and "<tool_result>" not in text:
            a, b = (int(part) for part in text.split("｜User｜>")[-1].split("<｜Assistant")[0].split(" and "))
            message = Message("assistant", "", None, (ToolCall("add", json.dumps({"a": a, "b": b})),))
        else:
            words = " ".join(rng.choice(["the", "answer", "is", "42", "7"]) for _ in range(rng.randrange(1, 30)))
            message = Message("assistant", words + text.split("<tool_result>")[-1][:4])
        pieces = [(piece.text, piece.is_special) for part in answer_parts(message) for piece in part.pieces]
        if text.endswith("<think>"):
            pieces = [("so", False), ("</think>", True), *pieces]
        made = [token for text, special in pieces for token in self.tokenizer.encode(text, allow_special=special)]
        return [*made, self.tokenizer.eos_id]

    def step(self):
        pieces = []
        for handle, state in list(self.turns.items()):
            turn, tokens, at = state
            more = tokens[at : min(at + 1 + (turn.params.seed + at) % 3, turn.params.max_tokens)]
            state[2] = at + len(more)
            is_over = state[2] == len(tokens)
            finish = FinishReason.STOP if is_over else None
            if not is_over and state[2] >= turn.params.max_tokens:
                finish = FinishReason.LENGTH
            told = tuple(_logprob(turn.params.seed, at + place) for place in range(len(more)))
            pieces.append(Piece(handle, tuple(more), told, finish))
            if finish is not None:
                del self.turns[handle]
        return pieces


def _logprob(seed: int, place: int) -> float:
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return struct.unpack("<f", struct.pack("<f", -int.from_bytes(digest[:4], "big") / 2**30))[0]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def judging():
    with Judging(workers=1) as judging:
        yield judging


def jobs_of(step: int = 0, problems: int = 4, group_size: int = 2, seed: int = 0, tasks=None, **changes) -> list[Job]:
    settings = {"modes": ("non-think",), "windows": WINDOWS, "params": SamplingParams()} | changes
    tasks = tasks or [Counting({}), Adder({})]
    weights = settings.pop("weights", [1.0] * len(tasks))
    return group_jobs(
        tasks, weights, step=step, problems=problems, group_size=group_size, seed=seed, **settings
    )  # fmt: skip


def same(a: Sample, b: Sample) -> bool:
    """Bit for bit; two NaN log-probabilities are the same."""
    packed = [struct.pack(f"<{len(s.logprobs or ())}d", *(s.logprobs or ())) for s in (a, b)]
    fields = [(s.job.key, s.prompt, s.tokens, s.written, s.reply, s.finish, s.verdict, s.weights) for s in (a, b)]
    return packed[0] == packed[1] and fields[0] == fields[1] and (a.logprobs is None) == (b.logprobs is None)


# ---- the journal ----------------------------------------------------------------------------------------------------


def filled(folder: Path, tokenizer, jobs: list[Job]) -> tuple[RolloutJournal, list[Sample]]:
    """A journal in which job 0 has ended, job 1 is in its second turn, job 2 has begun and job 3 has not."""
    log = RolloutJournal(folder, 3, jobs, tokenizer, weights=3, mark="m")
    values = [-0.1, -1e-300, float("-inf"), -float.fromhex("0x1.fffffep-3"), 0.0]
    log.wrote([(jobs[0], [300, 301], values[:2]), (jobs[1], [302], values[2:3]), (jobs[2], [303], values[3:4])])
    log.wrote([(jobs[0], [tokenizer.eos_id], [-2.5]), (jobs[1], [304], [-3.25])])
    log.inserted(jobs[1], [2, 310, 4])
    reply = (Message("assistant", "a\ud800b", "thought", (ToolCall("add", "{}", "c1"),)), Message("tool", "5"))
    ended = Sample(jobs[0], [0, 2, 300], [300, 301, tokenizer.eos_id], [True] * 3, [*values[:2], -2.5], reply,
                   FinishReason.STOP, Verdict(0.5, False, "why – so"), 3)  # fmt: skip
    log.ended(ended)
    log.wrote([(jobs[1], [305, 306], [-0.5, values[4]])])
    return log, [ended]


def test_a_journal_gives_back_what_was_written_bit_for_bit(tmp_path, tokenizer):
    jobs = jobs_of()
    log, (ended,) = filled(tmp_path, tokenizer, jobs)
    log.complete()
    again = RolloutJournal(tmp_path, 3, jobs, tokenizer, weights=3, mark="m")
    sample = again.finished(jobs[0])
    assert sample is not None
    assert same(sample, ended)
    assert again.partial(jobs[0]) is None
    begun = again.partial(jobs[1])
    assert begun is not None
    assert begun.tokens == [302, 304, 2, 310, 4, 305, 306]
    assert begun.written == [True, True, False, False, False, True, True]
    assert begun.logprobs == [float("-inf"), -3.25, 0.0, 0.0, 0.0, -0.5, 0.0]
    assert begun.turn_starts == [0, 5]
    assert again.partial(jobs[2]) == ([303], [True], [-float.fromhex("0x1.fffffep-3")], [0])
    assert again.partial(jobs[3]) is None
    assert again.finished(jobs[1]) is None
    assert again.num_ended == 1


def test_a_journal_cut_off_anywhere_knows_all_that_was_whole_and_is_written_on(tmp_path, tokenizer):
    jobs = jobs_of()
    log, _ = filled(tmp_path / "whole", tokenizer, jobs)
    log.complete()
    data = log.path.read_bytes()
    records = read_records(log.path)[0]
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        if cut > ends[0] and cut % 7 and min(abs(cut - end) for end in ends) > 2:
            continue  # every place near a line's end, every seventh elsewhere
        folder = tmp_path / str(cut)
        folder.mkdir()
        path = folder / log.path.name
        path.write_bytes(data[:cut])
        again = RolloutJournal(folder, 3, jobs, tokenizer, weights=3, mark="m")
        whole = sum(end <= cut for end in ends)
        again.wrote([(jobs[3], [311], [-1.0])])
        again.close()
        kept, _, torn = read_records(path)
        assert torn == 0
        assert kept == [*records[: max(1, whole)], {"wrote": [[3, [311], [-1.0]]]}]


@pytest.mark.parametrize("place", [3, 60, 400, 700, -2])
def test_what_stands_behind_a_damaged_byte_is_dropped(tmp_path, tokenizer, place, caplog):
    jobs = jobs_of()
    log, _ = filled(tmp_path, tokenizer, jobs)
    log.complete()
    data = bytearray(log.path.read_bytes())
    data[place] ^= 1
    log.path.write_bytes(data)
    before = read_records(log.path)[0]
    with caplog.at_level(logging.INFO, "longreach"):
        RolloutJournal(tmp_path, 3, jobs, tokenizer, weights=3, mark="m").close()
    assert "is drawn again" in caplog.text
    kept, _, torn = read_records(log.path)
    assert torn == 0
    assert kept[1:] == before[1:]
    assert len(kept) < 7


def test_each_step_of_the_engine_is_one_write(tmp_path, tokenizer, monkeypatch):
    jobs = jobs_of()
    log = RolloutJournal(tmp_path, 0, jobs, tokenizer, weights=0)
    sizes = []
    write = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda file, data: sizes.append(len(data)) or write(file, data))
    log.wrote([(job, [300, 301], [-1.0, -2.0]) for job in jobs])
    log.wrote([])
    assert len(sizes) == 1
    assert log.path.stat().st_size > sizes[0]  # with the header


def test_records_reach_the_disk_once_a_second_and_at_the_end_of_the_step(tmp_path, tokenizer, monkeypatch):
    jobs = jobs_of()
    now = [100.0]
    synced = []
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    log = RolloutJournal(tmp_path, 0, jobs, tokenizer, weights=0)
    monkeypatch.setattr(journal_module.os, "fsync", lambda file: synced.append(now[0]))
    for _ in range(25):
        now[0] += 0.125
        log.wrote([(jobs[0], [300], [-1.0])])
    assert synced == [101.0, 102.0, 103.0]
    log.complete()
    assert len(synced) == 4
    log.complete()
    assert len(synced) == 4


def test_a_full_disk_is_one_clear_line_and_costs_only_the_last_record(tmp_path, tokenizer, monkeypatch):
    jobs = jobs_of()
    log = RolloutJournal(tmp_path, 0, jobs, tokenizer, weights=0)
    log.wrote([(jobs[0], [300], [-1.0])])
    write = os.write

    def full(file, data):
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "write", full)
    with pytest.raises(RequestError, match=r"step-00000000.jsonl cannot be written: No space left .* --resume"):
        log.wrote([(jobs[0], [301], [-1.0])])
    monkeypatch.undo()
    log.close()
    again = RolloutJournal(tmp_path, 0, jobs, tokenizer, weights=0)
    begun = again.partial(jobs[0])
    assert begun is not None
    assert begun.tokens == [300]


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"problems": 3}, {"modes": ("think-max",)}, {"params": SamplingParams(top_p=0.9)}, {"most_turns": 2},
     {"windows": {"non-think": 91}}, {"tasks": [Counting({"level": "2"})]}],
)  # fmt: skip
def test_a_journal_of_other_jobs_is_refused(tmp_path, tokenizer, changes):
    RolloutJournal(tmp_path, 0, jobs_of(), tokenizer, weights=0).close()
    with pytest.raises(RequestError, match=r"was drawn for other jobs .* move it away"):
        RolloutJournal(tmp_path, 0, jobs_of(**changes), tokenizer, weights=0)


def test_a_journal_of_other_weights_is_set_aside_and_kept(tmp_path, tokenizer, caplog):
    jobs = jobs_of()
    for number, mark in enumerate("abc"):
        log = RolloutJournal(tmp_path, 0, jobs, tokenizer, weights=0, mark=mark)
        assert log.partial(jobs[0]) is None
        log.wrote([(jobs[0], [300 + number], [-1.0])])
        log.complete()
    assert sorted(os.listdir(tmp_path)) == [
        "step-00000000.jsonl", "step-00000000.other-1.jsonl", "step-00000000.other-2.jsonl",
    ]  # fmt: skip
    assert "drawn by other weights (version 0)" in caplog.text
    assert read_records(tmp_path / "step-00000000.other-2.jsonl")[0][1] == {"wrote": [[0, [301], [-1.0]]]}


def test_a_file_that_is_no_journal_is_not_overwritten(tmp_path, tokenizer):
    path = tmp_path / "step-00000000.jsonl"
    path.write_bytes(packed_line({"format": "longreach rollouts, 9"}))
    with pytest.raises(RequestError, match="not a rollout journal of this version"):
        RolloutJournal(tmp_path, 0, jobs_of(), tokenizer, weights=0)
    assert path.stat().st_size > 0


# ---- what a step asks -----------------------------------------------------------------------------------------------


def test_a_run_asks_each_problem_once_in_order_whatever_the_size_of_its_steps():
    def asked(problems):
        steps = range(60 // problems)
        return [job.problem.id for step in steps for job in jobs_of(step=step, problems=problems, group_size=1)]

    assert asked(5) == asked(12) == asked(60)
    counting = Counting({})
    assert asked(60)[::2] == [problem_at(counting, "train", 0, index).id for index in range(30)]


def test_members_of_a_group_differ_only_in_key_and_seed():
    jobs = jobs_of(step=3, problems=2, group_size=3)
    assert [job.key for job in jobs] == ["3/6/0", "3/6/1", "3/6/2", "3/7/0", "3/7/1", "3/7/2"]
    assert len({job.seed for job in jobs}) == 6
    assert len({job.problem.id for job in jobs[:3]}) == 1
    assert jobs == jobs_of(step=3, problems=2, group_size=3, tasks=[jobs[0].task, jobs[3].task])


@pytest.mark.parametrize(
    ("weights", "order"),
    [([1, 1], [0, 1]), ([1, 3], [1, 0, 1, 1]), ([0.5, 0.25, 0.25], [0, 1, 2, 0]), ([7], [0])],
)
def test_tasks_take_turns_by_their_weights(weights, order):
    assert task_order(weights) == order


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.7], [1, 2, 3, 4], [0.123456789, 1.0], [1e-9, 1.0, 3.3]])
def test_every_task_is_near_its_share_at_any_time(weights):
    order, counts = task_order(weights), Counter()
    for number, which in enumerate(order, 1):
        counts[which] += 1
        for task, weight in enumerate(weights):
            assert abs(counts[task] - number * weight / sum(weights)) < 2
    assert set(order) == set(range(len(weights)))


def test_a_tasks_problems_take_the_modes_in_turn():
    jobs = jobs_of(problems=12, group_size=1, modes=("non-think", "think-high", "think-max"))
    for task in ("counting", "adder"):
        modes = [job.mode for job in jobs if job.task.name == task]
        assert modes == ["non-think", "think-high", "think-max"] * 2
    assert {job.window for job in jobs if job.mode == "think-max"} == {1100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.0]}, "1 weights are given for 2 tasks"),
        ({"weights": [1.0, 0.0]}, "weight 0 of task adder must be above 0"),
        ({"weights": [1.0, float("inf")]}, "must be above 0"),
        ({"problems": 0}, "problems per step 0"),
        ({"group_size": 0}, "group size 0"),
        ({"modes": ()}, "no mode to answer in"),
        ({"windows": {}}, "mode non-think has no window"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        jobs_of(**changes)


def test_a_run_without_tasks_is_refused():
    with pytest.raises(RequestError, match="no task to draw problems from"):
        group_jobs([], [], step=0, problems=1, group_size=1, seed=0, modes=("non-think",), windows=WINDOWS,
                   params=SamplingParams())  # fmt: skip


# ---- drawing, interrupted anywhere ----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, writes: int, torn: int) -> None:
    """Stop at a journal's write number `writes`, of which `torn` bytes still come."""
    write, count = os.write, [0]

    def stop(file, data):
        count[0] += 1
        if count[0] > writes:
            if torn:
                write(file, data[:torn])
            raise Interrupted
        return write(file, data)

    monkeypatch.setattr(journal_module.os, "write", stop)


def roll_and_die(patch: pytest.MonkeyPatch, writes: int, torn: int, *arguments, **options) -> None:
    """`roll`, interrupted."""
    interrupt_after(patch, writes, torn)
    with pytest.raises(Interrupted):
        roll(*arguments, **options)
    patch.undo()


def roll(folder: Path, tokenizer, judging, source, jobs, step: int = 0, mark: str = "") -> list[Sample]:
    with Roller(folder, source, tokenizer, judging) as roller:
        return roller.roll(step, jobs, mark=mark)


def test_rollouts_interrupted_at_any_record_are_those_of_an_uninterrupted_run(
    tmp_path, tokenizer, judging, monkeypatch
):
    jobs = jobs_of(modes=("non-think", "think-high"))
    whole = roll(tmp_path / "whole", tokenizer, judging, Scripted(tokenizer), jobs)
    assert {len(sample.reply) for sample in whole} >= {1, 3}  # answers at once, and answers with a tool
    assert any(sample.verdict.is_right for sample in whole) and {s.finish for s in whole} == {FinishReason.STOP}
    records = read_records(tmp_path / "whole/rollouts/step-00000000.jsonl")[0]
    digest = rollout_digest(tmp_path / "whole")
    for writes in range(len(records)):
        folder = tmp_path / str(writes)
        roll_and_die(monkeypatch, writes, writes % 40, folder, tokenizer, judging, Scripted(tokenizer), jobs)
        again = roll(folder, tokenizer, judging, Scripted(tokenizer), jobs)
        assert all(map(same, whole, again)) and len(again) == len(whole)
        assert rollout_digest(folder) == digest


def test_a_step_that_is_complete_is_not_drawn_again(tmp_path, tokenizer, judging):
    jobs = jobs_of()
    whole = roll(tmp_path, tokenizer, judging, Scripted(tokenizer), jobs)
    source = Scripted(tokenizer)
    seen = []
    with Roller(tmp_path, source, tokenizer, judging) as roller:
        again = roller.roll(0, jobs, on_sample=seen.append)
        assert roller.taken_up == len(jobs)
    assert all(map(same, whole, again))
    assert source.submitted == 0
    assert len(seen) == len(jobs)


@pytest.mark.parametrize("writes", [1, 9, 60])
def test_an_engine_goes_on_from_the_very_token(tmp_path, tokenizer, judging, monkeypatch, writes):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, arithmetic="invariant")
    model = Transformer(config, seed=3)
    jobs = jobs_of(problems=3, group_size=3, tasks=[Counting({})], windows={"non-think": 90})

    def engine():
        return EngineSource(model, tokenizer, max_running=4, memory_gib=0.05)

    with engine() as source:
        whole = roll(tmp_path / "whole", tokenizer, judging, source, jobs, mark=weights_mark(model))
    with engine() as source:
        cut = (tmp_path / "cut", tokenizer, judging, source, jobs)
        roll_and_die(monkeypatch, writes, 5, *cut, mark=weights_mark(model))
    records = read_records(tmp_path / "cut/rollouts/step-00000000.jsonl")[0]
    known = sum(len(tokens) for record in records for _, tokens, _ in record.get("wrote", ()))
    with engine() as source:
        again = roll(tmp_path / "cut", tokenizer, judging, source, jobs, mark=weights_mark(model))
        made = source.engine.stats.generated_tokens
    assert all(map(same, whole, again))
    assert made + known == sum(sample.num_written for sample in whole)
    assert known > 0 or writes == 1
    assert rollout_digest(tmp_path / "cut") == rollout_digest(tmp_path / "whole")


def test_the_mark_of_weights_changes_with_every_step_of_the_optimizer(tokenizer):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size)
    model, same_model = Transformer(config, seed=3), Transformer(config, seed=3)
    assert weights_mark(model) == weights_mark(same_model)
    optimizer = make_optimizers(model, 1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert weights_mark(model) != weights_mark(same_model)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def three_steps(folder: Path, tokenizer, judging) -> None:
    for step in range(3):
        roll(folder, tokenizer, judging, Scripted(tokenizer), jobs_of(step=step, modes=("think-high",)), step=step)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_steps_before_a_checkpoint_are_kept_as_samples_without_loss(tmp_path, tokenizer, judging):
    three_steps(tmp_path, tokenizer, judging)
    before, digest = list(read_samples(tmp_path)), rollout_digest(tmp_path)
    keep_samples(tmp_path, 2)
    assert names(tmp_path) == [
        "rollouts/step-00000002.jsonl", "samples/step-00000000.jsonl.gz", "samples/step-00000001.jsonl.gz",
    ]  # fmt: skip
    assert list(read_samples(tmp_path)) == before
    assert rollout_digest(tmp_path) == digest
    assert [sample["step"] for sample in before] == [0] * 8 + [1] * 8 + [2] * 8
    assert list(read_samples(tmp_path, step=1)) == before[8:16]


def test_killed_while_samples_are_kept_nothing_is_lost_or_doubled(tmp_path, tokenizer, judging, monkeypatch):
    three_steps(tmp_path, tokenizer, judging)
    digest = rollout_digest(tmp_path)
    unlink = Path.unlink

    def stop(path, *arguments, **options):
        if path.suffix == ".jsonl":
            raise Interrupted
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(Interrupted):
        keep_samples(tmp_path, 3)
    monkeypatch.undo()
    assert len(names(tmp_path)) == 4  # step 0 is there twice
    assert rollout_digest(tmp_path) == digest
    whole = (tmp_path / "samples/step-00000000.jsonl.gz").read_bytes()
    keep_samples(tmp_path, 3)
    assert len(names(tmp_path)) == 3
    assert rollout_digest(tmp_path) == digest
    assert (tmp_path / "samples/step-00000000.jsonl.gz").read_bytes() == whole


def test_a_journal_that_is_not_complete_is_never_taken_for_its_step(tmp_path, tokenizer, judging, monkeypatch, caplog):
    jobs = jobs_of()
    roll_and_die(monkeypatch, 12, 0, tmp_path, tokenizer, judging, Scripted(tokenizer), jobs)
    keep_samples(tmp_path, 5)
    assert names(tmp_path) == ["rollouts/step-00000000.jsonl"]
    assert "of 8 samples; it stays where it is" in caplog.text


def test_steps_drawn_again_after_going_back_replace_what_was_kept(tmp_path, tokenizer, judging):
    """Whoever deletes the newest checkpoint goes on from the one before, maybe with other weights."""
    three_steps(tmp_path, tokenizer, judging)
    keep_samples(tmp_path, 3)
    digest = rollout_digest(tmp_path)
    roll(tmp_path, tokenizer, judging, Scripted(tokenizer), jobs_of(step=2, seed=9), step=2)
    assert rollout_digest(tmp_path) != digest
    keep_samples(tmp_path, 3)
    assert len(list(read_samples(tmp_path))) == 24
    assert {sample["seed"] for sample in read_samples(tmp_path, step=2)} == {
        job.seed for job in jobs_of(step=2, seed=9)
    }


def test_a_sample_can_be_read_without_tokenizer_or_task(tmp_path, tokenizer, judging):
    jobs = jobs_of(tasks=[Adder({})])
    samples = roll(tmp_path, tokenizer, judging, Scripted(tokenizer), jobs)
    read = next(read_samples(tmp_path))
    sample = samples[0]
    assert read["prompt"] == tokenizer.decode(sample.prompt)
    assert read["text"] == tokenizer.decode(sample.tokens)
    assert [message["role"] for message in read["reply"]] == ["assistant", "tool", "assistant"]
    assert read["reply"][0]["tool_calls"][0][0] == "add"
    assert read["reply"][1]["content"] == str(jobs[0].problem.answer)
    told = {name: read[name] for name in ("step", "key", "task", "domain", "problem", "level", "mode", "member")}
    assert told == {
        "step": 0, "key": "0/0/0", "task": "adder", "domain": "agentic", "problem": jobs[0].problem.id, "level": 1,
        "mode": "non-think", "member": 0,
    }  # fmt: skip
    assert (read["reward"], read["right"], read["finish"]) == (1.0, True, "stop")
    assert read["tokens"] == sum(sample.written) < len(sample.tokens)
    assert (read["token_ids"], read["written"]) == (sample.tokens, sample.written)
    assert read["logprobs"] == sample.logprobs
    assert [read["member"] for read in read_samples(tmp_path)] == [0, 1] * 4


def test_samples_are_read_while_the_run_goes_on_and_keeps_them(tmp_path, tokenizer, judging):
    three_steps(tmp_path, tokenizer, judging)
    whole = list(read_samples(tmp_path))
    reading = read_samples(tmp_path)
    begun = [next(reading) for _ in range(3)]
    keep_samples(tmp_path, 3)
    assert begun + list(reading) == whole


def test_samples_without_log_probabilities_are_kept_without(tmp_path, tokenizer):
    (job, *_) = jobs_of()
    sample = Sample(job, [0], [300, 301], [True, True], None, (), FinishReason.LENGTH, wrong("full"), 4)
    log = RolloutJournal(tmp_path / "rollouts", 4, [job], tokenizer, weights=4)
    log.wrote([(job, [300, 301], [float("nan")] * 2)])
    log.ended(sample)
    log.complete()
    again = RolloutJournal(tmp_path / "rollouts", 4, [job], tokenizer, weights=4)
    found = again.finished(job)
    assert found is not None
    assert same(found, sample)
    (read,) = read_samples(tmp_path)
    assert read["logprobs"] is None


def test_the_digest_sees_one_bit_of_one_log_probability_and_no_order(tmp_path, tokenizer):
    jobs = jobs_of()
    samples = [Sample(job, [0], [300], [True], [-0.5], (), FinishReason.STOP, Verdict(1.0, True), 0) for job in jobs]

    def digest(name, samples):
        log = RolloutJournal(tmp_path / name / "rollouts", 0, jobs, tokenizer, weights=0)
        for sample in samples:
            log.ended(sample)
        log.complete()
        return rollout_digest(tmp_path / name)

    told = digest("a", samples)
    assert digest("b", samples[::-1]) == told
    samples[0] = dataclasses.replace(samples[0], logprobs=[math.nextafter(-0.5, 0)])
    assert digest("c", samples) != told
    assert digest("d", samples[1:]) not in (told, digest("e", samples[2:]))


def test_a_folder_without_rollouts_and_a_damaged_file_are_clear_errors(tmp_path, tokenizer, judging):
    with pytest.raises(RequestError, match="does not exist; give the run directory"):
        next(read_samples(tmp_path / "nothing"))
    with pytest.raises(RequestError, match="holds no rollouts"):
        next(read_samples(tmp_path))
    three_steps(tmp_path, tokenizer, judging)
    keep_samples(tmp_path, 2)
    path = tmp_path / "samples/step-00000001.jsonl.gz"
    for data in (path.read_bytes()[:-9], b"nothing", gzip.compress(b"{")):
        path.write_bytes(data)
        with pytest.raises(RequestError, match=r"step-00000001.jsonl.gz is damaged"):
            list(read_samples(tmp_path))
        assert len(list(read_samples(tmp_path, step=0))) == 8
