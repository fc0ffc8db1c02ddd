"""Files, batches and their lines, and what tokens were used for."""

from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Identity, Index, SmallInteger, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import Integer

from db.models.base import Base

OPEN_STATUSES = "('validating', 'in_progress', 'finalizing', 'cancelling')"


class File(Base):
    """A file that was uploaded, or made of a batch's answers; its bytes are in the blob store.

    The row is there before the bytes and goes after them, so that no object is ever without one.
    """

    __tablename__ = "files"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[int]
    purpose: Mapped[str]
    filename: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="writing")
    size_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    #: newlines, counted on the way: what a promise is made from before the file was read
    newlines: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    #: while it is written: when its writer was last heard of; deleted: when
    touched_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint("state IN ('writing', 'ready', 'deleted')", name="state"),
        CheckConstraint("purpose IN ('batch', 'batch_output')", name="purpose"),
        CheckConstraint("size_bytes >= 0 AND newlines >= 0", name="sizes"),
        Index("ix_files_tenant", "tenant_id", "id", postgresql_where=text("state = 'ready'")),
        Index("ix_files_expires_at", "expires_at", postgresql_where=text("state = 'ready'")),
        Index("ix_files_touched_at", "touched_at", postgresql_where=text("state <> 'ready'")),
    )


class Batch(Base):
    """A batch. Its counts change in the statements that finish its jobs (db/finishing.py)."""

    __tablename__ = "batches"

    #: what its jobs and lines name: 4 bytes in place of 16
    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    public_id: Mapped[UUID]
    tenant_id: Mapped[int]
    status: Mapped[str] = mapped_column(server_default="validating")

    total: Mapped[int] = mapped_column(server_default="0")
    completed: Mapped[int] = mapped_column(server_default="0")
    #: cancelled and expired lines too
    failed: Mapped[int] = mapped_column(server_default="0")
    #: how many of `failed` ran out of time
    expired: Mapped[int] = mapped_column(server_default="0")
    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    #: when the last line was finished
    ended_at: Mapped[datetime | None]

    endpoint: Mapped[str]
    completion_window: Mapped[str]
    skip_invalid: Mapped[bool]
    input_file_id: Mapped[UUID]
    #: of lines that say nothing themselves
    default_model: Mapped[str | None]
    default_priority: Mapped[int | None] = mapped_column(SmallInteger)
    output_file_id: Mapped[UUID | None]
    error_file_id: Mapped[UUID | None]
    output_expires_seconds: Mapped[int | None]
    #: the one model that every line names, if there is one
    model: Mapped[str | None]
    base_model_ids: Mapped[list[int]] = mapped_column(ARRAY(Integer), server_default="{}")
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    #: a list of {code, message, param, line}
    errors: Mapped[dict[str, Any] | None]
    #: told of its end
    webhook_url: Mapped[str | None]

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    in_progress_at: Mapped[datetime | None]
    expires_at: Mapped[datetime]
    finalizing_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    expired_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]

    #: which steward carries it on, until when
    lease_id: Mapped[UUID | None]
    lease_expires_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(
            "status IN ('validating', 'in_progress', 'finalizing', 'completed', 'failed',"
            " 'expired', 'cancelling', 'cancelled')",
            name="status",
        ),
        CheckConstraint(
            "completed >= 0 AND failed >= 0 AND completed + failed <= total"
            " AND expired BETWEEN 0 AND failed",
            name="counts",
        ),
        # equal when final, and as soon as it is known to have ended
        CheckConstraint(
            "(ended_at IS NULL"
            " AND status NOT IN ('finalizing', 'completed', 'expired', 'cancelled'))"
            " OR completed + failed = total",
            name="ended",
        ),
        CheckConstraint("status NOT IN ('validating', 'failed') OR total = 0", name="unread"),
        CheckConstraint(
            "(completed_at IS NOT NULL) = (status = 'completed')"
            " AND (failed_at IS NOT NULL) = (status = 'failed')"
            " AND (expired_at IS NOT NULL) = (status = 'expired')"
            " AND (cancelled_at IS NOT NULL) = (status = 'cancelled')"
            " AND (cancelling_at IS NOT NULL) = (status IN ('cancelling', 'cancelled'))",
            name="times",
        ),
        Index("uq_batches_public_id", "tenant_id", "public_id", unique=True),
        Index("ix_batches_open", "id", postgresql_where=text(f"status IN {OPEN_STATUSES}")),
        # every change of the counts finds room on its own page
        {"postgresql_with": {"fillfactor": "50"}},
    )


class BatchLine(Base):
    """A line of a batch: staged while the file is validated, then joined with its job at output.

    What its job will be stands here until all lines are known to be good; then the jobs are made
    of it in one statement.
    """

    __tablename__ = "batch_lines"

    batch_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    #: counted from 1, as in the file
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    base_model_id: Mapped[int | None]
    adapter_version_id: Mapped[int | None]
    tokens: Mapped[int] = mapped_column(server_default="0")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    job_id: Mapped[UUID]
    deadline: Mapped[datetime | None]
    custom_id: Mapped[str | None]
    #: of a bad line that was skipped: it has no job
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(
            "(base_model_id IS NULL) = (error_code IS NOT NULL)"
            " AND (adapter_version_id IS NULL) = (error_code IS NOT NULL)",
            name="job_or_error",
        ),
    )


class BatchStep(Base):
    """Lines of a batch that one statement finished, in the order of their commits.

    `position` is how many lines had been finished before: written under the lock of the batch's
    row, so that a reader who has seen a step has seen all before it.
    """

    __tablename__ = "batch_steps"

    batch_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    lines: Mapped[list[int]] = mapped_column(ARRAY(Integer))


class UsageEntry(Base):
    """What one statement's jobs used, until the steward adds it to its day. Appended only."""

    __tablename__ = "usage_entries"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    day: Mapped[date]
    tenant_id: Mapped[int]
    base_model_id: Mapped[int]
    adapter_version_id: Mapped[int]
    jobs: Mapped[int]
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)


class UsageDay(Base):
    """What a tenant used of an adapter version (0: the base model) on a day, in UTC. For ever."""

    __tablename__ = "usage_days"

    tenant_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    day: Mapped[date] = mapped_column(primary_key=True)
    base_model_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    adapter_version_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    jobs: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
