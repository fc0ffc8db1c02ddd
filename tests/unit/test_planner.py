"""The planner: what goes first, what is held back, and that nobody waits without bound."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from db.claims import COUNT_CAP, WaitingLine
from db.waiting import Line
from workers.drain.planner import (
    COLD_JOBS,
    LEAVE_SECONDS,
    RESIDENT_TOKENS,
    TURNS_IN_QUANTUM,
    Shares,
    SlotView,
    closing,
    left_to_others,
    may_finish,
    order,
    turn_seconds,
    upcoming,
)

QUANTUM = 10.0
NO_SLOTS_USED = SlotView({}, frozenset(), 4)


def waiting(
    adapter: int,
    *,
    tenant: int = 1,
    since: float = 0.0,
    jobs: int = 10,
    deadline: float | None = None,
) -> WaitingLine:
    return WaitingLine(Line(1, adapter, tenant), 0, since, 0, jobs, deadline)


def first(
    lines: list[WaitingLine], slots: SlotView = NO_SLOTS_USED, shares: Shares | None = None
) -> int:
    return order(lines, slots, shares or Shares(), QUANTUM)[0].line.adapter_version_id


def test_a_pressing_deadline_goes_before_everything() -> None:
    lines = [waiting(1, since=500), waiting(2, deadline=30), waiting(3, deadline=5)]
    assert first(lines) == 3


def test_a_far_deadline_is_no_privilege() -> None:
    assert first([waiting(1, since=5), waiting(2, deadline=3600)]) == 1


def test_the_tenant_served_least_goes_first() -> None:
    lines = [waiting(1, tenant=1, since=9), waiting(2, tenant=2, since=1)]
    assert first(lines, shares=Shares({1: 5000, 2: 10})) == 2


def test_the_longest_wait_goes_first_within_a_tenant() -> None:
    assert first([waiting(1, since=1), waiting(2, since=3)]) == 2


def test_past_its_bound_a_line_goes_before_a_tenant_served_less() -> None:
    lines = [waiting(1, tenant=1, since=11), waiting(2, tenant=2, since=1)]
    assert first(lines, shares=Shares({1: 5000})) == 1


def test_seats_that_would_stay_empty_go_to_the_longest_line() -> None:
    lines = [waiting(1, since=9, jobs=3), waiting(2, since=1, jobs=40), waiting(3, jobs=90)]
    others = SlotView({8: 1.0, 9: 1.0}, frozenset({8, 9}), 4)

    def best(*more: WaitingLine, slots: SlotView = others, seats_free: bool = True) -> int:
        ordered = order([*lines, *more], slots, Shares(), QUANTUM, seats_free=seats_free)
        return ordered[0].line.adapter_version_id

    assert best() == 3
    assert best(seats_free=False) == 1
    # one in a slot fills them; whose turn is next is a matter of age
    assert best(waiting(9, jobs=1), waiting(4, since=QUANTUM + 1)) == 4
    # what has waited too long or is due goes before
    assert best(waiting(4, since=QUANTUM * 3, jobs=1)) == 4
    assert best(waiting(4, deadline=5, jobs=1)) == 4
    # and a tenant that was served less
    rich = Shares({1: 5000.0})
    ordered = order([*lines, waiting(5, tenant=2)], others, rich, QUANTUM, seats_free=True)
    assert ordered[0].line.adapter_version_id == 5


def test_short_lines_fill_no_seats_and_keep_their_order() -> None:
    lines = [waiting(1, since=1, jobs=COLD_JOBS - 1), waiting(2, since=3, jobs=1)]
    ordered = order(lines, NO_SLOTS_USED, Shares(), QUANTUM, seats_free=True)
    assert [w.line.adapter_version_id for w in ordered] == [2, 1]


def test_the_line_that_is_to_fill_seats_is_made_ready_first() -> None:
    full = SlotView(dict.fromkeys(range(10, 14), 1.0), frozenset(range(10, 14)), 4)
    lines = [waiting(i, since=i) for i in range(1, 7)] + [waiting(7, jobs=50)]
    assert 7 not in upcoming(lines, full, Shares(), QUANTUM)
    assert upcoming(lines, full, Shares(), QUANTUM, seats_free=True)[0] == 7


def test_an_adapter_without_a_slot_waits_for_a_free_one_and_the_base_needs_none() -> None:
    full = SlotView({7: 1.0, 8: 1.0}, frozenset({7, 8}), 2)
    lines = [waiting(1, since=99), waiting(7), waiting(0)]
    runnable = {w.line.adapter_version_id for w in order(lines, full, Shares(), QUANTUM)}
    assert runnable == {7, 0}


def test_an_adapter_that_held_a_slot_for_a_quantum_closes_while_another_is_blocked() -> None:
    full = SlotView({7: 12.0, 8: 1.0}, frozenset({7, 8}), 2)
    assert closing([waiting(1), waiting(7)], full, QUANTUM) == {7}
    assert closing([waiting(7), waiting(8)], full, QUANTUM) == frozenset()


def test_no_adapter_closes_while_a_slot_is_free() -> None:
    roomy = SlotView({7: 99.0}, frozenset({7}), 2)
    assert closing([waiting(1)], roomy, QUANTUM) == frozenset()


def test_never_more_than_half_of_the_slots_close() -> None:
    full = SlotView(dict.fromkeys(range(10, 18), 50.0), frozenset(), 8)
    lines = [waiting(i) for i in range(1, 10)]
    assert len(closing(lines, full, QUANTUM)) == 4
    one = SlotView({9: 50.0}, frozenset({9}), 1)
    assert closing(lines, one, QUANTUM) == {9}


def test_as_many_turns_as_slots_fit_in_a_quantum() -> None:
    many = SlotView({}, frozenset(), 16)
    assert turn_seconds(many, QUANTUM) == QUANTUM / 16
    # however few the slots: the base model's lines need none
    assert turn_seconds(NO_SLOTS_USED, QUANTUM) == QUANTUM / TURNS_IN_QUANTUM


def test_a_turn_may_empty_a_line_that_is_nearly_empty() -> None:
    assert may_finish(fed=30, left=60)
    assert not may_finish(fed=30, left=61)
    # the look counted no further: there may be millions left
    assert not may_finish(fed=COUNT_CAP, left=COUNT_CAP)


def test_a_line_that_needs_no_load_goes_first_unless_its_tenant_had_far_more() -> None:
    slots = SlotView({}, frozenset({2}), 4)
    lines = [waiting(1, tenant=1, since=9), waiting(2, tenant=2, since=1)]
    assert first(lines, slots) == 2
    assert first(lines, slots, Shares({2: RESIDENT_TOKENS - 1})) == 2
    assert first(lines, slots, Shares({2: RESIDENT_TOKENS + 1})) == 1
    overdue = [waiting(1, tenant=1, since=QUANTUM + 1), lines[1]]
    assert first(overdue, slots) == 1


def test_a_pinned_adapter_keeps_its_slot_and_never_closes() -> None:
    pinned = SlotView({8: 50.0}, frozenset({7, 8}), 2, frozenset({7}))
    assert pinned.free == 0
    lines = [waiting(1), waiting(7), waiting(8)]
    assert {w.line.adapter_version_id for w in order(lines, pinned, Shares(), QUANTUM)} == {7}
    assert closing(lines, pinned, QUANTUM) == {8}
    both_held = SlotView({7: 99.0, 8: 50.0}, frozenset({7, 8}), 2, frozenset({7}))
    assert closing(lines, both_held, QUANTUM) == {8}


def test_those_fetched_ahead_are_the_next_that_need_a_load() -> None:
    slots = SlotView({5: 1.0, 6: 1.0}, frozenset({5, 6, 7}), 3)
    lines = [waiting(i, since=i) for i in (0, 1, 2, 3, 4, 5, 7)]
    assert upcoming(lines, slots, Shares(), QUANTUM) == [4, 3, 2, 1]
    full = SlotView({5: 1.0, 6: 1.0, 7: 1.0}, frozenset({5, 6, 7}), 3)
    assert upcoming(lines, full, Shares(), QUANTUM) == [4, 3, 2, 1]  # for when slots come free
    lines += [waiting(i, since=i) for i in (8, 9, 10)]
    assert upcoming(lines, slots, Shares(), QUANTUM) == [10, 9, 8, 4]
    assert upcoming(lines, NO_SLOTS_USED, Shares(), QUANTUM) == [10, 9, 8, 7, 5, 4, 3, 2]


def test_a_cold_line_is_left_to_the_worker_that_holds_its_adapter_for_a_moment() -> None:
    slots = SlotView({}, frozenset({2}), 4)

    def left(line: WaitingLine, *, elsewhere: int = 1, busy: bool = True) -> bool:
        return line.line in left_to_others([line], slots, {elsewhere}, busy=busy)

    assert left(waiting(1, jobs=1))
    assert not left(waiting(1, jobs=1), elsewhere=3)
    assert not left(waiting(1, jobs=1), busy=False)
    assert not left(waiting(1, jobs=1, since=LEAVE_SECONDS))
    assert not left(waiting(1, jobs=1, deadline=5))
    assert not left(waiting(1, jobs=COLD_JOBS))  # a hot one spreads
    assert not left(waiting(2, jobs=1), elsewhere=2)  # it is here too
    assert not left(waiting(0, jobs=1), elsewhere=0)


def test_preferring_resident_adapters_saves_loads() -> None:
    with_preference, longest = loads_of_a_trickle(prefer=True)
    without, longest_without = loads_of_a_trickle(prefer=False)
    assert with_preference < 0.7 * without
    assert longest <= longest_without + QUANTUM


def loads_of_a_trickle(*, prefer: bool) -> tuple[int, float]:
    """Twelve adapters of one tenant share four slots and get a job now and then; each chunk takes
    a moment. Returns the loads and the longest wait."""
    rng = random.Random(5)
    jobs, since = dict.fromkeys(range(1, 13), 0), dict.fromkeys(range(1, 13), 0.0)
    resident: list[int] = []  # least recently used first
    loads, longest, now = 0, 0.0, 0.0
    for _ in range(3000):
        for adapter in rng.choices(range(1, 13), k=2):
            if not jobs[adapter]:
                since[adapter] = now
            jobs[adapter] += 1
        view = SlotView({}, frozenset(resident) if prefer else frozenset(), 4)
        lines = [waiting(a, since=now - since[a], jobs=n) for a, n in jobs.items() if n]
        chosen = order(lines, view, Shares(), QUANTUM)[0]
        adapter = chosen.line.adapter_version_id
        longest = max(longest, chosen.since_seconds)
        if adapter in resident:
            resident.remove(adapter)
        else:
            loads += 1
            resident = resident[-3:]
        resident.append(adapter)
        jobs[adapter] = 0
        now += 0.5
    return loads, longest


LINES = st.lists(
    st.builds(
        waiting,
        st.integers(0, 30),
        tenant=st.integers(1, 5),
        since=st.floats(0, 1000),
        jobs=st.integers(0, 512),
        deadline=st.none() | st.floats(-10, 1000),
    ),
    max_size=40,
    unique_by=lambda w: w.line,
)
SLOTS = st.builds(
    lambda held, slots, pinned: SlotView(
        dict(list(held.items())[:slots]), frozenset(held), slots, frozenset(list(held)[:pinned])
    ),
    st.dictionaries(st.integers(1, 30), st.floats(0, 100), max_size=8),
    st.integers(1, 8),
    st.integers(0, 2),
)


@given(LINES, SLOTS)
def test_what_may_run_never_needs_a_slot_in_use(lines: list[WaitingLine], slots: SlotView) -> None:
    for chosen in order(lines, slots, Shares(), QUANTUM):
        assert chosen.jobs > 0
        adapter = chosen.line.adapter_version_id
        assert adapter == 0 or adapter in slots.held_seconds.keys() | slots.pinned or slots.free


@given(LINES, SLOTS)
def test_something_stays_open_unless_there_is_one_slot(
    lines: list[WaitingLine], slots: SlotView
) -> None:
    closed = closing(lines, slots, QUANTUM)
    assert closed <= set(slots.held_seconds) - slots.pinned
    if slots.slots > 1 and len(slots.held_seconds) > 1:
        assert len(closed) < len(slots.held_seconds)


@settings(max_examples=60, deadline=None)
@given(
    lines=st.integers(1, 40),
    slots=st.integers(1, 8),
    tenants=st.integers(1, 5),
    answer_seconds=st.floats(1, 30),
    seed=st.randoms(use_true_random=False),
)
def test_no_line_waits_without_bound(
    lines: int, slots: int, tenants: int, answer_seconds: float, seed: object
) -> None:
    """Every line floods; jobs take a while to leave their slot. Each line is served again and
    again, within the design's bound (with room for the turns' grain)."""
    served_at = dict.fromkeys(range(1, lines + 1), 0.0)
    tokens: dict[int, float] = {}
    busy_until: dict[int, float] = {}
    held_since: dict[int, float] = {}
    idle: list[int] = []  # resident without unfinished jobs, least recently used first
    now, longest = 0.0, 0.0
    bound = -(-lines // slots) * QUANTUM
    for _ in range(40 * lines):
        for adapter in [a for a, until in busy_until.items() if until <= now]:
            del busy_until[adapter], held_since[adapter]
            idle.append(adapter)
        held = {a: now - since for a, since in held_since.items()}
        idle = [a for a in idle if a not in held][len(held) - slots :] if len(held) < slots else []
        view = SlotView(held, frozenset([*held, *idle]), slots)
        seen = [
            waiting(a, tenant=1 + a % tenants, since=now - at, jobs=512)
            for a, at in served_at.items()
        ]
        best = order(seen, view, Shares(tokens), QUANTUM)
        if not best:
            now = min(busy_until.values())
            continue
        line = best[0].line
        longest = max(longest, now - served_at[line.adapter_version_id])
        now += turn_seconds(view, QUANTUM)
        served_at[line.adapter_version_id] = now
        tokens[line.tenant_id] = tokens.get(line.tenant_id, 0) + 1000
        busy_until[line.adapter_version_id] = now + answer_seconds
        held_since.setdefault(line.adapter_version_id, now)
    # a round of all lines, each round of slots held up by its longest answer
    assert longest <= 2 * (bound + -(-lines // slots) * answer_seconds) + QUANTUM
    assert all(
        now - at <= longest + 2 * bound + lines * answer_seconds for at in served_at.values()
    )
