"""The README says what is true: its commands exist with those options, its files exist, its Python runs."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from longreach.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))


def commands(text: str) -> list[str]:
    """Every `longreach …` line of a code block, and every inline one."""
    blocks = re.findall(r"```(?:bash|console|text)?\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(longreach [^`]+)`", text)
    return [line for line in lines if line.startswith("longreach ")]


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda p: p.name)
def test_every_command_shown_exists_with_its_options(path):
    for line in commands(path.read_text(encoding="utf-8")):
        words = line.split("#")[0].split()[1:]
        if words[0].startswith("-"):
            continue
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
        assert name, line
        command = COMMANDS[name]
        options = getattr(importlib.import_module(command.module), command.options)
        known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(options)} | {"--help"}
        used = {word for word in words if word.startswith("--")}
        assert used <= known, (line, used - known)


def test_the_two_setup_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda p: p.name)
def test_files_named_in_the_docs_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:longreach/|ops/|model/|tests/|docs/|checkpoint/|train/|data/|tokenizer/|bench/|plan/)[\w./]+\.(?:py|md))`",
        text,
    ):
        assert (ROOT / name).exists() or (ROOT / "longreach" / name).exists(), name
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (path.parent / link).exists(), link


def test_the_file_tree_names_every_module_and_nothing_else():
    tree = re.search(r"```\nlongreach/\n(.*?)```", README, flags=re.DOTALL)
    assert tree
    shown, folder = set(), ""
    for line in tree.group(1).splitlines():
        match = re.match(r"(\s+)(\S+)", line)
        if not match:
            continue
        if len(match[1]) == 2:
            folder = match[2] if match[2].endswith("/") else ""
        names = re.findall(r"[\w]+\.py", line.split("  #")[0])
        shown |= {(folder if len(match[1]) > 2 or folder else "") + n for n in names}
    real = {p.relative_to(ROOT / "longreach").as_posix() for p in (ROOT / "longreach").rglob("*.py")}
    real = {name for name in real if not name.endswith("__init__.py") and not name.endswith("__main__.py")}
    assert shown == real, (sorted(shown - real), sorted(real - shown))


def test_the_python_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.group(1), "README.md", "exec"), {})  # the reader's own file
