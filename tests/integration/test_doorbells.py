"""Doorbells lost, repeated, early, late and in any order: promptness alone depends on them."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.settings import Settings
from db.database import Database
from tests.support.cores import drain_core
from tests.support.jobs import BASE, Bench, make_bench, submit
from tests.support.settled import assert_one_result_each
from tests.support.waiting import eventually

#: Lost doorbells are made up for by the polls.
PATIENT = Settings(lease_seconds=30, poll_seconds=0.1, quantum_seconds=0.2, grace_seconds=5)
FLAGS = ("--max-num-seqs", "2", "--max-loras", "1", "--sim-step-ms", "1")

#: (model, jobs, rings before they are committed, rings after, which core hears them)
PLAN = st.lists(
    st.tuples(
        st.sampled_from([BASE, "a0", "a1"]),
        st.integers(0, 6),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=2)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=PLAN)
async def test_every_job_runs_once_whatever_becomes_of_its_doorbells(
    bench: Bench, tmp_path: Path, broker_url: str, plan: list[tuple[str, int, int, int, int]]
) -> None:
    ids = []
    rings: list[asyncio.Task[None]] = []
    async with (
        drain_core(bench, tmp_path / "1", broker_url, *FLAGS, settings=PATIENT) as (first, _, _),
        drain_core(bench, tmp_path / "2", broker_url, *FLAGS, settings=PATIENT) as (second, _, _),
    ):
        for model, jobs, early, late, hearer in plan:
            core = (first, second)[hearer]
            rings += [asyncio.create_task(core.feeder.ring()) for _ in range(early)]
            ids += await submit(bench.database, model, jobs)
            rings += [asyncio.create_task(core.feeder.ring()) for _ in range(late)]

        async def done() -> bool:
            left = await bench.database.fetch_value(
                "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')"
            )
            return bool(left == 0)

        await eventually(done, "every job final")
        # a doorbell that is held for ever would deafen its worker
        async with asyncio.timeout(10):
            await asyncio.gather(*rings)
        recorded = first.recorder.recorded + second.recorder.recorded
        assert recorded == len(ids)
    await assert_one_result_each(bench.database)
    async with bench.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT DISTINCT state, attempt, failures, releases FROM jobs WHERE id = ANY($1)", ids
        )
    assert [tuple(row.values()) for row in rows] == ([("succeeded", 1, 0, 0)] if ids else [])
