"""Many stewards over many schedules: every firing once, whoever ticks."""

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from db import schedule_firing, schedule_runs, schedule_ticks, schedules
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.scale import Scale
from tests.support.schedules import Timeline, batches_of, stored_file
from workers.steward.schedules import follow, tick_and_fire

STEWARDS = 10
#: A thousand schedules over a file that is there, as `db.schedules.create` writes them.
_MANY = """
INSERT INTO schedules (id, tenant_id, name, every_seconds, timezone, anchor_at, dst_gap, dst_fold,
                       input_file_id, endpoint, completion_window, window_seconds, skip_invalid,
                       missed, catch_up_seconds, overlap, pause_after_failures, jitter_seconds,
                       enabled, next_fire_at)
SELECT gen_random_uuid(), 1, 'many-' || n, 3600, 'UTC', $1::timestamptz, 'after', 'first', $2,
       '/v1/chat/completions', '24h', 86400, false, $3, 604800, $4, 10, 0, true,
       $1::timestamptz + interval '1 hour'
FROM generate_series(1, $5::int) n
"""


async def many(clock: Timeline, count: int, missed: str = "latest", overlap: str = "allow") -> None:
    file_id = await stored_file(clock.database)
    async with clock.database.connection() as connection:
        await connection.execute(_MANY, clock.now, file_id, missed, overlap, count)


@pytest.fixture
def clock(database: Database) -> Timeline:
    return Timeline(database, datetime(2027, 5, 1, 12, tzinfo=UTC))


async def all_at_once(url: str, clock: Timeline) -> int:
    """Ten stewards, each with connections of its own, tick at the same moment."""
    async with AsyncExitStack() as stack:
        pools = [
            await stack.enter_async_context(Database.connect(url, max_size=2))
            for _ in range(STEWARDS)
        ]
        return sum(await asyncio.gather(*(tick_and_fire(each, clock.now) for each in pools)))


async def test_ten_stewards_over_a_thousand_due_schedules(
    clock: Timeline, database_url: str
) -> None:
    await many(clock, 1000)
    clock.later(hours=1)
    assert await all_at_once(database_url, clock) == 1000
    found = await clock.database.fetch_value(
        "SELECT count(DISTINCT schedule_id) FROM schedule_runs WHERE state = 'started'"
    )
    assert found == await clock.database.fetch_value("SELECT count(*) FROM schedule_runs") == 1000
    assert await batches_of(clock.database) == {"validating": 1000}
    keys = await clock.database.fetch_value(
        "SELECT count(*) FROM idempotency_keys k JOIN schedule_runs r"
        " ON k.key = 'run_' || replace(r.id::text, '-', '') AND k.resource_id = r.batch_id"
    )
    assert keys == 1000


@pytest.mark.parametrize("overlap", ["skip", "queue", "cancel_previous"])
async def test_stewards_at_once_keep_runs_of_one_schedule_from_overlapping(
    clock: Timeline, database_url: str, overlap: str
) -> None:
    await many(clock, 30, missed="all", overlap=overlap)
    clock.later(hours=5)
    await all_at_once(database_url, clock)
    async with clock.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT r.schedule_id, count(*) FILTER (WHERE r.state = 'started'"
            " AND b.status = 'validating') AS live, count(*) AS runs FROM schedule_runs r"
            " LEFT JOIN batches b ON b.tenant_id = r.tenant_id AND b.public_id = r.batch_id"
            " GROUP BY 1"
        )
    assert [(row["live"], row["runs"]) for row in rows] == [(1, 5)] * 30


async def test_edits_pauses_and_ticks_at_once_deadlock_nobody(
    clock: Timeline, database_url: str, scale: Scale
) -> None:
    await many(clock, 40, missed="all", overlap="queue")
    async with clock.database.connection() as connection:
        ids = [row["id"] for row in await connection.fetch("SELECT id FROM schedules")]
        await connection.execute("UPDATE schedules SET pause_after_failures = 2")
    failed: list[BaseException] = []

    async def steward() -> None:
        async with Database.connect(database_url, max_size=2) as own:
            for _ in range(scale(6, 60)):
                try:
                    await tick_and_fire(own, clock.now)
                    await follow(own, clock.now)
                except asyncpg.DeadlockDetectedError as error:
                    failed.append(error)

    async def user(number: int) -> None:
        async with Database.connect(database_url, max_size=2) as own:
            for turn in range(scale(6, 60)):
                for act in (schedule_runs.run_now, schedules.pause, schedules.resume):
                    chosen = ids[(7 * turn + number) % len(ids)]
                    await act(own, DEFAULT_TENANT_ID, chosen, now=clock.now)
                clock.now += timedelta(minutes=20)
                if turn % 3 == 0:
                    await clock.end_batches("failed" if number else "completed")

    await asyncio.gather(*(steward() for _ in range(4)), *(user(n) for n in range(3)))
    assert failed == []
    await batches_of(clock.database)


async def test_a_run_that_cannot_be_made_fails_alone(clock: Timeline) -> None:
    await many(clock, 3)
    clock.later(hours=1)
    await schedule_ticks.tick(clock.database, now=clock.now)
    async with clock.database.connection() as connection:
        await connection.execute(
            "INSERT INTO idempotency_keys (tenant_id, route, key, fingerprint, resource_id)"
            " SELECT tenant_id, 'POST /v1/batches', 'run_' || replace(id::text, '-', ''), '', id"
            " FROM schedule_runs LIMIT 1"
        )
    assert await schedule_firing.fire(clock.database, now=clock.now) == 3
    states = await clock.database.fetch_value(
        "SELECT array_agg(state ORDER BY state) FROM schedule_runs"
    )
    assert states == ["failed", "started", "started"]
    await batches_of(clock.database)
