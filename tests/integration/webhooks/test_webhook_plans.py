"""EXPLAIN tests of webhooks: owing and sending read their own, however much else there is."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from db import delivery_log, results, sending, webhooks
from db.results import Result
from db.tenants import DEFAULT_TENANT_ID
from tests.support.backlog import LONG_LINE, Backlog, filled_backlog, running
from tests.support.plans import PLANS, explained
from tests.support.servers import PostgresServer

LIMIT = 256


@pytest.fixture(scope="module")
async def backlog(postgres: PostgresServer, template: str) -> AsyncIterator[Backlog]:
    async with filled_backlog(postgres, template) as filled:
        yield filled


@pytest.mark.parametrize("mode", PLANS)
async def test_jobs_that_owe_no_webhook_pay_for_none(backlog: Backlog, mode: str) -> None:
    async with (
        running(backlog, adapter=LONG_LINE, count=LIMIT) as ids,
        explained(backlog.database, mode) as plans,
    ):
        answers = [Result(i, 1, response="{}") for i in ids]
        assert await results.record(backlog.database, backlog.worker_id, answers) == set(ids)
    (plan,) = plans
    # nobody listens: that is found out once for the whole flush, and no input is read
    assert plan.scanned("webhook_endpoints") == 0
    assert sum(node.loops for node in plan.of("webhook_endpoints")) <= 1
    assert plan.scanned("job_inputs") == 0
    assert sum(node.loops for node in plan.of("job_inputs")) == 0


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("mode", PLANS)
async def test_owing_reads_the_inputs_of_those_who_owe(
    backlog: Backlog, mode: str, listening: bool
) -> None:
    database = backlog.database
    if listening:
        await webhooks.create(database, DEFAULT_TENANT_ID, "https://a.b/", ["job.succeeded"], "")
    async with running(backlog, adapter=LONG_LINE, count=LIMIT) as ids:
        async with database.connection() as connection:
            await connection.execute("UPDATE jobs SET webhook = true WHERE id = ANY($1)", ids[:10])
            await connection.execute(
                "UPDATE job_inputs SET webhook_url = 'https://c.d/' WHERE job_id = ANY($1)"
                " AND tenant_id = 1",
                ids[:10],
            )
        async with explained(database, mode) as plans:
            answers = [Result(i, 1, response="{}") for i in ids]
            assert await results.record(database, backlog.worker_id, answers) == set(ids)
        async with database.connection() as connection:
            await connection.execute("UPDATE jobs SET webhook = NULL WHERE webhook")
            await connection.execute("DELETE FROM webhook_secrets")
            await connection.execute("DELETE FROM webhook_endpoints")
    (plan,) = plans
    assert plan.indexes("job_inputs") == {"pk_job_inputs"}
    assert plan.scanned("job_inputs") == 10
    (inserted,) = [n for n in plan.nodes if n.kind == "ModifyTable" and n.relation == "deliveries"]
    assert inserted.rows == 0  # it returns none
    assert plan.scanned("webhook_endpoints") == listening


OWED_LINES, OWED_EACH = 50, 400


@pytest.fixture
async def owing(backlog: Backlog) -> AsyncIterator[Backlog]:
    """The backlog, with many deliveries of 20 tenants that are pending."""
    async with backlog.database.connection() as connection:
        for number in range(2, 21):
            await connection.execute(
                "INSERT INTO tenants (name) VALUES ($1) ON CONFLICT DO NOTHING", f"t{number}"
            )
        for tenant in await connection.fetch("SELECT id FROM tenants"):
            await webhooks.ensure_default_secret(connection, tenant["id"])
        await connection.execute(
            "INSERT INTO deliveries (tenant_id, url, line, event_id, type, subject, told)"
            " SELECT 1 + n % 20, 'https://a.b/', n % $1, uuidv7(), 'job.failed', 'job', 'failed'"
            " FROM generate_series(1, $1::int * $2::int) n",
            OWED_LINES,
            OWED_EACH,
        )
        await connection.execute("VACUUM ANALYZE deliveries")
    yield backlog
    async with backlog.database.connection() as connection:
        await connection.execute("TRUNCATE deliveries")


@pytest.mark.parametrize("mode", PLANS)
async def test_sending_reads_what_it_takes(owing: Backlog, mode: str) -> None:
    database = owing.database
    async with explained(database, mode) as plans:
        lines = await sending.look(database)
    (plan,) = plans
    assert len(lines) == OWED_LINES
    assert plan.indexes("deliveries") == {"ix_deliveries_pending"}
    # one descent for each line, whatever waits in it
    assert plan.scanned("deliveries") <= OWED_LINES + 1
    grants = [sending.Grant(line.line, 3) for line in lines[:5]]
    async with explained(database, mode) as plans:
        claimed = await sending.claim(database, grants, 60)
    assert len(claimed) == 15
    plan = plans[0]
    assert plan.indexes("deliveries") == {"ix_deliveries_pending", "ctid"}
    assert plan.scanned("deliveries") <= 2 * 15
    outcomes = [
        sending.Outcome(
            each.id, each.attempt - 1, each.line, None, "delivered", None, datetime.now(UTC), 0.1
        )
        for each in claimed
    ]
    async with explained(database, mode) as plans:
        await sending.record(database, outcomes, ())
    (plan,) = plans
    assert plan.indexes("deliveries") <= {"pk_deliveries"}
    assert plan.scanned("deliveries") <= 3 * 15


@pytest.mark.parametrize("mode", PLANS)
async def test_the_log_of_deliveries_reads_a_page(owing: Backlog, mode: str) -> None:
    async with explained(owing.database, mode) as plans:
        rows = await delivery_log.list_page(
            owing.database, DEFAULT_TENANT_ID, delivery_log.DeliveryFilter(), None, 20
        )
        assert await delivery_log.prune(owing.database, 9 * 86_400) == 0
    assert len(rows) == 20
    page, pruned = plans
    assert page.indexes("deliveries") == {"ix_deliveries_tenant"}
    assert page.scanned("deliveries") == 20
    assert pruned.scanned("deliveries") == 0 and pruned.pages < 50
