"""Aborts: carries cancels and expiries of running jobs from Postgres into the engine."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from uuid import UUID

from core.errors import Unavailable
from db import workers
from db.database import Database

log = logging.getLogger(__name__)

#: A cancel reaches the engine within this time, while Postgres is up.
LOOK_SECONDS: Final = 0.5

Abort = Callable[[Sequence[tuple[UUID, int]]], Awaitable[None]]


async def watch_ended(
    database: Database, worker_id: int, busy: Callable[[], bool], abort: Abort
) -> None:
    """Abort this worker's cancelled and expired jobs, for ever.

    Args:
        busy: whether the worker has jobs; an idle one does not look.
        abort: stops attempts, given as (job id, attempt).
    """
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if not busy():
            continue
        try:
            ended = await workers.take_ended(database, worker_id)
        except Unavailable:
            continue
        if ended:
            log.info("Aborting %d jobs", len(ended), extra={"action": "abort", "jobs": len(ended)})
            await abort(ended)
