"""OpenAI's error object, on the endpoints whose clients expect it.

{"error": {"message": "…", "type": "invalid_request_error", "param": "purpose", "code": "…"}}
"""

from typing import Any, Final

from fastapi import Request
from starlette.responses import JSONResponse

#: What OpenAI's own clients speak to.
PREFIXES: Final = ("/v1/files", "/v1/batches")
_TYPES: Final = {401: "authentication_error", 429: "rate_limit_error"}


def as_openai(
    content: dict[str, Any], request: Request, response: JSONResponse
) -> tuple[dict[str, Any], JSONResponse]:
    """A hook of the error handler: a problem document as OpenAI would have said it.

    What is 422 elsewhere is 400 there.
    """
    path = request.url.path
    if not any(path == prefix or path.startswith(f"{prefix}/") for prefix in PREFIXES):
        return content, response
    status = 400 if response.status_code == 422 else response.status_code
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {
        "message": _message(content),
        "type": _TYPES.get(status, kind),
        "param": content.get("field") or None,
        "code": content.get("code"),
    }
    kept = {
        name: value
        for name, value in response.headers.items()
        if name not in ("content-type", "content-length")
    }
    return content, JSONResponse({"error": error}, status, kept)


def _message(content: dict[str, Any]) -> str:
    """Every wrong field in one sentence: the object has no list for them."""
    errors = content.get("errors") or []
    if len(errors) < 2:
        return str(content.get("detail") or content.get("title"))
    return "; ".join(f"{error['field']} {error['message']}".strip() for error in errors)
