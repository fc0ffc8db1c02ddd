"""A schedule's runs: read, asked for, passed over, pruned. The ticks make those that are due."""

from datetime import datetime
from uuid import UUID

import asyncpg

from core.errors import InvalidRequest
from core.ids import new_id
from db.database import Database
from db.schedule_lock import held
from db.schedule_ticks import rule_of

_RUNS = """
SELECT r.*, b.status AS batch_status, b.total, b.completed, b.failed
FROM schedule_runs r
LEFT JOIN batches b ON b.tenant_id = r.tenant_id AND b.public_id = r.batch_id
WHERE r.tenant_id = $1 AND r.schedule_id = $2
"""


async def list_runs(
    database: Database, tenant_id: int, schedule_id: UUID, after: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """A schedule's runs with their batches, latest firing first, from behind `after`."""
    async with database.connection() as connection:
        return await connection.fetch(
            f"""
            {_RUNS} AND ($4::uuid IS NULL OR r.fire_at < (
                SELECT fire_at FROM schedule_runs
                WHERE tenant_id = $1 AND schedule_id = $2 AND id = $4))
            ORDER BY r.fire_at DESC LIMIT $3
            """,
            tenant_id,
            schedule_id,
            limit,
            after,
        )


async def get_run(
    database: Database, tenant_id: int, schedule_id: UUID, run_id: UUID
) -> asyncpg.Record | None:
    """One run with its batch."""
    async with database.connection() as connection:
        return await connection.fetchrow(f"{_RUNS} AND r.id = $3", tenant_id, schedule_id, run_id)


async def run_now(
    database: Database, tenant_id: int, schedule_id: UUID, *, now: datetime | None = None
) -> UUID:
    """Make a run that is due at once, also of a paused schedule; returns its id.

    Raises NotFound.
    """
    async with held(database, tenant_id, schedule_id, now) as (connection, _, moment):
        made: UUID = await connection.fetchval(
            # the schedule is locked: a firing at this very microsecond is there already, or never
            """
            INSERT INTO schedule_runs (id, schedule_id, tenant_id, fire_at, due_at, trigger,
                                       created_at)
            SELECT $1, $2, $3, f.at, $4, 'manual', $4
            FROM (SELECT $4::timestamptz + n * interval '1 microsecond' AS at
                  FROM generate_series(0, 1000) n) f
            WHERE NOT EXISTS (SELECT FROM schedule_runs
                              WHERE schedule_id = $2 AND fire_at = f.at)
            ORDER BY f.at LIMIT 1
            RETURNING id
            """,
            new_id(),
            schedule_id,
            tenant_id,
            moment,
        )
    return made


async def skip_next(
    database: Database, tenant_id: int, schedule_id: UUID, *, now: datetime | None = None
) -> UUID:
    """Pass over the next firing: it is recorded as skipped now. Returns that run's id.

    Raises:
        NotFound: there is no such schedule.
        InvalidRequest: it has no next firing.
    """
    async with held(database, tenant_id, schedule_id, now) as (connection, row, moment):
        upcoming = row["next_fire_at"]
        if upcoming is None:
            raise InvalidRequest(
                "the schedule has no next firing to skip: it is paused, disabled or has ended"
            )
        made: UUID = await connection.fetchval(
            """
            INSERT INTO schedule_runs (id, schedule_id, tenant_id, fire_at, due_at, state, reason,
                                       created_at, finished_at)
            VALUES ($1, $2, $3, $4, $4, 'skipped', 'requested', $5, $5) RETURNING id
            """,
            new_id(),
            schedule_id,
            tenant_id,
            upcoming,
            moment,
        )
        await connection.execute(
            "UPDATE schedules SET next_fire_at = $2 WHERE id = $1",
            schedule_id,
            rule_of(row).next_after(upcoming),
        )
    return made


async def prune_runs(database: Database, retention_seconds: float, limit: int = 1000) -> int:
    """Delete runs, of every tenant, that ended longer ago than that; returns how many."""
    pruned: int = await database.fetch_value(
        """
        WITH gone AS (
            DELETE FROM schedule_runs WHERE id IN (
                SELECT id FROM schedule_runs
                WHERE finished_at < now() - make_interval(secs => $1) AND finished_at IS NOT NULL
                ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED)
            RETURNING 1
        )
        SELECT count(*) FROM gone
        """,
        retention_seconds,
        limit,
    )
    return pruned
