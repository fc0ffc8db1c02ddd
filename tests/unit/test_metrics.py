"""A worker's counts: what they add up to, how they are labelled, and where they are read."""

import socket
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from core.errors import UsageError
from core.labels import MOST_ADAPTERS, OTHER, BoundedLabels
from workers.engine.protocol import EngineInfo, EngineLimits, FoldTimes
from workers.metrics import DrainMetrics, Waiting
from workers.metrics_server import registry_of, serve, served

INFO = EngineInfo("simulated", "1", "sim-base", "r", EngineLimits(4096, 4, 8, 16))


class Clock:
    """A clock that tests move, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drain_metrics(clock: Clock | None = None) -> DrainMetrics:
    metrics = DrainMetrics(clock or Clock())
    metrics.engine_started(INFO)
    return metrics


def samples(metrics: DrainMetrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and label values."""
    text = generate_latest(registry_of(metrics)).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


NOTHING, FEEDABLE, SLOT = Waiting


def test_short_is_starved_where_work_could_be_fed_and_slot_bound_where_it_could_not() -> None:
    clock = Clock()
    metrics = drain_metrics(clock)
    for running, waiting, seconds in (
        (0, NOTHING, 1.0),  # idle
        (0, FEEDABLE, 2.0),  # starved
        (3, FEEDABLE, 4.0),  # starved, busy
        (3, NOTHING, 8.0),  # busy: the rest of the work is all there is
        (4, FEEDABLE, 16.0),  # busy: as much as the engine computes at once
        (6, FEEDABLE, 32.0),
        (3, SLOT, 64.0),  # slot-bound, busy
        (4, SLOT, 128.0),
    ):
        metrics.observe_running(running, waiting)
        clock.now += seconds
    assert metrics.seconds.starved == 2 + 4
    assert metrics.seconds.slot_bound == 64
    assert metrics.seconds.busy == 4 + 8 + 16 + 32 + 64 + 128  # up to now, without another event
    metrics.observe_running(6, NOTHING)
    assert metrics.waiting_in_window == 2


def test_a_load_stalls_only_an_engine_that_is_short() -> None:
    clock = Clock()
    metrics = drain_metrics(clock)
    metrics.observe_running(4, FEEDABLE)
    with metrics.loading():
        clock.now += 1
        metrics.observe_running(3, FEEDABLE)
        clock.now += 2
        assert metrics.seconds.load_stalled == 2
    clock.now += 4
    assert metrics.seconds == (7, 6, 0, 2)
    with pytest.raises(OSError), metrics.loading():
        raise OSError
    assert metrics.snapshot()["loads"] == 1  # what failed is no slot switch
    assert metrics.snapshot()["load_seconds"] == 3


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from(Waiting), st.floats(0, 1e3, allow_nan=False)),
        max_size=40,
    )
)
def test_seconds_are_those_of_the_states_observed(
    events: list[tuple[int, Waiting, float]],
) -> None:
    clock = Clock()
    metrics = drain_metrics(clock)
    for running, waiting, seconds in events:
        metrics.observe_running(running, waiting)
        clock.now += seconds
    found = metrics.seconds
    for state, seconds in ((FEEDABLE, found.starved), (SLOT, found.slot_bound)):
        short = sum(s for running, waiting, s in events if waiting is state and running < 4)
        assert seconds == pytest.approx(short, abs=1e-6)
    busy = sum(seconds for running, _, seconds in events if running)
    assert found.busy == pytest.approx(busy, abs=1e-6)


def test_counts_and_calls_reach_the_snapshot_and_the_text() -> None:
    clock = Clock()
    metrics = drain_metrics(clock)
    metrics.pinned = 1
    metrics.resident = lambda: 3
    metrics.evictions, metrics.cache_evictions = 9, 2
    metrics.fetches.observe(0.25)
    metrics.slots_in_use = lambda: 2
    metrics.unrecorded = lambda: 5
    metrics.fed(7, 3)
    metrics.fed(0, 1)
    metrics.finished(7, "succeeded", 10, 20)
    metrics.finished(7, "failed")
    metrics.finished(7, "aborted")
    metrics.finished(0, "succeeded", 1, 2)
    with metrics.loading():
        clock.now += 0.5
    metrics.switched(True, FoldTimes(0.0, 0.25, 0.25))
    clock.now += 2
    metrics.folded_tokens += 70
    metrics.switched(False, FoldTimes(0.25, 0.0, 0.25))
    metrics.claim(0.01, 4)
    metrics.record(0.02, 3)
    metrics.dropped(1)
    metrics.observe_running(5, NOTHING)
    assert metrics.snapshot() == {
        "busy_seconds": 0,
        "starved_seconds": 0,
        "slot_bound_seconds": 0,
        "load_stalled_seconds": 0,
        "running": 5,
        "waiting_in_window": 1,
        "slots_in_use": 2,
        "unrecorded": 5,
        "fed": 4,
        "succeeded": 2,
        "failed": 1,
        "aborted": 1,
        "prompt_tokens": 11,
        "completion_tokens": 22,
        "loads": 1,
        "load_seconds": 0.5,
        "evictions": 9,
        "cache_evictions": 2,
        "folds": 1,
        "folded_seconds": 2.0,
        "folded_tokens": 70,
        "fold_pause_seconds": 0.5,
        "claims": 1,
        "claim_seconds": 0.01,
        "records": 1,
        "record_seconds": 0.02,
        "claimed_jobs": 4,
        "recorded_results": 3,
        "dropped_results": 1,
    }
    found = samples(metrics)
    assert found["lorry_tokens_total", "7", "completion"] == 20
    assert found["lorry_tokens_total", "base", "prompt"] == 1
    assert found["lorry_finished_jobs_total", "7", "aborted"] == 1
    assert found["lorry_fed_jobs_total", "7"] == 3
    assert found["lorry_adapter_load_seconds_count",] == 1
    assert found["lorry_claim_seconds_sum",] == 0.01
    assert found["lorry_dropped_results_total",] == 1
    assert found["lorry_slots_in_use",] == 2
    assert found["lorry_pinned_slots",] == 1
    assert found["lorry_resident_adapters",] == 3
    assert found["lorry_adapter_evictions_total",] == 9
    assert found["lorry_adapter_cache_evictions_total",] == 2
    assert found["lorry_adapter_fetch_seconds_sum",] == 0.25
    assert found["lorry_max_num_seqs",] == 4
    assert found["lorry_engine_info", "sim-base", "simulated", "1"] == 1


def test_before_the_engine_is_up_there_is_a_text_without_it() -> None:
    found = samples(DrainMetrics())
    assert found["lorry_engine_jobs",] == 0
    assert not [key for key in found if key[0] == "lorry_engine_info"]


def test_adapters_beyond_the_bound_share_a_label() -> None:
    metrics = drain_metrics()
    for adapter_version_id in range(1, MOST_ADAPTERS + 51):
        metrics.fed(adapter_version_id, 2)
        metrics.finished(adapter_version_id, "succeeded", 1, 1)
    found = samples(metrics)
    labels = {key[1] for key in found if key[0] == "lorry_fed_jobs_total"}
    assert len(labels) == MOST_ADAPTERS + 1
    assert found["lorry_fed_jobs_total", OTHER] == 100
    assert metrics.snapshot()["fed"] == 2 * (MOST_ADAPTERS + 50)


def test_a_label_is_kept_for_good() -> None:
    labels = BoundedLabels(2)
    assert [labels.of(i) for i in (0, 9, 5, 9, 0, 5)] == ["base", "9", OTHER, "9", "base", OTHER]


def test_metrics_are_served_and_a_taken_port_is_refused() -> None:
    metrics = drain_metrics()
    metrics.fed(3, 1)
    server = serve(metrics, 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            assert 'lorry_fed_jobs_total{adapter="3"} 1.0' in answer.read().decode()
        with pytest.raises(UsageError, match=f"LORRY_METRICS_PORT={server.port}: the port is tak"):
            serve(metrics, server.port)
        with pytest.raises(UsageError, match=r"LORRY_METRICS_HOST=192\.0\.2\.1"):
            serve(metrics, 0, "192.0.2.1")
    finally:
        server.close()


async def test_they_are_served_for_the_length_of_a_block() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with served(DrainMetrics(), port, "127.0.0.1"):
        with socket.create_connection(("127.0.0.1", port)):
            pass
    async with served(DrainMetrics(), None, "127.0.0.1"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
