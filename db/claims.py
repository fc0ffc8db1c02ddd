"""Claims: how a worker sees waiting lines, takes chunks of jobs, and gives jobs back.

A claim takes the worker's own row FOR KEY SHARE and requires a live lease, so it cannot slip past
a rescue of that worker: the rescuer holds the row FOR UPDATE.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

from asyncpg import Record

from db.attempts import noted
from db.database import Connection, Database
from db.waiting import Line, drop_if_empty, ensure_waiting, mark_drained


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """A line that a planner may drain.

    Args:
        since_seconds: how long ago it was last drained, or began to wait.
        place: its first job's place in line, or None where nothing is due.
        jobs: how many jobs wait, counted up to a cap.
        deadline_seconds: seconds to the nearest deadline of all its jobs, or None.
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


#: How many of a line's jobs a look counts: as many as a decision turns on (whether a line is cold,
#: whether a turn may go on to empty it).
COUNT_CAP = 128
#: A deadline nearer than this is pressing: the job goes before all others of its line, and the
#: line before others.
PRESSING_SECONDS: Final = 60.0


async def look(
    database: Database,
    base_model_id: int,
    *,
    partitions: Collection[int] | None = None,
    adapters: Collection[str] | None = None,
    resident: Collection[int] = (),
    without: Collection[int] = (),
    highest_rank: int | None = None,
    limit: int = 64,
) -> list[WaitingLine]:
    """The lines that have waited longest, those of resident adapters, and those of the nearest
    pressing deadlines: `limit` of each at most.

    What it costs does not grow with the number of waiting adapters.

    Args:
        base_model_id: the worker's base.
        partitions: those the worker serves; None is all.
        adapters: the adapters that it serves, by name, whatever the version and tenant; the
            base model's name stands for its own jobs. None is all.
        resident: adapter version ids in the worker's slots.
        without: partitions that are left to others.
        highest_rank: of the adapters that the worker's engine takes, 0 where it takes none; lines
            of higher ones are left to other workers. None is any.
        limit: the most lines of each kind.
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
            list(without),
            PRESSING_SECONDS,
            highest_rank,
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


#: Whether a row's adapter is among those named by $6; $1 is the base model.
SERVED = """($6::text[] IS NULL OR adapter_version_id IN (
           SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
           WHERE a.name = ANY($6)
           UNION ALL SELECT 0 FROM base_models WHERE id = $1 AND name = ANY($6)))"""

# An adapter that waits for its admission (db/admission.py) is not to be drained yet, and one that
# this worker's engine has no room for is another worker's.
_READY = """NOT EXISTS (
           SELECT FROM adapter_versions
           WHERE id = adapter_version_id AND (state <> 'ready' OR rank > $9))"""
_PRESSING = "deadline > now() AND deadline <= now() + make_interval(secs => {seconds})"
_HERE = "($2::int[] IS NULL OR partition = ANY($2)) AND partition <> ALL($7::int[])"

_LOOK = f"""
WITH candidate AS (
    (SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters
     WHERE base_model_id = $1 AND {_HERE} AND {SERVED} AND {_READY}
     ORDER BY since LIMIT $4)
    UNION
    (SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters
     WHERE base_model_id = $1 AND adapter_version_id = ANY($3::int[])
       AND {_HERE} AND {SERVED} AND {_READY}
     LIMIT $4)
    UNION
    (SELECT held.* FROM (
         SELECT DISTINCT adapter_version_id, tenant_id FROM (
             SELECT adapter_version_id, tenant_id FROM jobs
             WHERE base_model_id = $1 AND state = 'queued' AND suspect_group IS NULL
               AND finished_at IS NULL AND {_PRESSING.format(seconds="$8")}
             ORDER BY deadline LIMIT $4) nearest
     ) pressing CROSS JOIN LATERAL (
         -- its LIMIT makes it a probe for each
         SELECT adapter_version_id, tenant_id, partition, since FROM waiting_adapters w
         WHERE base_model_id = $1 AND w.adapter_version_id = pressing.adapter_version_id
           AND w.tenant_id = pressing.tenant_id AND {_HERE} AND {SERVED} AND {_READY}
         LIMIT 1) held)
)
SELECT c.adapter_version_id, c.tenant_id, c.partition,
       extract(epoch FROM clock_timestamp() - c.since)::float8 AS since_seconds,
       head.place, head.jobs,
       extract(epoch FROM nearest.deadline - clock_timestamp())::float8 AS deadline_seconds
FROM candidate c CROSS JOIN LATERAL (
    SELECT min(due.place) AS place, count(*)::int AS jobs
    FROM (
        SELECT place FROM jobs
        WHERE base_model_id = $1 AND adapter_version_id = c.adapter_version_id
          AND tenant_id = c.tenant_id AND state = 'queued' AND suspect_group IS NULL
          AND (not_before IS NULL OR not_before <= now())
        ORDER BY place LIMIT $5
    ) due
) head LEFT JOIN LATERAL (
    SELECT deadline FROM jobs
    WHERE base_model_id = $1 AND adapter_version_id = c.adapter_version_id
      AND tenant_id = c.tenant_id AND state = 'queued' AND suspect_group IS NULL
      AND (not_before IS NULL OR not_before <= now()) AND deadline > now()
    ORDER BY deadline LIMIT 1
) nearest ON true
ORDER BY c.since
"""


async def claim(database: Database, worker_id: int, line: Line, limit: int) -> list[ClaimedJob]:
    """Take up to `limit` jobs from a line: pressing ones, then those at its head. One statement.

    Returns:
        The jobs, in no order; empty where the line has none due, or the worker's lease is gone.
    """
    async with database.connection() as connection:
        return await claim_in(connection, worker_id, line, limit)


async def claim_in(
    connection: Connection, worker_id: int, line: Line, limit: int
) -> list[ClaimedJob]:
    """`claim` on a connection of the caller's."""
    rows = await connection.fetch(_CLAIM, *line, limit, worker_id, PRESSING_SECONDS)
    return list(map(ClaimedJob._make, rows))


# The rows are locked, so they are where they were: by ctid they are updated without a second look
# into an index, and no misjudged row count can turn the join into a scan of the table.
#: Gives the worker $5 the rows of `due`, if its lease is live.
TAKE_DUE = """, leased AS MATERIALIZED (
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

# The CTEs with LIMIT and SKIP LOCKED are fences: written as a join, the planner could claim more.
# Suspects are few, and never run beside others (db/suspects.py).
_OF_LINE = """base_model_id = $1 AND adapter_version_id = $2 AND tenant_id = $3
      AND state = 'queued' AND suspect_group IS NULL
      AND (not_before IS NULL OR not_before <= now())"""
_CLAIM = f"""
WITH pressing AS MATERIALIZED (
    SELECT ctid AS row FROM jobs
    WHERE {_OF_LINE} AND {_PRESSING.format(seconds="$6")}
    ORDER BY deadline LIMIT $4
    FOR NO KEY UPDATE SKIP LOCKED
), in_order AS MATERIALIZED (
    SELECT ctid AS row FROM jobs
    WHERE {_OF_LINE}
      AND (deadline IS NULL OR deadline > now() + make_interval(secs => $6))
    ORDER BY place LIMIT $4 - (SELECT count(*) FROM pressing)
    FOR NO KEY UPDATE SKIP LOCKED
), due AS (
    SELECT row FROM pressing UNION ALL SELECT row FROM in_order
){TAKE_DUE}
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


async def release(
    database: Database,
    worker_id: int,
    jobs: Sequence[tuple[UUID, int]],
    delay_seconds: float | None = None,
) -> int:
    """Give running jobs (id, attempt) back to their lines at no cost; returns how many.

    Args:
        delay_seconds: how long nobody is to claim them; None is not at all.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(
            _RELEASE,
            worker_id,
            [job_id for job_id, _ in jobs],
            [attempt for _, attempt in jobs],
            delay_seconds,
        )
        return await _waiting_again(connection, rows)


async def release_all(connection: Connection, worker_id: int) -> int:
    """Give every running job of a worker back at no cost; returns how many. In a transaction."""
    return await _waiting_again(connection, await connection.fetch(_RELEASE_ALL, worker_id))


def _release(which: str, not_before: str = "NULL") -> str:
    return f"""
WITH released AS (
    UPDATE jobs SET state = 'queued', lease_owner = NULL, releases = releases + 1,
                    not_before = {not_before}
    {which} AND lease_owner = $1 AND state = 'running'
    RETURNING jobs.id, tenant_id, jobs.attempt, started_at, base_model_id, adapter_version_id,
              suspect_group
){noted("released", "'released'")}
SELECT base_model_id, adapter_version_id, tenant_id, suspect_group FROM released
"""


_RELEASE_ALL = _release("WHERE true")
_RELEASE = _release(
    "FROM unnest($2::uuid[], $3::int[]) AS r(id, attempt)"
    " WHERE jobs.id = r.id AND jobs.attempt = r.attempt",
    not_before="now() + make_interval(secs => $4::float8)",
)


async def _waiting_again(connection: Connection, rows: Sequence[Record]) -> int:
    """Released jobs stand in their lines again; suspects keep their group, which is no line."""
    lines = {_line(row) for row in rows if row["suspect_group"] is None}
    await ensure_waiting(connection, lines)
    return len(rows)


def _line(row: Record) -> Line:
    return Line(row["base_model_id"], row["adapter_version_id"], row["tenant_id"])


async def version_files(database: Database, adapter_version_id: int) -> VersionFiles | None:
    """The content address and rank of an adapter version."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT sha256, rank FROM adapter_versions WHERE id = $1", adapter_version_id
        )
    return None if row is None else VersionFiles(row["sha256"], row["rank"])
