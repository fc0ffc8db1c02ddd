"""Bulk submission beside a raw COPY of the same rows: a part of benchmarks/queue.py."""

import asyncio
import statistics
import time
from collections.abc import Sequence

from benchmarks import backlog
from benchmarks.servers import Servers
from db.bulk import submit_many
from db.database import Connection, Database
from db.jobs import NewJob
from db.registry import Target

JOB_COLUMNS = (
    "id", "tenant_id", "base_model_id", "adapter_version_id", "priority", "place", "tokens",
)  # fmt: skip
INPUT_COLUMNS = ("job_id", "tenant_id", "endpoint", "model", "body")
#: The columns of Lorry's tables with their defaults, and nothing but a primary key.
BARE_TABLES = (
    "CREATE TABLE IF NOT EXISTS bare_jobs (LIKE jobs INCLUDING DEFAULTS, PRIMARY KEY (id))",
    "CREATE TABLE IF NOT EXISTS bare_inputs"
    " (LIKE job_inputs INCLUDING DEFAULTS, PRIMARY KEY (tenant_id, job_id))",
)
TRUNCATE = (
    "TRUNCATE jobs, job_inputs, job_outputs, waiting_adapters, bare_jobs, bare_inputs",
    "CHECKPOINT",
)


def measure(servers: Servers, targets: Sequence[Target], jobs: int, rounds: int) -> dict[str, int]:
    """Rows per second of both, medians of interleaved rounds."""
    servers.execute(*BARE_TABLES)
    return asyncio.run(_measure(servers, targets, jobs, rounds))


async def _measure(
    servers: Servers, targets: Sequence[Target], jobs: int, rounds: int
) -> dict[str, int]:
    ours, raw = [], []
    async with Database.connect(servers.postgres_url, max_size=1) as database:
        for number in range(rounds):
            batch = backlog.new_jobs(jobs, targets)
            for lorry in (True, False) if number % 2 else (False, True):
                async with database.connection() as connection:
                    for statement in TRUNCATE:
                        await connection.execute(statement)
                if lorry:
                    started = time.perf_counter()
                    await submit_many(database, batch)
                    ours.append(jobs / (time.perf_counter() - started))
                else:
                    async with database.connection() as connection:
                        raw.append(jobs / await copy_raw(connection, batch))
    return {
        "jobs": jobs,
        "lorry_rows_s": round(statistics.median(ours)),
        "raw_copy_rows_s": round(statistics.median(raw)),
    }


async def copy_raw(connection: Connection, jobs: Sequence[NewJob]) -> float:
    """Seconds of a COPY of rows that were made before; one transaction, as ours."""
    rows = [
        (
            job.id, job.tenant_id, job.target.base_model_id, job.target.adapter_version_id,
            job.priority, job.place, job.tokens,
        )
        for job in jobs
    ]  # fmt: skip
    inputs = [(job.id, job.tenant_id, job.endpoint, job.model, job.body) for job in jobs]
    started = time.perf_counter()
    async with connection.transaction():
        await connection.copy_records_to_table("bare_jobs", records=rows, columns=JOB_COLUMNS)
        await connection.copy_records_to_table("bare_inputs", records=inputs, columns=INPUT_COLUMNS)
    return time.perf_counter() - started
