"""Schedules for tests, in a time of the test's own."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from core.ids import IdPrefix, format_id, new_id
from core.schedule_request import check_schedule
from db import schedule_runs, schedules
from db.database import Database
from db.schedule_files import ScheduleInput
from db.tenants import DEFAULT_TENANT_ID
from workers.steward.schedules import follow, tick_and_fire


async def stored_file(database: Database, tenant_id: int = DEFAULT_TENANT_ID) -> UUID:
    """The row of an uploaded file; firing reads no bytes."""
    file_id = new_id()
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO files (id, tenant_id, purpose, filename, state)"
            " VALUES ($1, $2, 'batch', 'in.jsonl', 'ready')",
            file_id,
            tenant_id,
        )
    return file_id


@dataclass
class Timeline:
    """A database whose schedules see the time that the test says."""

    database: Database
    now: datetime

    def later(self, **delta: float) -> "Timeline":
        """Let time pass; nobody ticks meanwhile."""
        self.now += timedelta(**delta)
        return self

    async def create(self, **body: Any) -> UUID:
        """A schedule over a stored file."""
        file_id = await stored_file(self.database)
        asked = check_schedule({"input_file_id": format_id(IdPrefix.FILE, file_id), **body})
        given = ScheduleInput(file_id, "/v1/chat/completions")
        return await schedules.create(self.database, DEFAULT_TENANT_ID, asked, given, now=self.now)

    async def change(self, schedule_id: UUID, **body: Any) -> None:
        """The schedule as a whole, anew."""
        asked = check_schedule(body, has_input=True)
        await schedules.change(
            self.database, DEFAULT_TENANT_ID, schedule_id, asked, None, now=self.now
        )

    async def act(self, what: Any, schedule_id: UUID) -> Any:
        """One of `pause`, `resume`, `run_now`, `skip_next`, at this time."""
        return await what(self.database, DEFAULT_TENANT_ID, schedule_id, now=self.now)

    async def tick(self) -> int:
        """What a steward does now."""
        await follow(self.database, self.now)
        return await tick_and_fire(self.database, self.now)

    async def tick_through(self, seconds: float, every: float) -> None:
        """Ticks at an even pace."""
        for _ in range(round(seconds / every)):
            self.later(seconds=every)
            await self.tick()

    async def runs(self, schedule_id: UUID) -> list[Any]:
        """Every run, in the order of their firings."""
        found = await schedule_runs.list_runs(
            self.database, DEFAULT_TENANT_ID, schedule_id, None, 10_000
        )
        return list(reversed(found))

    async def firings(self, schedule_id: UUID, *states: str) -> list[str]:
        """The firings in these states (all), in UTC, as `03-28 01:00`."""
        return [
            run["fire_at"].strftime("%m-%d %H:%M")
            for run in await self.runs(schedule_id)
            if not states or run["state"] in states
        ]

    async def states(self, schedule_id: UUID) -> list[str]:
        """The states of the runs, with the reasons of those that were skipped."""
        return [
            f"{run['state']}: {run['reason']}" if run["reason"] else run["state"]
            for run in await self.runs(schedule_id)
        ]

    async def row(self, schedule_id: UUID) -> Any:
        """The schedule as it is."""
        row = await schedules.get(self.database, DEFAULT_TENANT_ID, schedule_id, "")
        assert row is not None
        return row

    async def end_batches(self, status: str = "completed", completed: int = 3) -> None:
        """Let every open batch end, as a steward would have written it."""
        async with self.database.connection() as connection:
            await connection.execute(
                f"""
                UPDATE batches SET status = $1::text, {status}_at = now(), total = $2::int,
                       completed = $3::int, failed = $2::int - $3::int,
                       ended_at = CASE WHEN $1::text <> 'failed' THEN now() END,
                       cancelling_at = CASE WHEN $1::text = 'cancelled' THEN now() END,
                       errors = CASE WHEN $1::text = 'failed' THEN $4::text::json END
                WHERE status IN ('validating', 'in_progress', 'cancelling')
                """,
                status,
                0 if status == "failed" else 3,
                0 if status == "failed" else completed,
                '[{"code": "model_not_found", "message": "no such model", "line": 2}]',
            )


async def batches_of(database: Database) -> Counter[str]:
    """How many batches stand in each status; every one has a run of its own."""
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT status, count(*) AS n FROM batches GROUP BY status")
        twice = await connection.fetchval(
            "SELECT count(*) FROM batches b WHERE (SELECT count(*) FROM schedule_runs r"
            " WHERE r.tenant_id = b.tenant_id AND r.batch_id = b.public_id) <> 1"
        )
    assert twice == 0
    return Counter({row["status"]: row["n"] for row in rows})
