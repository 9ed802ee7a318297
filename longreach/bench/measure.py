"""Honest measuring: who else used the machine, how much memory a call added, how fast a large matmul can be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longreach.runtime import busy_and_own_seconds


@dataclass
class Clock:
    """Seconds of repeated calls, and the CPU other processes used during each."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @contextmanager
    def measure(self, device: torch.device):
        """Time the block; on a GPU until its work is done."""
        synchronise(device)
        before, start = busy_and_own_seconds(), time.perf_counter()
        yield
        synchronise(device)
        elapsed, after = time.perf_counter() - start, busy_and_own_seconds()
        self.seconds.append(elapsed)
        if before is not None and after is not None:
            self.others.append(max(0.0, (after[0] - before[0] - (after[1] - before[1])) / elapsed))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def other_load(self) -> float:
        """Mean number of CPUs that other processes kept busy; NaN where it cannot be known."""
        return statistics.mean(self.others) if self.others else float("nan")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(dtype: torch.dtype, device: torch.device, budget_s: float = 3.0) -> float:
    """FLOP/s of the best large square matmul of this type with the threads in use."""
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


def extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory that `call` needed beyond what the process (or the GPU) held before.

    On the CPU this is resident memory, from the kernel's high-water mark, which is reset first where that is allowed.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - held
    with suppress(OSError):  # where it is refused the mark covers the process's whole life and can only overstate
        Path("/proc/self/clear_refs").write_text("5")
    held = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - held


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
