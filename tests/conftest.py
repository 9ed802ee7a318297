"""What several test files share: a small corpus, a tokenizer trained on it, and the command line called in-process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

SENTENCES = (
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "def write(path, text):\n    with open(path, 'w') as file:\n        file.write(text)\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n"
    "    def push(self, item):\n        self.items.append(item)\n",
    "for number in range(10):\n    if number % 2:\n        print(number, 'is odd')\n",
)


class CommandResult(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and results do not depend on how many cores a machine has."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small Python-like files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(24):
        text = f"# file {number}\n" + SENTENCES[number % 4] * 6 + SENTENCES[(number // 4) % 4] * 3
        (folder / f"file{number:02d}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium, the machine's own."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on the PATH (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        # Containers often run as root, where Chromium's own sandbox does not start.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def longreach_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Run `longreach ARGS…` in this process."""
    from longreach.cli import main

    def run(*arguments: object) -> CommandResult:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return CommandResult(code, captured.out, captured.err)

    return run
