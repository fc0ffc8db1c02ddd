"""Rescue: lost workers' jobs come back, and an outage of the rescuer's own costs nobody a lease."""

import asyncio
import functools
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import asyncpg
import pytest

from core.errors import Unavailable
from db import claims, jobs, results, workers
from db.database import SESSION, Database
from db.frozen_clients import end_frozen_clients
from db.results import Result, RetryLater
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.cores import QUICK, drain_core
from tests.support.jobs import BASE, Bench, all_final, make_bench, states, submit
from tests.support.network import Proxy, proxied
from tests.support.waiting import eventually
from workers.rescue import Rescuer

LEASE = 0.6


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    async def old_enough() -> bool:  # or nobody would be rescued for its sake
        up: bool = await database.fetch_value(
            "SELECT pg_postmaster_start_time() < now() - interval '3 s'"
        )
        return up

    await eventually(old_enough, "Postgres has been up for a lease")
    return await make_bench(database, tmp_path, adapters=1)


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[tuple[Proxy, Database]]:
    """A connection pool of its own, whose network can be cut."""
    with tempfile.TemporaryDirectory(prefix="lorry-w-") as folder:
        async with (
            proxied(database_url, Path(folder)) as (proxy, url),
            Database.connect(url) as database,
        ):
            yield proxy, database


async def expired_worker(bench: Bench, jobs_of: int = 1) -> int:
    """A worker with running jobs whose lease has run out."""
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    worker_id = await workers.register(bench.database, facts, 60)
    if jobs_of:
        await submit(bench.database, BASE, jobs_of)
        line = Line(bench.base_model_id, 0, DEFAULT_TENANT_ID)
        assert len(await claims.claim(bench.database, worker_id, line, jobs_of)) == jobs_of
    await let_expire(bench)
    return worker_id


async def let_expire(bench: Bench) -> None:
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE workers SET lease_expires_at = now() - interval '1 s'")


async def look_for(rescuer: Rescuer, seconds: float) -> list[dict[int, int]]:
    """What a rescuer that looks on and on finds in this time."""
    found = []
    for _ in range(int(seconds / 0.05)):
        found.append(await rescuer.look())
        await asyncio.sleep(0.05)
    return found


async def test_a_new_rescuer_waits_for_one_lease(bench: Bench) -> None:
    worker = await expired_worker(bench)
    rescuer = Rescuer(bench.database, LEASE, 3)
    assert await rescuer.look() == {}
    found: list[dict[int, int]] = []

    async def rescued() -> bool:
        found.append(await rescuer.look())
        return bool(found[-1])

    await eventually(rescued, "the rescue")
    assert found[-1] == {worker: 1} and len(found) > 10
    assert await states(bench.database) == {"queued": 1}


async def test_an_outage_of_the_rescuer_alone_rescues_nobody_on_its_return(
    bench: Bench, wire: tuple[Proxy, Database]
) -> None:
    proxy, database = wire
    lease = 2.0
    rescuer = Rescuer(database, lease, 3)
    await rescuer.look()
    rescuer._in_touch_since -= timedelta(hours=1)  # type: ignore[operator, assignment]  # long in touch
    assert await rescuer.look() == {}
    worker = await expired_worker(bench)
    await proxy.cut()
    with pytest.raises(Unavailable):
        await rescuer.look()
    await proxy.mend()
    assert await rescuer.look() == {}
    # the worker, which was cut off too, comes back a moment later than the rescuer
    assert await workers.renew(bench.database, worker, 60)
    assert await rescuer.look() == {}
    assert await states(bench.database) == {"running": 1}


async def test_a_gap_between_looks_is_an_outage(bench: Bench) -> None:
    """The machine slept, or Postgres's clock was set: leases may have run out unseen."""
    rescuer = Rescuer(bench.database, 2.0, 3)
    await rescuer.look()
    rescuer._in_touch_since -= timedelta(hours=1)  # type: ignore[operator, assignment]
    rescuer._last_look -= timedelta(hours=1)  # type: ignore[operator, assignment]
    await expired_worker(bench)
    assert await rescuer.look() == {}


async def test_a_look_that_hangs_with_postgres_rescues_nobody_when_it_goes_on(bench: Bench) -> None:
    """Postgres froze between two statements of one look, with every worker's lease."""
    rescuer = Rescuer(bench.database, 2.0, 3)
    await rescuer.look()
    rescuer._in_touch_since -= timedelta(hours=1)  # type: ignore[operator, assignment]
    clock = workers.clock

    async def expire_after_the_clock(database: Database) -> datetime:
        now = await clock(database)
        await expired_worker(bench)
        return now - timedelta(seconds=1.5)  # so long ago, when the next statement is answered

    rescuer._last_look -= timedelta(seconds=1.8)  # type: ignore[operator, assignment]
    with patch("db.workers.clock", expire_after_the_clock):
        assert await rescuer.look() == {}
    assert await states(bench.database) == {"running": 1}


async def test_a_rescuer_long_in_touch_rescues_at_once(bench: Bench) -> None:
    rescuer = Rescuer(bench.database, 2.0, 3)
    await rescuer.look()
    rescuer._in_touch_since -= timedelta(hours=1)  # type: ignore[operator, assignment]
    worker = await expired_worker(bench, jobs_of=3)
    assert await rescuer.look() == {worker: 3}
    assert (rescuer.rescued_workers, rescuer.rescued_jobs) == (1, 3)
    assert await rescuer.look() == {}


async def freeze(bench: Bench, database_url: str) -> asyncpg.Connection:
    """A client that holds the base model's line and stopped inside its second statement.

    It has asked what the statement returns and never sends its arguments, which is how a process
    is stopped, or a machine paused, at the worst moment.
    """
    client = await asyncpg.connect(database_url, server_settings=SESSION)
    await client.execute("BEGIN; SELECT FROM waiting_adapters FOR UPDATE")
    await client.prepare("SELECT $1::int")
    await waited_for(bench, client)
    return client


async def waited_for(bench: Bench, client: asyncpg.Connection) -> None:
    """Return once Postgres waits for a client inside a statement."""

    async def waits() -> bool:
        waiting: bool = await bench.database.fetch_value(
            "SELECT state = 'active' AND wait_event = 'ClientRead' FROM pg_stat_activity"
            " WHERE pid = $1",
            client.get_server_pid(),
        )
        return waiting

    await eventually(waits, "Postgres to wait for a client inside a statement")


async def test_a_rescuer_ends_a_client_that_froze_inside_a_statement(
    bench: Bench, database_url: str
) -> None:
    await submit(bench.database, BASE, 1)
    client = await freeze(bench, database_url)
    busy = await asyncpg.connect(database_url, server_settings=SESSION)
    sleeping = asyncio.create_task(busy.fetch("SELECT pg_sleep(60)"))
    stranger = await asyncpg.connect(database_url)
    await stranger.execute("BEGIN")
    await stranger.prepare("SELECT $1::int")
    try:
        rescuer = Rescuer(bench.database, LEASE, 3)
        await rescuer.look()
        assert not client.is_closed(), "it may go on yet"
        at_once = functools.partial(end_frozen_clients, seconds=0.0)
        with patch("workers.rescue.end_frozen_clients", at_once):
            await rescuer.look()

        async def ended() -> bool:
            return client.is_closed()

        await eventually(ended, "the end of the frozen client")
        await submit(bench.database, BASE, 1)  # the line is free
        assert not sleeping.done() and not stranger.is_closed()
    finally:
        sleeping.cancel()
        for connection in (client, busy, stranger):
            connection.terminate()


async def test_a_copy_may_wait_for_its_client_much_longer(bench: Bench, database_url: str) -> None:
    asked = asyncio.Event()

    async def endless() -> AsyncIterator[tuple[object, ...]]:
        asked.set()
        await asyncio.Event().wait()
        yield ()

    client = await asyncpg.connect(database_url, server_settings=SESSION)
    copying = asyncio.create_task(client.copy_records_to_table("workers", records=endless()))
    try:
        await asked.wait()
        await waited_for(bench, client)
        assert await end_frozen_clients(bench.database, seconds=0.0) == []
        found = await end_frozen_clients(bench.database, copy_seconds=0.0)
        assert found == [client.get_server_pid()]
    finally:
        copying.cancel()
        client.terminate()


async def test_a_worker_waits_for_nobody_to_end_a_turn(bench: Bench, database_url: str) -> None:
    await submit(bench.database, BASE, 1)
    client = await freeze(bench, database_url)
    try:
        line = Line(bench.base_model_id, 0, DEFAULT_TENANT_ID)
        async with asyncio.timeout(10):
            assert await claims.end_turn(bench.database, line)
    finally:
        client.terminate()


async def test_two_rescuers_at_once_rescue_once(bench: Bench) -> None:
    worker = await expired_worker(bench, jobs_of=5)
    found = await asyncio.gather(*(workers.rescue_lost(bench.database, 0.0, 3) for _ in range(6)))
    assert [f for f in found if f] == [{worker: 5}]


async def test_a_worker_rescues_where_no_steward_lives(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    settings = QUICK.model_copy(update={"lease_seconds": LEASE, "quantum_seconds": 0.1})
    await expired_worker(bench, jobs_of=4)
    async with drain_core(bench, tmp_path, broker_url, settings=settings) as (core, _, _):
        await eventually(lambda: all_final(bench.database), "the lost worker's jobs done")
        assert core.rescuer.rescued_jobs == 4
    assert await states(bench.database) == {"succeeded": 4}


async def test_a_sign_off_waits_for_a_claim_that_is_under_way(bench: Bench) -> None:
    """Else its jobs would be running for ever: their worker has stopped, and is never lost."""
    await submit(bench.database, BASE, 3)
    facts = WorkerFacts(bench.base_model_id, "x", 1, "simulated", "1", {})
    worker = await workers.register(bench.database, facts, 60)
    async with bench.database.connection() as connection:
        claiming = connection.transaction()
        await claiming.start()
        line = (bench.base_model_id, 0, DEFAULT_TENANT_ID)
        assert len(await claims.claim_in(connection, worker, Line(*line), 3)) == 3
        signing = asyncio.create_task(workers.sign_off(bench.database, worker))

        async def waits() -> bool:
            blocked: int = await bench.database.fetch_value(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return blocked == 1 or signing.done()

        await eventually(waits, "the sign-off waits")
        await claiming.commit()
    assert await signing == 3
    assert await states(bench.database) == {"queued": 3}


async def test_jobs_left_with_a_stopped_worker_are_rescued(bench: Bench) -> None:
    worker = await expired_worker(bench, jobs_of=2)
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE workers SET stopped_at = now()")
    assert await workers.rescue_lost(bench.database, 0.0, 3) == {worker: 2}


async def test_cancel_wins_over_retry_rescue_and_a_late_result(bench: Bench) -> None:
    worker = await expired_worker(bench, jobs_of=3)
    owned = await claims.owned(bench.database, worker)
    for job_id, _ in owned:
        await jobs.cancel(bench.database, DEFAULT_TENANT_ID, job_id)
    (retried, released, late) = owned
    again = RetryLater(*retried, 0.0, "x")
    assert await results.retry_later(bench.database, worker, [again]) == set()
    assert await claims.release(bench.database, worker, [released]) == 0
    assert await results.record(bench.database, worker, [Result(*late, response="{}")]) == set()
    assert await workers.rescue_lost(bench.database, 0.0, 3) == {worker: 0}
    assert await states(bench.database) == {"cancelled": 3}
    assert await bench.database.fetch_value("SELECT count(*) FROM job_outputs") == 0


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_workers_clock_stepped_by_an_hour_changes_nothing(
    bench: Bench, tmp_path: Path, broker_url: str, hours: int
) -> None:
    await submit(bench.database, "a0", 20)
    stepped = datetime.now(UTC).timestamp() + 3600 * hours
    with patch("time.time", lambda: stepped):
        async with drain_core(bench, tmp_path, broker_url):
            await eventually(lambda: all_final(bench.database), "all jobs final")
            assert await workers.rescue_lost(bench.database, 0.0, 3) == {}
    assert await states(bench.database) == {"succeeded": 20}
    assert await bench.database.fetch_value("SELECT max(attempt) FROM jobs") == 1
