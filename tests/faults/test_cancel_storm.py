"""A thousand jobs cancelled at random times: each is cancelled or succeeded, and never both."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from core.ids import IdPrefix, format_id
from db.database import Database
from tests.support.api import inside
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench, states, submit
from tests.support.settled import assert_few_connections, assert_nothing_left, settled
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

JOBS = 1000
CLIENTS = 8


@pytest.fixture
def deployment(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Deployment]:
    with Deployment(tmp_path, database_url, broker_url) as running:
        yield running


async def test_cancelled_or_succeeded_and_never_both(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    await make_bench(database, tmp_path, adapters=2)
    # ten seconds of work, so that cancels meet jobs that wait, run and have just been answered
    flags = ("--max-num-seqs", "32", "--sim-step-ms", "40")
    worker = deployment.start("worker", BASE, "--engine", "simulated", *flags)
    deployment.start_steward()
    deployment.start_api()
    ids = await submit(database, "a0", JOBS // 2, max_tokens=8)
    ids += await submit(database, "a1", JOBS // 2, max_tokens=8)
    dice = random.Random(3)
    dice.shuffle(ids)
    left = list(ids)
    answered: dict[str, str] = {}

    async def cancel_some(client: httpx2.AsyncClient) -> None:
        while left:
            job_id = format_id(IdPrefix.JOB, left.pop())
            response = await client.post(f"{deployment.client.base_url}/v1/jobs/{job_id}/cancel")
            assert response.status_code == 200, response.text
            answered[job_id] = response.json()["state"]
            await asyncio.sleep(dice.uniform(0, 0.03))

    worker.wait_log("ready:")

    async def begun() -> bool:
        return (await states(database))["succeeded"] > 0

    await eventually(begun, "the first jobs to succeed")
    async with httpx2.AsyncClient(timeout=30) as client, asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(cancel_some(client))
    found = await settled(database, JOBS)
    assert set(found) == {"cancelled", "succeeded"}, found
    # what the cancel answered is what it stays
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT id, state FROM jobs")
    now = {row["id"]: row["state"] for row in rows}
    assert {inside(i): s for i, s in answered.items()} == now

    await assert_few_connections(deployment, database)
    await assert_nothing_left(deployment, database)
    assert await database.fetch_value("SELECT count(lease_owner) FROM jobs") == 0
