"""Bulk submission: tens of thousands of jobs in one transaction, by COPY."""

from collections.abc import Iterable, Sequence

from db.database import Connection, Database
from db.jobs import NewJob
from db.waiting import Line, ensure_waiting

_JOB_COLUMNS = (
    "id",
    "tenant_id",
    "base_model_id",
    "adapter_version_id",
    "priority",
    "place",
    "tokens",
    "deadline",
)
_INPUT_COLUMNS = ("job_id", "tenant_id", "endpoint", "model", "body", "metadata")
#: Seconds that one COPY may take: far more rows than a single submission's statement.
COPY_SECONDS = 600.0


async def submit_many(database: Database, jobs: Sequence[NewJob]) -> set[Line]:
    """Queue jobs all at once or not at all; when this returns, they are committed.

    Returns:
        The lines they stand in, whose partitions want a ring.
    """
    async with database.transaction() as connection:
        return await copy_jobs(connection, jobs)


async def copy_jobs(connection: Connection, jobs: Sequence[NewJob]) -> set[Line]:
    """`submit_many` inside a transaction of the caller's; may be called again for more jobs."""
    lines = {job.target.line(job.tenant_id) for job in jobs}
    await connection.copy_records_to_table(
        "jobs", records=_job_rows(jobs), columns=_JOB_COLUMNS, timeout=COPY_SECONDS
    )
    await connection.copy_records_to_table(
        "job_inputs", records=_input_rows(jobs), columns=_INPUT_COLUMNS, timeout=COPY_SECONDS
    )
    await ensure_waiting(connection, lines)
    return lines


def _job_rows(jobs: Iterable[NewJob]) -> Iterable[tuple[object, ...]]:
    for job in jobs:
        target = job.target
        yield (
            job.id,
            job.tenant_id,
            target.base_model_id,
            target.adapter_version_id,
            job.priority,
            job.place,
            job.tokens,
            job.deadline,
        )


def _input_rows(jobs: Iterable[NewJob]) -> Iterable[tuple[object, ...]]:
    for job in jobs:
        yield job.id, job.tenant_id, job.endpoint, job.model, job.body, job.metadata
