"""How long a run is and how fast it learns: a budget in steps or minutes, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_STEPS = 100
FINAL_SHARE = 0.1
"""The learning rate ends at this part of its peak."""


def learning_rate(step: int, total: int, peak: float) -> float:
    """The rate of step `step` (from 0) of `total`: warm-up over min(100, a tenth of the run), then cosine to a tenth."""
    warmup = max(1, min(WARMUP_STEPS, total // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Budget:
    """Either a number of steps or a number of minutes of training, both counted from the run's first step.

    With minutes the number of steps is worked out from the speed measured so far and worked out anew as the run goes, so
    that it ends on time on a machine whose speed changes. The cosine follows.
    """

    steps: int | None = None
    minutes: float | None = None

    def total_steps(self, done: int, seconds: float, seconds_per_step: float | None) -> int:
        """The planned length of the run after `done` steps in `seconds`; at least `done`.

        Before anything is measured (`seconds_per_step` None) a run by the clock is taken to be long.
        """
        if self.steps is not None:
            return self.steps
        assert self.minutes is not None
        left = self.minutes * 60 - seconds
        if left <= 0:
            return done
        if seconds_per_step is None:
            return done + 10 * WARMUP_STEPS
        return done + max(1, round(left / seconds_per_step))

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.minutes:g} minutes"
