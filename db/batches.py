"""Batches as the API sees them: read, list, cancel. They are made in db/batch_creation.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from db.database import Connection, Database
from db.rates import LIVE_RATES

_SELECT = """
SELECT b.*, b.metadata::text AS metadata_text, b.errors::text AS errors_text,
       f.newlines AS input_newlines
FROM batches b LEFT JOIN files f ON f.id = b.input_file_id
"""


async def get(database: Database, tenant_id: int, public_id: UUID) -> asyncpg.Record | None:
    """One batch of a tenant; None for another tenant's."""
    async with database.connection() as connection:
        return await connection.fetchrow(
            f"{_SELECT} WHERE b.tenant_id = $1 AND b.public_id = $2", tenant_id, public_id
        )


async def list_page(
    database: Database, tenant_id: int, after: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """A tenant's batches, newest first, from behind `after`: up to `limit` of them."""
    arguments: list[Any] = [tenant_id, limit]
    clause = ""
    if after is not None:
        arguments.append(after)
        clause = "AND b.public_id < $3"
    async with database.connection() as connection:
        return await connection.fetch(
            f"{_SELECT} WHERE b.tenant_id = $1 {clause} ORDER BY b.public_id DESC LIMIT $2",
            *arguments,
        )


async def cancel(database: Database, tenant_id: int, public_id: UUID) -> None:
    """Begin to cancel a batch; one that is finalizing or final stays as it is.

    This is the flag alone: a steward cancels the jobs, in steps.
    """
    async with database.connection() as connection:
        await connection.execute(
            """
            UPDATE batches SET status = 'cancelling', cancelling_at = now()
            WHERE tenant_id = $1 AND public_id = $2 AND status IN ('validating', 'in_progress')
              AND (ended_at IS NULL OR status = 'validating')
            """,
            tenant_id,
            public_id,
        )


async def cancel_open(connection: Connection, tenant_id: int, public_ids: Sequence[UUID]) -> None:
    """The same for several, in a transaction of the caller's; locked in the order of their ids."""
    await connection.execute(
        """
        WITH held AS MATERIALIZED (
            SELECT id FROM batches WHERE tenant_id = $1 AND public_id = ANY($2::uuid[])
            ORDER BY id FOR NO KEY UPDATE
        )
        UPDATE batches SET status = 'cancelling', cancelling_at = now()
        WHERE id IN (SELECT id FROM held) AND status IN ('validating', 'in_progress')
          AND (ended_at IS NULL OR status = 'validating')
        """,
        tenant_id,
        list(public_ids),
    )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a promise is made from: over the base models that a batch is for.

    Args:
        ahead: unfinished lines of older batches.
        jobs_per_second: what all live workers of these bases finish.
        workers: how many live workers there are.
    """

    ahead: int
    jobs_per_second: float
    workers: int


async def outlook(database: Database, tenant_id: int, public_id: UUID) -> Outlook:
    """The work ahead of a batch and the speed at which it is done.

    A batch that was not validated yet is taken to be for every base model.
    """
    async with database.connection() as connection:
        row = await connection.fetchrow(
            f"""
            WITH batch AS (
                SELECT id, base_model_ids FROM batches WHERE tenant_id = $1 AND public_id = $2
            ), bases AS (
                SELECT b.id FROM base_models b, batch
                WHERE batch.base_model_ids = '{{}}' OR b.id = ANY(batch.base_model_ids)
            )
            SELECT
                (SELECT coalesce(sum(o.total - o.completed - o.failed), 0)::bigint
                 FROM batches o, batch
                 WHERE o.id < batch.id AND o.status = 'in_progress'
                   AND (batch.base_model_ids = '{{}}'
                        OR o.base_model_ids && batch.base_model_ids)) AS ahead,
                (SELECT coalesce(sum(r.jobs_per_second), 0)::float8
                 FROM {LIVE_RATES} WHERE r.base_model_id IN (SELECT id FROM bases)) AS rate,
                (SELECT count(*)::int FROM workers w
                 WHERE w.base_model_id IN (SELECT id FROM bases) AND w.lost_at IS NULL
                   AND w.stopped_at IS NULL AND w.lease_expires_at > now()) AS workers
            """,
            tenant_id,
            public_id,
        )
    assert row is not None
    return Outlook(row["ahead"], row["rate"], row["workers"])
