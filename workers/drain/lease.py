"""The worker's lease: a heartbeat that stops when the engine does."""

import asyncio
import logging
import time
from collections.abc import Callable

from core.errors import Unavailable
from core.settings import Settings
from db import workers
from db.database import Database

log = logging.getLogger(__name__)

#: Beats per lease: two may be lost before the lease runs out.
BEATS_PER_LEASE = 3


class LeaseLost(Exception):
    """This worker was declared lost: its jobs are other workers' now."""


class EngineStalled(Exception):
    """The engine has work and makes no progress."""


class Lease:
    """Renews the worker's row while the engine is idle or progresses."""

    def __init__(
        self,
        database: Database,
        worker_id: int,
        settings: Settings,
        *,
        progress: Callable[[], int],
        busy: Callable[[], bool],
    ) -> None:
        self.worker_id = worker_id
        self._database = database
        self._settings = settings
        self._progress = progress
        self._busy = busy
        self._last_progress = progress()
        self._alive_at = time.monotonic()

    def loading(self) -> None:
        """An adapter load begins: the engine may be silent for a while."""
        self._alive_at = time.monotonic()

    async def run(self) -> None:
        """Beat for ever.

        Raises:
            LeaseLost: the row says that this worker was declared lost.
            EngineStalled: no progress with work in the engine for `stall_seconds`.
        """
        while True:
            self._check_progress()
            try:
                await self.renew()
            except Unavailable as error:
                log.warning("Heartbeat missed: %s", error, extra={"action": "heartbeat_missed"})
                await asyncio.sleep(1)
                continue
            await asyncio.sleep(self._settings.lease_seconds / BEATS_PER_LEASE)

    async def renew(self) -> None:
        """Renew once. Raises LeaseLost, or Unavailable."""
        if not await workers.renew(self._database, self.worker_id, self._settings.lease_seconds):
            raise LeaseLost(f"worker {self.worker_id} was declared lost")

    async def renew_first(self) -> None:
        """After an outage: renew before anything is recorded; an outage still on is ignored."""
        try:
            await self.renew()
        except Unavailable:
            return

    def _check_progress(self) -> None:
        now, progress = time.monotonic(), self._progress()
        if progress != self._last_progress or not self._busy():
            self._last_progress, self._alive_at = progress, now
        elif now - self._alive_at > self._settings.stall_seconds:
            raise EngineStalled(
                f"the engine made no token for {self._settings.stall_seconds:.0f} s "
                "with jobs in it (LORRY_STALL_SECONDS)"
            )
