"""Reconciling what Postgres counts as this worker's with what the worker has.

An answer may be lost with its connection though the statement was committed. Of a claim: its jobs
would stay running for as long as this worker renews its lease, so they are given back. Of the news
that jobs were cancelled or expired: they would run to their end for nothing, so they are aborted.
"""

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID

from core.errors import Unavailable
from db import claims
from db.database import Database
from workers.drain.aborts import Abort

log = logging.getLogger(__name__)


async def reconcile(
    database: Database,
    worker_id: int,
    *,
    knows: Callable[[UUID, int], bool],
    in_engine: Callable[[], set[tuple[UUID, int]]],
    abort: Abort,
    every_seconds: float,
) -> None:
    """Give back what this worker owns and does not know, abort what it has and does not own.

    For ever. A job is given back at the second look that finds it unknown: at the first, the
    answer of its claim may be on its way.

    Args:
        knows: whether an attempt (job id, attempt) is in the engine or waits to be recorded.
        in_engine: the attempts in the engine.
        abort: stops attempts.
        every_seconds: pause between looks.
    """
    unknown: set[tuple[UUID, int]] = set()
    while True:
        await asyncio.sleep(every_seconds)
        before = in_engine()
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
        # what came out meanwhile was recorded; what is still in was not this worker's any more
        if ended := (before & in_engine()).difference(owned):
            log.warning(
                "Aborting %d jobs that are not this worker's any more",
                len(ended),
                extra={"action": "reconcile_abort", "jobs": len(ended)},
            )
            await abort(sorted(ended))
