"""How the queue stands, for operators: across tenants, so never for a request of a tenant's.

Looks at the waiting list, not at `jobs`: the jobs of a line are counted up to a cap that shrinks
as lines grow in number, so that a look costs about the same however much waits.
"""

from dataclasses import dataclass
from typing import Final

from core.priority import SECONDS_PER_PRIORITY
from db.database import Database
from db.models import BASE_VERSION_ID
from db.rates import LIVE_RATES

#: Index entries that one look may count, over all lines.
COUNT_BUDGET: Final = 100_000
#: Webhook deliveries that are counted at most.
MOST_DELIVERIES: Final = 100_000
#: The most lines that are counted at all: those that have waited longest for a turn.
MOST_LINES: Final = 5_000


@dataclass(frozen=True, slots=True)
class AdapterNow:
    """An adapter version with jobs waiting or lately finished, over all its tenants.

    Args:
        adapter_version_id: 0 is the base model itself; then adapter and tenant are None.
        adapter: `name@version`.
        waiting: jobs, counted up to a cap.
        capped: whether there may be more.
        oldest_age_seconds: how long ago the job that is next in its line came; None without any.
        tokens_per_second: of answers, on all live workers.
    """

    base_model: str
    adapter_version_id: int
    adapter: str | None
    tenant: str | None
    waiting: int
    capped: bool
    oldest_age_seconds: float | None
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class QueueNow:
    """A look at the whole queue: by base model, most waiting jobs first.

    Args:
        lines: how many lines wait in all.
        lines_counted: how many of them `adapters` is about.
    """

    adapters: list[AdapterNow]
    lines: int
    lines_counted: int


@dataclass(frozen=True, slots=True)
class WorkerNow:
    """A live worker. `running` are the jobs it holds, in its engine or not recorded yet."""

    id: int
    base_model: str
    hostname: str
    pid: int
    engine: str
    engine_version: str
    running: int
    max_num_seqs: int | None
    heartbeat_age_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class DeliveriesNow:
    """Webhook deliveries that are owed, counted up to `MOST_DELIVERIES`.

    Args:
        due: to be sent now.
        later: being sent, or waiting for their next attempt.
        oldest_due_seconds: how long the oldest of those due has been; 0 without any.
    """

    due: int
    later: int
    oldest_due_seconds: float


async def queue_now(database: Database) -> QueueNow:
    """What waits, and what each adapter gets.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    async with database.connection() as connection:
        lines = await connection.fetchval("SELECT count(*) FROM waiting_adapters")
        counted = min(lines, MOST_LINES)
        cap = COUNT_BUDGET // max(1, counted)
        rows = await connection.fetch(QUEUE_NOW, MOST_LINES, cap)
    return QueueNow([AdapterNow(**dict(row)) for row in rows], lines, counted)


# The inner LIMITs are ordered as the index is: without that, statistics that lag behind a flood
# could make Postgres read the whole table instead.
QUEUE_NOW = f"""
WITH line AS (
    SELECT base_model_id, adapter_version_id, tenant_id FROM waiting_adapters
    ORDER BY since LIMIT $1
), counted AS (
    SELECT line.base_model_id, line.adapter_version_id, found.jobs,
           extract(epoch FROM now())
               - (head.place / 1000.0 + head.priority * {SECONDS_PER_PRIORITY}) AS age
    FROM line
    CROSS JOIN LATERAL (
        SELECT count(*) AS jobs FROM (
            SELECT FROM jobs j
            WHERE j.base_model_id = line.base_model_id AND j.state = 'queued'
              AND j.adapter_version_id = line.adapter_version_id AND j.tenant_id = line.tenant_id
            ORDER BY j.place LIMIT $2) due
    ) found
    CROSS JOIN LATERAL (
        SELECT place, priority FROM jobs j
        WHERE j.base_model_id = line.base_model_id AND j.state = 'queued'
          AND j.adapter_version_id = line.adapter_version_id AND j.tenant_id = line.tenant_id
        ORDER BY j.place LIMIT 1
    ) head
), waiting AS (
    SELECT base_model_id, adapter_version_id, sum(jobs)::int AS waiting,
           bool_or(jobs >= $2) AS capped, max(age)::float8 AS age
    FROM counted GROUP BY 1, 2
), rated AS (
    SELECT r.base_model_id, r.adapter_version_id, sum(r.tokens_per_second)::float8 AS tokens
    FROM {LIVE_RATES} GROUP BY 1, 2
)
SELECT b.name AS base_model, adapter_version_id, a.name || '@' || v.version AS adapter,
       t.name AS tenant, coalesce(waiting, 0) AS waiting, coalesce(capped, false) AS capped,
       CASE WHEN age < 0 THEN 0 ELSE age END AS oldest_age_seconds,
       coalesce(tokens, 0) AS tokens_per_second
FROM waiting FULL JOIN rated USING (base_model_id, adapter_version_id)
JOIN base_models b ON b.id = base_model_id
LEFT JOIN adapter_versions v ON v.id = adapter_version_id AND v.id <> {BASE_VERSION_ID}
LEFT JOIN adapters a ON a.id = v.adapter_id
LEFT JOIN tenants t ON t.id = v.tenant_id
ORDER BY b.name, waiting DESC NULLS LAST, tokens DESC NULLS LAST, adapter_version_id
"""


async def workers_now(database: Database) -> list[WorkerNow]:
    """The workers with a live lease, by base model.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            f"""
            SELECT w.id, b.name AS base_model, w.hostname, w.pid, w.engine, w.engine_version,
                   (SELECT count(*)::int FROM jobs j
                    WHERE j.lease_owner = w.id AND j.state = 'running') AS running,
                   (w.limits->>'max_num_seqs')::int AS max_num_seqs,
                   extract(epoch FROM now() - w.heartbeat_at)::float8 AS heartbeat_age_seconds,
                   coalesce(rated.tokens, 0)::float8 AS tokens_per_second
            FROM workers w JOIN base_models b ON b.id = w.base_model_id
            LEFT JOIN (SELECT r.worker_id, sum(r.tokens_per_second) AS tokens
                       FROM {LIVE_RATES} GROUP BY r.worker_id) rated ON rated.worker_id = w.id
            WHERE w.lost_at IS NULL AND w.stopped_at IS NULL AND w.lease_expires_at > now()
            ORDER BY b.name, w.id
            """
        )
    return [WorkerNow(**dict(row)) for row in rows]


async def deliveries_now(database: Database) -> DeliveriesNow:
    """How far sending is behind.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    async with database.connection() as connection:
        row = await connection.fetchrow(
            """
            SELECT count(*) FILTER (WHERE seconds >= 0)::int AS due,
                   count(*) FILTER (WHERE seconds < 0)::int AS later,
                   greatest(max(seconds), 0)::float8 AS oldest_due_seconds
            FROM (SELECT extract(epoch FROM now() - due_at) AS seconds
                  FROM deliveries WHERE state = 'pending' LIMIT $1) pending
            """,
            MOST_DELIVERIES,
        )
    assert row is not None
    return DeliveriesNow(**dict(row))


async def lost_workers(database: Database) -> dict[str, int]:
    """How many workers were declared lost in the last hour, by base model."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT b.name, count(*) AS workers
            FROM workers w JOIN base_models b ON b.id = w.base_model_id
            WHERE w.lost_at > now() - interval '1 hour'
            GROUP BY b.name
            """
        )
    return {row["name"]: row["workers"] for row in rows}
