"""When a batch will be finished, from what is measured, and whether its window will hold."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

#: A batch's own speed counts once it has gone on for so long and has so many finished lines.
OWN_SECONDS: Final = 10.0
OWN_LINES: Final = 50


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do for a batch.

    Args:
        remaining: its unfinished lines; before validation, what its file seems to have.
        finished: its finished lines.
        since_seconds: how long it has been in progress.
        ahead: unfinished lines of older batches on the same base models.
        jobs_per_second: what the live workers of these base models finish.
        workers: how many there are.
    """

    remaining: int
    finished: int
    since_seconds: float
    ahead: int
    jobs_per_second: float
    workers: int

    def seconds(self) -> float | None:
        """How long it will take; None where nothing is measured.

        A batch that is under way is best told by its own pace, which has the length of its
        answers and its share of the workers in it. One that is not waits for what is ahead.
        """
        if self.finished >= OWN_LINES and self.since_seconds >= OWN_SECONDS:
            return self.remaining * self.since_seconds / self.finished
        if self.jobs_per_second <= 0:
            return None
        return (self.ahead + self.remaining) / self.jobs_per_second


def promise(work: Work, now: float, expires_at: float) -> dict[str, Any]:
    """`lorry` of a batch: `estimated_finish_at` in unix seconds, and a `warning`, each or None."""
    seconds = work.seconds()
    if seconds is None:
        idle = None if work.workers else "no worker is running for this batch; start one"
        return {"estimated_finish_at": None, "warning": idle}
    finish = now + seconds
    late = finish - expires_at
    if work.workers == 0:
        warning = "no worker is running for this batch any more; start one"
    elif late > 0:
        warning = (
            f"at the present speed it would finish {_hours(late)} after its window ends "
            f"({_time(expires_at)}): what is unfinished then expires. Add workers, or give a "
            "longer completion_window"
        )
    else:
        warning = None
    return {"estimated_finish_at": round(finish), "warning": warning}


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
