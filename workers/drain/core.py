"""The drain core: the tasks that run a worker's jobs, and the order in which they stop.

Plain asyncio on the event loop that owns the engine; Celery only rings it. Tests drive it without
Celery.
"""

import asyncio
import logging
import random
from collections.abc import Collection, Coroutine
from typing import Any, Final

from core.errors import Unavailable
from core.retry import LONE_ENGINE_DEATHS, lone_delay
from core.settings import Settings
from db import workers
from db.database import Database
from db.doorbell import Doorbell
from db.suspects import Death
from workers.adapter_files import AdapterFiles
from workers.drain.aborts import watch_ended
from workers.drain.admission import Admission
from workers.drain.feeder import Feeder
from workers.drain.lease import EngineStalled, Lease, LeaseLost
from workers.drain.neighbours import Neighbours
from workers.drain.reconcile import reconcile
from workers.drain.recorder import Recorder
from workers.drain.slots import Slots
from workers.drain.suspects import Suspects
from workers.drain.turns import Turns
from workers.engine.protocol import Engine, EngineDead
from workers.metrics import DrainMetrics
from workers.rescue import Rescuer, rescue_for_ever

log = logging.getLogger(__name__)

#: How long a worker that was told twice to stop still tries to give its jobs back.
HURRY_SECONDS: Final = 5.0
SIGN_OFF_PAUSE_SECONDS: Final = 0.5


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
        pinned: Collection[int] = (),
        preload: Collection[int] = (),
        neighbours: Neighbours | None = None,
        metrics: DrainMetrics | None = None,
        fold: bool = True,
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
        self.slots = Slots(engine, files, metrics, pinned, self.lease.loading, preload)
        self.rescuer = Rescuer(database, settings.lease_seconds, settings.max_attempts)
        metrics.rescues = lambda: (self.rescuer.rescued_workers, self.rescuer.rescued_jobs)
        metrics.slots_in_use = lambda: self.slots.in_use
        metrics.resident = lambda: len(self.slots.resident)
        files.metrics = metrics
        metrics.unrecorded = lambda: self.recorder.unrecorded
        turns = Turns(
            database,
            self.slots,
            base_model_id=base_model_id,
            partitions=partitions,
            adapters=adapters,
            quantum_seconds=settings.quantum_seconds,
            neighbours=neighbours or Neighbours(),
            max_num_seqs=engine.info.limits.max_num_seqs,
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
            loading=self.lease.loading,
            fold=fold,
            suspects=Suspects(
                database,
                self.slots,
                metrics,
                worker_id=worker_id,
                base_model_id=base_model_id,
                partitions=partitions,
                adapters=adapters,
                quantum_seconds=settings.quantum_seconds,
            ),
        )

        self.admission = Admission(
            database=database,
            engine=engine,
            files=files,
            slots=self.slots,
            doorbell=doorbell,
            worker_id=worker_id,
            base_model_id=base_model_id,
            every_seconds=settings.poll_seconds,
            wake=self.feeder.wake,
        )
        self.feeder.admission = self.admission
        turns.own_lines = self.admission.lines

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
            Unavailable: it stopped while Postgres was away; its jobs wait for their rescue.
        """
        watch = _Watch(
            self.recorder.run(),
            self.lease.run(),
            self.lease.watch_progress(),
            watch_ended(
                self._database,
                self._worker_id,
                lambda: self.feeder.running > 0,
                self.feeder.abort,
            ),
            reconcile(
                self._database,
                self._worker_id,
                knows=self.feeder.knows,
                in_engine=self.feeder.in_engine,
                abort=self.feeder.abort,
                every_seconds=self._settings.lease_seconds / 2,
            ),
            rescue_for_ever(self.rescuer, self._settings.lease_seconds),
            self._watch_engine(),
            self.admission.run(),
            self.feeder.folding.run(),
        )
        feeding = asyncio.create_task(self.feeder.run(), name="feeder")
        watch.add(feeding)
        try:
            await watch.until(self._stopping.wait())
            self.feeder.stop()
            await watch.until(self._finish_running(feeding))
            await watch.until(self._give_back())
        except (EngineDead, EngineStalled) as error:
            self.feeder.stop()
            feeding.cancel()
            await asyncio.wait([feeding])
            await self._give_up_engine(watch, error)
            raise
        finally:
            self.feeder.stop()  # lets a held doorbell go
            await watch.cancel()

    async def _watch_engine(self) -> None:
        raise EngineDead(await self._engine.wait_dead())

    async def _finish_running(self, feeding: "asyncio.Task[None]") -> None:
        """Let what is under way finish, for the grace period at most: loads and claims too."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.grace_seconds
        while self.feeder.running or not feeding.done():
            left = deadline - loop.time()
            if left <= 0 or self._hurrying.is_set():
                log.warning(
                    "Grace period over with %d jobs running",
                    self.feeder.running,
                    extra={"action": "grace_over"},
                )
                break
            try:
                async with asyncio.timeout(min(left, 0.05)):
                    await self._hurrying.wait()
            except TimeoutError:
                continue
        # one that hangs in a load or a claim; what it claimed unseen is released with the rest
        feeding.cancel()
        await asyncio.wait([feeding])

    async def _give_back(self) -> None:
        """Record what finished, release the rest at no cost, and sign off.

        Bounded: with Postgres away for longer than the lease, the jobs are rescued anyway.
        """
        giving = asyncio.create_task(self._record_and_sign_off())
        hurrying = asyncio.create_task(self._hurrying.wait())
        try:
            await asyncio.wait(
                {giving, hurrying},
                timeout=self._settings.lease_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if hurrying.done() and not giving.done():
                await asyncio.wait({giving}, timeout=HURRY_SECONDS)
            if not giving.done():
                raise Unavailable(
                    "stopped without giving jobs back: Postgres did not answer; they are rescued "
                    "when the lease has run out"
                )
            giving.result()
        finally:
            for task in (giving, hurrying):
                task.cancel()
            await asyncio.gather(giving, hurrying, return_exceptions=True)
        log.info("Drained", extra={"action": "drained", "recorded": self.recorder.recorded})

    async def _record_and_sign_off(self, death: Death | None = None) -> None:
        """The last thing a worker writes.

        Args:
            death: where the engine died: what was in it becomes suspects.
        """
        if death is None:
            await self.feeder.cut_off()
        self.recorder.hurry()
        await self.recorder.drained()
        fed = [job.id for job in self.feeder.unfinished()] if death else []
        while True:
            try:
                if death is not None:
                    await self.admission.engine_died(death.cause)
                count = await workers.sign_off(self._database, self._worker_id, death, fed)
            except Unavailable as error:
                log.warning("Sign-off waits: %s", error, extra={"action": "sign_off_waits"})
                await asyncio.sleep(SIGN_OFF_PAUSE_SECONDS)
                continue
            if count:
                log.info("Gave %d jobs back", count, extra={"action": "release", "jobs": count})
            return

    async def _give_up_engine(self, watch: "_Watch", error: Exception) -> None:
        """The engine is gone: record what it had finished; what was in it is suspect."""
        death = Death("suspect", f"the engine died ({error})", LONE_ENGINE_DEATHS, _lone_delay())
        try:
            async with asyncio.timeout(self._settings.lease_seconds):
                # several may hear of one death, each in its own time: the others change nothing
                await watch.until(self._record_and_sign_off(death), but=(EngineDead, EngineStalled))
        except (Unavailable, TimeoutError, LeaseLost) as problem:
            # the lease runs out by itself, and the jobs are rescued
            log.error("Could not give jobs back: %s", problem, extra={"action": "give_back_failed"})


def _lone_delay() -> float:
    return lone_delay(random.Random())


class _Watch:
    """Background tasks, none of which may end: the first failure is raised from `until`."""

    def __init__(self, *coroutines: Coroutine[Any, Any, None]) -> None:
        self._tasks = [asyncio.create_task(c) for c in coroutines]

    def add(self, task: "asyncio.Task[None]") -> None:
        """Watch one more task; this one may end."""
        self._tasks.append(task)

    async def until(
        self,
        awaited: "Coroutine[Any, Any, Any] | asyncio.Task[None]",
        but: tuple[type[Exception], ...] = (),
    ) -> None:
        """Wait for `awaited`, unless a watched task fails first: then raise its error.

        Args:
            but: errors of watched tasks that end nothing any more.
        """
        goal = awaited if isinstance(awaited, asyncio.Task) else asyncio.create_task(awaited)
        pending = {goal, *(task for task in self._tasks if not task.done())}
        while not goal.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is goal or task.cancelled():
                    continue
                if task.exception() is not None and not isinstance(task.exception(), but):
                    goal.cancel()
                    await asyncio.gather(goal, return_exceptions=True)
                    task.result()
        goal.result()

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
