"""Schedules and runs as the outside sees them."""

import itertools
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

import orjson
from pydantic import BaseModel

from api.adapter_view import Page
from api.batch_view import RequestCounts
from api.job_view import Row, unix_seconds
from core.batch_status import BatchStatus
from core.ids import IdPrefix, format_id
from core.schedule_rules import Missed, Overlap, Rule, RunState, SkipReason

#: How many firings a preview shows unless told otherwise.
PREVIEWED: Final = 10


class Schedule(BaseModel):
    """A schedule. Times are unix seconds.

    `input_file_id`, `template` and `requests` are what it was made of; `run_input_file_id` is the
    file that each run's batch gets. `next_fire_at` is null while it is paused, disabled or ended.
    """

    id: str
    object: Literal["schedule"]
    name: str | None
    state: Literal["active", "paused", "disabled", "ended"]
    cron: str | None
    timezone: str
    every_seconds: int | None
    at: int | None
    start_at: int | None
    end_at: int | None
    dst_gap: Literal["after", "skip"]
    dst_fold: Literal["first", "second", "both"]
    input_file_id: str | None
    template: dict[str, Any] | None
    requests: int | None
    run_input_file_id: str
    endpoint: str
    model: str | None
    priority: int | None
    completion_window: str
    skip_invalid: bool
    output_expires_after: dict[str, Any] | None
    webhook_url: str | None
    metadata: dict[str, str] | None
    missed: Missed
    catch_up_seconds: int
    overlap: Overlap
    pause_after_failures: int
    jitter_seconds: int
    enabled: bool
    paused_at: int | None
    pause_reason: Literal["requested", "failures"] | None
    next_fire_at: int | None
    failures_in_a_row: int
    missed_runs: int
    created_at: int
    changed_at: int


class ScheduleList(Page):
    """One page of schedules, newest first."""

    data: list[Schedule]


class RunError(BaseModel):
    """Why a run failed."""

    code: str
    message: str


class RunBatch(BaseModel):
    """A run's batch, as it is now."""

    id: str
    status: BatchStatus
    request_counts: RequestCounts


class Run(BaseModel):
    """One firing. `lateness_seconds` is from `due_at`, which is `fire_at` and the jitter, to the
    commit of its batch.
    """

    id: str
    object: Literal["schedule.run"]
    schedule_id: str
    trigger: Literal["rule", "manual"]
    state: RunState
    reason: SkipReason | None
    error: RunError | None
    fire_at: int
    due_at: int
    started_at: int | None
    finished_at: int | None
    lateness_seconds: float | None
    batch: RunBatch | None


class RunList(Page):
    """One page of runs, latest firing first."""

    data: list[Run]


class Firing(BaseModel):
    """A firing to come: in unix seconds, in UTC, and in the schedule's time zone."""

    fire_at: int
    utc: str
    local: str


class Preview(BaseModel):
    """The next firings."""

    object: Literal["schedule.preview"]
    timezone: str
    data: list[Firing]


class Deleted(BaseModel):
    """A schedule that was deleted."""

    id: str
    object: Literal["schedule"]
    deleted: Literal[True]


def schedule_view(row: Row) -> dict[str, Any]:
    """A schedule as db.schedules reads it."""
    return {
        "id": format_id(IdPrefix.SCHEDULE, row["id"]),
        "object": "schedule",
        "state": _state(row),
        **schedule_body(row),
        "run_input_file_id": format_id(IdPrefix.FILE, row["input_file_id"]),
        "paused_at": unix_seconds(row["paused_at"]),
        "pause_reason": row["pause_reason"],
        "next_fire_at": unix_seconds(row["next_fire_at"]),
        "failures_in_a_row": row["failures_in_a_row"],
        "missed_runs": row["missed_runs"],
        "created_at": unix_seconds(row["created_at"]),
        "changed_at": unix_seconds(row["changed_at"]),
    }


def schedule_body(row: Row) -> dict[str, Any]:
    """What was asked for, as in the body that made the schedule; but `requests` is their number."""
    given = row["rows_file_id"] or (row["input_file_id"] if row["requests"] is None else None)
    expires = row["output_expires_seconds"]
    same = ("name", "cron", "timezone", "every_seconds", "dst_gap", "dst_fold", "requests",
            "endpoint", "model", "priority", "completion_window", "skip_invalid", "webhook_url",
            "missed", "catch_up_seconds", "overlap", "jitter_seconds", "enabled")  # fmt: skip
    return {
        **{name: row[name] for name in same},
        **{name: unix_seconds(row[name]) for name in ("at", "start_at", "end_at")},
        "input_file_id": None if given is None else format_id(IdPrefix.FILE, given),
        "template": row["template_text"] and orjson.loads(row["template_text"]),
        "output_expires_after": expires and {"anchor": "created_at", "seconds": expires},
        "metadata": row["metadata_text"] and orjson.loads(row["metadata_text"]),
        "pause_after_failures": row["pause_after_failures"] or 0,
    }


def _state(row: Row) -> str:
    if not row["enabled"]:
        return "disabled"
    if row["paused_at"] is not None:
        return "paused"
    return "ended" if row["next_fire_at"] is None else "active"


def run_view(row: Row) -> dict[str, Any]:
    """A run as db.schedules reads it."""
    started = row["started_at"]
    batch = None
    if row["batch_status"] is not None:
        batch = {
            "id": format_id(IdPrefix.BATCH, row["batch_id"]),
            "status": row["batch_status"],
            "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
        }
    return {
        "id": format_id(IdPrefix.RUN, row["id"]),
        "object": "schedule.run",
        "schedule_id": format_id(IdPrefix.SCHEDULE, row["schedule_id"]),
        "trigger": row["trigger"],
        "state": row["state"],
        "reason": row["reason"],
        "error": row["error_code"] and {"code": row["error_code"], "message": row["error_message"]},
        "fire_at": unix_seconds(row["fire_at"]),
        "due_at": unix_seconds(row["due_at"]),
        "started_at": unix_seconds(started),
        "finished_at": unix_seconds(row["finished_at"]),
        "lateness_seconds": started and round((started - row["due_at"]).total_seconds(), 3),
        "batch": batch,
    }


def preview_view(rule: Rule, firings: Iterable[datetime], count: int) -> dict[str, Any]:
    """The next `count` firings."""
    zone = ZoneInfo(rule.timezone)
    return {
        "object": "schedule.preview",
        "timezone": rule.timezone,
        "data": [
            {
                "fire_at": int(moment.timestamp()),
                "utc": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "local": moment.astimezone(zone).isoformat(timespec="seconds"),
            }
            for moment in itertools.islice(firings, count)
        ],
    }
