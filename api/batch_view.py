"""A batch as OpenAI shows it, with `lorry`: when it will be finished."""

import time
from datetime import datetime
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel

from api.job_view import Row
from core.batch_status import BatchStatus
from core.ids import IdPrefix, format_id
from core.promise import Work, promise
from db.batches import Outlook

_TIMES: Final = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchError(BaseModel):
    """What is wrong with a line, or with the file (`line` is null then)."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(BaseModel):
    """completed + failed ≤ total at every moment; equal when the batch has ended."""

    total: int
    completed: int
    failed: int


class InputDetails(BaseModel):
    """Of the input tokens."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Of the output tokens."""

    reasoning_tokens: int


class BatchUsage(BaseModel):
    """Tokens of the finished lines."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Promise(BaseModel):
    """When an open batch will be finished at the measured speed, and what speaks against it."""

    estimated_finish_at: int | None
    warning: str | None


class Batch(BaseModel):
    """A batch. Times are unix seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    webhook_url: str | None
    lorry: Promise | None


class BatchList(BaseModel):
    """One page of batches, newest first."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_view(row: Row, outlook: Outlook | None = None) -> dict[str, Any]:
    """The batch object of a row as db.batches reads it; with an outlook, a promise in it."""
    errors = row["errors_text"]
    metadata = row["metadata_text"]
    return {
        "id": format_id(IdPrefix.BATCH, row["public_id"]),
        "object": "batch",
        "endpoint": row["endpoint"],
        "model": row["model"],
        "errors": errors and {"object": "list", "data": orjson.Fragment(errors)},
        "input_file_id": format_id(IdPrefix.FILE, row["input_file_id"]),
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": _file(row["output_file_id"]),
        "error_file_id": _file(row["error_file_id"]),
        **{name: _seconds(row[name]) for name in _TIMES},
        "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
        "usage": {
            "input_tokens": row["input_tokens"],
            "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
            "output_tokens": row["output_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": row["input_tokens"] + row["output_tokens"],
        },
        "metadata": metadata and orjson.Fragment(metadata),
        "webhook_url": row["webhook_url"],
        "lorry": None if outlook is None else _promise(row, outlook),
    }


def is_open(row: Row) -> bool:
    """Whether there is something to promise."""
    return row["status"] in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)


def _promise(row: Row, outlook: Outlook) -> dict[str, Any]:
    now = time.time()
    remaining = row["total"] - row["completed"] - row["failed"]
    if row["status"] == BatchStatus.VALIDATING:
        remaining = max(1, row["input_newlines"] or 0)
    started = row["in_progress_at"]
    work = Work(
        remaining=remaining,
        finished=row["completed"] + row["failed"],
        since_seconds=0.0 if started is None else now - started.timestamp(),
        ahead=outlook.ahead,
        jobs_per_second=outlook.jobs_per_second,
        workers=outlook.workers,
    )
    return promise(work, now, row["expires_at"].timestamp())


def _file(file_id: Any) -> str | None:
    return None if file_id is None else format_id(IdPrefix.FILE, file_id)


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
