"""What one process of the API counts, and its look at the queue, for Prometheus.

Nothing here names a tenant, or what a tenant named: adapters are labelled by their version's id,
requests by the route's template.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from core.errors import Unavailable
from core.labels import BoundedLabels
from db.database import Database
from db.stats import (
    DeliveriesNow,
    QueueNow,
    WorkerNow,
    deliveries_now,
    lost_workers,
    queue_now,
    workers_now,
)
from db.suspects import waiting_suspects

#: The queue is looked at no more often than this, however many scrape.
LOOK_SECONDS: Final = 5.0
#: Nor is an absent Postgres: its 503 is repeated for this long.
OUTAGE_SECONDS: Final = 1.0
#: Long polls take up to 30 s by design.
_HTTP_SECONDS: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 35)
_LINE: Final = ("base_model", "adapter")


class ApiMetrics:
    """Counters of this process, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lorry_http_requests",
            "Answered requests.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._latency = Histogram(
            "lorry_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("method", "route"),
            buckets=_HTTP_SECONDS,
            registry=self._registry,
        )
        self._submitted = Counter(
            "lorry_submitted_jobs", "Jobs committed.", ("base_model",), registry=self._registry
        )
        self._queue = _QueueCollector()
        self._registry.register(self._queue)
        self._lock = asyncio.Lock()
        self._looked_at = -LOOK_SECONDS
        self._outage: Unavailable | None = None

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered; `route` is a template such as `/v1/jobs/{job_id}`."""
        self._requests.labels(method, route, status).inc()
        self._latency.labels(method, route).observe(seconds)

    def submitted(self, base_model: str) -> None:
        """A job is committed; a repeat under an Idempotency-Key is none."""
        self._submitted.labels(base_model).inc()

    async def text(self, database: Database) -> bytes:
        """Everything in Prometheus's text format, the queue as it was at most 5 s ago.

        Raises:
            Unavailable: Postgres cannot be reached: half of the truth would look like calm.
        """
        async with self._lock:  # those who scrape together share one look
            await self._look(database)
        return generate_latest(self._registry)

    async def _look(self, database: Database) -> None:
        age = time.monotonic() - self._looked_at
        if self._outage is None and age < LOOK_SECONDS:
            return
        if self._outage is not None and age < OUTAGE_SECONDS:
            raise Unavailable(self._outage.message)
        try:
            self._queue.show(
                await queue_now(database),
                await workers_now(database),
                await waiting_suspects(database),
                await lost_workers(database),
                await deliveries_now(database),
            )
            self._outage = None
        except Unavailable as error:
            self._outage = error
            raise
        finally:
            self._looked_at = time.monotonic()


class _QueueCollector(Collector):
    """The last look at the queue as gauges."""

    def __init__(self) -> None:
        self._labels = BoundedLabels()
        self._metrics: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._metrics

    def show(
        self,
        queue: QueueNow,
        workers: list[WorkerNow],
        suspects: Mapping[str, int],
        lost: Mapping[str, int],
        deliveries: DeliveriesNow,
    ) -> None:
        self._metrics = [
            *self._adapters(queue),
            *_workers(workers),
            *_trouble(suspects, lost),
            *_webhooks(deliveries),
        ]

    def _adapters(self, queue: QueueNow) -> Iterable[Metric]:
        waiting: dict[tuple[str, ...], int] = {}
        oldest: dict[tuple[str, ...], float] = {}
        # the longest lines first: at the first look they get the labels
        for row in sorted(queue.adapters, key=lambda row: -row.waiting):
            if row.oldest_age_seconds is None:
                continue  # nothing of it waits
            key = (row.base_model, self._labels.of(row.adapter_version_id))
            waiting[key] = waiting.get(key, 0) + row.waiting
            oldest[key] = max(oldest.get(key, 0.0), row.oldest_age_seconds)
        yield _family("lorry_queue_jobs", "Queued jobs, counted up to a cap.", _LINE, waiting)
        yield _family("lorry_queue_oldest_age_seconds", "Age of the next job.", _LINE, oldest)
        lines: Mapping[tuple[str, ...], int]
        lines = {("true",): queue.lines_counted, ("false",): queue.lines - queue.lines_counted}
        text = "Lines (adapter and tenant) with queued jobs; only so many are counted."
        yield _family("lorry_queue_lines", text, ("counted",), lines)


def _workers(workers: list[WorkerNow]) -> Iterable[Metric]:
    count: dict[tuple[str, ...], int] = {}
    running: dict[tuple[str, ...], int] = {}
    tokens: dict[tuple[str, ...], float] = {}
    for worker in workers:
        key = (worker.base_model, worker.engine)
        count[key] = count.get(key, 0) + 1
        running[key] = running.get(key, 0) + worker.running
        tokens[key] = tokens.get(key, 0.0) + worker.tokens_per_second
    labels = ("base_model", "engine")
    yield _family("lorry_workers", "Workers with a live lease.", labels, count)
    yield _family("lorry_running_jobs", "Jobs that workers hold.", labels, running)
    text = "Tokens of answers per second, of live workers."
    yield _family("lorry_tokens_per_second", text, labels, tokens)


def _trouble(suspects: Mapping[str, int], lost: Mapping[str, int]) -> Iterable[Metric]:
    labels = ("base_model",)
    text = "Queued jobs that saw an engine die, and run apart."
    yield _family("lorry_suspect_jobs", text, labels, {(b,): n for b, n in suspects.items()})
    text = "Workers declared lost in the last hour."
    yield _family("lorry_lost_workers", text, labels, {(b,): n for b, n in lost.items()})


def _webhooks(deliveries: DeliveriesNow) -> Iterable[Metric]:
    count: dict[tuple[str, ...], float]
    count = {("true",): deliveries.due, ("false",): deliveries.later}
    text = "Webhook deliveries not made yet, counted up to a cap."
    yield _family("lorry_pending_deliveries", text, ("due",), count)
    text = "How long the oldest delivery that is due has been."
    oldest: dict[tuple[str, ...], float] = {(): deliveries.oldest_due_seconds}
    yield _family("lorry_deliveries_oldest_due_seconds", text, (), oldest)


def _family(
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Mapping[tuple[str, ...], float],
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
