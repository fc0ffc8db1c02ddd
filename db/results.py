"""Recording: the fenced writes that finish jobs, or queue them for another try."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from db.attempts import noted
from db.database import Database
from db.finishing import CONSEQUENCES, FINISHED
from db.waiting import Line, ensure_waiting


class Result(NamedTuple):
    """What became of one attempt. `response` is JSON text; either it or the error is given."""

    id: UUID
    attempt: int
    response: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    folded: bool = False


@dataclass(frozen=True, slots=True)
class RetryLater:
    """An attempt that failed and is to be tried again after a delay."""

    id: UUID
    attempt: int
    delay_seconds: float
    error: str


async def record(database: Database, worker_id: int, results: Sequence[Result]) -> set[UUID]:
    """Finish jobs in one statement: rows and answers, written only where the fence holds.

    Rows are locked in id order, so that two recorders of overlapping sets never deadlock.

    Returns:
        The ids that were recorded. The others were cancelled, expired or rescued meanwhile: their
        results are dropped.

    Raises:
        asyncpg.DataError: a row that Postgres cannot store; nothing was recorded.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            RECORD,
            worker_id,
            [r.id for r in results],
            [r.attempt for r in results],
            [r.response for r in results],
            [r.error_code for r in results],
            [r.error_message for r in results],
            [r.prompt_tokens for r in results],
            [r.completion_tokens for r in results],
            [r.cached_tokens for r in results],
            [r.folded for r in results],
        )
    return {row["id"] for row in rows}


# The results travel along from step to step, so that they are joined with the table only once.
# Every read of `jobs` is by primary key. The owner is compared such that no index serves it: by
# ix_jobs_owned Postgres would wade through the entries of every job this worker ever ran.
RECORD = f"""
WITH result AS MATERIALIZED (
    SELECT * FROM unnest($2::uuid[], $3::int[], $4::text[], $5::text[], $6::text[],
                         $7::int[], $8::int[], $9::int[], $10::bool[])
        AS r(id, attempt, response, error_code, error_message, prompt_tokens, completion_tokens,
             cached_tokens, folded)
), fenced AS MATERIALIZED (
    SELECT id, attempt FROM jobs
    WHERE id = ANY($2::uuid[]) AND lease_owner IS NOT DISTINCT FROM $1 AND state = 'running'
    ORDER BY id
    FOR NO KEY UPDATE
), finished AS (
    UPDATE jobs SET
        state = CASE WHEN r.error_code IS NULL THEN 'succeeded' ELSE 'failed' END,
        failures = failures + CASE WHEN r.error_code IS NULL THEN 0 ELSE 1 END,
        finished_at = now(),
        lease_owner = NULL
    FROM result r
    WHERE jobs.id = ANY(ARRAY(SELECT id FROM fenced)) AND jobs.id = r.id
      AND jobs.attempt = r.attempt
    RETURNING {FINISHED}, r.response, r.error_code, r.error_message,
              r.prompt_tokens, r.completion_tokens, r.cached_tokens, r.folded
), answered AS (
    INSERT INTO job_outputs (tenant_id, job_id, response, error_code, error_message,
                             prompt_tokens, completion_tokens, worker_id, folded)
    SELECT tenant_id, id, response::json, error_code, error_message,
           prompt_tokens, completion_tokens, $1, folded
    FROM finished
){CONSEQUENCES}
SELECT id FROM finished
"""


async def retry_later(
    database: Database, worker_id: int, retries: Sequence[RetryLater]
) -> set[UUID]:
    """Queue failed attempts again, each after its delay, where the fence holds; returns ids.

    An attempt that failed has not killed its engine: a suspect is cleared by it.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(
            _RETRY_LATER,
            worker_id,
            [r.id for r in retries],
            [r.attempt for r in retries],
            [r.delay_seconds for r in retries],
            [r.error for r in retries],
        )
        lines = {
            Line(row["base_model_id"], row["adapter_version_id"], row["tenant_id"]) for row in rows
        }
        await ensure_waiting(connection, lines)
    return {row["id"] for row in rows}


_RETRY_LATER = f"""
WITH retried AS (
    UPDATE jobs SET state = 'queued', lease_owner = NULL, failures = failures + 1,
                    not_before = now() + make_interval(secs => r.delay),
                    suspect_group = NULL, suspect_deaths = NULL
    FROM unnest($2::uuid[], $3::int[], $4::float8[], $5::text[]) AS r(id, attempt, delay, error)
    WHERE jobs.id = r.id AND jobs.attempt = r.attempt AND lease_owner = $1 AND state = 'running'
    RETURNING jobs.id, tenant_id, jobs.attempt, started_at, r.error,
              base_model_id, adapter_version_id
){noted("retried", "'retried'", "error")}
SELECT id, base_model_id, adapter_version_id, tenant_id FROM retried
"""
