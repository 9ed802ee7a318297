"""Runs that are killed anywhere give the same rollouts and the same weights as one that never was.

As a script, `python test_rollout_kill.py FOLDER PLAN` is the run: `longreach grpo` itself, or a plain loop of rollouts after
which the weights change by what was drawn, so that one token more or less would change everything behind it. It is killed and
started again as the plan, a JSON object, says. Each start is a fork of a process that has loaded everything and done nothing:
a start from the disk alone, without the seconds that imports take.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS, PROBLEMS, GROUP, EVERY = 7, 6, 4, 3


# ---- the run --------------------------------------------------------------------------------------------------------


def prepared() -> tuple[Any, Any]:
    """Tokenizer and model at the start."""
    import torch

    torch.set_num_threads(1)
    from serving import make_tokenizer

    from longreach.model.config import ModelConfig
    from longreach.model.transformer import Transformer

    tokenizer = make_tokenizer()
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, arithmetic="invariant")
    return tokenizer, Transformer(config, seed=3)


def run_loop(folder: Path, tokenizer: Any, model: Any) -> None:
    """The plain loop, from the last checkpoint to the end."""
    from longreach.engine.sampling import SamplingParams
    from longreach.evaluate.engine_source import EngineSource
    from longreach.evaluate.judging import Judging
    from longreach.tasks.registry import open_task
    from longreach.train.rollout import Roller, group_jobs, weights_mark
    from longreach.train.state import newest_state, save_state, state_files

    step, state_dir = 0, folder / "state"
    if state_files(state_dir):
        state = newest_state(state_dir)
        model.load_state_dict(state["model"])
        step = state["step"]
    tasks = [open_task("arithmetic:level=1"), open_task("arithmetic:level=2")]
    with Judging(workers=1) as judging, EngineSource(model, tokenizer, max_running=16, memory_gib=0.1) as source:
        roller = Roller(folder, source, tokenizer, judging)
        roller.cover(step)
        while step < STEPS:
            jobs = group_jobs(
                tasks, [2, 1], step=step, problems=PROBLEMS, group_size=GROUP, seed=5, modes=("non-think", "think-high"),
                windows={"non-think": 40, "think-high": 60}, params=SamplingParams(),
            )  # fmt: skip
            samples = roller.roll(step, jobs, mark=weights_mark(model))
            change(model, samples)
            source.weights_changed()
            step += 1
            if step % EVERY == 0 or step == STEPS:
                save_state(state_dir, step, {"model": model.state_dict(), "step": step}, EVERY)
                roller.cover(step)


def run_command(folder: Path, tokenizer: Any, model: Any) -> None:
    """`longreach grpo`, begun or resumed."""
    from longreach.checkpoint.save import save_model
    from longreach.rundir import find_model
    from longreach.tasks import registry
    from longreach.train.grpo import main as grpo
    from longreach.train.grpo_options import GRPOOptions

    # Its rewards differ by chance within a group of untrained answers, so that there is something to learn.
    registry.TASKS["counting"] = "test_rollout:Counting"
    start, is_begun = folder.parent / "start", (folder / "config.json").is_file()
    if not start.exists():
        save_model(model, start, tokenizer=tokenizer)
    if not is_begun:
        shutil.rmtree(folder, ignore_errors=True)  # as a user would, told that it is no run
    options = GRPOOptions(
        run=None if is_begun else find_model(start), out=folder, resume=is_begun, steps=STEPS, checkpoint_every=EVERY,
        task=("counting",), modes=("non-think",), windows="non-think=40", problems=PROBLEMS, group_size=GROUP,
        lr=0.003, eval_count=0, memory_gib=0.1, threads=1, device="cpu",
    )  # fmt: skip
    assert grpo(options) == 0


RUNS = {"loop": run_loop, "grpo": run_command}


def change(model: Any, samples: list[Any]) -> None:
    """What stands for learning: a small change that is a function of every token and log-probability."""
    import torch

    told = json.dumps([[s.tokens, [float(p).hex() for p in s.logprobs], s.verdict.reward] for s in samples])
    seed = int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))


# ---- killing it -----------------------------------------------------------------------------------------------------

CALLS = ("write", "fsync", "replace", "unlink")
"""What a crash point is counted in: every way by which the run changes the disk."""


def die_at(call: str, number: int) -> None:
    """End the process at the `number`-th call of this kind; of what a write was given, half is written."""
    plain, count = getattr(os, call), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            if call == "write":
                plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(9)
        return plain(*arguments, **options)

    setattr(os, call, counted)


def start(run: Callable[..., None], folder: Path, tokenizer: Any, model: Any,
          crash: tuple[str, int] | None = None) -> int:  # fmt: skip
    """Fork the run; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if crash is not None:
            die_at(*crash)
        run(folder, tokenizer, model)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """Exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, plan: dict[str, Any]) -> None:
    """Start the run again and again. Prints one JSON object: how its starts ended, and the seconds of the last.

    A plan has `run`, a name of `RUNS`, and `kills` and `within_s` (signals after a random time), or `call`: then start number i
    dies at its i-th such call, times `stride`.
    """
    run = (RUNS[plan["run"]], folder, *prepared())
    codes: list[int] = []
    rng = random.Random(plan.get("seed", 0))
    while codes.count(-signal.SIGKILL) < plan.get("kills", 0):
        pid = start(*run)
        time.sleep(rng.uniform(0, plan["within_s"]))
        os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid))
        if codes[-1] == 0:
            break
    while "call" in plan and (not codes or codes[-1] == 9):
        codes.append(ended(start(*run, (plan["call"], 1 + len(codes) * plan["stride"]))))
    begin = time.monotonic()
    codes.append(ended(start(*run)))
    print(json.dumps({"codes": codes, "last_s": time.monotonic() - begin}))


# ---- the tests ------------------------------------------------------------------------------------------------------


def result(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Do the run by this plan: how its starts ended, a digest of all rollouts, and one of the weights."""
    from longreach.rundir import RunDirectory
    from longreach.train.rollout import read_samples, rollout_digest
    from longreach.train.state import newest_state

    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, str(folder), json.dumps(plan)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["codes"][-1] == 0, done.stderr
    assert set(told["codes"]) <= {0, 9, -signal.SIGKILL}, done.stderr
    keys = [sample["key"] for sample in read_samples(folder)]
    assert len(keys) == len(set(keys)) == STEPS * PROBLEMS * GROUP
    if plan["run"] == "loop":
        assert not list((folder / "rollouts").iterdir())
        assert not list((folder / "samples").glob(".*"))
    else:  # the command does nothing at all to a run that is finished, so journals of its last steps may be left
        records = [record for record in RunDirectory(folder).read_metrics() if "reward" in record]
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert any(record["useless_groups"] < 1 for record in records)  # so that weights depend on what was drawn
    state = newest_state(folder / "state")
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state["model"].values()))
    return told | {"rollouts": rollout_digest(folder), "weights": weights.hexdigest(), "step": state["step"]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a run of this name comes to when nobody disturbs it."""
    known: dict[str, dict[str, Any]] = {}

    def whole(run: str) -> dict[str, Any]:
        if run not in known:
            known[run] = result(tmp_path_factory.mktemp(run) / "run", {"run": run})
        return known[run]

    return whole


def check_same(killed: dict[str, Any], whole: dict[str, Any]) -> None:
    assert {name: killed[name] for name in ("rollouts", "weights", "step")} == {
        name: whole[name] for name in ("rollouts", "weights", "step")
    }


def kill_randomly(folder: Path, run: str, whole: dict[str, Any], kills: int, seed: int) -> None:
    # A start has on average 1 / (kills + 2) of what the whole run takes; much of it goes to standing where the last was.
    plan = {"run": run, "kills": kills, "within_s": whole["last_s"] * 2 / (kills + 2), "seed": seed}
    told = result(folder, plan)
    assert told["codes"].count(-signal.SIGKILL) >= kills - 2, told["codes"]
    check_same(told, whole)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_killed_at_random_instants_gives_the_same_rollouts_and_weights(tmp_path, uninterrupted, run):
    kill_randomly(tmp_path / "run", run, uninterrupted(run), kills=4, seed=1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("call", "stride"),
    [
        ("write", 67),
        ("replace", 1),
        pytest.param("fsync", 2, marks=SLOW),
        pytest.param("unlink", 1, marks=SLOW),
        pytest.param("write", 31, marks=SLOW),
    ],
)
def test_a_run_that_dies_at_any_change_of_the_disk_gives_the_same(tmp_path, uninterrupted, call, stride):
    """In the middle of a record, before a checkpoint or kept samples get their name, before a journal goes."""
    told = result(tmp_path / "run", {"run": "loop", "call": call, "stride": stride})
    assert told["codes"].count(9) >= 3, told["codes"]
    check_same(told, uninterrupted("loop"))


@pytest.mark.slow
@pytest.mark.parametrize(("call", "stride"), [("write", 41), ("fsync", 5), ("replace", 2), ("unlink", 1)])
def test_grpo_that_dies_at_any_change_of_the_disk_gives_the_same(tmp_path, uninterrupted, call, stride):
    told = result(tmp_path / "run", {"run": "grpo", "call": call, "stride": stride})
    assert told["codes"].count(9) >= 3, told["codes"]
    check_same(told, uninterrupted("grpo"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("run", RUNS)
def test_three_runs_killed_ten_times_each_give_the_same_rollouts_and_weights(tmp_path, uninterrupted, run, seed):
    kill_randomly(tmp_path / "run", run, uninterrupted(run), kills=10, seed=seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
