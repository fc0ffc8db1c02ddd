"""What a schedule's batches are given: a file that is there, or one made of requests or rows."""

import asyncio
import copy
import io
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Final

import orjson

from api.services import Services
from core.errors import InvalidRequest, LorryError, NotFound
from core.ids import new_id
from core.invalid import FieldError, invalid_request
from core.request import JobRequest, check_job_request
from core.row_templates import BadRow, UnknownColumn, fill_all, read_rows
from core.schedule_request import DEFAULT_ENDPOINT, ScheduleRequest
from db import files
from db.blobs import Blobs
from db.files import NewFile, Written, file_key
from db.schedule_files import ScheduleInput

_URLS: Final = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
#: Lines written at once.
_CHUNK_BYTES: Final = 1024 * 1024
#: Stands for a model while a body is checked that names none.
_SOME_MODEL: Final = "model"


async def prepare_input(
    services: Services, tenant_id: int, request: ScheduleRequest
) -> ScheduleInput:
    """Check what a schedule is to run; write the file where it is not one already.

    What was written is entered together with the schedule, or `discard`ed.

    Raises:
        InvalidRequest: a request, a row or the template cannot be used.
        NotFound: there is no such file.
    """
    blobs = services.blob_store()
    if request.requests is not None:
        lines = _lines_of_requests(request)
        endpoint = _endpoint(request, lines[0]["url"])
        encoded = [orjson.dumps(line) + b"\n" for line in lines]
        made = await _write(services, blobs, tenant_id, iter(encoded), "requests.jsonl")
        return ScheduleInput(*made[:1], endpoint, made[1], requests=len(lines))
    row = None
    if request.input_file_id is not None:
        row = await files.get(services.database, tenant_id, request.input_file_id)
    if row is None or request.input_file_id is None:
        raise NotFound(
            f"input_file_id {request.input_file!r} does not exist, or has expired; upload it with "
            "POST /v1/files",
            field="input_file_id",
        )
    if request.template is None:
        if row["purpose"] != "batch":
            raise InvalidRequest(
                f"input_file_id {request.input_file!r} has the purpose {row['purpose']!r}; give a "
                "file that was uploaded with purpose 'batch'",
                field="input_file_id",
            )
        return ScheduleInput(request.input_file_id, request.endpoint or DEFAULT_ENDPOINT)
    kind = "chat" if "messages" in request.template else "completion"
    endpoint = _endpoint(request, _URLS[kind])
    suffix = PurePath(row["filename"]).suffix.lower()
    limit = services.settings.max_batch_lines
    key = file_key(request.input_file_id)
    lines_of_rows = _lines_of_rows(blobs, key, suffix, request, endpoint, limit)
    file_id, written = await _write(services, blobs, tenant_id, lines_of_rows, "rows.jsonl")
    return ScheduleInput(
        file_id,
        endpoint,
        written,
        rows_file_id=request.input_file_id,
        template=request.template,
    )


async def discard(services: Services, given: ScheduleInput | None) -> None:
    """Leave nothing of a file that no schedule came to have."""
    if given is None or given.made is None:
        return
    await files.give_up(services.database, [given.file_id])
    await asyncio.to_thread(services.blob_store().delete, file_key(given.file_id))
    await files.forget(services.database, [given.file_id])


def _endpoint(request: ScheduleRequest, found: str) -> str:
    if request.endpoint not in (None, found):
        raise invalid_request(
            [FieldError("endpoint", f"{request.endpoint!r} does not fit: these are for {found!r}")]
        )
    return found


def _lines_of_requests(request: ScheduleRequest) -> list[dict[str, Any]]:
    assert request.requests is not None
    lines: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for index, given in enumerate(request.requests):
        where = f"requests[{index}]"
        wrapped = isinstance(given.get("body"), dict)
        body = given["body"] if wrapped else given
        custom_id = given.get("custom_id", f"request-{index + 1}") if wrapped else None
        custom_id = custom_id or f"request-{index + 1}"
        if not isinstance(custom_id, str) or len(custom_id) > 512:
            raise _bad(f"{where}.custom_id", "must be a string of at most 512 characters")
        if wrapped and (extra := given.keys() - {"custom_id", "body", "method", "url"}):
            raise _bad(f"{where}.{min(extra)}", "is not known beside body; remove it")
        if seen.setdefault(custom_id, index) != index:
            raise _bad(
                f"{where}.custom_id",
                f"{custom_id[:80]!r} is that of requests[{seen[custom_id]}] too; give its own",
            )
        url = _URLS[_checked(body, request, where).endpoint]
        if lines and url != lines[0]["url"]:
            raise _bad(where, f"is for {url}, the first one for {lines[0]['url']}; a batch has one")
        lines.append({"custom_id": custom_id, "method": "POST", "url": url, "body": body})
    return lines


def _checked(body: dict[str, Any], request: ScheduleRequest, where: str) -> JobRequest:
    """The body as a job would have it. Raises InvalidRequest, its fields below `where`."""
    trial = copy.deepcopy(body)
    if trial.get("model") is None and request.model is not None:
        trial["model"] = _SOME_MODEL
    try:
        return check_job_request(trial)
    except InvalidRequest as error:
        found: Any = error.details.get("errors") or []
        told = [FieldError(f"{where}.{e['field']}", e["message"], e.get("value")) for e in found]
        raise (invalid_request(told) if told else _bad(where, error.message)) from None


def _lines_of_rows(
    blobs: Blobs, key: str, suffix: str, request: ScheduleRequest, endpoint: str, limit: int
) -> Iterator[bytes]:
    """The lines of a batch made of a file's rows; runs on a thread."""
    count = 0
    with blobs.read(key) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        try:
            for number, columns in read_rows(text, suffix):
                count += 1
                if count > limit:
                    raise _bad(
                        "input_file_id",
                        f"has more than {limit} rows (LORRY_MAX_BATCH_LINES); split it",
                    )
                body = fill_all(request.template, columns)
                if count == 1:
                    _checked(body, request, "template")
                line = {
                    "custom_id": f"row-{number}",
                    "method": "POST",
                    "url": endpoint,
                    "body": body,
                }
                yield orjson.dumps(line) + b"\n"
        except UnknownColumn as error:
            raise _bad("template", f"{error} (line {number} of the file)") from None
        except BadRow as error:
            raise _bad("input_file_id", f"line {error.number} {error}") from None
        except UnicodeDecodeError as error:
            raise _bad("input_file_id", f"is not UTF-8: {error}; encode it as UTF-8") from None
        except (TypeError, orjson.JSONEncodeError) as error:
            raise _bad("input_file_id", f"line {number} cannot be carried: {error}") from None
        finally:
            text.detach()
    if not count:
        raise _bad("input_file_id", "has no rows")


async def _write(
    services: Services, blobs: Blobs, tenant_id: int, lines: Iterator[bytes], name: str
) -> tuple[Any, Written]:
    file = NewFile(new_id(), tenant_id, "batch", name)
    given = ScheduleInput(file.id, "", Written(0, 0, name, None))
    await files.begin(services.database, file)
    try:
        size, count = await asyncio.to_thread(
            _copy, blobs, file_key(file.id), lines, services.settings.max_file_bytes
        )
    except FileNotFoundError:
        await discard(services, given)
        raise NotFound("the input file was deleted", field="input_file_id") from None
    except BaseException:
        await discard(services, given)
        raise
    return file.id, Written(size, count, name, None)


def _copy(blobs: Blobs, key: str, lines: Iterator[bytes], limit: int) -> tuple[int, int]:
    size = count = 0
    with blobs.write(key) as target:
        held: list[bytes] = []
        waiting = 0
        for line in lines:
            held.append(line)
            size, waiting, count = size + len(line), waiting + len(line), count + 1
            if size > limit:
                raise _bad(
                    "template", f"makes more than {limit} bytes of requests (LORRY_MAX_FILE_BYTES)"
                )
            if waiting > _CHUNK_BYTES:
                target.write(b"".join(held))
                held, waiting = [], 0
        target.write(b"".join(held))
    return size, count


def _bad(field: str, clause: str) -> LorryError:
    return invalid_request([FieldError(field, clause)])
