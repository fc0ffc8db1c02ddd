"""Deliveries as their tenant sees them: the log, replays; and how the log is pruned."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from db.database import Database

#: Deliveries of one step that replays or prunes.
STEP: Final = 1000


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """What a list of deliveries is narrowed by."""

    endpoint_id: UUID | None = None
    state: str | None = None
    subject: str | None = None


_COLUMNS = """id, tenant_id, endpoint_id, url, event_id, type, subject, told, state, due_at,
       created_at, finished_at, attempt, failures, last_status, last_error"""


async def list_page(
    database: Database, tenant_id: int, filters: DeliveryFilter, after: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """A tenant's deliveries, newest first, from behind `after`: up to `limit` of them."""
    clauses, arguments = ["tenant_id = $1"], [tenant_id, limit]
    for column, value in (
        ("endpoint_id =", filters.endpoint_id),
        ("state =", filters.state),
        ("subject =", filters.subject),
        ("id <", after),
    ):
        if value is not None:
            arguments.append(value)  # type: ignore[arg-type]
            clauses.append(f"{column} ${len(arguments)}")
    statement = (
        f"SELECT {_COLUMNS} FROM deliveries WHERE {' AND '.join(clauses)} ORDER BY id DESC LIMIT $2"
    )
    async with database.connection() as connection:
        return await connection.fetch(statement, *arguments)


async def get(database: Database, tenant_id: int, delivery_id: UUID) -> asyncpg.Record | None:
    """One delivery of a tenant; None for another tenant's."""
    async with database.connection() as connection:
        return await connection.fetchrow(
            f"SELECT {_COLUMNS} FROM deliveries WHERE tenant_id = $1 AND id = $2",
            tenant_id,
            delivery_id,
        )


async def attempts(
    database: Database, tenant_id: int, deliveries: Sequence[UUID]
) -> dict[UUID, list[asyncpg.Record]]:
    """The attempts of these deliveries, oldest first, by delivery."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT delivery_id, attempt, started_at, seconds, status, error, response
            FROM delivery_attempts WHERE delivery_id = ANY($2::uuid[]) AND tenant_id = $1
            ORDER BY delivery_id, attempt
            """,
            tenant_id,
            list(deliveries),
        )
    found: dict[UUID, list[asyncpg.Record]] = {each: [] for each in deliveries}
    for row in rows:
        found[row["delivery_id"]].append(row)
    return found


_REPLAYED = """state = 'pending', due_at = now(), owed_at = now(), failures = 0,
            finished_at = NULL"""
#: Who asks for it wants it now: a line that is held back is tried at once.
_UNBLOCKED: Final = """, unblocked AS (
    UPDATE webhook_circuits SET blocked_until = NULL WHERE line IN (SELECT line FROM replayed)
)"""


async def replay(database: Database, tenant_id: int, delivery_id: UUID) -> bool:
    """Owe a delivery once more, under its old event id; one that waits for a retry is due now.

    Returns:
        False where the tenant has no such delivery.
    """
    found: bool | None = await database.fetch_value(
        f"""
        WITH known AS (
            SELECT true FROM deliveries WHERE tenant_id = $1 AND id = $2
        ), replayed AS (
            UPDATE deliveries SET {_REPLAYED}
            WHERE tenant_id = $1 AND id = $2
              -- one without failures waits for its first try, or is being sent
              AND NOT (state = 'pending' AND failures = 0)
            RETURNING line
        ){_UNBLOCKED}
        SELECT true FROM known
        """,
        tenant_id,
        delivery_id,
    )
    return bool(found)


async def replay_failed(
    database: Database, tenant_id: int, endpoint_id: UUID | None, since: datetime
) -> int:
    """Owe every delivery once more that failed for good since then; returns how many.

    Args:
        endpoint_id: of one endpoint alone; None for all of the tenant's.
        since: compared with when it failed, aware.
    """
    replayed = 0
    while True:
        step: int = await database.fetch_value(
            f"""
            WITH failed AS MATERIALIZED (
                SELECT id FROM deliveries
                WHERE tenant_id = $1 AND ($2::uuid IS NULL OR endpoint_id = $2)
                  AND state = 'failed' AND finished_at >= $3
                ORDER BY id LIMIT $4
                FOR NO KEY UPDATE
            ), replayed AS (
                UPDATE deliveries SET {_REPLAYED}
                WHERE id = ANY(ARRAY(SELECT id FROM failed)) AND state = 'failed'
                RETURNING line
            ){_UNBLOCKED}
            SELECT count(*)::int FROM replayed
            """,
            tenant_id,
            endpoint_id,
            since,
            STEP,
        )
        replayed += step
        if step < STEP:
            return replayed


async def prune(database: Database, retention_seconds: float) -> int:
    """Delete deliveries that ended longer ago than that, with their attempts; returns how many.

    Their ids rise with time, so the oldest are read first, by the primary key.
    """
    return int(await database.fetch_value(_PRUNE, retention_seconds, STEP))


_PRUNE = """
WITH past AS MATERIALIZED (
    SELECT id FROM deliveries
    WHERE id < (lpad(to_hex((extract(epoch FROM now() - make_interval(secs => $1)) * 1000)::bigint),
                     12, '0') || repeat('0', 20))::uuid
      AND finished_at < now() - make_interval(secs => $1)
    ORDER BY id LIMIT $2
    FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM deliveries WHERE id = ANY(ARRAY(SELECT id FROM past)) RETURNING id
), attempts AS (
    DELETE FROM delivery_attempts WHERE delivery_id = ANY(ARRAY(SELECT id FROM gone))
)
SELECT count(*)::int FROM gone
"""


async def prune_leftovers(database: Database) -> None:
    """Delete secrets that have expired, and circuits of lines that nobody has used for long."""
    async with database.connection() as connection:
        await connection.execute("DELETE FROM webhook_secrets WHERE expires_at < now()")
        await connection.execute(
            "DELETE FROM webhook_circuits WHERE failed_at < now() - interval '10 days'"
        )
