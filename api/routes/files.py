"""/v1/files: upload, list, read, delete; as OpenAI has it."""

import asyncio
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from api.auth import TenantId
from api.job_view import Row, json_response
from api.services import Services, ServicesDep
from api.uploads import store_upload
from core.errors import InvalidRequest, LorryError, NotFound
from core.ids import IdPrefix, format_id, parse_id
from core.json_values import check_text
from db import files
from db.blobs import CHUNK_BYTES, Blobs
from db.files import file_key

router = APIRouter(prefix="/v1/files", tags=["files"])

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

UPLOAD_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


class RangeNotSatisfiable(LorryError):
    """The range lies outside the file."""

    status = 416
    code = "range_not_satisfiable"


class File(BaseModel):
    """A file. Times are unix seconds."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: str | None


class FileList(BaseModel):
    """One page of files."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class ListParameters(BaseModel):
    """What a list of files is narrowed by."""

    model_config = ConfigDict(extra="forbid")

    purpose: Annotated[str, AfterValidator(check_text)] | None = Field(None, max_length=64)
    after: str | None = Field(None, description="the id of a file: begin behind it")
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"


@router.post(
    "", summary="Upload a file", responses={200: {"model": File}}, openapi_extra=UPLOAD_BODY
)
async def upload_file(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Takes a multipart form with `file` and `purpose=batch`; answers once all is stored."""
    return json_response(_view(await store_upload(services, tenant_id, request)))


@router.get("", summary="List files", responses={200: {"model": FileList}})
async def list_files(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[ListParameters, Query()]
) -> Response:
    """One page of files, newest first unless `order=asc`."""
    after = parameters.after and parse_id(IdPrefix.FILE, parameters.after)
    if parameters.after is not None and not after:
        raise InvalidRequest(
            f"after {parameters.after[:80]!r} is not a file id; give the last_id of a page",
            field="after",
        )
    rows = await files.list_page(
        services.database,
        tenant_id,
        purpose=parameters.purpose,
        after=after or None,
        newest_first=parameters.order == "desc",
        limit=parameters.limit + 1,
    )
    data = [_view(row) for row in rows[: parameters.limit]]
    return json_response(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(rows) > parameters.limit,
        }
    )


@router.get("/{file_id}", summary="Read a file's object", responses={200: {"model": File}})
async def get_file(file_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """The file, without its content."""
    return json_response(_view(await _known(services, tenant_id, file_id)))


@router.delete("/{file_id}", summary="Delete a file", responses={200: {"model": FileDeleted}})
async def delete_file(file_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """The file is gone at once; a batch that was validated already does without it."""
    blobs = services.blob_store()
    found = parse_id(IdPrefix.FILE, file_id)
    if found is None or not await files.delete(services.database, tenant_id, found):
        raise _no_file(file_id)
    await asyncio.to_thread(blobs.delete, file_key(found))
    return json_response({"id": file_id, "object": "file", "deleted": True})


@router.get(
    "/{file_id}/content",
    summary="Read a file's content",
    responses={200: {"content": {"application/octet-stream": {}}}, 206: {}},
    response_class=Response,
)
async def get_content(
    file_id: str, request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """The bytes, streamed; `Range` with one range is understood."""
    blobs = services.blob_store()
    row = await _known(services, tenant_id, file_id)
    size: int = row["size_bytes"]
    asked = _asked_range(request.headers.get("range"), size)
    start, end = asked or (0, size)
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Length": str(end - start),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(row['filename'], safe='')}",
        "ETag": f'"{row["id"].hex}"',
    }
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    pieces = _pieces(blobs, row["id"], start, end)
    # the first piece now: a file whose bytes are gone is 404, and not a broken answer
    first = await asyncio.to_thread(next, pieces, b"")
    return StreamingResponse(
        _chain(first, pieces),
        206 if asked else 200,
        headers=headers,
        media_type="application/octet-stream",
    )


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Starlette reads this on a thread."""
    yield first
    yield from rest


def _pieces(blobs: Blobs, file_id: UUID, start: int, end: int) -> Iterator[bytes]:
    try:
        with blobs.read(file_key(file_id)) as file:
            file.seek(start)
            left = end - start
            while left > 0 and (piece := file.read(min(CHUNK_BYTES, left))):
                left -= len(piece)
                yield piece
    except FileNotFoundError:
        raise _no_file(format_id(IdPrefix.FILE, file_id)) from None


def _asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and end of the one range asked for; None for the whole file."""
    found = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if found is None or found.groups() == ("", ""):
        return None  # several ranges, or other units: the whole file is a right answer
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
    if start >= end:
        raise RangeNotSatisfiable(
            f"Range {header!r} lies outside the file's {size} bytes", field="Range"
        )
    return start, end


async def _known(services: Services, tenant_id: int, file_id: str) -> Row:
    found = parse_id(IdPrefix.FILE, file_id)
    row = None if found is None else await files.get(services.database, tenant_id, found)
    if row is None:
        raise _no_file(file_id)
    return row


def _no_file(file_id: str) -> NotFound:
    return NotFound(
        f"file {file_id[:80]!r} does not exist, or has expired; GET /v1/files lists those that do",
        field="id",
    )


def _view(row: Row) -> dict[str, Any]:
    return {
        "id": format_id(IdPrefix.FILE, row["id"]),
        "object": "file",
        "bytes": row["size_bytes"],
        "created_at": _seconds(row["created_at"]),
        "expires_at": _seconds(row["expires_at"]),
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
