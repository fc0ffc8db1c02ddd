"""Ids: UUIDv7 inside, a readable prefix and 32 hex digits outside (`job_0192…`).

UUIDv7 (RFC 9562) rises with time, so ids page in order of creation and append to their index.
"""

from enum import StrEnum
from uuid import UUID

import uuid_utils.compat


class IdPrefix(StrEnum):
    """What kind of thing an outside id names."""

    JOB = "job"
    BATCH = "batch"
    FILE = "file"
    ADAPTER = "adapter"
    KEY = "key"
    SCHEDULE = "schedule"
    RUN = "run"
    EVENT = "evt"
    WEBHOOK = "webhook"
    DELIVERY = "delivery"


def new_id() -> UUID:
    """A fresh UUIDv7."""
    return uuid_utils.compat.uuid7()


def format_id(prefix: IdPrefix, value: UUID) -> str:
    """The outside form of `value`, such as `job_019…`."""
    return f"{prefix}_{value.hex}"


def parse_id(prefix: IdPrefix, text: str) -> UUID | None:
    """The id inside `text`, or None where it is not an id of that kind.

    A malformed id is treated like an unknown one (404), so no error is raised.
    """
    head, _, digits = text.partition("_")
    if head != prefix or len(digits) != 32:
        return None
    try:
        return UUID(hex=digits)
    except ValueError:
        return None
