"""The lock on a schedule, under which it is changed or asked for something."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

import asyncpg

from core.errors import NotFound
from db.database import Connection, Database
from db.schedule_ticks import RULE_COLUMNS, bear


@asynccontextmanager
async def held(
    database: Database, tenant_id: int, schedule_id: UUID, now: datetime | None
) -> AsyncIterator[tuple[Connection, asyncpg.Record, datetime]]:
    """A transaction that holds a schedule's row, with all that was due made into runs."""
    async with database.transaction() as connection:
        row = await lock(connection, tenant_id, schedule_id)
        # read under the lock: a later time than that of any tick that came before
        moment = now or await connection.fetchval("SELECT clock_timestamp()")
        if row["next_fire_at"] is not None and row["next_fire_at"] <= moment:
            await bear(connection, [row], moment)
            row = await lock(connection, tenant_id, schedule_id)
        yield connection, row, moment


async def lock(connection: Connection, tenant_id: int, schedule_id: UUID) -> asyncpg.Record:
    row = await connection.fetchrow(
        f"SELECT {RULE_COLUMNS}, s.enabled, s.paused_at FROM schedules s"
        " WHERE s.tenant_id = $1 AND s.id = $2 FOR UPDATE",
        tenant_id,
        schedule_id,
    )
    if row is None:
        raise NotFound("the schedule does not exist any more", field="id")
    return row
