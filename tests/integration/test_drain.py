"""The drain on a real Postgres and the simulated engine, without Celery."""

import asyncio
from pathlib import Path

import pytest

from core.ids import new_id
from db import claims, jobs, results, workers
from db.database import Database
from db.results import Result
from db.tenants import DEFAULT_TENANT_ID, create_key, tenant_of_key
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.waiting import eventually
from workers.drain.lease import EngineStalled, LeaseLost
from workers.engine.protocol import EngineDead, LocalAdapter
from workers.metrics import DrainMetrics


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=4)


async def test_every_job_is_answered_once_by_its_own_adapter(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    ids = {}
    for model in (BASE, *bench.adapters):
        ids[model] = await submit(bench.database, model, 60)
    async with drain_core(bench, tmp_path, broker_url, "--max-loras", "2", "--max-num-seqs", "16"):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 300}
    for model, job_ids in ids.items():
        row = await jobs.get(bench.database, DEFAULT_TENANT_ID, job_ids[7])
        assert row is not None and row["attempts"] == 1
        assert ('"text":"simulated base' in row["response"]) == (model == BASE)
        assert '"engine":"simulated"' in row["response"]
    outputs = await bench.database.fetch_value("SELECT count(*) FROM job_outputs")
    assert outputs == 300


async def test_adapters_in_the_engine_never_exceed_the_slots(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    for adapter in bench.adapters:
        await submit(bench.database, adapter, 40)
    flags = ("--max-loras", "2", "--max-num-seqs", "8", "--sim-step-ms", "10")
    async with drain_core(bench, tmp_path, broker_url, *flags) as (_, engine, _):
        most = 0
        submit_to_engine = engine.submit

        def watch(requests, done):  # type: ignore[no-untyped-def]
            nonlocal most
            submit_to_engine(requests, done)
            in_engine = {s.request.adapter for s in engine._sequences.values()}
            most = max(most, len(in_engine))

        engine.submit = watch  # type: ignore[method-assign]
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert most == 2
    assert await states(bench.database) == {"succeeded": 160}


async def test_two_workers_share_one_adapters_backlog(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 200)
    flags = ("--max-num-seqs", "8", "--sim-step-ms", "20")
    async with (
        drain_core(bench, tmp_path, broker_url, *flags) as (first, _, _),
        drain_core(bench, tmp_path, broker_url, *flags) as (second, _, _),
    ):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 200}
    assert first.recorder.recorded + second.recorder.recorded == 200
    assert first.recorder.recorded > 0 and second.recorder.recorded > 0
    assert first.recorder.dropped == second.recorder.dropped == 0


async def test_a_running_job_that_is_cancelled_leaves_the_engine(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    slow = ("--sim-step-ms", "60000")
    async with drain_core(bench, tmp_path, broker_url, *slow) as (_, engine, _):
        (job_id,) = await submit(bench.database, "a0")

        async def in_engine() -> bool:
            return engine.running == 1

        await eventually(in_engine, "job in the engine")
        await jobs.cancel(bench.database, DEFAULT_TENANT_ID, job_id)

        async def out_of_engine() -> bool:
            return engine.running == 0

        await eventually(out_of_engine, "job aborted")
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, job_id)
    assert row is not None
    assert (row["state"], row["response"], row["error_code"]) == ("cancelled", None, None)


async def test_a_stopping_worker_releases_what_outlasts_the_grace_at_no_cost(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 3)
    hasty = QUICK.model_copy(update={"grace_seconds": 0.0})
    slow = ("--sim-step-ms", "60000")
    async with drain_core(bench, tmp_path, broker_url, *slow, settings=hasty) as (_, engine, _):

        async def in_engine() -> bool:
            return engine.running == 3

        await eventually(in_engine, "jobs in the engine")
    assert await states(bench.database) == {"queued": 3}
    async with bench.database.connection() as connection:
        rows = await connection.fetch("SELECT attempt - releases AS spent, failures FROM jobs")
    assert {(row["spent"], row["failures"]) for row in rows} == {(0, 0)}
    async with drain_core(bench, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 3}


async def test_a_bad_adapter_fails_its_own_jobs_alone(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    bad = await submit(bench.database, "a1", 5)
    await submit(bench.database, "a0", 5)
    async with bench.database.connection() as connection:
        await connection.execute(
            "UPDATE adapter_versions v SET sha256 = repeat('0', 64)"
            " FROM adapters a WHERE a.id = v.adapter_id AND a.name = 'a1'"
        )
    async with drain_core(bench, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 5, "failed": 5}
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, bad[0])
    assert row is not None and row["error_code"] == "adapter_missing"


async def test_a_job_too_long_for_the_context_fails_alone(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    good = await submit(bench.database, "a0", 20)
    (long,) = await submit(bench.database, "a0", prompt="word " * 9000)
    async with drain_core(bench, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, long)
    assert row is not None and row["state"] == "failed"
    assert row["error_code"] == "context_length_exceeded"
    assert (await states(bench.database))["succeeded"] == len(good)


async def test_a_dead_engine_gives_its_jobs_back(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 10)
    slow = ("--sim-step-ms", "60000")
    async with drain_core(bench, tmp_path, broker_url, *slow) as (_, engine, task):

        async def in_engine() -> bool:
            return engine.running == 10

        await eventually(in_engine, "jobs in the engine")
        engine.die("test")
        with pytest.raises(EngineDead):
            await task
    assert await states(bench.database) == {"queued": 10}
    async with drain_core(bench, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 10}


async def test_a_stalled_engine_is_given_up(bench: Bench, tmp_path: Path, broker_url: str) -> None:
    await submit(bench.database, "a0", 1)
    slow = ("--sim-step-ms", "60000")
    async with drain_core(bench, tmp_path, broker_url, *slow) as (_, engine, task):
        engine.progress = lambda: 0  # type: ignore[method-assign]
        with pytest.raises(EngineStalled):
            await task


async def test_a_worker_declared_lost_stops_and_its_late_results_are_refused(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    (job_id,) = await submit(bench.database, "a0")
    line = await _line_of(bench, "a0")
    stale = await workers.register(
        bench.database, WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {}), 60
    )
    (claimed,) = await claims.claim(bench.database, stale, line, 10)
    async with bench.database.connection() as connection:
        await connection.execute(
            "UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE id = $1", stale
        )
    assert await workers.rescue_lost(bench.database, 0.0, max_attempts=3) == {stale: 1}
    assert not await workers.renew(bench.database, stale, 60)
    late = Result(claimed.id, claimed.attempt, response="{}")
    assert await results.record(bench.database, stale, [late]) == set()
    assert await claims.claim(bench.database, stale, line, 10) == []
    async with drain_core(bench, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, job_id)
    assert row is not None and row["state"] == "succeeded" and row["attempts"] == 2


async def test_a_lost_lease_ends_the_core(bench: Bench, tmp_path: Path, broker_url: str) -> None:
    async with drain_core(bench, tmp_path, broker_url) as (_, _, task):
        async with bench.database.connection() as connection:
            await connection.execute("UPDATE workers SET lost_at = now()")
        with pytest.raises(LeaseLost):
            await task


async def test_a_result_for_another_attempt_is_refused(bench: Bench) -> None:
    await submit(bench.database, "a0")
    worker = await workers.register(
        bench.database, WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {}), 60
    )
    (job,) = await claims.claim(bench.database, worker, await _line_of(bench, "a0"), 1)
    stale = Result(job.id, job.attempt - 1, response="{}")
    foreign = Result(job.id, job.attempt, response="{}")
    assert await results.record(bench.database, worker, [stale]) == set()
    assert await results.record(bench.database, worker + 1, [foreign]) == set()
    assert await results.record(bench.database, worker, [foreign]) == {job.id}
    assert await results.record(bench.database, worker, [foreign]) == set()


async def test_higher_priority_goes_first_and_lower_does_not_starve(bench: Bench) -> None:
    low = await submit(bench.database, "a0", 3, priority=0)
    high = await submit(bench.database, "a0", 2, priority=5)
    worker = await workers.register(
        bench.database, WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {}), 60
    )
    line = await _line_of(bench, "a0")
    first = {job.id for job in await claims.claim(bench.database, worker, line, 2)}
    assert first == set(high)
    rest = {job.id for job in await claims.claim(bench.database, worker, line, 9)}
    assert rest == set(low)


async def test_a_line_leaves_the_waiting_list_only_when_it_is_empty(bench: Bench) -> None:
    await submit(bench.database, "a0")
    line = await _line_of(bench, "a0")
    assert await claims.end_turn(bench.database, line)
    worker = await workers.register(
        bench.database, WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {}), 60
    )
    await claims.claim(bench.database, worker, line, 5)
    assert not await claims.end_turn(bench.database, line)
    assert await claims.look(bench.database, bench.base_model_id) == []
    await submit(bench.database, "a0")
    assert [w.line for w in await claims.look(bench.database, bench.base_model_id)] == [line]


async def test_keys_belong_to_one_tenant_and_can_be_told_apart(database: Database) -> None:
    first, second = await create_key(database, "acme"), await create_key(database, "umbrella")
    assert await tenant_of_key(database, first) != await tenant_of_key(database, second)
    assert await tenant_of_key(database, first + "x") is None
    assert await tenant_of_key(database, str(new_id())) is None


async def _line_of(bench: Bench, adapter: str) -> Line:
    version = await bench.database.fetch_value(
        "SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id"
        " WHERE a.name = $1",
        adapter,
    )
    return Line(bench.base_model_id, version, DEFAULT_TENANT_ID)


async def test_a_worker_of_some_adapters_leaves_the_others_alone(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    mine = await submit(bench.database, "a1", 5)
    await submit(bench.database, "a0", 5)
    await submit(bench.database, BASE, 5)
    async with drain_core(bench, tmp_path, broker_url, adapters=("a1",)):

        async def mine_done() -> bool:
            return await jobs.finished_among(bench.database, mine) == set(mine)

        await eventually(mine_done, "the adapter's jobs")
    assert await states(bench.database) == {"succeeded": 5, "queued": 10}
    async with drain_core(bench, tmp_path, broker_url, adapters=(BASE, "a0")):
        await eventually(lambda: all_final(bench.database), "all jobs final")


async def test_a_worker_of_some_partitions_leaves_the_others_alone(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, BASE, 5)
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE adapters SET partition = 9 WHERE name = 'a0'")
    await submit(bench.database, "a0", 5)
    async with drain_core(bench, tmp_path, broker_url, partitions=(9,)):

        async def some_done() -> bool:
            return (await states(bench.database))["succeeded"] == 5

        await eventually(some_done, "the partition's jobs")
    assert await states(bench.database) == {"succeeded": 5, "queued": 5}


async def test_an_engine_kept_waiting_by_a_load_counts_as_starved(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    metrics = DrainMetrics()
    async with drain_core(bench, tmp_path, broker_url, metrics=metrics) as (_, engine, _):
        load = engine.load_adapter

        async def load_slowly(adapter: LocalAdapter) -> None:
            await asyncio.sleep(0.5)
            await load(adapter)

        engine.load_adapter = load_slowly  # type: ignore[method-assign]
        await submit(bench.database, "a0", 5)
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert metrics.seconds.starved > 0.4
    assert metrics.seconds.load_stalled > 0.4


async def test_a_job_that_kills_every_engine_fails_in_the_end(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    (poison,) = await submit(bench.database, "a0", prompt="poison")
    settings = QUICK.model_copy(update={"max_attempts": 2})
    for _ in range(2):
        async with drain_core(
            bench, tmp_path, broker_url, "--sim-die-on", "poison", settings=settings
        ) as (_, _, task):
            with pytest.raises(EngineDead):
                await task
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, poison)
    assert row is not None
    assert (row["state"], row["error_code"]) == ("failed", "attempts_exhausted")


async def test_a_claim_whose_answer_was_lost_is_given_back(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 1)
    line = await _line_of(bench, "a0")
    settings = QUICK.model_copy(update={"lease_seconds": 0.5, "poll_seconds": 2})
    async with drain_core(bench, tmp_path, broker_url, settings=settings) as (core, _, _):
        await eventually(lambda: all_final(bench.database), "the core has begun to poll")
        # the worker's own claim, behind its back: as if the connection had died after the commit
        await submit(bench.database, "a0", 2)
        claimed = await claims.claim(bench.database, core.lease.worker_id, line, 2)
        assert len(claimed) == 2
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 3}


async def test_a_job_with_a_near_deadline_overtakes_in_its_own_line(bench: Bench) -> None:
    before = await submit(bench.database, "a0", 6, priority=50)
    (far,) = await submit(bench.database, "a0", due_seconds=3600)
    (later,) = await submit(bench.database, "a0", due_seconds=50)
    (sooner,) = await submit(bench.database, "a0", due_seconds=30)
    line = await _line_of(bench, "a0")
    (seen,) = await claims.look(bench.database, bench.base_model_id)
    assert seen.deadline_seconds is not None and 0 < seen.deadline_seconds <= 30
    worker = await workers.register(
        bench.database, WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {}), 60
    )
    taken = [
        {job.id for job in await claims.claim(bench.database, worker, line, limit)}
        for limit in (1, 4, 9)
    ]
    assert taken == [{sooner}, {later, *before[:3]}, {far, *before[3:]}]


async def test_a_near_deadline_is_seen_behind_more_lines_than_a_look_shows(bench: Bench) -> None:
    for adapter in bench.adapters[:3]:
        await submit(bench.database, adapter, 2)
    await submit(bench.database, "a3", due_seconds=30)
    seen = await claims.look(bench.database, bench.base_model_id, limit=2)
    assert [w.line for w in seen][-1] == await _line_of(bench, "a3")
    assert len(seen) == 3
