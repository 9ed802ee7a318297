"""`/metrics`, in the text format of Prometheus: load, caches and times of every model, and what became of the requests."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_GAUGES = {
    "running": ("longreach_requests_running", "requests in the batch"),
    "waiting": ("longreach_requests_waiting", "requests in the queue"),
    "kv_cache_bytes": ("longreach_kv_cache_bytes", "bytes of state blocks and pages in use"),
    "kv_cache_capacity_bytes": ("longreach_kv_cache_capacity_bytes", "bytes of state blocks and pages there are"),
    "v32_kv_cache_bytes": ("longreach_v32_kv_cache_bytes", "what V3.2 would hold for the same tokens"),
    "disk_cache_bytes": ("longreach_disk_cache_bytes", "bytes of the cache's second tier"),
}
_COUNTERS = {
    "prompt_tokens_total": ("longreach_prompt_tokens", "prompt tokens, hits included"),
    "cached_tokens_total": ("longreach_prompt_tokens_cached", "prompt tokens that came from the cache"),
    "generated_tokens_total": ("longreach_generation_tokens", "tokens generated"),
    "engine_cpu_s": ("longreach_engine_step_cpu_seconds", "CPU seconds of the engine's thread inside its steps"),
}
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server.

    Args:
        status: the models' `status()`, asked when somebody looks.
    """

    def __init__(self, status: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self.registry = CollectorRegistry()
        self._status = status
        self.registry.register(self)  # type: ignore[arg-type]  # it wants a Collector and needs only `collect`
        self.requests = Counter(
            "longreach_requests", "requests by model, dialect and what became of them", ["model", "dialect", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.routed = Counter(
            "longreach_routed",
            "requests to auto by kind and by where they went",
            ["kind", "model"],
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "longreach_time_to_first_token_seconds", "from the request to its first token", ["model"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.request_s = Histogram(
            "longreach_request_seconds", "from the request to its last token", ["model"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.token_s = Histogram(
            "longreach_time_per_output_token_seconds", "a request's decoding time over its tokens", ["model"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1), registry=self.registry,
        )  # fmt: skip

    def collect(self) -> Iterable[Metric]:
        """What is read off the models at the moment of asking."""
        listed = list(self._status())
        for kind, families in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, (name, help_text) in families.items():
                family = kind(name, help_text, labels=["model"])
                for status in listed:
                    if field in status:
                        family.add_metric([status["id"]], status[field])
                yield family

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class ProcessLoad:
    """This process's memory and CPU.

    Args:
        engines: threads that step engines, by their ids, each with a function that tells its CPU seconds outside steps.
    """

    def __init__(self, engines: Callable[[], dict[int | None, float]]) -> None:
        self._engines = engines
        self._then = (time.monotonic(), time.process_time())
        self._fraction = 0.0

    def measure(self) -> dict[str, Any]:
        """Resident bytes; CPU seconds per second since the last look a second ago or more; CPU seconds since the start.

        `server_cpu_s` is what the process spent outside the engines' steps: event loop, ledger, parsing of answers.
        """
        now, spent = time.monotonic(), time.process_time()
        if now - self._then[0] >= 0.9:
            self._fraction = (spent - self._then[1]) / (now - self._then[0])
            self._then = (now, spent)
        return {
            "rss_bytes": _resident(), "cpu_fraction": round(self._fraction, 3), "cpus": os.cpu_count(),
            "total_cpu_s": round(spent, 3), "server_cpu_s": round(self._outside_steps(), 3),
        }  # fmt: skip

    def _outside_steps(self) -> float:
        engines = self._engines()
        spent = sum(engines.values())
        for thread in threading.enumerate():
            if thread.ident is not None and thread.ident not in engines:
                with contextlib.suppress(OSError):  # it has just ended
                    spent += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return spent


def _resident() -> int:
    """Bytes; 0 where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
