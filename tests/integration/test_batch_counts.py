"""Counts, usage and the cursor of results hold under concurrent recorders, cancels and expiry."""

import asyncio
import random
from datetime import date
from pathlib import Path

import asyncpg
import pytest

from core.batch_status import TRANSITIONS, BatchStatus
from core.errors import Unavailable
from db import batch_lines, claims, jobs, maintenance, results, usage, workers
from db.database import Database
from db.results import Result
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.batch_rows import make_batches
from tests.support.waiting import eventually

LINES = 1500


async def record_all(database: Database, base_model_id: int, seed: int) -> None:
    """A worker that claims, fails some and records in flushes of odd sizes, to the end."""
    chance = random.Random(seed)
    facts = WorkerFacts(base_model_id, "test", seed, "simulated", "1", {})
    worker_id = await workers.register(database, facts, 600)
    line = Line(base_model_id, 0, 1)
    while claimed := await claims.claim(database, worker_id, line, chance.randint(1, 80)):
        chance.shuffle(claimed)
        flush = [
            Result(job.id, job.attempt, error_code="engine_error", error_message="no")
            if chance.random() < 0.2
            else Result(job.id, job.attempt, '{"a": 1}', None, None, 3, 2, 1)
            for job in claimed
        ]
        while True:
            try:
                await results.record(database, worker_id, flush)
                break
            except Unavailable as error:  # by Postgres: a deadlock
                raise AssertionError("two recorders waited for each other") from error


async def end_others(database: Database, ids: list[int]) -> None:
    """Cancel some jobs one by one, and let others run out of time."""
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT id FROM jobs WHERE batch_line % 7 = 0")
        for row in rows:
            await jobs.cancel(database, 1, row["id"])
        await connection.execute(
            "UPDATE jobs SET deadline = now() WHERE deadline IS NOT NULL AND finished_at IS NULL"
        )
    while await maintenance.expire_due(database, 50):
        pass


async def follow(database: Database, batch_id: int) -> list[int]:
    """Read the results of a batch as they come, until all are there."""
    read: list[int] = []
    while len(read) < LINES:
        page = await batch_lines.as_finished(database, batch_id, 1, len(read), 97)
        read += [row["line"] for row in page]
        await asyncio.sleep(0)
    return read


async def test_counts_add_up_and_the_cursor_never_skips(database_url: str, tmp_path: Path) -> None:
    async with Database.connect(database_url, max_size=12) as database:
        base_model_id, ids = await make_batches(database, tmp_path)
        followers = [asyncio.create_task(follow(database, batch_id)) for batch_id in ids]
        await asyncio.gather(
            *(record_all(database, base_model_id, seed) for seed in range(5)),
            end_others(database, ids),
        )
        for follower in followers:
            read = await asyncio.wait_for(follower, 30)
            assert sorted(read) == list(range(1, LINES + 1))
        async with database.connection() as connection:
            batches = await connection.fetch("SELECT * FROM batches ORDER BY id")
            for batch in batches:
                rows = await connection.fetch(
                    "SELECT state, count(*) AS jobs FROM jobs WHERE batch_id = $1 GROUP BY 1",
                    batch["id"],
                )
                states = {row["state"]: row["jobs"] for row in rows}
                assert batch["completed"] == states["succeeded"]
                assert batch["failed"] == LINES - states["succeeded"]
                assert batch["expired"] == states.get("expired", 0)
                assert batch["output_tokens"] == 2 * states["succeeded"]
                assert batch["cached_tokens"] == states["succeeded"]
                assert batch["ended_at"] is not None
                steps = await connection.fetch(
                    "SELECT position, cardinality(lines) AS lines FROM batch_steps"
                    " WHERE batch_id = $1 ORDER BY position",
                    batch["id"],
                )
                ends = [step["position"] + step["lines"] for step in steps]
                assert [step["position"] for step in steps] == [0, *ends[:-1]]
        used = await usage.report(database, 1, date(2000, 1, 1), date(2100, 1, 1))
        completed = sum(batch["completed"] for batch in batches)
        assert sum(row["jobs"] for row in used) == completed
        # the same before, while and after the entries are added to their days
        await asyncio.gather(*(usage.fold(database, 7) for _ in range(4)))
        assert await usage.report(database, 1, date(2000, 1, 1), date(2100, 1, 1)) == used
        while await usage.fold(database):
            pass
        assert await usage.report(database, 1, date(2000, 1, 1), date(2100, 1, 1)) == used


async def test_jobs_without_a_batch_touch_none(database: Database, tmp_path: Path) -> None:
    base_model_id, _ = await make_batches(database, tmp_path)
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET batch_id = NULL, batch_line = NULL")
    await record_all(database, base_model_id, 1)
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT sum(completed + failed) FROM batches") == 0
        assert await connection.fetchval("SELECT count(*) FROM batch_steps") == 0


@pytest.mark.parametrize(
    "impossible",
    [
        "completed = total + 1",
        "completed = -1",
        "expired = 1",
        "ended_at = now()",
        "status = 'completed', completed_at = now()",
        "status = 'finalizing'",
        "status = 'cancelled', cancelled_at = now(), cancelling_at = now()",
        "status = 'cancelling'",
        "status = 'failed', failed_at = now()",
        "status = 'done'",
    ],
)
async def test_postgres_refuses_impossible_batches(
    database: Database, tmp_path: Path, impossible: str
) -> None:
    await make_batches(database, tmp_path)
    async with database.connection() as connection:
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE batches SET {impossible}")


async def test_batches_are_locked_in_the_order_of_their_ids(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """Whoever waits for the first holds none behind it: so nobody waits in a circle."""
    base_model_id, (first, second) = await make_batches(database, tmp_path, lines=5)
    facts = WorkerFacts(base_model_id, "test", 1, "simulated", "1", {})
    worker_id = await workers.register(database, facts, 600)
    claimed = await claims.claim(database, worker_id, Line(base_model_id, 0, 1), 100)
    answers = [Result(job.id, job.attempt, "{}") for job in claimed]
    lock = "SELECT id FROM batches WHERE id = $1 FOR NO KEY UPDATE NOWAIT"
    async with database.connection() as connection:
        # the first one's row lies behind the other's now, and tables are read as they lie: a plan
        # that came by the ids anyhow would prove nothing
        await connection.execute("UPDATE batches SET model = 'm' WHERE id = $1", first)
        name = await connection.fetchval("SELECT current_database()")
        for way in ("indexscan", "bitmapscan", "mergejoin", "nestloop"):
            await connection.execute(f'ALTER DATABASE "{name}" SET enable_{way} = off')

    async def waits() -> bool:
        return bool(
            await database.fetch_value(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
        )

    async with Database.connect(database_url, max_size=1) as scanning:
        async with database.transaction() as holder:
            await holder.execute(lock, first)
            recording = asyncio.create_task(results.record(scanning, worker_id, answers))
            await eventually(waits, "the recorder to wait for the first batch")
            async with database.connection() as connection:
                await connection.execute(lock, second)
        assert len(await recording) == 10


@pytest.mark.parametrize(("window_ended", "status"), [(False, "finalizing"), (True, "in_progress")])
async def test_only_the_window_makes_a_batch_expired(
    database: Database, tmp_path: Path, window_ended: bool, status: str
) -> None:
    """A line may have a deadline of its own: then it has failed alone."""
    base_model_id, (batch_id,) = await make_batches(database, tmp_path, batches=1, lines=20)
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET deadline = now() WHERE deadline IS NOT NULL")
        if window_ended:
            await connection.execute("UPDATE batches SET expires_at = now()")
    assert await maintenance.expire_due(database) == 2
    await record_all(database, base_model_id, 1)
    async with database.connection() as connection:
        batch = await connection.fetchrow("SELECT * FROM batches WHERE id = $1", batch_id)
    assert batch is not None
    assert (batch["status"], batch["expired"]) == (status, 2)
    assert batch["ended_at"] is not None


async def test_a_page_holds_few_long_answers_and_none_is_skipped(
    database: Database, tmp_path: Path
) -> None:
    base_model_id, (batch_id,) = await make_batches(database, tmp_path, batches=1, lines=60)
    facts = WorkerFacts(base_model_id, "test", 1, "simulated", "1", {})
    worker_id = await workers.register(database, facts, 600)
    claimed = await claims.claim(database, worker_id, Line(base_model_id, 0, 1), 100)
    noise = random.Random(1)
    answers = [
        Result(job.id, job.attempt, f'"{noise.randbytes(250_000).hex()}"') for job in claimed
    ]
    await results.record(database, worker_id, answers)
    for read in (batch_lines.in_order, batch_lines.as_finished):
        seen: list[int] = []
        pages = 0
        while page := await read(database, batch_id, 1, len(seen)):
            seen += [row["line"] for row in page]
            pages += 1
            assert sum(len(row["response"]) for row in page) <= 3 * batch_lines.PAGE_BYTES
        assert sorted(seen) == list(range(1, 61))
        assert pages >= 5


def test_final_statuses_lead_nowhere() -> None:
    assert {status for status in BatchStatus if status.is_final} == {
        BatchStatus.COMPLETED,
        BatchStatus.FAILED,
        BatchStatus.EXPIRED,
        BatchStatus.CANCELLED,
    }
    assert set(TRANSITIONS) == set(BatchStatus)
