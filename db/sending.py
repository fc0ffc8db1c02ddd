"""Sending what is owed: what waits, claiming it, and what came of it. Across tenants: a steward's.

A claim is a lease on each delivery (`due_at` is when it ends) and raises `attempt`, the fence. No
transaction is open while anything is sent. A sender that dies leaves leases that run out: what it
had sent already is sent once more, under the same webhook-id.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, NamedTuple
from uuid import UUID

from core.ids import IdPrefix, format_id
from core.webhook_events import EventType
from core.webhook_retry import CIRCUIT_FAILURES, GIVEN_UP_SECONDS, LONGEST_BLOCK_SECONDS
from db.database import Connection, Database
from db.deliveries import owe
from db.webhooks import ensure_default_secret

#: Lines that one look returns, those that have waited longest.
MOST_LINES: Final = 1000


class WaitingLine(NamedTuple):
    """A line with deliveries that are due. `failures` in a row, of the latest ones."""

    line: int
    tenant_id: int
    failures: int


class Grant(NamedTuple):
    """How many deliveries of a line may be claimed; a probe is one, of a line held back."""

    line: int
    room: int
    probe: bool = False


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """A delivery to be sent.

    Args:
        url: where to; None where the endpoint is gone or disabled.
        counts: JSON, or None.
        failures: since it is owed.
        age_seconds: how long it is owed.
        secrets: the newest first, at least one where there is a URL.
    """

    id: UUID
    attempt: int
    tenant_id: int
    endpoint_id: UUID | None
    url: str | None
    line: int
    event_id: UUID
    type: str
    subject: str
    told: str
    counts: str | None
    link: str | None
    created_at: datetime
    failures: int
    age_seconds: float
    secrets: list[bytes]


class Outcome(NamedTuple):
    """What came of one attempt.

    Args:
        state: `delivered`, `failed` for good, or `pending`: tried again after `delay_seconds`.
        status: HTTP's, or None with an `error`.
        pause_seconds: how long the whole line is to be left alone, as its receiver asked.
        gone: the receiver answered 410: its endpoint is disabled.
    """

    id: UUID
    attempt: int
    line: int
    endpoint_id: UUID | None
    state: Literal["delivered", "failed", "pending"]
    delay_seconds: float | None
    started_at: datetime
    seconds: float
    status: int | None = None
    error: str | None = None
    response: str | None = None
    pause_seconds: float | None = None
    gone: bool = False

    @property
    def counts_against_line(self) -> bool:
        """Whether the receiver failed; that its endpoint is disabled is not its failure."""
        return self.state != "delivered" and self.error != "endpoint_disabled"


async def look(database: Database) -> list[WaitingLine]:
    """Every line with a delivery that is due and that is not held back, oldest first.

    Walks from line to line by the index: its cost grows with the lines that have something
    pending, not with what is pending.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(_LOOK, MOST_LINES)
    return [WaitingLine(*row) for row in rows]


_LOOK = """
WITH RECURSIVE pending AS (
    (SELECT line, due_at, tenant_id FROM deliveries WHERE state = 'pending'
     ORDER BY line, due_at LIMIT 1)
    UNION ALL
    SELECT next.* FROM pending CROSS JOIN LATERAL (
        SELECT line, due_at, tenant_id FROM deliveries
        WHERE state = 'pending' AND line > pending.line
        ORDER BY line, due_at LIMIT 1) next
)
SELECT p.line, p.tenant_id, coalesce(c.failures, 0)
FROM pending p LEFT JOIN webhook_circuits c ON c.line = p.line
WHERE p.due_at <= now() AND (c.blocked_until IS NULL OR c.blocked_until <= now())
ORDER BY p.due_at LIMIT $1
"""


async def claim(
    database: Database, grants: Sequence[Grant], lease_seconds: float
) -> list[ClaimedDelivery]:
    """Take deliveries that are due, of each line as many as granted.

    Any number of senders may claim at once: each takes others. Of a line held back one sender
    alone takes its probe.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(
            _CLAIM,
            [grant.line for grant in grants],
            [grant.room for grant in grants],
            [grant.probe for grant in grants],
            lease_seconds,
        )
        claimed = [ClaimedDelivery(**dict(row)) for row in rows]
        for delivery in claimed:
            if delivery.url is not None and not delivery.secrets:
                secret = await ensure_default_secret(connection, delivery.tenant_id)
                delivery.secrets.append(secret)
    return claimed


_CLAIM = """
WITH granted AS MATERIALIZED (
    SELECT * FROM unnest($1::bigint[], $2::int[], $3::bool[]) AS g(line, room, probe)
), probed AS MATERIALIZED (
    UPDATE webhook_circuits c SET blocked_until = now() + make_interval(secs => $4)
    FROM granted g
    WHERE g.probe AND c.line = g.line AND (c.blocked_until IS NULL OR c.blocked_until <= now())
    RETURNING c.line
), open AS MATERIALIZED (
    SELECT line, room FROM granted g
    WHERE NOT probe OR EXISTS (SELECT FROM probed WHERE probed.line = g.line)
), due AS MATERIALIZED (
    SELECT d.row FROM open CROSS JOIN LATERAL (
        SELECT ctid AS row FROM deliveries
        WHERE state = 'pending' AND line = open.line AND due_at <= now()
        ORDER BY due_at LIMIT open.room
        FOR NO KEY UPDATE SKIP LOCKED) d
), taken AS (
    UPDATE deliveries SET due_at = now() + make_interval(secs => $4), attempt = attempt + 1
    WHERE ctid = ANY(ARRAY(SELECT row FROM due))
    RETURNING *
)
SELECT t.id, t.attempt, t.tenant_id, t.endpoint_id, coalesce(t.url, e.url) AS url, t.line,
       t.event_id, t.type, t.subject, t.told, t.counts::text AS counts, t.link, t.created_at,
       t.failures, extract(epoch FROM now() - t.owed_at)::float8 AS age_seconds,
       ARRAY(SELECT s.secret FROM webhook_secrets s
             WHERE s.tenant_id = t.tenant_id AND s.endpoint_id IS NOT DISTINCT FROM t.endpoint_id
               AND (s.expires_at IS NULL OR s.expires_at > now())
             ORDER BY s.expires_at DESC NULLS FIRST) AS secrets
FROM taken t LEFT JOIN webhook_endpoints e
     ON e.id = t.endpoint_id AND e.tenant_id = t.tenant_id AND e.disabled_at IS NULL
"""


async def record(
    database: Database, outcomes: Sequence[Outcome], failing: Collection[int]
) -> list[UUID]:
    """Write down what came of attempts, where the fence holds, in one transaction.

    Args:
        failing: lines that are known to have failed lately: a success clears them.

    Returns:
        Endpoints that were disabled by it.
    """
    async with database.transaction() as connection:
        await connection.execute(
            _RECORD,
            [o.id for o in outcomes],
            [o.attempt for o in outcomes],
            [o.state for o in outcomes],
            [o.delay_seconds for o in outcomes],
            [o.started_at for o in outcomes],
            [o.seconds for o in outcomes],
            [o.status for o in outcomes],
            [o.error for o in outcomes],
            [o.response for o in outcomes],
        )
        return await _record_lines(connection, outcomes, failing)


# The rows are locked in the order of their ids: no two statements wait for each other in a circle.
_RECORD = """
WITH result AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::int[], $3::text[], $4::float8[], $5::timestamptz[],
                         $6::float8[], $7::int[], $8::text[], $9::text[])
        AS r(id, attempt, state, delay, started_at, seconds, status, error, response)
), fenced AS MATERIALIZED (
    SELECT id FROM deliveries WHERE id = ANY($1::uuid[]) AND state = 'pending'
    ORDER BY id FOR NO KEY UPDATE
), recorded AS (
    UPDATE deliveries d SET
        state = r.state,
        failures = d.failures + CASE WHEN r.state = 'delivered' THEN 0 ELSE 1 END,
        due_at = CASE WHEN r.state = 'pending' THEN now() + make_interval(secs => r.delay) END,
        finished_at = CASE WHEN r.state <> 'pending' THEN now() END,
        last_status = r.status, last_error = r.error
    FROM result r
    WHERE d.id = ANY(ARRAY(SELECT id FROM fenced)) AND d.id = r.id AND d.attempt = r.attempt
    RETURNING d.id, d.attempt, d.tenant_id, r.started_at, r.seconds, r.status, r.error, r.response
)
INSERT INTO delivery_attempts (delivery_id, attempt, tenant_id, started_at, seconds, status, error,
                               response)
SELECT id, attempt, tenant_id, started_at, seconds, status, error, response FROM recorded
"""


async def _record_lines(
    connection: Connection, outcomes: Sequence[Outcome], failing: Collection[int]
) -> list[UUID]:
    """What the outcomes, in the order in which they came, say of their lines."""
    in_a_row: dict[int, int] = {}
    cleared: set[int] = set()
    pauses: dict[int, float] = {}
    endpoints: dict[int, UUID] = {}
    for outcome in outcomes:
        line = outcome.line
        if outcome.endpoint_id is not None:
            endpoints[line] = outcome.endpoint_id
        if outcome.state == "delivered":
            in_a_row.pop(line, None)
            if line in failing:
                cleared.add(line)
        elif outcome.counts_against_line:
            in_a_row[line] = in_a_row.get(line, 0) + 1
            pauses[line] = max(pauses.get(line, 0.0), outcome.pause_seconds or 0.0)
    if cleared:
        await connection.execute(_CLEAR, sorted(cleared))
    lines = sorted(in_a_row)
    long_failing: list[int] = []
    if lines:
        rows = await connection.fetch(
            _FAIL_LINES,
            lines,
            [in_a_row[line] for line in lines],
            [pauses[line] for line in lines],
            CIRCUIT_FAILURES,
            LONGEST_BLOCK_SECONDS,
            GIVEN_UP_SECONDS,
        )
        long_failing = [row["line"] for row in rows if row["too_long"]]
    gone = {o.endpoint_id for o in outcomes if o.gone and o.endpoint_id is not None}
    failed = {endpoints[line] for line in long_failing if line in endpoints} - gone
    disabled = []
    for reason, ids in (("gone", gone), ("failing", failed)):
        if ids:
            disabled += await _disable(connection, ids, reason)
    return disabled


_CLEAR = "DELETE FROM webhook_circuits WHERE line = ANY($1::bigint[])"

# Held back for a second, then two, four … and from then on tried with one delivery at a time.
_FAIL_LINES = """
INSERT INTO webhook_circuits AS c (line, failures, blocked_until)
SELECT line, failures,
       CASE WHEN failures >= $4 OR pause > 0 THEN now() + make_interval(
           secs => greatest(pause, CASE WHEN failures >= $4 THEN 1 ELSE 0 END)) END
FROM unnest($1::bigint[], $2::int[], $3::float8[]) AS f(line, failures, pause)
ON CONFLICT (line) DO UPDATE SET
    failures = c.failures + excluded.failures,
    failed_at = now(),
    blocked_until = greatest(
        excluded.blocked_until,
        CASE WHEN c.failures + excluded.failures >= $4
             THEN now() + make_interval(secs => least($5, power(
                 2, least(c.failures + excluded.failures - $4, 10)))) END)
RETURNING c.line, failing_since < now() - make_interval(secs => $6) AS too_long
"""


async def _disable(connection: Connection, ids: Collection[UUID], reason: str) -> list[UUID]:
    """Disable endpoints, and tell the tenants' other ones."""
    rows = await connection.fetch(
        """
        UPDATE webhook_endpoints SET disabled_at = now(), disabled_reason = $2
        WHERE id = ANY($1::uuid[]) AND disabled_at IS NULL
        RETURNING id, tenant_id
        """,
        sorted(ids),
        reason,
    )
    for row in rows:
        subject = format_id(IdPrefix.WEBHOOK, row["id"])
        await owe(connection, row["tenant_id"], EventType.WEBHOOK_DISABLED, subject, "disabled")
    return [row["id"] for row in rows]


async def release(database: Database, claimed: Sequence[ClaimedDelivery]) -> None:
    """Let others send at once what a stopping sender has not finished."""
    async with database.connection() as connection:
        await connection.execute(
            """
            UPDATE deliveries d SET due_at = now()
            FROM unnest($1::uuid[], $2::int[]) AS r(id, attempt)
            WHERE d.id = r.id AND d.attempt = r.attempt AND d.state = 'pending'
            """,
            [delivery.id for delivery in claimed],
            [delivery.attempt for delivery in claimed],
        )
