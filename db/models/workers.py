"""Workers with their leases, and what each gets done."""

from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, REAL, BigInteger, ForeignKey, Identity, Integer, func
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base


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
    #: adapter versions in its slots, told every few seconds
    resident: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))

    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)


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
