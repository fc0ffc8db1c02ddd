"""Files: their rows. The bytes lie in the blob store under `file_key`.

A row is there before the bytes and goes after them, so no object is ever without a row:
`writing` → `ready` → `deleted` → gone. Whoever writes says so every `TOUCH_SECONDS`; a writer that
was not heard of for `SILENT_SECONDS` has died, and its row is deleted like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg

from db.database import Connection, Database

TOUCH_SECONDS: Final = 60.0
SILENT_SECONDS: Final = 600.0
#: How long the row of a deleted file stays. Whatever a late writer brought goes with it.
GRAVE_SECONDS: Final = 600.0

_COLUMNS = "id, purpose, filename, state, size_bytes, newlines, created_at, expires_at"


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file about to be written."""

    id: UUID
    tenant_id: int
    purpose: str
    filename: str


@dataclass(frozen=True, slots=True)
class Written:
    """What became of the writing. `expires_seconds` is from creation; None is never."""

    size_bytes: int
    newlines: int
    filename: str
    expires_seconds: float | None


def file_key(file_id: UUID) -> str:
    """Where a file's bytes lie in the blob store."""
    return f"files/{file_id.hex}/content"


async def begin(database: Database, file: NewFile) -> None:
    """Enter a file before its first byte is written."""
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO files (id, tenant_id, purpose, filename) VALUES ($1, $2, $3, $4)",
            file.id,
            file.tenant_id,
            file.purpose,
            file.filename,
        )


async def touch(database: Database, file_ids: Sequence[UUID]) -> None:
    """Their writer lives."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE files SET touched_at = now() WHERE id = ANY($1) AND state = 'writing'", file_ids
        )


async def finish(connection: Connection, file_id: UUID, written: Written) -> asyncpg.Record | None:
    """All bytes are in the store: the file exists from now on.

    Returns:
        Its row; None where its writer was taken for dead, and the bytes are to be deleted.
    """
    return await connection.fetchrow(
        f"""
        UPDATE files SET state = 'ready', size_bytes = $2, newlines = $3, filename = $4,
                         expires_at = created_at + make_interval(secs => $5)
        WHERE id = $1 AND state = 'writing'
        RETURNING {_COLUMNS}
        """,
        file_id,
        written.size_bytes,
        written.newlines,
        written.filename,
        written.expires_seconds,
    )


async def get(database: Database, tenant_id: int, file_id: UUID) -> asyncpg.Record | None:
    """A tenant's file, unless it was deleted or has expired."""
    async with database.connection() as connection:
        return await connection.fetchrow(
            f"""
            SELECT {_COLUMNS} FROM files
            WHERE tenant_id = $1 AND id = $2 AND state = 'ready'
              AND (expires_at IS NULL OR expires_at > now())
            """,
            tenant_id,
            file_id,
        )


async def list_page(
    database: Database,
    tenant_id: int,
    *,
    purpose: str | None,
    after: UUID | None,
    newest_first: bool,
    limit: int,
) -> list[asyncpg.Record]:
    """A tenant's files from behind `after`, up to `limit` of them."""
    clauses = [
        "tenant_id = $1",
        "state = 'ready'",
        "(expires_at IS NULL OR expires_at > now())",
    ]
    arguments: list[object] = [tenant_id, limit]
    for clause, value in (
        ("purpose = ", purpose),
        ("id < " if newest_first else "id > ", after),
    ):
        if value is not None:
            arguments.append(value)
            clauses.append(f"{clause} ${len(arguments)}")
    order = "DESC" if newest_first else "ASC"
    async with database.connection() as connection:
        return await connection.fetch(
            f"SELECT {_COLUMNS} FROM files WHERE {' AND '.join(clauses)}"
            f" ORDER BY id {order} LIMIT $2",
            *arguments,
        )


async def delete(database: Database, tenant_id: int, file_id: UUID) -> bool:
    """Let a file exist no more; its bytes are to be deleted next. False where there was none."""
    deleted: bool | None = await database.fetch_value(
        """
        UPDATE files SET state = 'deleted', touched_at = now()
        WHERE tenant_id = $1 AND id = $2 AND state = 'ready'
        RETURNING true
        """,
        tenant_id,
        file_id,
    )
    return bool(deleted)


async def give_up(database: Database, file_ids: Sequence[UUID]) -> None:
    """Files that will not be written to their end; their bytes are to be deleted next."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE files SET state = 'deleted', touched_at = now()"
            " WHERE id = ANY($1) AND state = 'writing'",
            list(file_ids),
        )


async def take_expired(
    database: Database, silent_seconds: float = SILENT_SECONDS, limit: int = 100
) -> list[UUID]:
    """Delete the rows of expired files and of dead writers; their bytes are to be deleted next."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            WITH expired AS (
                SELECT id FROM files WHERE state = 'ready' AND expires_at <= now()
                ORDER BY expires_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
            ), silent AS (
                SELECT id FROM files WHERE state = 'writing'
                  AND state <> 'ready' AND touched_at < now() - make_interval(secs => $1)
                ORDER BY touched_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
            )
            UPDATE files SET state = 'deleted', touched_at = now()
            WHERE id IN (SELECT id FROM expired UNION ALL SELECT id FROM silent)
            RETURNING id
            """,
            silent_seconds,
            limit,
        )
    return [row["id"] for row in rows]


async def buried(
    database: Database, grave_seconds: float = GRAVE_SECONDS, limit: int = 100
) -> list[UUID]:
    """Files that were deleted some time ago: delete their bytes once more, then `forget` them."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT id FROM files
            WHERE state = 'deleted' AND state <> 'ready'
              AND touched_at < now() - make_interval(secs => $1)
            ORDER BY touched_at LIMIT $2
            """,
            grave_seconds,
            limit,
        )
    return [row["id"] for row in rows]


async def forget(database: Database, file_ids: Sequence[UUID]) -> None:
    """Drop the rows of deleted files whose bytes are gone."""
    async with database.connection() as connection:
        await connection.execute(
            "DELETE FROM files WHERE id = ANY($1) AND state = 'deleted'", list(file_ids)
        )
