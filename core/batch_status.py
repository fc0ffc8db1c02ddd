"""The statuses of a batch, as OpenAI names them, and the only moves between them.

The database holds the same rules as conditional UPDATEs and CHECK constraints.
"""

from enum import StrEnum
from typing import Final


class BatchStatus(StrEnum):
    """Where a batch stands."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing moves a batch out of this status."""
        return not TRANSITIONS[self]


TRANSITIONS: Final[dict[BatchStatus, frozenset[BatchStatus]]] = {
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.IN_PROGRESS, BatchStatus.FAILED, BatchStatus.CANCELLING}
    ),
    BatchStatus.IN_PROGRESS: frozenset(
        {BatchStatus.FINALIZING, BatchStatus.EXPIRED, BatchStatus.CANCELLING}
    ),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}

#: What stands in the error file for a line whose job was cancelled or expired: code and message.
EXPIRED: Final = "batch_expired"
UNFINISHED: Final = {
    "cancelled": ("batch_cancelled", "This request was cancelled before it was finished."),
    "expired": (
        EXPIRED,
        "This request could not be executed before the completion window expired.",
    ),
}
