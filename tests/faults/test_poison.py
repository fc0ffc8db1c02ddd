"""One job that kills its engine, among many that do not: it fails, alone, and soon."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from db import jobs as job_rows
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.deployment import Deployment
from tests.support.fleet import Fleet
from tests.support.jobs import all_final, make_bench, submit
from tests.support.settled import assert_nothing_left, settled

pytestmark = pytest.mark.processes

FLAGS = ("--max-num-seqs", "64", "--sim-step-ms", "20", "--sim-die-on", "poison")
#: log2 of the running set (96 jobs with the feed's surplus), two deaths alone, and some to spare.
MOST_DEATHS = 12


@pytest.fixture
def deployment(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Deployment]:
    with Deployment(tmp_path, database_url, broker_url) as running:
        yield running


@pytest.mark.timeout(240)
async def test_a_poison_job_fails_alone_after_few_engine_deaths(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    await make_bench(database, tmp_path, adapters=2)
    await submit(database, "a0", 130, max_tokens=8)
    (poison,) = await submit(database, "a0", prompt="poison", max_tokens=8)
    await submit(database, "a0", 119, max_tokens=8)
    await submit(database, "a1", 250, max_tokens=8)
    deployment.start_steward()
    fleet = Fleet(deployment, 1, *FLAGS)

    async def tend() -> None:
        while not await all_final(database):
            fleet.tend()
            await asyncio.sleep(0.1)

    await asyncio.wait_for(tend(), 200)
    await settled(database, 500, succeeded=499, failed=1)
    row = await job_rows.get(database, DEFAULT_TENANT_ID, poison)
    assert row is not None and row["state"] == "failed"
    assert 1 <= fleet.exits[3] <= MOST_DEATHS, fleet.exits
    await assert_nothing_left(deployment, database)
