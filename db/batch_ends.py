"""How a batch ends: failed in validation, cancelled in steps, or settled with its files.

What ends a batch otherwise is its last line (db/finishing.py): a steward settles it then.
"""

from typing import Final
from uuid import UUID

from core.ids import IdPrefix, format_id
from core.webhook_events import EventType
from db.batch_leases import Fenced, HeldBatch
from db.database import Connection, Database
from db.deliveries import owe
from db.finishing import CONSEQUENCES, FINISHED, NO_TOKENS

#: Lines of one step that cancels.
STEP: Final = 5000


async def fail(database: Database, batch: HeldBatch, errors: str) -> None:
    """`validating` → `failed`. `errors` is a JSON list. Raises Fenced."""
    async with database.transaction() as connection:
        failed = await connection.fetchval(
            """
            UPDATE batches SET status = 'failed', failed_at = now(), errors = $3::text::json,
                               lease_id = NULL, lease_expires_at = NULL
            WHERE id = $1 AND lease_id = $2 AND status = 'validating'
            RETURNING true
            """,
            batch.id,
            batch.lease_id,
            errors,
        )
        if not failed:
            raise Fenced("no longer held")
        await _tell(connection, batch, EventType.BATCH_FAILED)


async def cancel_step(database: Database, batch: HeldBatch, after: int) -> int | None:
    """Cancel what is unfinished among the next lines behind `after`.

    Returns:
        The last of these lines; None where there was none left.
    """
    last: int | None = await database.fetch_value(
        _CANCEL_STEP, batch.id, batch.lease_id, after, STEP
    )
    return last


# The rows are locked in the order of their ids, as the recorder locks them.
_CANCEL_STEP = f"""
WITH line AS MATERIALIZED (
    SELECT line, job_id FROM batch_lines
    WHERE batch_id = $1 AND line > $3
      AND EXISTS (SELECT FROM batches WHERE id = $1 AND lease_id = $2 AND status = 'cancelling')
    ORDER BY line LIMIT $4
), unfinished AS MATERIALIZED (
    SELECT id FROM jobs
    WHERE id = ANY(ARRAY(SELECT job_id FROM line)) AND state IN ('queued', 'running')
    ORDER BY id FOR NO KEY UPDATE
), finished AS (
    UPDATE jobs SET state = 'cancelled', finished_at = now()
    WHERE id = ANY(ARRAY(SELECT id FROM unfinished)) AND state IN ('queued', 'running')
    RETURNING {FINISHED}, {NO_TOKENS}
){CONSEQUENCES}
SELECT max(line) FROM line
"""


async def cancel_unread(database: Database, batch: HeldBatch) -> bool:
    """`cancelling` → `cancelled` for a batch that never had jobs; False where it has some."""
    async with database.transaction() as connection:
        cancelled: bool | None = await connection.fetchval(
            """
            UPDATE batches SET status = 'cancelled', cancelled_at = now(),
                               lease_id = NULL, lease_expires_at = NULL
            WHERE id = $1 AND lease_id = $2 AND status = 'cancelling' AND total = 0
            RETURNING true
            """,
            batch.id,
            batch.lease_id,
        )
        if cancelled:
            await _tell(connection, batch, EventType.BATCH_CANCELLED)
    return bool(cancelled)


async def settle(
    connection: Connection,
    batch: HeldBatch,
    status: str,
    output_file_id: UUID | None,
    error_file_id: UUID | None,
) -> None:
    """The batch's last step, to `completed`, `expired` or `cancelled`, with its files.

    Raises:
        Fenced: the batch is another steward's.
    """
    moved = await connection.fetchval(
        f"""
        UPDATE batches SET status = $3, {status}_at = now(), output_file_id = $4,
                           error_file_id = $5, lease_id = NULL, lease_expires_at = NULL
        WHERE id = $1 AND lease_id = $2 AND ended_at IS NOT NULL AND status = $6
        RETURNING true
        """,
        batch.id,
        batch.lease_id,
        status,
        output_file_id,
        error_file_id,
        batch.status,
    )
    if not moved:
        raise Fenced("no longer held")
    await _tell(connection, batch, EventType(f"batch.{status}"))


async def _tell(connection: Connection, batch: HeldBatch, event: EventType) -> None:
    """Owe the batch's end to whoever wants to know, in the transaction that ends it."""
    counts = {name: getattr(batch, name) for name in ("total", "completed", "failed")}
    subject = format_id(IdPrefix.BATCH, batch.public_id)
    status = event.partition(".")[2]
    await owe(connection, batch.tenant_id, event, subject, status, batch.webhook_url, counts)
