"""A tenant's adapters on their way in: judged, stored, entered as the next version of a name.

An adapter that was added is `validating` until a worker has probed it (db/admission.py).
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from core.adapter_rules import BaseFacts, Finding, check, hints
from core.errors import AdapterInvalid, AdapterRejected, InvalidRequest
from core.ids import new_id
from core.partitions import partition_of
from db.adapter_bases import base_of, other_base
from db.adapter_files import content_lock
from db.adapter_package import Package
from db.database import Connection, Database
from db.registry import base_facts, check_name
from db.store import Store, StoredAdapter, address


@dataclass(frozen=True, slots=True)
class Added:
    """A version that stands under an adapter's name.

    Args:
        created: False where the same files were there already.
        hints: what its owner may want to know; it stops nothing.
    """

    adapter_id: UUID
    name: str
    version: int
    base_model: str
    partition: int
    created: bool
    hints: tuple[Finding, ...] = ()

    @property
    def model(self) -> str:
        """What pins a job to it, such as `sql@1`."""
        return f"{self.name}@{self.version}"


async def judge(
    database: Database, tenant_id: int, name: str | None, base_model: str | None, package: Package
) -> tuple[BaseFacts, tuple[Finding, ...]]:
    """Apply every rule that needs no worker; returns the base it is for, and hints.

    Args:
        name: under which it is to be added; None where that is not known.

    Raises:
        AdapterRejected: with everything that is wrong.
        InvalidRequest: the base model is unknown, or cannot be told; the name cannot be used.
    """
    async with database.connection() as connection:
        if name is not None:
            await _refuse_base_name(connection, check_name("adapter", name))
        base = await base_of(connection, tenant_id, name, base_model, package.config)
        facts = await base_facts(connection, base.id)
    # apart from the loop: an adapter may have tens of thousands of tensors, and as many patterns
    if findings := await asyncio.to_thread(check, package.config, package.tensors, facts):
        raise AdapterRejected(findings)
    return facts, tuple(hints(package.config, facts))


async def add(
    database: Database,
    store: Store,
    *,
    tenant_id: int,
    name: str,
    base_model: str | None,
    package: Package,
    partitions: int,
) -> Added:
    """Judge an adapter, store its files, and enter it as the next version under its name.

    The same files under the same name are the version that is there already; a rejected one is
    validated once more, since workers may have changed.

    Args:
        base_model: None where the name, the adapter's configuration or the lack of others tells.

    Raises:
        AdapterRejected: it breaks a rule; nothing was stored.
        InvalidRequest: the name cannot be used, or the base is unknown or another.
    """
    facts, found = await judge(database, tenant_id, name, base_model, package)
    sha256 = (await asyncio.to_thread(address, package.folder)).sha256
    # the deletion of these very files, wanted by no version any more, waits for its turn
    async with content_lock(database, sha256) as connection:
        stored = await asyncio.to_thread(store.put, package.folder)
        async with connection.transaction():
            await _refuse_base_name(connection, name)
            adapter = await _upsert_adapter(connection, tenant_id, facts.name, name, partitions)
            version, created = await _upsert_version(
                connection, adapter.id, tenant_id, stored, package.config.highest_rank
            )
    return Added(adapter.id, name, version, facts.name, adapter.partition, created, found)


async def register_ready(
    database: Database,
    store: Store,
    *,
    tenant: str,
    base_model: str,
    name: str,
    folder: Path,
    rank: int = 8,
    partitions: int = 32,
) -> str:
    """Enter a folder as a ready, current version without any check.

    For benchmarks and tests, whose adapters are made on the spot; users' come by `add`.

    Returns:
        The pinned name, such as `sql@1`.

    Raises:
        AdapterInvalid: the folder lacks a file.
        InvalidRequest: the tenant, the name or the base cannot be used.
    """
    check_name("adapter", name)
    stored = await asyncio.to_thread(store.put, folder)
    async with database.transaction() as connection:
        tenant_id = await connection.fetchval("SELECT id FROM tenants WHERE name = $1", tenant)
        if tenant_id is None:
            raise InvalidRequest(f"tenant {tenant!r} does not exist: make it with `lorry keys`")
        await _refuse_base_name(connection, name)
        adapter = await _upsert_adapter(connection, tenant_id, base_model, name, partitions)
        version, _ = await _upsert_version(connection, adapter.id, tenant_id, stored, rank)
        await connection.execute(
            "UPDATE adapter_versions SET state = 'ready' WHERE adapter_id = $1 AND version = $2",
            adapter.id,
            version,
        )
        await connection.execute(
            "UPDATE adapters SET current_version = $2 WHERE id = $1", adapter.id, version
        )
    return f"{name}@{version}"


@dataclass(frozen=True, slots=True)
class _Adapter:
    id: UUID
    partition: int


async def _upsert_adapter(
    connection: Connection, tenant_id: int, base_model: str, name: str, partitions: int
) -> _Adapter:
    """The adapter, its row locked, so that two registrations number their versions apart."""
    adapter_id = new_id()
    row = await connection.fetchrow(
        """
        INSERT INTO adapters (id, tenant_id, base_model_id, name, partition)
        SELECT $1, $2, id, $4, $5 FROM base_models WHERE name = $3
        ON CONFLICT (tenant_id, name) DO UPDATE SET name = excluded.name
        RETURNING id, base_model_id, partition, retired_at,
                  (SELECT name FROM base_models WHERE id = adapters.base_model_id) AS base_model
        """,
        adapter_id,
        tenant_id,
        base_model,
        name,
        partition_of(str(adapter_id), partitions),
    )
    if row is None:
        raise InvalidRequest(f"base_model {base_model!r} is not known", field="base_model")
    if row["base_model"] != base_model:
        raise other_base(name, row["base_model"])
    if row["retired_at"] is not None:
        await connection.execute("UPDATE adapters SET retired_at = NULL WHERE id = $1", row["id"])
    return _Adapter(row["id"], row["partition"])


async def _upsert_version(
    connection: Connection, adapter_id: UUID, tenant_id: int, stored: StoredAdapter, rank: int
) -> tuple[int, bool]:
    """The version with this content, and whether it is new."""
    row = await connection.fetchrow(
        """
        UPDATE adapter_versions SET
            state = 'validating', findings = NULL, validated_at = NULL, deleted_at = NULL,
            probe_worker = NULL, probe_deaths = 0, probe_losses = 0
        WHERE adapter_id = $1 AND sha256 = $2 AND retired_at IS NULL AND state = 'rejected'
        RETURNING version
        """,
        adapter_id,
        stored.sha256,
    ) or await connection.fetchrow(
        "SELECT version FROM adapter_versions"
        " WHERE adapter_id = $1 AND sha256 = $2 AND retired_at IS NULL",
        adapter_id,
        stored.sha256,
    )
    if row is not None:
        return row["version"], False
    version: int = await connection.fetchval(
        """
        INSERT INTO adapter_versions
            (adapter_id, tenant_id, version, sha256, rank, size_bytes, state)
        SELECT $1, $2, 1 + coalesce(max(version), 0), $3, $4, $5, 'validating'
        FROM adapter_versions WHERE adapter_id = $1
        RETURNING version
        """,
        adapter_id,
        tenant_id,
        stored.sha256,
        rank,
        stored.size_bytes,
    )
    return version, True


async def _refuse_base_name(connection: Connection, name: str) -> None:
    if await connection.fetchval("SELECT true FROM base_models WHERE name = $1", name):
        raise AdapterInvalid(f"adapter name {name!r} is taken by a base model", field="name")
