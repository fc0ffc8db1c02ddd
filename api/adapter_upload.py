"""An adapter that was uploaded: to a scratch folder, unpacked, judged, stored."""

import asyncio
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import Request

from api.services import Services
from api.upload import Form, read_form
from core.errors import InvalidRequest
from core.json_values import check_text
from db.adapter_package import Package, PackageLimits, unpack

#: `s3://…`, alone or at a text's beginning.
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]{1,15}://")
_LONGEST_ADDRESS: Final = 200
_FIELDS: Final = frozenset({"name", "base_model"})
#: A scratch folder older than this was left by a process that was killed.
_LEFT_SECONDS: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Upload:
    """An unpacked adapter, and what its form said."""

    name: str | None
    base_model: str | None
    package: Package


@asynccontextmanager
async def uploaded(request: Request, services: Services) -> AsyncIterator[Upload]:
    """The adapter in a request's form; its scratch folder is gone afterwards.

    Raises:
        InvalidRequest: the form is none, or has unknown or missing parts.
        BodyTooLarge: it is longer than `LORRY_MAX_ADAPTER_BYTES`.
        AdapterRejected: the file is no adapter, or not one that can be read safely.
    """
    limit = services.settings.max_adapter_bytes
    scratch = await asyncio.to_thread(_make_scratch, services.settings.cache_folder())
    try:
        archive = scratch / "upload"
        form = await read_form(request, archive, limit, "LORRY_MAX_ADAPTER_BYTES")
        _check_form(form, await asyncio.to_thread(_beginning, archive))
        limits = PackageLimits(adapter_bytes=limit)
        package = await asyncio.to_thread(unpack, archive, scratch / "unpacked", limits)
        yield Upload(form.fields.get("name"), form.fields.get("base_model") or None, package)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, True)


def _beginning(archive: Path) -> str:
    """What an address sent in place of a file would be."""
    if not archive.exists():
        return ""
    with archive.open("rb") as file:
        return file.read(_LONGEST_ADDRESS).decode("ascii", "ignore")


def _check_form(form: Form, beginning: str) -> None:
    others = [value for name, value in form.fields.items() if name != "base_model"]
    for value in (*others, beginning):
        if _ADDRESS.match(value):
            raise InvalidRequest(
                f"{value[:200]!r} is a remote address, which is not taken yet: download it, and "
                "upload the folder as an archive (-F file=@adapter.tar.gz)",
                field="file",
            )
    if unknown := sorted(form.fields.keys() - _FIELDS):
        hint = "send it as a part with a file name" if unknown == ["file"] else "remove it"
        raise InvalidRequest(
            f"{unknown[0][:80]} is not a known field; {hint} (there are name, base_model, file)",
            field=unknown[0],
        )
    if form.filename is None or not form.size_bytes:
        raise InvalidRequest(
            "file is required: a .tar.gz or .zip of the adapter's folder (-F file=@adapter.tar.gz)",
            field="file",
        )
    for name, value in form.fields.items():
        try:
            check_text(value)
        except ValueError as error:
            raise InvalidRequest(f"{name} {error}", field=name) from None


def _make_scratch(cache: Path) -> Path:
    folder = cache / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        with suppress(FileNotFoundError):  # another upload has just ended
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=folder))
