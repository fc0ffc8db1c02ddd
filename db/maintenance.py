"""What the steward does to the tables: expire, find lines to ring, tidy up."""

from db.database import Database
from db.finishing import CONSEQUENCES, FINISHED, NO_TOKENS
from db.waiting import PARTITION_OF_LINE, drop_empty, rebuild


async def expire_due(database: Database, limit: int = 1000) -> int:
    """Expire jobs whose deadline has passed, at most `limit`; returns how many.

    A running one keeps its lease owner: that is how its worker learns to abort it.
    """
    expired: int = await database.fetch_value(_EXPIRE, limit)
    return expired


_EXPIRE = f"""
WITH finished AS (
    UPDATE jobs SET state = 'expired', finished_at = now()
    WHERE id IN (
        SELECT id FROM jobs
        WHERE deadline <= now() AND deadline IS NOT NULL AND finished_at IS NULL
        ORDER BY deadline LIMIT $1
        FOR NO KEY UPDATE SKIP LOCKED)
      AND state IN ('queued', 'running')
    RETURNING {FINISHED}, {NO_TOKENS}
){CONSEQUENCES}
SELECT count(*) FROM finished
"""


async def waiting_partitions(database: Database) -> list[tuple[str, int]]:
    """Every (base model, partition) with a line on the waiting list, or with suspects: what a
    sweep rings."""
    async with database.connection() as connection:
        rows = await connection.fetch(_WAITING_PARTITIONS)
    return [(row["name"], row["partition"]) for row in rows]


_WAITING_PARTITIONS = f"""
SELECT b.name, found.partition FROM (
    SELECT base_model_id, partition FROM waiting_adapters
    UNION
    SELECT base_model_id, {PARTITION_OF_LINE.format(version="s.adapter_version_id")} FROM (
        SELECT DISTINCT base_model_id, adapter_version_id FROM jobs
        WHERE suspect_group IS NOT NULL AND state = 'queued') s
) found JOIN base_models b ON b.id = found.base_model_id
"""


async def drop_empty_lines(database: Database) -> int:
    """Take lines without queued jobs off the waiting list; returns how many."""
    return await drop_empty(database)


async def rebuild_waiting(database: Database) -> int:
    """Put back lines with queued jobs that the waiting list lacks; returns how many."""
    async with database.transaction() as connection:
        return await rebuild(connection)
