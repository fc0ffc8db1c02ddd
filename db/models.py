"""The schema, as SQLAlchemy models: what Alembic migrates and what the tests compare with it.

Runtime statements are written by hand beside this module (docs/decisions/0002-sql-by-hand.md).
The hot table is `jobs`: small rows, no foreign keys (a trigger per row costs as much as the row),
few indexes. What does not change after submission lies in `job_inputs`, what finishing adds in
`job_outputs`.
"""

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    REAL,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: `adapter_version_id` of a job for the base model itself; version ids start at 1.
BASE_VERSION_ID = 0


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can address it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        UUID: postgresql.UUID(as_uuid=True),
        str: Text(),
        bytes: LargeBinary(),
        dict[str, Any]: postgresql.JSON(),
    }


class Tenant(Base):
    """Who owns jobs, keys and adapters. Tenant 1, `default`, is made by the first migration."""

    __tablename__ = "tenants"

    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Base):
    """A bearer key of one tenant; only its SHA-256 is kept (the key itself is 256 random bits)."""

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(server_default="")
    prefix: Mapped[str]
    key_hash: Mapped[bytes] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[datetime | None]


class BaseModel(Base):
    """A base model, shared by all tenants. It outlives its workers."""

    __tablename__ = "base_models"

    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    revision: Mapped[str] = mapped_column(server_default="")
    max_model_len: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (CheckConstraint("max_model_len > 0", name="context"),)


class Adapter(Base):
    """A name under which a tenant keeps versions of LoRA weights for one base model."""

    __tablename__ = "adapters"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"))
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    name: Mapped[str]
    partition: Mapped[int] = mapped_column(SmallInteger)
    current_version: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_name"),)


class AdapterVersion(Base):
    """One immutable set of weights; `id` is vLLM's `lora_int_id`, unique for ever."""

    __tablename__ = "adapter_versions"

    id: Mapped[int] = mapped_column(Integer, Identity(start=1), primary_key=True)
    adapter_id: Mapped[UUID] = mapped_column(ForeignKey("adapters.id"))
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"))
    version: Mapped[int]
    sha256: Mapped[str]
    rank: Mapped[int]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        UniqueConstraint("adapter_id", "version", name="uq_adapter_versions_adapter_version"),
        CheckConstraint("id > 0 AND version > 0 AND rank > 0", name="positive"),
        CheckConstraint("state IN ('validating', 'ready', 'rejected')", name="state"),
        CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name="sha256"),
    )


class Task(Base):
    """An alias, `task:<name>`, for an adapter, one version of it, or a base model."""

    __tablename__ = "tasks"

    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    adapter_id: Mapped[UUID | None] = mapped_column(ForeignKey("adapters.id"))
    version: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint("version IS NULL OR adapter_id IS NOT NULL", name="version_of_adapter"),
    )


class Worker(Base):
    """A worker process and its lease. `id` is the lease owner: fresh for every process.

    A heartbeat touches no indexed column, so that it stays a heap-only update.
    """

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    hostname: Mapped[str]
    pid: Mapped[int]
    engine: Mapped[str]
    engine_version: Mapped[str]
    limits: Mapped[dict[str, Any]]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lease_expires_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]
    lost_at: Mapped[datetime | None]

    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)


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

    __table_args__ = (
        CheckConstraint("(response IS NULL) = (error_code IS NOT NULL)", name="one_outcome"),
    )


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


class WorkerRate(Base):
    """What a worker gets done for an adapter version (0: the base model), rewritten every 5 s."""

    __tablename__ = "worker_rates"

    worker_id: Mapped[int] = mapped_column(
        ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True
    )
    adapter_version_id: Mapped[int] = mapped_column(primary_key=True)
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))
    tokens_per_second: Mapped[float] = mapped_column(REAL)
    jobs_per_second: Mapped[float] = mapped_column(REAL)
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())

    # every update finds room on its own page
    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)


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
