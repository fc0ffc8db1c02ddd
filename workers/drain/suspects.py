"""Suspects: runs a group of jobs that saw an engine die, with nothing else in the engine.

While it does, this worker claims nothing more, empties its engine, and lets doorbells go to others.
An idle worker takes a group at once. A busy one lets a group wait for a quantum, and works for a
quantum between two groups: suspects do not starve, and neither does what they stand beside.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from core.errors import AdapterInvalid, StoreUnavailable
from core.retry import backoff
from db import claims, suspects
from db.claims import ClaimedJob
from db.database import Database
from workers.drain.slots import Slots
from workers.engine.protocol import AdapterLoadError, LocalAdapter
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)

#: A worker looks for suspects no more often than this.
LOOK_SECONDS: Final = 0.5
#: Pause between looks at an engine that empties.
PAUSE_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Door:
    """The feeder's way into the engine.

    Args:
        submit: feeds jobs of one adapter, which is loaded.
        fail: records jobs whose adapter cannot be used.
        stopping: whether nothing more is to be fed.
        emptied: whether nothing is in the engine, and all that was in it is recorded.
    """

    submit: Callable[[Sequence[ClaimedJob], LocalAdapter | None], None]
    fail: Callable[[Sequence[ClaimedJob], Exception], None]
    stopping: Callable[[], bool]
    emptied: Callable[[], bool]


class Suspects:
    """Claims groups of suspects, and runs them one at a time."""

    def __init__(
        self,
        database: Database,
        slots: Slots,
        metrics: DrainMetrics,
        *,
        worker_id: int,
        base_model_id: int,
        partitions: Collection[int] | None,
        adapters: Collection[str] | None,
        quantum_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._slots = slots
        self._metrics = metrics
        self._worker_id = worker_id
        self._base_model_id = base_model_id
        self._partitions = partitions
        self._adapters = adapters
        self._quantum_seconds = quantum_seconds
        self._clock = clock
        self._worked_since = clock()
        self._looked_at = -LOOK_SECONDS
        #: claimed and not in the engine yet
        self._held: dict[tuple[UUID, int], ClaimedJob] = {}
        self._jitter = random.Random()
        #: groups in a row whose adapter could not be had
        self._put_off = 0
        #: their adapter is being loaded: if the engine dies of it, they were there
        self._entering: list[ClaimedJob] = []
        #: whether a group has the engine, or waits for it to empty
        self.apart = False

    def holds(self, job_id: UUID, attempt: int) -> bool:
        """Whether an attempt was claimed and waits for the engine."""
        entering = any(job[:2] == (job_id, attempt) for job in self._entering)
        return entering or (job_id, attempt) in self._held

    def entering(self) -> list[ClaimedJob]:
        """Jobs whose adapter is being loaded for them."""
        return self._entering

    def drop(self, jobs: Collection[tuple[UUID, int]]) -> None:
        """Forget attempts (job id, attempt) that were cancelled or expired before they were fed."""
        for job in jobs:
            self._held.pop(job, None)
        self._entering = [job for job in self._entering if job[:2] not in jobs]

    def time_to_look(self, idle: bool) -> bool:
        """Whether to look for a group now: a busy worker seldom, an idle one often."""
        now = self._clock()
        if now - self._looked_at < LOOK_SECONDS:
            return False
        return idle or now - self._worked_since >= self._quantum_seconds

    async def run_one(self, door: Door, idle: bool, limit: int) -> bool:
        """Run the group that has waited longest, if one is due; returns whether one was.

        Args:
            idle: whether this worker has nothing else to do.
            limit: the most jobs to take.

        Raises:
            Unavailable: Postgres cannot be reached.
            EngineDead: the engine has died.
        """
        self._looked_at = self._clock()
        jobs = await suspects.take_group(
            self._database,
            self._worker_id,
            self._base_model_id,
            waited_seconds=0 if idle else self._quantum_seconds,
            limit=limit,
            partitions=self._partitions,
            adapters=self._adapters,
            highest_rank=self._slots.highest_rank,
        )
        if not jobs:
            return False
        log.warning(
            "Running %d suspects apart", len(jobs), extra={"action": "suspects", "jobs": len(jobs)}
        )
        self._metrics.suspects(len(jobs))
        self._held = {job[:2]: job for job in jobs}
        self.apart = True
        try:
            await self._run(door)
        finally:
            self.apart = False
            self._worked_since = self._clock()
            self._looked_at = -LOOK_SECONDS  # the other half may be waiting
        return True

    async def _run(self, door: Door) -> None:
        delay = None
        await self._wait(door, door.emptied)
        for version in sorted({job.adapter_version_id for job in self._held.values()}):
            await self._wait(door, lambda v=version: self._has_room(v))  # type: ignore[misc]
            if door.stopping():
                break
            try:
                await self._feed(door, version)
            except StoreUnavailable as error:
                log.warning("Suspects wait: %s", error, extra={"action": "store_waits"})
                self._put_off += 1
                delay = backoff(self._put_off, self._jitter)  # another group's may be at hand
                break
        else:
            self._put_off = 0
        await self._give_back(delay)
        await self._wait(door, door.emptied)

    async def _feed(self, door: Door, version: int) -> None:
        jobs = [job for job in self._held.values() if job.adapter_version_id == version]
        for job in jobs:
            del self._held[job[:2]]
        self._entering = jobs
        try:
            adapter = await self._slots.load(version)
        except StoreUnavailable:
            self._held.update({job[:2]: job for job in self._entering})
            self._entering = []
            raise
        except (AdapterInvalid, AdapterLoadError) as error:
            door.fail(self._entering, error)
        else:
            door.submit(self._entering, adapter)
        self._entering = []

    async def _give_back(self, delay_seconds: float | None) -> None:
        """What was not fed keeps its group."""
        if self._held:
            held = list(self._held)
            await claims.release(self._database, self._worker_id, held, delay_seconds)
            self._held.clear()

    def _has_room(self, version: int) -> bool:
        view = self._slots.view()
        return view.has_slot(version) or view.free > 0

    async def _wait(self, door: Door, condition: Callable[[], bool]) -> None:
        while not condition() and not door.stopping():
            await asyncio.sleep(PAUSE_SECONDS)
