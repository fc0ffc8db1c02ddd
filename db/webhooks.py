"""Endpoints that tenants want to be told at, and the secrets that deliveries are signed with."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg

from core.errors import InvalidRequest
from core.ids import new_id
from core.webhook_signing import MOST_SECRETS, ROTATION_SECONDS, new_secret
from db.database import Connection, Database
from db.deliveries import ENDPOINT_LINE

#: Endpoints of one tenant: every finishing job looks through them.
MOST_ENDPOINTS: Final = 100


async def create(
    database: Database, tenant_id: int, url: str, events: Sequence[str], description: str
) -> tuple[asyncpg.Record, bytes]:
    """Make an endpoint; returns its row and its secret, for the only time.

    Raises:
        InvalidRequest: the tenant has `MOST_ENDPOINTS` already.
    """
    endpoint_id, secret = new_id(), new_secret()
    async with database.transaction() as connection:
        row = await connection.fetchrow(
            """
            INSERT INTO webhook_endpoints (id, tenant_id, url, events, description)
            SELECT $1, $2, $3, $4::text[], $5
            WHERE (SELECT count(*) FROM webhook_endpoints WHERE tenant_id = $2) < $6
            RETURNING *
            """,
            endpoint_id,
            tenant_id,
            url,
            list(events),
            description,
            MOST_ENDPOINTS,
        )
        if row is None:
            raise InvalidRequest(f"there are {MOST_ENDPOINTS} webhooks already; delete some")
        await _insert_secret(connection, tenant_id, endpoint_id, secret)
    return row, secret


async def get(database: Database, tenant_id: int, endpoint_id: UUID) -> asyncpg.Record | None:
    """One endpoint of a tenant; None for another tenant's."""
    async with database.connection() as connection:
        return await connection.fetchrow(
            "SELECT * FROM webhook_endpoints WHERE tenant_id = $1 AND id = $2",
            tenant_id,
            endpoint_id,
        )


async def list_page(
    database: Database, tenant_id: int, after: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """A tenant's endpoints, newest first, from behind `after`."""
    async with database.connection() as connection:
        return await connection.fetch(
            """
            SELECT * FROM webhook_endpoints
            WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) ORDER BY id DESC LIMIT $3
            """,
            tenant_id,
            after,
            limit,
        )


async def update(
    database: Database, tenant_id: int, endpoint_id: UUID, changes: dict[str, Any]
) -> asyncpg.Record | None:
    """Change an endpoint: `url`, `events`, `description`, `disabled`; None leaves one as it is.

    Whatever is changed, its failures are forgotten: it is tried again at once.
    """
    async with database.transaction() as connection:
        row = await connection.fetchrow(
            """
            UPDATE webhook_endpoints SET
                url = coalesce($3, url), events = coalesce($4::text[], events),
                description = coalesce($5, description),
                disabled_at = CASE WHEN $6::bool THEN coalesce(disabled_at, now())
                                   WHEN NOT $6 THEN NULL ELSE disabled_at END,
                disabled_reason = CASE WHEN $6 THEN coalesce(disabled_reason, 'user')
                                       WHEN NOT $6 THEN NULL ELSE disabled_reason END
            WHERE tenant_id = $1 AND id = $2
            RETURNING *
            """,
            tenant_id,
            endpoint_id,
            changes.get("url"),
            changes.get("events"),
            changes.get("description"),
            changes.get("disabled"),
        )
        if row is not None:
            line = ENDPOINT_LINE.format(endpoint="$1::uuid")
            await connection.execute(
                f"DELETE FROM webhook_circuits WHERE line = {line}", endpoint_id
            )
    return row


async def delete(database: Database, tenant_id: int, endpoint_id: UUID) -> bool:
    """Delete an endpoint with its secrets; what it was owed fails. False where there is none."""
    deleted: bool | None = await database.fetch_value(
        "DELETE FROM webhook_endpoints WHERE tenant_id = $1 AND id = $2 RETURNING true",
        tenant_id,
        endpoint_id,
    )
    return bool(deleted)


# --- secrets --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SecretState:
    """A tenant's or an endpoint's current secret, and how many former ones still sign."""

    created_at: datetime
    shown_at: datetime | None
    former: int


async def ensure_default_secret(connection: Connection, tenant_id: int) -> bytes:
    """The tenant's current default secret, made if there is none."""
    await connection.execute(
        "INSERT INTO webhook_secrets (id, tenant_id, secret) VALUES ($1, $2, $3)"
        " ON CONFLICT DO NOTHING",
        new_id(),
        tenant_id,
        new_secret(),
    )
    secret: bytes = await connection.fetchval(
        "SELECT secret FROM webhook_secrets"
        " WHERE tenant_id = $1 AND endpoint_id IS NULL AND expires_at IS NULL",
        tenant_id,
    )
    return secret


async def reveal_default_secret(database: Database, tenant_id: int) -> bytes | None:
    """The tenant's default secret, made if there is none; None where it was shown before."""
    async with database.transaction() as connection:
        await ensure_default_secret(connection, tenant_id)
        secret: bytes | None = await connection.fetchval(
            """
            UPDATE webhook_secrets SET shown_at = now()
            WHERE tenant_id = $1 AND endpoint_id IS NULL AND expires_at IS NULL
              AND shown_at IS NULL
            RETURNING secret
            """,
            tenant_id,
        )
    return secret


async def rotate(database: Database, tenant_id: int, endpoint_id: UUID | None) -> bytes | None:
    """A new secret of an endpoint, or the tenant's default one, for the only time it is shown.

    The former ones go on signing beside it for a day, `MOST_SECRETS` in all.

    Returns:
        The secret; None where the tenant has no such endpoint.
    """
    secret = new_secret()
    async with database.transaction() as connection:
        # whoever rotates at the same time waits here
        known = await connection.fetchval(
            "SELECT true FROM tenants WHERE id = $1 FOR NO KEY UPDATE", tenant_id
        )
        if known and endpoint_id is not None:
            known = await connection.fetchval(
                "SELECT true FROM webhook_endpoints WHERE tenant_id = $1 AND id = $2",
                tenant_id,
                endpoint_id,
            )
        if not known:
            return None
        await connection.execute(
            """
            UPDATE webhook_secrets SET expires_at = now() + make_interval(secs => $3)
            WHERE tenant_id = $1 AND endpoint_id IS NOT DISTINCT FROM $2 AND expires_at IS NULL
            """,
            tenant_id,
            endpoint_id,
            ROTATION_SECONDS,
        )
        await connection.execute(
            """
            DELETE FROM webhook_secrets WHERE id IN (
                SELECT id FROM webhook_secrets
                WHERE tenant_id = $1 AND endpoint_id IS NOT DISTINCT FROM $2
                ORDER BY expires_at DESC OFFSET $3)
            """,
            tenant_id,
            endpoint_id,
            MOST_SECRETS - 1,
        )
        await _insert_secret(connection, tenant_id, endpoint_id, secret)
    return secret


async def secret_state(
    database: Database, tenant_id: int, endpoint_id: UUID | None
) -> SecretState | None:
    """What can be said of a secret without showing it; None where there is none."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            """
            SELECT created_at, shown_at,
                   (SELECT count(*)::int FROM webhook_secrets f
                    WHERE f.tenant_id = $1 AND f.endpoint_id IS NOT DISTINCT FROM $2
                      AND f.expires_at > now()) AS former
            FROM webhook_secrets
            WHERE tenant_id = $1 AND endpoint_id IS NOT DISTINCT FROM $2 AND expires_at IS NULL
            """,
            tenant_id,
            endpoint_id,
        )
    return None if row is None else SecretState(**dict(row))


async def _insert_secret(
    connection: Connection, tenant_id: int, endpoint_id: UUID | None, secret: bytes
) -> None:
    await connection.execute(
        """
        INSERT INTO webhook_secrets (id, tenant_id, endpoint_id, secret, shown_at)
        VALUES ($1, $2, $3, $4, now())
        """,
        new_id(),
        tenant_id,
        endpoint_id,
        secret,
    )
