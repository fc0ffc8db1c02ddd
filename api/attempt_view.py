"""A job's attempts as the outside sees them."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from api.job_view import Row, unix_seconds


class Attempt(BaseModel):
    """One try at a job. Times are unix seconds; `ended_at` is null while it runs.

    `folded` says whether its adapter was folded into the base weights; null where nothing was
    recorded of it.
    """

    object: Literal["job.attempt"]
    attempt: int
    worker: int | None
    started_at: int | None
    ended_at: int | None
    outcome: Literal[
        "running",
        "released",
        "retried",
        "rescued",
        "suspect",
        "succeeded",
        "failed",
        "cancelled",
        "expired",
    ]
    error: str | None
    folded: bool | None


class AttemptList(BaseModel):
    """One page of attempts, oldest first; `first_id` and `last_id` are their numbers."""

    object: Literal["list"]
    data: list[Attempt]
    first_id: str | None
    last_id: str | None
    has_more: bool


def attempt_list(rows: Sequence[Row], limit: int) -> dict[str, Any]:
    """The list object of rows as db.attempts reads them; one beyond the limit says: more."""
    data = [_attempt(row) for row in rows[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": str(data[0]["attempt"]) if data else None,
        "last_id": str(data[-1]["attempt"]) if data else None,
        "has_more": len(rows) > limit,
    }


def _attempt(row: Row) -> dict[str, Any]:
    return {
        "object": "job.attempt",
        "attempt": row["attempt"],
        "worker": row["worker_id"],
        "started_at": unix_seconds(row["started_at"]),
        "ended_at": unix_seconds(row["ended_at"]),
        "outcome": row["outcome"],
        "error": row["error"],
        "folded": row["folded"],
    }
