"""Jobs: the hot table, what was asked, what came of it, and the list of waiting lines.

`jobs` has small rows, no foreign keys (a trigger per row costs as much as the row) and few
indexes. What does not change after submission lies in `job_inputs`, what finishing adds in
`job_outputs`.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, Sequence, SmallInteger, false, func, text
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base


class Job(Base):
    """The hot row of a job: what claiming, fencing and finishing read and write."""

    __tablename__ = "jobs"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    #: where it stands in its adapter's line, see core/priority.py
    place: Mapped[int] = mapped_column(BigInteger)
    lease_owner: Mapped[int | None] = mapped_column(BigInteger)
    deadline: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    tenant_id: Mapped[int]
    base_model_id: Mapped[int]
    #: 0 is the base model itself
    adapter_version_id: Mapped[int] = mapped_column(server_default="0")
    #: the fence: rises at every claim, never falls
    attempt: Mapped[int] = mapped_column(server_default="0")
    #: claims given back at no cost
    releases: Mapped[int] = mapped_column(server_default="0")
    #: expected tokens, prompt and answer: what the feeder sizes by
    tokens: Mapped[int] = mapped_column(server_default="0")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    failures: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    state: Mapped[str] = mapped_column(server_default="queued")
    #: those that were in an engine together when it died, and run apart from all others
    suspect_group: Mapped[int | None] = mapped_column(BigInteger)
    #: how often an engine died with this job alone in it
    suspect_deaths: Mapped[int | None] = mapped_column(SmallInteger)
    #: the batch and the line that it came from, if it did
    batch_id: Mapped[int | None]
    batch_line: Mapped[int | None]
    #: whether its input names a webhook; null for the most, who then cost nothing more
    webhook: Mapped[bool | None]

    __table_args__ = (
        CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired')",
            name="state",
        ),
        CheckConstraint("priority BETWEEN -100 AND 100", name="priority"),
        CheckConstraint(
            "(finished_at IS NOT NULL)"
            " = (state IN ('succeeded', 'failed', 'cancelled', 'expired'))",
            name="finished",
        ),
        # running has an owner; queued, succeeded and failed have none; a cancelled or expired
        # job keeps its owner until that worker has aborted it in its engine
        CheckConstraint(
            "CASE WHEN state = 'running' THEN lease_owner IS NOT NULL AND attempt > 0"
            " WHEN state IN ('cancelled', 'expired') THEN true ELSE lease_owner IS NULL END",
            name="owner",
        ),
        CheckConstraint(
            "attempt >= 0 AND failures >= 0 AND releases >= 0 AND releases <= attempt",
            name="counts",
        ),
        Index(
            "ix_jobs_waiting",
            "base_model_id",
            "adapter_version_id",
            "tenant_id",
            "place",
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_owned",
            "lease_owner",
            "state",
            postgresql_where=text("lease_owner IS NOT NULL"),
        ),
        Index(
            "ix_jobs_deadline",
            "deadline",
            postgresql_where=text("deadline IS NOT NULL AND finished_at IS NULL"),
        ),
        # what makes a job with a near deadline overtake inside its line
        Index(
            "ix_jobs_pressing",
            "base_model_id",
            "adapter_version_id",
            "tenant_id",
            "deadline",
            postgresql_where=text("state = 'queued' AND deadline IS NOT NULL"),
        ),
        Index(
            "ix_jobs_suspects",
            "base_model_id",
            "suspect_group",
            postgresql_where=text("suspect_group IS NOT NULL AND state = 'queued'"),
        ),
        Index(
            "ix_jobs_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
        # dead tuples of a claimed prefix slow the next claim: vacuum by number, not by share
        {
            "postgresql_with": {
                "autovacuum_vacuum_scale_factor": "0.01",
                "autovacuum_vacuum_cost_delay": "0",
            }
        },
    )


class JobInput(Base):
    """What was asked. Written once, with the job; its key also lists a tenant's jobs."""

    __tablename__ = "job_inputs"

    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    #: chat or completion
    endpoint: Mapped[str]
    #: as the user wrote it
    model: Mapped[str]
    #: the validated body without Lorry's own fields
    body: Mapped[dict[str, Any]]
    #: given back to the user as it came
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    webhook_url: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (CheckConstraint("endpoint IN ('chat', 'completion')", name="endpoint"),)


class JobOutput(Base):
    """What came of it: exactly one row for a succeeded or failed job, written in the fence."""

    __tablename__ = "job_outputs"

    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    response: Mapped[dict[str, Any] | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    prompt_tokens: Mapped[int] = mapped_column(server_default="0")
    completion_tokens: Mapped[int] = mapped_column(server_default="0")
    #: who made it; null for what no worker recorded
    worker_id: Mapped[int | None] = mapped_column(BigInteger)
    #: whether its adapter was folded into the base weights for some of the time
    folded: Mapped[bool] = mapped_column(server_default=false())

    __table_args__ = (
        CheckConstraint("(response IS NULL) = (error_code IS NOT NULL)", name="one_outcome"),
    )


class JobAttempt(Base):
    """An attempt that did not end its job: it was given back, tried again or rescued.

    Written in the statement that queues the job again, so that success costs nothing. The last
    attempt is told by `jobs` and `job_outputs`.
    """

    __tablename__ = "job_attempts"

    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[int | None] = mapped_column(BigInteger)
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime] = mapped_column(server_default=func.now())
    outcome: Mapped[str]
    error: Mapped[str | None]

    __table_args__ = (
        CheckConstraint("outcome IN ('released', 'retried', 'rescued', 'suspect')", name="outcome"),
    )


#: Numbers the groups of suspects, in the order in which they are run.
SUSPECT_GROUPS = Sequence("suspect_groups", metadata=Base.metadata)


class WaitingAdapter(Base):
    """There are (or just were) queued jobs of this adapter and tenant: what a planner looks at.

    Inserted with the job, deleted by the worker that finds the line empty, rebuilt by the sweep.
    `since` is when it began to wait: when it was inserted or last drained.
    """

    __tablename__ = "waiting_adapters"

    base_model_id: Mapped[int] = mapped_column(primary_key=True)
    adapter_version_id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(SmallInteger)
    since: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    __table_args__ = (Index("ix_waiting_adapters_since", "base_model_id", "since"),)


class IdempotencyKey(Base):
    """A key that a tenant used on a route, and what it made. Kept for 24 hours."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[int] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes]
    resource_id: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)
