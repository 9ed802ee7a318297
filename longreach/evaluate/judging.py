"""Answers to judges, in parallel and under time limits: a judge that fails costs its own sample and nothing else.

    with Judging(workers=2, timeout_s=10) as judging:
        ticket = judging.submit(task, problem, reply)
        for ticket, verdict in judging.wait():
            …

There are three kinds of judges.

- Most tasks drawn here compare numbers or words in microseconds, less than sending the answer elsewhere would take. They are
  asked at once, in this process. An exception is caught; one that never returned would stop everything, so this is only for
  judges whose time is bounded by the answer's length.
- A task with the attribute `judged_apart = True` (it runs programs, or calls a library for mathematics), and one of a user's
  file unless it says `judged_apart = False`, is asked in worker processes. A judge that takes longer than `timeout_s`, raises,
  or takes the process down with it is said to have failed; a new process takes the next answer.
- A task with a method `judge_batch(pairs of problem and reply)` is asked for all its answers at once, when nothing else is
  left to be judged: a model that judges wants a batch, and may be the very one that wrote the answers.

Tasks are sent to the workers by pickle, once each. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from longreach.chat.messages import Message
from longreach.errors import RequestError
from longreach.tasks.base import Problem, Task, Verdict

START_S = 60.0
"""Seconds a worker may take to start, and to load a task."""

FAILED = "the verifier failed: "
"""What the reason of a verdict begins with where there is none."""

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from longreach.evaluate.judging_worker import main; main(int(sys.argv[1]))"
)


def failure(why: str) -> Verdict:
    """The verdict on an answer that could not be judged."""
    return Verdict(0.0, False, FAILED + " ".join(why.split()))


def was_judged(verdict: Verdict) -> bool:
    """Whether a judge came to this verdict."""
    return not verdict.why.startswith(FAILED)


@dataclass
class _Question:
    ticket: int
    task: Task
    problem: Problem
    reply: tuple[Message, ...]


class Judging:
    """Judges at work.

    Args:
        workers: processes at most; they start when a task needs them. None: one per core, four at most.
        timeout_s: for one answer, in a worker.

    Attributes:
        judged, failures: by task, how many answers were judged and how many of them could not be.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 10.0) -> None:
        if workers is not None and workers < 1:
            raise RequestError(f"{workers} judging processes are too few; give 1 or more")
        if not 0 < timeout_s < math.inf:
            raise RequestError(f"a time limit of {timeout_s} s for judges makes no sense; give more than 0")
        self.num_workers = workers or min(4, os.cpu_count() or 1)
        self.timeout_s = timeout_s
        self.judged: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._tickets = itertools.count()
        self._done: list[tuple[int, Verdict]] = []
        self._waiting: deque[_Question] = deque()
        self._batches: dict[str, list[_Question]] = {}
        self._workers: list[_Worker] = []

    @property
    def pending(self) -> int:
        """Answers whose verdicts were not fetched yet."""
        batched = sum(map(len, self._batches.values()))
        return len(self._done) + len(self._waiting) + batched + sum(worker.is_busy for worker in self._workers)

    def submit(self, task: Task, problem: Problem, reply: Sequence[Message]) -> int:
        """Have an answer judged; returns the ticket its verdict will carry."""
        question = _Question(next(self._tickets), task, problem, tuple(reply))
        if hasattr(task, "judge_batch"):
            self._batches.setdefault(task.name, []).append(question)
        elif getattr(task, "judged_apart", task.size is not None):
            self._waiting.append(question)
            self._assign()
        else:
            self._settle(question, ask(task, problem, question.reply))
        return question.ticket

    def ready(self) -> list[tuple[int, Verdict]]:
        """The verdicts there are, without waiting for more."""
        if self._waiting or any(worker.is_busy for worker in self._workers):
            self._listen(0.0)
        return self._take()

    def wait(self) -> list[tuple[int, Verdict]]:
        """At least one verdict, as soon as there is one; none only where nothing is pending."""
        while not self._done and (self._waiting or any(worker.is_busy for worker in self._workers)):
            self._listen(None)
        if not self._done and self._batches:
            self._ask_batch(*self._batches.popitem())
        return self._take()

    def judge(self, task: Task, problem: Problem, reply: Sequence[Message]) -> Verdict:
        """One answer, waited for. Not while others are pending."""
        assert not self.pending, "verdicts of others would be lost"
        self.submit(task, problem, reply)
        [(_, verdict)] = self.wait()
        return verdict

    def clear(self) -> None:
        """Forget all that is pending; workers that are busy end."""
        self._waiting.clear()
        self._batches.clear()
        self._done.clear()
        for worker in self._workers:
            if worker.is_busy:
                worker.kill()
        self._workers = [worker for worker in self._workers if worker.is_alive]

    def close(self) -> None:
        """End the workers. The pool may be used again afterwards: it starts others."""
        self.clear()
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _take(self) -> list[tuple[int, Verdict]]:
        done, self._done = self._done, []
        return done

    def _settle(self, question: _Question, verdict: Verdict) -> None:
        self.judged[question.task.name] += 1
        self.failures[question.task.name] += not was_judged(verdict)
        self._done.append((question.ticket, verdict))

    def _ask_batch(self, name: str, questions: list[_Question]) -> None:
        task: Any = questions[0].task
        verdicts = task.judge_batch([(question.problem, question.reply) for question in questions])
        assert len(verdicts) == len(questions), f"task {name} gave {len(verdicts)} verdicts on {len(questions)} answers"
        for question, verdict in zip(questions, verdicts, strict=True):
            self._settle(question, verdict)

    # ---- worker processes -------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Give waiting answers to idle workers, and start workers while there are more answers than those."""
        self._workers = [worker for worker in self._workers if worker.is_alive]
        for worker in self._workers:
            while self._waiting and worker.is_idle:
                question = self._waiting.popleft()
                if (why := worker.ask(question, self.timeout_s)) is not None:
                    self._settle(question, failure(why))
        starting = sum(worker.is_starting for worker in self._workers)
        if len(self._waiting) > starting and len(self._workers) < self.num_workers:
            self._workers.append(_Worker())

    def _listen(self, timeout_s: float | None) -> None:
        """Hear what the workers say, for so long at most (None: until one says something or runs out of time)."""
        self._assign()
        at_work = [worker for worker in self._workers if worker.is_alive and not worker.is_idle]
        if not at_work:
            return
        if timeout_s is None:
            timeout_s = max(0.0, min(worker.deadline for worker in at_work) - time.monotonic())
        heard = wait([worker.connection for worker in at_work], timeout_s)
        for worker in at_work:
            question, why = worker.question, None
            if worker.connection in heard:
                answer, why = worker.hear(self.timeout_s)
                if question is not None and answer is not None:
                    self._settle(question, answer)
            elif worker.deadline <= time.monotonic():
                why = worker.expired(self.timeout_s)
                worker.kill()
            if why is not None and question is not None:
                self._settle(question, failure(why))
            elif why is not None:
                raise RequestError(f"a process for judging answers could not be started: {why}")
        self._assign()


def ask(task: Task, problem: Problem, reply: Sequence[Message]) -> Verdict:
    """A judge's verdict, or what went wrong in place of it."""
    try:
        return _checked(*task.verify(problem, reply))
    except Exception as error:  # a judge may be anybody's code: it costs its own answer
        return failure(f"{type(error).__name__}: {error}")


def _checked(reward: Any, is_right: Any, why: Any) -> Verdict:
    reward = float(reward)
    if not 0 <= reward <= 1:
        return failure(f"it gave the reward {reward}, which is not from 0 to 1")
    return Verdict(reward, bool(is_right), str(why))


@dataclass
class _Worker:
    """A process, and the connection to it.

    Attributes:
        question: what it is at; None while it starts and while it is idle. is_loading: the task is on its way to it.
        deadline: seconds of the monotonic clock after which it is killed; infinity while it is idle.
    """

    connection: Connection = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    question: _Question | None = None
    is_starting: bool = True
    is_loading: bool = False
    is_alive: bool = True
    deadline: float = field(default_factory=lambda: time.monotonic() + START_S)
    _tasks: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.connection, theirs = Pipe()
        self._said, name = tempfile.mkstemp()
        os.unlink(name)
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        # A session of its own: killing it kills what its judge has started.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), path], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    @property
    def is_busy(self) -> bool:
        return self.question is not None

    @property
    def is_idle(self) -> bool:
        return self.is_alive and not self.is_starting and self.question is None

    def ask(self, question: _Question, timeout_s: float) -> str | None:
        """Hand it a question; returns why it cannot be asked, if so."""
        task = question.task
        is_new = task.name not in self._tasks
        try:
            sent = (
                task.name, pickle.dumps(task) if is_new else None, pickle.dumps((question.problem, question.reply)), timeout_s,
            )  # fmt: skip
        except Exception as error:  # pickle raises whatever an object's own methods do
            return f"it cannot be sent to a judging process: {type(error).__name__}: {error}"
        try:
            self.connection.send_bytes(pickle.dumps(sent))
        except OSError:
            return f"its process {self._end()}"
        self.question, self.is_loading, self.deadline = question, True, time.monotonic() + START_S
        return None

    def hear(self, timeout_s: float) -> tuple[Verdict | None, str | None]:
        """What it says: a verdict, or why there is none, or neither while it is at work."""
        try:
            said = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None, f"its process {self._end()}"
        if "ready" in said:
            self.is_starting, self.deadline = False, math.inf
        elif "loaded" in said:
            assert self.question is not None
            self._tasks.add(self.question.task.name)
            self.is_loading, self.deadline = False, time.monotonic() + timeout_s
        else:
            self.question, self.deadline = None, math.inf
            if "verdict" in said:
                return _checked(*said["verdict"]), None
            return None, said["failed"]
        return None, None

    def expired(self, timeout_s: float) -> str:
        """What its deadline was for."""
        if self.is_starting:
            return f"it was not there within {START_S:g} s"
        if self.is_loading:
            return f"its task could not be loaded within {START_S:g} s"
        return f"it took longer than {timeout_s:g} s"

    def kill(self) -> None:
        """End it and all that it has started."""
        self.is_alive, self.question, self.deadline = False, None, math.inf
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        os.close(self._said)

    def _end(self) -> str:
        """It is gone, or going: how it ended, with the last line of its standard error."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        size = os.fstat(self._said).st_size
        lines = os.pread(self._said, 4096, max(0, size - 4096)).decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        self.kill()
        how = (
            "closed its connection"
            if code is None
            else f"ended by signal {-code}"
            if code < 0
            else f"ended with {code}"
        )
        return f"{how}: {last[:200]}" if last else how
