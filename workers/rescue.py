"""Rescue: frees the jobs of workers whose lease ran out. Stewards do it, and any worker too.

What such a worker still has locked is freed first: it may be frozen inside a transaction.

Whoever could not reach Postgres for a while cannot tell who else could not: after an outage every
lease may have run out, with every worker alive. So a rescuer counts how long it has been in touch,
by Postgres's own clock, and rescues nobody before that is one full lease.
"""

import asyncio
import logging
import random
from datetime import datetime, timedelta
from typing import Final

from core.errors import Unavailable
from db import workers
from db.database import Database
from db.frozen_clients import end_frozen_clients

log = logging.getLogger(__name__)

#: Two looks that are further apart than this share of a lease do not count as unbroken touch: in
#: between, leases may have run out unseen (the machine slept, or somebody set Postgres's clock).
GAP_SHARE: Final = 0.5
#: How often a worker looks, in leases: seldom, and out of step with the others.
WORKER_PACE: Final = (0.2, 0.45)


class Rescuer:
    """Rescues, and remembers since when it has been in touch with Postgres."""

    def __init__(self, database: Database, lease_seconds: float, max_attempts: int) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._gap = timedelta(seconds=lease_seconds * GAP_SHARE)
        self._last_look: datetime | None = None
        self._in_touch_since: datetime | None = None
        self.rescued_workers = 0
        self.rescued_jobs = 0

    async def look(self) -> dict[int, int]:
        """Rescue whom there is to rescue; returns the jobs freed, by worker id.

        Raises:
            Unavailable: Postgres cannot be reached; the touch begins anew.
        """
        try:
            now = await workers.clock(self._database)
            if self._last_look is None or not (
                self._last_look <= now <= self._last_look + self._gap
            ):
                self._in_touch_since = now
            self._last_look = now
            if ended := await end_frozen_clients(self._database):
                log.warning(
                    "Ended %d sessions of frozen clients",
                    len(ended),
                    extra={"action": "end_frozen_clients", "sessions": len(ended)},
                )
            freed = await workers.rescue_lost(
                self._database,
                self._lease_seconds,
                self._max_attempts,
                in_touch_since=self._in_touch_since,
                in_touch_until=now + self._gap,
            )
        except Unavailable:
            self._last_look = None
            raise
        for worker_id, jobs in freed.items():
            self.rescued_workers += 1
            self.rescued_jobs += jobs
            log.warning(
                "Worker %d lost, freed %d jobs",
                worker_id,
                jobs,
                extra={"action": "rescue", "worker": worker_id, "jobs": jobs},
            )
        return freed


async def rescue_for_ever(rescuer: Rescuer, lease_seconds: float) -> None:
    """A worker's share of the rescue, so that lost jobs come back where no steward lives."""
    jitter = random.Random()
    while True:
        await asyncio.sleep(lease_seconds * jitter.uniform(*WORKER_PACE))
        try:
            await rescuer.look()
        except Unavailable:
            continue
