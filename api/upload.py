"""A form with one file, its file written to the disk as it comes."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fastapi import Request
from starlette.requests import ClientDisconnect

from api.body import MOST_DISCARDED_BYTES
from api.multipart import FileForm
from core.errors import BodyTooLarge, UploadInvalid

#: File bytes that are gathered before they are written, in a thread.
_WRITE_BYTES: Final = 1024 * 1024


@dataclass(slots=True)
class Form:
    """What a form held. `filename` is as the client said it: never a path of ours."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size_bytes: int = 0


async def read_form(request: Request, target: Path, limit: int, setting: str) -> Form:
    """Read a multipart form; its part `file` is written to `target`.

    Args:
        limit: the most bytes of the whole body.
        setting: the variable that raises the limit.

    Raises:
        UploadInvalid: it is no such form, or a part of it cannot be used.
        BodyTooLarge: it is longer than `limit`.
    """
    form = FileForm(request.headers.get("content-type"))
    declared = request.headers.get("content-length", "")
    if "expect" in request.headers and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, setting)  # the client waits to be told before it sends
    size = written = 0
    try:
        with target.open("wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit + MOST_DISCARDED_BYTES:
                    break
                if size > limit:
                    continue  # read on, so that the client sees the answer and no broken pipe
                form.feed(chunk)
                if form.held >= _WRITE_BYTES:
                    written += await asyncio.to_thread(file.write, form.take())
            if size > limit:
                raise _too_large(limit, setting)
            written += await asyncio.to_thread(file.write, form.take())
    except ClientDisconnect:
        raise UploadInvalid("the connection closed before the whole body had come") from None
    if not form.ended:
        raise UploadInvalid("the form ends too early: its last boundary is missing")
    return Form(form.fields, form.filename, written)


def _too_large(limit: int, setting: str) -> BodyTooLarge:
    return BodyTooLarge(
        f"the upload is longer than {limit} bytes; send less, or raise {setting}", limit=limit
    )
