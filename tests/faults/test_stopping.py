"""SIGTERM with the engine full and another worker idle: a stop costs nobody a try."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from db.database import Database
from tests.support.deployment import Deployment, Process
from tests.support.jobs import BASE, make_bench, states, submit
from tests.support.settled import assert_few_connections, assert_nothing_left, settled, spent
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

JOBS = 24
SEQUENCES = ("--max-num-seqs", "16")


@pytest.fixture
def deployment(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Deployment]:
    with Deployment(tmp_path, database_url, broker_url) as running:
        yield running


async def full(database: Database) -> None:
    """Return once the first worker has all the jobs."""

    async def all_run() -> bool:
        return await states(database) == {"running": JOBS}

    await eventually(all_run, "a full engine")


async def test_within_the_grace_every_job_is_finished_where_it_ran(
    database: Database, deployment: Deployment, tmp_path: Path
) -> None:
    await make_bench(database, tmp_path, adapters=1)
    deployment.start_steward()
    busy = deployment.start_worker(BASE, *SEQUENCES, "--sim-step-ms", "100")
    await submit(database, "a0", JOBS, max_tokens=8)
    await full(database)
    idle = deployment.start_worker(BASE, *SEQUENCES)
    assert busy.stop() == 0
    await settled(database, JOBS, succeeded=JOBS)
    assert await spent(database) == {1: JOBS}
    assert await _claims(database) == {(1, 0, 0): JOBS}, "no job was given to another worker"
    await _recorded(busy, JOBS)
    assert idle.stop() == 0
    await _recorded(idle, 0)
    await assert_nothing_left(deployment, database)


@pytest.mark.parametrize("hurried", [False, True], ids=["grace over", "second SIGTERM"])
async def test_what_outlasts_the_stop_runs_elsewhere_at_no_cost(
    database: Database, tmp_path: Path, database_url: str, broker_url: str, hurried: bool
) -> None:
    await make_bench(database, tmp_path, adapters=1)
    grace = {"LORRY_GRACE_SECONDS": "600" if hurried else "0.5"}
    with Deployment(tmp_path, database_url, broker_url, **grace) as deployment:
        deployment.start_steward()
        busy = deployment.start_worker(BASE, *SEQUENCES, "--sim-step-ms", "60000")
        await submit(database, "a0", JOBS, max_tokens=8)
        await full(database)
        idle = deployment.start_worker(BASE, *SEQUENCES)
        busy.popen.terminate()
        if hurried:
            busy.wait_log("Stopping")
            busy.popen.terminate()
        assert busy.popen.wait(20) == 0
        await settled(database, JOBS, succeeded=JOBS)
        assert await spent(database) == {1: JOBS}
        assert await _claims(database) == {(2, 1, 0): JOBS}
        await assert_few_connections(deployment, database)
        assert idle.stop() == 0
        await _recorded(busy, 0)
        await _recorded(idle, JOBS)
        await assert_nothing_left(deployment, database)


async def _claims(database: Database) -> dict[tuple[int, int, int], int]:
    """How many jobs have which (attempt, releases, failures)."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT attempt, releases, failures, count(*) AS jobs FROM jobs GROUP BY 1, 2, 3"
        )
    return {(r["attempt"], r["releases"], r["failures"]): r["jobs"] for r in rows}


async def _recorded(worker: Process, jobs: int) -> None:
    """A worker's log says at its end how many results it recorded: each ran to its end there."""
    assert f"recorded={jobs}" in worker.log(), worker.log()
