"""The mirror of metric records: TensorBoard sees each step once, W&B stays offline, and neither can stop training."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from longreach.errors import RequestError
from longreach.rundir import RunDirectory
from longreach.runtime import setup_logging
from longreach.train.mirror import open_mirror


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "base")
    run.create({})
    return run


def feed(mirror: Any, run: RunDirectory, *records: dict[str, Any]) -> None:
    for record in records:
        run.append_metrics(record)
        mirror.log(record)


def test_no_mirror_takes_records_and_leaves_nothing(run):
    mirror = open_mirror("none", run, {})
    mirror.log({"step": 1, "loss": 2.0})
    mirror.close()
    assert [p.name for p in run.path.iterdir()] == ["config.json"]


def test_an_unknown_kind_is_refused(run):
    with pytest.raises(RequestError, match="--mirror mlflow: choose none, tensorboard or wandb"):
        open_mirror("mlflow", run, {})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(run, monkeypatch, kind):
    for name in [n for n in sys.modules if n.split(".")[0] == kind or n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(RequestError) as caught:
        open_mirror(kind, run, {})
    assert str(caught.value) == f"--mirror {kind} needs its package: pip install {kind}"


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def board(run: RunDirectory) -> Any:
    """What TensorBoard shows of a run."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(run.path / "mirror" / "tensorboard"))
    accumulator.Reload()
    return accumulator


def scalars(run: RunDirectory, key: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(run).Scalars(key)]


def test_tensorboard_gets_numbers_as_curves_and_events_as_text(run):
    pytest.importorskip("tensorboard")
    mirror = open_mirror("tensorboard", run, {"lr": 0.5})
    feed(
        mirror, run,
        {"step": 0, "event": "stage", "text": "dense"},
        {"step": 1, "loss": 2.0, "mtp_loss": None, "note": "x", "done": True}, {"step": 1, "val_loss": 3.0},
    )  # fmt: skip
    mirror.close()
    assert set(board(run).Tags()["scalars"]) == {"loss", "val_loss"}
    assert (scalars(run, "loss"), scalars(run, "val_loss")) == ([(1, 2.0)], [(1, 3.0)])
    assert set(board(run).Tags()["tensors"]) == {"config/text_summary", "event/text_summary"}
    (config,) = board(run).Tensors("config/text_summary")
    assert b'"lr": 0.5' in config.tensor_proto.string_val[0]
    (event,) = board(run).Tensors("event/text_summary")
    assert event.tensor_proto.string_val[0] == b"stage: dense"


def test_a_resumed_run_shows_each_step_once(run):
    pytest.importorskip("tensorboard")
    mirror = open_mirror("tensorboard", run, {})
    feed(mirror, run, *({"step": step, "loss": float(step)} for step in range(1, 6)))
    mirror.close()
    run.drop_metrics_after(3)  # the last checkpoint was at step 3
    mirror = open_mirror("tensorboard", run, {})
    feed(mirror, run, {"step": 4, "loss": 40.0})
    mirror.close()
    assert scalars(run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert len(board(run).Tensors("config/text_summary")) == 1


def test_steps_that_training_took_back_disappear(run):
    pytest.importorskip("tensorboard")
    mirror = open_mirror("tensorboard", run, {})
    feed(
        mirror, run,
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 99.0}, {"step": 3, "val_loss": 5.0},
        {"step": 3, "event": "rollback"}, {"step": 2, "loss": 2.5}, {"step": 2, "val_loss": 4.0},
    )  # fmt: skip
    mirror.close()
    assert scalars(run, "loss") == [(1, 1.0), (2, 2.5)]
    assert scalars(run, "val_loss") == [(2, 4.0)]


# ---- W&B ------------------------------------------------------------------------------------------------------------


class NotLoggedIn(Exception): ...


@pytest.fixture
def wandb(monkeypatch) -> list[tuple[str, Any]]:
    """A stand-in that writes down what it is asked to do."""
    calls: list[tuple[str, Any]] = []
    session = SimpleNamespace(
        log=lambda record: calls.append(("log", record)),
        define_metric=lambda name, step_metric: calls.append(("define_metric", (name, step_metric))),
        finish=lambda: calls.append(("finish", None)),
    )

    def init(**arguments: Any) -> SimpleNamespace:
        calls.append(("init", arguments))
        if arguments["mode"] == "online" and arguments["name"] == "stranger":
            raise NotLoggedIn("no API key")
        return session

    module = SimpleNamespace(init=init, Settings=lambda **settings: settings, Error=NotLoggedIn)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


def test_wandb_is_offline_and_draws_over_the_steps_of_the_records(run, wandb):
    mirror = open_mirror("wandb", run, {"lr": 0.5})
    mirror.log({"step": 7, "loss": 2.0, "mtp_loss": None})
    mirror.log({"step": 8, "event": "stage", "text": "dense"})
    mirror.close()
    names, values = zip(*wandb, strict=True)
    assert names == ("init", "define_metric", "log", "log", "finish")
    assert {k: values[0][k] for k in ("mode", "name", "dir", "config", "resume")} == {
        "mode": "offline", "name": "base", "dir": str(run.path / "mirror"), "config": {"lr": 0.5}, "resume": "allow",
    }  # fmt: skip
    assert values[1:4] == (("*", "step"), {"step": 7, "loss": 2.0}, {"step": 8, "event": "stage: dense"})


def test_wandb_takes_the_mode_of_the_environment_and_a_resumed_run_keeps_its_id(run, wandb, monkeypatch):
    open_mirror("wandb", run, {}).close()
    monkeypatch.setenv("WANDB_MODE", "online")
    open_mirror("wandb", run, {}).close()
    first, second = (arguments for name, arguments in wandb if name == "init")
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert first["id"] == second["id"] != ""


@pytest.mark.usefixtures("wandb")
def test_a_service_that_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(RequestError, match="--mirror wandb cannot start with WANDB_MODE=online: no API key"):
        open_mirror("wandb", RunDirectory(tmp_path / "stranger"), {})


def test_a_mirror_that_fails_is_named_once_and_stops_nothing(run, wandb, capsys, monkeypatch):
    setup_logging()
    mirror = open_mirror("wandb", run, {})

    def full(record: dict[str, Any]) -> None:
        wandb.append(("log", record))
        raise OSError("disk full")

    monkeypatch.setattr(mirror.wandb_run, "log", full)  # pyright: ignore[reportAttributeAccessIssue]
    mirror.log({"step": 1, "loss": 2.0})
    mirror.log({"step": 2, "loss": 2.0})
    mirror.close()
    assert [name for name, _ in wandb].count("log") == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["wandb mirror stopped (disk full); metrics.jsonl goes on"]
