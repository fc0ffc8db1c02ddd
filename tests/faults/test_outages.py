"""Parts that die under load: every accepted job is still answered, once."""

import asyncio
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import Unavailable
from db.database import Database
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench, states, submit
from tests.support.servers import PostgresServer, ValkeyServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

#: A job takes 8 tokens of 5 ms, so that a backlog lasts long enough to break things under it.
SLOW = ("--max-num-seqs", "16", "--sim-step-ms", "5")


@pytest.fixture
def own_valkey(
    tmp_path_factory: pytest.TempPathFactory, servers_folder: Path
) -> Iterator[ValkeyServer]:
    """A broker that this test may kill."""
    with ValkeyServer(servers_folder / f"own-{tmp_path_factory.mktemp('vk').name}") as server:
        yield server


@pytest.fixture
def deployment(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Deployment]:
    with Deployment(tmp_path, database_url, broker_url) as running:
        yield running


async def finished(database: Database, count: int) -> None:
    """Wait until `count` jobs have succeeded and none is anything else."""

    async def done() -> bool:
        try:
            return await states(database) == {"succeeded": count}
        except Unavailable:  # this test's own connection, while Postgres is away
            return False

    await eventually(done, f"{count} jobs succeeded", seconds=90)
    outputs = await database.fetch_value("SELECT count(*) FROM job_outputs")
    assert outputs == count


async def test_two_workers_share_one_adapters_backlog_and_none_runs_twice(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    await make_bench(database, tmp_path, adapters=1)
    for _ in range(2):
        deployment.start_worker(BASE, *SLOW)
    await submit(database, "a0", 400, max_tokens=8)
    await finished(database, 400)
    async with database.connection() as connection:
        attempts = await connection.fetch("SELECT DISTINCT attempt, failures, releases FROM jobs")
        shares = await connection.fetch("SELECT id FROM workers")
    assert [tuple(row.values()) for row in attempts] == [(1, 0, 0)]
    assert len(shares) == 2
    recorded = []
    for process in deployment.processes:
        assert process.stop() == 0
        recorded.append(int(re.findall(r"recorded=(\d+)", process.log())[0]))
    assert sum(recorded) == 400 and min(recorded) > 0


async def test_the_broker_killed_under_load_loses_no_job(
    database: Database, tmp_path: Path, database_url: str, own_valkey: ValkeyServer
) -> None:
    with Deployment(tmp_path, database_url, own_valkey.url) as deployment:
        await make_bench(database, tmp_path, adapters=2)
        deployment.start_api()
        deployment.start_worker(BASE, *SLOW)
        deployment.start_steward()
        for number in range(150):
            deployment.post(f"a{number % 2}", f"before {number}")
        own_valkey.stop(signal.SIGKILL)
        for number in range(150):
            deployment.post(f"a{number % 2}", f"without a broker {number}")
        await finished(database, 300)
        own_valkey.start()
        deployment.post("a0", "after")
        await finished(database, 301)


async def test_the_api_killed_loses_no_accepted_job(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    await make_bench(database, tmp_path, adapters=2)
    api = deployment.start_api()
    deployment.start_worker(BASE, *SLOW)
    for number in range(200):
        deployment.post(f"a{number % 2}", f"job {number}")
    api.kill()
    await finished(database, 200)


async def test_a_worker_killed_has_its_jobs_run_elsewhere(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    await make_bench(database, tmp_path, adapters=1)
    deployment.start_steward()
    first = deployment.start_worker(BASE, "--max-num-seqs", "16", "--sim-step-ms", "60000")
    await submit(database, "a0", 50, max_tokens=8)

    async def running() -> bool:
        return (await states(database))["running"] > 0

    await eventually(running, "jobs in the engine")
    first.kill()
    deployment.start_worker(BASE, *SLOW)
    await finished(database, 50)


async def test_postgres_restarted_under_load_loses_no_result(
    tmp_path: Path, servers_folder: Path, broker_url: str
) -> None:
    from db.migrate import upgrade

    with PostgresServer(servers_folder / "own-pg") as postgres:
        postgres.create_database("lorry_own")
        url = postgres.url("lorry_own")
        await asyncio.to_thread(upgrade, url)
        async with Database.connect(url) as database:
            await make_bench(database, tmp_path, adapters=1)
            with Deployment(tmp_path, url, broker_url) as deployment:
                deployment.start_steward()
                deployment.start_worker(BASE, *SLOW)
                await submit(database, "a0", 300, max_tokens=8)
                postgres.stop(signal.SIGQUIT)  # immediate: what a crash of the server leaves
                postgres.start()
                await finished(database, 300)
