"""Honest measuring: who else used the machine, how much memory a call added; the figures of a run and how it prints them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longreach.runtime import busy_and_own_seconds, matmul_peak, synchronise

__all__ = ["Clock", "Record", "extra_bytes", "limit_memory", "matmul_peak", "peak_bytes", "short", "synchronise"]


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


@dataclass
class Record:
    """What every bench keeps of its run: the figures found so far, and the load that other processes put on it."""

    device: torch.device
    repeats: int
    figures: dict[str, float] = field(default_factory=dict, kw_only=True)
    loads: list[float] = field(default_factory=list, kw_only=True)

    def say(self, line: str) -> None:
        print(line, file=sys.stdout, flush=True)

    def record(self, name: str, value: float) -> float:
        self.figures[name] = value
        return value

    def alternate(self, *calls: Callable[[], object]) -> list[Clock]:
        """Run the calls in turn, `repeats` times."""
        clocks = [Clock() for _ in calls]
        for _ in range(self.repeats):
            for call, clock in zip(calls, clocks, strict=True):
                with clock.measure(self.device):
                    call()
        self.loads += [load for clock in clocks for load in clock.others]
        return clocks

    def say_load(self) -> None:
        """Record and print how busy others kept the machine."""
        known = [load for load in self.loads if load == load]
        load = self.record("other_load", statistics.mean(known) if known else float("nan"))
        self.say(f"\nother processes used {load:.2f} CPUs on average during the measurements")


def short(tokens: int) -> str:
    """4096 as 4k, 300 as 300."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


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


def peak_bytes(device: torch.device) -> int:
    """Most memory in use during the last `extra_bytes`: of the process, libraries included, or on the GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def limit_memory(device: torch.device, fraction: float = 0.8) -> None:
    """Let this process ask for at most this much of what memory is free now: it then fails, and nobody else does."""
    with suppress(OSError, ImportError, StopIteration):  # elsewhere than on Linux it stays unlimited
        if device.type == "cpu":
            import resource

            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
            limit = _status_bytes("VmSize") + int(fraction * free)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
