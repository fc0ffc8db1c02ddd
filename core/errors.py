"""Every error that a user, an operator or the queue can meet, each with its code and HTTP status.

A class's docstring is the title that the user reads; the message says which field, which value and
what to do.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from core.adapter_rules.findings import Finding


class ErrorCode(StrEnum):
    """`error.code` of a job that failed."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    ADAPTER_MISSING = "adapter_missing"
    ADAPTER_LOAD_FAILED = "adapter_load_failed"
    ADAPTER_REJECTED = "adapter_rejected"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    ENGINE_ERROR = "engine_error"
    UNSTORABLE = "unstorable"


class LorryError(Exception):
    """Something went wrong in Lorry."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        #: machine-readable members for the problem document, such as `field` or `nearest`
        self.details = details

    @classmethod
    def title(cls) -> str:
        """The first line of the docstring, without its full stop."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")


class InvalidRequest(LorryError):
    """The request is not valid."""

    status = 422
    code = "invalid_request"


class BodyTooLarge(LorryError):
    """The request body is too large."""

    status = 413
    code = "body_too_large"


class FileTooLarge(LorryError):
    """The file is too large."""

    status = 413
    code = "file_too_large"


class UploadInvalid(LorryError):
    """The upload cannot be used."""

    status = 422
    code = "invalid_upload"


class ModelNotFound(LorryError):
    """No such model."""

    status = 404
    code = "model_not_found"


class NotFound(LorryError):
    """No such resource."""

    status = 404
    code = "not_found"


class Unauthorized(LorryError):
    """The API key is missing, wrong or revoked."""

    status = 401
    code = "unauthorized"


class IdempotencyConflict(LorryError):
    """The Idempotency-Key was used with another body."""

    status = 422
    code = "idempotency_key_reused"


class Unavailable(LorryError):
    """Lorry cannot reach its database."""

    status = 503
    code = "unavailable"
    #: seconds after which a client should try again
    retry_after: ClassVar[int] = 5


class StoreUnavailable(LorryError):
    """The adapter store cannot be reached."""

    status = 503
    code = "store_unavailable"


class UsageError(LorryError):
    """The command cannot be carried out as given."""

    code = "usage"


class AdapterInvalid(LorryError):
    """The adapter's files cannot be used."""

    status = 422
    code = "adapter_invalid"


class AdapterInUse(LorryError):
    """The adapter is in use."""

    status = 409
    code = "adapter_in_use"


class AdapterRejected(LorryError):
    """The adapter cannot be served.

    Args:
        findings: everything that is wrong with it, at least one thing.
    """

    status = 422
    code = "adapter_rejected"

    def __init__(self, findings: "Sequence[Finding]") -> None:
        more = f" (and {len(findings) - 1} more: see findings)" if len(findings) > 1 else ""
        super().__init__(
            findings[0].message + more,
            findings=[{"code": one.code, "message": one.message} for one in findings],
        )
        self.findings = tuple(findings)
