"""Reading a request's body without ever holding more of it than is allowed."""

from fastapi import Request
from starlette.requests import ClientDisconnect

from core.errors import BodyTooLarge, InvalidRequest


async def read_json_body(request: Request, limit: int) -> bytes:
    """The raw body, not parsed yet.

    Args:
        limit: the most bytes, `LORRY_MAX_BODY_BYTES`.

    Raises:
        BodyTooLarge: it is longer, as declared or as it comes in.
        InvalidRequest: it is declared to be something else than JSON, or the client went away.
    """
    _require_json(request.headers.get("content-type"))
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:  # a chunked body declares no length
                raise _too_large(limit)
            chunks.append(chunk)
    except ClientDisconnect:
        raise InvalidRequest("the connection closed before the whole body had come") from None
    return b"".join(chunks)


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
