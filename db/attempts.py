"""The history of a job's attempts: written where a job is queued again, read by its owner.

An attempt that ends its job leaves nothing here: `jobs` and `job_outputs` have it, and success
costs no row.
"""

from uuid import UUID

import asyncpg

from db.database import Database


def noted(source: str, outcome: str, error: str = "NULL") -> str:
    """A CTE that keeps the attempts of `source` (id, tenant_id, attempt, started_at) as history.

    Args:
        source: the name of the CTE that queued the jobs again; $1 is the worker.
        outcome: an SQL expression: released, retried, rescued or suspect.
        error: an SQL expression for what went wrong.
    """
    return f""", noted AS (
    INSERT INTO job_attempts (tenant_id, job_id, attempt, worker_id, started_at, outcome, error)
    SELECT tenant_id, id, attempt, $1, started_at, {outcome}, {error} FROM {source}
    ON CONFLICT DO NOTHING
)"""


async def list_attempts(
    database: Database, tenant_id: int, job_id: UUID, after: int, limit: int
) -> list[asyncpg.Record] | None:
    """A job's attempts behind number `after`, oldest first; None where the tenant has no such job.

    The last one may still be running; `ended_at` is null then.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(_LIST, tenant_id, job_id, after, limit)
        if rows or await connection.fetchval(_KNOWN, tenant_id, job_id):
            return rows
    return None


_KNOWN = "SELECT true FROM job_inputs WHERE tenant_id = $1 AND job_id = $2"

_LIST = """
WITH earlier AS (
    SELECT attempt, worker_id, started_at, ended_at, outcome, error, NULL::bool AS folded
    FROM job_attempts
    WHERE tenant_id = $1 AND job_id = $2
), last AS (
    SELECT j.attempt, coalesce(o.worker_id, j.lease_owner) AS worker_id, j.started_at,
           j.finished_at AS ended_at, j.state AS outcome, o.error_message AS error,
           o.folded
    FROM jobs j LEFT JOIN job_outputs o ON o.tenant_id = j.tenant_id AND o.job_id = j.id
    WHERE j.id = $2 AND j.tenant_id = $1 AND j.attempt > 0 AND j.state <> 'queued'
      AND NOT EXISTS (SELECT FROM earlier WHERE earlier.attempt = j.attempt)
)
SELECT * FROM (SELECT * FROM earlier UNION ALL SELECT * FROM last) every
WHERE attempt > $3 ORDER BY attempt LIMIT $4
"""
