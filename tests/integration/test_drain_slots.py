"""Slots and their adapters' files: fetched ahead, pinned, preloaded, evicted, or left to others."""

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from core.errors import AdapterInvalid, StoreUnavailable
from db import claims, jobs, registry, suspects, workers
from db.blobs import Blobs
from db.database import Database
from db.store import Store
from db.tenants import DEFAULT_TENANT_ID
from db.workers import WorkerFacts
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.waiting import eventually
from workers.adapter_files import AdapterFiles
from workers.engine.protocol import LocalAdapter
from workers.metrics import DrainMetrics


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=8)


async def versions(bench: Bench) -> list[int]:
    """The adapters' version ids, `a0` first."""
    return [
        (await registry.current_versions(bench.database, bench.base_model_id, name))[0]
        for name in bench.adapters
    ]


class SlowStore(Store):
    """A store whose fetches wait for a word, or fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(Blobs.open(str(root)))
        self.go = threading.Event()
        self.go.set()
        self.fetched: list[str] = []
        self.most_at_once = self._at_once = 0
        self.failures: list[OSError] = []
        self._lock = threading.Lock()

    def fetch(self, sha256: str, cache: Path) -> Path:
        with self._lock:
            self.fetched.append(sha256)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.go.wait(20)
            if self.failures:
                raise self.failures.pop()
            return super().fetch(sha256, cache)
        finally:
            with self._lock:
                self._at_once -= 1


def slow_store(bench: Bench, tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path / "store")


async def test_files_are_fetched_ahead_once_each_and_few_at_once(
    bench: Bench, tmp_path: Path
) -> None:
    store, ids = slow_store(bench, tmp_path), await versions(bench)
    files = AdapterFiles(bench.database, store, tmp_path / "cache")
    store.go.clear()
    files.prefetch(ids[:4])
    files.prefetch(ids[:6])

    async def two_begun() -> bool:
        return len(store.fetched) == 2

    await eventually(two_begun, "two fetches")
    awaited = asyncio.create_task(files.local(ids[5]))  # a load does not stand in that line
    await eventually(lambda: _true(len(store.fetched) == 3), "the load's own fetch")
    store.go.set()
    assert (await awaited).lora_int_id == ids[5]
    await eventually(lambda: _true(len(store.fetched) == 6), "the rest")
    assert [(await files.local(version)).lora_int_id for version in ids[:6]] == ids[:6]
    assert len(store.fetched) == len(set(store.fetched)) == 6
    assert store.most_at_once == 3


async def _true(value: bool) -> bool:
    return value


async def test_what_cannot_be_fetched_ahead_is_left_to_its_load(
    bench: Bench, tmp_path: Path
) -> None:
    store, (first, second, *_) = slow_store(bench, tmp_path), await versions(bench)
    files = AdapterFiles(bench.database, store, tmp_path / "cache")
    store.failures = [OSError("the share is gone")]
    files.prefetch([first])
    await eventually(lambda: _true(not store.failures), "the failure")
    assert (await files.local(first)).lora_int_id == first
    store.failures = [OSError("the share is gone again")]
    with pytest.raises(StoreUnavailable, match="gone again"):
        await files.local(second)
    store.failures = [FileNotFoundError("adapter_model.safetensors")]
    with pytest.raises(AdapterInvalid):
        await files.local(second)


async def test_the_next_adapters_files_are_there_before_their_slot_is(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """One slot, held by a job that does not end: the next adapter's files come meanwhile."""
    store = slow_store(bench, tmp_path)
    behind = Bench(bench.database, store, bench.base_model_id, bench.adapters)
    second = (await versions(bench))[1]
    hasty = QUICK.model_copy(update={"grace_seconds": 0.0})
    flags = ("--max-loras", "1", "--sim-step-ms", "60000")
    async with drain_core(behind, tmp_path, broker_url, *flags, settings=hasty) as (_, engine, _):
        ahead: list[list[int]] = []
        engine.read_ahead = (  # type: ignore[method-assign]
            lambda adapters: ahead.append([adapter.lora_int_id for adapter in adapters])
        )
        await submit(bench.database, "a0")
        await eventually(lambda: _true(engine.running == 1), "job in the engine")
        await submit(bench.database, "a1")
        await eventually(lambda: _true(len(store.fetched) == 2), "files fetched ahead")
        await eventually(lambda: _true(ahead[-1:] == [[second]]), "the engine told to read them")
    assert await states(bench.database) == {"queued": 2}


async def test_a_store_that_fails_for_a_moment_costs_no_job(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    store = slow_store(bench, tmp_path)
    # ahead or for the load: both may meet it
    store.failures = [OSError("the share is gone"), OSError("the share is gone")]
    behind = Bench(bench.database, store, bench.base_model_id, bench.adapters)
    ids = await submit(bench.database, "a0", 20)
    async with drain_core(behind, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 20}
    assert not store.failures, "both were met"
    rows = [await jobs.get(bench.database, DEFAULT_TENANT_ID, job_id) for job_id in ids]
    assert [row["attempts"] for row in rows if row is not None] == [1] * 20
    assert await bench.database.fetch_value("SELECT max(failures) FROM jobs") == 0


async def test_pinned_adapters_are_loaded_first_and_never_evicted(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    pinned = (await versions(bench))[:2]
    metrics = DrainMetrics()
    flags = ("--max-loras", "3", "--max-num-seqs", "8")
    async with drain_core(bench, tmp_path, broker_url, *flags, pinned=pinned, metrics=metrics) as (
        core,
        engine,
        _,
    ):
        loaded: list[int] = []
        load = engine.load_adapter

        async def watch(adapter: LocalAdapter) -> None:
            loaded.append(adapter.lora_int_id)
            await load(adapter)

        engine.load_adapter = watch  # type: ignore[method-assign]
        await eventually(lambda: _true(metrics.pinned == 2), "pinned")
        for adapter in bench.adapters:
            await submit(bench.database, adapter, 20)
        await eventually(lambda: all_final(bench.database), "all jobs final")
        assert set(pinned) <= core.slots.resident
        assert not {i for i in loaded if loaded.count(i) > 1} & set(pinned)
    assert await states(bench.database) == {"succeeded": 160}


async def test_an_adapter_that_cannot_be_pinned_leaves_its_slot_to_the_others(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    bad, good = (await versions(bench))[:2]
    shutil.rmtree(tmp_path / "store/adapters" / (await _sha256(bench, bad)))
    metrics = DrainMetrics()
    async with drain_core(
        bench, tmp_path, broker_url, "--max-loras", "3", pinned=(bad, good), metrics=metrics
    ):
        await submit(bench.database, "a3", 5)
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert metrics.pinned == 1
    assert await states(bench.database) == {"succeeded": 5}


async def _sha256(bench: Bench, version: int) -> str:
    found = await claims.version_files(bench.database, version)
    assert found is not None
    return found.sha256


async def test_preloaded_adapters_are_there_before_the_first_job(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    ids = await versions(bench)
    flags = ("--max-loras", "3")
    async with drain_core(
        bench, tmp_path / "cache", broker_url, *flags, pinned=ids[:1], preload=ids[:5]
    ) as (core, _, _):
        await eventually(lambda: _true(core.slots.resident == {*ids[:3]}), "the slots")
        # those beyond the slots lie on the disk
        cached = tmp_path / "cache"
        await eventually(lambda: _true(len(list(cached.glob("[0-9a-f]*"))) == 5), "the disk")
        assert core.slots.loads == 3
        await submit(bench.database, "a1", 3)
        await eventually(lambda: all_final(bench.database), "the jobs")
        assert core.slots.loads == 3


async def test_evictions_are_counted_in_the_slots_and_on_the_disk(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    metrics = DrainMetrics()
    flags = ("--max-loras", "2")
    async with drain_core(bench, tmp_path / "cache", broker_url, *flags, metrics=metrics) as (
        core,
        _,
        _,
    ):
        for name in (*bench.adapters, "a0"):
            await submit(bench.database, name)
            await eventually(lambda: all_final(bench.database), "the job")
        assert core.slots.loads == 9
        assert metrics.evictions == 7
        assert metrics.resident() == 2
        assert metrics.fetches.collect()
    assert metrics.snapshot()["evictions"] == 7


async def test_a_worker_leaves_what_its_engine_has_no_room_for_to_others(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """A worker that came later with a lower --max-lora-rank fails nobody's jobs."""
    async with bench.database.connection() as connection:
        await connection.execute(
            "UPDATE adapter_versions SET rank = 64 WHERE id = $1", (await versions(bench))[0]
        )
    ids = await submit(bench.database, "a0", 3)
    await submit(bench.database, "a1", 3)
    await submit(bench.database, BASE, 3)

    def done(count: int) -> Callable[[], Awaitable[bool]]:
        async def look() -> bool:
            return (await states(bench.database))["succeeded"] == count

        return look

    cache = tmp_path / "cache"
    async with drain_core(bench, cache, broker_url, "--max-loras", "0"):
        await eventually(done(3), "the base model's jobs")
    async with drain_core(bench, cache, broker_url, "--max-lora-rank", "16"):
        await eventually(done(6), "the low adapter's jobs")
    assert await states(bench.database) == {"succeeded": 6, "queued": 3}
    # suspects are passed over too
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE jobs SET suspect_group = 1 WHERE state = 'queued'")
    recruit = await workers.register(
        bench.database, WorkerFacts(bench.base_model_id, "test", 1, "simulated", "1", {}), 30
    )
    for highest_rank, count in ((16, 0), (64, 3)):
        taken = await suspects.take_group(
            bench.database,
            recruit,
            bench.base_model_id,
            waited_seconds=0,
            limit=9,
            highest_rank=highest_rank,
        )
        assert len(taken) == count
    assert {job.id for job in taken} == set(ids)
