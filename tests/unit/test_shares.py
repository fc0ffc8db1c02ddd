"""Shares between tenants: in a model of one line each, on one adapter, driven by the planner."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from db.claims import COUNT_CAP, WaitingLine
from db.waiting import Line
from workers.drain.planner import SlotView, may_finish, order, turn_seconds
from workers.drain.shares import HALF_LIFE_SECONDS, Served

QUANTUM = 10.0
#: The engine: so many at once, so many jobs waiting in it, each computed for so long.
AT_ONCE, WINDOW, JOB_SECONDS, JOB_TOKENS = 64, 96, 2.0, 200
SLOTS = SlotView({}, frozenset(), 8)
FLOOD, RETURNING = 1, 2
SMALL = range(10, 60)


class Clock:
    """A clock that tests move, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_served_are_forgotten_by_halves() -> None:
    clock = Clock()
    served = Served(clock)
    served.add(1, 100)
    clock.now = 2 * HALF_LIFE_SECONDS + 1
    assert served.shares([1]).of(1) == 25
    clock.now += 5 * HALF_LIFE_SECONDS
    assert served.shares([1]).of(1) == 0


def test_one_that_comes_back_goes_first_but_has_saved_nothing_up() -> None:
    served = Served(Clock())
    served.shares([1, 2])
    served.add(1, 500)
    served.add(2, 900)
    shares = served.shares([1, 2, 3])
    assert shares.of(3) == 499
    assert (shares.of(1), shares.of(2)) == (500, 900)
    assert served.shares([1, 2, 3]).of(3) == 499  # it is no newcomer any more
    served.add(3, 5000)
    served.shares([1, 2])
    assert served.shares([1, 2, 3]).of(3) == 5499  # what it had is not forgiven either


def test_a_flood_leaves_the_small_ones_within_the_bound() -> None:
    run = simulate(_least_served(lift=True), seconds=120, flood_from={FLOOD: 0.0})
    slowest = percentile(run.waits, 0.99)
    lines_ahead = len(SMALL) + 1
    assert slowest <= -(-lines_ahead // SLOTS.slots) * QUANTUM + JOB_SECONDS
    # far below it: a turn, the engine's own line, and a job
    assert slowest <= QUANTUM / 2 + (WINDOW / AT_ONCE) * JOB_SECONDS
    assert run.fed[FLOOD] > 0.6 * sum(run.fed.values())  # nothing is left idle for fairness' sake


def test_it_is_no_worse_than_deficit_round_robin() -> None:
    ours = simulate(_least_served(lift=True), seconds=120, flood_from={FLOOD: 0.0})
    theirs = simulate(_deficit_round_robin(), seconds=120, flood_from={FLOOD: 0.0})
    assert percentile(ours.waits, 0.99) <= percentile(theirs.waits, 0.99) + 0.5
    assert percentile(ours.waits, 0.5) <= percentile(theirs.waits, 0.5) + 0.5


def test_a_second_flood_shares_with_the_first_from_its_beginning() -> None:
    floods = {FLOOD: 0.0, RETURNING: 100.0}
    ours = simulate(_least_served(lift=True), seconds=130, flood_from=floods)
    assert 0.4 < share_after(ours, RETURNING, 101) < 0.6
    # without a start at par it would catch up first with all that it did not ask for
    plain = simulate(_least_served(lift=False), seconds=130, flood_from=floods)
    assert share_after(plain, RETURNING, 101) > 0.6


@dataclass(slots=True)
class Run:
    """What a simulation showed: waits of the small tenants' jobs until they compute, in seconds."""

    waits: list[float] = field(default_factory=list)
    fed: dict[int, int] = field(default_factory=dict)
    log: list[tuple[float, int, int]] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def share_after(run: Run, tenant: int, since: float) -> float:
    """A flood's part of what both floods were fed."""
    fed = {t: sum(n for at, who, n in run.log if at >= since and who == t) for t in (1, 2)}
    return fed[tenant] / sum(fed.values())


#: Picks a line of those that wait; gets what was fed to whom since the last time.
Choose = Callable[[list[WaitingLine], list[tuple[int, int]], float], WaitingLine]


def _least_served(*, lift: bool) -> Choose:
    clock = Clock()
    served = Served(clock)

    def choose(lines: list[WaitingLine], fed: list[tuple[int, int]], now: float) -> WaitingLine:
        clock.now = now
        for tenant, jobs in fed:
            served.add(tenant, jobs * JOB_TOKENS)
        everybody = {w.line.tenant_id for w in lines}
        shares = served.shares(everybody if lift else ())
        return order(lines, SLOTS, shares, QUANTUM)[0]

    return choose


def _deficit_round_robin(quantum_tokens: int = WINDOW * JOB_TOKENS) -> Choose:
    """The textbook's, at the grain of chunks: in turn, each as long as its deficit allows."""
    ring: deque[int] = deque()
    deficit: dict[int, int] = {}

    def choose(lines: list[WaitingLine], fed: list[tuple[int, int]], now: float) -> WaitingLine:
        for tenant, jobs in fed:
            deficit[tenant] = deficit.get(tenant, 0) - jobs * JOB_TOKENS
        by_tenant = {w.line.tenant_id: w for w in lines}
        for tenant in [t for t in ring if t not in by_tenant]:
            ring.remove(tenant)
            deficit[tenant] = 0
        for tenant in by_tenant:
            if tenant not in ring:
                ring.append(tenant)
                deficit[tenant] = quantum_tokens
        while deficit[ring[0]] <= 0:
            deficit[ring[0]] += quantum_tokens
            ring.rotate(-1)
        return by_tenant[ring[0]]

    return choose


def simulate(choose: Choose, *, seconds: float, flood_from: dict[int, float]) -> Run:
    """Floods without end, and 50 tenants that submit a job each every 5 s."""
    rng = random.Random(3)
    run = Run()
    arrivals = sorted(
        (5 * n + rng.random() * 5, tenant) for tenant in SMALL for n in range(int(seconds / 5))
    )
    queues: dict[int, deque[float]] = {tenant: deque() for tenant in SMALL}
    since: dict[int, float] = {}
    computing: deque[float] = deque()
    inside: deque[tuple[int, float]] = deque()  # in the engine's own line
    turn: int | None = None
    ends, fed, unseen = 0.0, 0, list[tuple[int, int]]()
    for tick in range(int(seconds * 50)):
        now = tick / 50
        while arrivals and arrivals[0][0] <= now:
            _, tenant = arrivals.pop(0)
            since.setdefault(tenant, now)
            queues[tenant].append(now)
        while computing and computing[0] <= now:
            computing.popleft()
        for flood, begins in flood_from.items():
            if begins <= now:
                since.setdefault(flood, now)

        def look(now: float = now) -> list[WaitingLine]:
            waits = {t: len(q) for t, q in queues.items() if q}
            floods = {t: COUNT_CAP for t, begins in flood_from.items() if begins <= now}
            return [
                WaitingLine(Line(1, 0, t), 0, now - since[t], 0, n, None)
                for t, n in {**waits, **floods}.items()
            ]

        while (free := WINDOW - len(inside) - len(computing)) >= 6 and (lines := look()):
            if turn is None:
                turn = choose(lines, unseen, now).line.tenant_id
                ends, fed, unseen = now + turn_seconds(SLOTS, QUANTUM), 0, []
            many = turn in flood_from
            taken = free if many else min(free, len(queues[turn]))
            inside.extend((turn, now if many else queues[turn].popleft()) for _ in range(taken))
            fed += taken
            unseen.append((turn, taken))
            run.fed[turn] = run.fed.get(turn, 0) + taken
            run.log.append((now, turn, taken))
            over = taken < free
            if not over and now >= ends:
                best = choose(look(), unseen, now).line.tenant_id
                unseen = []
                over = best != turn and not may_finish(
                    fed, COUNT_CAP if many else len(queues[turn])
                )
                ends = now + turn_seconds(SLOTS, QUANTUM)
            if over:
                since[turn] = now
                if not many and not queues[turn]:
                    del since[turn]
                turn = None
            elif taken == free:
                break
        while inside and len(computing) < AT_ONCE:
            tenant, came = inside.popleft()
            computing.append(now + JOB_SECONDS)
            if tenant in SMALL:
                run.waits.append(now - came)
    return run


if __name__ == "__main__":
    for name, policy in (
        ("least served, newcomers at par", _least_served(lift=True)),
        ("least served", _least_served(lift=False)),
        ("deficit round robin", _deficit_round_robin()),
    ):
        found = simulate(policy, seconds=120, flood_from={FLOOD: 0.0})
        print(name, *(round(percentile(found.waits, p), 2) for p in (0.5, 0.99, 1.0)), found.fed[1])
