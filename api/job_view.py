"""A job as the outside sees it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Protocol
from uuid import UUID

import orjson
from fastapi import Response
from pydantic import BaseModel

from core.errors import ErrorCode
from core.ids import IdPrefix, format_id
from core.request import JobRequest
from core.states import JobState
from db.registry import Target


class JobError(BaseModel):
    """Why a job failed."""

    code: ErrorCode
    message: str


class Job(BaseModel):
    """A job. Times are unix seconds; `response` is the object that OpenAI's endpoint answers."""

    id: str
    object: Literal["job"]
    state: JobState
    model: str
    adapter: str | None
    adapter_version: int | None
    priority: int
    deadline: int | None
    attempts: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    metadata: dict[str, str] | None
    webhook_url: str | None
    response: dict[str, Any] | None
    error: JobError | None


class JobList(BaseModel):
    """One page of jobs, newest first; the next one begins after `last_id`."""

    object: Literal["list"]
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


def created_ms(job_id: UUID) -> int:
    """When a job was submitted, in milliseconds since the epoch: its UUIDv7 begins with it."""
    return job_id.int >> 80


class Row(Protocol):
    """A database row, read by column."""

    def __getitem__(self, column: str, /) -> Any: ...


def stored_job(row: Row) -> dict[str, Any]:
    """The job object of a row as db.jobs reads it. The JSON in it is passed on unparsed."""
    return _job(
        row["id"],
        state=row["state"],
        model=row["model"],
        adapter=row["adapter"],
        adapter_version=row["adapter_version"],
        priority=row["priority"],
        deadline=unix_seconds(row["deadline"]),
        attempts=row["attempts"],
        started_at=unix_seconds(row["started_at"]),
        finished_at=unix_seconds(row["finished_at"]),
        metadata=_fragment(row["metadata"]),
        webhook_url=row["webhook_url"],
        response=_fragment(row["response"]),
        error=row["error_code"] and {"code": row["error_code"], "message": row["error_message"]},
    )


def submitted_job(job_id: UUID, request: JobRequest, target: Target) -> dict[str, Any]:
    """The object of a job that has just been committed, without reading it back."""
    return _job(
        job_id,
        state=JobState.QUEUED,
        model=request.model,
        adapter=target.adapter,
        adapter_version=target.version,
        priority=request.priority,
        deadline=None if request.deadline is None else int(request.deadline),
        metadata=request.metadata,
        webhook_url=request.webhook_url,
    )


def _job(
    job_id: UUID,
    *,
    state: str,
    model: str,
    adapter: str | None,
    adapter_version: int | None,
    priority: int,
    deadline: int | None,
    attempts: int = 0,
    started_at: int | None = None,
    finished_at: int | None = None,
    metadata: Any = None,
    webhook_url: str | None = None,
    response: Any = None,
    error: Any = None,
) -> dict[str, Any]:
    return {
        "id": format_id(IdPrefix.JOB, job_id),
        "object": "job",
        "state": state,
        "model": model,
        "adapter": adapter,
        "adapter_version": adapter_version,
        "priority": priority,
        "deadline": deadline,
        "attempts": attempts,
        "created_at": created_ms(job_id) // 1000,
        "started_at": started_at,
        "finished_at": finished_at,
        "metadata": metadata,
        "webhook_url": webhook_url,
        "response": response,
        "error": error,
    }


def unix_seconds(moment: datetime | None) -> int | None:
    """A moment as the outside sees it."""
    return None if moment is None else int(moment.timestamp())


def _fragment(text: str | None) -> orjson.Fragment | None:
    return None if text is None else orjson.Fragment(text)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response whose content may hold JSON that is already text."""
    return Response(orjson.dumps(content), status, headers=headers, media_type="application/json")
