"""Taking a file in: from the request to the blob store, a piece at a time."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import BinaryIO, Final
from uuid import UUID

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.body import MOST_DISCARDED_BYTES
from api.job_view import Row
from api.multipart import FileForm
from api.services import Services
from core.errors import FileTooLarge, LorryError, Unavailable, UploadInvalid
from core.file_request import PURPOSE, check_fields
from core.ids import new_id
from db import files
from db.blobs import CHUNK_BYTES, Blobs
from db.files import NewFile, Written, file_key

log = logging.getLogger(__name__)

#: What a form may have beside its file.
_FORM_BYTES: Final = 128 * 1024


async def store_upload(services: Services, tenant_id: int, request: Request) -> Row:
    """Store the file of a multipart form; when this returns, it is there for good.

    Raises:
        UploadInvalid: the form is broken, was cut off, or lacks a field.
        FileTooLarge: the file is larger than `LORRY_MAX_FILE_BYTES`. Nothing is left of it.
    """
    blobs = services.blob_store()
    form = FileForm(request.headers.get("content-type"))
    file = NewFile(new_id(), tenant_id, PURPOSE, "")
    await files.begin(services.database, file)
    try:
        async with _writing(blobs, file_key(file.id)) as target:
            size, newlines = await _receive(services, request, form, target, file.id)
            expires = _check_form(form)
        written = Written(
            size,
            newlines,
            form.filename or "",
            expires or services.settings.retention_seconds or None,  # no retention: for ever
        )
        async with services.database.connection() as connection:
            row = await files.finish(connection, file.id, written)
        if row is None:
            raise Unavailable("the upload was silent for too long and was given up; send it again")
    except BaseException as error:
        await _clear(services, blobs, file.id)
        if isinstance(error, FileTooLarge):
            await _discard(request)
        raise
    return row


async def _receive(
    services: Services, request: Request, form: FileForm, target: BinaryIO, file_id: UUID
) -> tuple[int, int]:
    """Write the file as it comes; returns its bytes and newlines."""
    limit = services.settings.max_file_bytes
    size, newlines, whole, touched = 0, 0, 0, time.monotonic()
    try:
        async for chunk in request.stream():
            whole += len(chunk)
            form.feed(chunk)
            if size + form.held > limit or whole > limit + _FORM_BYTES:
                raise FileTooLarge(
                    f"the file is larger than {limit} bytes; split it, or raise "
                    "LORRY_MAX_FILE_BYTES",
                    field="file",
                    limit=limit,
                )
            if form.held < CHUNK_BYTES:
                continue
            size, newlines = await _write(form, target, size, newlines)
            if time.monotonic() - touched > files.TOUCH_SECONDS:
                await files.touch(services.database, [file_id])
                touched = time.monotonic()
    except ClientDisconnect:
        raise UploadInvalid("the connection closed before the whole file had come") from None
    return await _write(form, target, size, newlines)


async def _write(form: FileForm, target: BinaryIO, size: int, newlines: int) -> tuple[int, int]:
    piece = form.take()
    await asyncio.to_thread(target.write, piece)
    return size + len(piece), newlines + piece.count(b"\n")


def _check_form(form: FileForm) -> int | None:
    if not form.ended:
        raise UploadInvalid("the multipart form ends before its closing boundary; send it again")
    if form.filename is None:
        raise UploadInvalid("file is required; add the form field file", field="file")
    return check_fields(form.fields)


@asynccontextmanager
async def _writing(blobs: Blobs, key: str) -> AsyncIterator[BinaryIO]:
    """`blobs.write` with its beginning and end on a thread: both wait for a disk or a network."""
    context: AbstractContextManager[BinaryIO] = blobs.write(key)
    target = await asyncio.to_thread(context.__enter__)
    try:
        yield target
    except BaseException as error:
        await asyncio.to_thread(context.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(context.__exit__, None, None, None)


async def _clear(services: Services, blobs: Blobs, file_id: UUID) -> None:
    """Leave nothing behind. What cannot be cleared now is the steward's to sweep."""
    try:
        await files.give_up(services.database, [file_id])
        await asyncio.to_thread(blobs.delete, file_key(file_id))
        await files.forget(services.database, [file_id])
    except (LorryError, OSError) as error:
        log.warning("An upload is left to the steward: %s", error, extra={"action": "upload_left"})


async def _discard(request: Request) -> None:
    """Read on for a while: a client that is still sending would not see the answer."""
    read = 0
    try:
        async for chunk in request.stream():
            read += len(chunk)
            if read > MOST_DISCARDED_BYTES:
                return
    except (ClientDisconnect, RuntimeError):
        return
