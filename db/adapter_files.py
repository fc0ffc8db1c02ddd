"""The files of adapter versions: kept as long as a version or a job needs them, then deleted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from db.adapter_life import QUEUED_OF_VERSION, RUNNING
from db.database import Connection, Database
from db.store import Store

#: Far above what a steward takes for the largest batch.
GRACE_SECONDS: Final = 3600.0
#: How long to wait for whoever stores or deletes the same files.
_LOCK_SECONDS: Final = 600.0


async def forget_files(
    database: Database, store: Store, grace_seconds: float = GRACE_SECONDS
) -> int:
    """Delete files that no version needs: of retired and rejected ones without unfinished jobs.

    A steward's duty. Each content is claimed by its lock, so any number may run.

    Args:
        grace_seconds: how long a version stays after its end, for jobs on their way to it: a
            batch's lines know their version while the rest of the file is still read.

    Returns:
        How many adapters' files were deleted.
    """
    deleted = 0
    async with database.connection() as connection:
        rows = await connection.fetch(_NEEDLESS, grace_seconds)
    for sha256 in sorted({row["sha256"] for row in rows}):
        async with content_lock(database, sha256) as connection:
            same = f"{_NEEDLESS} AND v.sha256 = $2"
            ids = [row["id"] for row in await connection.fetch(same, grace_seconds, sha256)]
            needed = await connection.fetchval(_NEEDED, sha256, ids)
            if ids and not needed:
                await asyncio.to_thread(store.delete, sha256)
                deleted += 1
            await connection.execute(
                "UPDATE adapter_versions SET deleted_at = now() WHERE id = ANY($1)", ids
            )
    return deleted


_NEEDLESS = f"""
SELECT v.id, v.sha256 FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
WHERE v.deleted_at IS NULL AND (v.retired_at IS NOT NULL OR v.state = 'rejected')
  AND coalesce(v.retired_at, v.validated_at) < now() - make_interval(secs => $1)
  AND NOT EXISTS ({QUEUED_OF_VERSION}) AND NOT EXISTS ({RUNNING} AND r.adapter_version_id = v.id)
"""

_NEEDED = """
SELECT EXISTS (SELECT FROM adapter_versions
               WHERE sha256 = $1 AND deleted_at IS NULL AND id <> ALL($2::int[]))
"""


@asynccontextmanager
async def content_lock(database: Database, sha256: str) -> AsyncIterator[Connection]:
    """Alone with the files of one content: they are not deleted while they are stored again.

    A lock of the session and not of a transaction, since none may be open during file I/O; it
    goes with its connection, which is given to the block: one that took a second would wait for
    ever where all of the pool's hold locks. Few at once, so that others find a connection.
    """
    async with database.long_uses, database.connection() as connection:
        try:
            await connection.execute(
                "SELECT pg_advisory_lock(hashtextextended($1, 5))", sha256, timeout=_LOCK_SECONDS
            )
            yield connection
        finally:  # also where the lock came when nobody waited for it any more
            await connection.execute("SELECT pg_advisory_unlock_all()")
