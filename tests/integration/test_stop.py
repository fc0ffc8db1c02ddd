"""Stopping, stalling and outages: bounded, and nothing is lost or spent."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.errors import Unavailable
from db import jobs, maintenance
from db.database import Database
from db.suspects import Death
from db.tenants import DEFAULT_TENANT_ID
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.network import Proxy, proxied
from tests.support.waiting import eventually
from workers.drain.lease import EngineStalled
from workers.engine.protocol import EngineDead, LocalAdapter
from workers.engine.simulated import SimulatedEngine

SLOW = ("--sim-step-ms", "60000")


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=2)


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[tuple[Proxy, Database]]:
    with tempfile.TemporaryDirectory(prefix="lorry-w-") as folder:
        async with proxied(database_url, Path(folder)) as (proxy, url):
            database = await Database.open(url, command_seconds=1.0)
            yield proxy, database
            await database.close()


async def in_engine(engine: SimulatedEngine, count: int) -> None:
    async def there() -> bool:
        return engine.running == count

    await eventually(there, f"{count} jobs in the engine")


async def hang_in_load(engine: SimulatedEngine) -> asyncio.Event:
    """Let loads of adapters never end; the event says that one has begun."""
    begun = asyncio.Event()

    async def load_adapter(adapter: LocalAdapter) -> None:
        begun.set()
        await asyncio.Event().wait()

    engine.load_adapter = load_adapter  # type: ignore[method-assign]
    return begun


async def test_a_stop_while_an_adapter_loads_ends_with_the_grace(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    settings = QUICK.model_copy(update={"grace_seconds": 0.2, "stall_seconds": 60})
    async with drain_core(bench, tmp_path, broker_url, settings=settings) as (core, engine, task):
        begun = await hang_in_load(engine)
        await submit(bench.database, "a0", 3)
        await begun.wait()
        core.stop()
        await asyncio.wait_for(task, 5)
    assert await states(bench.database) == {"queued": 3}


async def test_a_second_stop_does_not_wait_for_the_grace(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    settings = QUICK.model_copy(update={"grace_seconds": 3600})
    await submit(bench.database, "a0", 3)
    async with drain_core(bench, tmp_path, broker_url, *SLOW, settings=settings) as (
        core,
        engine,
        task,
    ):
        await in_engine(engine, 3)
        core.stop()
        core.stop()
        await asyncio.wait_for(task, 10)
    assert await states(bench.database) == {"queued": 3}
    spent = await bench.database.fetch_value(
        "SELECT max(attempt - releases) + max(failures) FROM jobs"
    )
    assert spent == 0


async def test_a_stop_while_postgres_is_away_ends_and_the_jobs_are_rescued(
    bench: Bench, wire: tuple[Proxy, Database], tmp_path: Path, broker_url: str
) -> None:
    proxy, database = wire
    settings = QUICK.model_copy(update={"grace_seconds": 0, "lease_seconds": 1})
    await submit(bench.database, "a0", 3)
    async with drain_core(
        bench, tmp_path, broker_url, *SLOW, settings=settings, database=database
    ) as (core, engine, task):
        await in_engine(engine, 3)
        await proxy.cut()
        core.stop()
        with pytest.raises(Unavailable, match="rescued"):
            await asyncio.wait_for(task, 20)
    assert await states(bench.database) == {"running": 3}
    settings = QUICK.model_copy(update={"lease_seconds": 1, "quantum_seconds": 0.1})
    async with drain_core(bench, tmp_path, broker_url, settings=settings):
        await eventually(lambda: all_final(bench.database), "the rescued jobs done")
    assert await states(bench.database) == {"succeeded": 3}


async def test_results_that_wait_for_postgres_are_recorded_before_the_stop(
    bench: Bench, wire: tuple[Proxy, Database], tmp_path: Path, broker_url: str
) -> None:
    proxy, database = wire
    await submit(bench.database, "a0", 40)
    flags = ("--sim-step-ms", "20")
    async with drain_core(bench, tmp_path, broker_url, *flags, database=database) as (
        core,
        engine,
        task,
    ):
        await in_engine(engine, 40)
        proxy.hanging = True

        async def backlog() -> bool:
            return engine.running == 0 and core.recorder.unrecorded == 40

        await eventually(backlog, "results wait")
        core.stop()
        proxy.hanging = False
        await asyncio.wait_for(task, 20)
    assert await states(bench.database) == {"succeeded": 40}
    assert await bench.database.fetch_value("SELECT max(attempt) FROM jobs") == 1


async def test_a_load_that_hangs_is_a_stall_though_nothing_runs(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    settings = QUICK.model_copy(update={"stall_seconds": 0.5})
    async with drain_core(bench, tmp_path, broker_url, settings=settings) as (_, engine, task):
        await hang_in_load(engine)
        await submit(bench.database, "a0", 3)
        with pytest.raises(EngineStalled):
            await asyncio.wait_for(task, 10)
    assert await states(bench.database) == {"queued": 3}


async def test_news_of_one_death_from_two_sides_gives_the_jobs_back_once(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """A load meets the death, then the watch does, while the jobs are being given back."""
    await submit(bench.database, "a0", 4)
    async with drain_core(bench, tmp_path, broker_url, *SLOW) as (core, engine, task):
        await in_engine(engine, 4)
        giving = core._record_and_sign_off

        async def die_meanwhile(death: Death | None = None) -> None:
            engine.die("heard of elsewhere")
            await asyncio.sleep(0.1)  # the watch hears of it
            await giving(death)

        core._record_and_sign_off = die_meanwhile  # type: ignore[method-assign]

        async def load_adapter(adapter: LocalAdapter) -> None:
            raise EngineDead("died of a load")

        engine.load_adapter = load_adapter  # type: ignore[method-assign]
        await submit(bench.database, "a1", 1)
        with pytest.raises(EngineDead):
            await asyncio.wait_for(task, 10)
    assert await states(bench.database) == {"queued": 5}
    groups = await bench.database.fetch_value("SELECT count(DISTINCT suspect_group) FROM jobs")
    assert groups == 2


async def test_a_stalled_engines_jobs_run_apart_and_cost_nothing(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    await submit(bench.database, "a0", 4)
    settings = QUICK.model_copy(update={"stall_seconds": 0.5})
    async with drain_core(bench, tmp_path, broker_url, *SLOW, settings=settings) as (
        _,
        engine,
        task,
    ):
        engine.progress = lambda: 0  # type: ignore[method-assign]
        with pytest.raises(EngineStalled):
            await asyncio.wait_for(task, 10)
    groups = await bench.database.fetch_value("SELECT count(DISTINCT suspect_group) FROM jobs")
    assert groups == 2
    async with drain_core(bench, tmp_path, broker_url):
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await bench.database.fetch_value("SELECT sum(failures) FROM jobs") == 0


@pytest.mark.parametrize("code", ["53100", "57014", "58030"])
async def test_a_full_disk_costs_no_result(
    bench: Bench,
    tmp_path: Path,
    broker_url: str,
    code: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever Postgres says but "I refuse this data" is waited for: disk full, cancelled, I/O."""
    await submit(bench.database, "a0", 10)
    async with bench.database.connection() as connection:
        await connection.execute(_REFUSE.format(code=code, table="job_outputs"))
    async with drain_core(bench, tmp_path, broker_url) as (core, _, _):

        async def waits() -> bool:
            said = [getattr(record, "action", None) for record in caplog.records]
            return said.count("record_waits") > 1 and core.recorder.unrecorded == 10

        await eventually(waits, "results wait")
        async with bench.database.connection() as connection:
            await connection.execute("DROP TRIGGER refuse ON job_outputs")
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await states(bench.database) == {"succeeded": 10}
    assert await bench.database.fetch_value("SELECT max(attempt) FROM jobs") == 1


_REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '{code}'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON {table} EXECUTE FUNCTION refuse();
"""


async def test_a_store_out_of_reach_holds_up_its_own_adapter_only(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    mine = await submit(bench.database, "a0", 5)
    await submit(bench.database, "a1", 5)
    await submit(bench.database, BASE, 5)
    sha256 = await bench.database.fetch_value(
        "SELECT sha256 FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id"
        " WHERE a.name = 'a0'"
    )
    weights = tmp_path / "store/adapters" / sha256 / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.mkdir()  # reading it is an error of the disk, not another content
    async with drain_core(bench, tmp_path / "cache", broker_url):

        async def others_done() -> bool:
            return (await states(bench.database)) == {"succeeded": 10, "queued": 5}

        await eventually(others_done, "the others' jobs")
        weights.rmdir()
        weights.write_bytes(content)
        await eventually(lambda: all_final(bench.database), "all jobs final")
    assert await jobs.finished_among(bench.database, mine) == set(mine)
    assert await states(bench.database) == {"succeeded": 15}
    assert await bench.database.fetch_value("SELECT max(attempt) FROM jobs") == 1


async def test_a_running_job_past_its_deadline_leaves_the_engine(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    (job_id,) = await submit(bench.database, "a0")
    async with drain_core(bench, tmp_path, broker_url, *SLOW) as (_, engine, _):
        await in_engine(engine, 1)
        await pass_deadlines(bench)
        assert await maintenance.expire_due(bench.database) == 1
        await in_engine(engine, 0)
    row = await jobs.get(bench.database, DEFAULT_TENANT_ID, job_id)
    assert row is not None and (row["state"], row["response"]) == ("expired", None)


async def test_a_cancel_whose_news_was_lost_leaves_the_engine_too(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    """Each is told once; with its connection the answer may be lost."""
    gone, stays = await submit(bench.database, "a0", 2)
    settings = QUICK.model_copy(update={"lease_seconds": 1.0, "stall_seconds": 60})
    async with drain_core(bench, tmp_path, broker_url, *SLOW, settings=settings) as (_, engine, _):
        await in_engine(engine, 2)
        async with bench.database.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET state = 'cancelled', finished_at = now(), lease_owner = NULL"
                " WHERE id = $1",
                gone,
            )
        await in_engine(engine, 1)
        await asyncio.sleep(2 * settings.lease_seconds)  # what is its own stays in
        await in_engine(engine, 1)
        await jobs.cancel(bench.database, DEFAULT_TENANT_ID, stays)
        await in_engine(engine, 0)
    assert await states(bench.database) == {"cancelled": 2}


async def test_an_expired_line_leaves_the_list_though_nobody_serves_it(bench: Bench) -> None:
    await submit(bench.database, "a0", 3)
    await submit(bench.database, "a1", 1)
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE jobs SET deadline = now() WHERE tokens = 16")
        await connection.execute(
            "UPDATE jobs SET deadline = NULL WHERE id = (SELECT max(id::text)::uuid FROM jobs)"
        )
    assert await maintenance.expire_due(bench.database) == 3
    assert await maintenance.drop_empty_lines(bench.database) == 1
    assert len(await maintenance.waiting_partitions(bench.database)) == 1
    assert await maintenance.drop_empty_lines(bench.database) == 0


async def pass_deadlines(bench: Bench) -> None:
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE jobs SET deadline = now() - interval '1 ms'")
