"""A database with a backlog that is large beside what any one statement may touch."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from db import claims, registry, workers
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.servers import PostgresServer

JOBS, ADAPTERS = 20_000, 200
#: One more line, long enough for a large claim.
LONG_LINE, LONG_JOBS = ADAPTERS + 1, 2_000
#: Lines that wait behind all those: a look must not read them.
LINES = 5_000


@dataclass(frozen=True, slots=True)
class Backlog:
    """A database with `JOBS` queued jobs over `ADAPTERS` lines."""

    database: Database
    base_model_id: int
    worker_id: int

    def line(self, adapter: int) -> Line:
        return Line(self.base_model_id, adapter, DEFAULT_TENANT_ID)


@asynccontextmanager
async def filled_backlog(postgres: PostgresServer, template: str) -> AsyncIterator[Backlog]:
    """A database of its own with a backlog, dropped at the end."""
    postgres.create_database("plans", template)
    async with Database.connect(postgres.url("plans")) as database:
        base_model_id = await registry.declare_base(database, "base", 4096)
        facts = WorkerFacts(base_model_id, "test", 1, "simulated", "1", {})
        worker_id = await workers.register(database, facts, 600)
        async with database.connection() as connection:
            for first, adapters, count in ((1, ADAPTERS, JOBS), (LONG_LINE, 1, LONG_JOBS)):
                await connection.execute(
                    _FILL, DEFAULT_TENANT_ID, base_model_id, first, adapters, count
                )
            await connection.execute(_LINES, DEFAULT_TENANT_ID, base_model_id, LINES)
            await connection.execute("VACUUM ANALYZE")
        yield Backlog(database, base_model_id, worker_id)
    postgres.drop_database("plans")


_FILL = """
WITH job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, place, deadline)
    SELECT uuidv7(), $1, $2, $3::int + n % $4, n,
           CASE WHEN n % 10 = 0 THEN now() + make_interval(secs => n - 100) END
    FROM generate_series(1, $5::int) n
    RETURNING id, tenant_id
)
INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body)
SELECT id, tenant_id, 'completion', 'base', '{}' FROM job
"""
_LINES = """
INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition, since)
SELECT $2, version, $1, version % 32, now() - make_interval(secs => 9999 - version)
FROM generate_series(1, $3::int) version
"""


@asynccontextmanager
async def running(backlog: Backlog, adapter: int, count: int) -> AsyncIterator[list[UUID]]:
    """Jobs that the worker has claimed, given back at the end."""
    claimed = await claims.claim(backlog.database, backlog.worker_id, backlog.line(adapter), count)
    ids = [job.id for job in claimed]
    random.Random(1).shuffle(ids)
    yield ids
    async with backlog.database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'queued', lease_owner = NULL, finished_at = NULL,"
            " attempt = 0 WHERE id = ANY($1)",
            ids,
        )


@asynccontextmanager
async def suspected(backlog: Backlog, count: int) -> AsyncIterator[None]:
    """Suspects in four groups at the head of the long line, cleared at the end."""
    async with backlog.database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET suspect_group = place % 4 + 1 WHERE id IN ("
            " SELECT id FROM jobs WHERE adapter_version_id = $1 AND deadline IS NULL"
            " ORDER BY place LIMIT $2)",
            LONG_LINE,
            count,
        )
        await connection.execute("ANALYZE jobs")
    yield
    async with backlog.database.connection() as connection:
        await connection.execute("UPDATE jobs SET suspect_group = NULL WHERE suspect_group > 0")
