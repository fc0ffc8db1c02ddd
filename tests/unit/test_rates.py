"""Live rates: true for a steady stream, at once and later, and gone after a while."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.rates import WINDOW_SECONDS, LiveRates


class Clock:
    """A clock that tests move, in seconds."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


EVENTS = st.lists(
    st.tuples(
        st.floats(0, 20, allow_nan=False),  # seconds until it
        st.integers(0, 3),  # adapter version
        st.integers(0, 5000),  # tokens
    ),
    min_size=1,
    max_size=60,
)


@given(
    per_second=st.integers(1, 200),
    tokens=st.integers(1, 1000),
    seconds=st.integers(1, 300),
)
def test_a_steady_stream_is_measured_right_from_the_start_on(
    per_second: int, tokens: int, seconds: int
) -> None:
    clock = Clock()
    rates = LiveRates(clock)
    steps = min(seconds * per_second, 2000)
    for _ in range(steps):
        clock.now += 1 / per_second
        rates.add(3, tokens)
    rate = rates.rates()[3]
    elapsed = steps / per_second
    # one job more or less at the edge of the window is what can be told apart
    slack = 1 + 2 / min(steps, WINDOW_SECONDS * per_second)
    expected = per_second * min(1.0, elapsed)  # within the first second: as if it were one second
    assert expected / slack <= rate.jobs_per_second <= expected * slack
    assert rate.tokens_per_second == pytest.approx(rate.jobs_per_second * tokens)


@given(EVENTS)
def test_rates_of_adapters_add_up_to_the_rate_of_all(events: list[tuple[float, int, int]]) -> None:
    clock = Clock()
    apart, together = LiveRates(clock), LiveRates(clock)
    for seconds, adapter_version_id, tokens in events:
        clock.now += seconds
        apart.add(adapter_version_id, tokens)
        together.add(0, tokens)
    total = sum(rate.tokens_per_second for rate in apart.rates().values())
    all_of_it = together.rates()[0].tokens_per_second
    # an adapter that is forgotten takes a little of the sum with it
    assert total == pytest.approx(all_of_it, rel=1e-3, abs=5.0)


@given(EVENTS, st.floats(0, 100), st.floats(0, 100))
def test_rates_are_finite_and_only_fall_while_nothing_finishes(
    events: list[tuple[float, int, int]], soon: float, later: float
) -> None:
    clock = Clock()
    rates = LiveRates(clock)
    for seconds, adapter_version_id, tokens in events:
        clock.now += seconds
        rates.add(adapter_version_id, tokens)
    clock.now += soon
    before = rates.rates()
    clock.now += later
    after = rates.rates()
    assert after.keys() <= before.keys()
    for adapter_version_id, rate in after.items():
        assert math.isfinite(rate.tokens_per_second)
        assert 0 <= rate.tokens_per_second <= before[adapter_version_id].tokens_per_second + 1e-9
        assert 0 < rate.jobs_per_second <= before[adapter_version_id].jobs_per_second + 1e-9


def test_an_adapter_is_forgotten_when_nothing_is_left_of_it() -> None:
    clock = Clock()
    rates = LiveRates(clock)
    rates.add(1, 100, jobs=1)
    clock.now += WINDOW_SECONDS
    rates.add(2, 100)
    assert set(rates.rates()) == {1, 2}
    clock.now += 9.5 * WINDOW_SECONDS
    assert set(rates.rates()) == {2}
    clock.now += 1e6
    assert rates.rates() == {}


def test_the_first_job_is_no_torrent() -> None:
    clock = Clock()
    rates = LiveRates(clock)
    rates.add(1, 100)
    assert 95 <= rates.rates()[1].tokens_per_second <= 105
