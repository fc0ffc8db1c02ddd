"""Retention: what is past its time is deleted, in steps small enough to disturb nobody.

By an index on `finished_at` rather than by partitions: see
docs/decisions/0009-prune-by-index.md.
"""

from typing import Final

from db.database import Database

#: Jobs of one step: a few tens of milliseconds.
STEP_JOBS: Final = 500
#: Lines of a batch, likewise.
STEP_LINES: Final = 5000
#: How long the rows of workers that have ended stay, for those who look into what happened.
WORKER_DAYS: Final = 7


async def prune_finished(
    database: Database, retention_seconds: float, limit: int = STEP_JOBS
) -> int:
    """Delete jobs that finished longer ago than that, with all that belongs to them.

    One that its worker still has to abort stays until it has. Several pruners may run: each takes
    other rows.

    Returns:
        How many jobs were deleted, at most `limit`.
    """
    pruned: int = await database.fetch_value(_PRUNE, retention_seconds, limit)
    return pruned


# By ctid, as in a claim: the rows are locked. The others are found by their keys, of which both
# columns are given, so that no join reads a table.
_PRUNE = """
WITH past AS MATERIALIZED (
    SELECT ctid AS row FROM jobs
    WHERE finished_at < now() - make_interval(secs => $1) AND finished_at IS NOT NULL
      AND lease_owner IS NULL
      -- a batch's results are written from its jobs
      AND NOT EXISTS (SELECT FROM batches WHERE id = batch_id
                      AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))
    ORDER BY finished_at LIMIT $2
    FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM jobs WHERE ctid = ANY (ARRAY(SELECT row FROM past)) RETURNING id, tenant_id
), inputs AS (
    DELETE FROM job_inputs WHERE (tenant_id, job_id) IN (SELECT tenant_id, id FROM gone)
), outputs AS (
    DELETE FROM job_outputs WHERE (tenant_id, job_id) IN (SELECT tenant_id, id FROM gone)
), attempts AS (
    DELETE FROM job_attempts WHERE (tenant_id, job_id) IN (SELECT tenant_id, id FROM gone)
)
SELECT count(*) FROM gone
"""


async def prune_batches(
    database: Database, retention_seconds: float, limit: int = STEP_LINES
) -> bool:
    """Delete lines of a batch that ended longer ago than that, and in the end the batch.

    Its jobs finished before it did, so `prune_finished` takes them.

    Returns:
        Whether there was such a batch: then there may be more to do.
    """
    found: bool = await database.fetch_value(_PRUNE_BATCH, retention_seconds, limit)
    return found


_PRUNE_BATCH = """
WITH past AS MATERIALIZED (
    SELECT id FROM batches
    WHERE coalesce(completed_at, failed_at, expired_at, cancelled_at)
          < now() - make_interval(secs => $1)
    LIMIT 1 FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    DELETE FROM batch_lines WHERE (batch_id, line) IN (
        SELECT batch_id, line FROM batch_lines
        WHERE batch_id = (SELECT id FROM past) ORDER BY line LIMIT $2)
    RETURNING line
), steps AS (
    DELETE FROM batch_steps
    WHERE batch_id = (SELECT id FROM past) AND NOT EXISTS (SELECT FROM gone)
), batch AS (
    DELETE FROM batches WHERE id = (SELECT id FROM past) AND NOT EXISTS (SELECT FROM gone)
)
SELECT EXISTS (SELECT FROM past)
"""


async def prune_workers(database: Database) -> int:
    """Delete the rows of workers that ended long ago, and their rates; returns how many."""
    async with database.connection() as connection:
        status = await connection.execute(
            """
            DELETE FROM workers w
            WHERE coalesce(stopped_at, lost_at) < now() - make_interval(days => $1)
              AND NOT EXISTS (SELECT FROM jobs j WHERE j.lease_owner = w.id)
            """,
            WORKER_DAYS,
        )
    return int(status.split()[-1])
