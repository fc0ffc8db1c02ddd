"""Schedules and their runs."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, SmallInteger, func, text
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base


class Schedule(Base):
    """When batches are made of what. `next_fire_at` is what a tick looks for."""

    __tablename__ = "schedules"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[int]
    name: Mapped[str | None]

    cron: Mapped[str | None]
    every_seconds: Mapped[int | None]
    at: Mapped[datetime | None]
    timezone: Mapped[str]
    #: where an interval's grid begins
    anchor_at: Mapped[datetime | None]
    start_at: Mapped[datetime | None]
    end_at: Mapped[datetime | None]
    dst_gap: Mapped[str]
    dst_fold: Mapped[str]

    #: what a run's batch gets
    input_file_id: Mapped[UUID]
    #: the file with the rows that the template was filled with, if there is a template
    rows_file_id: Mapped[UUID | None]
    template: Mapped[dict[str, Any] | None]
    #: of requests that were given with the schedule: how many
    requests: Mapped[int | None]
    endpoint: Mapped[str]
    model: Mapped[str | None]
    priority: Mapped[int | None] = mapped_column(SmallInteger)
    completion_window: Mapped[str]
    window_seconds: Mapped[int]
    skip_invalid: Mapped[bool]
    output_expires_seconds: Mapped[int | None]
    webhook_url: Mapped[str | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")

    missed: Mapped[str]
    catch_up_seconds: Mapped[int]
    overlap: Mapped[str]
    pause_after_failures: Mapped[int | None]
    jitter_seconds: Mapped[int]

    enabled: Mapped[bool]
    paused_at: Mapped[datetime | None]
    pause_reason: Mapped[str | None]
    #: the first firing that was not looked at yet
    next_fire_at: Mapped[datetime | None]
    failures_in_a_row: Mapped[int] = mapped_column(server_default="0")
    #: firings that were passed over since no steward was there
    missed_runs: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    changed_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(
            "(cron IS NOT NULL)::int + (every_seconds IS NOT NULL)::int + (at IS NOT NULL)::int = 1"
            " AND (every_seconds IS NULL) = (anchor_at IS NULL)",
            name="rule",
        ),
        CheckConstraint("every_seconds > 0", name="interval"),
        CheckConstraint("end_at > start_at", name="dates"),
        CheckConstraint("(template IS NULL) = (rows_file_id IS NULL)", name="template"),
        CheckConstraint(
            "missed IN ('skip', 'latest', 'all')"
            " AND overlap IN ('allow', 'skip', 'queue', 'cancel_previous')"
            " AND dst_gap IN ('after', 'skip') AND dst_fold IN ('first', 'second', 'both')",
            name="policies",
        ),
        CheckConstraint(
            "(paused_at IS NULL) = (pause_reason IS NULL)"
            " AND pause_reason IN ('requested', 'failures')",
            name="paused",
        ),
        CheckConstraint(
            "next_fire_at IS NULL OR (enabled AND paused_at IS NULL)", name="next_fire_at"
        ),
        CheckConstraint("jitter_seconds >= 0 AND failures_in_a_row >= 0", name="counts"),
        Index("uq_schedules_id", "tenant_id", "id", unique=True),
        Index(
            "uq_schedules_name",
            "tenant_id",
            "name",
            unique=True,
            postgresql_where=text("name IS NOT NULL"),
        ),
        Index(
            "ix_schedules_next_fire_at",
            "next_fire_at",
            postgresql_where=text("next_fire_at IS NOT NULL"),
        ),
        Index("ix_schedules_input_file_id", "input_file_id"),
        Index(
            "ix_schedules_rows_file_id",
            "rows_file_id",
            postgresql_where=text("rows_file_id IS NOT NULL"),
        ),
    )


class ScheduleRun(Base):
    """One firing of a schedule. `pending` until some steward makes its batch."""

    __tablename__ = "schedule_runs"

    #: also its batch's idempotency key
    id: Mapped[UUID] = mapped_column(primary_key=True)
    schedule_id: Mapped[UUID]
    tenant_id: Mapped[int]
    #: when the rule says
    fire_at: Mapped[datetime]
    #: when it may start: `fire_at` and its share of the jitter
    due_at: Mapped[datetime]
    #: `rule`, or `manual` for one that was asked for
    trigger: Mapped[str] = mapped_column(server_default="rule")
    state: Mapped[str] = mapped_column(server_default="pending")
    #: of a skipped one
    reason: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    #: the batch's public id
    batch_id: Mapped[UUID | None]
    #: whether its end was counted among its schedule's failures
    counted: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("trigger IN ('rule', 'manual')", name="trigger"),
        CheckConstraint(
            "state IN ('pending', 'queued', 'started', 'finished', 'failed', 'skipped')",
            name="state",
        ),
        CheckConstraint(
            "(batch_id IS NULL) = (started_at IS NULL)"
            " AND (state NOT IN ('started', 'finished') OR started_at IS NOT NULL)"
            " AND (state NOT IN ('pending', 'queued', 'skipped') OR started_at IS NULL)"
            " AND (finished_at IS NULL) = (state IN ('pending', 'queued', 'started'))",
            name="times",
        ),
        CheckConstraint(
            "(reason IS NOT NULL) = (state = 'skipped')"
            " AND reason IN ('missed', 'overlap', 'requested', 'paused')",
            name="reason",
        ),
        CheckConstraint(
            "(error_code IS NOT NULL) = (state = 'failed')"
            " AND (error_message IS NOT NULL) = (state = 'failed')",
            name="error",
        ),
        Index("uq_schedule_runs_firing", "schedule_id", "fire_at", unique=True),
        Index("ix_schedule_runs_due", "due_at", "id", postgresql_where=text("state = 'pending'")),
        Index(
            "ix_schedule_runs_open",
            "schedule_id",
            "due_at",
            "id",
            postgresql_where=text("state IN ('pending', 'queued', 'started')"),
        ),
        Index("ix_schedule_runs_started", "id", postgresql_where=text("state = 'started'")),
        Index("ix_schedule_runs_queued", "schedule_id", postgresql_where=text("state = 'queued'")),
        Index(
            "ix_schedule_runs_uncounted",
            "schedule_id",
            postgresql_where=text("NOT counted AND state IN ('finished', 'failed')"),
        ),
        Index(
            "ix_schedule_runs_finished_at",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
    )
