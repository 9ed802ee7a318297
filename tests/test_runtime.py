"""Decisions with reasons, files that appear whole, lines of JSON, run directories."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from longreach.errors import RequestError
from longreach.rundir import RunDirectory, find_model
from longreach.runtime import (
    choose_device,
    choose_dtype,
    json_line,
    log,
    other_load,
    set_threads,
    setup_logging,
    write_atomic,
)


def test_a_choice_says_what_and_why():
    assert str(choose_device("cpu")) == "cpu (asked for)"
    assert choose_dtype("bfloat16", torch.device("cpu")).value is torch.bfloat16
    assert choose_dtype("auto", torch.device("cuda"), training=True).value is torch.float32
    assert choose_dtype("auto", torch.device("cuda")).value is torch.bfloat16


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "mps", ""])
def test_a_device_that_is_unknown_or_absent_is_refused(name):
    with pytest.raises(RequestError, match="device"):
        choose_device(name)


def test_threads_leave_out_the_cores_that_others_use(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for load, expected in ((None, 8), (0.4, 8), (2.6, 5), (50.0, 1)):
        monkeypatch.setattr("longreach.runtime.other_load", lambda seconds, load=load: load)
        assert set_threads(None).value == expected
    assert set_threads(3) == (3, "asked for")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/stat")
def test_the_load_of_others_leaves_out_our_own_threads():
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    before = other_load(0.3)
    worker = threading.Thread(target=spin)
    worker.start()
    during = other_load(0.5)
    stop.set()
    worker.join()
    assert before is not None
    assert during is not None
    assert during < before + 0.7, "a busy thread of this process was counted as another's"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "one ü")
    assert path.read_bytes() == "one ü".encode()

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"two")
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_bytes() == "one ü".encode()


def test_a_new_file_has_the_usual_mode(tmp_path):
    write_atomic(tmp_path / "ours", "x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_lines_are_valid_json_whatever_the_numbers():
    line = json_line({"loss": math.nan, "list": [math.inf, 1.5], "path": Path("a"), "text": "ü\n"})
    assert "\n" not in line
    assert json.loads(line) == {"loss": None, "list": [None, 1.5], "path": "a", "text": "ü\n"}


def test_logging_goes_to_stderr_once_however_often_it_is_set_up(capsys):
    setup_logging()
    setup_logging()
    log.info("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_metrics_after_a_step_can_be_dropped_and_a_cut_line_is_ignored(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create({"command": "test"})
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 1 / step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    run.drop_metrics_after(2)
    assert run.metrics_path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "holds no model"),
        (["config.json", "metrics.jsonl"], "has not saved a model yet"),
        (["config.json"], "holds no model"),
    ],
)
def test_a_directory_without_a_model_says_so(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(RequestError, match=expected):
        find_model(tmp_path)


def test_a_model_is_found_from_the_run_from_its_model_folder_and_from_any_checkpoint(tmp_path):
    checkpoint = tmp_path / "run" / "model"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (checkpoint / name).write_text("{}")
    assert find_model(tmp_path / "run") == find_model(checkpoint) == checkpoint
    with pytest.raises(RequestError, match="is a file"):
        find_model(checkpoint / "config.json")
