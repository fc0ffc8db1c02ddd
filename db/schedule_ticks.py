"""Ticks: firings that are due become runs, and each schedule gets its next firing.

A tick locks the schedules that it takes, so any number of stewards may tick: each takes others. The
runs and the next firing are written in one transaction, and a run is unique by schedule and firing.
"""

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Protocol
from zoneinfo import ZoneInfoNotFoundError

import asyncpg

from core.cron import DstFold, DstGap
from core.ids import new_id
from core.schedule_rules import Due, Missed, Rule, due_at, take_due
from db.database import Connection, Database

log = logging.getLogger(__name__)

#: Schedules of one tick's transaction: some tens of milliseconds.
TICK_LIMIT: Final = 200
#: Of `schedules s`: what a rule and its policies are.
RULE_COLUMNS: Final = """s.id, s.tenant_id, s.cron, s.every_seconds, s.at, s.timezone, s.anchor_at,
    s.start_at, s.end_at, s.dst_gap, s.dst_fold, s.missed, s.catch_up_seconds, s.jitter_seconds,
    s.next_fire_at"""


class Row(Protocol):
    """A row, read by column."""

    def __getitem__(self, column: str, /) -> Any: ...


def rule_of(row: Row) -> Rule:
    """The rule in a row with `RULE_COLUMNS`."""
    return Rule(
        timezone=row["timezone"],
        cron=row["cron"],
        every_seconds=row["every_seconds"],
        at=row["at"],
        anchor_at=row["anchor_at"],
        start_at=row["start_at"],
        end_at=row["end_at"],
        dst_gap=DstGap(row["dst_gap"]),
        dst_fold=DstFold(row["dst_fold"]),
    )


async def tick(database: Database, *, now: datetime | None = None, limit: int = TICK_LIMIT) -> int:
    """Make runs of what is due, for schedules of every tenant.

    Args:
        now: for tests; Postgres's own time otherwise.

    Returns:
        How many schedules were handled: as many as `limit` may mean that there are more.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(_DUE, now, limit)
        if rows:
            await bear(connection, rows, rows[0]["now"])
    return len(rows)


_DUE = f"""
SELECT coalesce($1::timestamptz, now()) AS now, {RULE_COLUMNS}
FROM schedules s
WHERE s.next_fire_at <= coalesce($1::timestamptz, now()) AND s.next_fire_at IS NOT NULL
ORDER BY s.next_fire_at LIMIT $2
FOR NO KEY UPDATE SKIP LOCKED
"""


async def bear(connection: Connection, rows: "Sequence[asyncpg.Record]", now: datetime) -> None:
    """Make the runs of schedules whose rows are locked, up to `now`.

    Args:
        rows: with `RULE_COLUMNS`; those with nothing due are left as they are.
    """
    runs: list[tuple[Any, ...]] = []
    onward: list[tuple[Any, ...]] = []
    for row in rows:
        first = row["next_fire_at"]
        if first is None or first > now:
            continue
        try:
            found = take_due(
                rule_of(row), first, now, Missed(row["missed"]), row["catch_up_seconds"]
            )
        except (ZoneInfoNotFoundError, ValueError, OverflowError):
            extra = {"action": "schedule_broken", "schedule": str(row["id"])}
            log.exception("The rule of a schedule cannot be followed: it is paused", extra=extra)
            await connection.execute(_PAUSE_BROKEN, row["id"], now)
            continue
        runs += _runs(row, found)
        onward.append((row["id"], found.next_fire_at, found.missed))
    if onward:
        await connection.execute(_BEAR, *_columns(runs, 7), *_columns(onward, 3), now)


def _runs(row: "asyncpg.Record", found: Due) -> list[tuple[Any, ...]]:
    id_, tenant_id, jitter = row["id"], row["tenant_id"], row["jitter_seconds"]
    born = [
        (new_id(), id_, tenant_id, fire_at, due_at(id_.bytes, fire_at, jitter), "pending", None)
        for fire_at in found.run
    ]
    passed = [
        (new_id(), id_, tenant_id, fire_at, fire_at, "skipped", "missed")
        for fire_at in found.skipped
    ]
    return passed + born


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * width


_BEAR = """
WITH born AS (
    INSERT INTO schedule_runs (id, schedule_id, tenant_id, fire_at, due_at, state, reason,
                               finished_at, created_at)
    SELECT n.*, CASE WHEN n.state = 'skipped' THEN $11::timestamptz END, $11
    FROM unnest($1::uuid[], $2::uuid[], $3::int[], $4::timestamptz[], $5::timestamptz[],
                $6::text[], $7::text[]) AS n(id, schedule_id, tenant_id, fire_at, due_at, state,
                                             reason)
    ON CONFLICT (schedule_id, fire_at) DO NOTHING
)
UPDATE schedules s SET next_fire_at = o.next_fire_at, missed_runs = s.missed_runs + o.missed
FROM unnest($8::uuid[], $9::timestamptz[], $10::int[]) AS o(id, next_fire_at, missed)
WHERE s.id = o.id
"""

_PAUSE_BROKEN = """
UPDATE schedules SET paused_at = $2, pause_reason = 'failures', next_fire_at = NULL WHERE id = $1
"""


async def seconds_to_next(database: Database) -> float | None:
    """How long until something is due: a firing, or a run that waits for its time."""
    seconds: float | None = await database.fetch_value(
        """
        SELECT extract(epoch FROM least(
            (SELECT min(next_fire_at) FROM schedules WHERE next_fire_at IS NOT NULL),
            (SELECT min(due_at) FROM schedule_runs WHERE state = 'pending' AND due_at > now())
        ) - clock_timestamp())::float8
        """
    )
    return seconds
