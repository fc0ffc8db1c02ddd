"""What a worker counts of its drain: cheap to note on the event loop, rendered when scraped.

Per job only plain numbers are touched (about a microsecond): prometheus_client's own counters
take a lock for each. `metrics_server.py` renders them in the thread that answers a scrape, which
reads numbers that may be one event old.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, NamedTuple

from prometheus_client import Histogram

from core.labels import MOST_ADAPTERS, OTHER, adapter_label
from workers.engine.protocol import EngineInfo, FoldTimes
from workers.rates import LiveRates

JobOutcome = Literal["succeeded", "failed", "aborted"]

_CALL_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LOAD_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Waiting(Enum):
    """What waits in Postgres for a worker."""

    NOTHING = "nothing"
    #: work that could be fed: to the base model, or to an adapter that has or can have a slot
    FEEDABLE = "feedable"
    #: work, but every slot is held by another adapter's unfinished jobs
    SLOT = "slot"


@dataclass(slots=True)
class AdapterCounts:
    """What one adapter's jobs added up to since the worker started."""

    fed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outcomes: dict[JobOutcome, int] = field(
        default_factory=lambda: {"succeeded": 0, "failed": 0, "aborted": 0}
    )


class Seconds(NamedTuple):
    """Time in each state since the worker started; see `DrainMetrics`."""

    busy: float = 0.0
    starved: float = 0.0
    slot_bound: float = 0.0
    load_stalled: float = 0.0


class _Seen(NamedTuple):
    """The state since `at`, and the seconds before; replaced whole, for other threads."""

    at: float
    seconds: Seconds = Seconds()
    busy: bool = False
    short: bool = False
    waiting: Waiting = Waiting.NOTHING
    loading: bool = False

    def seconds_at(self, now: float) -> Seconds:
        elapsed, before = now - self.at, self.seconds
        starved = self.short and self.waiting is Waiting.FEEDABLE
        slot_bound = self.short and self.waiting is Waiting.SLOT
        return Seconds(
            before.busy + (elapsed if self.busy else 0.0),
            before.starved + (elapsed if starved else 0.0),
            before.slot_bound + (elapsed if slot_bound else 0.0),
            before.load_stalled + (elapsed if self.short and self.loading else 0.0),
        )


class DrainMetrics:
    """One worker's counts. The drain's event loop notes; any thread may read.

    Short is an engine with fewer jobs than the `max_num_seqs` that it can compute at once. Starved
    is the time in which it was short while work waited that could have been fed: the drain was too
    slow. Slot-bound is the time in which it was short while all that waited needed a slot: nobody
    could have been quicker. Load-stalled, mostly a part of starved, is the time in which it was
    short while an adapter was being loaded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.rates = LiveRates(clock)
        self.info: EngineInfo | None = None
        #: jobs in the engine
        self.running = 0
        self.claimed_jobs = 0
        self.recorded_results = 0
        self.dropped_results = 0
        #: read when scraped: how many slots have unfinished jobs, how many results wait
        self.slots_in_use: Callable[[], int] = _none
        self.unrecorded: Callable[[], int] = _none
        #: likewise: workers that this one declared lost, and the jobs it freed of theirs
        self.rescues: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.suspects_run = 0
        #: adapters folded, and tokens made while one was
        self.folds = 0
        self.folded_tokens = 0
        self._folded_before = 0.0
        self._folded_since: float | None = None
        #: how long the engine stood still to restore and to fold
        self.fold_pause_seconds = 0.0
        self._max_num_seqs = 0
        self._by_adapter: dict[int, AdapterCounts] = {}
        self._others = AdapterCounts()
        #: adapters that stay in their slots
        self.pinned = 0
        #: read when scraped: adapters in the slots, with jobs or without
        self.resident: Callable[[], int] = _none
        #: adapters that left their slot for another, and local copies deleted for others
        self.evictions = 0
        self.cache_evictions = 0
        self._seen = _Seen(clock())

        self.loads = _histogram("lorry_adapter_load_seconds", "Slot switches.", _LOAD_SECONDS)
        self.fetches = _histogram(
            "lorry_adapter_fetch_seconds", "Adapters brought to the local disk.", _LOAD_SECONDS
        )
        self.claims = _histogram("lorry_claim_seconds", "Claims of chunks.", _CALL_SECONDS)
        self.records = _histogram("lorry_record_seconds", "Flushes of results.", _CALL_SECONDS)

    def engine_started(self, info: EngineInfo) -> None:
        """The engine is up: from its `max_num_seqs` on jobs wait inside it."""
        self.info = info
        self._max_num_seqs = info.limits.max_num_seqs

    # -- noted for every job or chunk -----------------------------------------------------

    def fed(self, adapter_version_id: int, jobs: int) -> None:
        """Jobs of an adapter (0: the base model) were given to the engine."""
        self._of(adapter_version_id).fed += jobs

    def finished(
        self,
        adapter_version_id: int,
        outcome: JobOutcome,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """One attempt has left the engine. Its tokens are those of all its choices."""
        counts = self._by_adapter.get(adapter_version_id) or self._of(adapter_version_id)
        counts.outcomes[outcome] += 1
        counts.prompt_tokens += prompt_tokens
        counts.completion_tokens += completion_tokens
        if outcome == "succeeded":
            self.rates.add(adapter_version_id, completion_tokens)

    def observe_running(self, running: int, waiting: Waiting) -> None:
        """Call at every change of either; the clock is read only where a state changes.

        Args:
            running: jobs in the engine.
            waiting: what waits for this worker, as far as it knows.
        """
        self.running = running
        seen = self._seen
        busy, short = running > 0, running < self._max_num_seqs
        if busy is seen.busy and short is seen.short and waiting is seen.waiting:
            return
        now = self._clock()
        self._seen = _Seen(now, seen.seconds_at(now), busy, short, waiting, seen.loading)

    # -- noted for every call -------------------------------------------------------------

    @contextmanager
    def loading(self) -> Iterator[None]:
        """An adapter is being loaded into a slot; counted as a load unless it fails."""
        started = self._note_loading(True)
        try:
            yield
            self.loads.observe(self._clock() - started)
        finally:
            self._note_loading(False)

    def _note_loading(self, loading: bool) -> float:
        now = self._clock()
        self._seen = self._seen._replace(
            at=now, seconds=self._seen.seconds_at(now), loading=loading
        )
        return now

    def claim(self, seconds: float, jobs: int) -> None:
        """A claim came back, with so many jobs."""
        self.claims.observe(seconds)
        self.claimed_jobs += jobs

    def record(self, seconds: float, results: int) -> None:
        """A flush is committed; `results` are those that the fence let through."""
        self.records.observe(seconds)
        self.recorded_results += results

    def dropped(self, results: int) -> None:
        """Results that the fence refused: their jobs were cancelled, expired or rescued."""
        self.dropped_results += results

    def suspects(self, jobs: int) -> None:
        """A group of suspects has the engine."""
        self.suspects_run += jobs

    def switched(self, folded: bool, times: FoldTimes) -> None:
        """What is folded has changed; `folded` is whether an adapter is now."""
        before = self.folded_seconds
        self._folded_since = self._clock() if folded else None
        self._folded_before = before
        self.folds += folded
        self.fold_pause_seconds += times.pause

    # -- read -----------------------------------------------------------------------------

    @property
    def seconds(self) -> Seconds:
        """Time in each state, up to now."""
        return self._seen.seconds_at(self._clock())

    @property
    def folded_seconds(self) -> float:
        """Time with an adapter folded, up to now."""
        since = self._folded_since
        return self._folded_before + (0.0 if since is None else self._clock() - since)

    @property
    def waiting_in_window(self) -> int:
        """Jobs in the engine beyond those that it computes at once."""
        return max(0, self.running - self._max_num_seqs)

    def by_adapter(self) -> Mapping[str, AdapterCounts]:
        """Counts by label; adapters beyond the first 200 are summed."""
        named = {adapter_label(i): counts for i, counts in self._by_adapter.copy().items()}
        return named if self._others == AdapterCounts() else {**named, OTHER: self._others}

    def snapshot(self) -> dict[str, float]:
        """Totals by name, for tests and benchmarks. Seconds, jobs, tokens."""
        adapters = [*self._by_adapter.copy().values(), self._others]
        seconds = self.seconds
        return {
            "busy_seconds": seconds.busy,
            "starved_seconds": seconds.starved,
            "slot_bound_seconds": seconds.slot_bound,
            "load_stalled_seconds": seconds.load_stalled,
            "running": self.running,
            "waiting_in_window": self.waiting_in_window,
            "slots_in_use": self.slots_in_use(),
            "unrecorded": self.unrecorded(),
            "fed": sum(a.fed for a in adapters),
            "succeeded": sum(a.outcomes["succeeded"] for a in adapters),
            "failed": sum(a.outcomes["failed"] for a in adapters),
            "aborted": sum(a.outcomes["aborted"] for a in adapters),
            "prompt_tokens": sum(a.prompt_tokens for a in adapters),
            "completion_tokens": sum(a.completion_tokens for a in adapters),
            **_count_and_seconds("load", self.loads),
            "evictions": self.evictions,
            "cache_evictions": self.cache_evictions,
            **_count_and_seconds("claim", self.claims),
            **_count_and_seconds("record", self.records),
            "claimed_jobs": self.claimed_jobs,
            "recorded_results": self.recorded_results,
            "dropped_results": self.dropped_results,
            "folds": self.folds,
            "folded_seconds": self.folded_seconds,
            "folded_tokens": self.folded_tokens,
            "fold_pause_seconds": self.fold_pause_seconds,
        }

    def _of(self, adapter_version_id: int) -> AdapterCounts:
        counts = self._by_adapter.get(adapter_version_id)
        if counts is None:
            if len(self._by_adapter) >= MOST_ADAPTERS:
                return self._others
            counts = self._by_adapter[adapter_version_id] = AdapterCounts()
        return counts


def _none() -> int:
    return 0


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=None)


def _count_and_seconds(name: str, histogram: Histogram) -> dict[str, float]:
    values = {s.name.rpartition("_")[2]: s.value for m in histogram.collect() for s in m.samples}
    return {f"{name}s": values["count"], f"{name}_seconds": values["sum"]}
