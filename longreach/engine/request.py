"""One request on its way through the engine: what was asked, how far it is, what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from longreach.engine.sampling import FinishReason, SamplingParams


class Status(Enum):
    """Where a request is. It may go back and forth between WAITING and RUNNING; FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
        tokens: the prompt, then what was generated.
        num_prompt: how many of them are the prompt.
        limit: tokens at most in all, after the context and the memory have had their say.
        user: who shares fairly with others; tenant: whose cache entries it may see.
        priority: higher goes first. Waiting raises it by one every `Scheduler.ageing_s` seconds.
        arrival, deadline: seconds of the engine's clock.
        queued, waited: since when it waits, and how long it has waited before.
        computed: tokens whose state exists: the last generated one is always still to be read.
        cached: prompt tokens that never went through the model for this request, because somebody's state was there.
        order: among those that arrived; kept when the request is pre-empted.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    num_prompt: int
    limit: int
    seed: int = 0
    user: str = ""
    tenant: str = ""
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    order: int = 0
    queued: float = 0.0
    waited: float = 0.0
    status: Status = Status.WAITING
    computed: int = 0
    cached: int = 0
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    drafts: list[int] = field(default_factory=list)
    work: Any = None
    """What the engine keeps with it: sequence, samplers, text. Nothing here looks inside."""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens known but not read yet; more than one while the prompt is read."""
        return len(self.tokens) - self.computed

    @property
    def is_decoding(self) -> bool:
        return self.status is Status.RUNNING and self.remaining == 1 and self.num_generated > 0

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def prompt(self) -> Sequence[int]:
        return self.tokens[: self.num_prompt]
