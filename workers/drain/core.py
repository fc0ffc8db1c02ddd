"""The drain core: the tasks that run a worker's jobs, and the order in which they stop.

Plain asyncio on the event loop that owns the engine; Celery only rings it. Tests drive it without
Celery.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any

from core.errors import ErrorCode, Unavailable
from core.settings import Settings
from db import claims, workers
from db.database import Database
from db.doorbell import Doorbell
from workers.adapter_files import AdapterFiles
from workers.drain.aborts import watch_ended
from workers.drain.feeder import Feeder
from workers.drain.lease import EngineStalled, Lease, LeaseLost
from workers.drain.reconcile import release_unknown
from workers.drain.recorder import Recorder
from workers.drain.slots import Slots
from workers.drain.turns import Turns
from workers.engine.protocol import Engine, EngineDead
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)


class DrainCore:
    """One worker's drain, from its registration to its sign-off."""

    def __init__(
        self,
        *,
        database: Database,
        engine: Engine,
        files: AdapterFiles,
        doorbell: Doorbell,
        settings: Settings,
        worker_id: int,
        base_model_id: int,
        partitions: Collection[int] | None = None,
        adapters: Collection[str] | None = None,
        metrics: DrainMetrics | None = None,
    ) -> None:
        self._database = database
        self._engine = engine
        self._settings = settings
        self._worker_id = worker_id
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()
        self.lease = Lease(
            database,
            worker_id,
            settings,
            progress=engine.progress,
            busy=lambda: engine.running > 0,
        )
        metrics = metrics or DrainMetrics()
        metrics.engine_started(engine.info)
        self.recorder = Recorder(database, self.lease, settings, metrics)
        self.slots = Slots(engine, files, metrics)
        metrics.slots_in_use = lambda: self.slots.in_use
        metrics.unrecorded = lambda: self.recorder.unrecorded
        turns = Turns(
            database,
            self.slots,
            base_model_id=base_model_id,
            partitions=partitions,
            adapters=adapters,
            quantum_seconds=settings.quantum_seconds,
        )
        self.feeder = Feeder(
            database=database,
            engine=engine,
            slots=self.slots,
            turns=turns,
            recorder=self.recorder,
            doorbell=doorbell,
            settings=settings,
            worker_id=worker_id,
            metrics=metrics,
        )

    def stop(self) -> None:
        """Drain and stop; called again, stop without waiting for the running jobs."""
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def run(self) -> None:
        """Run jobs until stopped.

        Raises:
            EngineDead: the engine died; its jobs were given back.
            EngineStalled: likewise, after a silence.
            LeaseLost: this worker was declared lost.
        """
        watch = _Watch(
            self.recorder.run(),
            self.lease.run(),
            watch_ended(
                self._database,
                self._worker_id,
                lambda: self.feeder.running > 0,
                self.feeder.abort,
            ),
            release_unknown(
                self._database,
                self._worker_id,
                self.feeder.knows,
                self._settings.lease_seconds / 2,
            ),
            self._watch_engine(),
        )
        feeding = asyncio.create_task(self.feeder.run(), name="feeder")
        watch.add(feeding)
        try:
            await watch.until(self._stopping.wait())
            self.feeder.stop()
            await watch.until(feeding)
            await watch.until(self._finish_running())
            await watch.until(self._give_back())
        except (EngineDead, EngineStalled):
            await self._give_up_engine()
            raise
        finally:
            self.feeder.stop()  # lets a held doorbell go
            await watch.cancel()

    async def _watch_engine(self) -> None:
        raise EngineDead(await self._engine.wait_dead())

    async def _finish_running(self) -> None:
        """Let running jobs finish, for the grace period at most."""
        deadline = asyncio.get_running_loop().time() + self._settings.grace_seconds
        while self.feeder.running and not self._hurrying.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                log.warning(
                    "Grace period over with %d jobs running",
                    self.feeder.running,
                    extra={"action": "grace_over"},
                )
                break
            try:
                await asyncio.wait_for(self._hurrying.wait(), min(left, 0.05))
            except TimeoutError:
                continue

    async def _give_back(self) -> None:
        """Record what finished, release the rest at no cost, and sign off."""
        await self.feeder.cut_off()
        self.recorder.hurry()
        await self.recorder.drained()
        jobs = [(job.id, job.attempt) for job in self.feeder.unfinished()]
        if jobs:
            released = await claims.release(self._database, self._worker_id, jobs)
            log.info("Released %d jobs", released, extra={"action": "release", "jobs": released})
        await workers.sign_off(self._database, self._worker_id)
        log.info("Drained", extra={"action": "drained", "recorded": self.recorder.recorded})

    async def _give_up_engine(self) -> None:
        """The engine is gone: record what it had finished; the rest was tried once, in vain."""
        for job in self.feeder.unfinished():
            self.recorder.add_failure(job, ErrorCode.ENGINE_ERROR, "the engine died while it ran")
        try:
            self.recorder.hurry()
            await asyncio.wait_for(self.recorder.drained(), self._settings.lease_seconds)
            await workers.sign_off(self._database, self._worker_id)
        except (Unavailable, TimeoutError, LeaseLost) as error:
            # the lease runs out by itself, and the steward frees the jobs
            log.error("Could not give jobs back: %s", error, extra={"action": "give_back_failed"})


class _Watch:
    """Background tasks, none of which may end: the first failure is raised from `until`."""

    def __init__(self, *coroutines: Coroutine[Any, Any, None]) -> None:
        self._tasks = [asyncio.create_task(c) for c in coroutines]

    def add(self, task: "asyncio.Task[None]") -> None:
        """Watch one more task; this one may end."""
        self._tasks.append(task)

    async def until(self, awaited: "Coroutine[Any, Any, Any] | asyncio.Task[None]") -> None:
        """Wait for `awaited`, unless a watched task fails first: then raise its error."""
        goal = awaited if isinstance(awaited, asyncio.Task) else asyncio.create_task(awaited)
        pending = {goal, *(task for task in self._tasks if not task.done())}
        while not goal.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is not None and task is not goal:
                    goal.cancel()
                    await asyncio.gather(goal, return_exceptions=True)
                    task.result()
        goal.result()

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
