"""What a worker counts of its drain: cheap to note on the event loop, rendered when scraped.

Per job only plain numbers are touched (about a microsecond): prometheus_client's own counters
take a lock for each. `metrics_server.py` renders them in the thread that answers a scrape, which
reads numbers that may be one event old.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from prometheus_client import Histogram

from core.labels import MOST_ADAPTERS, OTHER, adapter_label
from workers.engine.protocol import EngineInfo
from workers.rates import LiveRates

JobOutcome = Literal["succeeded", "failed", "aborted"]

_CALL_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LOAD_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(slots=True)
class AdapterCounts:
    """What one adapter's jobs added up to since the worker started."""

    fed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outcomes: dict[JobOutcome, int] = field(
        default_factory=lambda: {"succeeded": 0, "failed": 0, "aborted": 0}
    )


class DrainMetrics:
    """One worker's counts. The drain's event loop notes; any thread may read.

    Starved is the time in which work waited (in Postgres, for this worker) while fewer jobs were
    in the engine than the `max_num_seqs` that it can compute at once.
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
        self._max_num_seqs = 0
        self._by_adapter: dict[int, AdapterCounts] = {}
        self._others = AdapterCounts()
        self._busy = self._starving = False
        self._busy_seconds = self._starved_seconds = 0.0
        self._seen_at = clock()

        self.loads = _histogram("lorry_adapter_load_seconds", "Slot switches.", _LOAD_SECONDS)
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

    def observe_running(self, running: int, work_waiting: bool) -> None:
        """Call at every change of either.

        Args:
            running: jobs in the engine.
            work_waiting: whether this worker could be fed more if it were quick enough.
        """
        now = self._clock()
        elapsed = now - self._seen_at
        self._seen_at = now
        if self._busy:
            self._busy_seconds += elapsed
        if self._starving:
            self._starved_seconds += elapsed
        self.running = running
        self._busy = running > 0
        self._starving = work_waiting and running < self._max_num_seqs

    # -- noted for every call -------------------------------------------------------------

    def load(self, seconds: float) -> None:
        """An adapter was loaded into a slot."""
        self.loads.observe(seconds)

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

    # -- read -----------------------------------------------------------------------------

    @property
    def busy_seconds(self) -> float:
        """Time with jobs in the engine, up to now."""
        return self._busy_seconds + (self._clock() - self._seen_at if self._busy else 0.0)

    @property
    def starved_seconds(self) -> float:
        """Time with work waiting and room to compute it, up to now."""
        return self._starved_seconds + (self._clock() - self._seen_at if self._starving else 0.0)

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
        return {
            "busy_seconds": self.busy_seconds,
            "starved_seconds": self.starved_seconds,
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
            **_count_and_seconds("claim", self.claims),
            **_count_and_seconds("record", self.records),
            "claimed_jobs": self.claimed_jobs,
            "recorded_results": self.recorded_results,
            "dropped_results": self.dropped_results,
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
