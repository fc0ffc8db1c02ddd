"""What is owed to webhooks: written in the transaction of the event that it tells of.

Jobs owe in the statement that finishes them (db/finishing.py); all else by `owe`. A steward sends
what is owed (db/sending.py).
"""

from collections.abc import Mapping
from typing import Final
from uuid import UUID

import orjson

from core.webhook_events import TEST_EVENT, EventType
from db.database import Connection

#: A delivery's line, as SQL: the endpoint, or the tenant and the URL without its query.
ENDPOINT_LINE: Final = "hashtextextended({endpoint}::text, 0)"
URL_LINE: Final = "hashtextextended({tenant} || ' ' || split_part({url}, '?', 1), 0)"


async def owe(
    connection: Connection,
    tenant_id: int,
    event: EventType,
    subject_id: str,
    state: str,
    webhook_url: str | None = None,
    counts: Mapping[str, int] | None = None,
    link: str | None = None,
) -> None:
    """Owe an event to every endpoint of the tenant that listens to it, and to `webhook_url`.

    Call it in the transaction that made the event happen: then both are there, or neither.

    Args:
        connection: in that transaction.
        subject_id: the outside id of what it happened to, such as `batch_…` or `sql@2`.
        state: its state (a batch's status) now.
        webhook_url: what the subject itself named, if it did; checked when it was taken.
        counts: of a batch.
        link: where to read more, where the subject's id does not tell.
    """
    await connection.execute(
        _OWE,
        tenant_id,
        event,
        subject_id,
        state,
        webhook_url,
        None if counts is None else orjson.dumps(counts).decode(),
        link,
    )


_OWE = f"""
WITH receiver AS (
    SELECT id, NULL::text AS url, {ENDPOINT_LINE.format(endpoint="id")} AS line
    FROM webhook_endpoints
    WHERE tenant_id = $1 AND disabled_at IS NULL AND $2 = ANY(events)
    UNION ALL
    SELECT NULL, $5, {URL_LINE.format(tenant="$1::int", url="$5")} WHERE $5 IS NOT NULL
), event AS MATERIALIZED (
    SELECT uuidv7() AS id
)
INSERT INTO deliveries (tenant_id, endpoint_id, url, line, event_id, type, subject, told, counts,
                        link)
SELECT $1, receiver.id, receiver.url, receiver.line, event.id, $2::text, $3, $4, $6::text::json, $7
FROM receiver, event
"""


async def owe_test(
    connection: Connection, tenant_id: int, endpoint_id: UUID, subject_id: str
) -> UUID | None:
    """Owe a test event to one endpoint, whatever it listens to; returns the delivery.

    None where the tenant has no such endpoint, or it is disabled.
    """
    found: UUID | None = await connection.fetchval(
        f"""
        WITH owed AS (
            INSERT INTO deliveries (tenant_id, endpoint_id, line, event_id, type, subject, told)
            SELECT tenant_id, id, {ENDPOINT_LINE.format(endpoint="id")}, uuidv7(), $3, $4, 'test'
            FROM webhook_endpoints WHERE tenant_id = $1 AND id = $2 AND disabled_at IS NULL
            RETURNING id, line
        ), unblocked AS (  -- its owner tries it out: now
            UPDATE webhook_circuits SET blocked_until = NULL WHERE line IN (SELECT line FROM owed)
        )
        SELECT id FROM owed
        """,
        tenant_id,
        endpoint_id,
        TEST_EVENT,
        subject_id,
    )
    return found
