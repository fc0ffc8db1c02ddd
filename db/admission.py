"""Admission of adapter versions by workers: `validating` → `ready | rejected`, fenced like jobs.

A worker claims a version, probes it, and records what came of it. `probe_worker` is its lease, by
the lease on the worker's own row; `probe_attempt` is the fence. What a lost worker had claimed is
claimed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import orjson

from core.adapter_rules import BaseFacts, Finding
from core.errors import ErrorCode
from core.webhook_events import EventType
from db.database import Connection, Database
from db.deliveries import owe
from db.finishing import CONSEQUENCES, FINISHED, NO_TOKENS
from db.registry import base_facts, reasons
from db.waiting import Line, drop_if_empty

#: An engine that dies of a probe so often rejects the adapter.
MOST_DEATHS: Final = 2
#: So does a worker that is lost with it: alone it proves little, machines are lost for much else.
MOST_LOSSES: Final = 3


@dataclass(frozen=True, slots=True)
class ProbeClaim:
    """A version that this worker is to probe.

    Args:
        version_id: the version, as `lora_int_id`.
        attempt: the fence.
        partition: whose doorbell rings when it is ready.
        deaths: engines that died while they probed it.
        losses: workers that were lost meanwhile.
    """

    version_id: int
    attempt: int
    tenant_id: int
    name: str
    version: int
    partition: int
    deaths: int
    losses: int
    base: BaseFacts

    @property
    def model(self) -> str:
        """As its owner calls it, `sql@3`."""
        return f"{self.name}@{self.version}"


async def claim_probe(database: Database, worker_id: int, base_model_id: int) -> ProbeClaim | None:
    """Take the version of this base that has waited longest for its probe, if there is one.

    Of a worker that stopped or was lost it is taken over; nobody takes it from one that lives.
    """
    async with database.connection() as connection:
        row = await connection.fetchrow(_CLAIM, worker_id, base_model_id)
        if row is None:
            return None
        base = await base_facts(connection, base_model_id)
    return ProbeClaim(**dict(row), base=base)


_CLAIM = """
WITH due AS (
    SELECT v.id, former.lost_at IS NOT NULL AS lost
    FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id
    LEFT JOIN workers former ON former.id = v.probe_worker
    WHERE v.state = 'validating' AND a.base_model_id = $2
      AND (v.probe_worker IS NULL OR former.id IS NULL
           OR former.lost_at IS NOT NULL OR former.stopped_at IS NOT NULL)
    ORDER BY v.id LIMIT 1
    FOR NO KEY UPDATE OF v SKIP LOCKED
), leased AS MATERIALIZED (
    SELECT id FROM workers
    WHERE id = $1 AND lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at > now()
    FOR KEY SHARE
)
UPDATE adapter_versions v SET probe_worker = $1, probe_attempt = probe_attempt + 1,
                              probe_losses = probe_losses + due.lost::int
FROM due, adapters a
WHERE v.id = due.id AND a.id = v.adapter_id AND EXISTS (SELECT FROM leased)
RETURNING v.id AS version_id, v.probe_attempt AS attempt, v.tenant_id, a.name, v.version,
          a.partition, v.probe_deaths AS deaths, v.probe_losses AS losses
"""

# What every record of a probe requires; parameters 1 to 3.
_FENCE = "id = $1 AND probe_attempt = $2 AND probe_worker = $3 AND state = 'validating'"


async def admit(
    database: Database, worker_id: int, claim: ProbeClaim, probe: dict[str, Any]
) -> bool:
    """The version is ready, and current unless a newer one is or a rollback said otherwise.

    Returns:
        False where the fence does not hold: another worker has it, or it was added anew.
    """
    async with database.transaction() as connection:
        # the adapter first, as a rollback and a removal lock it
        await connection.execute(
            "SELECT FROM adapters WHERE id = (SELECT adapter_id FROM adapter_versions"
            " WHERE id = $1) FOR NO KEY UPDATE",
            claim.version_id,
        )
        adapter_id: UUID | None = await connection.fetchval(
            f"""
            UPDATE adapter_versions SET state = 'ready', probe = $4::text::json,
                                        validated_at = now(), probe_worker = NULL
            WHERE {_FENCE} RETURNING adapter_id
            """,
            claim.version_id,
            claim.attempt,
            worker_id,
            orjson.dumps(probe).decode(),
        )
        if adapter_id is None:
            return False
        await connection.execute(
            """
            UPDATE adapters SET current_version = $2
            WHERE id = $1 AND retired_at IS NULL AND EXISTS (
                SELECT FROM adapter_versions
                WHERE adapter_id = $1 AND version = $2 AND retired_at IS NULL)
              AND $2 > greatest(coalesce(current_version, 0), coalesce(held_below, 0))
            """,
            adapter_id,
            claim.version,
        )
        await owe(connection, claim.tenant_id, EventType.ADAPTER_READY, claim.model, "ready")
    return True


async def reject(
    database: Database,
    worker_id: int,
    claim: ProbeClaim,
    findings: Sequence[Finding],
    probe: dict[str, Any] | None = None,
) -> bool:
    """The version cannot be served; `fail_rejected` then fails its jobs. False as `admit`."""
    async with database.transaction() as connection:
        return await _reject(connection, worker_id, claim, findings, probe)


async def _reject(
    connection: Connection,
    worker_id: int,
    claim: ProbeClaim,
    findings: Sequence[Finding],
    probe: dict[str, Any] | None,
) -> bool:
    told = [{"code": finding.code, "message": finding.message} for finding in findings]
    done: bool | None = await connection.fetchval(
        f"""
        UPDATE adapter_versions SET state = 'rejected', findings = $4::text::json,
                                    probe = $5::text::json, validated_at = now(),
                                    probe_worker = NULL
        WHERE {_FENCE} RETURNING true
        """,
        claim.version_id,
        claim.attempt,
        worker_id,
        orjson.dumps(told).decode(),
        probe and orjson.dumps(probe).decode(),
    )
    if done:
        await owe(connection, claim.tenant_id, EventType.ADAPTER_REJECTED, claim.model, "rejected")
    return bool(done)


async def give_back(database: Database, worker_id: int, claim: ProbeClaim) -> None:
    """Let another worker, or this one later, probe the version; it costs nothing."""
    async with database.connection() as connection:
        await connection.execute(
            f"UPDATE adapter_versions SET probe_worker = NULL WHERE {_FENCE}",
            claim.version_id,
            claim.attempt,
            worker_id,
        )


async def engine_died(database: Database, worker_id: int, claim: ProbeClaim, reason: str) -> bool:
    """The engine died during the probe: another engine tries once more, then it is rejected.

    Returns:
        Whether the version is rejected now.
    """
    async with database.transaction() as connection:
        deaths = await connection.fetchval(
            f"""
            UPDATE adapter_versions SET probe_deaths = probe_deaths + 1
            WHERE {_FENCE} RETURNING probe_deaths
            """,
            claim.version_id,
            claim.attempt,
            worker_id,
        )
        if deaths is not None and deaths >= MOST_DEATHS:
            return await _reject(connection, worker_id, claim, [killed_engine(reason)], None)
        await connection.execute(
            f"UPDATE adapter_versions SET probe_worker = NULL WHERE {_FENCE}",
            claim.version_id,
            claim.attempt,
            worker_id,
        )
    return False


def killed_engine(reason: str) -> Finding:
    """Why an adapter that engines died of is rejected."""
    return Finding(
        "killed_engine",
        f"it killed the engine: {MOST_DEATHS} engines died while they loaded and probed it "
        f"({reason}). Save it again from its training run; the worker's log has vLLM's own words",
    )


def lost_workers(losses: int) -> Finding:
    """Why an adapter that workers were lost with is rejected."""
    return Finding(
        "lost_workers",
        f"{losses} workers were lost while they probed it: look at their logs (out of memory?), "
        "then add it again",
    )


async def fail_rejected(database: Database, limit: int = 1000) -> int:
    """Fail queued jobs of rejected versions, at most `limit`; returns how many.

    By the worker that rejected, at once, and by the steward, since that worker may have died and
    jobs may have been on their way to the queue.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT w.base_model_id, w.adapter_version_id, w.tenant_id, a.name, v.version, v.findings
            FROM waiting_adapters w JOIN adapter_versions v ON v.id = w.adapter_version_id
            JOIN adapters a ON a.id = v.adapter_id
            WHERE v.state = 'rejected' ORDER BY 1, 2, 3 LIMIT 100
            """
        )
        failed = 0
        for row in rows:
            message = f"adapter {row['name']}@{row['version']} was rejected: "
            failed += await connection.fetchval(
                _FAIL,
                row["base_model_id"],
                row["adapter_version_id"],
                row["tenant_id"],
                limit,
                message + reasons(row["findings"]),
            )
    for row in rows:
        async with database.transaction() as connection:
            line = Line(row["base_model_id"], row["adapter_version_id"], row["tenant_id"])
            await drop_if_empty(connection, line)
    return failed


_FAIL = f"""
WITH due AS MATERIALIZED (
    SELECT j.id FROM jobs j JOIN adapter_versions v ON v.id = j.adapter_version_id
    WHERE j.base_model_id = $1 AND j.adapter_version_id = $2 AND j.tenant_id = $3
      AND j.state = 'queued' AND v.state = 'rejected'
    ORDER BY j.place LIMIT $4
    FOR NO KEY UPDATE OF j SKIP LOCKED
), finished AS (
    UPDATE jobs SET state = 'failed', finished_at = now()
    WHERE id = ANY(ARRAY(SELECT id FROM due)) AND state = 'queued'
    RETURNING {FINISHED}, {NO_TOKENS}
), answered AS (
    INSERT INTO job_outputs (tenant_id, job_id, error_code, error_message)
    SELECT tenant_id, id, '{ErrorCode.ADAPTER_REJECTED.value}', $5 FROM finished
){CONSEQUENCES}
SELECT count(*)::int FROM finished
"""
