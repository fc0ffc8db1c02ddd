"""Workers and their leases. A lease sits on the worker's row; its jobs name that row as owner."""

from dataclasses import dataclass
from uuid import UUID

import orjson

from db.database import Connection, Database
from db.waiting import Line, ensure_waiting


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


async def sign_off(database: Database, worker_id: int) -> None:
    """A worker that stopped in order: whatever it still owns goes back to its line, at no cost."""
    async with database.transaction() as connection:
        await connection.execute(
            "UPDATE workers SET stopped_at = now(), lease_expires_at = now() WHERE id = $1",
            worker_id,
        )
        rows = await connection.fetch(
            """
            UPDATE jobs SET state = 'queued', lease_owner = NULL, releases = releases + 1
            WHERE lease_owner = $1 AND state = 'running'
            RETURNING base_model_id, adapter_version_id, tenant_id
            """,
            worker_id,
        )
        await _disown_ended(connection, worker_id)
        await ensure_waiting(connection, {Line(*row.values()) for row in rows})


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


async def rescue_lost(
    database: Database, lease_seconds: float, max_attempts: int
) -> dict[int, int]:
    """Take the jobs of workers whose lease ran out, one worker per transaction.

    Nobody is rescued until Postgres itself has been up for a full lease: a restart must not turn
    every worker that could not renew meanwhile into a lost one.

    Returns:
        How many jobs were freed, by worker id.
    """
    freed: dict[int, int] = {}
    while True:
        async with database.transaction() as connection:
            worker_id = await connection.fetchval(
                """
                UPDATE workers SET lost_at = now() WHERE id = (
                    SELECT id FROM workers
                    WHERE lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at < now()
                      AND pg_postmaster_start_time() < now() - make_interval(secs => $1)
                    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
                RETURNING id
                """,
                lease_seconds,
            )
            if worker_id is None:
                return freed
            freed[worker_id] = await _free_jobs(connection, worker_id, max_attempts)


async def _free_jobs(connection: Connection, worker_id: int, max_attempts: int) -> int:
    """Queue a lost worker's running jobs again; those out of tries fail. Returns how many."""
    rows = await connection.fetch(
        """
        WITH freed AS (
            UPDATE jobs SET
                failures = failures + 1,
                lease_owner = NULL,
                state = CASE WHEN failures + 1 < $2 THEN 'queued' ELSE 'failed' END,
                finished_at = CASE WHEN failures + 1 < $2 THEN NULL ELSE now() END
            WHERE lease_owner = $1 AND state = 'running'
            RETURNING id, state, base_model_id, adapter_version_id, tenant_id
        ), failed AS (
            INSERT INTO job_outputs (tenant_id, job_id, error_code, error_message)
            SELECT tenant_id, id, 'attempts_exhausted',
                   format('its worker was lost %s times while it ran', $2::int)
            FROM freed WHERE state = 'failed'
        )
        SELECT state, base_model_id, adapter_version_id, tenant_id FROM freed
        """,
        worker_id,
        max_attempts,
    )
    await _disown_ended(connection, worker_id)
    lines = {
        Line(row["base_model_id"], row["adapter_version_id"], row["tenant_id"])
        for row in rows
        if row["state"] == "queued"
    }
    await ensure_waiting(connection, lines)
    return len(rows)


async def _disown_ended(connection: Connection, worker_id: int) -> None:
    """Nobody is left to abort a gone worker's cancelled and expired jobs."""
    await connection.execute(
        "UPDATE jobs SET lease_owner = NULL"
        " WHERE lease_owner = $1 AND state IN ('cancelled', 'expired')",
        worker_id,
    )
