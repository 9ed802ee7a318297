"""The wheel that `pip install` makes: everything that the program reads at run time is in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow  # pip fetches setuptools and builds: some ten seconds
def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "longreach", source / "longreach", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("longreach-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    ours = {str(path.relative_to(source)) for path in (source / "longreach").rglob("*") if path.is_file()}
    assert len(ours) > 200
    assert ours <= held, f"missing: {sorted(ours - held)}"
