"""A worker that sleeps beyond its lease and wakes up: what it has is nobody's any more."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from db.database import Database
from tests.support.deployment import Deployment
from tests.support.fleet import worker_process
from tests.support.jobs import BASE, make_bench, submit
from tests.support.scale import Scale
from tests.support.settled import (
    answers,
    assert_few_connections,
    assert_nothing_left,
    settled,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

JOBS = 12
#: The sleeper's jobs are finished in its engine while it sleeps: it wakes up with results.
SLEEPER = ("--max-num-seqs", "16", "--sim-step-ms", "250")
QUICK = ("--max-num-seqs", "16", "--sim-step-ms", "1")
EXIT_LEASE_LOST = 4


@pytest.fixture
def deployment(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Deployment]:
    with Deployment(tmp_path, database_url, broker_url, LORRY_LEASE_SECONDS="3") as running:
        yield running


@pytest.mark.timeout(900)
async def test_a_worker_stopped_beyond_its_lease_wakes_up_to_be_refused(
    database: Database, deployment: Deployment, tmp_path: Path, scale: Scale
) -> None:
    await make_bench(database, tmp_path, adapters=1)
    deployment.start_steward()
    rounds = scale(2, 20)
    for number in range(1, rounds + 1):
        sleeper = deployment.start_worker(BASE, *SLEEPER)
        ids = await submit(database, "a0", JOBS, max_tokens=8)

        async def all_run(ids: list[object] = ids) -> bool:  # type: ignore[assignment]
            running = await database.fetch_value(
                "SELECT count(*) FROM jobs WHERE state = 'running' AND id = ANY($1)", ids
            )
            return bool(running == JOBS)

        await eventually(all_run, "every job in the engine")
        worker = worker_process(sleeper)
        assert worker is not None
        worker.send_signal(signal.SIGSTOP)
        heir = deployment.start_worker(BASE, *QUICK)
        await settled(database, number * JOBS, succeeded=number * JOBS)
        written = await answers(database)
        worker.send_signal(signal.SIGCONT)
        assert sleeper.popen.wait(20) == EXIT_LEASE_LOST, sleeper.log()
        assert await answers(database) == written
        assert heir.stop() == 0
        await assert_few_connections(deployment, database)
    lost = await database.fetch_value("SELECT count(*) FROM workers WHERE lost_at IS NOT NULL")
    assert lost == rounds
    await assert_nothing_left(deployment, database)
