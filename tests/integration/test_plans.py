"""EXPLAIN tests: what a statement touches is in proportion to its limit, never to the table.

Each plan is taken as it is executed, both as planned for its arguments and as the generic plan that
a prepared statement may settle on, and rolled back.
"""

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from uuid import UUID

import orjson
import pytest

from core.ids import new_id
from db import claims, jobs, maintenance, registry, results, workers
from db.database import Connection, Database
from db.jobs import JobFilter
from db.results import Result
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line, rebuild
from db.workers import WorkerFacts
from tests.support.servers import PostgresServer

JOBS, ADAPTERS = 20_000, 200
#: One more line, long enough for a large claim.
LONG_LINE, LONG_JOBS = ADAPTERS + 1, 2_000
#: Lines that wait behind all those: a look must not read them.
LINES = 5_000
LIMIT = 256
PLANS = ("force_custom_plan", "force_generic_plan")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of an executed plan; counts are over all its loops."""

    kind: str
    relation: str | None
    index: str | None
    rows: float
    loops: int
    filtered: float

    @property
    def scanned(self) -> float:
        return self.rows + self.filtered


@dataclass(frozen=True, slots=True)
class Plan:
    """An executed statement's plan, flat."""

    statement: str
    nodes: tuple[Node, ...]
    pages: int

    def of(self, relation: str) -> list[Node]:
        """The scans of a table."""
        return [n for n in self.nodes if n.relation == relation and "Scan" in n.kind]

    def scanned(self, relation: str) -> float:
        """Rows read from a table, those filtered out too."""
        return sum(node.scanned for node in self.of(relation))

    def indexes(self, relation: str) -> set[str | None]:
        """How a table was read: by which indexes, by `ctid`; None stands for a scan of it all."""
        return {"ctid" if n.kind == "Tid Scan" else n.index for n in self.of(relation)}


@dataclass(frozen=True, slots=True)
class Backlog:
    """A database with `JOBS` queued jobs over `ADAPTERS` lines."""

    database: Database
    base_model_id: int
    worker_id: int

    def line(self, adapter: int) -> Line:
        return Line(self.base_model_id, adapter, DEFAULT_TENANT_ID)


@pytest.fixture(scope="module")
async def backlog(postgres: PostgresServer, template: str) -> AsyncIterator[Backlog]:
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


@pytest.mark.parametrize("mode", PLANS)
async def test_a_claim_reads_the_head_of_its_line(backlog: Backlog, mode: str) -> None:
    async with explained(backlog.database, mode) as plans:
        claimed = await claims.claim(
            backlog.database, backlog.worker_id, backlog.line(LONG_LINE), LIMIT
        )
    assert len(claimed) == LIMIT
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_waiting", "ctid"}
    assert plan.indexes("job_inputs") == {"pk_job_inputs"}
    # the expired jobs at the line's head are passed over
    assert plan.scanned("jobs") <= 3 * LIMIT
    assert plan.scanned("job_inputs") <= LIMIT


@pytest.mark.parametrize("mode", PLANS)
async def test_a_look_is_bounded_by_its_limit(backlog: Backlog, mode: str) -> None:
    resident = [150, 160]
    async with explained(backlog.database, mode) as plans:
        lines = await claims.look(
            backlog.database, backlog.base_model_id, resident=resident, limit=16
        )
    assert 16 <= len(lines) <= 18
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_waiting"}
    assert None not in plan.indexes("waiting_adapters")
    each = JOBS / ADAPTERS
    assert plan.scanned("jobs") <= len(lines) * min(each, claims.COUNT_CAP)
    assert plan.scanned("waiting_adapters") <= 2 * (16 + len(resident))


@pytest.mark.parametrize("mode", PLANS)
async def test_recording_reads_its_own_jobs(backlog: Backlog, mode: str) -> None:
    async with (
        running(backlog, adapter=LONG_LINE, count=LIMIT) as ids,
        explained(backlog.database, mode) as plans,
    ):
        answers = [Result(i, 1, response="{}") for i in ids]
        assert await results.record(backlog.database, backlog.worker_id, answers) == set(ids)
    (plan,) = plans
    # by key, or among the few that this worker owns: as the statistics have it
    assert plan.indexes("jobs") - {"ctid"} in ({"pk_jobs"}, {"ix_jobs_owned"})
    assert plan.scanned("jobs") <= 3 * LIMIT
    # a nested loop over the results would read them as often as there are results
    assert max(node.scanned for node in plan.nodes) <= 2 * LIMIT


@pytest.mark.parametrize("mode", PLANS)
async def test_ended_jobs_are_found_by_their_owner(backlog: Backlog, mode: str) -> None:
    async with running(backlog, adapter=LONG_LINE, count=LIMIT) as ids:
        for job_id in ids[:3]:
            await jobs.cancel(backlog.database, DEFAULT_TENANT_ID, job_id)
        async with explained(backlog.database, mode) as plans:
            ended = await workers.take_ended(backlog.database, backlog.worker_id)
    assert {job_id for job_id, _ in ended} == set(ids[:3])
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_owned"}
    assert plan.scanned("jobs") == 3


@pytest.mark.parametrize("mode", PLANS)
async def test_expiry_reads_what_is_due(backlog: Backlog, mode: str) -> None:
    async with explained(backlog.database, mode) as plans:
        expired = await maintenance.expire_due(backlog.database, limit=5)
    assert expired == 5
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_deadline", "pk_jobs"}
    assert plan.scanned("jobs") <= 15


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("mode", PLANS)
async def test_a_page_of_the_list_reads_a_page(backlog: Backlog, mode: str, after: bool) -> None:
    cursor = new_id() if after else None  # newer than every job there is
    async with explained(backlog.database, mode) as plans:
        rows = await jobs.list_page(backlog.database, DEFAULT_TENANT_ID, JobFilter(), cursor, 20)
    assert len(rows) == 20
    (plan,) = plans
    assert plan.indexes("job_inputs") == {"pk_job_inputs"}
    assert plan.indexes("jobs") == {"pk_jobs"}
    assert plan.scanned("job_inputs") <= 20
    assert plan.scanned("jobs") <= 20


@pytest.mark.parametrize("mode", PLANS)
async def test_the_rebuild_skips_from_line_to_line(backlog: Backlog, mode: str) -> None:
    async with (
        explained(backlog.database, mode) as plans,
        backlog.database.transaction() as connection,
    ):
        assert await rebuild(connection) == 0
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_waiting"}
    assert plan.scanned("jobs") <= ADAPTERS + 2
    # one descent per line
    assert plan.pages <= 12 * ADAPTERS


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
async def explained(database: Database, mode: str) -> AsyncIterator[list[Plan]]:
    """Explain and run every statement that fetches rows, in transactions that are rolled back.

    The statements are those of `db/` itself, caught on their way through the connection.
    """
    plans: list[Plan] = []
    connect = Database.connection

    @asynccontextmanager
    async def connection(self: Database) -> AsyncIterator[Connection]:
        async with connect(self) as real:
            yield _Explaining(real, mode, plans)  # type: ignore[misc]

    with patch.object(Database, "connection", connection):
        yield plans


class _Explaining:
    """A connection whose statements are explained before they are run; both are rolled back."""

    def __init__(self, connection: Connection, mode: str, plans: list[Plan]) -> None:
        self._connection = connection
        self._mode = mode
        self._plans = plans

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        return list(await self._run("fetch", statement, arguments))

    async def execute(self, statement: str, *arguments: Any) -> str:
        return str(await self._run("execute", statement, arguments))

    def transaction(self) -> Any:
        return self._connection.transaction()

    async def _run(self, method: str, statement: str, arguments: Sequence[Any]) -> Any:
        connection = self._connection
        outer = connection.transaction()
        await outer.start()
        try:
            await connection.execute(f"SET LOCAL plan_cache_mode = {self._mode}")
            inner = connection.transaction()
            await inner.start()
            # EXPLAIN of a statement with parameters never shows its generic plan; EXECUTE does
            prepared = await connection.prepare(statement)
            given = f"({', '.join(map(_literal, arguments))})" if arguments else ""
            document = await connection.fetchval(
                f'EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE "{prepared.get_name()}"{given}'
            )
            await inner.rollback()
            root = orjson.loads(document)[0]["Plan"]
            pages = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
            self._plans.append(Plan(statement, tuple(_nodes(root)), pages))
            return await getattr(connection, method)(statement, *arguments)
        finally:
            await outer.rollback()


def _literal(value: Any) -> str:
    """A parameter as SQL text that takes the parameter's type."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        escaped = (str(v).replace("\\", "\\\\").replace('"', '\\"') for v in value)
        elements = (
            "NULL" if v is None else f'"{text}"' for v, text in zip(value, escaped, strict=True)
        )
        return "'{" + ",".join(elements).replace("'", "''") + "}'"
    return "'" + str(value).replace("'", "''") + "'"


def _nodes(node: dict[str, Any]) -> Iterator[Node]:
    loops = node["Actual Loops"]
    yield Node(
        kind=node["Node Type"],
        relation=node.get("Relation Name"),
        index=node.get("Index Name"),
        rows=node["Actual Rows"] * loops,
        loops=loops,
        filtered=node.get("Rows Removed by Filter", 0) * loops,
    )
    for child in node.get("Plans", ()):
        yield from _nodes(child)
