"""The states of a job and the only moves between them.

The database holds the same rules as conditional UPDATEs and CHECK constraints; this table is what
tests compare them with.
"""

from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """Where a job stands. `queued` and `running` are the only states it can leave."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether nothing moves a job out of this state."""
        return not TRANSITIONS[self]


TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED}),
    # running -> queued: released by a stopping worker, rescued from a lost one, or tried again
    JobState.RUNNING: frozenset(
        {
            JobState.QUEUED,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.CANCELLED,
            JobState.EXPIRED,
        }
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.EXPIRED: frozenset(),
}

FINAL_STATES: Final = frozenset(state for state in JobState if state.is_final)
