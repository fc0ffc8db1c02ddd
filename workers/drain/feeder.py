"""The feeder: keeps the engine's waiting line topped up from Postgres, never waiting for a batch.

A *turn* is one line's time to be claimed from. Jobs are claimed in chunks sized to the free window
and flow into the engine as others leave it; the tail of one line overlaps the head of the next.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import orjson

from core.errors import AdapterInvalid, ErrorCode, Unavailable
from core.generation import Aborted, Failure, GenerationRequest, Outcome, Provenance
from core.settings import Settings
from db import claims
from db.claims import ClaimedJob, WaitingLine
from db.database import Database
from db.doorbell import Doorbell
from db.waiting import Line
from workers.drain.planner import Shares, order, should_yield
from workers.drain.recorder import Finished, Recorder
from workers.drain.slots import Slots
from workers.engine.protocol import AdapterLoadError, Engine, EngineRequest, LocalAdapter

log = logging.getLogger(__name__)

#: The most jobs that one claim takes.
LARGEST_CHUNK: Final = 512
#: A line whose jobs are not due yet (they wait out a retry) is left alone this long.
COOL_DOWN_SECONDS: Final = 0.25
#: Pause after Postgres could not be reached.
OUTAGE_PAUSE_SECONDS: Final = 0.5


@dataclass(slots=True)
class Turn:
    """A line that is being drained, since `started_at` (monotonic seconds)."""

    waiting: WaitingLine
    started_at: float = field(default_factory=time.monotonic)

    @property
    def line(self) -> Line:
        return self.waiting.line

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_at


@dataclass(frozen=True, slots=True)
class Running:
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
        recorder: Recorder,
        doorbell: Doorbell,
        settings: Settings,
        worker_id: int,
        base_model_id: int,
        partitions: Collection[int] | None,
    ) -> None:
        self._database = database
        self._engine = engine
        self._slots = slots
        self._recorder = recorder
        self._doorbell = doorbell
        self._settings = settings
        self._worker_id = worker_id
        self._base_model_id = base_model_id
        self._partitions = partitions
        self.window = math.ceil(engine.info.limits.max_num_seqs * settings.feed_factor)
        self._running: dict[str, Running] = {}
        self._cut_off: list[ClaimedJob] = []
        self._cancelled: set[str] = set()
        self._turn: Turn | None = None
        self._cool_until: dict[Line, float] = {}
        self._served: Counter[int] = Counter()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._stopping = False

    # -- what others ask ------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Jobs in the engine."""
        return len(self._running)

    @property
    def free(self) -> int:
        """How many jobs may be claimed now. Unrecorded results count: Postgres sets the pace."""
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
        if self._turn is not None:
            await self._end_turn(self._turn)

    async def _top_up(self) -> None:
        while not self._stopping and self.free >= self._least_chunk():
            turn = self._turn or await self._begin_turn()
            if turn is None:
                return
            self._turn = turn
            await self._feed(turn)
            await self._end_turn_if_over()
        if self._turn is not None:
            # work is left behind and this window is full: let another worker hear of it
            self._doorbell.ring(self._engine.info.base_model, self._turn.waiting.partition)

    def _least_chunk(self) -> int:
        """Small claims cost round trips, so wait for an eighth of the window, unless the engine
        would run short meanwhile."""
        if len(self._running) < self._engine.info.limits.max_num_seqs:
            return 1
        return max(1, self.window // 8)

    async def _begin_turn(self) -> Turn | None:
        lines = await self._look()
        best = order(
            lines, self._slots.view(), Shares(self._served), self._settings.quantum_seconds
        )
        return Turn(best[0]) if best else None

    async def _look(self) -> list[WaitingLine]:
        seen = await claims.look(
            self._database,
            self._base_model_id,
            partitions=self._partitions,
            resident=self._slots.view().resident,
        )
        now = time.monotonic()
        self._cool_until = {line: t for line, t in self._cool_until.items() if t > now}
        for waiting in seen:
            if waiting.jobs == 0 and waiting.line not in self._cool_until:
                await self._settle_empty(waiting.line)
        return [w for w in seen if w.jobs and w.line not in self._cool_until]

    async def _settle_empty(self, line: Line) -> None:
        """A line with nothing due leaves the list, or is left alone for a moment."""
        if await claims.end_turn(self._database, line):
            self._cool_until[line] = time.monotonic() + COOL_DOWN_SECONDS

    async def _feed(self, turn: Turn) -> None:
        limit = min(self.free, LARGEST_CHUNK)
        try:
            adapter = await self._slots.load(turn.line.adapter_version_id)
        except (AdapterInvalid, AdapterLoadError) as error:
            await self._fail_line(turn, limit, error)
            return
        jobs = await claims.claim(self._database, self._worker_id, turn.line, limit)
        self._submit(jobs, adapter)
        if len(jobs) < limit:
            await self._end_turn(turn)

    def _submit(self, jobs: Sequence[ClaimedJob], adapter: LocalAdapter | None) -> None:
        requests = []
        for job in jobs:
            request = engine_request(job, adapter)
            self._running[request.request_id] = Running(job, adapter)
            self._slots.enter(job.adapter_version_id, 1)
            self._served[job.tenant_id] += job.tokens
            requests.append(request)
        if requests:
            self._engine.submit(requests, self._done)

    async def _fail_line(self, turn: Turn, limit: int, error: Exception) -> None:
        """An adapter that cannot be loaded fails its own jobs, and nothing else."""
        log.error(
            "Adapter cannot be used: %s",
            error,
            extra={"action": "adapter_failed", "adapter_version": turn.line.adapter_version_id},
        )
        missing = isinstance(error, AdapterInvalid)
        code = ErrorCode.ADAPTER_MISSING if missing else ErrorCode.ADAPTER_LOAD_FAILED
        jobs = await claims.claim(self._database, self._worker_id, turn.line, limit)
        for job in jobs:
            failure = Failure(code, str(error))
            self._recorder.add(Finished(job, failure, self._provenance(job, None)))
        if len(jobs) < limit:
            await self._end_turn(turn)

    async def _end_turn_if_over(self) -> None:
        turn = self._turn
        quantum = self._settings.quantum_seconds
        if turn is None or turn.seconds < quantum:
            return
        if should_yield(turn.line, turn.seconds, await self._look(), quantum):
            await self._end_turn(turn)
        else:
            turn.started_at = time.monotonic()

    async def _end_turn(self, turn: Turn) -> None:
        self._turn = None
        for tenant_id in self._served:  # old service counts less and less
            self._served[tenant_id] //= 2
        left = await claims.end_turn(self._database, turn.line)
        if left and turn.seconds < COOL_DOWN_SECONDS:
            self._cool_until[turn.line] = time.monotonic() + COOL_DOWN_SECONDS

    # -- results --------------------------------------------------------------------------

    def _done(self, request: EngineRequest, outcome: Outcome) -> None:
        running = self._running.pop(request.request_id, None)
        if running is None:
            return
        self._slots.leave(running.job.adapter_version_id)
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

    def _note_room(self) -> None:
        if self.free > 0 or self._stopping:
            self._room.set()
        else:
            self._room.clear()

    def _provenance(
        self, job: ClaimedJob, adapter: LocalAdapter | None, request: EngineRequest | None = None
    ) -> Provenance:
        info = self._engine.info
        return Provenance(
            engine=info.name,
            engine_version=info.version,
            base_model=info.base_model,
            base_revision=info.base_revision,
            adapter_sha256=adapter.sha256 if adapter else None,
            seed=request.generation.body.get("seed") if request else None,
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
