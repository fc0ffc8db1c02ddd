"""A broker that forgets, dies and flaps: promptness suffers, nothing else, and it comes back."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from db.database import Database
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench
from tests.support.load import Load, steady_load
from tests.support.scale import Scale
from tests.support.servers import ValkeyServer
from tests.support.settled import assert_few_connections, assert_nothing_left, settled
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

FLAGS = ("--max-num-seqs", "16", "--sim-step-ms", "2")


@pytest.fixture
def own_valkey(
    tmp_path_factory: pytest.TempPathFactory, servers_folder: Path
) -> Iterator[ValkeyServer]:
    """A broker that this test may kill."""
    with ValkeyServer(servers_folder / f"own-{tmp_path_factory.mktemp('vk').name}") as server:
        yield server


@pytest.fixture
async def deployment(
    database: Database, tmp_path: Path, database_url: str, own_valkey: ValkeyServer
) -> AsyncIterator[Deployment]:
    """An API, a steward and two workers on that broker."""
    await make_bench(database, tmp_path, adapters=2)
    with Deployment(tmp_path, database_url, own_valkey.url) as running:
        # side by side: each takes seconds to start on a busy machine
        workers = [running.start("worker", BASE, "--engine", "simulated", *FLAGS) for _ in "ab"]
        running.start_steward()
        running.start_api()
        for worker in workers:
            worker.wait_log("ready:")
        yield running


@asynccontextmanager
async def under_load(deployment: Deployment, database: Database) -> AsyncIterator[Load]:
    """Submissions all along; in the end every accepted job has succeeded, once."""
    url = f"http://127.0.0.1:{deployment.port}"
    async with steady_load(url, [BASE, "a0", "a1"]) as load:
        yield load
    assert load.refused == {}, "the broker is none of a client's business"
    accepted = len(set(load.accepted))
    await settled(database, accepted, succeeded=accepted)
    await assert_few_connections(deployment, database)


async def progressed(load: Load, jobs: int = 10) -> None:
    """Return when so many more jobs were accepted."""
    target = len(load.accepted) + jobs

    async def enough() -> bool:
        return len(load.accepted) >= target

    await eventually(enough, f"{jobs} more jobs accepted")


@pytest.mark.timeout(600)
async def test_a_broker_flushed_under_load_loses_nothing(
    database: Database, deployment: Deployment, own_valkey: ValkeyServer, scale: Scale
) -> None:
    async with under_load(deployment, database) as load:
        for _ in range(scale(3, 30)):
            await progressed(load)
            await asyncio.to_thread(own_valkey.flush)
    await assert_nothing_left(deployment, database)


@pytest.mark.timeout(600)
async def test_a_broker_killed_and_restarted_under_load_loses_nothing(
    database: Database, deployment: Deployment, own_valkey: ValkeyServer, scale: Scale
) -> None:
    async with under_load(deployment, database) as load:
        for _ in range(scale(3, 30)):
            await asyncio.to_thread(own_valkey.stop, signal.SIGKILL)
            await progressed(load)
            await asyncio.to_thread(own_valkey.start)
            await progressed(load)
    await assert_nothing_left(deployment, database)


@pytest.mark.timeout(600)
async def test_a_broker_that_flaps_under_load_loses_nothing_and_rings_again_afterwards(
    database: Database,
    tmp_path: Path,
    database_url: str,
    own_valkey: ValkeyServer,
    scale: Scale,
) -> None:
    await make_bench(database, tmp_path, adapters=2)
    # nothing but doorbells wakes these workers in the time of a test: no poll, no steward
    hard_of_hearing = {"LORRY_POLL_SECONDS": "600"}
    with Deployment(tmp_path, database_url, own_valkey.url, **hard_of_hearing) as deployment:
        deployment.start_api()
        deployment.start_worker(BASE, *FLAGS)
        for _ in range(scale(5, 30)):
            await asyncio.to_thread(own_valkey.stop, signal.SIGKILL)
            await asyncio.sleep(0.2)  # the fault itself: down and up again every 200 ms
            await asyncio.to_thread(own_valkey.start)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(deployment.post, "a0", "while it flaps")
        jobs = scale(5, 30)

        async def rung() -> bool:
            nonlocal jobs
            # each post rings; the doorbell is heard once the consumer has found the broker again
            await asyncio.to_thread(deployment.post, "a1", "afterwards")
            jobs += 1
            await asyncio.sleep(0.5)
            queued = await database.fetch_value("SELECT count(*) FROM jobs WHERE state = 'queued'")
            return bool(queued == 0)

        await eventually(rung, "a doorbell to be heard again", 40)
        await settled(database, jobs, succeeded=jobs)
        await assert_few_connections(deployment, database)
        await assert_nothing_left(deployment, database)
