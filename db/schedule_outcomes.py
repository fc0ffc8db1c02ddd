"""The ends of runs: their batches end, failures are told and counted, queued runs are woken."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from core.ids import IdPrefix, format_id
from core.webhook_events import EventType
from db.database import Connection, Database
from db.deliveries import owe

#: Runs, or schedules, of one transaction.
STEP: Final = 500
NO_ANSWERS: Final = "no_answers"


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that failed, and why."""

    run_id: UUID
    schedule_id: UUID
    tenant_id: int
    webhook_url: str | None
    code: str
    message: str


async def fail(connection: Connection, failures: Sequence[Failure], now: datetime) -> None:
    """Runs that are locked become `failed`: the one place where that happens, and is told."""
    await connection.execute(
        """
        UPDATE schedule_runs r
        SET state = 'failed', error_code = n.code, error_message = n.message, finished_at = $4
        FROM unnest($1::uuid[], $2::text[], $3::text[]) AS n(id, code, message)
        WHERE r.id = n.id AND r.state IN ('pending', 'started')
        """,
        [each.run_id for each in failures],
        [each.code for each in failures],
        [each.message for each in failures],
        now,
    )
    for each in failures:
        await owe(
            connection,
            each.tenant_id,
            EventType.SCHEDULE_RUN_FAILED,
            format_id(IdPrefix.RUN, each.run_id),
            "failed",
            each.webhook_url,
            link=f"/v1/schedules/{format_id(IdPrefix.SCHEDULE, each.schedule_id)}/runs",
        )


async def finish_ended(
    database: Database, *, now: datetime | None = None, limit: int = STEP
) -> int:
    """Runs whose batches have ended become `finished`, or `failed` where there is no answer.

    Returns:
        How many: as many as `limit` may mean that there are more.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(_ENDED, now, limit)
        failures = [
            Failure(
                row["run_id"], row["schedule_id"], row["tenant_id"], row["webhook_url"], *problem
            )
            for row in rows
            if (problem := _problem(row)) is not None
        ]
        failed = {each.run_id for each in failures}
        finished = [row["run_id"] for row in rows if row["run_id"] not in failed]
        if finished:
            await connection.execute(_FINISHED, finished, rows[0]["now"])
        if failures:
            await fail(connection, failures, rows[0]["now"])
    return len(rows)


_ENDED = """
SELECT coalesce($1::timestamptz, now()) AS now, r.id AS run_id, r.schedule_id, r.tenant_id,
       s.webhook_url, b.status, b.total, b.completed, b.errors::text AS errors
FROM schedule_runs r
JOIN schedules s ON s.id = r.schedule_id
LEFT JOIN batches b ON b.tenant_id = r.tenant_id AND b.public_id = r.batch_id
WHERE r.state = 'started'
  AND (b.id IS NULL OR b.status IN ('completed', 'failed', 'expired', 'cancelled'))
ORDER BY r.id LIMIT $2
FOR NO KEY UPDATE OF r SKIP LOCKED
"""
_FINISHED = """
UPDATE schedule_runs SET state = 'finished', finished_at = $2
WHERE id = ANY($1::uuid[]) AND state = 'started'
"""


def _problem(row: "asyncpg.Record") -> tuple[str, str] | None:
    """Why a run whose batch ended has failed; None where it has not."""
    if row["status"] == "failed":
        errors = json.loads(row["errors"] or "[]") or [{"code": "invalid_request", "message": ""}]
        first = errors[0]
        line = "" if first.get("line") is None else f"line {first['line']}: "
        more = f" (and {len(errors) - 1} more: see the batch)" if len(errors) > 1 else ""
        return str(first["code"]), f"{line}{first['message']}{more}"
    if row["status"] in ("completed", "expired") and not row["completed"]:
        what = "expired before any" if row["status"] == "expired" else "ended, and not one"
        return NO_ANSWERS, f"the batch {what} of its {row['total']} requests succeeded"
    return None


async def count_ends(database: Database, *, now: datetime | None = None, limit: int = STEP) -> int:
    """Add ended runs to their schedules' failures in a row, and pause those with too many.

    Returns:
        How many schedules were looked at.
    """
    async with database.transaction() as connection:
        schedules = await connection.fetch(_UNCOUNTED, now, limit)
        if not schedules:
            return 0
        moment = schedules[0]["now"]
        runs = await connection.fetch(_COUNT, [row["id"] for row in schedules])
        ends: dict[UUID, list[str]] = defaultdict(list)
        for run in sorted(runs, key=lambda run: (run["finished_at"], run["id"])):
            ends[run["schedule_id"]].append(run["state"])
        counted: list[tuple[UUID, int, bool]] = []
        for row in schedules:
            failures, most = row["failures_in_a_row"], 0
            for state in ends[row["id"]]:
                failures = failures + 1 if state == "failed" else 0
                most = max(most, failures)
            allowed = row["pause_after_failures"]
            counted.append((row["id"], failures, allowed is not None and most >= allowed))
        await connection.execute(_PAUSE, *map(list, zip(*counted, strict=True)), moment)
        paused = [id_ for id_, _, pauses in counted if pauses]
        if paused:
            await skip_waiting(connection, paused, "paused", moment)
    return len(schedules)


_UNCOUNTED = """
SELECT coalesce($1::timestamptz, now()) AS now, s.id, s.failures_in_a_row, s.pause_after_failures
FROM schedules s
WHERE s.id IN (SELECT schedule_id FROM schedule_runs
               WHERE NOT counted AND state IN ('finished', 'failed') LIMIT $2)
FOR NO KEY UPDATE SKIP LOCKED
"""
_COUNT = """
UPDATE schedule_runs SET counted = true
WHERE schedule_id = ANY($1::uuid[]) AND NOT counted AND state IN ('finished', 'failed')
RETURNING id, schedule_id, state, finished_at
"""
# paused once, by whom it was first
_PAUSE = """
UPDATE schedules s SET
    failures_in_a_row = n.failures,
    paused_at = CASE WHEN n.pauses THEN coalesce(s.paused_at, $4) ELSE s.paused_at END,
    pause_reason = CASE WHEN n.pauses THEN coalesce(s.pause_reason, 'failures')
                        ELSE s.pause_reason END,
    next_fire_at = CASE WHEN n.pauses THEN NULL ELSE s.next_fire_at END
FROM unnest($1::uuid[], $2::int[], $3::boolean[]) AS n(id, failures, pauses)
WHERE s.id = n.id
"""


async def skip_waiting(
    connection: Connection, schedule_ids: Sequence[UUID], reason: str, now: datetime
) -> None:
    """Runs that have not started will not, of schedules whose rows are locked."""
    await connection.execute(
        """
        UPDATE schedule_runs SET state = 'skipped', reason = $2, finished_at = $3
        WHERE schedule_id = ANY($1::uuid[]) AND state IN ('pending', 'queued')
        """,
        list(schedule_ids),
        reason,
        now,
    )


async def wake_queued(database: Database) -> int:
    """The first queued run of each schedule that has no open one is `pending` again.

    Whether it starts is decided as it is claimed. Returns how many were woken.
    """
    woken: int = await database.fetch_value(_WAKE)
    return woken


_WAKE = """
WITH woken AS (
    UPDATE schedule_runs SET state = 'pending'
    WHERE state = 'queued' AND id IN (
        SELECT DISTINCT ON (q.schedule_id) q.id FROM schedule_runs q
        WHERE q.state = 'queued' AND NOT EXISTS (
            SELECT FROM schedule_runs o
            LEFT JOIN batches b ON b.tenant_id = o.tenant_id AND b.public_id = o.batch_id
            WHERE o.schedule_id = q.schedule_id
              AND (o.state = 'pending' AND (o.due_at, o.id) < (q.due_at, q.id)
                   OR o.state = 'started'
                      AND b.status IN ('validating', 'in_progress', 'finalizing', 'cancelling')))
        ORDER BY q.schedule_id, q.due_at, q.id)
    RETURNING 1
)
SELECT count(*) FROM woken
"""
