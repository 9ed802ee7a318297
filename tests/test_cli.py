"""The command line: its table, its help, and one clear line with exit code 2 for whatever a user gets wrong."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longreach import cli
from longreach.cli import COMMANDS, Command
from longreach.errors import RequestError

ROOT = Path(__file__).parent.parent


def only_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, f"one line was promised: {text!r}"
    return text.strip()


def test_without_a_command_the_table_of_commands_is_printed(longreach_command):
    for arguments in ([], ["--help"], ["-h"]):
        result = longreach_command(*arguments)
        assert result.code == 0
        for name, command in COMMANDS.items():
            assert any(line.split("  ")[1:2] == [name] and command.summary in line for line in result.out.splitlines())


def test_the_table_answers_in_well_under_a_second():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "longreach", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "pretrain" in done.stdout
    assert time.perf_counter() - start < 1.0


def test_the_version_is_that_of_the_package(longreach_command):
    assert longreach_command("--version").out == "longreach 0.1.0\n"
    assert 'version = "0.1.0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_frozen_options_a_function_and_help(name, longreach_command):
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    options = getattr(module, command.options)
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert callable(getattr(module, command.function))
    result = longreach_command(*name.split(), "--help")
    assert result.code == 0
    assert f"usage: longreach {name}" in result.out
    for field in dataclasses.fields(options):
        if "Positional" not in str(field.type):
            assert f"--{field.name.replace('_', '-')}" in result.out


def test_a_group_without_its_second_word_lists_its_commands(longreach_command):
    result = longreach_command("bench")
    assert result.code == 0
    assert "bench model" in result.out
    assert "pretrain" not in result.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrani"], "longreach: unknown command 'pretrani'; did you mean pretrain?"),
        (["zzz"], f"longreach: unknown command 'zzz'; commands are {', '.join(COMMANDS)}"),
        (["bench", "mode"], "longreach: unknown command 'bench mode'; did you mean bench model or bench lora?"),
    ],
)
def test_an_unknown_command_names_the_nearest(longreach_command, arguments, expected):
    result = longreach_command(*arguments)
    assert (result.code, result.out) == (2, "")
    assert only_line(result.err) == expected


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """Options of the command that these tests put into the table."""

    steps: int
    """How many."""
    rate: float = 0.5
    """How fast."""
    loud: bool = False
    """Whether to shout."""


def example(options: ExampleOptions) -> int | None:
    if options.steps == 0:
        raise RequestError("--steps 0 must be\nat least 1")
    if options.steps == 1:
        raise KeyboardInterrupt
    if options.steps == 2:
        raise BrokenPipeError
    print(options)
    return options.steps if options.loud else None


@pytest.fixture
def _example_command(monkeypatch):
    entry = Command(__name__, "ExampleOptions", "an example", function="example")
    monkeypatch.setattr(cli, "COMMANDS", {"example": entry})
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.usefixtures("_example_command")
def test_options_reach_the_command_and_its_return_value_is_the_exit_code(longreach_command):
    result = longreach_command("example", "--steps", 7, "--loud", "--rate=0.25")
    assert result.code == 7
    assert result.out == "ExampleOptions(steps=7, rate=0.25, loud=True)\n"
    assert longreach_command("example", "--steps", 7).code == 0


@pytest.mark.usefixtures("_example_command")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "3", "--sped", "1"], "Unrecognized options: --sped"),
        (["--steps", "many"], "--steps"),
        (["--steps"], "--steps"),
        ([], "--steps"),
        (["--steps", "3", "extra"], "extra"),
    ],
)
def test_an_option_that_cannot_be_read_gives_one_line_that_names_it(longreach_command, arguments, expected):
    result = longreach_command("example", *arguments)
    assert (result.code, result.out) == (2, "")
    line = only_line(result.err)
    assert line.startswith("longreach example: ")
    assert expected in line
    assert line.endswith("longreach example --help lists the options")
    assert not set(line) & set("╭╮╰╯│─")


@pytest.mark.usefixtures("_example_command")
def test_an_error_of_ours_becomes_one_line_and_exit_code_2(longreach_command):
    result = longreach_command("example", "--steps", 0)
    assert (result.code, result.out) == (2, "")
    assert only_line(result.err) == "longreach: --steps 0 must be at least 1"


@pytest.mark.usefixtures("_example_command")
def test_an_interrupt_is_one_line_and_exit_code_130(longreach_command):
    result = longreach_command("example", "--steps", 1)
    assert result.code == 130
    assert only_line(result.err) == "longreach: interrupted"


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m longreach pretrain --help | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith("usage: longreach pretrain")
    assert done.stderr == ""


def test_a_bug_of_ours_keeps_its_traceback(longreach_command, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", {"example": Command("no.such.module", "X", "broken")})
    with pytest.raises(ModuleNotFoundError):
        longreach_command("example")


def test_a_wrong_option_is_one_plain_line_on_a_terminal_too():
    """tyro draws its box in colour when a terminal reads it."""
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "longreach", "inspect", "flash", "--sped", "1"], stdout=theirs, stderr=theirs, cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 2
    assert (
        said.replace("\r", "").startswith("longreach inspect: Unrecognized options: --sped") and said.count("\n") == 1
    )
