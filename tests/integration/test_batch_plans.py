"""EXPLAIN tests of batches: a page or a step reads its own lines, however many there are."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from core.ids import new_id
from db import batch_ends, batch_leases, batch_lines, batch_stage, batches, retention
from db.batch_leases import HeldBatch
from db.database import Database
from tests.support.batch_rows import make_batches
from tests.support.plans import PLANS, Plan, explained
from tests.support.servers import PostgresServer

LINES, STEP, LIMIT = 20_000, 100, 50


@dataclass(frozen=True, slots=True)
class Full:
    """Two batches of `LINES` lines: one is being cancelled, the other was completed."""

    database: Database
    cancelling: HeldBatch
    completed_id: int


@pytest.fixture(scope="module")
async def full(
    postgres: PostgresServer, template: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Full]:
    postgres.create_database("batch_plans", template)
    async with Database.connect(postgres.url("batch_plans")) as database:
        folder = tmp_path_factory.mktemp("plans")
        _, (first, second) = await make_batches(database, folder, lines=LINES)
        async with database.connection() as connection:
            for statement in (_STEPS, _COMPLETED, _OUTPUTS):
                await connection.execute(statement, second)
            await connection.execute(_CANCELLING, first)
            await connection.execute("VACUUM ANALYZE")
        held = await batch_leases.claim(database, batch_leases.CANCEL, 600)
        assert held is not None
        yield Full(database, held, second)
    postgres.drop_database("batch_plans")


_STEPS = f"""
INSERT INTO batch_steps
SELECT $1::int, n * {STEP}, array_agg(n * {STEP} + k)
FROM generate_series(0, {LINES // STEP - 1}) n, generate_series(1, {STEP}) k GROUP BY n
"""
_COMPLETED = """
UPDATE batches SET status = 'completed', failed = total, ended_at = now(), completed_at = now()
WHERE id = $1
"""
_OUTPUTS = """
INSERT INTO job_outputs (tenant_id, job_id, response)
SELECT 1, job_id, '{}' FROM batch_lines WHERE batch_id = $1
"""
_CANCELLING = "UPDATE batches SET status = 'cancelling', cancelling_at = now() WHERE id = $1"


def assert_bounded(plan: Plan, times: int = 1) -> None:
    """Every big table is read by key, and no more of it than the limit."""
    for table in ("jobs", "job_inputs", "job_outputs", "batch_lines", "batch_steps"):
        found = plan.of(table)
        assert None not in plan.indexes(table), (table, found)
        assert plan.scanned(table) <= times * LIMIT + 3, (table, found)


@pytest.mark.parametrize("mode", PLANS)
async def test_a_page_of_lines_reads_a_page(full: Full, mode: str) -> None:
    for read in (batch_lines.in_order, batch_lines.as_finished):
        async with explained(full.database, mode) as plans:
            rows = await read(full.database, full.completed_id, 1, LINES // 2 + 7, LIMIT)
        assert len(rows) == LIMIT
        for plan in plans:
            assert_bounded(plan)


@pytest.mark.parametrize("mode", PLANS)
async def test_a_step_of_a_cancel_reads_its_lines(
    full: Full, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_ends, "STEP", LIMIT)
    async with explained(full.database, mode) as plans:
        assert await batch_ends.cancel_step(full.database, full.cancelling, 1000) == 1000 + LIMIT
    (plan,) = plans
    assert_bounded(plan, times=2)


@pytest.mark.parametrize("mode", PLANS)
async def test_clearing_and_pruning_go_in_steps(
    full: Full, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_stage, "STEP", LIMIT)
    async with explained(full.database, mode) as plans:
        once: Any = _Once(full.database)
        with pytest.raises(_Enough):
            await batch_stage.clear_stage(once, full.cancelling)
    assert_bounded(plans[0], times=2)
    async with explained(full.database, mode) as plans:
        assert await retention.prune_batches(full.database, -60, LIMIT)
    (plan,) = plans
    assert plan.indexes("batch_lines") == {"pk_batch_lines"}
    assert plan.scanned("batch_lines") <= 2 * LIMIT


@pytest.mark.parametrize("mode", PLANS)
async def test_a_list_of_batches_reads_a_page(full: Full, mode: str) -> None:
    async with explained(full.database, mode) as plans:
        assert len(await batches.list_page(full.database, 1, new_id(), 1)) == 1
    assert_bounded(plans[0])


class _Enough(Exception):
    """One step was looked at."""


class _Once:
    """A database for one statement: what is explained is rolled back, so steps would not end."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._used = False

    async def fetch_value(self, statement: str, *arguments: object) -> object:
        if self._used:
            raise _Enough
        self._used = True
        return await self._database.fetch_value(statement, *arguments)
