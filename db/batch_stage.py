"""The lines of a batch in validation: staged where no worker looks, then jobs all at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg

from db.batch_leases import Fenced, HeldBatch
from db.bulk import COPY_SECONDS
from db.database import Database
from db.waiting import Line, ensure_waiting

#: Rows of one step that deletes.
STEP: Final = 5000


class StagedLine(NamedTuple):
    """A line that is staged: with what its job will be, or with what is wrong with it."""

    line: int
    job_id: UUID
    custom_id: str | None
    base_model_id: int | None
    adapter_version_id: int | None
    tokens: int
    priority: int
    deadline: datetime | None
    error_code: str | None = None
    error_message: str | None = None


class StagedInput(NamedTuple):
    """What a staged line's job was asked."""

    job_id: UUID
    endpoint: str
    model: str
    body: str
    metadata: str | None


_LINE_COLUMNS = ("batch_id", *StagedLine._fields)
_INPUT_COLUMNS = ("tenant_id", *StagedInput._fields)


async def stage(
    database: Database,
    batch: HeldBatch,
    lines: Sequence[StagedLine],
    inputs: Sequence[StagedInput],
) -> None:
    """Keep lines of a batch in validation, where no worker looks. A transaction of its own.

    The batch's row is locked against a change of its lease or status until the commit, so that a
    steward that comes to clear the lines sees all of them.

    Raises:
        Fenced: the batch is another steward's, or was cancelled.
    """
    async with database.transaction() as connection:
        held = await connection.fetchval(
            "SELECT true FROM batches WHERE id = $1 AND lease_id = $2 AND status = 'validating'"
            " FOR SHARE",
            batch.id,
            batch.lease_id,
        )
        if not held:
            raise Fenced("no longer held")
        await connection.copy_records_to_table(
            "batch_lines",
            records=[(batch.id, *line) for line in lines],
            columns=_LINE_COLUMNS,
            timeout=COPY_SECONDS,
        )
        await connection.copy_records_to_table(
            "job_inputs",
            records=[(batch.tenant_id, *given) for given in inputs],
            columns=_INPUT_COLUMNS,
            timeout=COPY_SECONDS,
        )


async def clear_stage(database: Database, batch: HeldBatch) -> None:
    """Delete every staged line of a batch that has no jobs, in steps."""
    while True:
        deleted: int = await database.fetch_value(
            """
            WITH gone AS (
                DELETE FROM batch_lines WHERE (batch_id, line) IN (
                    SELECT batch_id, line FROM batch_lines WHERE batch_id = $1 LIMIT $3)
                RETURNING job_id
            ), inputs AS (
                DELETE FROM job_inputs
                WHERE tenant_id = $2 AND job_id = ANY(ARRAY(SELECT job_id FROM gone))
            )
            SELECT count(*) FROM gone
            """,
            batch.id,
            batch.tenant_id,
            STEP,
        )
        if not deleted:
            return


@dataclass(frozen=True, slots=True)
class Validated:
    """What validation found. `model` is the one that all lines name, if there is one."""

    good: int
    bad: int
    model: str | None
    lines: Collection[Line]


async def begin(database: Database, batch: HeldBatch, found: Validated) -> None:
    """`validating` → `in_progress`: every staged line becomes a job, all at once or none.

    Everything is in the database already, so this is one statement without any traffic: its
    transaction is short for what it does (a million lines: see benchmarks/RESULTS.md). The row of
    the batch is changed last: a cancel need not wait for the jobs, it undoes them.

    Raises:
        Fenced: the batch is another steward's, or was cancelled. Nothing was written.
    """
    base_model_ids = sorted({line.base_model_id for line in found.lines})
    async with database.transaction() as connection:
        try:
            await connection.execute(_BEGIN_JOBS, batch.id, batch.tenant_id, timeout=COPY_SECONDS)
        except asyncpg.UniqueViolationError:
            raise Fenced("another steward was first") from None
        if found.bad:
            await connection.execute(_BEGIN_BAD, batch.id, timeout=COPY_SECONDS)
        await ensure_waiting(connection, found.lines)
        begun = await connection.fetchval(
            _BEGIN,
            batch.id,
            batch.lease_id,
            found.good + found.bad,
            found.bad,
            found.model,
            base_model_ids,
        )
        if not begun:
            raise Fenced("no longer held")


# The place is that of a single job which came when the batch did (core/priority.py).
_BEGIN_JOBS = """
INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, priority, place, tokens,
                  deadline, batch_id, batch_line)
SELECT l.job_id, $2, l.base_model_id, l.adapter_version_id, l.priority,
       (extract(epoch FROM b.created_at) * 1000)::bigint - l.priority * 900000, l.tokens,
       least(l.deadline, b.expires_at), b.id, l.line
FROM batches b JOIN batch_lines l ON l.batch_id = b.id
WHERE b.id = $1 AND l.error_code IS NULL
ORDER BY l.line
"""
#: Bad lines are finished before the first job is, in steps as long as any other's.
_BEGIN_BAD = """
INSERT INTO batch_steps (batch_id, position, lines)
SELECT $1, min(number) - 1, array_agg(line ORDER BY line) FROM (
    SELECT line, row_number() OVER (ORDER BY line) AS number FROM batch_lines
    WHERE batch_id = $1 AND error_code IS NOT NULL) bad
GROUP BY (number - 1) / 1000
"""
_BEGIN = """
UPDATE batches SET
    status = CASE WHEN $3::int = $4::int THEN 'finalizing' ELSE 'in_progress' END,
    in_progress_at = now(), total = $3, failed = $4, model = $5, base_model_ids = $6,
    ended_at = CASE WHEN $3 = $4 THEN now() END, finalizing_at = CASE WHEN $3 = $4 THEN now() END,
    lease_id = NULL, lease_expires_at = NULL
WHERE id = $1 AND lease_id = $2 AND status = 'validating'
RETURNING true
"""
