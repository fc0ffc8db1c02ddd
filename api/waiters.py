"""Long polls: one poller per process asks for all waiters at once.

A query per waiter would be load in proportion to patience; LISTEN/NOTIFY would serialise commits.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

from core.errors import Unavailable

log = logging.getLogger(__name__)

#: Pause between looks while somebody waits: what a long poll adds to an answer, at most.
INTERVAL_SECONDS: Final = 0.02
#: Longest pause while Postgres is away.
OUTAGE_SECONDS: Final = 1.0

FinishedAmong = Callable[[list[UUID]], Awaitable[set[UUID]]]


class Waiters:
    """Who waits for which job. Started and closed with the process, on its event loop."""

    def __init__(self, finished_among: FinishedAmong) -> None:
        self._finished_among = finished_among
        self._waiting: dict[UUID, set[asyncio.Future[None]]] = {}
        self._somebody = asyncio.Event()
        self._closed = False
        self._poller: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the poller. It asks nothing while nobody waits."""
        self._poller = asyncio.create_task(self._poll(), name="waiters")

    @property
    def count(self) -> int:
        """How many wait."""
        return sum(len(futures) for futures in self._waiting.values())

    async def wait(self, job_id: UUID, seconds: float) -> None:
        """Return when the job is final, after `seconds`, or when the process stops.

        The caller reads the job again: this says only that it is time to.
        """
        if self._closed:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, set()).add(future)
        self._somebody.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await future
        finally:
            self._forget(job_id, future)

    def release(self) -> None:
        """Let every waiter go, now and from now on: a stopping server must not hold requests."""
        self._closed = True
        self._wake(set(self._waiting))

    async def close(self) -> None:
        """Release the waiters and end the poller. Idempotent."""
        self.release()
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller

    async def _poll(self) -> None:
        pause = INTERVAL_SECONDS
        while True:
            await self._somebody.wait()
            try:
                self._wake(await self._finished_among(list(self._waiting)))
                pause = INTERVAL_SECONDS
            except Unavailable:
                pause = min(pause * 2, OUTAGE_SECONDS)
            except Exception:  # the poller must outlive whatever one look met
                log.exception("Looking for finished jobs failed", extra={"action": "poll_failed"})
                pause = OUTAGE_SECONDS
            await asyncio.sleep(pause)

    def _wake(self, finished: set[UUID]) -> None:
        for job_id in finished:
            for future in self._waiting.get(job_id, ()):
                if not future.done():
                    future.set_result(None)

    def _forget(self, job_id: UUID, future: asyncio.Future[None]) -> None:
        futures = self._waiting[job_id]
        futures.discard(future)
        if not futures:
            del self._waiting[job_id]
        if not self._waiting:
            self._somebody.clear()
