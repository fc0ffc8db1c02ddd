"""A steward killed before and after every statement of a firing: the run happens once.

A dry run names the statements of a scene in which every way of firing occurs; then one victim dies
at each, and another steward carries on what it left.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from db import files, registry, schedules
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.killable_schedules import start_steward
from tests.support.killable_worker import Blow, Victim
from tests.support.scale import Scale
from tests.support.schedules import Timeline, batches_of
from tests.support.servers import PostgresServer
from workers.steward.schedules import follow, tick_and_fire

pytestmark = pytest.mark.processes

ROUNDS_AT_ONCE = 4
HOUR = timedelta(hours=1)
#: Statements that must be among those found, whatever else a steward sends.
EXPECTED = {
    "schedule_ticks.tick",
    "schedule_ticks.tick > schedule_ticks.bear",
    "schedule_firing.fire",
    "schedule_firing.fire > schedule_firing._start",
    "schedule_firing.fire > schedule_firing._write",
    "schedule_outcomes.finish_ended",
    "schedule_outcomes.count_ends",
    "schedule_outcomes.wake_queued",
}


class Scene:
    """A database of its own, on which one round after another is played."""

    def __init__(self, database: Database, url: str, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.settings = {"LORRY_DATABASE_URL": url, "LORRY_LOG_LEVEL": "warning"}

    async def play(self, blow: Blow | None) -> Victim | None:
        """One round; returns None where the victim never came to the chosen statement."""
        # half past: two firings are due since then, one of them long ago
        clock = Timeline(self.database, datetime.now(UTC) - 2 * HOUR - timedelta(minutes=30))
        start = clock.now.timestamp() + 3600
        made = [
            await clock.create(every_seconds=3600, start_at=start, missed="all", **more)
            for more in (
                {},
                {"model": "base"},
                {"overlap": "skip"},
                {"overlap": "queue"},
                {"overlap": "cancel_previous"},
                {"pause_after_failures": 1},
            )
        ]
        broken = made[-1]
        await files.delete(
            self.database, DEFAULT_TENANT_ID, (await clock.row(broken))["input_file_id"]
        )
        victim = Victim("", (), self.settings, self.folder / f"{uuid4().hex[:8]}.log", blow)
        process = start_steward(victim)
        try:
            while process.is_alive():
                await asyncio.sleep(0.01)
        finally:
            process.kill()
            process.join()
        died = process.exitcode == -signal.SIGKILL
        assert died or process.exitcode == 0, victim.log.read_text()
        await self._carry_on(clock, made)
        return victim if died == (blow is not None) else None

    async def _carry_on(self, clock: Timeline, made: list[UUID]) -> None:
        """What another steward makes of it, and what must have come of every firing."""
        for _ in range(2):
            await tick_and_fire(self.database)
            await follow(self.database)
        expected = [
            ["started", "started"],
            ["started", "started"],
            ["started", "skipped: overlap"],
            ["started", "queued"],
            ["started", "started"],
        ]
        for schedule, states in zip(made, expected, strict=False):
            assert await clock.states(schedule) == states
        # it failed for its missing file, and was paused before or after its second firing
        states = await clock.states(made[-1])
        assert states[0] == "failed"
        assert states[1] in ("failed", "skipped: paused")
        row = await clock.row(made[-1])
        assert (row["pause_reason"], row["next_fire_at"]) == ("failures", None)
        assert row["failures_in_a_row"] == states.count("failed")
        await batches_of(self.database)
        live = await self.database.fetch_value(
            "SELECT count(*) FROM batches b JOIN schedule_runs r ON r.batch_id = b.public_id"
            " WHERE r.schedule_id = ANY($1::uuid[])",
            made,
        )
        assert live == 2 + 2 + 1 + 1 + 2
        # one batch of the last but one was cancelled for the other
        statuses = [run["batch_status"] for run in await clock.runs(made[4])]
        assert statuses == ["cancelling", "validating"]
        for schedule in made:
            await schedules.delete(self.database, DEFAULT_TENANT_ID, schedule)
        async with self.database.connection() as connection:
            await connection.execute("DELETE FROM batches")


@pytest.fixture
async def scenes(
    postgres: PostgresServer, template: str, tmp_path: Path
) -> AsyncIterator[list[Scene]]:
    """Databases to play on, side by side."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(ROUNDS_AT_ONCE):
            url = postgres.url(stack.enter_context(_cloned(postgres, template)))
            database = await stack.enter_async_context(Database.connect(url))
            await registry.declare_base(database, "base", 4096)
            folder = tmp_path / str(number)
            folder.mkdir()
            made.append(Scene(database, url, folder))
        yield made


@contextmanager
def _cloned(postgres: PostgresServer, template: str) -> Iterator[str]:
    name = f"k_{uuid4().hex[:12]}"
    postgres.create_database(name, template)
    try:
        yield name
    finally:
        postgres.drop_database(name)


@pytest.mark.timeout(1200)
async def test_a_steward_killed_at_any_statement_of_a_firing_fires_once(
    scenes: list[Scene], scale: Scale, record_property: Callable[[str, object], None]
) -> None:
    dry = await scenes[0].play(None)
    assert dry is not None
    statements = dry.statements()
    sent_by = {name.split(":")[0] for name in statements}
    missing = {name for name in EXPECTED if not any(s.startswith(name) for s in sent_by)}
    assert missing == set(), sent_by
    left = [
        Blow(name, after, occurrence)
        for name, times in sorted(statements.items())
        for occurrence in range(1, min(times, scale(1, 12)) + 1)
        for after in (False, True)
    ]
    record_property("blows", len(left))
    print(f"blows: {len(left)} at {len(statements)} statements")
    missed: list[str] = []

    async def play_on(scene: Scene) -> None:
        while left:
            blow = left.pop()
            try:
                if not await scene.play(blow):
                    missed.append(str(blow))
            except AssertionError as error:
                raise AssertionError(f"killed {blow}: {error}") from error

    async with asyncio.TaskGroup() as tasks:
        for scene in scenes:
            tasks.create_task(play_on(scene))
    assert missed == []
