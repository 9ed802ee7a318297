"""Scheduler and page counts: random walks against a few lines of arithmetic, and the promises one by one."""

from __future__ import annotations

import random

import pytest

from longreach.engine.pages import OutOfPages, PagePool
from longreach.engine.request import Request, Status
from longreach.engine.sampling import SamplingParams
from longreach.engine.scheduler import Hooks, Scheduler

BLOCK = 8


class Machine:
    """Memory without tensors, and a model that answers anything."""

    def __init__(self, pages: int, slots: int, keeps_state: bool, generator: random.Random, **options) -> None:
        self.pages, self.slots, self.keeps_state, self.generator = PagePool(pages), slots, keeps_state, generator
        self.scheduler = Scheduler(
            Hooks(self.admit, self.would_admit, self.reserve, self.release),
            max_running=slots, step_tokens=16, idle_tokens=64, **options,
        )  # fmt: skip
        self.now, self.count = 0.0, 0
        self.alive: dict[str, Request] = {}
        self.waited: list[float] = []

    def admit(self, request: Request) -> bool:
        kept = request.work["kept"]
        if -(-(len(request.tokens) + 1) // BLOCK) > self.pages.free_count:
            return False
        request.work["pages"] = [self.pages.take() for _ in range(-(-kept // BLOCK))]
        request.computed = kept
        return True

    def would_admit(self, request: Request, without) -> bool:
        held = sum(len(other.work["pages"]) for other in without)
        return -(-(len(request.tokens) + 1) // BLOCK) <= self.pages.free_count + held

    def reserve(self, request: Request, length: int) -> bool:
        assert length <= request.limit
        try:
            while len(request.work["pages"]) * BLOCK < length:
                request.work["pages"].append(self.pages.take())
        except OutOfPages:
            return False
        return True

    def release(self, request: Request) -> None:
        request.work["kept"] = request.computed if self.keeps_state else 0
        self.free(request)

    def free(self, request: Request) -> None:
        for page in request.work["pages"]:
            self.pages.release(page)
        request.work["pages"] = []

    def add(self, prompt: int, new: int, **fields) -> Request:
        self.count += 1
        limit = min(prompt + new, self.pages.count * BLOCK)
        request = Request(str(self.count), [0] * prompt, SamplingParams(), prompt, limit, arrival=self.now, **fields)
        request.work = {"pages": [], "kept": 0}
        self.alive[request.id] = request
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        self.now += 0.05
        for request in self.scheduler.expired(self.now):
            self.end(request)
        plan = self.scheduler.schedule(self.now)
        assert len({r.id for r in plan.decode} | {r.id for r, _ in plan.prefill}) == len(plan.decode) + len(
            plan.prefill
        )
        assert sum(n for _, n in plan.prefill) <= (16 if plan.decode else 64)
        for request in plan.decode:
            right = self.generator.randint(0, len(request.drafts))
            request.tokens += [0] * min(1 + right, request.limit - len(request.tokens))
            request.computed = len(request.tokens) - 1
            room = request.limit - len(request.tokens) - 1
            request.drafts = [0] * max(0, min(room, self.generator.choice([0, 0, 3])))
        for request, n in plan.prefill:
            assert n > 0
            request.computed += n
            if request.computed == len(request.tokens):
                request.tokens.append(0)
        for request in [r for r in self.alive.values() if len(r.tokens) >= r.limit or self.generator.random() < 0.002]:
            self.end(request)
        self.check()

    def end(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.free(request)
        del self.alive[request.id]
        self.waited.append(self.now - request.arrival)

    def check(self) -> None:
        """The ten-line model: every page has one owner or is free; those waiting own nothing; all requests are somewhere."""
        held = [page for request in self.alive.values() for page in request.work["pages"]]
        assert len(held) == len(set(held)) == self.pages.count - self.pages.free_count
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert {r.id for r in (*running, *waiting)} == set(self.alive)
        assert len(running) + len(waiting) == len(self.alive) and len(running) <= self.slots
        assert all(not r.work["pages"] for r in waiting)
        assert all(len(r.work["pages"]) * BLOCK >= r.computed for r in running)


@pytest.mark.parametrize("keeps_state", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_leaks_nothing_uses_nothing_twice_and_starves_nobody(seed, keeps_state):
    # 8 walks x 12,500 operations
    generator = random.Random(seed)
    machine = Machine(
        generator.choice([12, 40, 200]), generator.choice([1, 4, 16]), keeps_state, generator, ageing_s=2.0
    )
    capacity = machine.pages.count * BLOCK
    for _ in range(12_500):
        draw = generator.random()
        if draw < 0.15 and len(machine.alive) < 60:
            machine.add(
                generator.randint(1, min(capacity - 1, 120)), generator.randint(1, 40), user=generator.choice("abc"),
                priority=generator.choice([0, 0, 1, 5]),
                deadline=machine.now + generator.choice([0.1, 5]) if generator.random() < 0.1 else None,
            )  # fmt: skip
        elif draw < 0.17 and machine.alive:
            machine.end(generator.choice(list(machine.alive.values())))
            machine.check()
        else:
            machine.step()
    steps = 0
    while machine.alive:
        machine.step()
        steps += 1
        assert steps < 60 * 200, "somebody is never served"
    assert machine.pages.free_count == machine.pages.count


def test_a_request_of_low_priority_is_served_under_endless_traffic_of_high_priority():
    machine = Machine(20, 2, True, random.Random(0), ageing_s=1.0)
    poor = machine.add(8, 4, priority=0)
    for _ in range(2000):
        while len(machine.alive) < 6:
            machine.add(8, 20, priority=3)
        machine.step()
        if poor.status is Status.FINISHED:
            break
    assert poor.status is Status.FINISHED
    assert machine.waited[-1] < 3 * 1.0 + 4, "priority 0 overtakes priority 3 after three steps of ageing"


def test_a_higher_priority_takes_the_place_of_a_lower_one_which_then_goes_on_where_it_was():
    machine = Machine(100, 1, True, random.Random(1), ageing_s=1000)
    low = machine.add(8, 30)
    for _ in range(5):
        machine.step()
    read, made = low.computed, len(low.tokens)
    high = machine.add(8, 5, priority=1)
    machine.step()
    assert high.status is Status.RUNNING and low.status is Status.WAITING and low.preemptions == 1
    while high.status is not Status.FINISHED:
        machine.step()
    assert (low.computed, len(low.tokens)) == (read, made)
    machine.step()
    assert low.status is Status.RUNNING and len(low.tokens) > made


def test_time_spent_running_is_not_waiting():
    machine = Machine(100, 1, True, random.Random(1), ageing_s=1.0)
    low = machine.add(8, 700)
    for _ in range(200):  # ten seconds
        machine.step()
    high = machine.add(8, 5, priority=3)
    machine.step()
    assert high.status is Status.RUNNING and low.status is Status.WAITING


def test_nobody_is_set_aside_for_one_who_still_cannot_come_in():
    machine = Machine(10, 3, True, random.Random(1), ageing_s=1000)
    first = machine.add(40, 20, priority=5)
    low = machine.add(8, 8, priority=0)
    machine.step()
    machine.add(60, 4, priority=3)  # eight pages: the first holds five, the low one only one
    made = len(low.tokens)
    for _ in range(5):
        machine.step()
    assert low.preemptions == 0 and len(low.tokens) == made + 5 and first.preemptions == 0


def test_two_users_get_equal_shares_however_many_requests_one_of_them_sends():
    machine = Machine(1000, 2, True, random.Random(2), ageing_s=1e9)
    for _ in range(30):
        machine.add(16, 16, user="many")
    done: dict[str, int] = {"many": 0, "few": 0}
    for _ in range(3):
        machine.add(16, 16, user="few")
    while done["few"] < 3:
        before = dict(machine.alive)
        machine.step()
        for name, request in before.items():
            if name not in machine.alive:
                done[request.user] += 1
    assert done["many"] <= 6, "the user with three requests is not queued behind thirty"


def test_decoding_goes_on_while_a_long_prompt_is_read():
    machine = Machine(1000, 4, True, random.Random(3))
    short = machine.add(4, 200)
    machine.step()
    long = machine.add(400, 4)
    made = len(short.tokens)
    for _ in range(10):
        machine.step()
    assert len(short.tokens) >= made + 10 and 0 < long.computed < 400


def test_prompts_end_a_pass_where_a_checkpoint_is_due():
    machine = Machine(1000, 4, True, random.Random(4), stop_at=lambda request, position: (position // 24 + 1) * 24)
    request = machine.add(100, 1)
    stops = []
    while request.id in machine.alive:
        machine.step()
        stops.append(request.computed)
    assert stops[:5] == [24, 48, 72, 96, 100]


def test_pages_are_counted_by_holder():
    pool = PagePool(3)
    a, b = pool.take(), pool.take()
    pool.retain(a)
    assert (pool.holders(a), pool.holders(b), pool.free_count) == (2, 1, 1)
    assert not pool.release(a) and pool.release(a) and pool.free_count == 2
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release(a)
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        pool.retain(a)
    for _ in range(2):
        pool.take()
    with pytest.raises(OutOfPages, match="all 3 pages are held"):
        pool.take()
