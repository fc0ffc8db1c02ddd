"""Suspects: jobs that were in an engine when it died, run again apart from all others, in halves.

One of them may have killed it; most have not. So the death costs none of them anything: they are
split into two groups, and a group is run by itself in an engine that holds nothing else. If that
one dies too, the group is split again, until the culprit is alone. See
docs/decisions/0008-suspects-by-halving.md.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from db.attempts import noted
from db.claims import SERVED, TAKE_DUE, ClaimedJob
from db.database import Connection, Database
from db.finishing import CONSEQUENCES, FINISHED, NO_TOKENS
from db.waiting import PARTITION_OF_LINE


@dataclass(frozen=True, slots=True)
class Death:
    """What took a worker's jobs away from it.

    Args:
        outcome: what becomes of their attempts in the history.
        cause: for the user, without a full stop.
        lone_deaths: a job fails once an engine has died so often with it alone inside.
        delay_seconds: how long a job that was alone waits for its next try.
    """

    outcome: Literal["rescued", "suspect"]
    cause: str
    lone_deaths: int
    delay_seconds: float


async def put_apart(
    connection: Connection, worker_id: int, death: Death, fed: Collection[UUID] | None
) -> int:
    """Queue a dead engine's jobs again as suspects, in two groups; returns how many.

    Args:
        worker_id: whose engine it was.
        death: what happened.
        fed: the jobs that were in the engine. None where nobody knows: then every running job of
            the worker's, but for suspects that lie beside other jobs, since a worker feeds
            suspects by themselves alone.
    """
    count: int = await connection.fetchval(
        _PUT_APART,
        worker_id,
        death.lone_deaths,
        death.cause,
        death.delay_seconds,
        None if fed is None else list(fed),
        death.outcome,
    )
    return count


# A cancelled or expired job whose owner has not read that yet may have been in the engine too: whom
# it kept company was not alone. The rows are locked, and by ctid they are updated at the same price
# whatever the planner thinks that their number is.
_PUT_APART = f"""
WITH owned AS MATERIALIZED (
    SELECT ctid AS row, id, suspect_group, coalesce(suspect_deaths, 0) AS deaths FROM jobs
    WHERE lease_owner = $1 AND state = 'running' AND ($5::uuid[] IS NULL OR id = ANY($5::uuid[]))
    ORDER BY id
    FOR NO KEY UPDATE
), inside AS MATERIALIZED (
    SELECT row, deaths, 2 * row_number() OVER (ORDER BY id) <= count(*) OVER () AS first_half,
           count(*) OVER () + (SELECT count(*) FROM jobs WHERE lease_owner = $1
                               AND state IN ('cancelled', 'expired')) = 1 AS alone
    FROM owned
    WHERE suspect_group IS NULL OR $5::uuid[] IS NOT NULL
       OR NOT EXISTS (SELECT FROM owned WHERE suspect_group IS NULL)
), fed AS MATERIALIZED (
    SELECT *, alone AND deaths + 1 >= $2 AS convicted FROM inside
), halves AS MATERIALIZED (
    SELECT nextval('suspect_groups') AS first, nextval('suspect_groups') AS second
), apart AS (
    UPDATE jobs SET
        state = CASE WHEN convicted THEN 'failed' ELSE 'queued' END,
        finished_at = CASE WHEN convicted THEN now() END,
        failures = failures + convicted::int,
        suspect_deaths = CASE WHEN alone THEN deaths + 1 ELSE suspect_deaths END,
        suspect_group = CASE WHEN first_half THEN halves.first ELSE halves.second END,
        not_before = now() + make_interval(secs => CASE WHEN alone THEN $4::float8 ELSE 0 END),
        lease_owner = NULL
    FROM fed, halves
    WHERE jobs.ctid = fed.row
    RETURNING {FINISHED}, {NO_TOKENS}, attempt, started_at, suspect_deaths
), finished AS (
    SELECT * FROM apart WHERE state = 'failed'
), requeued AS (
    SELECT * FROM apart WHERE state = 'queued'
), answered AS (
    INSERT INTO job_outputs (tenant_id, job_id, error_code, error_message, worker_id)
    SELECT tenant_id, id, 'attempts_exhausted',
           format('%s; that happened %s times with this job alone in the engine',
                  $3::text, suspect_deaths), $1
    FROM apart WHERE state = 'failed'
){noted("requeued", "$6::text", "$3::text")}{CONSEQUENCES}
SELECT count(*) FROM apart
"""


async def take_group(
    database: Database,
    worker_id: int,
    base_model_id: int,
    *,
    waited_seconds: float,
    limit: int,
    partitions: Collection[int] | None = None,
    adapters: Collection[str] | None = None,
    highest_rank: int | None = None,
) -> list[ClaimedJob]:
    """Claim the oldest group of suspects whole, or as much of it as this worker serves.

    The caller must run them with nothing else in its engine.

    Args:
        waited_seconds: leave groups alone that have waited less.
        limit: the most jobs; what is beyond it stays a group.
        partitions: those the worker serves; None is all.
        adapters: likewise, by name.
        highest_rank: of the adapters that the worker's engine takes; None is any.

    Returns:
        The jobs; empty where no suspects wait, or the worker's lease is gone.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            _TAKE_GROUP,
            base_model_id,
            limit,
            waited_seconds,
            None if partitions is None else list(partitions),
            worker_id,
            None if adapters is None else list(adapters),
            highest_rank,
        )
    return list(map(ClaimedJob._make, rows))


_DUE = f"""base_model_id = $1 AND state = 'queued' AND suspect_group IS NOT NULL
      AND (not_before IS NULL OR not_before <= now() - make_interval(secs => $3))
      AND (deadline IS NULL OR deadline > now())
      AND ($4::int[] IS NULL
           OR {PARTITION_OF_LINE.format(version="jobs.adapter_version_id")} = ANY($4))
      AND NOT EXISTS (SELECT FROM adapter_versions v
                      WHERE v.id = jobs.adapter_version_id AND v.rank > $7)
      AND {SERVED}"""

_TAKE_GROUP = f"""
WITH chosen AS MATERIALIZED (
    SELECT suspect_group FROM jobs WHERE {_DUE} ORDER BY suspect_group LIMIT 1
), due AS MATERIALIZED (
    SELECT ctid AS row FROM jobs
    WHERE suspect_group = (SELECT suspect_group FROM chosen) AND {_DUE}
    ORDER BY id LIMIT $2
    FOR NO KEY UPDATE SKIP LOCKED
){TAKE_DUE}
"""


async def waiting_suspects(database: Database) -> dict[str, int]:
    """How many suspects wait, by base model: for operators, across tenants."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT b.name, count(*) AS jobs FROM jobs j JOIN base_models b ON b.id = j.base_model_id
            WHERE j.suspect_group IS NOT NULL AND j.state = 'queued'
            GROUP BY b.name
            """
        )
    return {row["name"]: row["jobs"] for row in rows}
