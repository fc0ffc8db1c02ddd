"""What was used: tokens by tenant, adapter version and day. It outlives the jobs.

The finishing statement appends entries (db/finishing.py); the steward adds them to their days.
Both are summed when read, in one snapshot, so that nothing is missed or counted twice.
"""

from datetime import date

import asyncpg

from db.database import Database
from db.models import BASE_VERSION_ID


async def fold(database: Database, limit: int = 10_000) -> int:
    """Add up to `limit` entries to their days; returns how many. Any number may run."""
    folded: int = await database.fetch_value(_FOLD, limit)
    return folded


_FOLD = """
WITH taken AS (
    DELETE FROM usage_entries WHERE id IN (
        SELECT id FROM usage_entries ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING *
), summed AS (
    SELECT tenant_id, day, base_model_id, adapter_version_id, sum(jobs) AS jobs,
           sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens
    FROM taken GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
), added AS (
    INSERT INTO usage_days AS d (tenant_id, day, base_model_id, adapter_version_id, jobs,
                                 input_tokens, output_tokens)
    SELECT * FROM summed
    ON CONFLICT (tenant_id, day, base_model_id, adapter_version_id) DO UPDATE SET
        jobs = d.jobs + excluded.jobs,
        input_tokens = d.input_tokens + excluded.input_tokens,
        output_tokens = d.output_tokens + excluded.output_tokens
)
SELECT count(*) FROM taken
"""


async def report(
    database: Database, tenant_id: int, first: date, last: date
) -> list[asyncpg.Record]:
    """A tenant's use from `first` to `last`, both included, newest day first."""
    async with database.connection() as connection:
        return await connection.fetch(
            f"""
            WITH used AS (
                SELECT day, base_model_id, adapter_version_id, jobs, input_tokens, output_tokens
                FROM usage_days WHERE tenant_id = $1 AND day BETWEEN $2 AND $3
                UNION ALL
                SELECT day, base_model_id, adapter_version_id, jobs, input_tokens, output_tokens
                FROM usage_entries WHERE tenant_id = $1 AND day BETWEEN $2 AND $3
            )
            SELECT u.day, b.name AS base_model, a.name AS adapter, v.version,
                   sum(u.jobs)::bigint AS jobs, sum(u.input_tokens)::bigint AS input_tokens,
                   sum(u.output_tokens)::bigint AS output_tokens
            FROM used u
            JOIN base_models b ON b.id = u.base_model_id
            LEFT JOIN adapter_versions v
                ON v.id = u.adapter_version_id AND v.id <> {BASE_VERSION_ID}
            LEFT JOIN adapters a ON a.id = v.adapter_id
            GROUP BY u.day, b.name, a.name, v.version
            ORDER BY u.day DESC, b.name, a.name NULLS FIRST, v.version
            """,
            tenant_id,
            first,
            last,
        )
