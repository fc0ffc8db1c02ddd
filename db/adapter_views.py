"""Adapters and their versions as their owner sees them: state, where resident, what waits."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson

from db.adapter_life import no_adapter
from db.database import Connection, Database
from db.rates import LIVE_RATES
from db.registry import TAKES_ADAPTERS

#: Waiting jobs are counted up to this.
COUNT_CAP: Final = 1000


@dataclass(frozen=True, slots=True)
class VersionView:
    """One version of an adapter.

    Args:
        findings: why it was rejected, as {code, message}.
        probe: what the probe measured, or None.
        resident_on: ids of live workers that hold it in a slot.
        waiting_jobs: queued jobs, counted up to `COUNT_CAP`.
        worker_lives: whether a live worker of its base takes adapters.
        rank_fits: whether a live worker of its base takes its rank.
    """

    adapter_id: UUID
    name: str
    base_model: str
    version: int
    state: str
    is_current: bool
    sha256: str
    rank: int
    size_bytes: int
    created_at: datetime
    validated_at: datetime | None
    findings: list[dict[str, str]]
    probe: dict[str, Any] | None
    resident_on: list[int]
    waiting_jobs: int
    tokens_per_second: float
    worker_lives: bool
    rank_fits: bool


@dataclass(frozen=True, slots=True)
class AdapterView:
    """An adapter: the version that its name stands for (if any), and the newest."""

    id: UUID
    name: str
    base_model: str
    created_at: datetime
    current: VersionView | None
    newest: VersionView


async def list_adapters(
    database: Database, tenant_id: int, after: UUID | None, limit: int
) -> list[AdapterView]:
    """A tenant's adapters, newest first, from behind `after`."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT id FROM adapters
            WHERE tenant_id = $1 AND retired_at IS NULL AND ($2::uuid IS NULL OR id < $2)
            ORDER BY id DESC LIMIT $3
            """,
            tenant_id,
            after,
            limit,
        )
        return await _views(connection, tenant_id, [row["id"] for row in rows])


async def get_adapter(database: Database, tenant_id: int, name: str) -> AdapterView:
    """One adapter of a tenant. Raises NotFound."""
    async with database.connection() as connection:
        views = await _views(connection, tenant_id, [await _id_of(connection, tenant_id, name)])
    if not views:
        raise no_adapter(name)
    return views[0]


async def list_versions(
    database: Database, tenant_id: int, name: str, below: int | None, limit: int
) -> list[VersionView]:
    """An adapter's versions, newest first, from below a number. Raises NotFound."""
    async with database.connection() as connection:
        adapter_id = await _id_of(connection, tenant_id, name)
        rows = await connection.fetch(
            f"{_VERSIONS} AND ($3::int IS NULL OR v.version < $3) ORDER BY v.version DESC LIMIT $4",
            tenant_id,
            [adapter_id],
            below,
            limit,
        )
    return [_version(row) for row in rows]


async def get_version(database: Database, tenant_id: int, name: str, version: int) -> VersionView:
    """One version. Raises NotFound."""
    found = await list_versions(database, tenant_id, name, version + 1, 1)
    if not found or found[0].version != version:
        raise no_adapter(f"{name}@{version}")
    return found[0]


async def _id_of(connection: Connection, tenant_id: int, name: str) -> UUID:
    adapter_id: UUID | None = await connection.fetchval(
        "SELECT id FROM adapters WHERE tenant_id = $1 AND name = $2 AND retired_at IS NULL",
        tenant_id,
        name,
    )
    if adapter_id is None:
        raise no_adapter(name)
    return adapter_id


async def _views(connection: Connection, tenant_id: int, ids: list[UUID]) -> list[AdapterView]:
    rows = await connection.fetch(
        f"""
        {_VERSIONS} AND (v.version = a.current_version OR v.version = (
            SELECT max(version) FROM adapter_versions n
            WHERE n.adapter_id = a.id AND n.retired_at IS NULL))
        ORDER BY v.version
        """,
        tenant_id,
        ids,
    )
    versions: dict[UUID, list[VersionView]] = {}
    created: dict[UUID, datetime] = {}
    for row in rows:
        created[row["adapter_id"]] = row["adapter_created_at"]
        versions.setdefault(row["adapter_id"], []).append(_version(row))
    return [
        AdapterView(
            adapter_id,
            found[-1].name,
            found[-1].base_model,
            created[adapter_id],
            next((one for one in found if one.is_current), None),
            found[-1],
        )
        for adapter_id in ids
        if (found := versions.get(adapter_id))
    ]


_VERSIONS = f"""
SELECT a.id AS adapter_id, a.name, b.name AS base_model, a.created_at AS adapter_created_at,
       v.version, v.state, coalesce(v.version = a.current_version, false) AS is_current,
       v.sha256, v.rank, v.size_bytes, v.created_at, v.validated_at, v.findings, v.probe,
       ARRAY(SELECT w.id FROM workers w WHERE w.base_model_id = b.id AND {TAKES_ADAPTERS}
             AND v.id = ANY(w.resident) ORDER BY w.id) AS resident_on,
       (SELECT count(*)::int FROM (
            SELECT FROM jobs j
            WHERE j.base_model_id = a.base_model_id AND j.adapter_version_id = v.id
              AND j.tenant_id = a.tenant_id AND j.state = 'queued'
            LIMIT {COUNT_CAP}) waiting) AS waiting_jobs,
       (SELECT coalesce(sum(r.tokens_per_second), 0)::float8 FROM {LIVE_RATES}
        WHERE r.adapter_version_id = v.id) AS tokens_per_second,
       EXISTS (SELECT FROM workers w WHERE w.base_model_id = b.id AND {TAKES_ADAPTERS})
           AS worker_lives,
       EXISTS (SELECT FROM workers w WHERE w.base_model_id = b.id AND {TAKES_ADAPTERS}
               AND (w.limits->>'max_lora_rank')::int >= v.rank) AS rank_fits
FROM adapters a JOIN base_models b ON b.id = a.base_model_id
JOIN adapter_versions v ON v.adapter_id = a.id AND v.retired_at IS NULL
WHERE a.tenant_id = $1 AND a.id = ANY($2)
"""


def _version(row: asyncpg.Record) -> VersionView:
    fields = dict(row)
    del fields["adapter_created_at"]
    fields["findings"] = orjson.loads(row["findings"]) if row["findings"] else []
    fields["probe"] = row["probe"] and orjson.loads(row["probe"])
    return VersionView(**fields)
