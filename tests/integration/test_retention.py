"""Retention: what is past its time goes, whole; nothing else does."""

import asyncio
import json
from pathlib import Path
from uuid import UUID

import pytest

from core.batch_results import result_line
from core.settings import Settings
from db import batch_lines, claims, jobs, results, retention, workers
from db.database import Database
from db.doorbell import Doorbell
from db.results import Result, RetryLater
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.api import PROMPT, assert_problem, running_api
from tests.support.batch_rows import make_batches
from tests.support.jobs import BASE, Bench, make_bench, states, submit
from workers.steward.duties import all_duties, prune_jobs

DAY = 86_400.0
TABLES = ("jobs", "job_inputs", "job_outputs", "job_attempts")


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=1)


async def finished(bench: Bench, count: int) -> list[UUID]:
    """Jobs that were tried twice and then succeeded."""
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    worker = await workers.register(bench.database, facts, 60)
    await submit(bench.database, BASE, count)
    line = Line(bench.base_model_id, 0, DEFAULT_TENANT_ID)
    first = await claims.claim(bench.database, worker, line, count)
    again = [RetryLater(job.id, job.attempt, 0.0, "x") for job in first]
    await results.retry_later(bench.database, worker, again)
    second = await claims.claim(bench.database, worker, line, count)
    done = [Result(job.id, job.attempt, response="{}") for job in second]
    return list(await results.record(bench.database, worker, done))


async def age(bench: Bench, ids: list[UUID], days: int) -> None:
    async with bench.database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET finished_at = now() - make_interval(days => $2) WHERE id = ANY($1)",
            ids,
            days,
        )


async def rows(bench: Bench) -> dict[str, int]:
    return {
        table: await bench.database.fetch_value(f"SELECT count(*) FROM {table}") for table in TABLES
    }


async def test_a_job_past_its_time_goes_with_all_that_belongs_to_it(bench: Bench) -> None:
    old, new = await finished(bench, 5), await finished(bench, 3)
    await submit(bench.database, BASE, 2)
    await age(bench, old, 40)
    await age(bench, new, 20)
    assert await retention.prune_finished(bench.database, 30 * DAY, limit=3) == 3
    assert await prune_jobs(bench.database, 30 * DAY) == 2
    assert await rows(bench) == {"jobs": 5, "job_inputs": 5, "job_outputs": 3, "job_attempts": 3}
    assert await states(bench.database) == {"succeeded": 3, "queued": 2}
    assert await prune_jobs(bench.database, 30 * DAY) == 0


async def test_pruners_at_once_take_each_row_once(bench: Bench) -> None:
    await age(bench, await finished(bench, 40), 40)
    steps = (retention.prune_finished(bench.database, DAY, limit=10) for _ in range(8))
    pruned = await asyncio.gather(*steps)
    assert sum(pruned) <= 40
    await prune_jobs(bench.database, DAY)
    assert set((await rows(bench)).values()) == {0}


async def test_a_cancelled_job_stays_until_its_worker_has_aborted_it(bench: Bench) -> None:
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    worker = await workers.register(bench.database, facts, 60)
    (job_id,) = await submit(bench.database, BASE)
    await claims.claim(bench.database, worker, Line(bench.base_model_id, 0, DEFAULT_TENANT_ID), 1)
    await jobs.cancel(bench.database, DEFAULT_TENANT_ID, job_id)
    await age(bench, [job_id], 1)
    assert await retention.prune_finished(bench.database, 1) == 0
    assert await workers.take_ended(bench.database, worker) == [(job_id, 1)]
    assert await retention.prune_finished(bench.database, 1) == 1


async def test_retention_zero_keeps_for_ever(bench: Bench, broker_url: str) -> None:
    await age(bench, await finished(bench, 2), 10_000)
    doorbell = Doorbell(broker_url)
    try:
        for seconds, left in ((0, 2), (DAY, 0)):
            settings = Settings(retention_seconds=seconds)
            duties = {d.name: d for d in all_duties(bench.database, doorbell, settings)}
            await duties["prune"].act()
            assert (await rows(bench))["jobs"] == left
    finally:
        doorbell.close()


async def test_a_repeat_whose_job_is_pruned_is_told_so(bench: Bench, database_url: str) -> None:
    async with running_api(database_url) as api:
        made = await api.submit(PROMPT, **{"Idempotency-Key": "k"})
        async with bench.database.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET state = 'expired', finished_at = now() - interval '1 day'"
            )
        assert await retention.prune_finished(bench.database, 60) == 1
        again = await api.submit(PROMPT, **{"Idempotency-Key": "k"})
        assert_problem(again, 404, made.json()["id"], "no longer kept", "new key")


async def test_a_batch_past_its_time_goes_with_its_lines(
    database: Database, tmp_path: Path
) -> None:
    _, (old, new) = await make_batches(database, tmp_path, lines=30)
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'cancelled', finished_at = now() - interval '40 days'"
        )
        await connection.execute("INSERT INTO batch_steps SELECT id, 0, '{1,2}' FROM batches")
        await connection.execute(
            "UPDATE batches SET failed = 30, ended_at = now(), status = 'completed',"
            " completed_at = now() - CASE id WHEN $1 THEN interval '40 days' ELSE '2 days' END",
            old,
        )
    steps = 0
    while await retention.prune_batches(database, 30 * DAY, limit=20):
        steps += 1
    assert steps == 3  # 20 lines, 10 lines, the batch
    for table in ("batch_lines", "batch_steps"):
        found = await database.fetch_value(f"SELECT array_agg(DISTINCT batch_id) FROM {table}")
        assert found == [new], table
    assert await database.fetch_value("SELECT array_agg(id) FROM batches") == [new]
    # jobs go by their own time; a line of the batch that stays says so
    await prune_jobs(database, 30 * DAY)
    (row, *_) = await batch_lines.as_finished(database, new, 1, 0)
    assert json.loads(result_line(row))["error"]["code"] == "not_kept"


async def test_jobs_of_an_open_batch_stay(database: Database, tmp_path: Path) -> None:
    await make_batches(database, tmp_path, lines=30)
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'cancelled', finished_at = now() - interval '40 days'"
        )
    assert await retention.prune_finished(database, DAY) == 0
    assert not await retention.prune_batches(database, DAY)


async def test_workers_long_gone_are_forgotten(bench: Bench) -> None:
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    live, stopped, lost, old = [await workers.register(bench.database, facts, 60) for _ in range(4)]
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE workers SET stopped_at = now() WHERE id = $1", stopped)
        await connection.execute(
            "UPDATE workers SET lost_at = now() - interval '8 days' WHERE id = $1", lost
        )
        await connection.execute(
            "UPDATE workers SET stopped_at = now() - interval '8 days' WHERE id = $1", old
        )
    assert await retention.prune_workers(bench.database) == 2
    left = await bench.database.fetch_value("SELECT array_agg(id ORDER BY id) FROM workers")
    assert left == [live, stopped]
