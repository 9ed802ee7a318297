"""Ctrl-C and SIGTERM ask a training loop to stop after its step; what it has is then saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from longreach.runtime import log


class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop ends after the step it is in."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def asked(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """While inside, the first Ctrl-C or SIGTERM asks for a stop; a second Ctrl-C interrupts at once."""
    stop = StopRequest()

    def ask(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.signal = number
        log.info("stopping after this step, then saving; once more to stop without saving")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
