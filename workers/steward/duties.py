"""The steward's duties, each on its own timer, each claimed in SQL.

A duty that fails is logged and done again at its next time: none stops another.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from core.errors import Unavailable
from core.settings import Settings
from db import adapter_files, admission, delivery_log, jobs, maintenance, retention
from db.database import Database
from db.doorbell import Doorbell
from db.store import Store
from workers.rescue import Rescuer
from workers.steward.batches import BatchDuties
from workers.steward.schedules import LOOK_SECONDS as LOOK_FOR_SCHEDULES_SECONDS
from workers.steward.schedules import ScheduleDuties
from workers.steward.webhook_sender import LOOK_SECONDS, Sender

log = logging.getLogger(__name__)

#: Pause between two looks for what is past its time.
PRUNE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Duty:
    """Something done every `every_seconds`, or after the pause that it asks for itself."""

    name: str
    every_seconds: float
    #: does it once, without waiting for anything to do; returns the pause, or None
    act: Callable[[], Awaitable[float | None]]
    #: called once `run` has been cancelled
    close: Callable[[], Awaitable[None]] | None = None

    async def run(self) -> None:
        """Do it for ever."""
        while True:
            pause = None
            try:
                pause = await self.act()
            except Unavailable as error:
                log.warning("%s waits: %s", self.name, error, extra={"action": "duty_waits"})
            except Exception:
                log.exception("%s failed", self.name, extra={"action": "duty_failed"})
            await asyncio.sleep(self.every_seconds if pause is None else pause)


async def prune_jobs(database: Database, retention_seconds: float) -> int:
    """Prune in small steps, each followed by a pause as long as itself; returns how many jobs.

    Half of one connection's time at most: what waits for claims never waits for this.
    """
    pruned = 0
    while True:
        started = time.monotonic()
        step = await retention.prune_finished(database, retention_seconds)
        pruned += step
        if step < retention.STEP_JOBS:
            return pruned
        await asyncio.sleep(time.monotonic() - started)


async def prune_batches(database: Database, retention_seconds: float) -> None:
    """The same for batches and their lines."""
    while True:
        started = time.monotonic()
        if not await retention.prune_batches(database, retention_seconds):
            return
        await asyncio.sleep(time.monotonic() - started)


async def prune_deliveries(database: Database, retention_seconds: float) -> None:
    """The same for what was sent to webhooks."""
    while True:
        started = time.monotonic()
        if await delivery_log.prune(database, retention_seconds) < delivery_log.STEP:
            return
        await asyncio.sleep(time.monotonic() - started)


def all_duties(database: Database, doorbell: Doorbell, settings: Settings) -> list[Duty]:
    """Every duty of a steward."""

    async def ring_waiting() -> None:
        """A doorbell may be lost: ring every partition that has work."""
        for base_model, partition in await maintenance.waiting_partitions(database):
            doorbell.ring(base_model, partition)

    async def rebuild_waiting() -> None:
        await maintenance.drop_empty_lines(database)
        if rebuilt := await maintenance.rebuild_waiting(database):
            log.info(
                "Put %d lines back", rebuilt, extra={"action": "rebuild_waiting", "lines": rebuilt}
            )

    rescuer = Rescuer(database, settings.lease_seconds, settings.max_attempts)

    async def rescue() -> None:
        if await rescuer.look():
            await ring_waiting()

    async def expire() -> None:
        while await maintenance.expire_due(database):
            pass

    async def drop_old_keys() -> None:
        async with database.connection() as connection:
            while await jobs.delete_expired_keys(connection):
                pass

    async def fail_rejected() -> None:
        while await admission.fail_rejected(database):
            pass

    async def forget_files() -> None:
        """Files of adapters that are gone, once their last job is."""
        if settings.store_url is None:
            return
        store = Store.open(settings.store_url)
        if deleted := await adapter_files.forget_files(database, store):
            log.info(
                "Deleted the files of %d adapters",
                deleted,
                extra={"action": "forget_files", "adapters": deleted},
            )

    async def prune() -> None:
        """What ended past its time: jobs, batches, deliveries; rows of workers long gone."""
        if settings.retention_seconds:
            pruned = await prune_jobs(database, settings.retention_seconds)
            if pruned:
                log.info("Pruned %d jobs", pruned, extra={"action": "prune", "jobs": pruned})
            await prune_batches(database, settings.retention_seconds)
            await prune_deliveries(database, settings.retention_seconds)
        await delivery_log.prune_leftovers(database)
        await retention.prune_workers(database)

    sender = Sender(database, settings)
    batches = BatchDuties(database, doorbell, settings)
    schedules = ScheduleDuties(database, settings)
    sweep = settings.sweep_seconds
    return [
        Duty("ring", sweep, ring_waiting),
        Duty("rebuild", sweep, rebuild_waiting),
        Duty("rescue", min(sweep, settings.lease_seconds / 6), rescue),
        Duty("expire", 0.5, expire),
        Duty("idempotency", 600, drop_old_keys),
        Duty("prune", PRUNE_SECONDS, prune),
        Duty("batch validation", 0.5, batches.validate),
        Duty("small batches", 0.5, batches.validate_small),
        Duty("batch cancel", 0.5, batches.cancel),
        Duty("batch results", 0.5, batches.settle),
        Duty("small results", 0.5, batches.settle_small),
        Duty("files", min(sweep, 60), batches.sweep_files),
        Duty("usage", 60, batches.fold_usage),
        # each look asks for the pause until something is due
        Duty("schedules", LOOK_FOR_SCHEDULES_SECONDS, schedules.tick),
        Duty("schedule runs", 1, schedules.follow),
        Duty("old schedule runs", PRUNE_SECONDS, schedules.prune),
        Duty("rejected", sweep, fail_rejected),
        Duty("adapter files", 60, forget_files),
        Duty("webhooks", LOOK_SECONDS, sender.act, sender.close),
    ]
