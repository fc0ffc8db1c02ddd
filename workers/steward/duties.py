"""The steward's duties, each on its own timer, each claimed in SQL.

A duty that fails is logged and done again at its next time: none stops another.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from core.errors import Unavailable
from core.settings import Settings
from db import jobs, maintenance, workers
from db.database import Database
from db.doorbell import Doorbell

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Duty:
    """Something done every `every_seconds`."""

    name: str
    every_seconds: float
    act: Callable[[], Awaitable[None]]

    async def run(self) -> None:
        """Do it for ever."""
        while True:
            try:
                await self.act()
            except Unavailable as error:
                log.warning("%s waits: %s", self.name, error, extra={"action": "duty_waits"})
            except Exception:
                log.exception("%s failed", self.name, extra={"action": "duty_failed"})
            await asyncio.sleep(self.every_seconds)


def all_duties(database: Database, doorbell: Doorbell, settings: Settings) -> list[Duty]:
    """Every duty of a steward."""

    async def ring_waiting() -> None:
        """A doorbell may be lost: ring every partition that has work."""
        for base_model, partition in await maintenance.waiting_partitions(database):
            doorbell.ring(base_model, partition)

    async def rebuild_waiting() -> None:
        if rebuilt := await maintenance.rebuild_waiting(database):
            log.info(
                "Put %d lines back", rebuilt, extra={"action": "rebuild_waiting", "lines": rebuilt}
            )

    async def rescue() -> None:
        freed = await workers.rescue_lost(database, settings.lease_seconds, settings.max_attempts)
        for worker_id, count in freed.items():
            log.warning(
                "Worker %d lost, freed %d jobs",
                worker_id,
                count,
                extra={"action": "rescue", "worker": worker_id, "jobs": count},
            )
        if freed:
            await ring_waiting()

    async def expire() -> None:
        while await maintenance.expire_due(database):
            pass

    async def drop_old_keys() -> None:
        async with database.connection() as connection:
            while await jobs.delete_expired_keys(connection):
                pass

    sweep = settings.sweep_seconds
    return [
        Duty("ring", sweep, ring_waiting),
        Duty("rebuild", sweep, rebuild_waiting),
        Duty("rescue", min(sweep, settings.lease_seconds / 6), rescue),
        Duty("expire", 0.5, expire),
        Duty("idempotency", 600, drop_old_keys),
    ]
