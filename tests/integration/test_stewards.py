"""Stewards: any number at once have the effect of one, and the broker may be down."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from core.settings import Settings
from db import claims, workers
from db.database import Database
from db.doorbell import Doorbell
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.cores import drain_core
from tests.support.jobs import BASE, Bench, make_bench, states, submit
from tests.support.settled import assert_one_result_each, settled, spent
from tests.support.waiting import eventually
from workers.steward.duties import Duty, all_duties

STEWARDS, TICKS = 2, 10
LEASE_SECONDS = 0.5


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=2)


@pytest.fixture(params=["broker up", "broker down"])
def doorbells(
    request: pytest.FixtureRequest, broker_url: str, tmp_path: Path
) -> Iterator[list[Doorbell]]:
    nowhere = f"redis+socket://{tmp_path}/nothing.sock"
    made = [
        Doorbell(broker_url if request.param == "broker up" else nowhere) for _ in range(STEWARDS)
    ]
    yield made
    for doorbell in made:
        doorbell.close()


async def tick(duties: list[Duty]) -> None:
    """Every steward does every duty ten times, all of it at once."""
    await asyncio.gather(*(duty.act() for duty in duties * TICKS))


async def test_two_stewards_at_ten_ticks_at_once_have_the_effect_of_one(
    bench: Bench, doorbells: list[Doorbell], tmp_path: Path, broker_url: str
) -> None:
    database = bench.database
    queued = await submit(database, BASE, 10)
    late = await submit(database, "a1", 10)
    lost = await submit(database, "a0", 20)
    await _lose_a_worker_with(bench, lost)
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET deadline = now() WHERE id = ANY($1)", late)
        await connection.execute("DELETE FROM waiting_adapters")
        await connection.execute(
            "INSERT INTO idempotency_keys"
            " (tenant_id, route, key, fingerprint, resource_id, created_at)"
            " SELECT 1, 'r', 'k' || n, '', $1, now() - make_interval(hours => n)"
            " FROM generate_series(20, 29) n",
            queued[0],
        )
    settings = Settings(
        lease_seconds=LEASE_SECONDS, sweep_seconds=0.2, store_url=str(tmp_path / "store")
    )
    duties = [d for bell in doorbells for d in all_duties(database, bell, settings)]

    async def rescued() -> bool:
        await tick(duties)
        return bool(await database.fetch_value("SELECT bool_and(lost_at IS NOT NULL) FROM workers"))

    await eventually(rescued, "the lost worker's jobs to be freed")
    await tick(duties)
    assert await states(database) == {"queued": 30, "expired": 10}
    assert await spent(database, lost) == {1: 20}, "freed once"
    most = await database.fetch_value("SELECT max(failures) FROM jobs WHERE id = ANY($1)", lost)
    assert most <= 1
    await assert_one_result_each(database)
    keys = await database.fetch_value("SELECT count(*) FROM idempotency_keys")
    assert keys == 4, "those of less than 24 hours"
    version_of_base = await database.fetch_value(
        "SELECT count(*) FROM waiting_adapters WHERE adapter_version_id = 0"
    )
    assert version_of_base == 1, "the line without a row is back"
    heir = Settings(lease_seconds=30, poll_seconds=0.05)
    async with drain_core(bench, tmp_path / "cache", broker_url, settings=heir):
        await settled(database, 40, succeeded=30, expired=10)


async def _lose_a_worker_with(bench: Bench, jobs: Sequence[object]) -> None:
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    worker = await workers.register(bench.database, facts, 60)
    version = await bench.database.fetch_value(
        "SELECT adapter_version_id FROM jobs WHERE id = $1", jobs[0]
    )
    line = Line(bench.base_model_id, version, DEFAULT_TENANT_ID)
    assert len(await claims.claim(bench.database, worker, line, len(jobs))) == len(jobs)
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE workers SET lease_expires_at = now() - interval '1 s'")
