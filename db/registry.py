"""What `model` in a request can name: base models, adapters and their versions, tasks."""

import difflib
import json
import re
from dataclasses import dataclass
from typing import Final

import orjson

from core.adapter_rules import BaseFacts
from core.errors import InvalidRequest, ModelNotFound
from core.partitions import BASE_PARTITION
from db.database import Connection, Database
from db.models import BASE_VERSION_ID
from db.waiting import Line

TASK_PREFIX: Final = "task:"
#: Of adapters and tasks.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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

    An adapter's name alone is its current version, or the newest while none has become ready yet:
    jobs for a version that is still `validating` wait until it is ready.

    Raises:
        ModelNotFound: nothing of that name, or nothing ready; the nearest names are in it.
    """
    target = await find(connection, tenant_id, model)
    if target is None:
        raise await _unusable(connection, tenant_id, *split_version(model)) or await _not_found(
            connection, tenant_id, model
        )
    return target


async def find(connection: Connection, tenant_id: int, model: str) -> Target | None:
    """`resolve` without advice: None where there is nothing of that name, or nothing ready."""
    name, version = split_version(model)
    row = await connection.fetchrow(
        _RESOLVE, tenant_id, model, name, version, model.removeprefix(TASK_PREFIX)
    )
    return None if row is None else Target(**dict(row))


#: The version that an adapter's name stands for (of `adapters a`).
VERSION_OF_NAME: Final = """
    coalesce(a.current_version, (
        SELECT max(version) FROM adapter_versions n
        WHERE n.adapter_id = a.id AND n.state = 'validating' AND n.retired_at IS NULL))
"""

# The base model, then the adapter, then the task: names never collide (see db/adapters.py), and
# the LIMIT keeps the order if they did.
_RESOLVE = f"""
WITH named AS (
    SELECT 1 AS rank, b.id AS base_model_id, NULL::uuid AS adapter_id, NULL::int AS version
    FROM base_models b WHERE b.name = $2
    UNION ALL
    SELECT 2, a.base_model_id, a.id, coalesce($4::int, {VERSION_OF_NAME})
    FROM adapters a WHERE a.tenant_id = $1 AND a.name = $3
    UNION ALL
    SELECT 3, t.base_model_id, t.adapter_id, coalesce(t.version, {VERSION_OF_NAME})
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
    ON v.adapter_id = n.adapter_id AND v.version = n.version
    AND v.state IN ('ready', 'validating') AND v.retired_at IS NULL
WHERE n.adapter_id IS NULL OR v.id IS NOT NULL
ORDER BY n.rank LIMIT 1
"""


def split_version(model: str) -> tuple[str, int | None]:
    """`("sql", 3)` of `sql@3`; no version where none is pinned."""
    name, at, digits = model.rpartition("@")
    if at and digits.isascii() and digits.isdigit() and len(digits) <= 9:
        return name, int(digits)
    return model, None


async def _unusable(
    connection: Connection, tenant_id: int, name: str, version: int | None
) -> ModelNotFound | None:
    """Why an adapter that there is cannot be named; None where the name itself is unknown."""
    row = await connection.fetchrow(
        """
        SELECT v.version, v.findings FROM adapters a JOIN adapter_versions v ON v.adapter_id = a.id
        WHERE a.tenant_id = $1 AND a.name = $2 AND v.state = 'rejected' AND v.retired_at IS NULL
          AND ($3::int IS NULL OR v.version = $3)
        ORDER BY v.version DESC LIMIT 1
        """,
        tenant_id,
        name,
        version,
    )
    if row is None:
        return None
    return ModelNotFound(
        f"adapter {name!r} cannot be used: version {row['version']} was rejected "
        f"({reasons(row['findings'])})",
        field="model",
        nearest=[],
    )


def reasons(findings: str) -> str:
    """The findings of a rejected version (JSON text) in one line."""
    return "; ".join(finding["message"] for finding in json.loads(findings))


async def _not_found(connection: Connection, tenant_id: int, model: str) -> ModelNotFound:
    rows = await connection.fetch(
        """
        (SELECT name FROM base_models LIMIT 1000)
        UNION (SELECT name FROM adapters WHERE tenant_id = $1 AND retired_at IS NULL LIMIT 1000)
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
            f"""
            SELECT name, kind, base_model, version, created_at FROM (
                SELECT 1 AS rank, b.name, 'base' AS kind, b.name AS base_model,
                       NULL::int AS version, b.created_at
                FROM base_models b
                UNION ALL
                SELECT 2, a.name, 'adapter', b.name, v.version, a.created_at
                FROM adapters a JOIN base_models b ON b.id = a.base_model_id
                CROSS JOIN LATERAL (SELECT {VERSION_OF_NAME} AS version) v
                WHERE a.tenant_id = $1 AND a.retired_at IS NULL AND v.version IS NOT NULL
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


async def current_versions(database: Database, base_model_id: int, name: str) -> list[int]:
    """The current version ids of the adapters of this name, one for each tenant that has one."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT v.id FROM adapters a
            JOIN adapter_versions v ON v.adapter_id = a.id AND v.version = a.current_version
            WHERE a.base_model_id = $1 AND a.name = $2 AND v.state = 'ready'
            ORDER BY v.id
            """,
            base_model_id,
            name,
        )
    return [row["id"] for row in rows]


async def declare_base(
    database: Database,
    name: str,
    max_model_len: int,
    revision: str = "",
    facts: BaseFacts | None = None,
) -> int:
    """Make a base model known, or bring what is known of it up to date; returns its id.

    The context only becomes what the newest worker says, since that is what will run the job.

    Args:
        facts: what its files say an adapter may be; None where they are not at hand, which leaves
            what is known.

    Raises:
        InvalidRequest: a name that is empty or not printable, or a context below 1.
    """
    if not name.isprintable() or not name.strip() or len(name) > 200:
        raise InvalidRequest(f"base model {name!r}: give a printable name of 1 to 200 characters")
    if max_model_len < 1:
        raise InvalidRequest(f"max_model_len {max_model_len}: give at least 1 token")
    modules = None if facts is None or facts.modules is None else orjson.dumps(facts.modules)
    base_id: int = await database.fetch_value(
        """
        INSERT INTO base_models (name, max_model_len, revision, modules, vocab_size, tokenizer_size)
        VALUES ($1, $2, $3, $4::text::json, $5, $6)
        ON CONFLICT (name) DO UPDATE
            SET max_model_len = excluded.max_model_len,
                revision = CASE WHEN excluded.revision = '' THEN base_models.revision
                                ELSE excluded.revision END,
                modules = CASE WHEN $7 THEN excluded.modules ELSE base_models.modules END,
                vocab_size = CASE WHEN $7 THEN excluded.vocab_size
                                  ELSE base_models.vocab_size END,
                tokenizer_size = CASE WHEN $7 THEN excluded.tokenizer_size
                                      ELSE base_models.tokenizer_size END
        RETURNING id
        """,
        name,
        max_model_len,
        revision,
        modules and modules.decode(),
        facts and facts.vocab_size,
        facts and facts.tokenizer_size,
        facts is not None,
    )
    return base_id


async def base_facts(connection: Connection, base_model_id: int) -> BaseFacts:
    """What is known of a base model: by its files, and by the workers that live.

    The rank is the least that a live worker takes, since any of them may claim an adapter's jobs.
    """
    row = await connection.fetchrow(
        f"""
        SELECT b.name, b.modules, b.vocab_size, b.tokenizer_size,
               (SELECT min((w.limits->>'max_lora_rank')::int) FROM workers w
                WHERE w.base_model_id = b.id AND {TAKES_ADAPTERS}) AS max_lora_rank
        FROM base_models b WHERE b.id = $1
        """,
        base_model_id,
    )
    assert row is not None
    modules = row["modules"] and json.loads(row["modules"])
    return BaseFacts.from_json({**dict(row), "modules": modules})


#: Of `workers w`: it lives, and its engine has slots.
TAKES_ADAPTERS: Final = """
    w.lost_at IS NULL AND w.stopped_at IS NULL AND w.lease_expires_at > now()
    AND (w.limits->>'max_loras')::int > 0
"""


def check_name(what: str, name: str) -> str:
    """`name` itself, or InvalidRequest where it cannot name an adapter or a task."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{what} name {name[:200]!r}: use 1 to 128 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit",
            field="name",
        )
    return name
