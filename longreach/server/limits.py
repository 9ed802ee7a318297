"""How much of a server a key may use at a time: requests running together, and tokens per minute. All in memory.

    admitted = limiter.admit(key, prompt_tokens)
    if isinstance(admitted, Busy): answer 429 with Retry-After: admitted.retry_after_s
    ...
    admitted.release(completion_tokens)

Tokens are a bucket: it holds one minute's worth, fills evenly, and a request takes its prompt out when it begins and its
answer when it ends. The answer's length is not known before, so the level may go below zero; the next request then waits
until the debt is paid. A prompt larger than the bucket passes when the bucket is full.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from longreach.server.keys import Key


@dataclass(frozen=True)
class Busy:
    """Too much at the moment.

    Attributes:
        retry_after_s: when it may go better. Exact for tokens; for concurrency nobody knows, so soon.
        message: one line for the client.
    """

    reason: Literal["concurrency", "tokens_per_minute", "queue"]
    retry_after_s: int
    message: str


class _State:
    """Of one key: its requests, and its bucket, which starts full (and empty forever where tokens have no limit)."""

    __slots__ = ("level", "per_minute", "running", "updated")

    def __init__(self, per_minute: float, now: float) -> None:
        self.running, self.per_minute, self.level, self.updated = 0, per_minute, per_minute, now


class Admitted:
    """A request that runs. `release` it exactly once, however it ends."""

    __slots__ = ("_is_released", "_key", "_limiter")

    def __init__(self, limiter: RateLimiter, key: Key) -> None:
        self._limiter, self._key, self._is_released = limiter, key, False

    def release(self, completion_tokens: int = 0) -> None:
        """It ended after writing this many tokens."""
        assert not self._is_released, "released twice"
        self._is_released = True
        self._limiter._release(self._key, completion_tokens)


class RateLimiter:
    """What every key is using of its limits. Keys at rest with a full bucket take no memory. Any thread may call.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[int, _State] = {}
        self._lock = threading.Lock()
        self._next_sweep = 0.0

    def admit(self, key: Key, prompt_tokens: int) -> Admitted | Busy:
        """Let a request run, or say when to try again."""
        with self._lock:
            now = self._clock()
            self._sweep(now)
            state = self._states.get(key.id)
            if state is None:
                state = _State(float(key.tokens_per_minute or 0), now)
            if key.concurrency is not None and state.running >= key.concurrency:
                message = (
                    f"This key may have {key.concurrency} requests running at a time. Try again when one has ended."
                )
                return Busy("concurrency", 1, message)
            if key.tokens_per_minute is not None:
                self._fill(state, now)
                missing = min(prompt_tokens, key.tokens_per_minute) - state.level
                # A level of zero or less admits nothing, so an empty prompt cannot run up debt without end.
                missing = max(missing, 1.0 - state.level)
                if missing > 0:
                    wait_s = max(1, math.ceil(missing * 60 / key.tokens_per_minute))
                    message = (
                        f"This key may use {key.tokens_per_minute} tokens a minute. Try again in {wait_s} seconds."
                    )
                    return Busy("tokens_per_minute", wait_s, message)
                state.level -= prompt_tokens
            state.running += 1
            self._states[key.id] = state
            return Admitted(self, key)

    def running(self, key: Key) -> int:
        """Requests of a key that run now."""
        with self._lock:
            state = self._states.get(key.id)
            return state.running if state else 0

    def _release(self, key: Key, completion_tokens: int) -> None:
        with self._lock:
            state = self._states[key.id]
            state.running -= 1
            if key.tokens_per_minute is not None:
                self._fill(state, self._clock())
                state.level -= completion_tokens

    @staticmethod
    def _fill(state: _State, now: float) -> None:
        state.level = min(state.per_minute, state.level + (now - state.updated) * state.per_minute / 60)
        state.updated = now

    def _sweep(self, now: float) -> None:
        """Once a minute: forget the keys at rest whose bucket is full, which is what a new one is."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + 60
        for key_id, state in list(self._states.items()):
            self._fill(state, now)
            if state.running == 0 and state.level >= state.per_minute:
                del self._states[key_id]
