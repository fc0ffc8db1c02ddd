"""Whether to fold: only where it is the faster way, for a quantum at most while others wait."""

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from db.claims import WaitingLine
from tests.unit.test_planner import waiting
from workers.drain.fold import BETTER, Choice, FoldView, Held, rest_after, speed
from workers.drain.fold import choose as choice_of
from workers.drain.planner import SlotView

QUANTUM = 10.0
MOST = 256


def view(
    *lines: WaitingLine,
    held: Mapping[int, int] | None = None,
    folded: int | None = None,
    slots: SlotView | None = None,
    **fields: object,
) -> FoldView:
    """What stands in an engine with 8 slots; jobs of 300 tokens; a fold gains 1.35."""
    in_engine = {version: Held(jobs, 300 * jobs) for version, jobs in (held or {}).items()}
    resident = frozenset({w.line.adapter_version_id for w in lines} | in_engine.keys()) - {0}
    usual = FoldView(
        folded=folded,
        held=in_engine,
        lines=lines,
        waiting=lines,
        slots=slots or SlotView(dict.fromkeys(in_engine.keys() - {0}, 1.0), resident, 8),
        max_num_seqs=MOST,
        state_seconds=3.0,
        quantum_seconds=QUANTUM,
        gain=1.35,
        switch_seconds=0.2,
        tokens_per_second=8000,
    )
    return replace(usual, **fields)  # type: ignore[arg-type]


def choose(seen: FoldView) -> int | None:
    """The adapter version that is to be folded."""
    return choice_of(seen).version


def test_a_large_drain_of_one_adapter_is_folded() -> None:
    assert choose(view(waiting(1, jobs=128), held={1: 384})) == 1


def test_it_stays_folded_to_its_end_while_nobody_waits() -> None:
    for left in (300, 20, 1):
        assert choose(view(held={1: left}, folded=1, state_seconds=600)) == 1
    assert choose(view(folded=1)) is None


def test_the_base_model_needs_no_fold() -> None:
    assert choose(view(waiting(0, jobs=128), held={0: 384})) is None


def test_an_adapter_that_is_refused_or_not_loaded_is_not_folded() -> None:
    large = view(waiting(1, jobs=128), held={1: 384})
    assert choose(replace(large, refused={1})) is None
    assert choose(replace(large, slots=SlotView({}, frozenset(), 8))) is None


def test_small_lines_run_together() -> None:
    lines = [waiting(adapter, jobs=20) for adapter in range(1, 9)]
    assert choose(view(*lines)) is None
    assert choose(view(held=dict.fromkeys(range(1, 9), 20))) is None


def test_a_few_jobs_do_not_repay_the_switch() -> None:
    assert choose(view(held={1: 6})) is None
    assert choose(view(held={1: 6}, switch_seconds=0.001)) == 1


def test_no_gain_no_fold() -> None:
    assert choose(view(waiting(1, jobs=128), held={1: 384}, gain=1.0)) is None


def test_after_a_quantum_others_are_fed_and_get_the_engine_soon() -> None:
    lines = (waiting(1, jobs=128, since=5), waiting(2, jobs=128, since=5))
    during = view(*lines, held={1: 280}, folded=1, state_seconds=QUANTUM - 0.1)
    assert choice_of(during) == Choice(1)
    over = replace(during, state_seconds=QUANTUM)
    assert choice_of(over) == Choice(1, feed=False)  # what it has begun runs on
    assert choose(replace(over, held={1: Held(80, 8000), 2: Held(150, 45_000)})) is None
    assert choose(replace(over, state_seconds=1.5 * QUANTUM)) is None
    parked = view(waiting(1, jobs=128), held={1: 300, 2: 90}, folded=1)
    assert choice_of(replace(parked, parked_seconds=QUANTUM - 0.1)) == Choice(1)
    assert choice_of(replace(parked, parked_seconds=QUANTUM)) == Choice(1, feed=False)


def test_others_have_the_engine_for_a_while_between_two_folds() -> None:
    lines = (waiting(1, jobs=128), waiting(2, jobs=128))
    resting = view(*lines, held={1: 300}, rest_seconds=rest_after(QUANTUM, others=True))
    assert choose(resting) is None
    assert choose(replace(resting, state_seconds=4.0)) == 1
    assert rest_after(QUANTUM, others=False) == 0


def test_a_deadline_that_presses_ends_a_fold_at_once() -> None:
    lines = (waiting(1, jobs=128), waiting(2, jobs=1, deadline=20))
    assert choose(view(*lines, held={1: 384}, folded=1, state_seconds=0.1)) is None
    assert choose(view(*lines, held={1: 384})) is None


def test_a_line_past_its_bound_ends_a_fold_that_has_repaid_itself() -> None:
    lines = (waiting(1, jobs=128), waiting(2, jobs=5, since=2.5 * QUANTUM + 1))
    late = view(*lines, held={1: 384}, folded=1)
    assert choice_of(late) == Choice(1, feed=False)
    assert choice_of(replace(late, state_seconds=0.5)) == Choice(1)  # not for less than it cost


def test_a_tail_makes_room_for_the_next_adapter_at_once() -> None:
    tail = view(waiting(2, jobs=128), held={1: 40, 2: 100}, folded=1)
    assert choose(tail) == 2
    # nobody is worth it: all tails together
    assert choose(view(held={1: 40, 2: 60, 3: 50}, folded=1)) is None
    # those parked first have waited long enough
    assert choose(replace(tail, parked_seconds=QUANTUM)) is None


def test_a_cache_full_of_parked_requests_forbids_a_fold() -> None:
    mixed = view(waiting(1, jobs=128), held={1: 40, 2: 300}, cache_tokens=400_000)
    assert choose(mixed) == 1
    # what holds most of the cache may still run alone
    assert choose(replace(mixed, cache_tokens=100_000)) == 2
    assert choose(replace(mixed, cache_tokens=80_000)) is None


adapters = st.integers(0, 9)
lines = st.lists(
    st.builds(
        waiting,
        adapters,
        since=st.floats(0, 100),
        jobs=st.integers(1, 128),
        deadline=st.none() | st.floats(-5, 500),
    ),
    max_size=10,
    unique_by=lambda w: w.line,
)
views = st.builds(
    lambda found, held, folded, **fields: view(*found, held=held, folded=folded, **fields),
    lines,
    st.dictionaries(adapters, st.integers(1, 384), max_size=8),
    st.none() | st.integers(1, 9),
    state_seconds=st.floats(0, 100),
    parked_seconds=st.floats(0, 100),
    rest_seconds=st.floats(0, 10),
    gain=st.floats(0.5, 2),
    switch_seconds=st.floats(0, 3),
    cache_tokens=st.sampled_from([0, 50_000, 400_000]),
    refused=st.frozensets(adapters),
)


@given(views)
def test_a_choice_is_always_one_that_can_be_folded(seen: FoldView) -> None:
    chosen = choose(seen)
    if chosen is None or chosen == seen.folded:
        return
    assert chosen != 0
    assert chosen not in seen.refused
    assert chosen in seen.slots.resident
    assert seen.jobs(chosen) > 0
    alone = speed(min(MOST, seen.jobs(chosen)), MOST)
    held = sum(one.jobs for one in seen.held.values())
    together = speed(min(MOST, held + sum(seen.jobs_waiting.values())), MOST)
    assert seen.gain * alone >= BETTER * together * 0.999


@given(views)
def test_nobody_is_kept_waiting_beyond_a_quantum(seen: FoldView) -> None:
    others = [w for w in seen.waiting if w.line.adapter_version_id != seen.folded]
    if seen.folded is None or not others or seen.state_seconds < seen.shortest_seconds:
        return
    if seen.state_seconds >= 1.5 * QUANTUM:
        assert choose(seen) != seen.folded
    elif seen.state_seconds >= QUANTUM:
        assert choice_of(seen) != Choice(seen.folded)


@given(views)
def test_a_pressing_deadline_is_never_kept_waiting(seen: FoldView) -> None:
    pressed = {
        w.line.adapter_version_id
        for w in seen.waiting
        if w.deadline_seconds is not None and w.deadline_seconds < 60
    }
    chosen = choose(seen)
    assert chosen is None or not pressed - {chosen} or not pressed
