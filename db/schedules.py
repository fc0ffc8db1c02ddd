"""Schedules as the API sees them: create, change, read, pause, resume, delete.

Whoever changes a schedule first makes the runs of what was due before: a firing belongs to the rule
that it was due under, and an edit between its moment and the tick neither loses nor doubles it.
"""

from dataclasses import replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson

from core.errors import InvalidRequest
from core.ids import new_id
from core.schedule_request import ScheduleRequest, check_fires
from core.schedule_rules import Rule
from db.database import Connection, Database
from db.schedule_files import ScheduleInput, keep_files, release_files
from db.schedule_lock import held, lock
from db.schedule_outcomes import skip_waiting
from db.schedule_ticks import rule_of


async def create(
    database: Database,
    tenant_id: int,
    request: ScheduleRequest,
    given: ScheduleInput,
    *,
    now: datetime | None = None,
) -> UUID:
    """Make a schedule; when this returns, it is committed.

    Args:
        now: for tests; Postgres's own time otherwise.

    Raises:
        InvalidRequest: its rule never fires, or its name is taken.
        InputLost: the file made for it is gone.
    """
    schedule_id = new_id()
    async with database.transaction() as connection:
        moment = await _now(connection, now)
        rule = anchored(request.rule, moment)
        check_fires(rule, moment)
        await keep_files(connection, tenant_id, given)
        values = _values(request, rule, given) | {
            "id": schedule_id,
            "tenant_id": tenant_id,
            "next_fire_at": rule.next_after(moment) if request.enabled else None,
            "created_at": moment,
            "changed_at": moment,
        }
        columns = list(values)
        marks = ", ".join(_mark(name, number) for number, name in enumerate(columns, 1))
        try:
            await connection.execute(
                f"INSERT INTO schedules ({', '.join(columns)}) VALUES ({marks})", *values.values()
            )
        except asyncpg.UniqueViolationError:
            raise _name_taken(request.name) from None
    return schedule_id


def anchored(rule: Rule, now: datetime) -> Rule:
    """An interval with the beginning of its grid: where it starts, or a whole interval ago."""
    if rule.every_seconds is None or rule.anchor_at is not None:
        return rule
    return replace(rule, anchor_at=rule.start_at or now)


async def change(
    database: Database,
    tenant_id: int,
    schedule_id: UUID,
    request: ScheduleRequest,
    given: ScheduleInput | None,
    *,
    now: datetime | None = None,
) -> None:
    """Replace what a schedule says by `request`; its runs so far, and those due, stay.

    Args:
        given: what it is to run from now on; None leaves that.

    Raises:
        NotFound: there is no such schedule.
        InvalidRequest: its rule never fires any more, or its name is taken.
        InputLost: the file made for it is gone.
    """
    async with held(database, tenant_id, schedule_id, now) as (connection, row, moment):
        before = rule_of(row)
        rule = request.rule
        if rule.every_seconds is not None and (
            (rule.every_seconds, rule.start_at) == (before.every_seconds, before.start_at)
        ):
            rule = replace(rule, anchor_at=before.anchor_at)  # the grid goes on
        rule = anchored(rule, moment)
        if rule != before or (request.enabled and not row["enabled"]):
            check_fires(rule, moment)
        upcoming = row["next_fire_at"]
        if rule != before or upcoming is None:
            upcoming = rule.next_after(moment)
        values = _values(request, rule, given)
        if given is not None:
            await release_files(connection, tenant_id, schedule_id)
            await keep_files(connection, tenant_id, given)
        values |= {
            "next_fire_at": upcoming if request.enabled and row["paused_at"] is None else None,
            "changed_at": moment,
        }
        if not request.enabled:
            await skip_waiting(connection, [schedule_id], "paused", moment)
        settings = ", ".join(
            f"{name} = {_mark(name, number)}" for number, name in enumerate(values, 2)
        )
        try:
            await connection.execute(
                f"UPDATE schedules SET {settings} WHERE id = $1", schedule_id, *values.values()
            )
        except asyncpg.UniqueViolationError:
            raise _name_taken(request.name) from None


def _values(request: ScheduleRequest, rule: Rule, given: ScheduleInput | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": request.name,
        "cron": rule.cron,
        "every_seconds": rule.every_seconds,
        "at": rule.at,
        "timezone": rule.timezone,
        "anchor_at": rule.anchor_at,
        "start_at": rule.start_at,
        "end_at": rule.end_at,
        "dst_gap": rule.dst_gap.value,
        "dst_fold": rule.dst_fold.value,
        "model": request.model,
        "priority": request.priority,
        "completion_window": request.completion_window,
        "window_seconds": request.window_seconds,
        "skip_invalid": request.skip_invalid,
        "output_expires_seconds": request.output_expires_seconds,
        "webhook_url": request.webhook_url,
        "metadata": _json(request.metadata),
        "missed": request.missed.value,
        "catch_up_seconds": request.catch_up_seconds,
        "overlap": request.overlap.value,
        "pause_after_failures": request.pause_after_failures,
        "jitter_seconds": request.jitter_seconds,
        "enabled": request.enabled,
    }
    if given is not None:
        values |= {
            "input_file_id": given.file_id,
            "rows_file_id": given.rows_file_id,
            "template": _json(given.template),
            "requests": given.requests,
            "endpoint": given.endpoint,
        }
    return values


_JSON_COLUMNS: Final = frozenset({"metadata", "template"})


def _mark(column: str, number: int) -> str:
    return f"${number}::text::json" if column in _JSON_COLUMNS else f"${number}"


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


# --- reading --------------------------------------------------------------------------------------

_SELECT = """
SELECT s.*, s.metadata::text AS metadata_text, s.template::text AS template_text
FROM schedules s
"""


async def get(
    database: Database, tenant_id: int, schedule_id: UUID | None, name: str
) -> asyncpg.Record | None:
    """One schedule of a tenant, by its id or its name; None for another tenant's."""
    async with database.connection() as connection:
        return await connection.fetchrow(
            f"{_SELECT} WHERE s.tenant_id = $1 AND (s.id = $2 OR s.name = $3)"
            " ORDER BY s.id = $2 DESC LIMIT 1",
            tenant_id,
            schedule_id,
            name,
        )


async def list_page(
    database: Database, tenant_id: int, after: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """A tenant's schedules, newest first, from behind `after`: up to `limit` of them."""
    async with database.connection() as connection:
        return await connection.fetch(
            f"{_SELECT} WHERE s.tenant_id = $1 AND ($3::uuid IS NULL OR s.id < $3)"
            " ORDER BY s.id DESC LIMIT $2",
            tenant_id,
            limit,
            after,
        )


# --- what is asked of one -------------------------------------------------------------------------


async def pause(
    database: Database, tenant_id: int, schedule_id: UUID, *, now: datetime | None = None
) -> None:
    """Nothing fires any more, and runs that wait are skipped; batches run on. Raises NotFound."""
    async with held(database, tenant_id, schedule_id, now) as (connection, _, moment):
        await skip_waiting(connection, [schedule_id], "paused", moment)
        await connection.execute(
            "UPDATE schedules SET paused_at = coalesce(paused_at, $2), next_fire_at = NULL,"
            " pause_reason = coalesce(pause_reason, 'requested') WHERE id = $1",
            schedule_id,
            moment,
        )


async def resume(
    database: Database, tenant_id: int, schedule_id: UUID, *, now: datetime | None = None
) -> None:
    """Fire again, from the next firing on: none of the pause is made up for. Raises NotFound."""
    async with held(database, tenant_id, schedule_id, now) as (connection, row, moment):
        if row["paused_at"] is None:
            return
        await connection.execute(
            "UPDATE schedules SET paused_at = NULL, pause_reason = NULL, failures_in_a_row = 0,"
            " next_fire_at = $2 WHERE id = $1",
            schedule_id,
            rule_of(row).next_after(moment) if row["enabled"] else None,
        )


async def delete(database: Database, tenant_id: int, schedule_id: UUID) -> None:
    """Remove a schedule and its runs; batches that they made stay. Raises NotFound."""
    async with database.transaction() as connection:
        await lock(connection, tenant_id, schedule_id)
        await release_files(connection, tenant_id, schedule_id)
        await connection.execute("DELETE FROM schedule_runs WHERE schedule_id = $1", schedule_id)
        await connection.execute("DELETE FROM schedules WHERE id = $1", schedule_id)


async def _now(connection: Connection, now: datetime | None) -> datetime:
    moment: datetime = now or await connection.fetchval("SELECT clock_timestamp()")
    return moment


def _name_taken(name: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"name {name!r} is that of another schedule; give another, or change that one with PATCH",
        field="name",
    )
