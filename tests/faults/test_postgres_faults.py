"""Postgres restarted and frozen under load: requests wait or get 503, nothing is lost."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from db.database import Database
from db.migrate import upgrade
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench
from tests.support.load import Load, steady_load
from tests.support.scale import Scale
from tests.support.servers import PostgresServer
from tests.support.settled import assert_few_connections, assert_nothing_left, settled
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

FLAGS = ("--max-num-seqs", "16", "--sim-step-ms", "5")
#: An outage is nobody's fault; here nobody is to be taken for lost for it either.
LEASE_SECONDS = 6.0


@pytest.fixture
def own_postgres(
    tmp_path_factory: pytest.TempPathFactory, servers_folder: Path
) -> Iterator[PostgresServer]:
    """A server that this test may restart."""
    with PostgresServer(servers_folder / f"own-{tmp_path_factory.mktemp('pg').name}") as server:
        server.create_database("lorry_own")
        upgrade(server.url("lorry_own"))
        yield server


@asynccontextmanager
async def deployed(
    postgres: PostgresServer, folder: Path, broker_url: str
) -> AsyncIterator[tuple[Database, Deployment]]:
    """An API, a steward and two workers on that server."""
    url = postgres.url("lorry_own")
    async with Database.connect(url) as database:
        await make_bench(database, folder, adapters=2)
        lease = {"LORRY_LEASE_SECONDS": str(LEASE_SECONDS)}
        with Deployment(folder, url, broker_url, **lease) as running:
            workers = [running.start("worker", BASE, "--engine", "simulated", *FLAGS) for _ in "ab"]
            running.start_steward()
            running.start_api()
            for worker in workers:
                worker.wait_log("ready:")
            yield database, running


async def progressed(load: Load, jobs: int = 5) -> None:
    target = len(load.accepted) + jobs

    async def enough() -> bool:
        return len(load.accepted) >= target

    await eventually(enough, f"{jobs} more jobs accepted: {load.refused}", 60)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
async def test_restarts_under_load_lose_and_double_nothing(
    how: signal.Signals,
    own_postgres: PostgresServer,
    tmp_path: Path,
    broker_url: str,
    scale: Scale,
) -> None:
    async with deployed(own_postgres, tmp_path, broker_url) as (database, deployment):
        url = f"http://127.0.0.1:{deployment.port}"
        async with steady_load(url, [BASE, "a0", "a1"]) as load:
            for _ in range(scale(2, 20)):
                await progressed(load)
                await asyncio.to_thread(own_postgres.stop, how)
                await asyncio.to_thread(own_postgres.start)
            await progressed(load)
        # what was answered with 202 is there, and nothing that was not answered so is there twice
        accepted = len(set(load.accepted))
        assert accepted == len(load.accepted)
        await settled(database, accepted, succeeded=accepted)
        assert all(p.popen.poll() is None for p in deployment.processes)
        await assert_few_connections(deployment, database)
        await assert_nothing_left(deployment, database)


@pytest.mark.timeout(300)
async def test_a_postgres_that_hangs_beyond_every_lease_loses_nothing_and_nobody(
    own_postgres: PostgresServer, tmp_path: Path, broker_url: str
) -> None:
    async with deployed(own_postgres, tmp_path, broker_url) as (database, deployment):
        url = f"http://127.0.0.1:{deployment.port}"
        async with steady_load(url, [BASE, "a0", "a1"]) as load:
            await progressed(load, 20)
            assert own_postgres.process is not None
            server = psutil.Process(own_postgres.process.pid)
            backends = server.children()
            for process in (server, *backends):
                process.suspend()
            await asyncio.sleep(LEASE_SECONDS + 3)  # the fault itself: longer than any lease
            for process in (*backends, server):
                process.resume()
            await progressed(load, 20)
        accepted = len(set(load.accepted))
        await settled(database, accepted, succeeded=accepted)
        assert all(p.popen.poll() is None for p in deployment.processes)
        lost = await database.fetch_value("SELECT count(*) FROM workers WHERE lost_at IS NOT NULL")
        assert lost == 0, "every lease ran out while Postgres hung, and every worker was alive"
        await assert_few_connections(deployment, database)
        await assert_nothing_left(deployment, database)
