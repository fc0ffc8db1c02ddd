"""Folding in a real drain, on the simulated engine: it happens, nobody starves, nothing is lost."""

import asyncio
from pathlib import Path

import pytest

from core.settings import Settings
from db import attempts, registry
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import Bench, all_final, make_bench, states, submit
from tests.support.waiting import eventually
from workers.engine.protocol import EngineDead
from workers.engine.simulated import SimulatedEngine

#: A step of 2 ms and more a sequence: a line of some hundred jobs takes seconds.
STEPS = ("--sim-step-ms", "1", "--sim-step-ms-per-seq", "0.2", "--max-num-seqs", "32",
         "--sim-fold-ms", "1")  # fmt: skip
QUICK_TURNS = Settings(**{**QUICK.model_dump(), "quantum_seconds": 0.5})


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=4)


async def is_folded(engine: SimulatedEngine, wanted: bool = True) -> bool:
    """Whether an adapter is folded, or none."""
    return (engine.folded is not None) is wanted


async def test_a_large_drain_runs_folded_and_says_so(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    ids = await submit(bench.database, "a0", 150, max_tokens=100, ignore_eos=True)
    async with drain_core(bench, tmp_path / "c", broker_url, *STEPS, fold=True) as (
        core,
        engine,
        _,
    ):
        await eventually(lambda: all_final(bench.database), "every job is final", seconds=60)
        assert core.feeder.folding.folded is None or not core.feeder.running
        await eventually(lambda: is_folded(engine, False), "it is unfolded")  # idle: nobody's
    assert (await states(bench.database))["succeeded"] == 150
    rows = [await attempts.list_attempts(bench.database, DEFAULT_TENANT_ID, i, 0, 5) for i in ids]
    folded = sum(row[-1]["folded"] for row in rows if row)
    assert folded > 130  # those too that were in the engine when it was folded


async def test_it_is_off_where_it_is_off(bench: Bench, tmp_path: Path, broker_url: str) -> None:
    await submit(bench.database, "a0", 200, max_tokens=20, ignore_eos=True)
    async with drain_core(bench, tmp_path / "c", broker_url, *STEPS) as (_, engine, _task):
        await eventually(lambda: all_final(bench.database), "every job is final", seconds=60)
        assert engine.folded is None
    assert (await states(bench.database))["succeeded"] == 200


async def test_others_get_their_turns_between_the_folds(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """Four lines, the base and a straggler: all are answered, long before the largest is done."""
    await submit(bench.database, "a0", 1500, max_tokens=20, ignore_eos=True)
    async with drain_core(
        bench, tmp_path / "c", broker_url, *STEPS, settings=QUICK_TURNS, fold=True
    ) as (core, engine, _):
        await eventually(lambda: is_folded(engine), "one is folded", seconds=20)
        few = await submit(bench.database, "a1", 20, max_tokens=20, ignore_eos=True)
        base = await submit(bench.database, "sim-base", 20, max_tokens=20, ignore_eos=True)

        async def answered() -> bool:
            found = await bench.database.fetch_value(
                "SELECT count(*) FROM jobs WHERE id = ANY($1::uuid[]) AND state = 'succeeded'",
                [*few, *base],
            )
            return bool(found == 40)

        await eventually(answered, "the few are answered", seconds=30)
        assert (await states(bench.database))["queued"] > 0
        await eventually(lambda: all_final(bench.database), "every job is final", seconds=60)
        assert core.feeder.window.jobs == 0
    assert (await states(bench.database)) == {"succeeded": 1540}


async def test_stopping_lets_parked_jobs_finish(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 400, max_tokens=30, ignore_eos=True)
    await submit(bench.database, "a1", 400, max_tokens=30, ignore_eos=True)
    async with drain_core(bench, tmp_path / "c", broker_url, *STEPS, fold=True) as (
        core,
        engine,
        task,
    ):
        await eventually(lambda: is_folded(engine), "one is folded", seconds=20)
        core.stop()
        await asyncio.wait_for(task, 30)
        assert engine.running == 0
    found = await states(bench.database)
    assert found["running"] == 0
    assert found["succeeded"] + found["queued"] == 800


async def test_a_fold_that_fails_half_way_gives_everything_back(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 300, max_tokens=200, ignore_eos=True)
    (version,) = await registry.current_versions(bench.database, bench.base_model_id, "a0")
    flags = (*STEPS, "--sim-fold-fails", str(version))
    async with drain_core(bench, tmp_path / "c", broker_url, *flags, fold=True) as (
        _,
        _engine,
        task,
    ):
        with pytest.raises(EngineDead, match="half-way"):
            await asyncio.wait_for(asyncio.shield(task), 30)
    found = await states(bench.database)
    assert found["running"] == 0
    assert found["succeeded"] + found["queued"] == 300
