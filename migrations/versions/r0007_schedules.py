"""Schedules and their runs; what a batch lays under its lines. Expands only; reversible."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "schedule_runs",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("schedule_id", sa.UUID(), nullable=False),
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("fire_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("trigger", sa.Text(), server_default="rule", nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("batch_id", sa.UUID(), nullable=True),
        sa.Column("counted", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(batch_id IS NULL) = (started_at IS NULL) AND (state NOT IN ('started', 'finished') OR started_at IS NOT NULL) AND (state NOT IN ('pending', 'queued', 'skipped') OR started_at IS NULL) AND (finished_at IS NULL) = (state IN ('pending', 'queued', 'started'))",
            name=op.f("ck_schedule_runs_times"),
        ),
        sa.CheckConstraint(
            "(error_code IS NOT NULL) = (state = 'failed') AND (error_message IS NOT NULL) = (state = 'failed')",
            name=op.f("ck_schedule_runs_error"),
        ),
        sa.CheckConstraint(
            "(reason IS NOT NULL) = (state = 'skipped') AND reason IN ('missed', 'overlap', 'requested', 'paused')",
            name=op.f("ck_schedule_runs_reason"),
        ),
        sa.CheckConstraint(
            "state IN ('pending', 'queued', 'started', 'finished', 'failed', 'skipped')",
            name=op.f("ck_schedule_runs_state"),
        ),
        sa.CheckConstraint("trigger IN ('rule', 'manual')", name=op.f("ck_schedule_runs_trigger")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule_runs")),
    )
    op.create_index(
        "ix_schedule_runs_due",
        "schedule_runs",
        ["due_at", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_schedule_runs_finished_at",
        "schedule_runs",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "ix_schedule_runs_open",
        "schedule_runs",
        ["schedule_id", "due_at", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('pending', 'queued', 'started')"),
    )
    op.create_index(
        "ix_schedule_runs_queued",
        "schedule_runs",
        ["schedule_id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_schedule_runs_started",
        "schedule_runs",
        ["id"],
        unique=False,
        postgresql_where=sa.text("state = 'started'"),
    )
    op.create_index(
        "ix_schedule_runs_uncounted",
        "schedule_runs",
        ["schedule_id"],
        unique=False,
        postgresql_where=sa.text("NOT counted AND state IN ('finished', 'failed')"),
    )
    op.create_index(
        "uq_schedule_runs_firing", "schedule_runs", ["schedule_id", "fire_at"], unique=True
    )
    op.create_table(
        "schedules",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("cron", sa.Text(), nullable=True),
        sa.Column("every_seconds", sa.Integer(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("timezone", sa.Text(), nullable=False),
        sa.Column("anchor_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("start_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("dst_gap", sa.Text(), nullable=False),
        sa.Column("dst_fold", sa.Text(), nullable=False),
        sa.Column("input_file_id", sa.UUID(), nullable=False),
        sa.Column("rows_file_id", sa.UUID(), nullable=True),
        sa.Column("template", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("requests", sa.Integer(), nullable=True),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("priority", sa.SmallInteger(), nullable=True),
        sa.Column("completion_window", sa.Text(), nullable=False),
        sa.Column("window_seconds", sa.Integer(), nullable=False),
        sa.Column("skip_invalid", sa.Boolean(), nullable=False),
        sa.Column("output_expires_seconds", sa.Integer(), nullable=True),
        sa.Column("webhook_url", sa.Text(), nullable=True),
        sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("missed", sa.Text(), nullable=False),
        sa.Column("catch_up_seconds", sa.Integer(), nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("pause_after_failures", sa.Integer(), nullable=True),
        sa.Column("jitter_seconds", sa.Integer(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("pause_reason", sa.Text(), nullable=True),
        sa.Column("next_fire_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failures_in_a_row", sa.Integer(), server_default="0", nullable=False),
        sa.Column("missed_runs", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "changed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "(paused_at IS NULL) = (pause_reason IS NULL) AND pause_reason IN ('requested', 'failures')",
            name=op.f("ck_schedules_paused"),
        ),
        sa.CheckConstraint(
            "missed IN ('skip', 'latest', 'all') AND overlap IN ('allow', 'skip', 'queue', 'cancel_previous') AND dst_gap IN ('after', 'skip') AND dst_fold IN ('first', 'second', 'both')",
            name=op.f("ck_schedules_policies"),
        ),
        sa.CheckConstraint(
            "(cron IS NOT NULL)::int + (every_seconds IS NOT NULL)::int + (at IS NOT NULL)::int = 1 AND (every_seconds IS NULL) = (anchor_at IS NULL)",
            name=op.f("ck_schedules_rule"),
        ),
        sa.CheckConstraint(
            "(template IS NULL) = (rows_file_id IS NULL)", name=op.f("ck_schedules_template")
        ),
        sa.CheckConstraint("end_at > start_at", name=op.f("ck_schedules_dates")),
        sa.CheckConstraint("every_seconds > 0", name=op.f("ck_schedules_interval")),
        sa.CheckConstraint(
            "jitter_seconds >= 0 AND failures_in_a_row >= 0", name=op.f("ck_schedules_counts")
        ),
        sa.CheckConstraint(
            "next_fire_at IS NULL OR (enabled AND paused_at IS NULL)",
            name=op.f("ck_schedules_next_fire_at"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    op.create_index("ix_schedules_input_file_id", "schedules", ["input_file_id"], unique=False)
    op.create_index(
        "ix_schedules_next_fire_at",
        "schedules",
        ["next_fire_at"],
        unique=False,
        postgresql_where=sa.text("next_fire_at IS NOT NULL"),
    )
    op.create_index(
        "ix_schedules_rows_file_id",
        "schedules",
        ["rows_file_id"],
        unique=False,
        postgresql_where=sa.text("rows_file_id IS NOT NULL"),
    )
    op.create_index("uq_schedules_id", "schedules", ["tenant_id", "id"], unique=True)
    op.create_index(
        "uq_schedules_name",
        "schedules",
        ["tenant_id", "name"],
        unique=True,
        postgresql_where=sa.text("name IS NOT NULL"),
    )
    op.add_column("batches", sa.Column("default_model", sa.Text(), nullable=True))
    op.add_column("batches", sa.Column("default_priority", sa.SmallInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("batches", "default_priority")
    op.drop_column("batches", "default_model")
    op.drop_index(
        "uq_schedules_name", table_name="schedules", postgresql_where=sa.text("name IS NOT NULL")
    )
    op.drop_index("uq_schedules_id", table_name="schedules")
    op.drop_index(
        "ix_schedules_rows_file_id",
        table_name="schedules",
        postgresql_where=sa.text("rows_file_id IS NOT NULL"),
    )
    op.drop_index(
        "ix_schedules_next_fire_at",
        table_name="schedules",
        postgresql_where=sa.text("next_fire_at IS NOT NULL"),
    )
    op.drop_index("ix_schedules_input_file_id", table_name="schedules")
    op.drop_table("schedules")
    op.drop_index("uq_schedule_runs_firing", table_name="schedule_runs")
    op.drop_index(
        "ix_schedule_runs_uncounted",
        table_name="schedule_runs",
        postgresql_where=sa.text("NOT counted AND state IN ('finished', 'failed')"),
    )
    op.drop_index(
        "ix_schedule_runs_started",
        table_name="schedule_runs",
        postgresql_where=sa.text("state = 'started'"),
    )
    op.drop_index(
        "ix_schedule_runs_queued",
        table_name="schedule_runs",
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.drop_index(
        "ix_schedule_runs_open",
        table_name="schedule_runs",
        postgresql_where=sa.text("state IN ('pending', 'queued', 'started')"),
    )
    op.drop_index(
        "ix_schedule_runs_finished_at",
        table_name="schedule_runs",
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.drop_index(
        "ix_schedule_runs_due",
        table_name="schedule_runs",
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.drop_table("schedule_runs")
