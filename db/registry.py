"""Base models, adapters and their versions, tasks: what `model` in a request can name."""

import asyncio
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from core.errors import AdapterInvalid, InvalidRequest, ModelNotFound
from core.ids import new_id
from core.partitions import BASE_PARTITION, partition_of
from db.database import Connection, Database
from db.models import BASE_VERSION_ID
from db.store import Store
from db.waiting import Line

TASK_PREFIX = "task:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's `model` stands for, fixed when the job is submitted.

    Args:
        adapter_version_id: the version's id, or 0 for the base model itself.
        max_model_len: the base's context in tokens.
    """

    base_model_id: int
    base_model: str
    max_model_len: int
    adapter_version_id: int
    adapter: str | None
    version: int | None
    partition: int

    def line(self, tenant_id: int) -> Line:
        """The line that a tenant's jobs for this target stand in."""
        return Line(self.base_model_id, self.adapter_version_id, tenant_id)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One entry of `GET /v1/models`."""

    name: str
    kind: str
    base_model: str
    version: int | None
    created_at: int


async def resolve(connection: Connection, tenant_id: int, model: str) -> Target:
    """Find what `model` names for a tenant: a base, an adapter (`name` or `name@3`), or a task.

    Raises:
        ModelNotFound: nothing of that name, or nothing ready; the nearest names are in it.
    """
    name, version = _split_version(model)
    row = await connection.fetchrow(
        _RESOLVE, tenant_id, model, name, version, model.removeprefix(TASK_PREFIX)
    )
    if row is None:
        raise await _not_found(connection, tenant_id, model)
    return Target(**dict(row))


# The base model, then the adapter, then the task: names never collide (see register_adapter), and
# the LIMIT keeps the order if they did.
_RESOLVE = f"""
WITH named AS (
    SELECT 1 AS rank, b.id AS base_model_id, NULL::uuid AS adapter_id, NULL::int AS version
    FROM base_models b WHERE b.name = $2
    UNION ALL
    SELECT 2, a.base_model_id, a.id, coalesce($4::int, a.current_version)
    FROM adapters a WHERE a.tenant_id = $1 AND a.name = $3
    UNION ALL
    SELECT 3, t.base_model_id, t.adapter_id, coalesce(t.version, a.current_version)
    FROM tasks t LEFT JOIN adapters a ON a.id = t.adapter_id
    WHERE t.tenant_id = $1 AND t.name = $5 AND $2 LIKE '{TASK_PREFIX}%'
)
SELECT n.base_model_id, b.name AS base_model, b.max_model_len,
       coalesce(v.id, {BASE_VERSION_ID}) AS adapter_version_id,
       a.name AS adapter, v.version, coalesce(a.partition, {BASE_PARTITION}) AS partition
FROM named n
JOIN base_models b ON b.id = n.base_model_id
LEFT JOIN adapters a ON a.id = n.adapter_id
LEFT JOIN adapter_versions v
    ON v.adapter_id = n.adapter_id AND v.version = n.version AND v.state = 'ready'
WHERE n.adapter_id IS NULL OR v.id IS NOT NULL
ORDER BY n.rank LIMIT 1
"""


def _split_version(model: str) -> tuple[str, int | None]:
    name, at, digits = model.rpartition("@")
    if at and digits.isascii() and digits.isdigit() and len(digits) <= 9:
        return name, int(digits)
    return model, None


async def _not_found(connection: Connection, tenant_id: int, model: str) -> ModelNotFound:
    rows = await connection.fetch(
        """
        (SELECT name FROM base_models LIMIT 1000)
        UNION (SELECT name FROM adapters WHERE tenant_id = $1 LIMIT 1000)
        UNION (SELECT 'task:' || name FROM tasks WHERE tenant_id = $1 LIMIT 1000)
        """,
        tenant_id,
    )
    names = sorted(row["name"] for row in rows)
    by_folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(model.casefold(), by_folded, n=3, cutoff=0.5)
    nearest = [by_folded[name] for name in near]
    if nearest:
        hint = "did you mean " + " or ".join(repr(name) for name in nearest) + "?"
    elif names:
        hint = "GET /v1/models lists those there are"
    else:
        hint = "none is known yet; start a worker, or declare one with `lorry models add`"
    return ModelNotFound(f"model {model!r} does not exist: {hint}", field="model", nearest=nearest)


async def list_models(database: Database, tenant_id: int) -> list[ModelRow]:
    """Every model a tenant can name: bases, then its adapters and tasks, each by name."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT name, kind, base_model, version, created_at FROM (
                SELECT 1 AS rank, b.name, 'base' AS kind, b.name AS base_model,
                       NULL::int AS version, b.created_at
                FROM base_models b
                UNION ALL
                SELECT 2, a.name, 'adapter', b.name, a.current_version, a.created_at
                FROM adapters a JOIN base_models b ON b.id = a.base_model_id
                WHERE a.tenant_id = $1 AND a.current_version IS NOT NULL
                UNION ALL
                SELECT 3, 'task:' || t.name, 'task', b.name, t.version, t.created_at
                FROM tasks t JOIN base_models b ON b.id = t.base_model_id
                WHERE t.tenant_id = $1
            ) models ORDER BY rank, name
            """,
            tenant_id,
        )
    return [
        ModelRow(
            row["name"],
            row["kind"],
            row["base_model"],
            row["version"],
            int(row["created_at"].timestamp()),
        )
        for row in rows
    ]


async def declare_base(
    database: Database, name: str, max_model_len: int, revision: str = ""
) -> int:
    """Make a base model known, or bring what is known of it up to date; returns its id.

    The context only becomes what the newest worker says, since that is what will run the job.

    Raises:
        InvalidRequest: a name that is empty or not printable, or a context below 1.
    """
    if not name.isprintable() or not name.strip() or len(name) > 200:
        raise InvalidRequest(f"base model {name!r}: give a printable name of 1 to 200 characters")
    if max_model_len < 1:
        raise InvalidRequest(f"max_model_len {max_model_len}: give at least 1 token")
    base_id: int = await database.fetch_value(
        """
        INSERT INTO base_models (name, max_model_len, revision) VALUES ($1, $2, $3)
        ON CONFLICT (name) DO UPDATE
            SET max_model_len = excluded.max_model_len,
                revision = CASE WHEN excluded.revision = '' THEN base_models.revision
                                ELSE excluded.revision END
        RETURNING id
        """,
        name,
        max_model_len,
        revision,
    )
    return base_id


async def register_adapter(
    database: Database,
    store: Store,
    *,
    tenant: str,
    base_model: str,
    name: str,
    folder: Path,
    partitions: int = 32,
) -> str:
    """Store an adapter's files and make them the current version under its name.

    The same files under the same name are the version that is there already.

    Returns:
        The pinned name, such as `sql@1`.

    Raises:
        AdapterInvalid: the folder, its configuration or the name cannot be used.
        ModelNotFound: the base model is not known.
    """
    if not _NAME.fullmatch(name):
        raise AdapterInvalid(
            f"adapter name {name!r}: use 1 to 128 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    rank = read_rank(folder)
    stored = await asyncio.to_thread(store.put, folder)
    async with database.transaction() as connection:
        tenant_id = await connection.fetchval("SELECT id FROM tenants WHERE name = $1", tenant)
        if tenant_id is None:
            raise InvalidRequest(f"tenant {tenant!r} does not exist: make it with `lorry keys`")
        target = await resolve(connection, tenant_id, base_model)
        if await connection.fetchval("SELECT true FROM base_models WHERE name = $1", name):
            raise AdapterInvalid(f"adapter name {name!r} is taken by a base model")
        adapter = await _upsert_adapter(connection, tenant_id, target, name, partitions)
        version = await _upsert_version(
            connection, adapter, tenant_id, (stored.sha256, rank, stored.size_bytes)
        )
    return f"{name}@{version}"


async def _upsert_adapter(
    connection: Connection, tenant_id: int, target: Target, name: str, partitions: int
) -> UUID:
    """The adapter's id, its row locked, so that two registrations number their versions apart."""
    adapter_id = new_id()
    row = await connection.fetchrow(
        """
        INSERT INTO adapters (id, tenant_id, base_model_id, name, partition)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (tenant_id, name) DO UPDATE SET name = excluded.name
        RETURNING id, base_model_id
        """,
        adapter_id,
        tenant_id,
        target.base_model_id,
        name,
        partition_of(str(adapter_id), partitions),
    )
    assert row is not None
    if row["base_model_id"] != target.base_model_id:
        raise AdapterInvalid(
            f"adapter {name!r} belongs to another base model: an adapter has one base; "
            "register these weights under another name"
        )
    found: UUID = row["id"]
    return found


async def _upsert_version(
    connection: Connection, adapter_id: UUID, tenant_id: int, content: tuple[str, int, int]
) -> int:
    sha256, rank, size_bytes = content
    version: int | None = await connection.fetchval(
        "SELECT version FROM adapter_versions WHERE adapter_id = $1 AND sha256 = $2",
        adapter_id,
        sha256,
    )
    if version is None:
        version = await connection.fetchval(
            """
            INSERT INTO adapter_versions
                (adapter_id, tenant_id, version, sha256, rank, size_bytes, state)
            SELECT $1, $2, 1 + coalesce(max(version), 0), $3, $4, $5, 'ready'
            FROM adapter_versions WHERE adapter_id = $1
            RETURNING version
            """,
            adapter_id,
            tenant_id,
            sha256,
            rank,
            size_bytes,
        )
    await connection.execute(
        "UPDATE adapters SET current_version = $2 WHERE id = $1", adapter_id, version
    )
    assert version is not None
    return version


def read_rank(folder: Path) -> int:
    """The rank in a folder's adapter_config.json; AdapterInvalid where it is no LoRA adapter."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterInvalid(f"{folder} is not an adapter: it holds no adapter_config.json")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterInvalid(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterInvalid(f"{path}: peft_type is not LORA; Lorry serves LoRA adapters")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterInvalid(f"{path}: r={rank!r}: the rank must be a whole number from 1 up")
    return rank
