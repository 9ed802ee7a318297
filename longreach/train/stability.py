"""Loss spikes: how one is seen, and anticipatory routing, the mode a run goes through after one.

    step t computes its features with θ_t, but sends tokens to the experts that θ_{t−Δt} chose

Spikes come from outliers in the experts that routing amplifies; going back alone runs into the same one again. With stale
routing the experts and the choice of experts cannot feed each other within a step. The batch of step t is fetched Δt steps
early and one more forward pass computes its expert indices then; gate weights stay current.
Source: DeepSeek-V4 report, section 4.2.3. The detector, Δt and the duration are not published and are this build's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from torch import Tensor

from longreach.data.stream import Batch, MixtureStream
from longreach.train.schedule import StepPlan

LAG = 4
"""Δt in steps."""

DURATION = 50
"""Steps a run stays in the mode after a spike."""

SNAPSHOT_EVERY = 50
"""Steps between the states a run can go back to."""

WINDOW, MIN_WINDOW = 64, 16
SPIKE_DEVIATIONS, SPIKE_NATS = 10.0, 0.5
"""A spike is a loss above the recent median by ten times the usual deviation and by half a nat, or no number at all."""


class SpikeDetector:
    """Compares each loss with the recent ones of the same phase (a new row length starts anew)."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.phase = ""

    def is_spike(self, loss: float, phase: str) -> bool:
        """Whether this loss is one; it joins the recent ones if not."""
        if phase != self.phase:
            self.recent.clear()
            self.phase = phase
        if not math.isfinite(loss):
            return True
        if len(self.recent) >= MIN_WINDOW:
            middle = median(self.recent)
            deviation = 1.4826 * median(abs(value - middle) for value in self.recent)
            if loss - middle > max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS):
                return True
        self.recent.append(loss)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "phase": self.phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.phase = state["phase"]


class Feed:
    """The stream's batches by step, with those of the next steps within reach.

    Args:
        plan: step number → what that step does.
        step: the step the stream stands before.
    """

    def __init__(self, stream: MixtureStream, plan: Callable[[int], StepPlan], step: int) -> None:
        self.stream, self.plan = stream, plan
        self.step = step
        self._ahead: deque[tuple[Batch, dict[str, Any]]] = deque()

    def look(self, step: int) -> Batch:
        """The batch of this step or a later one, without passing it."""
        while self.step + len(self._ahead) <= step:
            plan = self.plan(self.step + len(self._ahead))
            before = self.stream.state_dict()
            self._ahead.append((self.stream.next_batch(plan.rows, plan.seq_len), before))
        return self._ahead[step - self.step][0]

    def take(self) -> Batch:
        """The batch of the step the feed stands before; it now stands before the next."""
        batch = self.look(self.step)
        self._ahead.popleft()
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The stream's position before the next batch."""
        return self._ahead[0][1] if self._ahead else self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        self._ahead.clear()
        self.stream.load_state_dict(state)
        self.step = step


class Anticipation:
    """Expert indices computed ahead of their step, while the mode is on."""

    def __init__(self, route: Callable[[int], dict[int, Tensor]], lag: int = LAG) -> None:
        self.route, self.lag = route, lag
        self.until = 0
        """The mode is on for steps below this."""
        self._indices: dict[int, dict[int, Tensor]] = {}

    def begin(self, step: int, duration: int = DURATION) -> None:
        """Switch the mode on from `step` on; the first Δt steps share the indices of the weights as they are now."""
        self.until = step + duration
        self._indices = {}

    def indices(self, step: int, last: int) -> dict[int, Tensor] | None:
        """What step `step` routes by, None while the mode is off. Computes those of step + Δt with today's weights.

        Args:
            last: the run's last step, beyond which nothing is looked at.
        """
        if step >= self.until:
            self._indices = {}
            return None
        for ahead in range(step, min(step + self.lag, last, self.until - 1) + 1):
            if ahead not in self._indices:
                self._indices[ahead] = self.route(ahead)
        return self._indices.pop(step)

    def state_dict(self) -> dict[str, Any]:
        return {"until": self.until, "indices": self._indices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.until, self._indices = state["until"], state["indices"]
