"""The lease's heartbeat, and its end."""

import asyncio
from pathlib import Path

from db import workers
from db.database import Database
from db.workers import WorkerFacts
from tests.support.cores import QUICK
from tests.support.jobs import make_bench
from workers.drain.lease import Lease


class _HeldBeat(Lease):
    """Answers a beat when it is told to."""

    def __init__(self, database: Database, worker_id: int) -> None:
        super().__init__(database, worker_id, QUICK, progress=lambda: 0, busy=lambda: False)
        self.begun = asyncio.Event()
        self.answer = asyncio.Event()

    async def renew(self) -> None:
        await super().renew()
        self.begun.set()
        await self.answer.wait()


async def test_a_beat_answered_as_its_worker_stops_is_the_last_one(
    database: Database, tmp_path: Path
) -> None:
    """A sign-off locks the row that a beat waits for, so that both are answered at once. A beat
    that swallowed the cancellation would go on for ever, with a worker that never ends."""
    bench = await make_bench(database, tmp_path, 1)
    facts = WorkerFacts(bench.base_model_id, "test", 1, "simulated", "1", {})
    lease = _HeldBeat(database, await workers.register(database, facts, 60))
    beating = asyncio.create_task(lease.run())
    await lease.begun.wait()
    lease.answer.set()
    beating.cancel()
    await asyncio.wait([beating], timeout=10)
    assert beating.cancelled()
