"""EXPLAIN tests: what a statement touches is in proportion to its limit, never to the table.

Each plan is taken as it is executed, both as planned for its arguments and as the generic plan that
a prepared statement may settle on, and rolled back.
"""

from collections.abc import AsyncIterator

import pytest

from core.ids import new_id
from db import claims, jobs, maintenance, results, retention, suspects, workers
from db.jobs import JobFilter
from db.results import Result
from db.suspects import Death, put_apart
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import drop_empty, rebuild
from tests.support.backlog import (
    ADAPTERS,
    JOBS,
    LINES,
    LONG_LINE,
    Backlog,
    filled_backlog,
    running,
    suspected,
)
from tests.support.plans import PLANS, explained
from tests.support.servers import PostgresServer

LIMIT = 256


@pytest.fixture(scope="module")
async def backlog(postgres: PostgresServer, template: str) -> AsyncIterator[Backlog]:
    async with filled_backlog(postgres, template) as filled:
        yield filled


@pytest.mark.parametrize("mode", PLANS)
async def test_a_claim_reads_the_head_of_its_line(backlog: Backlog, mode: str) -> None:
    async with explained(backlog.database, mode) as plans:
        claimed = await claims.claim(
            backlog.database, backlog.worker_id, backlog.line(LONG_LINE), LIMIT
        )
    assert len(claimed) == LIMIT
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_waiting", "ix_jobs_pressing", "ctid"}
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
    assert 16 <= len(lines) <= 2 * 16 + len(resident)  # some for their deadlines
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_waiting", "ix_jobs_pressing", "ix_jobs_deadline"}
    assert None not in plan.indexes("waiting_adapters")
    each = JOBS / ADAPTERS
    assert plan.scanned("jobs") <= len(lines) * (min(each, claims.COUNT_CAP) + 1) + 2 * 16
    assert plan.scanned("waiting_adapters") <= 2 * (16 + len(resident)) + 16


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


@pytest.mark.parametrize("mode", PLANS)
async def test_suspects_are_taken_by_their_group(backlog: Backlog, mode: str) -> None:
    async with suspected(backlog, 40):
        async with explained(backlog.database, mode) as plans:
            taken = await suspects.take_group(
                backlog.database,
                backlog.worker_id,
                backlog.base_model_id,
                waited_seconds=0,
                limit=9,
            )
        assert len(taken) == 9
        (plan,) = plans
        assert plan.indexes("jobs") == {"ix_jobs_suspects", "ctid"}
        assert plan.scanned("jobs") <= 40 + 3 * 9
        async with explained(backlog.database, mode) as plans:
            claimed = await claims.claim(
                backlog.database, backlog.worker_id, backlog.line(LONG_LINE), LIMIT
            )
        assert len(claimed) == LIMIT
        (plan,) = plans
        assert plan.indexes("jobs") == {"ix_jobs_waiting", "ix_jobs_pressing", "ctid"}
        assert plan.scanned("jobs") <= 3 * LIMIT + 40


@pytest.mark.parametrize("mode", PLANS)
async def test_no_suspects_cost_a_look_nothing(backlog: Backlog, mode: str) -> None:
    async with explained(backlog.database, mode) as plans:
        assert not await suspects.take_group(
            backlog.database, backlog.worker_id, backlog.base_model_id, waited_seconds=0, limit=9
        )
    (plan,) = plans
    assert plan.scanned("jobs") == 0 and plan.pages <= 100  # dead entries of other tests


@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize("mode", PLANS)
async def test_a_dead_engines_jobs_are_found_by_their_owner(
    backlog: Backlog, mode: str, fed: bool
) -> None:
    death = Death("suspect", "the engine died", 2, 1.0)
    async with (
        running(backlog, adapter=LONG_LINE, count=LIMIT) as ids,
        explained(backlog.database, mode) as plans,
        backlog.database.transaction() as connection,
    ):
        assert await put_apart(connection, backlog.worker_id, death, ids if fed else None) == LIMIT
        assert await claims.release_all(connection, backlog.worker_id) == LIMIT  # rolled back
    apart, released, *_ = plans
    for plan in (apart, released):
        assert plan.indexes("jobs") <= {"ix_jobs_owned", "pk_jobs", "ctid"}
    assert apart.scanned("jobs") <= 3 * LIMIT + 3


@pytest.mark.parametrize("mode", PLANS)
async def test_pruning_reads_what_is_past_its_time(backlog: Backlog, mode: str) -> None:
    async with running(backlog, adapter=LONG_LINE, count=100) as ids:
        async with backlog.database.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET state = 'cancelled', lease_owner = NULL,"
                " finished_at = now() - interval '9 days' WHERE id = ANY($1)",
                ids,
            )
        async with explained(backlog.database, mode) as plans:
            assert await retention.prune_finished(backlog.database, 86_400, limit=20) == 20
    (plan,) = plans
    assert plan.indexes("jobs") == {"ix_jobs_finished", "ctid"}
    assert plan.indexes("job_inputs") == {"pk_job_inputs"}
    assert plan.scanned("jobs") <= 2 * 20
    assert plan.scanned("job_inputs") <= 20


@pytest.mark.parametrize("mode", PLANS)
async def test_empty_lines_are_found_by_one_probe_each(backlog: Backlog, mode: str) -> None:
    async with explained(backlog.database, mode) as plans:
        await drop_empty(backlog.database, limit=100)
    plan = plans[0]
    assert plan.indexes("jobs") == {"ix_jobs_waiting"}
    assert plan.scanned("jobs") <= 100
    assert plan.scanned("waiting_adapters") <= LINES
