"""What every command decides before it starts, each choice with its reason: device, dtype, threads, seed, logging.

Also the small things that touch the machine: files that appear whole or not at all, one JSON object per line, and how
busy other processes are while something is being measured.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longreach.errors import RequestError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("longreach")


class Choice(NamedTuple):
    """A decision and why it was made; the start of every command prints both."""

    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def choose_device(requested: str = "auto") -> Choice:
    """The torch.device to run on: `auto` takes the first CUDA device, else the CPU.

    Raises:
        RequestError: the device is unknown or absent.
    """
    import torch

    if requested == "auto":
        if torch.cuda.is_available():
            return Choice(torch.device("cuda", 0), torch.cuda.get_device_name(0))
        return Choice(torch.device("cpu"), "no CUDA device found")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise RequestError(f"unknown device {requested!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device {requested!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {requested!r} is absent: {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return Choice(device, "asked for")


def choose_dtype(requested: str, device: torch.device, training: bool = False) -> Choice:
    """The torch.dtype of weights and activations: `auto`, `float32` or `bfloat16`.

    Raises:
        RequestError: any other name.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if requested != "auto":
        if requested not in names:
            raise RequestError(f"unknown dtype {requested!r}; use auto, {' or '.join(names)}")
        return Choice(names[requested], "asked for")
    if training:
        return Choice(torch.float32, "weights that are trained keep every bit of a small update")
    if device.type == "cuda":
        return Choice(torch.bfloat16, "half the memory, full speed on this device")
    return Choice(torch.float32, "CPUs without bfloat16 instructions emulate it slowly")


def set_threads(requested: int | None, watch_s: float = 0.3) -> Choice:
    """Use `requested` CPU threads, or one per core that other processes leave free. Returns the number in use.

    How busy the others are is watched for `watch_s` seconds.

    A thread without a core of its own makes all others wait for it at every operator, so fewer are faster. Sums are
    split among threads: the last bits of a result depend on their number.

    Raises:
        RequestError: fewer than one.
    """
    import torch

    if requested is None:
        cores = torch.get_num_threads()
        taken = round(other_load(watch_s) or 0.0) if cores > 1 else 0
        choice = Choice(max(1, cores - taken), f"other processes use {taken} of {cores}" if taken else "one per core")
    elif requested < 1:
        raise RequestError(f"--threads {requested}: give 1 or more")
    else:
        choice = Choice(requested, "asked for")
    torch.set_num_threads(choice.value)
    return choice


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators (all devices). Data order has its own seed and does not depend on these."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def setup_logging(level: int = logging.INFO) -> None:
    """Log lines go to stderr as bare text, so stdout stays the result. Calling it again changes nothing more."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


# ---- files ----------------------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file that is either the old one or the whole new one, whatever happens in between; makes its folder.

    Text is UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads; give this one the mode any other new file would get.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_line(obj: dict[str, Any]) -> str:
    """`obj` as one line of JSON without the newline; text stays readable, NaN and infinity become null."""
    return json.dumps(_finite(obj), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


# ---- the machine ----------------------------------------------------------------------------------------------------


def other_load(seconds: float = 1.0) -> float | None:
    """Mean number of CPUs that other processes kept busy during the next `seconds`; None off Linux.

    Figures measured while this is far above 0 say little about the program. The calling process, all its threads
    included, does not count.
    """
    before = busy_and_own_seconds()
    if before is None:
        return None
    start = time.perf_counter()
    time.sleep(seconds)
    after = busy_and_own_seconds()
    elapsed = time.perf_counter() - start
    assert after is not None
    return max(0.0, ((after[0] - before[0]) - (after[1] - before[1])) / elapsed)


def busy_and_own_seconds() -> tuple[float, float] | None:
    """CPU seconds since boot spent by everything, and by this process; None without /proc."""
    try:
        machine = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        own = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq = map(int, machine[1:8])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, (int(own[11]) + int(own[12])) / tick


def total_memory_bytes(device: torch.device) -> int | None:
    """Memory of the device (of the machine, for the CPU); None where it cannot be asked."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def matmul_peak(dtype: torch.dtype, device: torch.device, budget_s: float = 3.0) -> float:
    """FLOP/s of the best large square matmul of this type with the threads in use."""
    import torch

    best, start = 0.0, time.perf_counter()
    sizes = (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192)
    while True:
        for size in sizes:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            torch.mm(a, b)
            synchronise(device)
            began = time.perf_counter()
            torch.mm(a, b)
            synchronise(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        if time.perf_counter() - start > budget_s:
            return best


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
