"""A drain of a benchmark: its jobs stand in a real Postgres, then a clock runs from the drain's
start to the last commit.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from benchmarks.backlog import new_job
from benchmarks.engine_rows import Row
from benchmarks.trace import traced
from benchmarks.workload import Work
from core.settings import Settings
from db import adapters as registered
from db import registry, workers
from db.bulk import submit_many
from db.database import Database
from db.doorbell import Doorbell
from db.store import Store
from db.tenants import DEFAULT_TENANT_ID
from db.workers import WorkerFacts
from workers.adapter_files import AdapterFiles
from workers.drain.core import DrainCore
from workers.engine.vllm_engine import VllmEngine
from workers.metrics import DrainMetrics

#: The doorbell of a benchmark rings nowhere: the drain looks by itself.
NO_BROKER: Final = "memory://"


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine with its adapters, and a database that knows them."""

    engine: VllmEngine
    database: Database
    store: Store
    base_model_id: int
    folders: Sequence[Path]
    cache: Path
    registered: set[int] = field(default_factory=set)

    def folder(self, adapter: int) -> Path:
        """The weights of an adapter; more names than files share them."""
        return self.folders[adapter % len(self.folders)]


class Drained(NamedTuple):
    """A drain that is over.

    Args:
        rate: output tokens a second.
        facts: what it took, ready to be reported: seconds, loads, and the shares of the run with
            fewer than `max_num_seqs` jobs in the engine: with work to feed it (`starved`), with
            none but such as lacked a slot (`slot_bound`), while an adapter was loaded
            (`load_stalled`).
    """

    rate: float
    facts: dict[str, Any]
    core: DrainCore
    metrics: DrainMetrics


async def drained(
    bench: Bench,
    row: Row,
    work: Sequence[Work],
    *,
    speed: float = 1.0,
    fold: bool = True,
    trace: Path | None = None,
) -> Drained:
    """Queue a row's jobs and drain them; the jobs stay in the tables (`clear`).

    Args:
        speed: of the engine's time: the quantum is so much shorter.
        fold: whether adapters are folded where the engine can.
        trace: a file for what the drain does over time.
    """
    await queue(bench, row, work)
    settings = Settings(grace_seconds=600)
    settings = settings.model_copy(update={"quantum_seconds": settings.quantum_seconds / speed})
    facts = WorkerFacts(bench.base_model_id, "bench", 1, "vllm", "", {})
    worker_id = await workers.register(bench.database, facts, settings.lease_seconds)
    doorbell = Doorbell(NO_BROKER)
    metrics = DrainMetrics()
    core = DrainCore(
        database=bench.database,
        engine=bench.engine,
        files=AdapterFiles(bench.database, bench.store, bench.cache),
        doorbell=doorbell,
        settings=settings,
        worker_id=worker_id,
        base_model_id=bench.base_model_id,
        metrics=metrics,
        fold=fold,
    )
    if row.barrier:
        with_barrier(core, row.barrier)
    started = time.perf_counter()
    task = asyncio.create_task(core.run())
    async with traced(bench.engine, row.name, trace, core):
        while core.recorder.recorded < len(work):
            await asyncio.sleep(0.01)
            if task.done():
                task.result()
    seconds = time.perf_counter() - started
    spent = metrics.seconds
    core.stop()
    await task
    doorbell.close()
    return Drained(
        sum(request.output_tokens for request in work) / seconds,
        {
            "s": round(seconds, 1),
            "loads": core.slots.loads,
            "starved": round(spent.starved / seconds, 4),
            "slot_bound": round(spent.slot_bound / seconds, 4),
            "load_stalled": round(spent.load_stalled / seconds, 4),
        },
        core,
        metrics,
    )


async def queue(bench: Bench, row: Row, work: Sequence[Work]) -> None:
    """Put a row's jobs into Postgres, adapters registered."""
    targets = {}
    for which in sorted({row.adapter_of(i) for i in range(len(work))}):
        model = bench.engine.info.base_model if which < 0 else f"a{which}"
        if which >= 0:
            await register(bench, which)
        async with bench.database.connection() as connection:
            targets[which] = await registry.resolve(connection, DEFAULT_TENANT_ID, model)
    jobs = []
    for number, request in enumerate(work):
        body = {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0.8,
            "ignore_eos": True,
        }
        tokens = len(request.prompt) + request.output_tokens
        target = targets[row.adapter_of(number)]
        jobs.append(new_job(target, orjson.dumps(body).decode(), tokens))
    await submit_many(bench.database, jobs)


async def register(bench: Bench, which: int) -> None:
    """Make adapter number `which` known, once: it reads every byte of its files. Versions of equal
    files share an address, not an id."""
    if which in bench.registered:
        return
    bench.registered.add(which)
    await registered.register_ready(
        bench.database,
        bench.store,
        tenant="default",
        base_model=bench.engine.info.base_model,
        name=f"a{which}",
        folder=bench.folder(which),
    )


async def clear(bench: Bench) -> None:
    """Empty the tables of jobs between rows."""
    async with bench.database.connection() as connection:
        await connection.execute("TRUNCATE jobs, job_inputs, job_outputs, waiting_adapters")


def with_barrier(core: DrainCore, most: int) -> None:
    """Make the drain wait for everything in the engine before it claims again, `most` at once."""
    feeder = type(core.feeder)

    class Barrier(feeder):  # type: ignore[valid-type, misc]
        @property
        def free(self) -> int:
            return min(most, self.window.size) if self.running == 0 else 0

    core.feeder.__class__ = Barrier
