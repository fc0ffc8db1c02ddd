"""A release before this one keeps working on the newest schema: its statements, as it sent them.

`statements/r0002.sql` is the recorded set. Workers and APIs of that release run on while
`lorry migrate` brings the schema forward, and until each is replaced.
"""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import pytest

from db import claims, results, suspects, workers
from db.database import Database
from db.migrate import head_revision, upgrade
from db.results import Result
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from tests.support.servers import PostgresServer
from tests.support.waiting import eventually

RECORDED: Final = Path(__file__).parent / "statements" / "r0002.sql"
LINE = (1, 0, DEFAULT_TENANT_ID)


class OldRelease:
    """A connection of the earlier release."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection
        parts = re.split(r"^-- name: (\w+)\n", RECORDED.read_text(), flags=re.MULTILINE)
        self._statements = dict(zip(parts[1::2], parts[2::2], strict=True))
        self.sent: set[str] = set()

    async def send(self, name: str, *arguments: Any) -> list[asyncpg.Record]:
        self.sent.add(name)
        return await self._connection.fetch(self._statements[name], *arguments)

    async def submit(self, key: str | None = None, deadline: Any = None) -> UUID:
        job_id = uuid4()
        body = (0, 5, 16, deadline, "completion", "base", '{"prompt": "x"}', None)
        more = () if key is None else ("POST /v1/jobs", key, b"f")
        name = "submit" if key is None else "submit_once"
        (row,) = await self.send(name, job_id, DEFAULT_TENANT_ID, 1, 0, *body, *more)
        assert row["submitted"]
        return job_id

    async def register(self, lease_seconds: float = 60.0) -> int:
        facts = (1, "old", 1, "simulated", "1", "{}", lease_seconds)
        found: int = (await self.send("register", *facts))[0]["id"]
        return found

    async def claim(self, worker: int, limit: int = 10) -> list[asyncpg.Record]:
        return await self.send("claim", *LINE, limit, worker)

    async def record(self, worker: int, jobs: list[asyncpg.Record]) -> int:
        n = len(jobs)
        ids, attempts = [job["id"] for job in jobs], [job["attempt"] for job in jobs]
        none: list[None] = [None] * n
        numbers = [1] * n
        answers = ["{}"] * n
        rows = await self.send(
            "record", worker, ids, attempts, answers, none, none, numbers, numbers
        )
        return len(rows)

    async def rescue(self) -> None:
        for row in await self.send("lose", 0.0):
            await self.send("free", row["id"], 3)


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(database_url)
    await connection.execute("INSERT INTO base_models (name, max_model_len) VALUES ('base', 4096)")
    yield connection
    await connection.close()


async def states(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, int]:
    rows = await connection.fetch("SELECT state, count(*) AS n FROM jobs GROUP BY state")
    return {row["state"]: row["n"] for row in rows}


async def test_every_recorded_statement_does_its_work(
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    old = OldRelease(connection)
    for number in range(5):
        await old.submit(key=f"k{number}")
    worker = await old.register()
    assert len(await old.send("look", 1, None, [], 64, 512, None)) == 1
    first = await old.claim(worker, 5)
    assert len(first) == 5
    assert (await old.send("renew", worker, 60.0))[0][0] is True
    assert await old.record(worker, first[:1]) == 1
    one, two, three = first[1], first[2], first[3]
    await old.send("retry_later", worker, [one["id"]], [one["attempt"]], [0.0])
    await old.send("release", worker, [two["id"]], [two["attempt"]])
    await old.send("hold_line", *LINE)
    await old.send("cancel", DEFAULT_TENANT_ID, three["id"])
    assert [row["id"] for row in await old.send("take_ended", worker)] == [three["id"]]
    await connection.execute("UPDATE workers SET lease_expires_at = now() - interval '1 s'")
    await old.rescue()
    assert await states(connection) == {"queued": 3, "succeeded": 1, "cancelled": 1}
    worker = await old.register()
    assert await old.record(worker, await old.claim(worker, 2)) == 2
    await old.claim(worker, 2)
    await old.send("sign_off", worker)
    await old.send("sign_off_release", worker)
    await connection.execute("UPDATE jobs SET deadline = now() WHERE state = 'queued'")
    await old.send("expire", 10)
    assert await states(connection) == {"succeeded": 3, "cancelled": 1, "expired": 1}
    async with connection.transaction():
        await old.send("lock_line", *LINE)
        assert await old.send("drop_line", *LINE)
    await old.submit()
    recorded = re.findall(r"^-- name: (\w+)", RECORDED.read_text(), flags=re.MULTILINE)
    assert old.sent == set(recorded)


async def test_both_releases_work_side_by_side(
    connection: "asyncpg.Connection[asyncpg.Record]", database: Database
) -> None:
    """The old one may run suspects among others, as it did; none is lost or answered twice."""
    old = OldRelease(connection)
    for _ in range(8):
        await old.submit()
    veteran = await old.register()
    facts = workers.WorkerFacts(1, "new", 1, "simulated", "1", {})
    recruit = await workers.register(database, facts, 60)
    mine = await claims.claim(database, recruit, Line(*LINE), 4)
    death = suspects.Death("suspect", "the engine died", 2, 0.0)
    await workers.sign_off(database, recruit, death, [job.id for job in mine])
    taken = await old.claim(veteran, 6)
    assert len(taken) == 6 and await old.record(veteran, taken) == 6
    recruit = await workers.register(database, facts, 60)
    for _ in range(3):
        rest = await suspects.take_group(database, recruit, 1, waited_seconds=0, limit=9)
        rest += await claims.claim(database, recruit, Line(*LINE), 9)
        done = [Result(job.id, job.attempt, response="{}") for job in rest]
        await results.record(database, recruit, done)
    assert await states(connection) == {"succeeded": 8}
    assert await connection.fetchval("SELECT count(*) FROM job_outputs") == 8


async def test_the_old_release_runs_on_while_the_schema_is_migrated(
    postgres: PostgresServer, empty_database_url: str
) -> None:
    await asyncio.to_thread(upgrade, empty_database_url, "0002")
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute("INSERT INTO base_models (name, max_model_len) VALUES ('base', 4096)")
    old = OldRelease(connection)
    worker = await old.register()
    migrated = asyncio.create_task(asyncio.to_thread(upgrade, empty_database_url))
    rounds = 0
    while not migrated.done() or rounds < 20:
        for _ in range(5):
            await old.submit()
        assert await old.record(worker, await old.claim(worker)) == 5
        assert (await old.send("renew", worker, 60.0))[0][0] is True
        rounds += 1
    await migrated
    assert await states(connection) == {"succeeded": 5 * rounds}
    valid = await connection.fetchval("SELECT bool_and(indisvalid) FROM pg_index")
    assert valid is True
    await connection.close()


async def test_a_migration_in_a_circle_of_locks_lets_go_and_the_others_never_pay(
    postgres: PostgresServer, empty_database_url: str
) -> None:
    """It has `jobs` and wants `job_outputs`; a transaction has that and wants `jobs`."""
    await asyncio.to_thread(upgrade, empty_database_url, "0002")
    old = await asyncpg.connect(empty_database_url)
    watch = await asyncpg.connect(empty_database_url)
    # whoever looks first is the one that Postgres ends: as if it had begun to wait first
    await old.execute("SET deadlock_timeout = '500ms'")

    async def migration_waits() -> bool:
        waits: bool = await watch.fetchval(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'job_outputs'::regclass"
            " AND mode = 'AccessExclusiveLock' AND NOT granted)"
        )
        return waits

    async with old.transaction():
        await old.execute("SELECT FROM job_outputs LIMIT 1")
        migrated = asyncio.create_task(asyncio.to_thread(upgrade, empty_database_url))
        await eventually(migration_waits, "the migration to wait")
        await old.execute("SELECT FROM jobs LIMIT 1")
    await migrated
    assert await watch.fetchval("SELECT version_num FROM alembic_version") == head_revision()
    await old.close()
    await watch.close()


async def test_two_migrations_at_once_take_turns(
    postgres: PostgresServer, empty_database_url: str
) -> None:
    """An index built CONCURRENTLY waits for every older snapshot, and one may wait for us."""
    given = {**os.environ, "LORRY_DATABASE_URL": empty_database_url}
    migrations = [
        await asyncio.create_subprocess_exec(sys.executable, "-m", "cli.main", "migrate", env=given)
        for _ in range(2)
    ]
    assert await asyncio.gather(*(migration.wait() for migration in migrations)) == [0, 0]
