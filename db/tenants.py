"""Tenants and their API keys. A key is shown once and kept as a hash."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime

from core.errors import InvalidRequest
from core.ids import IdPrefix, format_id, new_id
from db.database import Database

#: The tenant of requests without a key, made by the first migration.
DEFAULT_TENANT_ID = 1

_KEY_PREFIX = "lorry_"
_SHOWN_CHARACTERS = len(_KEY_PREFIX) + 6


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key as it is listed; the key itself is nowhere."""

    id: str
    tenant: str
    name: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None


async def create_key(database: Database, tenant: str, name: str = "") -> str:
    """Make a key for a tenant (made too if it is new) and return its text, for the only time.

    Raises:
        InvalidRequest: the tenant's name is empty or holds a control character.
    """
    if not tenant.strip() or not tenant.isprintable():
        raise InvalidRequest(f"tenant {tenant!r}: give a name of printable characters")
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    async with database.transaction() as connection:
        tenant_id = await connection.fetchval(
            """
            INSERT INTO tenants (name) VALUES ($1)
            ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING id
            """,
            tenant,
        )
        await connection.execute(
            """
            INSERT INTO api_keys (id, tenant_id, name, prefix, key_hash)
            VALUES ($1, $2, $3, $4, $5)
            """,
            new_id(),
            tenant_id,
            name,
            key[:_SHOWN_CHARACTERS],
            hash_key(key),
        )
    return key


async def tenant_of_key(database: Database, key: str) -> int | None:
    """The tenant that a live key belongs to, or None for a wrong or revoked one."""
    tenant_id: int | None = await database.fetch_value(
        "SELECT tenant_id FROM api_keys WHERE key_hash = $1 AND revoked_at IS NULL",
        hash_key(key),
    )
    return tenant_id


async def list_keys(database: Database) -> list[KeyRow]:
    """Every key, newest first."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT k.id, t.name AS tenant, k.name, k.prefix, k.created_at, k.revoked_at
            FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
            ORDER BY k.id DESC
            """
        )
    return [
        KeyRow(
            id=format_id(IdPrefix.KEY, row["id"]),
            tenant=row["tenant"],
            name=row["name"],
            prefix=row["prefix"],
            created_at=row["created_at"],
            revoked_at=row["revoked_at"],
        )
        for row in rows
    ]


async def revoke_key(database: Database, key_id_or_prefix: str) -> bool:
    """Revoke a key by its id (`key_…`) or by the prefix that `list` shows.

    Returns:
        Whether a live key was found.

    Raises:
        InvalidRequest: the prefix fits several live keys; nothing was revoked.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(
            """
            UPDATE api_keys SET revoked_at = now()
            WHERE revoked_at IS NULL AND ('key_' || replace(id::text, '-', '') = $1 OR prefix = $1)
            RETURNING id
            """,
            key_id_or_prefix,
        )
        if len(rows) > 1:  # raising rolls the update back
            ids = ", ".join(format_id(IdPrefix.KEY, row["id"]) for row in rows)
            raise InvalidRequest(
                f"prefix {key_id_or_prefix!r} fits several keys: give one of {ids}"
            )
    return len(rows) == 1


def hash_key(key: str) -> bytes:
    """SHA-256: enough for a key of 256 random bits, which no dictionary holds."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
