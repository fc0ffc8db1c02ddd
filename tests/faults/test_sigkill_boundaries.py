"""A worker killed before and after every statement that it sends, from its start to its sign-off.

A dry run names the statements; then one victim dies at each. What it leaves behind is taken up by a
steward and another worker, and every job must come out as if nothing had happened.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from core.settings import Settings
from db import jobs
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.cores import drain_core
from tests.support.jobs import BASE, Bench, make_bench, states, submit
from tests.support.killable_worker import HICCUP, Blow, Victim, start_victim
from tests.support.scale import Scale
from tests.support.servers import PostgresServer
from tests.support.settled import connections, own_connections, settled
from tests.support.stewards import running_steward
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

#: Rounds at once: they mostly wait for leases to run out.
ROUNDS_AT_ONCE = 6
#: Long enough that a busy machine does not take it from a victim that lives.
LEASE_SECONDS = 2.0
#: Of one round.
JOBS = 12
#: Statements that must be among those found, whatever else a worker sends.
EXPECTED = {
    "claims.look",
    "claims.claim",
    "claims.end_turn",
    "claims.version_files",
    "claims.release",
    "claims.owned",
    "results.record",
    "results.retry_later",
    "suspects.take_group",
    "workers.clock",
    "workers.register",
    "workers.rescue_lost",
    "workers.renew",
    "workers.take_ended",
    "workers.sign_off",
}
#: A job that outlasts the victim, and is quick in the engine of whoever takes it up.
LONG = {"max_tokens": 4000, "ignore_eos": True}
VICTIM_FLAGS = ("--max-num-seqs", "16", "--sim-step-ms", "5")
RESCUER = Settings(lease_seconds=LEASE_SECONDS, sweep_seconds=0.2)
#: Who takes up what the victim left must not be taken for lost itself on a busy machine.
HEIR = Settings(lease_seconds=30, poll_seconds=0.1, quantum_seconds=0.3)


_LOSE_A_CLAIM = """
UPDATE jobs SET state = 'running', attempt = attempt + 1, started_at = now(), not_before = NULL,
                lease_owner = w.id
FROM (SELECT id FROM workers WHERE lost_at IS NULL AND stopped_at IS NULL
      ORDER BY id DESC LIMIT 1) w
WHERE jobs.id = $1 AND state = 'queued'
RETURNING true
"""


class Round:
    """What a victim has to do: suspects first, then one job of every kind."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.suspects: list[UUID] = []
        self.rest: list[UUID] = []
        self.claim_lost = False

    async def begin(self) -> None:
        """Suspects, which an idle worker takes at once, and a job that nobody may claim yet."""
        self.suspects = await submit(self.database, "a0", 2)
        (self.unseen,) = await submit(self.database, "a0")
        async with self.database.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET suspect_group = nextval('suspect_groups') WHERE id = ANY($1)",
                self.suspects,
            )
            await connection.execute(
                "UPDATE jobs SET not_before = now() + interval '1 hour' WHERE id = $1", self.unseen
            )

    async def go_on(self) -> None:
        """The rest. Idempotent."""
        if self.rest:
            return
        self.rest = await submit(self.database, "a0", 3) + await submit(self.database, BASE, 2)
        self.rest += await submit(self.database, "a0", prompt=HICCUP)
        self.rest += await submit(self.database, "a0", prompt="word " * 9000)  # too long: fails
        (self.cancelled,) = await submit(self.database, "a0", **LONG)
        (self.long,) = await submit(self.database, "a0", **LONG)
        self.rest += [self.unseen, self.cancelled, self.long]
        assert len(self.suspects + self.rest) == JOBS

    async def over(self) -> bool:
        """Do what comes next; returns whether there is nothing left but to stop the worker."""
        if not self.rest:
            if await jobs.finished_among(self.database, self.suspects) == set(self.suspects):
                await self.go_on()
            return False
        await self._lose_a_claim()
        row = await jobs.get(self.database, DEFAULT_TENANT_ID, self.cancelled)
        if row is not None and row["state"] == "running":
            await self.cancel()
        return self.claim_lost and await self._only_long_left()

    async def cancel(self) -> None:
        await jobs.cancel(self.database, DEFAULT_TENANT_ID, self.cancelled)

    async def _lose_a_claim(self) -> None:
        """As if the answer of the worker's claim had been lost with its connection."""
        if not self.claim_lost:
            async with self.database.connection() as connection:
                self.claim_lost = bool(await connection.fetchval(_LOSE_A_CLAIM, self.unseen))

    async def end(self) -> None:
        """The worker is gone: whatever it did not come to is for another."""
        await self.go_on()
        await self.cancel()
        async with self.database.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET not_before = NULL WHERE id = $1 AND state = 'queued'", self.unseen
            )

    async def _only_long_left(self) -> bool:
        """Whether the long job runs, the cancelled one was aborted, and all else is final."""
        async with self.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT id, state, lease_owner FROM jobs"
                " WHERE state IN ('queued', 'running') OR id = $1",
                self.cancelled,
            )
        found = {row["id"]: (row["state"], row["lease_owner"] is None) for row in rows}
        return found == {self.long: ("running", False), self.cancelled: ("cancelled", True)}


class Scene:
    """A database of its own, on which one round after another is played."""

    def __init__(self, bench: Bench, url: str, broker_url: str, folder: Path) -> None:
        self.bench = bench
        self.database = bench.database
        self.broker_url = broker_url
        self.folder = folder
        self.jobs = 0
        self.settings = {
            "LORRY_DATABASE_URL": url,
            "LORRY_BROKER_URL": broker_url,
            "LORRY_STORE_URL": str(folder / "store"),
            "LORRY_CACHE_DIR": str(folder / "cache"),
            "LORRY_LEASE_SECONDS": str(LEASE_SECONDS),
            "LORRY_POLL_SECONDS": "0.1",
            "LORRY_GRACE_SECONDS": "0.2",
            "LORRY_QUANTUM_SECONDS": "1",
            "LORRY_LOG_LEVEL": "warning",
        }

    async def play(self, blow: Blow | None) -> Victim | None:
        """One round; returns None where the victim never came to the chosen statement."""
        before = await states(self.database)
        scene = Round(self.database)
        await scene.begin()
        self.jobs += JOBS
        victim = Victim(
            BASE, VICTIM_FLAGS, self.settings, self.folder / f"{uuid4().hex[:8]}.log", blow
        )
        process = start_victim(victim)
        try:
            terminated = False
            while process.is_alive():
                if not terminated and await scene.over():
                    process.terminate()
                    terminated = True
                await asyncio.sleep(0.02)
        finally:
            process.kill()
            process.join()
        died = process.exitcode == -signal.SIGKILL
        assert died or process.exitcode == 0, victim.log.read_text()
        await scene.end()
        await self._take_up()
        await settled(
            self.database,
            self.jobs,
            succeeded=before["succeeded"] + JOBS - 2,
            failed=before["failed"] + 1,
            cancelled=before["cancelled"] + 1,
        )
        assert await connections(self.database) <= own_connections(self.database)
        return victim if died == (blow is not None) else None

    async def _take_up(self) -> None:
        """Let a steward and a quick worker bring everything to its end."""

        async def nobody_waits() -> bool:
            found = await states(self.database)
            return not (found["queued"] or found["running"])

        quick = ("--sim-step-ms", "0.01")
        async with (
            running_steward(self.database, self.broker_url, RESCUER),
            drain_core(self.bench, self.folder / "cache", self.broker_url, *quick, settings=HEIR),
        ):
            await eventually(nobody_waits, "the jobs of the dead worker to be final", 30)


@pytest.fixture
async def scenes(
    postgres: PostgresServer, template: str, broker_url: str, tmp_path: Path
) -> AsyncIterator[list[Scene]]:
    """Databases to play on, side by side."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(ROUNDS_AT_ONCE):
            name = stack.enter_context(_cloned(postgres, template))
            url = postgres.url(name)
            database = await stack.enter_async_context(Database.connect(url))
            folder = tmp_path / str(number)
            folder.mkdir()
            made.append(Scene(await make_bench(database, folder, 1), url, broker_url, folder))
        yield made


@contextmanager
def _cloned(postgres: PostgresServer, template: str) -> Iterator[str]:
    name = f"k_{uuid4().hex[:12]}"
    postgres.create_database(name, template)
    try:
        yield name
    finally:
        postgres.drop_database(name)


@pytest.mark.timeout(1500)
async def test_a_worker_killed_at_any_statement_loses_and_doubles_nothing(
    scenes: list[Scene], scale: Scale, record_property: Callable[[str, object], None]
) -> None:
    dry = await scenes[0].play(None)
    assert dry is not None
    statements = dry.statements()
    sent_by = {name.split(":")[0].split(" > ")[0] for name in statements}
    assert sent_by >= EXPECTED, EXPECTED - sent_by
    blows = [
        Blow(name, after, occurrence)
        for name, times in sorted(statements.items())
        for occurrence in range(1, min(times, scale(1, 3)) + 1)
        for after in (False, True)
    ]
    record_property("blows", len(blows))
    left, missed = list(blows), []

    async def play_on(scene: Scene) -> None:
        while left:
            blow = left.pop()
            try:
                for _ in range(3):  # what depends on timing may not come by at once
                    if await scene.play(blow):
                        break
                else:
                    missed.append(str(blow))
            except AssertionError as error:
                raise AssertionError(f"killed {blow}: {error}") from error

    async with asyncio.TaskGroup() as tasks:
        for scene in scenes:
            tasks.create_task(play_on(scene))
    # a statement that came a second time in the dry run need not do so again
    assert [name for name in missed if " time" not in name] == []
