"""A tenant's adapters later on: rolled back, removed; when nothing needs a version any more."""

from typing import Final
from uuid import UUID

from core.errors import AdapterInUse, InvalidRequest, NotFound
from db.database import Connection, Database
from db.registry import reasons


async def rollback(database: Database, tenant_id: int, name: str, version: int) -> None:
    """Make another ready version the current one; jobs keep the version that they have.

    Versions that are still validating do not become current by themselves afterwards.

    Raises:
        NotFound: no such adapter or version.
        InvalidRequest: the version is not ready.
    """
    async with database.transaction() as connection:
        adapter_id = await _locked(connection, tenant_id, name)
        row = await connection.fetchrow(
            "SELECT state, findings FROM adapter_versions"
            " WHERE adapter_id = $1 AND version = $2 AND retired_at IS NULL",
            adapter_id,
            version,
        )
        if row is None:
            raise NotFound(
                f"adapter {name!r} has no version {version}; GET /v1/adapters/{name}/versions "
                "lists them",
                field="version",
            )
        if row["state"] != "ready":
            why = f" ({reasons(row['findings'])})" if row["findings"] else ""
            raise InvalidRequest(
                f"version {version} of {name!r} is {row['state']}{why}: only a ready one can "
                "become current",
                field="version",
            )
        await connection.execute(
            """
            UPDATE adapters SET current_version = $2, held_below = (
                SELECT max(version) FROM adapter_versions WHERE adapter_id = $1)
            WHERE id = $1
            """,
            adapter_id,
            version,
        )


async def remove(database: Database, tenant_id: int, name: str, *, drain: bool) -> int:
    """Retire an adapter: nothing resolves to it any more. Its files go once its jobs are done.

    Args:
        drain: let jobs that wait or run finish; otherwise they are a reason to refuse.

    Returns:
        How many jobs (counted up to 1,000) it still has.

    Raises:
        NotFound: no such adapter.
        AdapterInUse: a task routes to it, or it has jobs.
    """
    async with database.transaction() as connection:
        adapter_id = await _locked(connection, tenant_id, name)
        tasks = await connection.fetch(
            "SELECT name FROM tasks WHERE adapter_id = $1 ORDER BY name LIMIT 10", adapter_id
        )
        if tasks:
            names = ", ".join(f"task:{row['name']}" for row in tasks)
            raise AdapterInUse(f"adapter {name!r}: {names} routes to it; route it elsewhere first")
        jobs: int = await connection.fetchval(_UNFINISHED, adapter_id)
        if jobs and not drain:
            raise AdapterInUse(
                f"adapter {name!r} has {jobs} jobs that wait or run: let them finish with "
                "?drain=true (`--drain`), or cancel them first",
                jobs=jobs,
            )
        await connection.execute(
            "UPDATE adapters SET retired_at = now(), current_version = NULL, held_below = NULL"
            " WHERE id = $1",
            adapter_id,
        )
        await connection.execute(
            "UPDATE adapter_versions SET retired_at = now()"
            " WHERE adapter_id = $1 AND retired_at IS NULL",
            adapter_id,
        )
    return jobs


#: Queued jobs of `adapter_versions v`, an adapter `a`'s.
QUEUED_OF_VERSION: Final = """
    SELECT FROM jobs j
    WHERE j.base_model_id = a.base_model_id AND j.adapter_version_id = v.id
      AND j.tenant_id = v.tenant_id AND j.state = 'queued'
"""
#: Running jobs `r`: few (as many as engines hold), with an index by owner alone.
RUNNING: Final = "SELECT FROM jobs r WHERE r.lease_owner IS NOT NULL AND r.state = 'running'"

_UNFINISHED = f"""
SELECT count(*)::int FROM (
    SELECT FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
    CROSS JOIN LATERAL (
        ({QUEUED_OF_VERSION} LIMIT 1000)
        UNION ALL ({RUNNING} AND r.adapter_version_id = v.id)) unfinished
    WHERE a.id = $1
    LIMIT 1000) found
"""


async def _locked(connection: Connection, tenant_id: int, name: str) -> UUID:
    adapter_id: UUID | None = await connection.fetchval(
        "SELECT id FROM adapters WHERE tenant_id = $1 AND name = $2 AND retired_at IS NULL"
        " FOR NO KEY UPDATE",
        tenant_id,
        name,
    )
    if adapter_id is None:
        raise no_adapter(name)
    return adapter_id


def no_adapter(name: str) -> NotFound:
    """The error for an adapter that a tenant does not have."""
    return NotFound(
        f"adapter {name[:200]!r} does not exist; GET /v1/adapters lists those there are",
        field="name",
    )
