"""What must hold after every fault: each job final once, each result visible once, nothing left.

One checker for all fault tests, so that none forgets a promise.
"""

import asyncio
from collections import Counter
from collections.abc import Collection
from uuid import UUID

import asyncpg

from core.errors import Unavailable
from db.database import SESSION, Database
from tests.support.deployment import Deployment
from tests.support.jobs import all_final, states
from tests.support.processes import marked
from tests.support.waiting import eventually

#: Connections that one process may hold: the pools of `workers/main.py`, the API and the steward.
MOST_CONNECTIONS = {"worker": 6, "api": 8, "steward": 8}


async def settled(
    database: Database, expected: int, seconds: float = 90, **counts: int
) -> Counter[str]:
    """Wait until every job is final, then check that each has exactly what it must have.

    Args:
        expected: how many jobs there must be.
        seconds: how long it may take.
        counts: how many must stand in a state, by state; those not named may be any number.

    Returns:
        How many jobs stand in each state.
    """

    async def done() -> bool:
        try:
            return await all_final(database)
        except Unavailable:  # this test's own connection, while Postgres is away
            return False

    try:
        await eventually(done, "every job final", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}; {await unfinished(database)}") from None
    found = await states(database)
    assert found.total() == expected, found
    assert {state: found[state] for state in counts} == counts, (found, await errors(database))
    await assert_one_result_each(database)
    return found


async def assert_one_result_each(database: Database) -> None:
    """Every succeeded job has its own answer, every failed one its error, the others neither."""
    async with database.connection() as connection:
        wrong = await connection.fetch(
            """
            SELECT j.id, j.state, o.error_code, left(o.response::text, 200) AS response
            FROM jobs j FULL JOIN job_outputs o ON o.job_id = j.id AND o.tenant_id = j.tenant_id
            WHERE j.id IS NULL
               OR (j.state IN ('succeeded', 'failed')) IS DISTINCT FROM (o.job_id IS NOT NULL)
               OR (j.state = 'succeeded') IS DISTINCT FROM (o.response IS NOT NULL)
               OR right(o.response->>'id', 32) <> replace(j.id::text, '-', '')
            """
        )
        inputs = await connection.fetchval(
            "SELECT count(*) FROM jobs j FULL JOIN job_inputs i ON i.job_id = j.id"
            " WHERE j.id IS NULL OR i.job_id IS NULL"
        )
        doubled = await connection.fetchval(
            "SELECT count(*) - count(DISTINCT job_id) FROM job_outputs"
        )
    assert [dict(row) for row in wrong] == []
    assert (inputs, doubled) == (0, 0)


async def assert_nothing_left(deployment: Deployment, database: Database) -> None:
    """Stop everything; then no process of it lives and no connection of it is open."""
    for process in reversed(deployment.processes):
        process.stop()
    left = [found for p in deployment.processes for found in marked(p.mark)]
    assert left == []

    async def own_alone() -> bool:
        return await connections(database) <= own_connections(database)

    await eventually(own_alone, "the connections of stopped processes to close", 10)


async def assert_few_connections(deployment: Deployment, database: Database) -> None:
    """Whoever still runs holds no more connections than its pool may."""
    running = [p for p in deployment.processes if p.popen.poll() is None]
    most = sum(MOST_CONNECTIONS.get(p.name, 0) for p in running) + own_connections(database)

    async def few() -> bool:  # those of a killed process go when Postgres has noticed
        return await connections(database) <= most

    await eventually(few, f"at most {most} connections", 15)


def own_connections(database: Database) -> int:
    """How many connections this test's own pool holds."""
    return database._pool.get_size()


async def connections(database: Database) -> int:
    """How many of Lorry's connections are open to this database."""
    found: int = await database.fetch_value(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = $1",
        SESSION["application_name"],
    )
    return found


async def answers(database: Database) -> dict[UUID, str]:
    """Every answer or error, as the user sees it."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT job_id, coalesce(response::text, error_code) AS answer FROM job_outputs"
        )
    return {row["job_id"]: row["answer"] for row in rows}


async def spent(database: Database, ids: Collection[UUID] | None = None) -> Counter[int]:
    """How many jobs have used up how many attempts (`attempts` in the API)."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT attempt - releases AS spent, count(*) AS jobs FROM jobs"
            " WHERE $1::uuid[] IS NULL OR id = ANY($1) GROUP BY 1",
            None if ids is None else list(ids),
        )
    return Counter({row["spent"]: row["jobs"] for row in rows})


async def errors(database: Database) -> Counter[str]:
    """Which errors jobs failed with."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT error_code || ': ' || left(error_message, 80) AS error FROM job_outputs"
            " WHERE error_code IS NOT NULL"
        )
    return Counter(row["error"] for row in rows)


async def unfinished(database: Database) -> list[dict[str, object]]:
    """Some jobs that are not final, and every worker's lease: for a failed test's message."""
    async with database.connection() as connection:
        jobs = await connection.fetch(
            "SELECT id, state, attempt, releases, failures, lease_owner, not_before > now() AS held"
            " FROM jobs WHERE state IN ('queued', 'running') LIMIT 5"
        )
        workers = await connection.fetch(
            "SELECT id, lease_expires_at > now() AS live, stopped_at, lost_at FROM workers"
            " ORDER BY id DESC LIMIT 5"
        )
        lines = await connection.fetch("SELECT * FROM waiting_adapters LIMIT 5")
    return [dict(row) for row in (*jobs, *workers, *lines)]


async def away(url: str) -> bool:
    """Whether no connection to Postgres can be had now."""
    try:
        async with asyncio.timeout(1):
            connection = await asyncpg.connect(url)
            await connection.close()
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return True
    return False
