"""Suspects: a job that kills the engine fails by itself, and costs the others nothing."""

import asyncio
import math
from pathlib import Path
from uuid import UUID

import pytest

from db import claims, jobs, suspects, workers
from db.database import Database
from db.suspects import Death
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.waiting import eventually
from workers.engine.protocol import EngineDead

DIED = Death("suspect", "the engine died (test)", 2, 0.0)
LOST = Death("rescued", "its worker was lost", 3, 0.0)


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=3)


@pytest.fixture
async def worker(bench: Bench) -> int:
    return await new_worker(bench)


async def new_worker(bench: Bench) -> int:
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    return await workers.register(bench.database, facts, 60)


async def line_of(bench: Bench, adapter: str) -> Line:
    version = await bench.database.fetch_value(
        "SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id"
        " WHERE a.name = $1",
        adapter,
    )
    return Line(bench.base_model_id, version, DEFAULT_TENANT_ID)


async def claimed(bench: Bench, worker: int, adapter: str = "a0", limit: int = 99) -> list[UUID]:
    found = await claims.claim(bench.database, worker, await line_of(bench, adapter), limit)
    return [job.id for job in found]


async def take(bench: Bench, worker: int, **limits: object) -> list[UUID]:
    given = {"waited_seconds": 0, "limit": 999, **limits}
    group = await suspects.take_group(
        bench.database,
        worker,
        bench.base_model_id,
        **given,  # type: ignore[arg-type]
    )
    return [job.id for job in group]


async def die(bench: Bench, worker: int, fed: list[UUID], death: Death = DIED) -> int:
    return await workers.sign_off(bench.database, worker, death, fed)


async def lose(bench: Bench, worker: int) -> None:
    async with bench.database.connection() as connection:
        await connection.execute(
            "UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE id = $1", worker
        )
    assert worker in await workers.rescue_lost(bench.database, 0.0, max_attempts=3)


async def run_until_final(bench: Bench, folder: Path, broker_url: str, *flags: str) -> int:
    """One core after another, as a supervisor would; returns how many engines died."""
    deaths = 0
    while not await all_final(bench.database):
        async with drain_core(bench, folder, broker_url, *flags) as (_, _, task):
            done = asyncio.ensure_future(eventually(lambda: all_final(bench.database), "final"))
            await asyncio.wait({done, task}, return_when=asyncio.FIRST_COMPLETED)
            done.cancel()
            if task.done():
                with pytest.raises(EngineDead):
                    task.result()
                deaths += 1
        assert deaths < 50
    return deaths


@pytest.mark.parametrize("poisons", [1, 2])
async def test_poison_fails_alone_within_few_deaths(
    bench: Bench, tmp_path: Path, broker_url: str, poisons: int
) -> None:
    innocent = [*await submit(bench.database, "a0", 30), *await submit(bench.database, BASE, 30)]
    poison = await submit(bench.database, "a1", poisons, prompt="poison")
    innocent += await submit(bench.database, "a0", 30)
    flags = ("--sim-die-on", "poison", "--sim-step-ms", "20")
    deaths = await run_until_final(bench, tmp_path, broker_url, *flags)
    assert await states(bench.database) == {"succeeded": len(innocent), "failed": poisons}
    for job_id in poison:
        row = await jobs.get(bench.database, DEFAULT_TENANT_ID, job_id)
        assert row is not None and row["error_code"] == "attempts_exhausted"
        assert "poisoned by a request" in row["error_message"]
    assert deaths <= poisons * (math.ceil(math.log2(len(innocent) + poisons)) + 2)
    spent = await bench.database.fetch_value("SELECT sum(failures) FROM jobs")
    assert spent == poisons  # nobody paid but the culprits


async def test_a_death_splits_what_was_in_the_engine(bench: Bench, worker: int) -> None:
    ids = await submit(bench.database, "a0", 8)
    fed = await claimed(bench, worker)
    assert await die(bench, worker, fed) == 8
    second = await new_worker(bench)
    assert await claimed(bench, second) == []  # no claim mixes them with others
    first_half = await take(bench, second)
    third = await new_worker(bench)
    second_half = await take(bench, third)
    assert (len(first_half), len(second_half)) == (4, 4)
    assert {*first_half, *second_half} == set(ids)
    assert await take(bench, third) == []
    await die(bench, third, second_half)
    assert len(await take(bench, await new_worker(bench))) == 2


async def test_what_was_claimed_and_not_fed_is_no_suspect(bench: Bench, worker: int) -> None:
    await submit(bench.database, "a0", 5)
    fed = (await claimed(bench, worker))[:2]
    assert await die(bench, worker, fed) == 5
    other = await new_worker(bench)
    assert len(await claimed(bench, other)) == 3
    row = await bench.database.fetch_value("SELECT count(*) FROM jobs WHERE releases = 1")
    assert row == 3


async def test_a_victim_never_fails_however_often_the_engine_dies(
    bench: Bench, worker: int
) -> None:
    await submit(bench.database, "a0", 2)
    for _ in range(12):  # two together: neither was alone
        fed = await claimed(bench, worker) or [*await take(bench, worker)]
        fed += await take(bench, worker)
        assert len(fed) == 2
        await die(bench, worker, fed)
        worker = await new_worker(bench)
    assert await states(bench.database) == {"queued": 2}


async def test_a_job_alone_fails_at_the_second_death(bench: Bench, worker: int) -> None:
    await submit(bench.database, "a0")
    await die(bench, worker, await claimed(bench, worker))
    assert await states(bench.database) == {"queued": 1}
    worker = await new_worker(bench)
    await die(bench, worker, await take(bench, worker))
    assert await states(bench.database) == {"failed": 1}
    message = await bench.database.fetch_value("SELECT error_message FROM job_outputs")
    assert "the engine died (test)" in message and "2 times" in message


async def test_company_that_was_cancelled_is_company(bench: Bench, worker: int) -> None:
    """The one that was cancelled may be what kills the engine: it is still in there."""
    ids = await submit(bench.database, "a0", 2)
    fed = await claimed(bench, worker)
    await jobs.cancel(bench.database, DEFAULT_TENANT_ID, ids[0])
    await die(bench, worker, fed)
    deaths = await bench.database.fetch_value("SELECT suspect_deaths FROM jobs WHERE id=$1", ids[1])
    assert deaths is None


async def test_a_lost_workers_jobs_are_suspects(bench: Bench, worker: int) -> None:
    await submit(bench.database, "a0", 6)
    await claimed(bench, worker)
    await lose(bench, worker)
    assert len(await take(bench, await new_worker(bench))) == 3


async def test_a_lost_workers_unfed_group_stays_whole(bench: Bench, worker: int) -> None:
    """A worker feeds suspects alone: those that lie beside other jobs still waited for it."""
    await submit(bench.database, "a0", 8)
    await die(bench, worker, await claimed(bench, worker))
    busy = await new_worker(bench)
    await submit(bench.database, "a1", 2)
    await claimed(bench, busy, "a1")
    group = await take(bench, busy)
    await lose(bench, busy)
    assert set(await take(bench, await new_worker(bench))) in ({*group}, {*group} ^ {*group})
    sizes = await bench.database.fetch_value(
        "SELECT array_agg(n ORDER BY n) FROM (SELECT count(*) n FROM jobs"
        " WHERE suspect_group IS NOT NULL GROUP BY suspect_group) x"
    )
    assert sizes == [1, 1, 4, 4]


async def test_a_worker_takes_only_suspects_that_it_serves(bench: Bench, worker: int) -> None:
    await submit(bench.database, "a0", 2)
    await submit(bench.database, "a1", 2)
    fed = await claimed(bench, worker) + await claimed(bench, worker, "a1")
    await die(bench, worker, sorted(fed))
    picky = await new_worker(bench)
    assert await take(bench, picky, adapters=["a2"]) == []
    taken = []
    while group := await take(bench, picky, adapters=["a1"]):
        taken += group
    assert len(taken) == 2


async def test_a_cancelled_suspect_stays_cancelled(bench: Bench, worker: int) -> None:
    ids = await submit(bench.database, "a0", 2)
    fed = await claimed(bench, worker)
    await jobs.cancel(bench.database, DEFAULT_TENANT_ID, ids[0])
    await lose(bench, worker)
    await jobs.cancel(bench.database, DEFAULT_TENANT_ID, ids[1])
    assert set(fed) == set(ids)
    assert await states(bench.database) == {"cancelled": 2}
    assert await take(bench, await new_worker(bench)) == []


async def test_suspects_do_not_starve_beside_steady_work(
    bench: Bench, tmp_path: Path, broker_url: str, worker: int
) -> None:
    suspected = await submit(bench.database, "a1", 4)
    await die(bench, worker, await claimed(bench, worker, "a1"))
    await submit(bench.database, "a0", 60)
    more = True

    async def keep_busy() -> None:
        while more:
            if (await states(bench.database))["queued"] < 30:
                await submit(bench.database, "a0", 30)
            await asyncio.sleep(0.01)

    busy = asyncio.create_task(keep_busy())
    settings = QUICK.model_copy(update={"quantum_seconds": 0.3})
    flags = ("--max-num-seqs", "4", "--sim-step-ms", "25")
    try:
        async with drain_core(bench, tmp_path, broker_url, *flags, settings=settings):

            async def done() -> bool:
                return await jobs.finished_among(bench.database, suspected) == set(suspected)

            await eventually(done, "the suspects beside steady work")
            assert (await states(bench.database))["queued"] > 0
            more = False
            await busy
            await eventually(lambda: all_final(bench.database), "all jobs final")
    finally:
        more = False
        await busy


async def test_nothing_else_is_in_the_engine_with_suspects(
    bench: Bench, tmp_path: Path, broker_url: str, worker: int
) -> None:
    suspected = set(await submit(bench.database, "a1", 6))
    await die(bench, worker, await claimed(bench, worker, "a1"))
    await submit(bench.database, "a0", 60)
    settings = QUICK.model_copy(update={"quantum_seconds": 0.2})
    flags = ("--max-num-seqs", "4", "--sim-step-ms", "10")
    async with drain_core(bench, tmp_path, broker_url, *flags, settings=settings) as (
        core,
        engine,
        _,
    ):
        mixed = []
        feed = engine.submit

        def watch(requests, done):  # type: ignore[no-untyped-def]
            feed(requests, done)
            inside = {UUID(name.rpartition("-")[0]) in suspected for name in engine._sequences}
            mixed.append(len(inside) > 1)
            # a doorbell that comes meanwhile is another worker's
            assert core.feeder.free <= 0 or True not in inside

        engine.submit = watch  # type: ignore[method-assign]
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert mixed and not any(mixed)
    assert await states(bench.database) == {"succeeded": 66}
    attempts = await bench.database.fetch_value("SELECT max(attempt) FROM jobs")
    assert attempts == 2
