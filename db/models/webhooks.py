"""Webhooks: endpoints and secrets, what is owed to whom, and how sending it went."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    SmallInteger,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import Text

from db.models.base import Base


class WebhookEndpoint(Base):
    """A URL that a tenant wants to be told of some events at."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"))
    url: Mapped[str]
    events: Mapped[list[str]] = mapped_column(ARRAY(Text))
    description: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]
    #: user, gone (it answered 410) or failing (nothing else for five days)
    disabled_reason: Mapped[str | None]

    __table_args__ = (
        CheckConstraint("cardinality(events) > 0", name="events"),
        CheckConstraint(
            "(disabled_at IS NULL AND disabled_reason IS NULL)"
            " OR (disabled_at IS NOT NULL AND disabled_reason IN ('user', 'gone', 'failing'))",
            name="disabled",
        ),
        Index("ix_webhook_endpoints_tenant", "tenant_id", "id"),
    )


class WebhookSecret(Base):
    """What deliveries are signed with: an endpoint's, or (without one) the tenant's default.

    It is kept as it is, since signing needs it. The current one never expires; a rotation lets the
    former ones expire.
    """

    __tablename__ = "webhook_secrets"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id"))
    endpoint_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("webhook_endpoints.id", ondelete="CASCADE")
    )
    secret: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    #: it is shown once
    shown_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]

    __table_args__ = (
        Index(
            "uq_webhook_secrets_current",
            "tenant_id",
            "endpoint_id",
            unique=True,
            postgresql_nulls_not_distinct=True,
            postgresql_where=text("expires_at IS NULL"),
        ),
        Index("ix_webhook_secrets_owner", "tenant_id", "endpoint_id"),
    )


class Delivery(Base):
    """One webhook owed to one URL, written in the transaction that it tells of.

    `attempt` is the fence of its senders, as a job's is of workers; while it is being sent,
    `due_at` is when the sender is given up. A delivery belongs to a `line`, those for one receiver:
    an endpoint, or a URL without its query. Lines wait for themselves alone.
    """

    __tablename__ = "deliveries"

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=text("uuidv7()"))
    tenant_id: Mapped[int]
    #: without one it goes to `url`, which a job, batch or schedule named
    endpoint_id: Mapped[UUID | None]
    url: Mapped[str | None]
    #: a hash of the endpoint, or of tenant and URL
    line: Mapped[int] = mapped_column(BigInteger)
    #: the same for every receiver and every repetition: the header webhook-id
    event_id: Mapped[UUID]
    type: Mapped[str]
    #: the outside id of what it tells of
    subject: Mapped[str]
    #: the state (a batch's status) that it tells
    told: Mapped[str]
    counts: Mapped[dict[str, Any] | None]
    #: where to read more, where the subject does not tell
    link: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    #: since when it is owed: its creation, or the latest replay
    owed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[str] = mapped_column(server_default="pending")
    due_at: Mapped[datetime | None] = mapped_column(server_default=func.now())
    attempt: Mapped[int] = mapped_column(server_default="0")
    #: since it is owed
    failures: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    finished_at: Mapped[datetime | None]
    #: of the latest attempt: HTTP's status, or why there is none
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]

    __table_args__ = (
        CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="state"),
        CheckConstraint(
            "(state = 'pending') = (due_at IS NOT NULL)"
            " AND (state = 'pending') = (finished_at IS NULL)",
            name="due",
        ),
        CheckConstraint("(endpoint_id IS NULL) = (url IS NOT NULL)", name="destination"),
        CheckConstraint("attempt >= 0 AND failures BETWEEN 0 AND attempt", name="attempts"),
        Index(
            "ix_deliveries_pending", "line", "due_at", postgresql_where=text("state = 'pending'")
        ),
        Index("ix_deliveries_tenant", "tenant_id", "id"),
        Index(
            "ix_deliveries_endpoint",
            "endpoint_id",
            "id",
            postgresql_where=text("endpoint_id IS NOT NULL"),
        ),
        # every delivery leaves dead entries at the head of its line
        {
            "postgresql_with": {
                "autovacuum_vacuum_scale_factor": "0.01",
                "autovacuum_vacuum_cost_delay": "0",
            }
        },
    )


class DeliveryAttempt(Base):
    """How one attempt to send went. One whose sender was lost has left none."""

    __tablename__ = "delivery_attempts"

    delivery_id: Mapped[UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[int]
    started_at: Mapped[datetime]
    seconds: Mapped[float] = mapped_column(Float)
    status: Mapped[int | None]
    error: Mapped[str | None]
    #: the first 2 kB of the response's body
    response: Mapped[str | None]


class WebhookCircuit(Base):
    """A line whose latest attempts failed. A success deletes the row."""

    __tablename__ = "webhook_circuits"

    line: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    #: in a row
    failures: Mapped[int]
    failing_since: Mapped[datetime] = mapped_column(server_default=func.now())
    failed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    #: nothing of the line is sent before
    blocked_until: Mapped[datetime | None]
