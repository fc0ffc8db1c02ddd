"""How the queue stands, and live rates, on a real Postgres."""

import asyncio
import json
from pathlib import Path

import pytest

from cli import main
from cli.top import as_document, frame
from core.errors import Unavailable
from db import claims, rates, stats, workers
from db.database import Database
from db.rates import Rate
from db.stats import QUEUE_NOW, AdapterNow, queue_now, workers_now
from db.tenants import create_key
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.jobs import BASE, Bench, make_bench, submit
from tests.support.plans import PLANS, explained
from tests.support.waiting import eventually
from workers.rates import LiveRates, publish_rates


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, 2)


async def worker(bench: Bench, lease_seconds: float = 60, **limits: int) -> int:
    facts = WorkerFacts(bench.base_model_id, "host", 7, "simulated", "1", limits)
    return await workers.register(bench.database, facts, lease_seconds)


async def version_id(database: Database, name: str) -> int:
    found: int = await database.fetch_value(
        "SELECT v.id FROM adapters a JOIN adapter_versions v ON v.adapter_id = a.id"
        " WHERE a.name = $1",
        name,
    )
    return found


def by_name(rows: list[AdapterNow]) -> dict[str | None, AdapterNow]:
    return {row.adapter: row for row in rows}


async def test_an_empty_queue(database: Database) -> None:
    found = await queue_now(database)
    assert (found.adapters, found.lines) == ([], 0)
    assert await workers_now(database) == []


async def test_waiting_jobs_are_counted_by_adapter_over_all_tenants(
    bench: Bench, database: Database
) -> None:
    await create_key(database, "other")
    await submit(database, "a0", 3)
    await submit(database, BASE, 2)
    await submit(database, BASE, 5, tenant_id=2)
    found = await queue_now(database)
    assert (found.lines, found.lines_counted) == (3, 3)
    assert [(row.adapter, row.tenant, row.waiting) for row in found.adapters] == [
        (None, None, 7),
        ("a0@1", "default", 3),
    ]
    base, adapter = found.adapters
    assert (base.base_model, base.adapter_version_id, base.capped) == (BASE, 0, False)
    assert adapter.adapter_version_id == await version_id(database, "a0")
    assert adapter.tokens_per_second == 0


async def test_claimed_jobs_wait_no_more_and_are_their_workers(
    bench: Bench, database: Database
) -> None:
    await submit(database, "a0", 3)
    worker_id = await worker(bench, max_num_seqs=16)
    line = Line(bench.base_model_id, await version_id(database, "a0"), 1)
    await claims.claim(database, worker_id, line, 2)
    assert [row.waiting for row in (await queue_now(database)).adapters] == [1]
    (now,) = await workers_now(database)
    assert (now.id, now.base_model, now.hostname, now.pid) == (worker_id, BASE, "host", 7)
    assert (now.engine, now.engine_version, now.running, now.max_num_seqs) == (
        "simulated",
        "1",
        2,
        16,
    )
    assert 0 <= now.heartbeat_age_seconds < 30
    # all claimed: the line is still on the list, but nothing of it waits
    await claims.claim(database, worker_id, line, 2)
    assert (await queue_now(database)).adapters == []


async def test_the_age_is_the_next_jobs_whatever_its_priority(
    bench: Bench, database: Database
) -> None:
    await submit(database, "a0", 1)
    await submit(database, "a1", 1, priority=50)
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET place = place - 90_000")
    found = by_name((await queue_now(database)).adapters)
    for name in ("a0@1", "a1@1"):
        age = found[name].oldest_age_seconds
        assert age is not None
        assert 85 < age < 120
    await database.fetch_value("UPDATE jobs SET place = place + 10_000_000 RETURNING 1")
    found = by_name((await queue_now(database)).adapters)
    assert found["a0@1"].oldest_age_seconds == 0  # a clock ahead of Postgres's is no age


async def test_counting_stops_at_the_cap(
    bench: Bench, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "COUNT_BUDGET", 8)
    await submit(database, "a0", 6)
    await submit(database, "a1", 3)
    found = by_name((await queue_now(database)).adapters)
    assert (found["a0@1"].waiting, found["a0@1"].capped) == (4, True)
    assert (found["a1@1"].waiting, found["a1@1"].capped) == (3, False)
    monkeypatch.setattr(stats, "MOST_LINES", 1)
    queue = await queue_now(database)
    assert (queue.lines, queue.lines_counted) == (2, 1)
    assert [(row.adapter, row.waiting) for row in queue.adapters] == [("a0@1", 6)]
    assert as_document(queue, [])["waiting_is_at_least"]


async def test_a_look_never_reads_the_table_of_jobs(database: Database) -> None:
    """Also with statistics from before the flood: a plan made then must not scan it all."""
    async with database.connection() as connection:
        await connection.execute("ANALYZE jobs; ANALYZE waiting_adapters")
        await connection.execute(
            "INSERT INTO jobs (id, place, tenant_id, base_model_id, adapter_version_id)"
            " SELECT gen_random_uuid(), i, 1, 1, i % 500 FROM generate_series(1, 20000) i"
        )
        await connection.execute(
            "INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)"
            " SELECT 1, i, 1, 0 FROM generate_series(0, 499) i"
        )
        for analyze in ("SELECT 1", "ANALYZE jobs; ANALYZE waiting_adapters"):
            await connection.execute(analyze)
            plan = "\n".join(
                row[0] for row in await connection.fetch(f"EXPLAIN {QUEUE_NOW}", 5000, 200)
            )
            assert plan.count("ix_jobs_waiting on jobs j") == 2, plan
            assert "Seq Scan on jobs" not in plan


async def test_rates_are_replaced_and_summed_over_live_workers(
    bench: Bench, database: Database
) -> None:
    a0, a1 = [await version_id(database, name) for name in bench.adapters]
    base = bench.base_model_id
    one, two = await worker(bench), await worker(bench)
    await rates.publish(database, one, base, {a0: Rate(100, 1), a1: Rate(50, 0.5)})
    await rates.publish(database, two, base, {a0: Rate(10, 0.1), 0: Rate(1, 0.01)})
    assert await rates.tokens_per_second(database, base) == 161
    found = await rates.by_adapter(database, base)
    assert found.keys() == {a0, a1, 0}
    assert found[a0].tokens_per_second == 110
    assert found[a0].jobs_per_second == pytest.approx(1.1)
    assert await rates.tokens_per_second(database, base + 1) == 0

    await rates.publish(database, one, base, {a1: Rate(70, 0.7)})  # a0 has nothing any more
    assert (await rates.by_adapter(database, base))[a0].tokens_per_second == 10
    assert {w.id: w.tokens_per_second for w in await workers_now(database)} == {one: 70, two: 11}
    shown = by_name((await queue_now(database)).adapters)
    assert shown["a1@1"].tokens_per_second == 70  # shown, though nothing waits
    assert shown["a1@1"].oldest_age_seconds is None

    await workers.sign_off(database, two)
    assert (await rates.by_adapter(database, base)).keys() == {a1}
    assert await rates.forget_dead(database) == 2
    assert await rates.forget_dead(database) == 0
    await rates.publish(database, one, base, {})
    assert await rates.tokens_per_second(database, base) == 0


async def test_rates_of_a_silent_or_lost_worker_do_not_count(
    bench: Bench, database: Database
) -> None:
    silent, lost = await worker(bench), await worker(bench, lease_seconds=0.01)
    for worker_id in (silent, lost):
        await rates.publish(database, worker_id, bench.base_model_id, {0: Rate(5, 1)})
    await asyncio.sleep(0.05)
    assert await rates.tokens_per_second(database, bench.base_model_id) == 5
    await database.fetch_value(
        "UPDATE worker_rates SET updated_at = now() - interval '1 minute' RETURNING 1"
    )
    assert await rates.tokens_per_second(database, bench.base_model_id) == 0


async def test_rates_are_published_through_an_outage(
    bench: Bench, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_id = await worker(bench)
    live = LiveRates()
    live.add(0, 300)
    refused = 0
    publish = rates.publish

    async def away_twice(*arguments: object) -> None:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise Unavailable("Postgres is away")
        if refused == 2:
            raise RuntimeError("a fault")
        await publish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("workers.rates.publish", away_twice)
    task = asyncio.create_task(
        publish_rates(database, worker_id, bench.base_model_id, live, every_seconds=0.01)
    )

    async def published() -> bool:
        return await rates.tokens_per_second(database, bench.base_model_id) > 0

    await eventually(published, "the rates are there")
    assert not task.done()
    assert refused > 2
    task.cancel()


async def test_an_idle_worker_publishes_nothing(bench: Bench, database: Database) -> None:
    worker_id = await worker(bench)
    live = LiveRates()
    task = asyncio.create_task(
        publish_rates(database, worker_id, bench.base_model_id, live, every_seconds=0.01)
    )
    await asyncio.sleep(0.1)
    assert await database.fetch_value("SELECT count(*) FROM worker_rates") == 0
    assert not task.done()
    task.cancel()


async def test_top_prints_a_frame(
    bench: Bench,
    database: Database,
    database_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await submit(database, "a0", 3)
    worker_id = await worker(bench, max_num_seqs=16)
    await rates.publish(database, worker_id, bench.base_model_id, {0: Rate(1234, 2)})
    monkeypatch.setenv("LORRY_DATABASE_URL", database_url)

    assert await asyncio.to_thread(main.run, ["top", "--once", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["waiting"], document["running"]) == (3, 0)
    assert document["tokens_per_second"] == 1234
    assert document["workers"][0]["engine"] == "simulated"
    assert {row["adapter"]: row["waiting"] for row in document["adapters"]} == {None: 0, "a0@1": 3}

    assert await asyncio.to_thread(main.run, ["top", "--once"]) == 0
    text = capsys.readouterr().out
    for words in ("3 waiting", "1,234 tok/s", BASE, "host:7", "0/16", "a0@1", "(base model)"):
        assert words in text, text


def test_a_frame_keeps_to_the_terminals_height() -> None:
    from rich.console import Console

    rows = [AdapterNow("b", i, f"a{i}@1", "t", 5, False, 3.0, 0.0) for i in range(100)]
    console = Console(width=100, record=True)
    console.print(frame(stats.QueueNow(rows, 100, 100), [], "gone", height=24))
    lines = console.export_text().splitlines()
    assert lines[0] == "gone"
    assert len(lines) <= 24
    assert "no live worker" in "\n".join(lines)
    assert lines[-1].strip().endswith("more")


@pytest.mark.parametrize("mode", PLANS)
async def test_a_look_reads_each_waiting_job_once(database: Database, mode: str) -> None:
    """50,000 jobs over 5,000 lines, which statistics know nothing of."""
    async with database.connection() as connection:
        base_id = await connection.fetchval(
            "INSERT INTO base_models (name, max_model_len) VALUES ('m', 1) RETURNING id"
        )
        await connection.execute(
            "INSERT INTO jobs (id, place, tenant_id, base_model_id, adapter_version_id)"
            " SELECT gen_random_uuid(), i, 1, $1, i % 5000 FROM generate_series(1, 50000) i",
            base_id,
        )
        await connection.execute(
            "INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)"
            " SELECT $1, i, 1, 0 FROM generate_series(0, 4999) i",
            base_id,
        )
    async with explained(database, mode) as plans:
        found = await queue_now(database)
    assert sum(row.waiting for row in found.adapters) == 50_000
    plan = next(p for p in plans if p.statement == QUEUE_NOW)
    assert plan.indexes("jobs") == {"ix_jobs_waiting"}
    assert plan.scanned("jobs") <= 50_000 + 2 * 5_000  # and the head of each line once more
