"""What a request's `model` can name: base models, adapters and their versions, tasks."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    Integer,
    SmallInteger,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base


class BaseModel(Base):
    """A base model, shared by all tenants. It outlives its workers."""

    __tablename__ = "base_models"

    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    revision: Mapped[str] = mapped_column(server_default="")
    max_model_len: Mapped[int]
    #: name as PEFT writes it -> [out, in]; null where no worker could tell
    modules: Mapped[dict[str, Any] | None]
    vocab_size: Mapped[int | None]
    #: one more than the highest token id
    tokenizer_size: Mapped[int | None]
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
    #: after a rollback: versions up to this one do not become current by themselves
    held_below: Mapped[int | None]
    #: removed: no job resolves to it, the jobs that it has finish
    retired_at: Mapped[datetime | None]

    __table_args__ = (UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_name"),)


class AdapterVersion(Base):
    """One immutable set of weights; `id` is vLLM's `lora_int_id`, unique for ever.

    While `validating`, one worker at a time probes it: `probe_worker` with `probe_attempt` is that
    worker's lease and fence, as `lease_owner` and `attempt` are a job's.
    """

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
    #: why it was rejected: a list of {code, message}
    findings: Mapped[dict[str, Any] | None]
    #: what the probe found: engine, load_seconds, memory_bytes, …
    probe: Mapped[dict[str, Any] | None]
    probe_worker: Mapped[int | None] = mapped_column(BigInteger)
    probe_attempt: Mapped[int] = mapped_column(server_default="0")
    #: engines that died while they probed it, workers that were lost
    probe_deaths: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    probe_losses: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    #: when it became ready or rejected
    validated_at: Mapped[datetime | None]
    retired_at: Mapped[datetime | None]
    #: its files are no longer kept
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("adapter_id", "version", name="uq_adapter_versions_adapter_version"),
        CheckConstraint("id > 0 AND version > 0 AND rank > 0", name="positive"),
        CheckConstraint("state IN ('validating', 'ready', 'rejected')", name="state"),
        CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name="sha256"),
        CheckConstraint("state <> 'rejected' OR findings IS NOT NULL", name="reasons"),
        Index(
            "ix_adapter_versions_validating",
            "adapter_id",
            postgresql_where=text("state = 'validating'"),
        ),
        Index("ix_adapter_versions_sha256", "sha256"),
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
