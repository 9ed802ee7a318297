"""Judges that are right, wrong, slow, broken or deadly: each costs its own sample and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from episodes import Sums

from longreach.chat.messages import Conversation, Message
from longreach.errors import RequestError
from longreach.evaluate.judging import Judging, was_judged
from longreach.tasks.base import RIGHT, Problem, Verdict, wrong


class Apart(Sums):
    """Does what its problem's answer says."""

    kind = "apart"
    judged_apart = True

    def verify(self, problem, reply):
        match problem.answer:
            case "right":
                return RIGHT
            case "wrong":
                return wrong("it is wrong", 0.25)
            case "where":
                return Verdict(1.0, True, f"{os.getpid()} {'torch' in sys.modules}")
            case "raise":
                raise ValueError("no such\nnumber")
            case "exit":
                os._exit(3)
            case "shout":
                os.write(2, b"everything is lost\n")
                os._exit(4)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "sleep":
                time.sleep(600)
            case "regex":  # holds the interpreter's lock, for longer than anybody waits
                re.fullmatch(r"(a+)+b", "a" * 40)
            case "print":
                print("x" * 100_000)
                os.write(1, b"y" * 100_000)
                return RIGHT
            case "leave":  # a child that goes on and holds on to whatever it inherited
                subprocess.Popen(["sleep", "30"], close_fds=False)
                return RIGHT
            case float() as reward:
                return Verdict(reward, True)
        raise AssertionError(problem.answer)


class Unpicklable(Apart):
    def __init__(self) -> None:
        super().__init__({})
        self.held = lambda: None


class Counted(Apart):
    """Counts how often it is sent to a process."""

    sent = 0

    def __getstate__(self):
        type(self).sent += 1
        return self.__dict__


APART = Apart({})
REPLY = (Message("assistant", "5"),)


def asking(answer) -> Problem:
    return Problem("apart", Conversation((Message("user", str(answer)),)), answer)


def judge_all(judging: Judging, answers, task=APART) -> list[Verdict]:
    tickets = [judging.submit(task, asking(answer), REPLY) for answer in answers]
    verdicts = {}
    while judging.pending:
        verdicts.update(judging.wait())
    assert sorted(verdicts) == sorted(tickets)
    return [verdicts[ticket] for ticket in tickets]


@pytest.fixture(scope="module")
def shared():
    with Judging(workers=2, timeout_s=1.0) as judging:
        yield judging


def test_judges_apart_run_in_other_processes_beside_each_other_and_load_no_torch(shared):
    places = {verdict.why for verdict in judge_all(shared, ["where"] * 40)}
    assert 1 <= len(places) <= 2 and str(os.getpid()) not in {place.split()[0] for place in places}
    assert {place.split()[1] for place in places} == {"False"}


@pytest.mark.parametrize(
    ("deadly", "why"),
    [
        ("raise", "ValueError: no such number"),
        ("exit", "its process ended with 3"),
        ("shout", "its process ended with 4: everything is lost"),
        ("segfault", "its process ended by signal 11"),
        ("sleep", "it took longer than 1 s"),
        ("regex", "it took longer than 1 s"),
        (2.0, "it gave the reward 2.0, which is not from 0 to 1"),
        (float("nan"), "it gave the reward nan"),
    ],
)
def test_a_judge_that_fails_costs_only_its_own_sample(shared, deadly, why):
    failures = shared.failures["apart"]
    verdicts = judge_all(shared, ["right", "wrong", deadly, "right", "right"])
    assert verdicts[0] == verdicts[3] == verdicts[4] == RIGHT
    assert verdicts[1] == (0.25, False, "it is wrong") and was_judged(verdicts[1])
    assert verdicts[2][:2] == (0.0, False) and verdicts[2].why.startswith(f"the verifier failed: {why}")
    assert not was_judged(verdicts[2]) and shared.failures["apart"] == failures + 1


def test_a_pool_of_one_survives_any_order_of_failures():
    answers = ["exit", "sleep", "right", "raise", "segfault", "exit", "right", "sleep", "print", "right"]
    with Judging(workers=1, timeout_s=0.3) as judging:
        verdicts = judge_all(judging, answers)
    expected = [answer in ("right", "print") for answer in answers]
    assert [verdict.is_right for verdict in verdicts] == expected
    assert judging.judged["apart"] == 10 and judging.failures["apart"] == 6


def test_slow_judges_run_beside_each_other_and_their_time_begins_with_their_own_turn():
    with Judging(workers=4, timeout_s=0.5) as judging:
        judge_all(judging, ["where"] * 8)
        begin = time.monotonic()
        verdicts = judge_all(judging, ["sleep"] * 4 + ["right"] * 4)
        assert time.monotonic() - begin < 10
    assert [verdict.is_right for verdict in verdicts] == [False] * 4 + [True] * 4


def test_what_a_judge_leaves_behind_does_not_keep_the_pool_waiting(shared):
    with Judging(workers=1, timeout_s=20) as alone:
        verdicts = judge_all(alone, ["leave", "exit", "right"])
    assert verdicts[::2] == [RIGHT, RIGHT] and verdicts[1].why.endswith("its process ended with 3")
    assert judge_all(shared, ["leave", "right"]) == [RIGHT, RIGHT]
    begin = time.monotonic()
    shared.close()
    assert time.monotonic() - begin < 5


def test_tasks_that_cannot_be_sent_fail_with_a_reason(shared):
    verdicts = judge_all(shared, ["right"] * 5, Unpicklable())
    assert all("it cannot be sent to a judging process" in verdict.why for verdict in verdicts)


def test_a_task_is_sent_once_to_each_process():
    with Judging(workers=1) as judging:
        judge_all(judging, ["right"] * 10, Counted({}))
        assert Counted.sent == 1
        judge_all(judging, ["exit", "right"], Counted({}))
        assert Counted.sent == 2


def test_judging_here_catches_what_is_raised_and_starts_no_process():
    class Broken(Sums):
        def verify(self, problem, reply):
            return {}[problem.answer]

    with Judging() as judging:
        [verdict] = judge_all(judging, ["x"], Broken({}))
        assert verdict.why == "the verifier failed: KeyError: 'x'"
        assert judging.judge(Sums({}), Problem("sums", asking("2+3").conversation, 5), REPLY) == RIGHT
        assert judging._workers == []


def test_a_verdict_that_is_none_is_a_failure():
    class Wordless(Sums):
        def verify(self, problem, reply):
            return None

    with Judging() as judging:
        [verdict] = judge_all(judging, ["x"], Wordless({}))
    assert not was_judged(verdict)


def test_answers_for_a_batch_are_judged_together_and_last():
    asked = []

    class Batched(Sums):
        def judge_batch(self, pairs):
            asked.append(len(pairs))
            return [Verdict(0.5, True, problem.answer) for problem, _ in pairs]

    with Judging(workers=1) as judging:
        batch = Batched({})
        tickets = [judging.submit(batch, asking(str(number)), REPLY) for number in range(3)]
        slow = judging.submit(APART, asking("right"), REPLY)
        assert judging.ready() == [] and asked == []
        assert judging.wait() == [(slow, RIGHT)]
        assert [(t, v.why) for t, v in judging.wait()] == list(zip(tickets, "012", strict=True)) and asked == [3]
        assert judging.wait() == [] and judging.pending == 0


def test_what_was_forgotten_never_comes_back(shared):
    for answer in ("sleep", "right", "right"):
        shared.submit(APART, asking(answer), REPLY)
    shared.clear()
    assert shared.pending == 0 and shared.wait() == []
    assert judge_all(shared, ["right"]) == [RIGHT]


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_s": 0}, {"timeout_s": float("inf")}])
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(RequestError, match="give"):
        Judging(**options)


def test_a_process_that_cannot_be_started_is_said_once_and_clearly(monkeypatch):
    monkeypatch.setattr("longreach.evaluate.judging._PROGRAM", "import no_such_module_anywhere")
    with Judging(workers=1) as judging:
        judging.submit(APART, asking("right"), REPLY)
        with pytest.raises(RequestError, match=r"could not be started: .*no_such_module_anywhere"):
            judging.wait()


def test_a_judge_whose_master_was_killed_ends_by_itself():
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from test_judging import *; "
        "judging = Judging(workers=1, timeout_s=0.2); judging.submit(APART, asking('where'), REPLY); "
        "print(judging.wait()[0][1].why.split()[0], flush=True); judging.submit(APART, asking('regex'), REPLY); "
        "worker = judging._workers[0]; worker.hear(9); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)], capture_output=True, text=True, timeout=60
    )
    process = int(done.stdout)
    until = time.monotonic() + 20
    while is_running(process):
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
