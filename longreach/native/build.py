"""Compiles the C files of this folder once per machine, into the user's cache folder.

Installing stays plain pip: no compiler is needed for it, and where there is one the code is compiled for the very CPU it
runs on, in a few seconds, at the first use. The file's name carries a digest of source, compiler and CPU, so a change
of any of them compiles anew and two machines may share a home folder. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent

FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-w",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
"""Sums stay in the order written, so that a row's bits do not depend on what the compiler makes of its neighbours."""

OPTIONAL_FLAGS = (("-march=native",), ())
"""Tried in turn: not every compiler knows its machine."""

COMPILE_TIMEOUT_S = 120


def cache_folder() -> Path:
    """Where compiled code is kept: `$XDG_CACHE_HOME/longreach`, by default `~/.cache/longreach`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longreach"


def find_compiler() -> str | None:
    """`$CC` if set, else cc, gcc or clang from the path."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    return None


def build() -> tuple[Path | None, str]:
    """The compiled library and how it came about, or None and why there is none."""
    compiler = find_compiler()
    if compiler is None:
        return None, "no C compiler found (cc, gcc or clang)"
    sources = sorted(FOLDER.glob("*.c"))
    source = b"".join(path.read_bytes() for path in (*sources, *sorted(FOLDER.glob("*.h"))))
    key = "\n".join([compiler, _version(compiler), *FLAGS, repr(OPTIONAL_FLAGS), _cpu()]).encode()
    target = cache_folder() / f"rows-{hashlib.sha256(source + key).hexdigest()[:16]}.so"
    if target.is_file():
        return target, f"compiled by {Path(compiler).name}"
    said = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "rows.so"
            for extra in OPTIONAL_FLAGS:
                command = [compiler, *FLAGS, *extra, *map(str, sources), "-o", str(made), "-lm"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
                if done.returncode == 0:
                    os.replace(made, target)  # whole or not at all, whoever else compiles at the same moment
                    return target, f"compiled by {Path(compiler).name}"
                said = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit code {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not be used ({error})"
    return None, f"{compiler} refused the source ({said})"


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0]


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kinds))
