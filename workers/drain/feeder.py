"""The feeder: keeps the engine's waiting line topped up from Postgres, never waiting for a batch.

Jobs are claimed in chunks sized to the free window and flow into the engine as others leave it.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from core.errors import AdapterInvalid, ErrorCode, StoreUnavailable, Unavailable
from core.generation import Aborted, Completion, Failure, Outcome
from core.settings import Settings
from db import claims
from db.claims import ClaimedJob
from db.database import Database
from db.doorbell import Doorbell
from workers.drain.admission import Admission
from workers.drain.folding import Folding
from workers.drain.recorder import Finished, Recorder
from workers.drain.requests import engine_request, made_by, request_id
from workers.drain.slots import Slots
from workers.drain.suspects import Door, Suspects
from workers.drain.turns import Turn, Turns
from workers.drain.window import Window
from workers.engine.protocol import AdapterLoadError, Engine, EngineRequest, LocalAdapter
from workers.metrics import DrainMetrics, Waiting

log = logging.getLogger(__name__)

#: The most jobs that one claim takes.
LARGEST_CHUNK: Final = 512
#: Pause after Postgres could not be reached.
OUTAGE_PAUSE_SECONDS: Final = 0.5


@dataclass(slots=True)
class Running:
    """A job in the engine; `folded` once its adapter was folded while it was there."""

    job: ClaimedJob
    adapter: LocalAdapter | None
    folded: bool = False


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
        suspects: Suspects,
        loading: Callable[[], AbstractContextManager[None]] = nullcontext,
        fold: bool = True,
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
        self._suspects = suspects
        self._door = Door(self._submit, self._fail, lambda: self._stopping, self._emptied)
        self.window = Window(
            engine.info.limits, settings.feed_factor, backlog_allowed=4 * settings.flush_results
        )
        self._made_by = functools.lru_cache(maxsize=256)(functools.partial(made_by, engine.info))
        self._running: dict[str, Running] = {}
        self.folding = Folding(
            engine,
            slots,
            turns,
            self.window,
            metrics,
            allowed=fold,
            quantum_seconds=settings.quantum_seconds,
            blocked=self._may_not_fold,
            folds=self._note_folded,
            look=self.wake,
            loading=loading,
        )
        self._cut_off: list[ClaimedJob] = []
        self._cancelled: set[str] = set()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._stopping = False
        #: probes of adapters, which take turns too; None where nobody probes
        self.admission: Admission | None = None
        #: what the last look saw for this worker
        self._waiting = Waiting.NOTHING

    # -- what others ask ------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Jobs in the engine."""
        return len(self._running)

    @property
    def free(self) -> int:
        """How many jobs may be claimed now; none while suspects have the engine."""
        return 0 if self._suspects.apart else self.window.room(self._recorder.unrecorded)

    async def ring(self) -> None:
        """A doorbell: look for work. Returns when there is room for more, so that a doorbell that
        comes while the window is full goes to another worker."""
        self._wake.set()
        await self._room.wait()

    def wake(self) -> None:
        """Look for work at once."""
        self._wake.set()

    def stop(self) -> None:
        """Claim no more; what is in the engine goes on."""
        self._stopping = True
        self._wake.set()
        self._room.set()

    def unfinished(self) -> list[ClaimedJob]:
        """Jobs that this worker still owes: in the engine, or cut off by its end."""
        in_engine = [running.job for running in self._running.values()]
        return in_engine + self._cut_off + self._suspects.entering()

    def in_engine(self) -> set[tuple[UUID, int]]:
        """The attempts (job id, attempt) that are in the engine."""
        return {(running.job.id, running.job.attempt) for running in self._running.values()}

    def knows(self, job_id: UUID, attempt: int) -> bool:
        """Whether an attempt is in the engine, or waits to be recorded."""
        in_engine = request_id(job_id, attempt) in self._running
        held = self._suspects.holds(job_id, attempt)
        return in_engine or held or self._recorder.holds(job_id, attempt)

    async def abort(self, jobs: Sequence[tuple[UUID, int]]) -> None:
        """Stop attempts that were cancelled or expired: nothing is recorded for them."""
        ids = [i for i in (request_id(*job) for job in jobs) if i in self._running]
        self._cancelled.update(ids)
        self._suspects.drop(set(jobs))
        await self._engine.abort(ids)

    async def cut_off(self) -> None:
        """Abort everything in the engine; the jobs stay in `unfinished`."""
        await self._engine.abort(list(self._running))

    # -- the loop -------------------------------------------------------------------------

    async def run(self) -> None:
        """Feed until stopped; then return. Raises EngineDead."""
        await self._slots.load_first()
        while not self._stopping:
            self._wake.clear()
            try:
                await self._top_up()
                while not self._stopping and self._suspects.time_to_look(self._idle):
                    if not await self._suspects.run_one(self._door, self._idle, self.window.size):
                        break
            except Unavailable as error:
                log.warning("No claims: %s", error, extra={"action": "claim_waits"})
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)
            self._note_room()
            pause = min(self._settings.poll_seconds, self._turns.idle_seconds())
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._slots.close()
        try:
            if self._turns.current is not None:
                await self._turns.end(self._turns.current)
        except Unavailable:
            return  # the line stays on the waiting list, which is where it belongs

    async def _top_up(self) -> None:
        while not self._stopping and self.free >= self.window.least_chunk:
            turn = await self._turns.current_or_next(running=len(self._running))
            self._waiting = self._turns.waiting
            self._note_room()
            while self._turns.left_partitions:  # left to another worker, who may not have heard
                self._ring(self._turns.left_partitions.pop())
            if turn is None:
                return
            if self.admission is not None and self.admission.wants(turn.line):
                self._turns.current = None
                await self.admission.load()
                continue
            if self.window.room_beside(turn.line.adapter_version_id) < 1:
                await self._turns.end_if_over(turn, running=len(self._running))
                if self._turns.current is turn:
                    return
                continue
            await self._feed(turn)
            await self._turns.end_if_over(turn, running=len(self._running))
            if self._suspects.time_to_look(idle=False):
                return
        if (turn := self._turns.current) is not None:
            # work is left behind and this window is full: let another worker hear of it
            self._ring(turn.waiting.partition)

    @property
    def _idle(self) -> bool:
        return not self._running and self._waiting is Waiting.NOTHING

    def _emptied(self) -> bool:
        probing = self.admission is not None and self.admission.probing
        return not self._running and not self._recorder.unrecorded and not probing

    def _ring(self, partition: int) -> None:
        self._doorbell.ring(self._engine.info.base_model, partition)

    async def _feed(self, turn: Turn) -> None:
        room = self.window.room_beside(turn.line.adapter_version_id)
        limit = int(min(self.free, LARGEST_CHUNK, room, turn.jobs_allowed - turn.fed))
        try:
            adapter = await self._slots.load(turn.line.adapter_version_id)
        except StoreUnavailable as error:
            self._turns.put_off(turn)
            log.warning("Adapter waits: %s", error, extra={"action": "store_waits"})
            return
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
        if not jobs:
            return
        requests = []
        first = jobs[0]  # all are of one line
        folded = self.folding.folded == first.adapter_version_id
        for job in jobs:
            request = engine_request(job, adapter)
            self._running[request.request_id] = Running(job, adapter, folded)
            requests.append(request)
        tokens = sum(job.tokens for job in jobs)
        self.window.enter(first.adapter_version_id, len(jobs), tokens)
        self._slots.enter(first.adapter_version_id, len(jobs))
        self._turns.served(first.tenant_id, tokens)
        self._metrics.fed(first.adapter_version_id, len(jobs))
        self._engine.submit(requests, self._done)
        self.folding.wake()
        self._note_room()

    def _may_not_fold(self) -> bool:
        """Whether the engine belongs to suspects or to a probe, or is to be emptied."""
        probed = self.admission is not None and bool(self.admission.lines())
        unknown = self._engine.running > len(self._running)
        return self._stopping or self._suspects.apart or probed or unknown

    def _note_folded(self, version: int) -> None:
        for running in self._running.values():
            running.folded |= running.job.adapter_version_id == version

    def _fail(self, jobs: Sequence[ClaimedJob], error: Exception) -> None:
        """An adapter that cannot be loaded fails its own jobs, and nothing else."""
        missing = isinstance(error, AdapterInvalid)
        code = ErrorCode.ADAPTER_MISSING if missing else ErrorCode.ADAPTER_LOAD_FAILED
        log.error("Adapter cannot be used: %s", error, extra={"action": "adapter_failed"})
        for job in jobs:
            failure = Failure(code, str(error))
            self._count(job, failure)
            self._recorder.add(Finished(job, failure, self._made_by(None, None)))

    # -- results --------------------------------------------------------------------------

    def _done(self, request: EngineRequest, outcome: Outcome) -> None:
        running = self._running.pop(request.request_id, None)
        if running is None:
            return
        job, adapter = running.job, running.adapter
        self.window.leave(job.adapter_version_id, job.tokens)
        slot_freed = self._slots.leave(job.adapter_version_id)
        self._count(job, outcome)
        if not isinstance(outcome, Aborted):
            seed = request.generation.body.get("seed")
            provenance = self._made_by(adapter.sha256 if adapter else None, seed)
            self._recorder.add(Finished(job, outcome, provenance, running.folded))
        elif request.request_id not in self._cancelled:
            self._cut_off.append(job)
        if self._cancelled:
            self._cancelled.discard(request.request_id)
        if not self._running:
            self._recorder.hurry()
            self.folding.wake()
        room = self._note_room()
        # while every waiting line lacks a slot, only a slot makes a look worth it
        if room >= self.window.least_chunk and (slot_freed or self._waiting is not Waiting.SLOT):
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

    def _note_room(self) -> int:
        """Tell the metrics and the held doorbell how full the window is; returns the room."""
        nothing = self._stopping or self.window.cache_full
        self._metrics.observe_running(
            len(self._running), Waiting.NOTHING if nothing else self._waiting
        )
        room = self.free
        if room > 0 or self._stopping:
            self._room.set()
        else:
            self._room.clear()
        return room
