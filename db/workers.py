"""Workers and their leases. A lease sits on the worker's row; its jobs name that row as owner."""

import random
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import orjson

from core.retry import lone_delay, lone_losses
from db.claims import release_all
from db.database import Connection, Database
from db.suspects import Death, put_apart

_jitter = random.Random()


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """Who a worker is. `limits` are the engine's, by name."""

    base_model_id: int
    hostname: str
    pid: int
    engine: str
    engine_version: str
    limits: dict[str, int]


async def register(database: Database, facts: WorkerFacts, lease_seconds: float) -> int:
    """Enter a worker that is ready for jobs; returns its id, fresh for this process."""
    worker_id: int = await database.fetch_value(
        """
        INSERT INTO workers (base_model_id, hostname, pid, engine, engine_version, limits,
                             lease_expires_at)
        VALUES ($1, $2, $3, $4, $5, $6::text::json, now() + make_interval(secs => $7))
        RETURNING id
        """,
        facts.base_model_id,
        facts.hostname,
        facts.pid,
        facts.engine,
        facts.engine_version,
        orjson.dumps(facts.limits).decode(),
        lease_seconds,
    )
    return worker_id


async def renew(database: Database, worker_id: int, lease_seconds: float) -> bool:
    """Renew a lease; False where the worker was declared lost, and must record nothing more.

    A lease that ran out while Postgres was away may still be renewed: as long as `lost_at` is
    null, nobody else has the jobs.
    """
    renewed: bool | None = await database.fetch_value(
        """
        UPDATE workers
        SET heartbeat_at = now(), lease_expires_at = now() + make_interval(secs => $2)
        WHERE id = $1 AND lost_at IS NULL
        RETURNING true
        """,
        worker_id,
        lease_seconds,
    )
    return bool(renewed)


async def sign_off(
    database: Database, worker_id: int, death: Death | None = None, fed: Collection[UUID] = ()
) -> int:
    """A worker's end: whatever it still owns goes back at no cost; returns how many jobs.

    Args:
        death: where its engine died; the jobs in `fed` were in it and become suspects.
    """
    async with database.transaction() as connection:
        # a claim that is still under way holds the row FOR KEY SHARE: what it takes is seen below,
        # and one that comes later finds the worker stopped
        await connection.execute("SELECT FROM workers WHERE id = $1 FOR UPDATE", worker_id)
        await connection.execute(
            "UPDATE workers SET stopped_at = now(), lease_expires_at = now() WHERE id = $1",
            worker_id,
        )
        apart = await put_apart(connection, worker_id, death, fed) if death and fed else 0
        released = await release_all(connection, worker_id)
        await _disown_ended(connection, worker_id)
    return apart + released


async def take_ended(database: Database, worker_id: int) -> list[tuple[UUID, int]]:
    """The jobs (id, attempt) of a worker that were cancelled or expired while running.

    Each is told once: the owner is cleared in the same statement.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            UPDATE jobs SET lease_owner = NULL
            WHERE lease_owner = $1 AND state IN ('cancelled', 'expired')
            RETURNING id, attempt
            """,
            worker_id,
        )
    return [(row["id"], row["attempt"]) for row in rows]


async def has_live_worker(database: Database, base_model: str) -> bool:
    """Whether a worker of this base model holds a live lease."""
    live: bool = await database.fetch_value(
        """
        SELECT EXISTS (
            SELECT FROM workers w JOIN base_models b ON b.id = w.base_model_id
            WHERE b.name = $1 AND w.lost_at IS NULL AND w.stopped_at IS NULL
              AND w.lease_expires_at > now())
        """,
        base_model,
    )
    return live


async def clock(database: Database) -> datetime:
    """The time by Postgres: the only clock that leases are compared with."""
    now: datetime = await database.fetch_value("SELECT clock_timestamp()")
    return now


async def rescue_lost(
    database: Database,
    lease_seconds: float,
    max_attempts: int,
    in_touch_since: datetime | None = None,
    in_touch_until: datetime | None = None,
) -> dict[int, int]:
    """Take the jobs of workers whose lease ran out, one worker per transaction.

    Nobody is rescued until Postgres itself, and the rescuer's touch with it, have been up for a
    full lease: an outage must not turn every worker that could not renew meanwhile into a lost one.

    Args:
        in_touch_since: when the rescuer's unbroken touch with Postgres began, by Postgres's clock;
            None where the caller vouches for it.
        in_touch_until: how long what it saw may count, by the same clock: a statement that hangs
            with Postgres rescues nobody when it goes on.

    Returns:
        How many jobs were freed, by worker id.
    """
    death = Death("rescued", "its worker was lost", lone_losses(max_attempts), lone_delay(_jitter))
    freed: dict[int, int] = {}
    while True:
        async with database.transaction() as connection:
            worker_id = await connection.fetchval(
                _LOSE, lease_seconds, in_touch_since, in_touch_until
            )
            if worker_id is None:
                return freed
            apart = await put_apart(connection, worker_id, death, fed=None)
            # what is left are suspects that it had not fed yet
            freed[worker_id] = apart + await release_all(connection, worker_id)
            await _disown_ended(connection, worker_id)


# One that has stopped owns nothing, unless it signed off as earlier releases did: past a claim that
# was still under way.
_LOSE = """
UPDATE workers SET lost_at = now() WHERE id = (
    SELECT id FROM workers
    WHERE lost_at IS NULL AND lease_expires_at < now()
      AND (stopped_at IS NULL OR EXISTS (
          SELECT FROM jobs WHERE lease_owner = workers.id AND state = 'running'))
      AND pg_postmaster_start_time() < now() - make_interval(secs => $1)
      AND ($2::timestamptz IS NULL OR $2 <= now() - make_interval(secs => $1))
      AND ($3::timestamptz IS NULL OR $3 >= now())
    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING id
"""


async def _disown_ended(connection: Connection, worker_id: int) -> None:
    """Nobody is left to abort a gone worker's cancelled and expired jobs."""
    await connection.execute(
        "UPDATE jobs SET lease_owner = NULL"
        " WHERE lease_owner = $1 AND state IN ('cancelled', 'expired')",
        worker_id,
    )
