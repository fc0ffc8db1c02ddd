"""The recorder: results to Postgres in micro-batches, fenced, off the engine's path.

Results are never thrown away for an outage: they are kept and written when Postgres is back, after
the lease was renewed. A row that Postgres cannot store fails alone.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, TypeVar
from uuid import UUID

import asyncpg
import orjson

from core.answers import build_response
from core.errors import ErrorCode, Unavailable
from core.generation import Completion, Failure, Provenance
from core.json_values import replace_unstorable
from core.retry import GiveUp, Retry, after_failure
from core.settings import Settings
from db import results
from db.claims import ClaimedJob
from db.database import Database
from db.results import Result, RetryLater
from workers.drain.lease import Lease
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Flushes under way at once.
FLUSHES: Final = 2
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0
#: What Postgres says of a row that it will never store. Everything else may pass: it is waited for.
REFUSED = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)


class Finished(NamedTuple):
    """A job's attempt that has left the engine with an answer or a failure."""

    job: ClaimedJob
    outcome: Completion | Failure
    provenance: Provenance
    folded: bool = False


class Recorder:
    """Takes finished attempts and flushes them every `flush_seconds` or `flush_results`."""

    def __init__(
        self, database: Database, lease: Lease, settings: Settings, metrics: DrainMetrics
    ) -> None:
        self._database = database
        self._lease = lease
        self._settings = settings
        self._metrics = metrics
        self._pending: list[Finished] = []
        self._writing = 0
        self._held: set[tuple[UUID, int]] = set()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._taking = asyncio.Lock()
        self._jitter = random.Random()
        self.recorded = 0
        self.dropped = 0

    @property
    def unrecorded(self) -> int:
        """Finished attempts that are not in Postgres yet."""
        return len(self._pending) + self._writing

    def holds(self, job_id: UUID, attempt: int) -> bool:
        """Whether an attempt waits here to be recorded."""
        return (job_id, attempt) in self._held

    def add(self, finished: Finished) -> None:
        """Take a finished attempt; returns at once."""
        self._held.add((finished.job.id, finished.job.attempt))
        self._pending.append(finished)
        self._idle.clear()
        self._arrived.set()
        if len(self._pending) >= self._settings.flush_results:
            self._full.set()

    def hurry(self) -> None:
        """Flush without waiting for more: nothing else is under way."""
        if self._pending:
            self._full.set()

    async def drained(self) -> None:
        """Return when everything taken so far is in Postgres."""
        await self._idle.wait()

    async def run(self) -> None:
        """Flush for ever, up to `FLUSHES` at a time: one is made while another is written.

        Raises:
            LeaseLost: this worker was declared lost; its results belong to nobody.
        """
        flushes = [asyncio.create_task(self._flush_for_ever()) for _ in range(FLUSHES)]
        try:
            await asyncio.gather(*flushes)
        finally:
            for task in flushes:
                task.cancel()
            await asyncio.gather(*flushes, return_exceptions=True)

    async def _flush_for_ever(self) -> None:
        while True:
            async with self._taking:
                await self._arrived.wait()
                await self._gather()
                batch = self._pending[: self._settings.flush_results]
                del self._pending[: len(batch)]
                self._writing += len(batch)
                if not self._pending:
                    self._arrived.clear()
            await self._flush(batch)
            self._held.difference_update((f.job.id, f.job.attempt) for f in batch)
            self._writing -= len(batch)
            if not self.unrecorded:
                self._idle.set()

    async def _gather(self) -> None:
        """Wait a moment for more results to share the flush, unless there are enough."""
        if len(self._pending) < self._settings.flush_results:
            try:
                async with asyncio.timeout(self._settings.flush_seconds):
                    await self._full.wait()
            except TimeoutError:
                pass
        self._full.clear()

    async def _flush(self, batch: Sequence[Finished]) -> None:
        rows: list[Result] = []
        retries: list[RetryLater] = []
        for finished in batch:
            step = self._next_step(finished)
            if isinstance(step, Result):
                rows.append(step)
            else:
                retries.append(step)
        if rows:
            await self._write(rows)
        if retries:
            await self._persist(
                lambda: results.retry_later(self._database, self._lease.worker_id, retries)
            )

    def _next_step(self, finished: Finished) -> Result | RetryLater:
        job, outcome = finished.job, finished.outcome
        if isinstance(outcome, Failure):
            # an engine's message may quote what Postgres refuses; its code must not be lost for it
            outcome = Failure(outcome.code, replace_unstorable(outcome.message))
            decision = after_failure(
                outcome.code, job.failures + 1, self._settings.max_attempts, self._jitter
            )
            match decision:
                case Retry(delay_seconds):
                    return RetryLater(
                        job.id, job.attempt, delay_seconds, f"{outcome.code}: {outcome.message}"
                    )
                case GiveUp(code):
                    return Result(
                        job.id,
                        job.attempt,
                        error_code=code,
                        error_message=outcome.message,
                        folded=finished.folded,
                    )
        response = build_response(
            job.id,
            job.model,
            "chat" if job.endpoint == "chat" else "completion",
            outcome,
            finished.provenance,
            int(time.time()),
        )
        return Result(
            job.id,
            job.attempt,
            response=orjson.dumps(response).decode(),
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            cached_tokens=outcome.cached_tokens,
            folded=finished.folded,
        )

    async def _write(self, rows: Sequence[Result]) -> None:
        """Record rows; where Postgres refuses the data, halve until the bad row is alone."""
        started = time.monotonic()
        try:
            written: set[UUID] = await self._persist(
                lambda: results.record(self._database, self._lease.worker_id, rows)
            )
        except REFUSED as error:
            if len(rows) == 1:
                await self._write_unstorable(rows[0], error)
                return
            middle = len(rows) // 2
            await self._write(rows[:middle])
            await self._write(rows[middle:])
            return
        self.recorded += len(written)
        self.dropped += len(rows) - len(written)
        self._metrics.record(time.monotonic() - started, len(written))
        self._metrics.dropped(len(rows) - len(written))

    async def _write_unstorable(self, row: Result, error: Exception) -> None:
        log.error(
            "Job's result cannot be stored: %s",
            error,
            extra={"action": "unstorable", "job": row.id},
        )
        if row.error_code == ErrorCode.UNSTORABLE:
            return  # even the plain failure is refused: the lease's end will free the job
        message = f"Postgres refused to store the result ({type(error).__name__})"
        failed = Result(row.id, row.attempt, error_code=ErrorCode.UNSTORABLE, error_message=message)
        await self._write([failed])

    async def _persist(self, write: Callable[[], Awaitable[T]]) -> T:
        """Run a write until Postgres took it; after an outage the lease is renewed first."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await write()
            except REFUSED:
                raise
            except (Unavailable, asyncpg.PostgresError) as error:
                log.warning(
                    "Results wait for Postgres: %s", error, extra={"action": "record_waits"}
                )
                await asyncio.sleep(pause * self._jitter.uniform(0.5, 1.0))
                pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
                await self._lease.renew_first()
