"""Turns: which line comes next where more lines wait than a look shows."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from db import registry
from db.database import Database
from tests.support.jobs import BASE, Bench, make_bench, submit
from workers.adapter_files import AdapterFiles
from workers.drain.neighbours import Neighbours
from workers.drain.planner import COLD_JOBS
from workers.drain.slots import Slots
from workers.drain.turns import Turns
from workers.engine.simulated import SimulatedEngine
from workers.metrics import DrainMetrics

#: More than a look shows by their age alone.
_LINES = 66


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=_LINES)


@pytest.fixture
async def turns(bench: Bench, tmp_path: Path) -> AsyncIterator[Turns]:
    engine = SimulatedEngine.from_flags(BASE, ["--served-model-name", BASE])
    await engine.start()
    files = AdapterFiles(bench.database, bench.store, tmp_path / "cache")
    slots = Slots(engine, files, DrainMetrics())
    yield Turns(
        bench.database,
        slots,
        base_model_id=bench.base_model_id,
        partitions=None,
        adapters=None,
        quantum_seconds=10,
        neighbours=Neighbours(),
        max_num_seqs=100,
    )
    slots.close()
    await engine.close()


async def next_adapter(bench: Bench, turns: Turns, *, running: int) -> str:
    """Whose turn it is, by name; ended at once, as if some of its jobs had been fed."""
    turn = await turns.current_or_next(running=running)
    assert turn is not None
    turn.fed = 1
    await turns.end(turn)
    for name in bench.adapters:
        ids = await registry.current_versions(bench.database, bench.base_model_id, name)
        if ids == [turn.line.adapter_version_id]:
            return name
    raise AssertionError(turn.line)


async def test_a_line_left_with_many_jobs_fills_seats_from_wherever_it_stands(
    bench: Bench, turns: Turns
) -> None:
    await submit(bench.database, "a0", COLD_JOBS)
    for name in bench.adapters[1:]:
        await submit(bench.database, name)
    assert await next_adapter(bench, turns, running=100) == "a0"  # the oldest; the last from now on
    assert await next_adapter(bench, turns, running=100) == "a1"
    assert await next_adapter(bench, turns, running=99) == "a0"
    assert await next_adapter(bench, turns, running=100) == "a2"
