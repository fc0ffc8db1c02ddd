"""Creating a batch from an input file, for whoever makes one: the API, a schedule.

Only the row is written here. A steward reads the file, and does all that follows.
"""

from typing import Final
from uuid import UUID

import asyncpg

from core.batch_request import BatchRequest
from core.errors import IdempotencyConflict, InvalidRequest, NotFound
from core.ids import IdPrefix, format_id, new_id
from db import batches
from db.database import Connection, Database
from db.jobs import IdempotencyUse, find_idempotent

#: The scope of an idempotency key, with its tenant: the same for whoever makes a batch.
ROUTE: Final = "POST /v1/batches"


async def create(
    database: Database, tenant_id: int, request: BatchRequest, use: IdempotencyUse | None = None
) -> tuple[asyncpg.Record, bool]:
    """Make a batch, or find the one that this key made before; when it returns, it is committed.

    Returns:
        The batch's row, as `db.batches.get` reads it, and whether it was there before.

    Raises:
        NotFound: there is no such file, or the batch of the key is no longer kept.
        InvalidRequest: the file is not one for batches.
        IdempotencyConflict: the key was used with another body.
        Unavailable: Postgres cannot be reached. With a key it is safe to ask again.
    """
    while True:
        if use is not None and (earlier := await _earlier(database, tenant_id, use)) is not None:
            return earlier, True
        public_id = new_id()
        async with database.transaction() as connection:
            made = use is None or await take_key(connection, tenant_id, use, public_id)
            if made:
                await create_in(connection, tenant_id, request, public_id)
        if made:
            break  # otherwise another request took the key meanwhile: look again
    row = await batches.get(database, tenant_id, public_id)
    assert row is not None
    return row, False


async def create_in(
    connection: Connection, tenant_id: int, request: BatchRequest, public_id: UUID | None = None
) -> UUID:
    """Make a batch in a transaction of the caller's, who may write more in it; returns its id.

    The file is checked in the same statement, and may be deleted later: validation finds that.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: the file is not one for batches.
    """
    public_id = public_id or new_id()
    purpose = await connection.fetchval(
        _CREATE,
        public_id,
        tenant_id,
        request.input_file_id,
        request.endpoint,
        request.completion_window,
        float(request.window_seconds),
        request.skip_invalid,
        request.output_expires_seconds,
        request.metadata_json(),
        request.default_model,
        request.default_priority,
        request.webhook_url,
    )
    if purpose is None:
        raise NotFound(
            f"input_file_id {request.input_file!r} does not exist, or has expired; upload it with "
            "POST /v1/files",
            field="input_file_id",
        )
    if purpose != "batch":
        raise InvalidRequest(
            f"input_file_id {request.input_file!r} has the purpose {purpose!r}; give a "
            "file that was uploaded with purpose 'batch'",
            field="input_file_id",
        )
    return public_id


# Selects the file's purpose whatever it is, and makes a batch of it where that is the right one.
_CREATE = """
WITH file AS (
    SELECT id, purpose FROM files
    WHERE tenant_id = $2 AND id = $3 AND state = 'ready'
      AND (expires_at IS NULL OR expires_at > now())
), batch AS (
    INSERT INTO batches (public_id, tenant_id, input_file_id, endpoint, completion_window,
                         expires_at, skip_invalid, output_expires_seconds, metadata,
                         default_model, default_priority, webhook_url)
    SELECT $1, $2, id, $4, $5, now() + make_interval(secs => $6), $7, $8, $9::text::json, $10,
           $11, $12
    FROM file WHERE purpose = 'batch'
)
SELECT purpose FROM file
"""


async def take_key(
    connection: Connection, tenant_id: int, use: IdempotencyUse, public_id: UUID
) -> bool:
    """Use a key for a batch about to be made; False where it was used before."""
    taken: bool | None = await connection.fetchval(
        """
        INSERT INTO idempotency_keys (tenant_id, route, key, fingerprint, resource_id)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT DO NOTHING
        RETURNING true
        """,
        tenant_id,
        use.route,
        use.key,
        use.fingerprint,
        public_id,
    )
    return bool(taken)


async def _earlier(
    database: Database, tenant_id: int, use: IdempotencyUse
) -> asyncpg.Record | None:
    """The batch that a key made before, or None for a fresh key."""
    record = await find_idempotent(database, tenant_id, use.route, use.key)
    if record is None:
        return None
    if record.fingerprint != use.fingerprint:
        raise IdempotencyConflict(
            f"Idempotency-Key {use.key!r} was used with another body; send the same body again, "
            "or a new key",
            field="Idempotency-Key",
        )
    row = await batches.get(database, tenant_id, record.job_id)
    if row is None:
        raise NotFound(
            f"batch {format_id(IdPrefix.BATCH, record.job_id)}, made under this Idempotency-Key, "
            "is no longer kept; send a new key"
        )
    return row
