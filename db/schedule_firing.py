"""Firing: a run that is due becomes a batch, in one transaction.

A run is locked from its claim to its end, and leaves `pending` together with the commit of its
batch: a steward that dies on the way leaves it as it was, for any other. Runs of one schedule start
in order, unless they may overlap.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from core.errors import LorryError, ModelNotFound, Unavailable
from core.ids import IdPrefix, format_id, new_id
from core.schedule_request import batch_request
from core.schedule_rules import Overlap
from db import batch_creation, batches
from db.database import Connection, Database
from db.jobs import IdempotencyUse
from db.registry import resolve
from db.schedule_outcomes import Failure, fail

#: Runs of one transaction.
FIRE_LIMIT: Final = 100
#: Runs of one schedule that wait for an earlier one; those beyond are skipped.
MOST_QUEUED: Final = 100


@dataclass(slots=True)
class _Fired:
    """What becomes of the runs of one transaction."""

    started: list[tuple[UUID, UUID]] = field(default_factory=list)
    skipped: list[UUID] = field(default_factory=list)
    queued: list[UUID] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)


async def fire(database: Database, *, now: datetime | None = None, limit: int = FIRE_LIMIT) -> int:
    """Start runs that are due, for every tenant: each becomes a batch, or the reason why not.

    Args:
        now: for tests; Postgres's own time otherwise.

    Returns:
        How many runs were handled; 0 where none is left that can be.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(_CLAIM, now, limit)
        if not rows:
            return 0
        fired = _Fired()
        known: dict[tuple[int, str], str | None] = {}
        for row in rows:
            if not _waits(row, fired):
                await _start(connection, row, fired, known)
        await _write(connection, fired, now)
    return len(rows)


# What is open is read in the claim's own snapshot. Where runs may not overlap, an earlier one that
# is `pending` there keeps the later ones from being claimed, and one that is not has its batch.
_CLAIM = """
SELECT r.id AS run_id, r.tenant_id, r.schedule_id,
       s.overlap, s.input_file_id, s.endpoint, s.model, s.priority, s.completion_window,
       s.window_seconds, s.skip_invalid, s.output_expires_seconds, s.webhook_url,
       s.metadata::text AS metadata_text, f.purpose,
       coalesce(f.state = 'ready'
                AND (f.expires_at IS NULL OR f.expires_at > now()), false) AS has_file,
       open.batch_ids, open.queued, open.queued_before
FROM schedule_runs r
JOIN schedules s ON s.id = r.schedule_id
LEFT JOIN files f ON f.tenant_id = r.tenant_id AND f.id = s.input_file_id
CROSS JOIN LATERAL (
    SELECT array_agg(b.public_id) FILTER (WHERE b.id IS NOT NULL) AS batch_ids,
           count(*) FILTER (WHERE o.state = 'queued') AS queued,
           count(*) FILTER (WHERE o.state = 'queued'
                            AND (o.due_at, o.id) < (r.due_at, r.id)) AS queued_before
    FROM schedule_runs o
    LEFT JOIN batches b ON b.tenant_id = o.tenant_id AND b.public_id = o.batch_id
        AND b.status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
    WHERE s.overlap <> 'allow' AND o.schedule_id = r.schedule_id
      AND o.state IN ('queued', 'started')
) open
WHERE r.state = 'pending' AND r.due_at <= coalesce($1::timestamptz, now())
  AND (s.overlap = 'allow' OR NOT EXISTS (
      SELECT FROM schedule_runs p
      WHERE p.schedule_id = r.schedule_id AND p.state = 'pending'
        AND (p.due_at, p.id) < (r.due_at, r.id)))
ORDER BY r.due_at, r.id LIMIT $2
FOR NO KEY UPDATE OF r SKIP LOCKED
"""


def _waits(row: "asyncpg.Record", fired: _Fired) -> bool:
    """Whether an earlier run keeps this one from starting; if so, what becomes of it is noted."""
    if row["overlap"] == Overlap.QUEUE and (row["batch_ids"] or row["queued_before"]):
        full = row["queued"] >= MOST_QUEUED
        (fired.skipped if full else fired.queued).append(row["run_id"])
        return True
    if row["overlap"] == Overlap.SKIP and row["batch_ids"]:
        fired.skipped.append(row["run_id"])
        return True
    return False


async def _start(
    connection: Connection,
    row: "asyncpg.Record",
    fired: _Fired,
    known: dict[tuple[int, str], str | None],
) -> None:
    problem = _file_problem(row) or await _model_problem(connection, row, known)
    if problem is None:
        try:
            async with connection.transaction():  # a savepoint: one bad run fails alone
                fired.started.append((row["run_id"], await _make_batch(connection, row)))
                if row["overlap"] == Overlap.CANCEL_PREVIOUS and row["batch_ids"]:
                    await batches.cancel_open(connection, row["tenant_id"], row["batch_ids"])
            return
        except Unavailable:
            raise
        except (LorryError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
            fired.started = [each for each in fired.started if each[0] != row["run_id"]]
            problem = (getattr(error, "code", "internal_error"), str(error)[:1000])
    fired.failed.append(
        Failure(row["run_id"], row["schedule_id"], row["tenant_id"], row["webhook_url"], *problem)
    )


def _file_problem(row: "asyncpg.Record") -> tuple[str, str] | None:
    shown = format_id(IdPrefix.FILE, row["input_file_id"])
    if not row["has_file"]:
        return (
            "file_not_found",
            f"the input file {shown} was deleted or has expired; give the schedule another",
        )
    if row["purpose"] != "batch":
        return (
            "invalid_request",
            f"the file {shown} has the purpose {row['purpose']!r}, not 'batch'",
        )
    return None


async def _model_problem(
    connection: Connection, row: "asyncpg.Record", known: dict[tuple[int, str], str | None]
) -> tuple[str, str] | None:
    """Why the schedule's model cannot be used; each name is looked up once."""
    if row["model"] is None:
        return None
    key = (row["tenant_id"], row["model"])
    if key not in known:
        try:
            await resolve(connection, *key)
            known[key] = None
        except ModelNotFound as error:
            known[key] = error.message
    message = known[key]
    return None if message is None else (ModelNotFound.code, message)


async def _make_batch(connection: Connection, row: "asyncpg.Record") -> UUID:
    """The run's batch, under the run's id as its idempotency key; returns the batch's id."""
    batch_id = new_id()
    request = batch_request(dict(row))
    key = format_id(IdPrefix.RUN, row["run_id"])
    use = IdempotencyUse(batch_creation.ROUTE, key, request.fingerprint())
    if not await batch_creation.take_key(connection, row["tenant_id"], use, batch_id):
        raise LorryError(f"the idempotency key {key} is taken by a request to {use.route}")
    return await batch_creation.create_in(connection, row["tenant_id"], request, batch_id)


async def _write(connection: Connection, fired: _Fired, now: datetime | None) -> None:
    # by the clock as it is now: what this transaction took is a part of the lateness
    now = now or await connection.fetchval("SELECT clock_timestamp()")
    assert now is not None
    if fired.started:
        runs, made = zip(*fired.started, strict=True)
        await connection.execute(_STARTED, list(runs), list(made), now)
    if fired.skipped:
        await connection.execute(_SKIPPED, fired.skipped, now)
    if fired.queued:
        await connection.execute(_QUEUED, fired.queued)
    if fired.failed:
        await fail(connection, fired.failed, now)


_STARTED = """
UPDATE schedule_runs r SET state = 'started', batch_id = n.batch_id, started_at = $3
FROM unnest($1::uuid[], $2::uuid[]) AS n(id, batch_id)
WHERE r.id = n.id AND r.state = 'pending'
"""
_SKIPPED = """
UPDATE schedule_runs SET state = 'skipped', reason = 'overlap', finished_at = $2
WHERE id = ANY($1::uuid[]) AND state = 'pending'
"""
_QUEUED = (
    "UPDATE schedule_runs SET state = 'queued' WHERE id = ANY($1::uuid[]) AND state = 'pending'"
)
