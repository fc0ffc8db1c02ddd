"""What the steward does to the tables: expire, find lines to ring, tidy up."""

from db.database import Database
from db.waiting import rebuild


async def expire_due(database: Database, limit: int = 1000) -> int:
    """Expire jobs whose deadline has passed, at most `limit`; returns how many.

    A running one keeps its lease owner: that is how its worker learns to abort it.
    """
    async with database.connection() as connection:
        status = await connection.execute(
            """
            UPDATE jobs SET state = 'expired', finished_at = now()
            WHERE id IN (
                SELECT id FROM jobs
                WHERE deadline <= now() AND deadline IS NOT NULL AND finished_at IS NULL
                ORDER BY deadline LIMIT $1
                FOR NO KEY UPDATE SKIP LOCKED)
              AND state IN ('queued', 'running')
            """,
            limit,
        )
    return int(status.split()[-1])


async def waiting_partitions(database: Database) -> list[tuple[str, int]]:
    """Every (base model, partition) with a line on the waiting list: what a sweep rings."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT DISTINCT b.name, w.partition
            FROM waiting_adapters w JOIN base_models b ON b.id = w.base_model_id
            """
        )
    return [(row["name"], row["partition"]) for row in rows]


async def rebuild_waiting(database: Database) -> int:
    """Put back lines with queued jobs that the waiting list lacks; returns how many."""
    async with database.transaction() as connection:
        return await rebuild(connection)
