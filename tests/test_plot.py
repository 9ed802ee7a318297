"""`longreach plot`: what is read from a run, the page and the picture, and what is refused."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from longreach.train.curves import MAX_POINTS, figure, panels_of, read_runs, thinned, ticks, y_range
from longreach.train.plot import plot_losses, png_size


def training(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 4.0,
        "lr": 0.01,
        "grad_norm": 1.0,
        "tokens_per_s": 100.0,
        "seconds": 60.0 * step,
        **more,
    }


@pytest.fixture
def make_run(tmp_path):
    def make(name: str, records: list[dict[str, Any]]) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return run

    return make


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def curve(path: Path, panel: str, name: str, run: int = 0) -> list[tuple[float, float]]:
    """The points that the page shows under the pointer."""
    curves = next(p["curves"] for p in data_of(path)["panels"] if p["key"] == panel)
    found = next(c for c in curves if (c["run"], c["name"]) == (run, name))
    return list(zip(found["x"], found["y"], strict=True))


def drawing(path: Path, panel: str) -> ET.Element:
    """The SVG of one panel; it is XML, or this fails."""
    found = re.search(rf'<svg class="panel" id="panel-{panel}".*?</svg>', path.read_text("utf-8"), re.DOTALL)
    assert found, panel
    return ET.fromstring(found[0])


def parts(svg: ET.Element, kind: str) -> list[ET.Element]:
    return [element for element in svg.iter() if element.get("class") == kind]


def size_of_png(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_run_gets_a_page_and_a_picture_of_the_stated_size(longreach_command, make_run):
    run = make_run("base", [training(step) for step in range(1, 6)])
    result = longreach_command("plot", run)
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        f"page: {run}/plot.html", f"picture: {run}/plot.png",
        f"next: python -m webbrowser {(run / 'plot.html').as_uri()}",
    ]  # fmt: skip
    panels = [panel["key"] for panel in data_of(run / "plot.html")["panels"]]
    assert panels == ["loss", "lr", "grad_norm", "tokens_per_s"]
    assert size_of_png(run / "plot.png") == png_size(4) == (1600, 1240)


def test_out_writes_that_file_and_no_other(longreach_command, make_run, tmp_path):
    run = make_run("base", [training(1), training(2)])
    for name in ("deep/curves.png", "curves.html"):
        result = longreach_command("plot", run, "--out", tmp_path / name)
        assert (result.code, result.out.count("\n")) == (0, 2)
        assert (tmp_path / name).is_file()
    assert size_of_png(tmp_path / "deep/curves.png") == (1600, 1240)
    assert [p.name for p in run.iterdir()] == ["metrics.jsonl"]


def test_json_gives_the_smoothed_and_the_best_loss_of_each_run(longreach_command, make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(
        "a", [training(1, loss=1.0), {"step": 1, "val_loss": 2.0}, training(2, loss=0.0), {"step": 2, "val_loss": 3}]
    )
    make_run("b", [training(1, loss=5.0)])
    result = longreach_command("plot", "a", "b", "--smooth", 0.5, "--json")
    record = json.loads(result.out.splitlines()[-1])
    assert record == {
        "runs": [
            {"run": "a", "label": "a", "step": 2, "loss": pytest.approx(1 / 3), "best_val_loss": 2.0, "best_val_step": 1},
            {"run": "b", "label": "b", "step": 1, "loss": 5.0, "best_val_loss": None, "best_val_step": None},
        ],
        "files": ["plot.html", "plot.png"],
    }  # fmt: skip
    assert (tmp_path / "plot.html").is_file() and (tmp_path / "plot.png").is_file()


@pytest.mark.parametrize("keep", [0, 0.5])
def test_the_page_has_the_values_and_draws_them_raw_and_smoothed(longreach_command, make_run, keep):
    run = make_run("base", [training(1, loss=1.0), training(2, loss=0.0), {"step": 2, "val_loss": 0.5}])
    assert longreach_command("plot", run, "--out", run / "p.html", "--smooth", keep).code == 0
    last = pytest.approx(1 / 3, abs=1e-5) if keep else 0.0
    assert curve(run / "p.html", "loss", "training") == [(1, 1.0), (2, last)]
    assert curve(run / "p.html", "loss", "validation") == [(2, 0.5)]
    svg = drawing(run / "p.html", "loss")
    assert [len(parts(svg, kind)) for kind in ("raw", "line", "dot")] == [1 if keep else 0, 1, 1]
    assert not parts(drawing(run / "p.html", "lr"), "raw"), "the learning rate is drawn as it is"


def test_the_page_loads_nothing_from_elsewhere(longreach_command, make_run):
    run = make_run("base", [training(1), training(2)])
    longreach_command("plot", run, "--out", run / "p.html")
    text = (run / "p.html").read_text("utf-8")
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\((?!#)|@import|<link|fetch\(", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<!--[A-Z]+-->|/\*COLOURS", text), "a placeholder was left"


def test_the_name_of_a_run_is_text_and_not_markup(longreach_command, make_run):
    run = make_run("<b>&<!--DATA-->", [training(1), {"step": 1, "event": "x", "text": "</script><i>"}])
    assert longreach_command("plot", run, "--out", run / "p.html").code == 0
    assert data_of(run / "p.html")["runs"] == ["<b>&<!--DATA-->"]
    assert data_of(run / "p.html")["events"][0]["text"] == "x: </script><i>"
    assert "<b>" not in (run / "p.html").read_text("utf-8")
    assert "<i>" not in (run / "p.html").read_text("utf-8")


def test_several_runs_share_the_panels_in_colours_of_their_own(longreach_command, make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("x/base", [training(1), training(2)])
    make_run("y/base", [training(1, loss=3.0), training(4, loss=3.0, index_loss=0.5)])
    assert longreach_command("plot", "x/base", "y/base").code == 0
    page = tmp_path / "plot.html"
    assert data_of(page)["runs"] == ["x/base", "y/base"], "two runs of one name are told apart by their folders"
    assert curve(page, "loss", "training", run=1) == [(1, 3.0), (4, 3.0)]
    assert curve(page, "index_loss", "indexer loss", run=1) == [(4, 0.5)]
    assert len(parts(drawing(page, "loss"), "line")) == 2
    assert len(parts(drawing(page, "index_loss"), "line")) == 1
    colours = re.findall(r"\.run-\d \{ --c: (#\w+)", page.read_text("utf-8"))
    assert len(colours) == len(set(colours)) == 4, "one in the light and one in the dark for each"


def test_the_ninth_run_has_a_colour_again_but_is_dashed(longreach_command, make_run, tmp_path):
    runs = [make_run(f"r{i}", [training(1), training(2)]) for i in range(9)]
    assert longreach_command("plot", *runs, "--out", tmp_path / "p.html").code == 0
    dashes = [line.get("stroke-dasharray") for line in parts(drawing(tmp_path / "p.html", "lr"), "line")]
    assert dashes == [None] * 8 + ["6 3"]


def test_events_are_marked_in_every_panel_and_named_in_the_first(longreach_command, make_run):
    records = [training(step) for step in range(1, 11)]
    records[5:5] = [{"step": 5, "event": "stage", "text": "seq_len 512, dense"}, {"step": 5, "event": "save"}]
    run = make_run("base", records)
    longreach_command("plot", run)
    for panel in ("loss", "lr", "grad_norm", "tokens_per_s"):
        (marks,) = parts(drawing(run / "plot.html", panel), "event run-0")
        titles = [element.text for element in marks.iter() if element.tag == "title"]
        assert titles == ["step 5: stage: seq_len 512, dense", "step 5: save"]
        names = [element.text for element in marks.iter() if element.tag == "text"]
        assert names == (["stage: seq_len 512, dense", "save"] if panel == "loss" else [])
    (loss,) = parts(drawing(run / "plot.html", "loss"), "event run-0")
    lines = [element for element in loss.iter() if element.tag == "line"]
    x = float(lines[0].get("x1", "nan"))
    assert x == pytest.approx(52 + (1000 - 52 - 14) * 5 / 10), "half way between 0 and 10"
    heights = [element.get("y") for element in loss.iter() if element.tag == "text"]
    assert len(set(heights)) == 2, "names at one place stand below each other"


def test_an_event_that_runs_share_is_named_once(longreach_command, make_run, tmp_path):
    records = [training(1), {"step": 1, "event": "stage", "text": "dense"}, training(2)]
    runs = [make_run(name, records) for name in ("a", "b")]
    longreach_command("plot", *runs, "--out", tmp_path / "p.html")
    svg = drawing(tmp_path / "p.html", "loss")
    assert [e.text for e in svg.iter() if e.tag == "text"].count("stage: dense") == 1
    assert [e.text for e in svg.iter() if e.tag == "title"].count("step 1: stage: dense") == 2


# ---- axes -----------------------------------------------------------------------------------------------------------


def test_records_without_the_axis_stand_where_their_step_does(longreach_command, make_run):
    records = [
        training(10, tokens=1000), {"step": 15, "val_loss": 2.0}, {"step": 15, "event": "stage"},
        training(20, tokens=3000), {"step": 20, "val_loss": 1.0},
    ]  # fmt: skip
    run = make_run("base", records)
    for axis, at in (("step", (15, 20)), ("tokens", (2000, 3000)), ("minutes", (15, 20))):
        assert longreach_command("plot", run, "--out", run / "p.html", "--x", axis).code == 0
        assert [x for x, _ in curve(run / "p.html", "loss", "validation")] == list(at)
        assert data_of(run / "p.html")["events"][0]["x"] == at[0]
        assert data_of(run / "p.html")["axis"] == axis


def test_an_axis_that_an_older_run_did_not_record_is_named(longreach_command, make_run):
    run = make_run("old", [training(1)])
    result = longreach_command("plot", run, "--x", "tokens")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"longreach: {run} records no tokens; leave out --x tokens to draw it by step\n"


def test_what_a_run_took_back_is_not_drawn_but_the_event_that_says_so_is(make_run):
    records = [training(step, loss=float(step)) for step in (1, 2, 3)]
    records += [{"step": 3, "val_loss": 9.0}, {"step": 3, "event": "rollback", "text": "to 1"}, training(2, loss=7.0)]
    (run,) = read_runs([make_run("base", records)], "step", keep=0)
    assert (run.curves["loss"].xs, run.curves["loss"].raw) == ([1, 2], [1.0, 7.0])
    assert "val_loss" not in run.curves
    assert [str(event) for event in run.events] == ["rollback: to 1"]
    assert run.steps == 2


def test_missing_and_unusable_values_leave_a_curve_shorter(make_run):
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "lr": 0.1}, {"step": 3, "loss": math.nan, "mtp_loss": None},
        {"step": 4, "loss": "3", "lr": True}, {"loss": 5.0}, {"step": 6, "loss": 1},
    ]  # fmt: skip
    path = make_run("base", records)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"step": 7, "lo')
    (run,) = read_runs([path], "step", keep=0)
    assert {key: list(zip(c.xs, c.raw, strict=True)) for key, c in run.curves.items()} == {
        "loss": [(1, 2.0), (6, 1.0)], "lr": [(2, 0.1)],
    }  # fmt: skip


# ---- shaping --------------------------------------------------------------------------------------------------------


def test_a_long_run_is_thinned_and_keeps_its_spikes_and_its_ends(longreach_command, make_run):
    count = 30_000
    spikes = {7_777: 50.0, 20_001: -50.0}
    records = [{"step": step, "loss": spikes.get(step, 2.0 + step % 2)} for step in range(1, count + 1)]
    run = make_run("long", records)
    assert longreach_command("plot", run, "--out", run / "p.html", "--smooth", 0).code == 0
    points = curve(run / "p.html", "loss", "training")
    assert MAX_POINTS * 0.9 < len(points) <= MAX_POINTS
    assert set(spikes.items()) <= set(points)
    assert (points[0][0], points[-1][0]) == (1, count)
    assert points == sorted(points)
    (line,) = parts(drawing(run / "p.html", "loss"), "line")
    assert line.get("d", "").count(",") == len(points)


def test_thinning_leaves_a_short_curve_as_it_is():
    assert thinned([1, 2, 3], [5, 4, 6], limit=3) == ([1, 2, 3], [5, 4, 6])
    xs, ys = thinned(list(range(100)), [float(x) for x in range(100)], limit=10)
    assert len(xs) == 10
    assert xs == ys == sorted(xs)


def test_one_wild_step_does_not_flatten_the_panel(make_run):
    records = [training(step, grad_norm=1e6 if step == 500 else 1.0 + step % 2, lr=step) for step in range(1, 1001)]
    runs = read_runs([make_run("base", records)], "step", keep=0.95)
    panels = {panel.key: panel for panel in panels_of(runs)}
    low, high = y_range(runs, panels["grad_norm"])
    assert low < 1.0 and 2.0 < high < 5.0
    assert y_range(runs, panels["lr"])[1] > 1000, "what is not smoothed is shown whole"


def test_the_start_of_a_falling_loss_and_every_validation_are_in_the_picture(make_run):
    records = [training(step, loss=2 + 7 * math.exp(-step / 100)) for step in range(1, 5001)]
    runs = read_runs([make_run("base", [*records, {"step": 5000, "val_loss": 12.0}])], "step", keep=0.95)
    assert runs[0].curves["loss"].line[0] > 8.9
    low, high = y_range(runs, panels_of(runs)[0])
    assert low < 2.0 and high > 12.0
    runs[0].curves.pop("val_loss")
    assert y_range(runs, panels_of(runs)[0])[1] > 8.9


def test_a_value_that_is_nearly_always_the_same_does_not_hide_where_it_was_another(make_run):
    records = [training(step, tokens_per_s=9.0 if step < 5 else 2.0) for step in range(1, 1001)]
    runs = read_runs([make_run("base", records)], "step", keep=0.95)
    assert y_range(runs, next(panel for panel in panels_of(runs) if panel.key == "tokens_per_s"))[1] > 9.0


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0, 100, 4, [0, 25, 50, 75, 100]),
        (1.93, 2.31, 4, [2.0, 2.1, 2.2, 2.3]),
        (-1, 1, 2, [-1, 0, 1]),
        (0, 0.0003, 3, [0, 0.0001, 0.0002, 0.0003]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, count, expected):
    assert ticks(low, high, count) == pytest.approx(expected)


def test_figures_are_short():
    numbers = [0, 2.314159, 0.00003, 9_999, 12_000, 1_500_000, 3e9, 2e12, -20_000]
    assert list(map(figure, numbers)) == ["0", "2.314", "3e-05", "9999", "12k", "1.5M", "3B", "2T", "-20k"]


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_run_of_one_equal_step_can_be_drawn(longreach_command, make_run, value):
    run = make_run("base", [training(1, loss=value, lr=0.0)])
    assert longreach_command("plot", run).code == 0
    (line,) = parts(drawing(run / "plot.html", "loss"), "line")
    assert re.fullmatch(r"M[\d.]+,[\d.]+h2", line.get("d", ""))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "--out", "curve.pdf"], "--out curve.pdf: the name must end in .png (picture) or .html (page)"),
        (["{run}", "--out", "curve"], "--out curve: the name must end in"),
        (["{run}", "--smooth", "1"], "--smooth 1: give a number from 0"),
        (["{run}", "--smooth", "-0.1"], "--smooth -0.1: give a number from 0"),
        (["{run}", "--smooth", "nan"], "--smooth nan: give a number from 0"),
        (["{run}", "{run}"], "is given twice"),
        ([], "no run given"),
        (["{tmp}/none"], "/none does not exist; give a run directory"),
        (["{tmp}/folder"], "/folder is not a run (no metrics.jsonl)"),
        (["{tmp}/file"], "/file is not a run"),
        (["{tmp}/young"], "/young has no metrics yet; wait for its first steps"),
        (["{tmp}/empty"], "/empty has no metrics yet"),
        (["{tmp}/empty", "--x", "minutes"], "/empty has no metrics yet"),
        (["{tmp}/binary"], "/binary/metrics.jsonl cannot be read"),
        (["{run}", "--out", "{tmp}/file/p.html"], "/file/p.html cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(longreach_command, make_run, tmp_path, arguments, expected):
    run = make_run("base", [training(1)])
    make_run("empty", [{"step": 0, "event": "stage", "text": "dense"}])
    make_run("binary", []).joinpath("metrics.jsonl").write_bytes(b"\xff\xfe{}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young/config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    result = longreach_command("plot", *(a.format(run=run, tmp=tmp_path) for a in arguments))
    assert (result.code, result.out) == (2, "")
    assert expected in result.err
    assert result.err.count("\n") == 1
    assert [p.name for p in run.iterdir()] == ["metrics.jsonl"]


# ---- without matplotlib ---------------------------------------------------------------------------------------------


@pytest.fixture
def _no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("_no_matplotlib")
def test_without_matplotlib_the_page_is_there_and_a_line_says_how_to_get_the_picture(longreach_command, make_run):
    run = make_run("base", [training(1), training(2)])
    result = longreach_command("plot", run)
    assert result.code == 0
    assert curve(run / "plot.html", "loss", "training") == [(1, 4.0), (2, 4.0)]
    assert not (run / "plot.png").exists()
    assert result.err.count("no plot.png: matplotlib is not installed (pip install 'longreach[plot]')\n") == 1
    assert "picture" not in result.out


@pytest.mark.usefixtures("_no_matplotlib")
def test_without_matplotlib_a_picture_asked_for_is_refused(longreach_command, make_run, tmp_path):
    run = make_run("base", [training(1)])
    result = longreach_command("plot", run, "--out", tmp_path / "p.png")
    assert result.code == 2
    assert "pip install 'longreach[plot]'); or give a name ending in .html" in result.err
    assert plot_losses([training(1)], tmp_path / "loss.png") is False


def test_the_picture_at_the_end_of_training_is_a_png(tmp_path):
    assert plot_losses([training(1), training(2), {"step": 2, "val_loss": 3.0}], tmp_path / "loss.png")
    assert size_of_png(tmp_path / "loss.png") == (960, 540)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
