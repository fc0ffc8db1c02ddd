"""Reconciling: jobs that Postgres counts as this worker's and that the worker does not have.

A claim whose answer was lost with its connection may have been committed all the same. Its jobs
would stay running for as long as this worker renews its lease; so they are given back.
"""

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID

from core.errors import Unavailable
from db import claims
from db.database import Database

log = logging.getLogger(__name__)


async def release_unknown(
    database: Database, worker_id: int, knows: Callable[[UUID, int], bool], every_seconds: float
) -> None:
    """Give back, for ever, what this worker owns and does not know.

    A job is given back at the second look that finds it unknown: at the first, the answer of its
    claim may be on its way.

    Args:
        knows: whether an attempt (job id, attempt) is in the engine or waits to be recorded.
        every_seconds: pause between looks.
    """
    unknown: set[tuple[UUID, int]] = set()
    while True:
        await asyncio.sleep(every_seconds)
        try:
            owned = await claims.owned(database, worker_id)
            seen = {job for job in owned if not knows(*job)}
            lost, unknown = seen & unknown, seen
            if lost:
                released = await claims.release(database, worker_id, sorted(lost))
                log.warning(
                    "Gave back %d jobs of a claim whose answer was lost",
                    released,
                    extra={"action": "reconcile", "jobs": released},
                )
        except Unavailable:
            continue
