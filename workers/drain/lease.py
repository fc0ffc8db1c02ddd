"""The worker's lease: a heartbeat that stops when the engine does."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
        self._loads = 0
        self._last_progress = progress()
        self._alive_at = time.monotonic()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """An adapter is being loaded: the engine may be silent for a while, but not for ever."""
        self._alive_at = time.monotonic()
        self._loads += 1
        try:
            yield
        finally:
            self._loads -= 1

    async def run(self) -> None:
        """Beat for ever.

        Raises:
            LeaseLost: the row says that this worker was declared lost.
        """
        pause = self._settings.lease_seconds / BEATS_PER_LEASE
        while True:
            try:
                # a beat that hangs is worth less than the next one
                async with asyncio.timeout(pause):
                    await self.renew()
            except (Unavailable, TimeoutError) as error:
                log.warning("Heartbeat missed: %s", error, extra={"action": "heartbeat_missed"})
                await asyncio.sleep(min(1.0, pause))
                continue
            await asyncio.sleep(pause)

    async def watch_progress(self) -> None:
        """Watch the engine for ever; by a clock of its own, so that no hanging Postgres delays it.

        Raises:
            EngineStalled: no progress for `stall_seconds`, with jobs in the engine or an adapter
                being loaded.
        """
        while True:
            self._check_progress()
            await asyncio.sleep(min(1.0, self._settings.stall_seconds / 10))

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
        idle = not self._busy() and not self._loads
        if progress != self._last_progress or idle:
            self._last_progress, self._alive_at = progress, now
        elif now - self._alive_at > self._settings.stall_seconds:
            raise EngineStalled(
                f"the engine made no token for {self._settings.stall_seconds:.0f} s "
                "with jobs in it or an adapter on its way (LORRY_STALL_SECONDS)"
            )
