"""A worker's counts in Prometheus's terms, made when scraped, and the port where they are read."""

import asyncio
import errno
import logging
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from core.errors import UsageError
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)

_ADAPTER: Final = ("adapter",)


class DrainCollector(Collector):
    """Renders a `DrainMetrics`."""

    def __init__(self, metrics: DrainMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: some labels come later."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Every metric as it is now."""
        metrics = self._metrics
        rescued_workers, rescued_jobs = metrics.rescues()
        yield from self._engine()
        yield from self._adapters()
        for histogram in (metrics.loads, metrics.fetches, metrics.claims, metrics.records):
            yield from histogram.collect()
        for name, text, value in (
            ("lorry_engine_jobs", "Jobs in the engine.", metrics.running),
            (
                "lorry_engine_waiting_jobs",
                "Jobs in the engine beyond max_num_seqs.",
                metrics.waiting_in_window,
            ),
            ("lorry_slots_in_use", "Adapters with unfinished jobs.", metrics.slots_in_use()),
            ("lorry_resident_adapters", "Adapters in the slots.", metrics.resident()),
            ("lorry_pinned_slots", "Adapters that stay in their slots.", metrics.pinned),
            ("lorry_unrecorded_results", "Results not in Postgres yet.", metrics.unrecorded()),
        ):
            yield GaugeMetricFamily(name, text, value)
        seconds = metrics.seconds
        for name, text, total in (
            ("lorry_busy_seconds", "Time with jobs in the engine.", seconds.busy),
            (
                "lorry_starved_seconds",
                "Time with fewer than max_num_seqs jobs in the engine and work to feed it.",
                seconds.starved,
            ),
            (
                "lorry_slot_bound_seconds",
                "Time with fewer than max_num_seqs jobs in the engine, every waiting one without "
                "a slot.",
                seconds.slot_bound,
            ),
            (
                "lorry_load_stalled_seconds",
                "Time with fewer than max_num_seqs jobs in the engine while an adapter loads.",
                seconds.load_stalled,
            ),
            ("lorry_adapter_evictions", "Adapters that made room in a slot.", metrics.evictions),
            (
                "lorry_adapter_cache_evictions",
                "Local copies of adapters that made room on the disk.",
                metrics.cache_evictions,
            ),
            ("lorry_folds", "Adapters folded into the base's weights.", metrics.folds),
            ("lorry_folded_seconds", "Time with an adapter folded.", metrics.folded_seconds),
            ("lorry_folded_tokens", "Tokens of answers made meanwhile.", metrics.folded_tokens),
            (
                "lorry_fold_pause_seconds",
                "Time in which the engine stood still to fold and to restore.",
                metrics.fold_pause_seconds,
            ),
            ("lorry_claimed_jobs", "Jobs claimed.", metrics.claimed_jobs),
            ("lorry_recorded_results", "Results in Postgres.", metrics.recorded_results),
            ("lorry_dropped_results", "Results that came too late.", metrics.dropped_results),
            ("lorry_suspects_run", "Suspects run apart.", metrics.suspects_run),
            ("lorry_rescued_workers", "Workers that this one declared lost.", rescued_workers),
            ("lorry_rescued_jobs", "Jobs that it freed of theirs.", rescued_jobs),
        ):
            yield CounterMetricFamily(name, text, total)

    def _engine(self) -> Iterable[Metric]:
        info = self._metrics.info
        if info is None:
            return
        family = GaugeMetricFamily(
            "lorry_engine_info", "The engine.", labels=("base_model", "engine", "version")
        )
        family.add_metric([info.base_model, info.name, info.version], 1)
        yield family
        limits = info.limits
        yield GaugeMetricFamily("lorry_max_num_seqs", "Jobs computed at once.", limits.max_num_seqs)
        yield GaugeMetricFamily("lorry_slots", "Adapters resident at once.", limits.max_loras)

    def _adapters(self) -> Iterable[Metric]:
        fed = CounterMetricFamily("lorry_fed_jobs", "Jobs given to the engine.", labels=_ADAPTER)
        finished = CounterMetricFamily(
            "lorry_finished_jobs", "Attempts that left it.", labels=(*_ADAPTER, "outcome")
        )
        tokens = CounterMetricFamily(
            "lorry_tokens", "Tokens of finished attempts.", labels=(*_ADAPTER, "kind")
        )
        for label, counts in self._metrics.by_adapter().items():
            fed.add_metric([label], counts.fed)
            for outcome, jobs in counts.outcomes.items():
                finished.add_metric([label, outcome], jobs)
            tokens.add_metric([label, "prompt"], counts.prompt_tokens)
            tokens.add_metric([label, "completion"], counts.completion_tokens)
        yield from (fed, finished, tokens)


def registry_of(metrics: DrainMetrics) -> CollectorRegistry:
    """A registry of these metrics alone: nothing in this process is registered globally."""
    registry = CollectorRegistry()
    registry.register(DrainCollector(metrics))
    return registry


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """A thread that answers scrapes."""

    server: WSGIServer
    thread: threading.Thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.server_port

    def close(self) -> None:
        """Stop answering. Blocking, up to half a second."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serve(metrics: DrainMetrics, port: int, host: str = "127.0.0.1") -> MetricsServer:
    """Answer scrapes on a port of its own; 0 takes a free one, which the log names.

    No key is asked for: the labels are ids and model names, and by default only this machine
    reaches the port.

    Raises:
        UsageError: the port is taken, or the address is not one of this machine.
    """
    try:
        server, thread = start_http_server(port, host, registry_of(metrics))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"LORRY_METRICS_PORT={port}: the port is taken on {host}; give another, or 0 for "
                "any free one"
            ) from None
        raise UsageError(
            f"LORRY_METRICS_HOST={host} with LORRY_METRICS_PORT={port}: {error.strerror or error}"
        ) from None
    log.info(
        "Metrics on http://%s:%d/metrics", host, server.server_port, extra={"action": "metrics_up"}
    )
    return MetricsServer(server, thread)


@asynccontextmanager
async def served(metrics: DrainMetrics, port: int | None, host: str) -> AsyncIterator[None]:
    """`serve` for the length of the block; without a port (None) nothing listens."""
    server = None if port is None else serve(metrics, port, host)
    try:
        yield
    finally:
        if server is not None:
            await asyncio.to_thread(server.close)
