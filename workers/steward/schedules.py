"""The steward's part in schedules: tick, fire, and see runs to their ends.

Each is a transaction of its own, claimed in SQL, and needs no broker. A steward that dies in one
leaves what was there before.
"""

import logging
from datetime import datetime
from typing import Final

from core.settings import Settings
from db import schedule_firing, schedule_outcomes, schedule_runs, schedule_ticks
from db.database import Database

log = logging.getLogger(__name__)

#: Longest pause between two looks: a schedule made meanwhile is seen by then.
LOOK_SECONDS: Final = 0.5
#: What is due sooner than this is due now; it bounds how often an overdue firing is looked at.
SHORTEST_PAUSE_SECONDS: Final = 0.02


class ScheduleDuties:
    """What a steward does for schedules. Any number of stewards may do it."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    async def tick(self) -> float:
        """Make runs of what is due and start them; returns the seconds until the next look."""
        await tick_and_fire(self._database)
        seconds = await schedule_ticks.seconds_to_next(self._database)
        return max(
            SHORTEST_PAUSE_SECONDS, min(LOOK_SECONDS if seconds is None else seconds, LOOK_SECONDS)
        )

    async def follow(self) -> None:
        """See to the ends of runs: batches that ended, failures in a row, runs that waited."""
        await follow(self._database)

    async def prune(self) -> None:
        """Forget runs that ended long ago."""
        if not self._settings.retention_seconds:
            return
        while await schedule_runs.prune_runs(self._database, self._settings.retention_seconds):
            pass


async def tick_and_fire(database: Database, now: datetime | None = None) -> int:
    """Make runs of everything due, and start all that can start; returns how many were handled.

    Args:
        now: for tests; Postgres's own time otherwise.
    """
    handled = 0
    while True:
        ticked = await schedule_ticks.tick(database, now=now)
        fired = await schedule_firing.fire(database, now=now)
        handled += fired
        if fired:
            log.info("Fired %d runs", fired, extra={"action": "schedule_fired", "runs": fired})
        if not ticked and not fired:
            return handled


async def follow(database: Database, now: datetime | None = None) -> None:
    """See to the ends of runs. `now` is for tests."""
    while await schedule_outcomes.finish_ended(database, now=now) >= schedule_outcomes.STEP:
        pass
    await schedule_outcomes.count_ends(database, now=now)
    await schedule_outcomes.wake_queued(database)
