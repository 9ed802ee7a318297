"""Which request runs next, and with how many tokens: integers and clocks, no tensors.

Each step: waiting requests are let in while a state block and pages are free; every
request that has its prompt behind it gets its next token; what is left of the step's token budget reads prompts, so that
decoding goes on while a long prompt is read.

Order: higher priority first (waiting raises it by one every `ageing_s`, so nobody starves), then the user who has been
served least (a virtual clock of tokens, as in fair queueing), then who came first. Memory: a request takes pages as it
grows. When none is left, not even in the prefix cache, the last in that order is set aside (`preempt`) and comes back
when there is room. A request that fits the memory alone is always served: the first in order is never set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from longreach.engine.request import Request, Status


@dataclass
class Plan:
    """What one step does.

    Attributes:
        decode: requests whose newest token is read (and their drafts).
        prefill: (request, tokens of the prompt to read).
    """

    decode: list[Request] = field(default_factory=list)
    prefill: list[tuple[Request, int]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.prefill


@dataclass
class Hooks:
    """What the scheduler asks of whoever owns memory.

    Attributes:
        admit: give the request a state block and what the prefix cache knows; sets `computed` and `cached`. Returns whether
            there was room.
        would_admit: whether there would be, were these running requests set aside.
        reserve: pages up to so many tokens, evicting cached prefixes where needed. Returns whether there were enough.
        release: take block and pages back, keeping what is needed to go on exactly where it stands.
    """

    admit: Callable[[Request], bool]
    would_admit: Callable[[Request, Sequence[Request]], bool]
    reserve: Callable[[Request, int], bool]
    release: Callable[[Request], None]


class Scheduler:
    """The queue of those waiting and the list of those running.

    Args:
        max_running: state blocks.
        step_tokens: prompt tokens per step beside decoding requests; `idle_tokens` when nobody is decoding.
        stop_at: the next length at which a prompt's pass must end (checkpoints, pages), given request and position.
        ageing_s: seconds of waiting that count as one step of priority.
    """

    def __init__(
        self,
        hooks: Hooks,
        *,
        max_running: int,
        step_tokens: int,
        idle_tokens: int,
        stop_at: Callable[[Request, int], int] | None = None,
        ageing_s: float = 10.0,
    ) -> None:
        self.hooks = hooks
        self.max_running, self.step_tokens, self.idle_tokens = max_running, step_tokens, idle_tokens
        self.stop_at = stop_at
        self.ageing_s = ageing_s
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.served: dict[str, float] = {}
        self.preempted = 0
        self.now = 0.0
        self._order = 0

    # ---- in and out -------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._order += 1
        request.order, request.status, request.queued = self._order, Status.WAITING, request.arrival
        active = {r.user for r in (*self.waiting, *self.running)}
        if request.user not in active:
            # One who was away does not come back with a claim on all the time he did not use.
            least = min((self.served[user] for user in active), default=max(self.served.values(), default=0.0))
            self.served[request.user] = max(self.served.get(request.user, 0.0), least)
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out for good. Its memory is the caller's to free."""
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        request.status = Status.FINISHED
        if not any(r.user == request.user for r in (*self.waiting, *self.running)) and len(self.served) > 10_000:
            del self.served[request.user]  # forgotten when very many have come by

    def preempt(self, request: Request) -> None:
        """Set a running request aside; it waits again, with its old place in the order."""
        self.hooks.release(request)
        self.running.remove(request)
        request.status, request.drafts = Status.WAITING, []
        request.preemptions += 1
        request.queued = self.now
        self.preempted += 1
        self.waiting.append(request)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> list[Request]:
        """Requests past their deadline; taking them out is the caller's."""
        return [r for r in (*self.waiting, *self.running) if r.deadline is not None and now >= r.deadline]

    def schedule(self, now: float) -> Plan:
        """Decide the next step and reserve its memory."""
        plan, self.now = Plan(), now
        self._admit(now)
        self._decode(plan, now)
        self._prefill(plan, now)
        for request in plan.decode:
            self.served[request.user] += 1 + len(request.drafts)
        for request, count in plan.prefill:
            self.served[request.user] += count
        return plan

    def rank(self, request: Request, now: float) -> tuple[float, float, int]:
        """Sort key: smaller goes first."""
        waited = request.waited + (max(0.0, now - request.queued) if request.status is Status.WAITING else 0.0)
        return -(request.priority + waited // self.ageing_s), self.served.get(request.user, 0.0), request.order

    def _admit(self, now: float) -> None:
        """Let in waiting requests in order, up to the first that does not fit: passing over it would starve it."""
        while self.waiting:
            first = min(self.waiting, key=lambda r: self.rank(r, now))
            if len(self.running) >= self.max_running or not self.hooks.admit(first):
                if not self._make_way(first, now):
                    return
                continue
            self.waiting.remove(first)
            first.waited += max(0.0, now - first.queued)
            first.status = Status.RUNNING
            self.running.append(first)

    def _make_way(self, request: Request, now: float) -> bool:
        """Set the last running request aside for one of higher priority, if that one can come in by setting such aside."""
        mine = self.rank(request, now)[0]
        lower = [r for r in self.running if self.rank(r, now)[0] > mine]
        if not lower or not self.hooks.would_admit(request, lower):
            return False
        self.preempt(max(lower, key=lambda r: self.rank(r, now)))
        return True

    def _decode(self, plan: Plan, now: float) -> None:
        for request in self._in_order(now, lambda r: r.is_decoding):
            if request.status is Status.RUNNING and self._reserve(
                request, len(request.tokens) + len(request.drafts), now
            ):
                plan.decode.append(request)
        plan.decode = [r for r in plan.decode if r.status is Status.RUNNING]

    def _prefill(self, plan: Plan, now: float) -> None:
        budget = self.step_tokens if plan.decode else self.idle_tokens
        for request in self._in_order(now, lambda r: not r.is_decoding):
            if budget <= 0:
                break
            if request.status is not Status.RUNNING:
                continue
            stop = min(request.computed + budget, len(request.tokens))
            if self.stop_at is not None:
                stop = min(stop, self.stop_at(request, request.computed))
            assert stop > request.computed, f"{request.id} has no token left to read"
            if self._reserve(request, stop, now):
                plan.prefill.append((request, stop - request.computed))
                budget -= stop - request.computed
        plan.prefill = [(r, n) for r, n in plan.prefill if r.status is Status.RUNNING]
        plan.decode = [r for r in plan.decode if r.status is Status.RUNNING]

    def _in_order(self, now: float, which: Callable[[Request], bool]) -> Iterable[Request]:
        return sorted(filter(which, self.running), key=lambda r: self.rank(r, now))

    def _reserve(self, request: Request, length: int, now: float) -> bool:
        """Pages for the request up to `length`, setting aside those after it in order, and at last itself."""
        while not self.hooks.reserve(request, length):
            last = max(self.running, key=lambda r: self.rank(r, now))
            self.preempt(last)
            if last is request:
                return False
        return True
