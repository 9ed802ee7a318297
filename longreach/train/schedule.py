"""What each step of a run is: its row length, attention, learning rate and loss weights, from the step's number alone.

    learning rate   linear warm-up, constant, cosine to a tenth over the last part of the run
    batch           grows to its full size over the first part
    rows            longer from stage to stage: 4K → 16K → 64K → 1M in the released models, scaled down here
    attention       dense, then a short indexer-only warm-up, then sparse to the end
    MTP weight      0.3, and 0.1 once the rate falls

Everything is a fraction of the run's length, so a run is planned once and any step can be looked up again after a crash.
Source: DeepSeek-V4 report, section 4.2; fractions are this build's, the report does not give them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from longreach.errors import RequestError

WARMUP_STEPS = 100
FINAL_SHARE = 0.1
"""The learning rate ends at this part of its peak."""

MTP_WEIGHT, MTP_WEIGHT_IN_DECAY = 0.3, 0.1
FIRST_BATCH_SHARE = 0.25
"""The batch begins at this part of its full size."""

Attention = Literal["dense", "warmup", "sparse"]


@dataclass(frozen=True)
class Stage:
    """Rows of `seq_len` tokens from the fraction `start` of the run on."""

    seq_len: int
    start: float


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`128@0 512@0.6 2048@0.85` (or with commas): row lengths and the fraction of the run each begins at.

    Raises:
        RequestError: not such a list, not from 0 on, not in ascending order.
    """
    stages = []
    for item in text.replace(",", " ").split():
        length, _, start = item.partition("@")
        try:
            stages.append(Stage(int(length), float(start or 0)))
        except ValueError:
            raise RequestError(
                f"--stages {item!r} is not LENGTH@START; write for example 128@0 512@0.6 2048@0.85"
            ) from None
    starts = [stage.start for stage in stages]
    if not stages or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)) or starts[-1] >= 1:
        raise RequestError(f"--stages {text!r}: the first must begin at 0 and each later one after it, before 1")
    if short := [stage.seq_len for stage in stages if stage.seq_len < 3]:
        raise RequestError(f"--stages {short[0]} tokens is too short a row; give at least 3")
    return tuple(stages)


@dataclass(frozen=True)
class StepPlan:
    """What one step does."""

    seq_len: int
    rows: int
    attention: Attention
    """"warmup": dense, and only the indexer learns."""
    lr_factor: float
    """Of the peak learning rate."""
    mtp_weight: float

    @property
    def phase(self) -> str:
        """For display and the event log."""
        return f"rows of {self.seq_len}, " + {
            "dense": "dense attention", "warmup": "indexer warm-up", "sparse": "sparse attention",
        }[self.attention]  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """A run of `steps` steps.

    Attributes:
        batch_tokens: tokens per step at full size; a row longer than that makes the batch one row.
        sparse_at: fraction of the run where attention becomes sparse; 1 for never.
        indexer_warmup: fraction of the run, from `sparse_at` on, in which only the indexer learns.
        decay: fraction of the run, at its end, in which the rate falls.
        ramp: fraction of the run, at its start, in which the batch grows; 0 for none.
    """

    steps: int
    stages: tuple[Stage, ...]
    batch_tokens: int
    sparse_at: float = 1.0
    indexer_warmup: float = 0.0
    decay: float = 0.25
    ramp: float = 0.0

    def at(self, step: int) -> StepPlan:
        """The plan of step `step`, from 0."""
        seq_len = next(stage.seq_len for stage in reversed(self.stages) if round(stage.start * self.steps) <= step)
        growing = round(self.ramp * self.steps)
        share = FIRST_BATCH_SHARE + (1 - FIRST_BATCH_SHARE) * step / growing if step < growing else 1.0
        attention: Attention = "dense"
        if step >= round(self.sparse_at * self.steps):
            warming = step < round((self.sparse_at + self.indexer_warmup) * self.steps)
            attention = "warmup" if warming else "sparse"
        return StepPlan(
            seq_len,
            max(1, round(self.batch_tokens * share) // seq_len),
            attention,
            # The warm-up is short; a rate that is already falling would not teach the indexer in time.
            1.0 if attention == "warmup" else learning_rate(step, self.steps, self.decay),
            MTP_WEIGHT_IN_DECAY if step >= self.decay_start else MTP_WEIGHT,
        )

    @property
    def decay_start(self) -> int:
        return self.steps - round(self.steps * self.decay)


def learning_rate(step: int, steps: int, decay: float) -> float:
    """The factor on the peak rate at step `step` of `steps`: warm-up over min(100, a tenth), constant, cosine to a tenth."""
    warmup = max(1, min(WARMUP_STEPS, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    start = steps - round(steps * decay)
    if step < start:
        return 1.0
    progress = min(1.0, (step - start + 1) / max(1, steps - start))
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
