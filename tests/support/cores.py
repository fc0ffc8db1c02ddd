"""Drain cores in this process, without Celery: what tests of the drain drive."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from core.settings import Settings
from db import workers
from db.database import Database
from db.doorbell import Doorbell
from db.workers import WorkerFacts
from tests.support.jobs import BASE, Bench
from workers.adapter_files import AdapterFiles
from workers.drain.core import DrainCore
from workers.drain.neighbours import Neighbours
from workers.engine.simulated import SimulatedEngine
from workers.metrics import DrainMetrics

QUICK = Settings(
    lease_seconds=3, poll_seconds=0.05, grace_seconds=5, stall_seconds=2, quantum_seconds=1
)


@asynccontextmanager
async def drain_core(
    bench: Bench,
    cache: Path,
    broker_url: str,
    *flags: str,
    settings: Settings = QUICK,
    database: Database | None = None,
    partitions: Collection[int] | None = None,
    adapters: Collection[str] | None = None,
    pinned: Collection[int] = (),
    preload: Collection[int] = (),
    neighbours: Neighbours | None = None,
    metrics: DrainMetrics | None = None,
    fold: bool = False,
) -> AsyncIterator[tuple[DrainCore, SimulatedEngine, "asyncio.Task[None]"]]:
    """A running core on a simulated engine; stopped in order at the end unless it has ended."""
    database = database or bench.database
    engine = SimulatedEngine.from_flags(BASE, ["--served-model-name", BASE, *flags], fold=fold)
    await engine.start()
    facts = WorkerFacts(bench.base_model_id, "test", 1, "simulated", "1", {})
    worker_id = await workers.register(database, facts, settings.lease_seconds)
    doorbell = Doorbell(broker_url)
    core = DrainCore(
        database=database,
        engine=engine,
        files=AdapterFiles(database, bench.store, cache),
        doorbell=doorbell,
        settings=settings,
        worker_id=worker_id,
        base_model_id=bench.base_model_id,
        partitions=partitions,
        adapters=adapters,
        pinned=pinned,
        preload=preload,
        neighbours=neighbours,
        metrics=metrics,
    )
    task = asyncio.create_task(core.run())
    try:
        yield core, engine, task
    finally:
        core.stop()
        await asyncio.wait([task], timeout=20)
        doorbell.close()
        await engine.close()
        if not task.done():
            task.cancel()
            raise AssertionError("the core did not stop")
