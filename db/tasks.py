"""Tasks: a tenant's aliases (`task:<name>`) for an adapter, one version of it, or a base model."""

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from core.errors import InvalidRequest, NotFound
from db.database import Database
from db.registry import TASK_PREFIX, check_name, resolve, split_version


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task. `model` is what it routes to: a base, an adapter, or `name@3`."""

    name: str
    model: str
    base_model: str
    adapter: str | None
    version: int | None
    created_at: datetime


async def put_task(database: Database, tenant_id: int, name: str, model: str) -> TaskRow:
    """Route a task; jobs that were submitted before keep what they were routed to.

    Raises:
        InvalidRequest: the name cannot be used, or `model` is a task itself.
        ModelNotFound: there is no such model, or no version of it can be used.
    """
    check_name("task", name)
    if model.startswith(TASK_PREFIX):
        raise InvalidRequest(
            f"model {model[:200]!r} is a task: route to a base model or an adapter", field="model"
        )
    async with database.transaction() as connection:
        target = await resolve(connection, tenant_id, model)
        pinned = split_version(model)[1] if target.adapter else None
        row = await connection.fetchrow(
            """
            INSERT INTO tasks (tenant_id, name, base_model_id, adapter_id, version)
            SELECT $1, $2, $3, (SELECT id FROM adapters WHERE tenant_id = $1 AND name = $4), $5
            ON CONFLICT (tenant_id, name) DO UPDATE SET
                base_model_id = excluded.base_model_id, adapter_id = excluded.adapter_id,
                version = excluded.version
            RETURNING created_at
            """,
            tenant_id,
            name,
            target.base_model_id,
            target.adapter,
            pinned,
        )
    assert row is not None
    return TaskRow(name, model, target.base_model, target.adapter, pinned, row["created_at"])


async def get_task(database: Database, tenant_id: int, name: str) -> TaskRow:
    """One task of a tenant. Raises NotFound."""
    async with database.connection() as connection:
        row = await connection.fetchrow(f"{_SELECT} AND t.name = $2", tenant_id, name)
    if row is None:
        raise _no_task(name)
    return _task(row)


async def list_tasks(
    database: Database, tenant_id: int, after: str | None, limit: int
) -> list[TaskRow]:
    """A tenant's tasks by name, from behind `after`."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            f"{_SELECT} AND ($2::text IS NULL OR t.name > $2) ORDER BY t.name LIMIT $3",
            tenant_id,
            after,
            limit,
        )
    return [_task(row) for row in rows]


async def delete_task(database: Database, tenant_id: int, name: str) -> None:
    """Remove a task; its jobs run on. Raises NotFound."""
    removed = await database.fetch_value(
        "DELETE FROM tasks WHERE tenant_id = $1 AND name = $2 RETURNING true", tenant_id, name
    )
    if not removed:
        raise _no_task(name)


_SELECT = """
SELECT t.name, b.name AS base_model, a.name AS adapter, t.version, t.created_at
FROM tasks t JOIN base_models b ON b.id = t.base_model_id
LEFT JOIN adapters a ON a.id = t.adapter_id
WHERE t.tenant_id = $1
"""


def _task(row: asyncpg.Record) -> TaskRow:
    pin = f"@{row['version']}" if row["version"] else ""
    return TaskRow(model=f"{row['adapter'] or row['base_model']}{pin}", **dict(row))


def _no_task(name: str) -> NotFound:
    return NotFound(
        f"task {name[:200]!r} does not exist; GET /v1/tasks lists those there are", field="name"
    )
