"""Reading a request's body without ever holding more of it than is allowed."""

from typing import Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from core.errors import BodyTooLarge, InvalidRequest
from core.invalid import field_errors, invalid_request

#: How much of a body that is too long is read and thrown away. A connection that closes on unread
#: bytes is reset, and its client sees a broken pipe in place of the answer.
MOST_DISCARDED_BYTES: Final = 64 * 1024 * 1024


_Model = TypeVar("_Model", bound=BaseModel)


async def read_model(request: Request, limit: int, model: type[_Model]) -> _Model:
    """The body as `model`. Raises like `read_json_body`, and InvalidRequest naming every field."""
    raw = await read_json_body(request, limit)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_request(field_errors(error.errors(), model.model_fields)) from None


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a small body by `read_model`."""
    schema = model.model_json_schema()
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


async def read_json_body(request: Request, limit: int) -> bytes:
    """The raw body, not parsed yet.

    Args:
        limit: the most bytes, `LORRY_MAX_BODY_BYTES`.

    Raises:
        BodyTooLarge: it is longer; only a client that asked first (`Expect`) need not send it.
        InvalidRequest: it is declared to be something else than JSON, or the client went away.
    """
    _require_json(request.headers.get("content-type"))
    if "expect" in request.headers and _declared_length(request) > limit:
        raise _too_large(limit)  # the client waits to be told before it sends
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > limit + MOST_DISCARDED_BYTES:
                break
    except ClientDisconnect:
        raise InvalidRequest("the connection closed before the whole body had come") from None
    if size > limit:
        raise _too_large(limit)
    return b"".join(chunks)


def _declared_length(request: Request) -> int:
    declared = request.headers.get("content-length", "0")
    return int(declared) if declared.isascii() and declared.isdigit() else 0


def _require_json(content_type: str | None) -> None:
    """Refuse what a web page can send anywhere without being asked: forms and plain text."""
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(
            f"Content-Type {kind[:80]!r} is not JSON; send `Content-Type: application/json`",
            field="Content-Type",
        )


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body is longer than {limit} bytes; shorten it, or raise LORRY_MAX_BODY_BYTES",
        limit=limit,
    )
