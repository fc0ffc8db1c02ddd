"""Claims: how a worker sees waiting lines, takes chunks of jobs, and gives jobs back.

A claim takes the worker's own row FOR KEY SHARE and requires a live lease, so it cannot slip past
a rescue of that worker: the rescuer holds the row FOR UPDATE.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from db.database import Connection, Database
from db.waiting import Line, drop_if_empty, ensure_waiting, mark_drained


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """A line that a planner may drain.

    Args:
        since_seconds: how long ago it was last drained, or began to wait.
        place: its first job's place in line, or None where nothing is due.
        jobs: how many jobs wait, counted up to a cap.
        deadline_seconds: seconds to the nearest deadline, or None.
    """

    line: Line
    partition: int
    since_seconds: float
    place: int | None
    jobs: int
    deadline_seconds: float | None


class ClaimedJob(NamedTuple):
    """A job that this worker runs, under this attempt. `body` is JSON text."""

    id: UUID
    attempt: int
    tenant_id: int
    adapter_version_id: int
    tokens: int
    failures: int
    endpoint: str
    model: str
    body: str


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """Where to find an adapter version's weights."""

    sha256: str
    rank: int


#: How many of a line's jobs a look counts: more than a planner's decision turns on.
COUNT_CAP = 512


async def look(
    database: Database,
    base_model_id: int,
    *,
    partitions: Collection[int] | None = None,
    adapters: Collection[str] | None = None,
    resident: Collection[int] = (),
    limit: int = 64,
) -> list[WaitingLine]:
    """The lines that have waited longest, and those of resident adapters: `limit` of each at most.

    What it costs does not grow with the number of waiting adapters.

    Args:
        base_model_id: the worker's base.
        partitions: those the worker serves; None is all.
        adapters: the adapters that it serves, by name, whatever the version and tenant; the
            base model's name stands for its own jobs. None is all.
        resident: adapter version ids in the worker's slots.
        limit: the most lines of either kind.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            _LOOK,
            base_model_id,
            None if partitions is None else list(partitions),
            list(resident),
            limit,
            COUNT_CAP,
            None if adapters is None else list(adapters),
        )
    return [
        WaitingLine(
            Line(base_model_id, row["adapter_version_id"], row["tenant_id"]),
            row["partition"],
            row["since_seconds"],
            row["place"],
            row["jobs"],
            row["deadline_seconds"],
        )
        for row in rows
    ]


_SERVED = """($6::text[] IS NULL OR adapter_version_id IN (
           SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
           WHERE a.name = ANY($6)
           UNION ALL SELECT 0 FROM base_models WHERE id = $1 AND name = ANY($6)))"""

_LOOK = f"""
WITH candidate AS (
    (SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters
     WHERE base_model_id = $1 AND ($2::int[] IS NULL OR partition = ANY($2))
       AND {_SERVED}
     ORDER BY since LIMIT $4)
    UNION
    (SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters
     WHERE base_model_id = $1 AND adapter_version_id = ANY($3::int[])
       AND ($2::int[] IS NULL OR partition = ANY($2))
       AND {_SERVED}
     LIMIT $4)
)
SELECT c.adapter_version_id, c.tenant_id, c.partition,
       extract(epoch FROM clock_timestamp() - c.since)::float8 AS since_seconds,
       head.place, head.jobs,
       extract(epoch FROM head.deadline - clock_timestamp())::float8 AS deadline_seconds
FROM candidate c CROSS JOIN LATERAL (
    SELECT min(due.place) AS place, count(*)::int AS jobs, min(due.deadline) AS deadline
    FROM (
        SELECT place, deadline FROM jobs
        WHERE base_model_id = $1 AND adapter_version_id = c.adapter_version_id
          AND tenant_id = c.tenant_id AND state = 'queued'
          AND (not_before IS NULL OR not_before <= now())
        ORDER BY place LIMIT $5
    ) due
) head
ORDER BY c.since
"""


async def claim(database: Database, worker_id: int, line: Line, limit: int) -> list[ClaimedJob]:
    """Take up to `limit` jobs from the head of a line. One statement.

    Returns:
        The jobs, in no order; empty where the line has none due, or the worker's lease is gone.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(CLAIM, *line, limit, worker_id)
    return list(map(ClaimedJob._make, rows))


# The CTE with LIMIT and SKIP LOCKED is a fence: written as a join, the planner could claim more.
# The rows are locked, so they are where they were: by ctid they are updated without a second look
# into an index, and no misjudged row count can turn the join into a scan of the table.
CLAIM = """
WITH due AS MATERIALIZED (
    SELECT ctid AS row FROM jobs
    WHERE base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3 AND state = 'queued'
      AND (not_before IS NULL OR not_before <= now())
      AND (deadline IS NULL OR deadline > now())
    ORDER BY place LIMIT $4
    FOR NO KEY UPDATE SKIP LOCKED
), leased AS MATERIALIZED (
    SELECT id FROM workers
    WHERE id = $5 AND lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at > now()
    FOR KEY SHARE
), claimed AS (
    UPDATE jobs SET state = 'running', attempt = attempt + 1, lease_owner = $5,
                    started_at = now(), not_before = NULL
    WHERE ctid = ANY (ARRAY(SELECT row FROM due)) AND EXISTS (SELECT FROM leased)
    RETURNING jobs.id, attempt, tenant_id, adapter_version_id, tokens, failures
)
SELECT c.*, i.endpoint, i.model, i.body::text AS body
FROM claimed c JOIN job_inputs i ON i.tenant_id = c.tenant_id AND i.job_id = c.id
"""


async def end_turn(database: Database, line: Line) -> bool:
    """A drain of this line has ended: it leaves the waiting list, or goes to its back.

    Returns:
        Whether jobs are left in it.
    """
    async with database.transaction() as connection:
        if await drop_if_empty(connection, line):
            return False
        await mark_drained(connection, line)
    return True


async def owned(database: Database, worker_id: int) -> list[tuple[UUID, int]]:
    """The running jobs (id, attempt) that this worker owns, as Postgres sees it."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT id, attempt FROM jobs WHERE lease_owner = $1 AND state = 'running'", worker_id
        )
    return [(row["id"], row["attempt"]) for row in rows]


async def release(database: Database, worker_id: int, jobs: Sequence[tuple[UUID, int]]) -> int:
    """Give running jobs (id, attempt) back to their lines at no cost; returns how many."""
    async with database.transaction() as connection:
        return await _requeue(connection, worker_id, jobs)


async def _requeue(connection: Connection, worker_id: int, jobs: Sequence[tuple[UUID, int]]) -> int:
    rows = await connection.fetch(
        """
        UPDATE jobs SET state = 'queued', lease_owner = NULL, releases = releases + 1
        FROM unnest($2::uuid[], $3::int[]) AS r(id, attempt)
        WHERE jobs.id = r.id AND jobs.attempt = r.attempt AND lease_owner = $1
          AND state = 'running'
        RETURNING base_model_id, adapter_version_id, tenant_id
        """,
        worker_id,
        [job_id for job_id, _ in jobs],
        [attempt for _, attempt in jobs],
    )
    await ensure_waiting(connection, {Line(*row.values()) for row in rows})
    return len(rows)


async def version_files(database: Database, adapter_version_id: int) -> VersionFiles | None:
    """The content address and rank of an adapter version."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT sha256, rank FROM adapter_versions WHERE id = $1", adapter_version_id
        )
    return None if row is None else VersionFiles(row["sha256"], row["rank"])
