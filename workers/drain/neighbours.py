"""Neighbours: what the other live workers of the base model hold, as this one last heard.

A worker tells of itself and reads of the others every few seconds, in two small statements. All of
it is advice: nothing is lost where it is old, and who heeds it waits a bounded moment at most.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Final

from core.errors import Unavailable
from db import neighbours
from db.database import Database

log = logging.getLogger(__name__)

TELL_SECONDS: Final = 5.0


class Neighbours:
    """What the others hold; empty for a worker alone."""

    def __init__(self) -> None:
        #: adapter versions resident in another worker
        self.resident: frozenset[int] = frozenset()
        #: dedicated partitions that another worker serves by name
        self.partitions: frozenset[int] = frozenset()


async def keep_in_touch(
    database: Database,
    worker_id: int,
    base_model_id: int,
    known: Neighbours,
    *,
    resident: Callable[[], Collection[int]],
    partitions: Collection[int] | None,
    dedicated_from: int,
    every_seconds: float = TELL_SECONDS,
) -> None:
    """Tell and listen for ever. No failure stops the worker.

    Args:
        known: kept up to date.
        resident: the adapters in this worker's slots.
        partitions: those that this worker serves by name; None serves all.
        dedicated_from: `LORRY_PARTITIONS`: from this number on a partition is one of its own.
    """
    told: frozenset[int] | None = None
    while True:
        try:
            mine = frozenset(resident())
            if mine != told:
                await neighbours.tell(database, worker_id, mine, partitions or ())
                told = mine
            others = await neighbours.others(database, worker_id, base_model_id)
            known.resident = others.resident
            known.partitions = frozenset(p for p in others.partitions if p >= dedicated_from)
        except Unavailable as error:
            log.debug("Neighbours wait: %s", error, extra={"action": "neighbours_wait"})
        except Exception:  # it is advice; the drain must go on without it
            log.exception("Neighbours unknown", extra={"action": "neighbours_failed"})
        await asyncio.sleep(every_seconds)
