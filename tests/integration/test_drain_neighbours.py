"""Workers beside each other: cold adapters stay, partitions are dedicated, adapters move."""

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from core.errors import NotFound
from db import jobs, neighbours, registry
from db.database import Database
from db.partitions import move_adapter
from db.tenants import DEFAULT_TENANT_ID
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.waiting import eventually
from workers.drain import planner
from workers.drain.core import DrainCore
from workers.drain.neighbours import Neighbours, keep_in_touch

SHARED_PARTITIONS = 32


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=8)


async def test_a_cold_adapter_stays_with_the_worker_that_holds_it(
    bench: Bench, tmp_path: Path, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # however slow the machine is: that the moment is short is the planner's test
    monkeypatch.setattr(planner, "LEAVE_SECONDS", 1e9)
    flags = ("--max-loras", "4", "--max-num-seqs", "16", "--max-model-len", "1000000")
    hasty = QUICK.model_copy(update={"grace_seconds": 0.0})  # its long job need not end
    cold = bench.adapters[:4]
    known = Neighbours()
    async with AsyncExitStack() as stack:
        other, _, _ = await stack.enter_async_context(
            drain_core(bench, tmp_path / "1", broker_url, *flags, settings=hasty, neighbours=known)
        )
        await submit(bench.database, BASE, max_tokens=600_000, ignore_eos=True)

        async def busy() -> bool:
            return other.feeder.running > 0

        await eventually(busy, "a long job in the other worker")
        known.resident = await versions(bench, cold)  # so that the holder gets them all
        holder, _, _ = await stack.enter_async_context(
            drain_core(bench, tmp_path / "2", broker_url, *flags)
        )
        await one_job_each(bench, cold)
        assert holder.slots.resident == known.resident

        known.resident = frozenset()
        stack.callback(telling(bench, holder, Neighbours()).cancel)
        stack.callback(telling(bench, other, known).cancel)

        async def heard() -> bool:
            return known.resident == holder.slots.resident

        await eventually(heard, "the other worker to hear what the holder has")
        for _ in range(12):  # without the rule, the other worker would take about half of them
            await one_job_each(bench, cold)
        assert (holder.slots.loads, other.slots.loads) == (4, 0)


async def versions(bench: Bench, adapters: Iterable[str]) -> frozenset[int]:
    """The adapters' current versions."""
    async with bench.database.connection() as connection:
        targets = [await registry.resolve(connection, DEFAULT_TENANT_ID, a) for a in adapters]
    return frozenset(target.adapter_version_id for target in targets)


async def one_job_each(bench: Bench, adapters: Iterable[str]) -> None:
    """Submit a job for each adapter, and wait for the answers."""
    ids = {i for adapter in adapters for i in await submit(bench.database, adapter)}

    async def answered() -> bool:
        return await jobs.finished_among(bench.database, list(ids)) == ids

    await eventually(answered, "a round of single jobs")


def telling(bench: Bench, core: DrainCore, known: Neighbours) -> "asyncio.Task[None]":
    """A worker's talk with its neighbours, as `lorry worker` keeps it up, only quicker."""
    return asyncio.create_task(
        keep_in_touch(
            bench.database,
            core.lease.worker_id,
            bench.base_model_id,
            known,
            resident=lambda: core.slots.resident,
            partitions=None,
            dedicated_from=SHARED_PARTITIONS,
            every_seconds=0.01,
        )
    )


async def test_what_a_worker_says_of_itself_is_heard_while_its_lease_lives(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    database, base = bench.database, bench.base_model_id
    async with drain_core(bench, tmp_path, broker_url) as (core, _, _):
        me = core.lease.worker_id
        await neighbours.tell(database, me, {7, 8}, {40})
        heard = await neighbours.others(database, me + 1, base)
        assert heard.resident == {7, 8}
        assert heard.partitions == {40}
        assert (await neighbours.others(database, me, base)).resident == frozenset()
        assert (await neighbours.others(database, me + 1, base + 1)).resident == frozenset()
    assert (await neighbours.others(database, me + 1, base)).resident == frozenset()


async def test_a_dedicated_partition_is_left_to_its_worker_while_that_lives(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    database = bench.database
    assert await move_adapter(database, "default", "a0", 40, SHARED_PARTITIONS) == 40
    known = Neighbours()
    known.partitions = frozenset({40})  # as it heard of a worker of partition 40
    mine = await submit(database, "a1", 3)
    theirs = await submit(database, "a0", 3)
    async with drain_core(bench, tmp_path / "1", broker_url, neighbours=known):

        async def done() -> bool:
            return await jobs.finished_among(database, mine) == set(mine)

        await eventually(done, "the jobs of the shared partitions")
        assert await jobs.finished_among(database, theirs) == set()
        known.partitions = frozenset()  # it is gone: nothing may be left behind
        await eventually(lambda: all_final(database), "all jobs final")


async def test_nothing_is_lost_while_an_adapter_moves_under_load(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """Two workers that together serve exactly the two partitions, and would never find a line that
    a submission put back into a third."""
    database = bench.database
    shared = await move_adapter(database, "default", "a0", None, SHARED_PARTITIONS)

    async def keep_submitting() -> None:
        for _ in range(150):
            await submit(database, "a0", 2)

    async with (
        drain_core(bench, tmp_path / "1", broker_url, partitions=(shared,)),
        drain_core(bench, tmp_path / "2", broker_url, partitions=(40,)),
    ):
        submitting = [asyncio.create_task(keep_submitting()) for _ in range(2)]
        while not all(task.done() for task in submitting):
            for partition in (40, None):
                moved = await move_adapter(database, "default", "a0", partition, SHARED_PARTITIONS)
                async with database.connection() as connection:
                    lines = await connection.fetch(
                        "SELECT DISTINCT partition FROM waiting_adapters"
                    )
                assert {line["partition"] for line in lines} <= {moved}
        await asyncio.gather(*submitting)
        await eventually(lambda: all_final(database), "all jobs final")
    assert await states(database) == {"succeeded": 600}


async def test_only_an_adapter_of_the_tenant_is_moved(bench: Bench) -> None:
    with pytest.raises(NotFound, match="'default' has no adapter 'b7'"):
        await move_adapter(bench.database, "default", "b7", 40, SHARED_PARTITIONS)
    with pytest.raises(NotFound, match="'other' has no adapter 'a0'"):
        await move_adapter(bench.database, "other", "a0", 40, SHARED_PARTITIONS)
