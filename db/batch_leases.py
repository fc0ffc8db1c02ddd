"""Who carries a batch on: a lease on its row, fresh for every claim.

Every write of a steward's names its lease and the status that it leaves, so a steward that was
taken for dead writes nothing more. Each step can be cut off anywhere: the next steward finds the
status, and does the step again.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from core.errors import LorryError
from core.ids import new_id
from db.database import Database


class Fenced(LorryError):
    """The batch is carried on by another steward, or was cancelled."""


@dataclass(frozen=True, slots=True)
class HeldBatch:
    """A batch that this steward carries on, until the lease runs out."""

    id: int
    lease_id: UUID
    public_id: UUID
    tenant_id: int
    status: str
    endpoint: str
    skip_invalid: bool
    input_file_id: UUID
    default_model: str | None
    default_priority: int | None
    output_expires_seconds: int | None
    total: int
    completed: int
    failed: int
    expired: int
    created_at: datetime
    expires_at: datetime
    webhook_url: str | None


async def claim(database: Database, what: str, lease_seconds: float) -> HeldBatch | None:
    """Take a batch that waits for a step and that no living steward holds.

    Args:
        what: one of the constants below.
    """
    async with database.connection() as connection:
        row = await connection.fetchrow(_CLAIM.format(what=what), new_id(), lease_seconds)
    return None if row is None else HeldBatch(**dict(row))


VALIDATE: Final = "status = 'validating' ORDER BY b.id"
#: The smallest file first, so that small batches do not wait behind a huge one.
VALIDATE_SMALL: Final = (
    "status = 'validating' ORDER BY (SELECT size_bytes FROM files WHERE id = input_file_id), b.id"
)
CANCEL: Final = "status = 'cancelling' AND ended_at IS NULL ORDER BY b.id"
SETTLE: Final = "status <> 'validating' AND ended_at IS NOT NULL ORDER BY ended_at"
SETTLE_SMALL: Final = "status <> 'validating' AND ended_at IS NOT NULL ORDER BY total, id"

_CLAIM = """
UPDATE batches SET lease_id = $1, lease_expires_at = now() + make_interval(secs => $2)
WHERE id = (
    SELECT id FROM batches b
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
      AND (lease_expires_at IS NULL OR lease_expires_at < now())
      AND {what} LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING id, lease_id, public_id, tenant_id, status, endpoint, skip_invalid, input_file_id,
          default_model, default_priority, output_expires_seconds, total, completed, failed,
          expired, created_at, expires_at, webhook_url
"""


async def renew(database: Database, batch: HeldBatch, lease_seconds: float) -> bool:
    """Hold on to a batch; False where another steward has it."""
    renewed: bool | None = await database.fetch_value(
        """
        UPDATE batches SET lease_expires_at = now() + make_interval(secs => $3)
        WHERE id = $1 AND lease_id = $2 RETURNING true
        """,
        batch.id,
        batch.lease_id,
        lease_seconds,
    )
    return bool(renewed)


async def release(database: Database, batch: HeldBatch) -> None:
    """Let go of a batch, for whoever takes it next."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE batches SET lease_id = NULL, lease_expires_at = NULL"
            " WHERE id = $1 AND lease_id = $2",
            batch.id,
            batch.lease_id,
        )
