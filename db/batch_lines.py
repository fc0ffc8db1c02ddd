"""Lines of batches with what became of them, a page at a time."""

from typing import Final

import asyncpg

from db.database import Database

#: Lines read at once,
PAGE: Final = 500
#: and bytes of their answers, as Postgres stores them: answers may be long.
PAGE_BYTES: Final = 4_000_000

_COLUMNS = """
line, job_id, custom_id, state, own_deadline, error_code, error_message,
response::text AS response
"""
#: What precedes a line in its page is summed up, and an answer is unpacked only for a line shown.
_RESULT = """
l.line, l.job_id, l.custom_id, j.state, l.deadline IS NOT DISTINCT FROM j.deadline AS own_deadline,
coalesce(l.error_code, o.error_code) AS error_code,
coalesce(l.error_message, o.error_message) AS error_message, o.response,
sum(pg_column_size(o.response)) OVER (
    ORDER BY {order} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before_it
"""
_JOINED = """
LEFT JOIN jobs j ON j.id = l.job_id
LEFT JOIN job_outputs o ON o.tenant_id = $2 AND o.job_id = l.job_id
"""


async def in_order(
    database: Database, batch_id: int, tenant_id: int, after: int, limit: int = PAGE
) -> list[asyncpg.Record]:
    """Lines behind line `after`, in the file's order; none where none is left.

    The batch must have ended.
    """
    async with database.connection() as connection:
        return await connection.fetch(
            f"""
            SELECT {_COLUMNS} FROM (
                SELECT {_RESULT.format(order="l.line")} FROM (
                    SELECT * FROM batch_lines WHERE batch_id = $1 AND line > $3
                    ORDER BY line LIMIT $4) l
                {_JOINED}) page
            WHERE coalesce(before_it, 0) < $5 ORDER BY line
            """,
            batch_id,
            tenant_id,
            after,
            limit,
            PAGE_BYTES,
        )


async def as_finished(
    database: Database, batch_id: int, tenant_id: int, after: int, limit: int = PAGE
) -> list[asyncpg.Record]:
    """Finished lines in the order in which they were, behind the first `after` of them.

    The order never changes: a step is written under the lock of the batch's row.
    """
    async with database.connection() as connection:
        steps = await connection.fetch(
            """
            (SELECT position, lines FROM batch_steps WHERE batch_id = $1 AND position <= $2
             ORDER BY position DESC LIMIT 1)
            UNION ALL
            (SELECT position, lines FROM batch_steps
             WHERE batch_id = $1 AND position > $2 AND position < $2 + $3
             ORDER BY position)
            """,
            batch_id,
            after,
            limit,
        )
        numbers = [
            number for step in steps for number in step["lines"][max(0, after - step["position"]) :]
        ][:limit]
        return await connection.fetch(
            f"""
            SELECT {_COLUMNS} FROM (
                SELECT n.rank, {_RESULT.format(order="n.rank")}
                FROM unnest($3::int[]) WITH ORDINALITY AS n(line, rank)
                JOIN batch_lines l ON l.batch_id = $1 AND l.line = n.line
                {_JOINED}) page
            WHERE coalesce(before_it, 0) < $4 ORDER BY rank
            """,
            batch_id,
            tenant_id,
            numbers,
            PAGE_BYTES,
        )
