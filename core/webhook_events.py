"""Events that webhooks tell of, and the one envelope that all of them come in.

An event is thin: it says what happened to what, and where to read more. Generated text never
travels in it.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

import orjson

from core.ids import IdPrefix, format_id

#: What receivers may count on: a body is smaller.
LARGEST_BODY_BYTES: Final = 20_000


class EventType(StrEnum):
    """What an endpoint can ask to be told of."""

    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    JOB_EXPIRED = "job.expired"
    BATCH_COMPLETED = "batch.completed"
    BATCH_FAILED = "batch.failed"
    BATCH_EXPIRED = "batch.expired"
    BATCH_CANCELLED = "batch.cancelled"
    ADAPTER_READY = "adapter.ready"
    ADAPTER_REJECTED = "adapter.rejected"
    SCHEDULE_RUN_FAILED = "schedule.run_failed"
    #: an endpoint was disabled since it failed for days, or is gone: told to the tenant's others
    WEBHOOK_DISABLED = "webhook.disabled"


#: What `POST /v1/webhooks/{id}/test` sends; nobody subscribes to it.
TEST_EVENT: Final = "webhook.test"

_LINKS: Final = {
    "job": "/v1/jobs/{}",
    "batch": "/v1/batches/{}",
    "adapter": "/v1/adapters/{}/versions/{}",
    "schedule": "/v1/schedules/{}",
    "webhook": "/v1/webhooks/{}",
}


def envelope(
    *,
    event_id: UUID,
    event: str,
    created_at: datetime,
    subject: str,
    told: str,
    counts: Mapping[str, int] | None = None,
    link: str | None = None,
    public_url: str = "",
) -> bytes:
    """The body of an event: the same bytes at every attempt.

    Args:
        event_id: a UUIDv7; its time part is the event's sequence number.
        event: its type, such as `job.succeeded`.
        created_at: when it happened, aware.
        subject: the outside id of what it happened to, such as `job_…`.
        told: the state (a batch's status) that it has now.
        counts: of a batch.
        link: a path where to read more; by default that of the subject.
        public_url: the API's address, put before the link; empty leaves it a path.
    """
    kind = event.partition(".")[0]
    said = "status" if kind == "batch" else "state"
    if link is None:  # an adapter's version is called sql@2
        link = _LINKS[kind].format(*subject.split("@"))
    return orjson.dumps(
        {
            "id": format_id(IdPrefix.EVENT, event_id),
            "object": "event",
            "type": event,
            "created_at": int(created_at.timestamp()),
            "timestamp": created_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "sequence": sequence(event_id),
            "data": {
                "id": subject,
                said: told,
                "counts": None if counts is None else dict(counts),
                "link": public_url.rstrip("/") + link,
            },
        }
    )


#: Sequence numbers count from 2024 on: they fit a JSON number (2**53) until the year 2093.
_SEQUENCE_EPOCH_MS: Final = 1_704_067_200_000


def sequence(event_id: UUID) -> int:
    """A number that rises with the time of events, in steps of 1/4096 ms.

    Taken from the UUIDv7 (Postgres writes the fraction of the millisecond behind the milliseconds),
    so that it tells nobody how many events other tenants have.
    """
    milliseconds, fraction = event_id.int >> 80, event_id.int >> 64 & 0xFFF
    return max(0, milliseconds - _SEQUENCE_EPOCH_MS) << 12 | fraction
