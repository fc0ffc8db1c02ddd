"""Workers killed at any moment, again and again, under load."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from db.database import Database
from tests.support.deployment import Deployment
from tests.support.fleet import Fleet
from tests.support.jobs import make_bench, submit
from tests.support.scale import Scale
from tests.support.settled import assert_few_connections, assert_nothing_left, settled
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

#: Jobs come to an end all the time, and some thousands outlast the kills.
FLAGS = ("--max-num-seqs", "8", "--sim-step-ms", "10")
#: Nobody is at fault for dying of these kills: they must not use up anybody's tries.
PATIENT = {
    "LORRY_LEASE_SECONDS": "3",
    "LORRY_MAX_ATTEMPTS": "100",
    "LORRY_POLL_SECONDS": "0.2",
    "LORRY_GRACE_SECONDS": "1",
}


@pytest.fixture
def deployment(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Deployment]:
    with Deployment(tmp_path, database_url, broker_url, **PATIENT) as running:
        yield running


@pytest.mark.timeout(2400)
async def test_workers_killed_at_random_moments_lose_and_double_nothing(
    database: Database, deployment: Deployment, tmp_path: Path, scale: Scale
) -> None:
    kills, jobs = scale(8, 100), scale(400, 5000)
    await make_bench(database, tmp_path, adapters=3)
    deployment.start_steward()
    for number in range(3):
        await submit(database, f"a{number}", jobs // 4, max_tokens=8)
    await submit(database, "sim-base", jobs - 3 * (jobs // 4), max_tokens=8)
    fleet = Fleet(deployment, 2, *FLAGS)
    dice = random.Random(4)
    for _ in range(kills):
        index = dice.randrange(2)

        async def ready(index: int = index) -> bool:
            fleet.tend()
            return fleet.is_ready(index)

        await eventually(ready, "a worker to kill", 60)
        await asyncio.sleep(dice.uniform(0, 0.6))  # the moment is what is random here
        fleet.kill(index, launcher=dice.random() < 0.3)
        fleet.tend()
    await assert_few_connections(deployment, database)
    found = await settled(database, jobs, seconds=600, succeeded=jobs)
    assert found == {"succeeded": jobs}
    await assert_nothing_left(deployment, database)
