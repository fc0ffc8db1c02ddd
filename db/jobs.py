"""Jobs as the API sees them: submit, read, list, cancel."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from db.database import Connection, Database
from db.finishing import CONSEQUENCES, FINISHED, NO_TOKENS
from db.registry import Target
from db.waiting import PARTITION_OF_LINE, ensure_waiting


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be queued. `body` and `metadata` are JSON texts.

    Args:
        place: where it stands in line (core/priority.py).
        tokens: expected tokens, prompt and answer.
        deadline: when it expires, aware, or None.
    """

    id: UUID
    tenant_id: int
    target: Target
    endpoint: str
    model: str
    body: str
    priority: int
    place: int
    tokens: int
    deadline: datetime | None = None
    metadata: str | None = None
    webhook_url: str | None = None


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """What a key was used for: the job, and the fingerprint of the body that made it."""

    job_id: UUID
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class IdempotencyUse:
    """A key about to be used on a route."""

    route: str
    key: str
    fingerprint: bytes


async def submit(database: Database, job: NewJob, use: IdempotencyUse | None) -> bool:
    """Queue one job; when this returns, it is committed.

    Everything goes in one statement, which is one round trip and one transaction.

    Returns:
        False where the idempotency key was used before (by a request that won the race): nothing
        was written.
    """
    async with database.connection() as connection:
        row = await connection.fetchrow(
            _SUBMIT if use is None else _SUBMIT_ONCE,
            job.id,
            job.tenant_id,
            job.target.base_model_id,
            job.target.adapter_version_id,
            job.priority,
            job.place,
            job.tokens,
            job.deadline,
            job.endpoint,
            job.model,
            job.body,
            job.metadata,
            job.webhook_url,
            *([] if use is None else [use.route, use.key, use.fingerprint]),
        )
        assert row is not None
        if row["submitted"] and not row["waiting"]:
            # the line's row appeared or went while the statement ran: settle it by itself
            async with connection.transaction():
                await ensure_waiting(connection, [job.target.line(job.tenant_id)])
    return bool(row["submitted"])


def _submit_statement(condition: str, first: str = "") -> str:
    return f"""
WITH {first} job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, priority, place, tokens,
                      deadline, webhook)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8, CASE WHEN $13::text IS NOT NULL THEN true END
    WHERE {condition}
    RETURNING 1
), input AS (
    INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body, metadata, webhook_url)
    SELECT $1, $2, $9, $10, $11::text::json, $12::text::json, $13::text WHERE {condition}
), held AS (
    SELECT FROM waiting_adapters
    WHERE base_model_id = $3 AND adapter_version_id = $4 AND tenant_id = $2
    FOR KEY SHARE
), waiting AS (
    INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition)
    SELECT $3, $4, $2, {PARTITION_OF_LINE.format(version="$4")}
    WHERE NOT EXISTS (SELECT FROM held) AND {condition}
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT EXISTS (SELECT FROM job) AS submitted,
       EXISTS (SELECT FROM held) OR EXISTS (SELECT FROM waiting) AS waiting
"""


_SUBMIT = _submit_statement("true")
_SUBMIT_ONCE = _submit_statement(
    "EXISTS (SELECT FROM used)",
    """used AS (
    INSERT INTO idempotency_keys (tenant_id, route, key, fingerprint, resource_id)
    VALUES ($2, $14, $15, $16, $1)
    ON CONFLICT DO NOTHING
    RETURNING 1
),""",
)


async def find_idempotent(
    database: Database, tenant_id: int, route: str, key: str
) -> IdempotencyRecord | None:
    """What a tenant's key made on a route; keys are dropped by the steward after 24 hours."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            """
            SELECT resource_id, fingerprint FROM idempotency_keys
            WHERE tenant_id = $1 AND route = $2 AND key = $3
            """,
            tenant_id,
            route,
            key,
        )
    return None if row is None else IdempotencyRecord(row["resource_id"], row["fingerprint"])


_SELECT_JOB = """
SELECT j.id, j.state, j.priority, j.deadline, j.attempt - j.releases AS attempts,
       j.started_at, j.finished_at, i.model, i.metadata, i.webhook_url, i.created_at,
       a.name AS adapter, v.version AS adapter_version,
       o.response, o.error_code, o.error_message
FROM job_inputs i
JOIN jobs j ON j.id = i.job_id
LEFT JOIN job_outputs o ON o.tenant_id = i.tenant_id AND o.job_id = i.job_id
LEFT JOIN adapter_versions v ON v.id = j.adapter_version_id
LEFT JOIN adapters a ON a.id = v.adapter_id
"""


async def get(database: Database, tenant_id: int, job_id: UUID) -> asyncpg.Record | None:
    """One job of a tenant, with its answer. None for another tenant's."""
    async with database.connection() as connection:
        return await connection.fetchrow(
            f"{_SELECT_JOB} WHERE i.tenant_id = $1 AND i.job_id = $2", tenant_id, job_id
        )


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What `GET /v1/jobs` narrows its list by."""

    state: str | None = None
    model: str | None = None


async def list_page(
    database: Database, tenant_id: int, filters: JobFilter, after: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """A tenant's jobs, newest first, from behind `after`: up to `limit` of them."""
    clauses, arguments = ["i.tenant_id = $1"], [tenant_id, limit]
    for column, value in (
        ("j.state =", filters.state),
        ("i.model =", filters.model),
        ("i.job_id <", after),
    ):
        if value is not None:
            arguments.append(value)  # type: ignore[arg-type]
            clauses.append(f"{column} ${len(arguments)}")
    statement = f"{_SELECT_JOB} WHERE {' AND '.join(clauses)} ORDER BY i.job_id DESC LIMIT $2"
    async with database.connection() as connection:
        return await connection.fetch(statement, *arguments)


async def cancel(database: Database, tenant_id: int, job_id: UUID) -> None:
    """Cancel a job that is not final; a final or foreign one stays as it is.

    A running one keeps its lease owner: that is how its worker learns to abort it.
    """
    async with database.connection() as connection:
        await connection.execute(_CANCEL, tenant_id, job_id)


_CANCEL = f"""
WITH finished AS (
    UPDATE jobs SET state = 'cancelled', finished_at = now()
    WHERE id = $2 AND tenant_id = $1 AND state IN ('queued', 'running')
    RETURNING {FINISHED}, {NO_TOKENS}
){CONSEQUENCES}
SELECT count(*) FROM finished
"""


async def finished_among(database: Database, ids: list[UUID]) -> set[UUID]:
    """Which of these jobs are final: what the API's one poller asks for all its waiters.

    Ids come from waiters that were already checked against their tenant.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT id FROM jobs WHERE id = ANY($1) AND finished_at IS NOT NULL", ids
        )
    return {row["id"] for row in rows}


async def delete_expired_keys(connection: Connection, limit: int = 1000) -> int:
    """Drop idempotency keys older than 24 hours, at most `limit`; returns how many."""
    status = await connection.execute(
        """
        DELETE FROM idempotency_keys WHERE (tenant_id, route, key) IN (
            SELECT tenant_id, route, key FROM idempotency_keys
            WHERE created_at < now() - interval '24 hours' ORDER BY created_at LIMIT $1)
        """,
        limit,
    )
    return int(status.split()[-1])
