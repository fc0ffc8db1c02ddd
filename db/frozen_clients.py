"""Ends Lorry's clients of Postgres that froze inside a statement, and with them their locks.

`idle_in_transaction_session_timeout` ends those that froze between two statements. But asyncpg asks
what a statement returns before it runs it (Parse, Describe, Flush), and only then sends its
arguments: a client that is stopped in between leaves a session that counts as active, waits for
the rest for ever, and keeps the locks of its transaction.
"""

from db.bulk import COPY_SECONDS
from db.database import IDLE_TRANSACTION_SECONDS, Database


async def end_frozen_clients(
    database: Database,
    seconds: float = IDLE_TRANSACTION_SECONDS,
    copy_seconds: float = COPY_SECONDS + IDLE_TRANSACTION_SECONDS,
) -> list[int]:
    """End the sessions in this database whose statement waits for its client and is so old.

    Sessions of other roles than our own are left alone: their statements cannot be seen.

    Args:
        seconds: the age of a statement.
        copy_seconds: that of a COPY, which waits for its client at many a moment of a sound life.

    Returns:
        The process ids of their servers.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(_END, seconds, copy_seconds)
    return [row["pid"] for row in rows]


# Chosen first, since nothing else fixes the order in which conditions are looked at.
_END = """
WITH frozen AS MATERIALIZED (
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user
      AND application_name = current_setting('application_name')
      AND state = 'active' AND wait_event_type = 'Client' AND wait_event = 'ClientRead'
      AND query_start < clock_timestamp() - make_interval(
              secs => CASE WHEN query ILIKE 'copy%' THEN $2::float8 ELSE $1 END)
)
SELECT pid FROM frozen WHERE pg_terminate_backend(pid)
"""
