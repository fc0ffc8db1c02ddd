"""EXPLAIN tests of schedules: a tick reads what is due, however much else there is."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from db import schedule_firing, schedule_outcomes, schedule_runs, schedule_ticks, schedules
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.plans import PLANS, explained
from tests.support.schedules import Timeline, stored_file
from tests.support.servers import PostgresServer

SCHEDULES, RUNS_EACH, LIMIT = 10_000, 5, 20

_SCHEDULES = """
INSERT INTO schedules (id, tenant_id, name, every_seconds, timezone, anchor_at, dst_gap, dst_fold,
                       input_file_id, endpoint, completion_window, window_seconds, skip_invalid,
                       missed, catch_up_seconds, overlap, pause_after_failures, jitter_seconds,
                       enabled, next_fire_at)
SELECT uuidv7(), 1, 's' || n, 86400, 'UTC', $1::timestamptz, 'after', 'first', $2,
       '/v1/chat/completions', '24h', 86400, false, 'latest', 604800,
       CASE WHEN n % 2 = 0 THEN 'allow' ELSE 'queue' END, 10, 0, true,
       $1::timestamptz + make_interval(secs => n)
FROM generate_series(1, $3::int) n
"""
#: Runs that ended, one that waits in the future, and one in a hundred that waits for another.
_RUNS = """
INSERT INTO schedule_runs (id, schedule_id, tenant_id, fire_at, due_at, state, reason, finished_at)
SELECT uuidv7(), s.id, 1, $1::timestamptz - n * interval '1 day',
       $1::timestamptz - n * interval '1 day', 'skipped', 'missed', $1
FROM schedules s, generate_series(1, $2::int) n
UNION ALL
SELECT uuidv7(), s.id, 1, $1::timestamptz + interval '30 days',
       $1::timestamptz + interval '30 days', 'pending', NULL, NULL FROM schedules s
"""


@pytest.fixture(scope="module")
async def many(postgres: PostgresServer, template: str) -> AsyncIterator[Timeline]:
    postgres.create_database("schedule_plans", template)
    async with Database.connect(postgres.url("schedule_plans")) as database:
        clock = Timeline(database, datetime.now(UTC) - timedelta(days=1))
        file_id = await stored_file(database)
        async with database.connection() as connection:
            await connection.execute(_SCHEDULES, clock.now, file_id, SCHEDULES)
            await connection.execute(_RUNS, clock.now, RUNS_EACH)
            await connection.execute("VACUUM ANALYZE")
        yield clock
    postgres.drop_database("schedule_plans")


@pytest.mark.parametrize("mode", PLANS)
async def test_a_tick_reads_what_is_due(many: Timeline, mode: str) -> None:
    now = many.now + timedelta(seconds=1000)
    async with explained(many.database, mode) as plans:
        assert await schedule_ticks.tick(many.database, now=now, limit=LIMIT) == LIMIT
    looks = plans[0]
    assert looks.indexes("schedules") == {"ix_schedules_next_fire_at"}
    assert looks.scanned("schedules") <= LIMIT
    assert plans[1].scanned("schedules") <= 2 * LIMIT


@pytest.mark.parametrize("mode", PLANS)
async def test_a_look_at_nothing_costs_nothing(many: Timeline, mode: str) -> None:
    async with explained(many.database, mode) as plans:
        assert await schedule_ticks.tick(many.database, now=many.now) == 0
        assert await schedule_firing.fire(many.database, now=many.now) == 0
        assert await schedule_outcomes.finish_ended(many.database) == 0
        assert await schedule_outcomes.count_ends(many.database) == 0
        assert await schedule_outcomes.wake_queued(many.database) == 0
        assert await schedule_runs.prune_runs(many.database, 86_400 * 30) == 0
        await schedule_ticks.seconds_to_next(many.database)
    for plan in plans:
        assert plan.scanned("schedules") <= 2, plan.statement
        assert plan.scanned("schedule_runs") <= 2, plan.statement


@pytest.mark.parametrize("mode", PLANS)
async def test_a_firing_reads_its_own_runs(many: Timeline, mode: str) -> None:
    async with many.database.connection() as connection:
        await connection.execute(
            "UPDATE schedule_runs SET due_at = $1 WHERE id IN (SELECT id FROM schedule_runs"
            " WHERE state = 'pending' AND due_at > $1 LIMIT 200)",
            many.now,
        )
    async with explained(many.database, mode) as plans:
        assert await schedule_firing.fire(many.database, now=many.now, limit=LIMIT) == LIMIT
    claim = plans[0]
    assert None not in claim.indexes("schedule_runs")
    # each is looked at with its schedule's other open runs
    assert claim.scanned("schedule_runs") <= 6 * 200
    assert claim.scanned("schedules") <= 2 * 200
    async with many.database.connection() as connection:
        await connection.execute(
            "UPDATE schedule_runs SET due_at = fire_at WHERE state = 'pending'"
        )


@pytest.mark.parametrize("mode", PLANS)
async def test_a_page_of_runs_reads_a_page(many: Timeline, mode: str) -> None:
    (row,) = await schedules.list_page(many.database, DEFAULT_TENANT_ID, None, 1)
    async with explained(many.database, mode) as plans:
        found = await schedule_runs.list_runs(many.database, DEFAULT_TENANT_ID, row["id"], None, 3)
    assert len(found) == 3
    # the second is the cursor's, which is not given here
    assert plans[0].indexes("schedule_runs") <= {"uq_schedule_runs_firing", "pk_schedule_runs"}
    assert plans[0].scanned("schedule_runs") <= 3
