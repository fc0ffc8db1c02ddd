"""The waiting list: which adapters have queued jobs, kept so that no look scans `jobs`.

A row must stand wherever a queued job stands that is no suspect (those stand in groups of their
own, db/suspects.py). Whoever queues a job inserts the row *or* holds the
row that is there by a key-share lock until commit; whoever deletes a row takes it exclusively
first and re-checks in a new statement. So a deletion never misses a job that is being queued.
"""

from collections.abc import Collection
from typing import NamedTuple

from core.partitions import BASE_PARTITION
from db.database import Connection, Database


class Line(NamedTuple):
    """The queued jobs of one adapter version (0: the base model) and one tenant."""

    base_model_id: int
    adapter_version_id: int
    tenant_id: int


async def ensure_waiting(connection: Connection, lines: Collection[Line]) -> None:
    """Make sure that every line is on the waiting list, now and until this transaction commits.

    Sorted, so that two callers with the same lines never wait for each other in a circle.
    """
    for line in sorted(lines):
        while not await connection.fetchval(_HOLD_OR_INSERT, *line):
            pass  # the row was deleted or inserted between the two halves: look again


#: What partition a line belongs to: its adapter's, or the base model's own bucket.
PARTITION_OF_LINE = f"""
    coalesce(
        (SELECT a.partition FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
         WHERE v.id = {{version}}),
        {BASE_PARTITION}
    )
"""

_HOLD_OR_INSERT = f"""
WITH held AS (
    SELECT FROM waiting_adapters
    WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
    FOR KEY SHARE
), inserted AS (
    INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)
    SELECT $1, $2, $3, {PARTITION_OF_LINE.format(version="$2")}
    WHERE NOT EXISTS (SELECT FROM held)
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT EXISTS (SELECT FROM held) OR EXISTS (SELECT FROM inserted)
"""


async def drop_if_empty(connection: Connection, line: Line) -> bool:
    """Take a line off the waiting list if no job of it is queued. Needs a transaction.

    Returns:
        Whether it is off. False where it has jobs again, or someone is queueing one.
    """
    held = await connection.fetchval(
        """
        SELECT true FROM waiting_adapters
        WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
        FOR UPDATE SKIP LOCKED
        """,
        *line,
    )
    if not held:
        return False
    # a statement of its own: its snapshot sees every job queued before the lock was had
    deleted = await connection.fetchval(
        """
        DELETE FROM waiting_adapters
        WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
          AND NOT EXISTS (
              SELECT FROM jobs
              WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
                AND state = 'queued' AND suspect_group IS NULL)
        RETURNING true
        """,
        *line,
    )
    return bool(deleted)


async def drop_empty(database: Database, limit: int = 5_000) -> int:
    """Take lines off the list whose jobs were all cancelled or expired; returns how many.

    Workers do it for the lines that they look at. This is for those that nobody serves.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(_EMPTY, limit)
    dropped = 0
    for row in rows:
        async with database.transaction() as connection:
            dropped += await drop_if_empty(connection, Line(*row.values()))
    return dropped


# A subquery for its value stays a probe for each line; EXISTS could become a join with every job.
_EMPTY = """
SELECT base_model_id, adapter_version_id, tenant_id FROM (
    SELECT * FROM waiting_adapters ORDER BY since LIMIT $1) w
WHERE (SELECT true FROM jobs j
       WHERE j.base_model_id = w.base_model_id AND j.adapter_version_id = w.adapter_version_id
         AND j.tenant_id = w.tenant_id AND j.state = 'queued' AND j.suspect_group IS NULL
       ORDER BY j.place LIMIT 1) IS NULL
"""


async def mark_drained(connection: Connection, line: Line) -> None:
    """The line has just had its turn: it goes to the back of the waiting list.

    Where someone holds its row it keeps its place: a worker waits for nobody to end a turn.
    """
    await connection.execute(
        """
        UPDATE waiting_adapters SET since = clock_timestamp()
        WHERE ctid = (
            SELECT ctid FROM waiting_adapters
            WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
            FOR NO KEY UPDATE SKIP LOCKED)
        """,
        *line,
    )


async def rebuild(connection: Connection) -> int:
    """Put back every line that has queued jobs and no row: the sweep's safety net.

    Walks `ix_jobs_waiting` from line to line (a loose index scan), never over every job.

    Returns:
        How many lines were put back.
    """
    missing = await connection.fetch(
        """
        WITH RECURSIVE line AS (
            (SELECT base_model_id, adapter_version_id, tenant_id FROM jobs
             WHERE state = 'queued' AND suspect_group IS NULL
             ORDER BY base_model_id, adapter_version_id, tenant_id LIMIT 1)
            UNION ALL
            SELECT next.* FROM line CROSS JOIN LATERAL (
                SELECT base_model_id, adapter_version_id, tenant_id FROM jobs
                WHERE state = 'queued' AND suspect_group IS NULL
                  AND (base_model_id, adapter_version_id, tenant_id)
                    > (line.base_model_id, line.adapter_version_id, line.tenant_id)
                ORDER BY base_model_id, adapter_version_id, tenant_id LIMIT 1) next
        )
        SELECT line.* FROM line LEFT JOIN waiting_adapters w
            USING (base_model_id, adapter_version_id, tenant_id)
        WHERE w.since IS NULL
        """
    )
    await ensure_waiting(connection, [Line(*row.values()) for row in missing])
    return len(missing)
