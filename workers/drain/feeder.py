"""The feeder: keeps the engine's waiting line topped up from Postgres, never waiting for a batch.

Jobs are claimed in chunks sized to the free window and flow into the engine as others leave it.
"""

import asyncio
import functools
import logging
import math
import time
from collections.abc import Sequence
from typing import Final, NamedTuple
from uuid import UUID

import orjson

from core.errors import AdapterInvalid, ErrorCode, Unavailable
from core.generation import Aborted, Completion, Failure, GenerationRequest, Outcome, Provenance
from core.settings import Settings
from db import claims
from db.claims import ClaimedJob
from db.database import Database
from db.doorbell import Doorbell
from workers.drain.recorder import Finished, Recorder
from workers.drain.slots import Slots
from workers.drain.turns import Turn, Turns
from workers.engine.protocol import (
    AdapterLoadError,
    Engine,
    EngineInfo,
    EngineRequest,
    LocalAdapter,
)
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)

#: The most jobs that one claim takes.
LARGEST_CHUNK: Final = 512
#: A claim is worth its round trips from this share of the window on, unless the engine is short.
SMALLEST_CHUNK_SHARE: Final = 1 / 16
#: Pause after Postgres could not be reached.
OUTAGE_PAUSE_SECONDS: Final = 0.5


class Running(NamedTuple):
    """A job in the engine."""

    job: ClaimedJob
    adapter: LocalAdapter | None


class Feeder:
    """Claims and feeds. All its methods run on the event loop that owns the engine."""

    def __init__(
        self,
        *,
        database: Database,
        engine: Engine,
        slots: Slots,
        turns: Turns,
        recorder: Recorder,
        doorbell: Doorbell,
        settings: Settings,
        worker_id: int,
        metrics: DrainMetrics,
    ) -> None:
        self._database = database
        self._engine = engine
        self._slots = slots
        self._turns = turns
        self._recorder = recorder
        self._doorbell = doorbell
        self._settings = settings
        self._worker_id = worker_id
        self._metrics = metrics
        limits = engine.info.limits
        self.enough = limits.max_num_seqs
        self.window = math.ceil(limits.max_num_seqs * settings.feed_factor)
        self.token_window = math.ceil(limits.cache_tokens * settings.feed_factor)
        self._running: dict[str, Running] = {}
        self._running_tokens = 0
        self._cut_off: list[ClaimedJob] = []
        self._cancelled: set[str] = set()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._stopping = False
        #: whether the last look saw work for this worker
        self._work_waiting = False

    # -- what others ask ------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Jobs in the engine."""
        return len(self._running)

    @property
    def free(self) -> int:
        """How many jobs may be claimed now: room by count, nothing once the tokens suffice.

        Unrecorded results count too: Postgres sets the pace when it is slow.
        """
        if self.token_window and self._running_tokens >= self.token_window:
            return 0
        backlog = max(0, self._recorder.unrecorded - 4 * self._settings.flush_results)
        return self.window - len(self._running) - backlog

    async def ring(self) -> None:
        """A doorbell: look for work. Returns when there is room for more, so that a doorbell that
        comes while the window is full goes to another worker."""
        self._wake.set()
        await self._room.wait()

    def stop(self) -> None:
        """Claim no more; what is in the engine goes on."""
        self._stopping = True
        self._wake.set()
        self._room.set()

    def unfinished(self) -> list[ClaimedJob]:
        """Jobs that this worker still owes: in the engine, or cut off by its end."""
        return [running.job for running in self._running.values()] + self._cut_off

    def knows(self, job_id: UUID, attempt: int) -> bool:
        """Whether an attempt is in the engine, or waits to be recorded."""
        in_engine = request_id(job_id, attempt) in self._running
        return in_engine or self._recorder.holds(job_id, attempt)

    async def abort(self, jobs: Sequence[tuple[UUID, int]]) -> None:
        """Stop attempts that were cancelled or expired: nothing is recorded for them."""
        ids = [i for i in (request_id(*job) for job in jobs) if i in self._running]
        self._cancelled.update(ids)
        await self._engine.abort(ids)

    async def cut_off(self) -> None:
        """Abort everything in the engine; the jobs stay in `unfinished`."""
        await self._engine.abort(list(self._running))

    # -- the loop -------------------------------------------------------------------------

    async def run(self) -> None:
        """Feed until stopped; then return. Raises EngineDead."""
        while not self._stopping:
            self._wake.clear()
            try:
                await self._top_up()
            except Unavailable as error:
                log.warning("No claims: %s", error, extra={"action": "claim_waits"})
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)
            self._note_room()
            try:
                await asyncio.wait_for(self._wake.wait(), self._settings.poll_seconds)
            except TimeoutError:
                pass
        try:
            if self._turns.current is not None:
                await self._turns.end(self._turns.current)
        except Unavailable:
            return  # the line stays on the waiting list, which is where it belongs

    async def _top_up(self) -> None:
        while not self._stopping and self.free >= self._least_chunk():
            turn = await self._turns.current_or_next()
            self._work_waiting = turn is not None or self._turns.blocked
            self._note_room()
            if turn is None:
                return
            await self._feed(turn)
            await self._turns.end_if_over(turn)
        if (turn := self._turns.current) is not None:
            # work is left behind and this window is full: let another worker hear of it
            self._doorbell.ring(self._engine.info.base_model, turn.waiting.partition)

    def _least_chunk(self) -> int:
        """Small claims cost round trips: wait for some room, unless the engine is running short."""
        if len(self._running) < self.enough:
            return 1
        return max(1, math.floor(self.window * SMALLEST_CHUNK_SHARE))

    async def _feed(self, turn: Turn) -> None:
        limit = min(self.free, LARGEST_CHUNK)
        try:
            adapter = await self._slots.load(turn.line.adapter_version_id)
        except (AdapterInvalid, AdapterLoadError) as error:
            jobs = await self._claim(turn, limit)
            self._fail(jobs, error)
        else:
            jobs = await self._claim(turn, limit)
            self._submit(jobs, adapter)
        turn.fed += len(jobs)
        if len(jobs) < limit:
            await self._turns.end(turn)

    async def _claim(self, turn: Turn, limit: int) -> list[ClaimedJob]:
        started = time.monotonic()
        jobs = await claims.claim(self._database, self._worker_id, turn.line, limit)
        self._metrics.claim(time.monotonic() - started, len(jobs))
        return jobs

    def _submit(self, jobs: Sequence[ClaimedJob], adapter: LocalAdapter | None) -> None:
        requests = []
        for job in jobs:
            request = engine_request(job, adapter)
            self._running[request.request_id] = Running(job, adapter)
            self._running_tokens += job.tokens
            self._slots.enter(job.adapter_version_id, 1)
            self._turns.served(job.tenant_id, job.tokens)
            requests.append(request)
        if requests:
            self._metrics.fed(jobs[0].adapter_version_id, len(jobs))
            self._engine.submit(requests, self._done)
            self._note_room()

    def _fail(self, jobs: Sequence[ClaimedJob], error: Exception) -> None:
        """An adapter that cannot be loaded fails its own jobs, and nothing else."""
        missing = isinstance(error, AdapterInvalid)
        code = ErrorCode.ADAPTER_MISSING if missing else ErrorCode.ADAPTER_LOAD_FAILED
        log.error("Adapter cannot be used: %s", error, extra={"action": "adapter_failed"})
        for job in jobs:
            failure = Failure(code, str(error))
            self._count(job, failure)
            self._recorder.add(Finished(job, failure, self._provenance(job, None)))

    # -- results --------------------------------------------------------------------------

    def _done(self, request: EngineRequest, outcome: Outcome) -> None:
        running = self._running.pop(request.request_id, None)
        if running is None:
            return
        self._running_tokens -= running.job.tokens
        self._slots.leave(running.job.adapter_version_id)
        self._count(running.job, outcome)
        if not isinstance(outcome, Aborted):
            provenance = self._provenance(running.job, running.adapter, request)
            self._recorder.add(Finished(running.job, outcome, provenance))
        elif request.request_id not in self._cancelled:
            self._cut_off.append(running.job)
        self._cancelled.discard(request.request_id)
        if not self._running:
            self._recorder.hurry()
        self._note_room()
        if self.free >= self._least_chunk():
            self._wake.set()

    def _count(self, job: ClaimedJob, outcome: Outcome) -> None:
        version = job.adapter_version_id
        match outcome:
            case Completion(prompt_tokens=prompt, completion_tokens=completion):
                self._metrics.finished(version, "succeeded", prompt, completion)
            case Failure():
                self._metrics.finished(version, "failed")
            case Aborted():
                self._metrics.finished(version, "aborted")

    def _note_room(self) -> None:
        cache_full = bool(self.token_window) and self._running_tokens >= self.token_window
        starvable = self._work_waiting and not cache_full and not self._stopping
        self._metrics.observe_running(len(self._running), starvable)
        if self.free > 0 or self._stopping:
            self._room.set()
        else:
            self._room.clear()

    def _provenance(
        self, job: ClaimedJob, adapter: LocalAdapter | None, request: EngineRequest | None = None
    ) -> Provenance:
        seed = request.generation.body.get("seed") if request else None
        return made_by(self._engine.info, adapter.sha256 if adapter else None, seed)


@functools.lru_cache(maxsize=256)
def made_by(info: EngineInfo, adapter_sha256: str | None, seed: int | None) -> Provenance:
    """What an answer was made by; nearly always the same as the last one's."""
    return Provenance(
        engine=info.name,
        engine_version=info.version,
        base_model=info.base_model,
        base_revision=info.base_revision,
        adapter_sha256=adapter_sha256,
        seed=seed,
    )


def request_id(job_id: UUID, attempt: int) -> str:
    """The engine's name for one attempt of a job."""
    return f"{job_id.hex}-{attempt}"


def engine_request(job: ClaimedJob, adapter: LocalAdapter | None) -> EngineRequest:
    """A claimed job as the engine takes it. The tenant salts the prefix cache."""
    return EngineRequest(
        request_id=request_id(job.id, job.attempt),
        generation=GenerationRequest(
            "chat" if job.endpoint == "chat" else "completion", orjson.loads(job.body)
        ),
        adapter=adapter,
        cache_salt=str(job.tenant_id),
    )
