"""Admission on a real Postgres and the simulated engine: probes, rejections, deaths, versions."""

import asyncio
from pathlib import Path

import pytest

from core.errors import ModelNotFound
from core.settings import Settings
from db import adapter_files, adapter_life, adapters, admission, jobs, registry, workers
from db.adapter_package import PackageLimits, unpack
from db.adapters import Added
from db.admission import MOST_LOSSES
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from db.workers import WorkerFacts
from tests.support.adapters import SMOLLM, Draft
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.uploads import tiny
from tests.support.waiting import eventually
from workers.engine.protocol import AdapterLoadError, EngineDead, LocalAdapter, ProbeResult


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=2)


async def add(bench: Bench, name: str, folder: Path) -> Added:
    """Add a folder as the API does."""
    package = unpack(folder, folder.with_name(f"{folder.name}.unpacked"), PackageLimits())
    return await adapters.add(
        bench.database,
        bench.store,
        tenant_id=DEFAULT_TENANT_ID,
        name=name,
        base_model=BASE,
        package=package,
        partitions=32,
    )


async def state_of(bench: Bench, added: Added) -> str:
    state: str = await bench.database.fetch_value(
        "SELECT state FROM adapter_versions WHERE adapter_id = $1 AND version = $2",
        added.adapter_id,
        added.version,
    )
    return state


async def reach(bench: Bench, added: Added, state: str) -> None:
    async def reached() -> bool:
        return await state_of(bench, added) == state

    await eventually(reached, f"{added.model} is {state}")


async def finding(bench: Bench, added: Added) -> str:
    found: str = await bench.database.fetch_value(
        "SELECT findings::text FROM adapter_versions WHERE adapter_id = $1 AND version = $2",
        added.adapter_id,
        added.version,
    )
    return found


async def new_worker(bench: Bench, lease_seconds: float = 30) -> int:
    facts = WorkerFacts(bench.base_model_id, "test", 1, "simulated", "1", {})
    return await workers.register(bench.database, facts, lease_seconds)


async def lose(bench: Bench, worker_id: int) -> None:
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE workers SET lost_at = now() WHERE id = $1", worker_id)


async def test_adapters_are_added_at_once_however_few_the_connections(
    bench: Bench, database_url: str, tmp_path: Path
) -> None:
    async with Database.connect(database_url, max_size=1) as narrow:
        few = Bench(narrow, bench.store, bench.base_model_id, bench.adapters)
        folders = [tiny(tmp_path / f"n{i}", seed=i) for i in range(3)]
        added = await asyncio.gather(*(add(few, f.name, f) for f in folders))
        assert [one.version for one in added] == [1, 1, 1]


async def test_jobs_wait_for_the_probe_and_then_run(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    added = await add(bench, "sql", tiny(tmp_path / "sql"))
    (job,) = await submit(bench.database, "sql")
    async with drain_core(bench, tmp_path / "cache", broker_url):
        await eventually(lambda: all_final(bench.database), "the job is final")
    assert await states(bench.database) == {"succeeded": 1}
    assert await state_of(bench, added) == "ready"
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, job)
    assert row is not None and row["adapter_version"] == 1
    probe = await bench.database.fetch_value(
        "SELECT probe::text FROM adapter_versions WHERE adapter_id = $1", added.adapter_id
    )
    assert "the simulated engine does not compute" in probe and "load_seconds" in probe


async def test_nobody_claims_a_job_before_its_adapter_is_ready(
    bench: Bench, tmp_path: Path, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with drain_core(bench, tmp_path / "cache", broker_url) as (_, engine, _):
        probing, go = asyncio.Event(), asyncio.Event()

        async def slow_probe(_: LocalAdapter) -> ProbeResult:
            probing.set()
            await go.wait()
            return ProbeResult(True, 0.5, 1000)

        monkeypatch.setattr(engine, "probe_adapter", slow_probe)
        added = await add(bench, "sql", tiny(tmp_path / "sql"))
        await submit(bench.database, "sql", 3)
        await probing.wait()
        await submit(bench.database, "a0", 20)  # others run meanwhile

        async def others_done() -> bool:
            return (await states(bench.database))["succeeded"] == 20

        await eventually(others_done, "other adapters' jobs")
        assert (await states(bench.database))["queued"] == 3
        go.set()
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await state_of(bench, added) == "ready"


async def test_a_probe_takes_a_free_slot_only_and_comes_first(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """With the one slot in use, the probe waits for it; no adapter with jobs is evicted."""
    flags = ("--max-loras", "1", "--sim-step-ms", "50", "--max-num-seqs", "4")
    async with drain_core(bench, tmp_path / "cache", broker_url, *flags) as (_, engine, _):
        loads: list[tuple[int, set[int]]] = []
        load = engine.load_adapter

        async def watch(adapter: LocalAdapter) -> None:
            in_use = {
                s.request.adapter.lora_int_id
                for s in engine._sequences.values()
                if s.request.adapter
            }
            loads.append((adapter.lora_int_id, in_use - {adapter.lora_int_id}))
            await load(adapter)

        engine.load_adapter = watch  # type: ignore[method-assign]
        await submit(bench.database, "a0", 120)

        async def begun() -> bool:
            return (await states(bench.database))["succeeded"] > 0

        await eventually(begun, "a0 runs")
        added = await add(bench, "sql", tiny(tmp_path / "sql"))
        await reach(bench, added, "ready")
        assert (await states(bench.database))["queued"] > 0  # it went before the backlog's end
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert all(in_use == set() for _, in_use in loads), loads
    assert (await states(bench.database)) == {"succeeded": 120}


async def test_an_adapter_without_effect_is_rejected_and_its_jobs_fail(
    bench: Bench, tmp_path: Path, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = await add(bench, "sql", tiny(tmp_path / "sql"))
    ids = await submit(bench.database, "sql", 5)
    await submit(bench.database, "a0", 5)
    async with drain_core(bench, tmp_path / "cache", broker_url) as (core, engine, _):

        async def dull(_: LocalAdapter) -> ProbeResult:
            return ProbeResult(False, 0.0)

        monkeypatch.setattr(engine, "probe_adapter", dull)
        await eventually(lambda: all_final(bench.database), "all jobs final")
        assert core.slots.in_use == 0
    assert await states(bench.database) == {"succeeded": 5, "failed": 5}
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, ids[0])
    assert row is not None and row["error_code"] == "adapter_rejected"
    assert "sql@1 was rejected" in row["error_message"]
    assert "changes nothing" in row["error_message"]
    assert '"no_effect"' in await finding(bench, added)
    async with bench.database.connection() as connection:
        with pytest.raises(ModelNotFound, match="version 1 was rejected"):
            await registry.resolve(connection, DEFAULT_TENANT_ID, "sql")


async def test_the_engines_own_reason_is_kept(
    bench: Bench, tmp_path: Path, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with drain_core(bench, tmp_path / "cache", broker_url) as (_, engine, _):

        async def refuse(_: LocalAdapter) -> None:
            raise AdapterLoadError("q_proj is of no known shape")

        monkeypatch.setattr(engine, "load_adapter", refuse)
        added = await add(bench, "sql", tiny(tmp_path / "sql"))
        await reach(bench, added, "rejected")
    assert "q_proj is of no known shape" in await finding(bench, added)


async def test_what_was_unknown_at_the_upload_is_checked_by_the_worker(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    added = await add(bench, "sql", Draft(rank=2, layers=(99,)).write(tmp_path / "sql"))
    await registry.declare_base(bench.database, BASE, 8192, facts=SMOLLM)
    async with drain_core(bench, tmp_path / "cache", broker_url):
        await reach(bench, added, "rejected")
    assert "layers.99" in await finding(bench, added)


async def test_a_rejected_adapter_that_comes_again_is_validated_again(
    bench: Bench, tmp_path: Path, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(tmp_path / "sql")
    async with drain_core(bench, tmp_path / "cache", broker_url) as (_, engine, _):
        probe = engine.probe_adapter

        async def dull(_: LocalAdapter) -> ProbeResult:
            return ProbeResult(False, 0.0)

        monkeypatch.setattr(engine, "probe_adapter", dull)
        added = await add(bench, "sql", folder)
        await reach(bench, added, "rejected")
        assert await adapter_files.forget_files(bench.database, bench.store, 0) == 1
        monkeypatch.setattr(engine, "probe_adapter", probe)
        folder.with_name("sql.unpacked").rename(tmp_path / "before")
        again = await add(bench, "sql", folder)
        assert (again.version, again.created) == (1, False)
        await reach(bench, again, "ready")


async def test_an_engine_that_dies_of_it_twice_rejects_it(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    added = await add(bench, "bad", tiny(tmp_path / "bad", revision="POISON"))
    for expected in ("validating", "rejected"):
        flags = ("--sim-die-on", "POISON")
        async with drain_core(bench, tmp_path / "cache", broker_url, *flags) as (_, _, task):
            with pytest.raises(EngineDead):
                await asyncio.wait_for(asyncio.shield(task), 20)
        assert await state_of(bench, added) == expected
    assert "killed_engine" in await finding(bench, added)
    good = await add(bench, "good", tiny(tmp_path / "good", seed=2))
    async with drain_core(bench, tmp_path / "cache", broker_url, "--sim-die-on", "POISON"):
        await reach(bench, good, "ready")


async def test_an_engine_that_dies_before_the_adapter_was_loaded_is_not_its_doing(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    flags = ("--max-loras", "1", "--sim-step-ms", "60000")
    async with drain_core(bench, tmp_path / "cache", broker_url, *flags) as (_, engine, task):
        await submit(bench.database, "a0")

        async def running() -> bool:
            return engine.running == 1

        await eventually(running, "a0 holds the slot")
        added = await add(bench, "sql", tiny(tmp_path / "sql"))

        async def claimed() -> bool:
            worker = await bench.database.fetch_value(
                "SELECT probe_worker FROM adapter_versions WHERE adapter_id = $1", added.adapter_id
            )
            return worker is not None

        await eventually(claimed, "the probe is claimed")
        engine.die("of something else")
        with pytest.raises(EngineDead):
            await asyncio.wait_for(asyncio.shield(task), 20)
    deaths = await bench.database.fetch_value(
        "SELECT probe_deaths FROM adapter_versions WHERE adapter_id = $1", added.adapter_id
    )
    assert deaths == 0
    assert await state_of(bench, added) == "validating"


async def test_one_worker_at_a_time_probes_and_a_dead_ones_probe_is_repeated(
    bench: Bench, tmp_path: Path
) -> None:
    added = await add(bench, "sql", tiny(tmp_path / "sql"))
    database, base = bench.database, bench.base_model_id
    first, second = await new_worker(bench), await new_worker(bench)
    claim = await admission.claim_probe(database, first, base)
    assert claim is not None and claim.model == "sql@1"
    assert await admission.claim_probe(database, second, base) is None
    assert await admission.claim_probe(database, first, base) is None

    await lose(bench, first)
    taken = await admission.claim_probe(database, second, base)
    assert taken is not None
    assert (taken.attempt, taken.losses) == (claim.attempt + 1, 1)
    # the lost worker comes back: nothing that it says counts
    assert not await admission.admit(database, first, claim, {})
    assert not await admission.reject(database, first, claim, [admission.lost_workers(1)])
    assert not await admission.engine_died(database, first, claim, "late")
    assert await state_of(bench, added) == "validating"
    assert await admission.claim_probe(database, first, base) is None  # it is lost
    assert await admission.admit(database, second, taken, {})
    assert await state_of(bench, added) == "ready"
    assert not await admission.admit(database, second, taken, {})


async def test_a_worker_that_stopped_in_order_costs_nothing(bench: Bench, tmp_path: Path) -> None:
    await add(bench, "sql", tiny(tmp_path / "sql"))
    database, base = bench.database, bench.base_model_id
    for _ in range(MOST_LOSSES + 1):
        worker_id = await new_worker(bench)
        claim = await admission.claim_probe(database, worker_id, base)
        assert claim is not None and claim.losses == 0
        await workers.sign_off(database, worker_id)


async def test_an_adapter_that_workers_are_lost_with_is_rejected_in_the_end(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    added = await add(bench, "sql", tiny(tmp_path / "sql"))
    for _ in range(MOST_LOSSES):
        worker_id = await new_worker(bench)
        assert await admission.claim_probe(bench.database, worker_id, bench.base_model_id)
        await lose(bench, worker_id)
    async with drain_core(bench, tmp_path / "cache", broker_url):
        await reach(bench, added, "rejected")
    assert "workers were lost" in await finding(bench, added)


async def test_an_older_version_that_is_ready_late_does_not_become_current(
    bench: Bench, tmp_path: Path
) -> None:
    database, base = bench.database, bench.base_model_id
    worker_id = await new_worker(bench)
    claims = []
    for number in (1, 2, 3):
        await add(bench, "sql", tiny(tmp_path / str(number), seed=number))
        claims.append(await admission.claim_probe(database, worker_id, base))

    async def current() -> int | None:
        found: int | None = await database.fetch_value(
            "SELECT current_version FROM adapters WHERE name = 'sql'"
        )
        return found

    one, two, three = claims
    assert one and two and three
    await admission.admit(database, worker_id, one, {})
    assert await current() == 1
    await admission.admit(database, worker_id, three, {})
    assert await current() == 3
    await adapter_life.rollback(database, DEFAULT_TENANT_ID, "sql", 1)
    await admission.admit(database, worker_id, two, {})
    assert await current() == 1  # a rollback holds against what was added before it
    await add(bench, "sql", tiny(tmp_path / "4", seed=4))
    four = await admission.claim_probe(database, worker_id, base)
    assert four
    await admission.admit(database, worker_id, four, {})
    assert await current() == 4


async def test_a_new_version_in_a_backlog_mixes_nothing(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """1,000 jobs wait as version 2 comes: each is answered by the version of its submission."""
    first = await add(bench, "sql", tiny(tmp_path / "1"))
    old = await submit(bench.database, "sql", 1000)
    settings: Settings = QUICK.model_copy(update={"grace_seconds": 0.0})
    flags = ("--max-loras", "2", "--max-num-seqs", "32", "--sim-step-ms", "30")
    async with drain_core(bench, tmp_path / "cache", broker_url, *flags, settings=settings):
        await reach(bench, first, "ready")
        second = await add(bench, "sql", tiny(tmp_path / "2", seed=2))
        await reach(bench, second, "ready")
        assert (await states(bench.database))["queued"] > 0
        new = await submit(bench.database, "sql", 300)
        await eventually(lambda: all_final(bench.database), "all jobs final", seconds=60)
    assert await states(bench.database) == {"succeeded": 1300}
    async with bench.database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT v.version, v.id = split_part(split_part(o.response->'choices'->0->>'text',
                                                           ' ', 2), '-', 1)::int AS same,
                   o.response->'lorry'->>'adapter_sha256' = v.sha256 AS same_bytes,
                   j.id = ANY($1::uuid[]) AS old, count(*) AS jobs
            FROM jobs j JOIN job_outputs o ON o.job_id = j.id
            JOIN adapter_versions v ON v.id = j.adapter_version_id
            GROUP BY 1, 2, 3, 4 ORDER BY 1
            """,
            old,
        )
    assert [tuple(row.values()) for row in rows] == [
        (1, True, True, True, 1000),
        (2, True, True, False, len(new)),
    ]
