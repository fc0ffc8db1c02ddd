"""Every error as problem details (RFC 9457): what was wrong and what to do, never internals."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_problem.handler import ExceptionHandler, add_exception_handler, new_exception_handler
from pydantic import BaseModel, ConfigDict
from rfc9457 import Problem
from starlette.exceptions import HTTPException

from api.openai_errors import as_openai
from core.errors import BodyTooLarge, FileTooLarge, LorryError, NotFound, Unauthorized
from core.invalid import field_errors, invalid_request


class ProblemDetails(BaseModel):
    """An error (RFC 9457). Errors of the body also list every field under `errors`."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str


def handle_errors(app: FastAPI) -> None:
    """Make every error that leaves a route, or finds none, a problem document."""
    handler = new_exception_handler(
        # in this order: the handler takes the first class that fits
        handlers={
            LorryError: _lorry_error,
            HTTPException: _http_error,
            RequestValidationError: _parameter_error,
            Exception: _unexpected,
        },
        post_hooks=[as_openai],
        http_exception_handler=_http_error,
        request_validation_handler=_parameter_error,
    )
    add_exception_handler(app, handler)
    app.add_exception_handler(LorryError, handler)


def _lorry_error(_handler: ExceptionHandler, _request: Request, error: LorryError) -> Problem:
    return _problem(error, getattr(error, "retry_after", None))


def _http_error(_handler: ExceptionHandler, request: Request, error: HTTPException) -> Problem:
    """What Starlette itself refuses: unknown paths and methods."""
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _problem(NotFound(f"there is nothing at {request.url.path}; see /docs"))
    status = HTTPStatus(error.status_code)
    detail = status.description or status.phrase
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        detail = f"{request.method} is not possible at {request.url.path}; use {allowed}"
    slug = status.phrase.lower().replace(" ", "-")
    return Problem(
        status.phrase,
        type_=slug,
        detail=detail,
        status=status,
        headers=dict(error.headers or {}),
        code=slug.replace("-", "_"),
    )


def _parameter_error(
    _handler: ExceptionHandler, _request: Request, error: RequestValidationError
) -> Problem:
    """A path or query parameter; the body has its own parser."""
    details: list[Any] = [{**found, "loc": found["loc"][1:]} for found in error.errors()]
    return _problem(invalid_request(field_errors(details)))


def _unexpected(_handler: ExceptionHandler, _request: Request, _error: Exception) -> Problem:
    """A fault of ours. The server logs it, since Starlette raises it on after the answer."""
    return _problem(
        LorryError("this is a fault of Lorry's; its log says more. Trying again may help")
    )


def _problem(error: LorryError, retry_after: int | None = None) -> Problem:
    headers: dict[str, str] = {}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge | FileTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not read
    return Problem(
        error.title(),
        type_=error.code.replace("_", "-"),
        detail=error.message,
        status=error.status,
        headers=headers,
        code=error.code,
        **error.details,
    )
