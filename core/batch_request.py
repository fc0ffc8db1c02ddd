"""The body of POST /v1/batches: OpenAI's fields, and `skip_invalid`, which is ours."""

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import orjson
from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from core.ids import IdPrefix, parse_id
from core.invalid import field_errors, invalid_request
from core.json_text import parse_object
from core.request_body import MetadataKey, MetadataValue, Strict, WebhookUrl

#: The endpoints that a batch's lines can be for, and what the engine calls them.
ENDPOINTS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
#: OpenAI's bounds for a file's own expiry: an hour and 30 days.
SHORTEST_EXPIRY, LONGEST_EXPIRY = 3600, 2_592_000
LONGEST_WINDOW_SECONDS: Final = 366 * 86_400
_UNITS: Final = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_DURATION: Final = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def _window(text: str) -> str:
    if window_seconds(text) is None:
        raise PydanticCustomError(
            "lorry", "must be a duration from 1s to 366d, such as '24h', '30m' or '1d12h'"
        )
    return text


def window_seconds(text: str) -> int | None:
    """The seconds of a duration such as `24h` or `1h30m`; None where it is none."""
    found = _DURATION.fullmatch(text) if len(text) <= 32 and text.isascii() else None
    if found is None:
        return None
    seconds = sum(int(n or 0) * _UNITS[u] for n, u in zip(found.groups(), "dhms", strict=True))
    return seconds if 1 <= seconds <= LONGEST_WINDOW_SECONDS else None


Window = Annotated[str, AfterValidator(_window)]


class ExpiresAfter(Strict):
    """When a file goes."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_EXPIRY, le=LONGEST_EXPIRY)


class BatchBody(Strict):
    """What POST /v1/batches takes."""

    input_file_id: Annotated[str, Field(max_length=100)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Window
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None
    skip_invalid: bool | None = Field(
        None, description="put bad lines into the error file instead of failing the batch"
    )
    webhook_url: WebhookUrl | None = Field(None, description="told when the batch has ended")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A valid request. `input_file_id` is None where it cannot be the id of a file.

    Args:
        default_model, default_priority: of lines that say nothing themselves; a schedule's.
    """

    input_file: str
    input_file_id: UUID | None
    endpoint: str
    completion_window: str
    window_seconds: int
    metadata: dict[str, str] | None
    output_expires_seconds: int | None
    skip_invalid: bool
    default_model: str | None = None
    default_priority: int | None = None
    webhook_url: str | None = None

    def metadata_json(self) -> str | None:
        """`metadata` as JSON, as the user ordered it."""
        return None if self.metadata is None else orjson.dumps(self.metadata).decode()

    def fingerprint(self) -> bytes:
        """SHA-256 over everything that was asked."""
        whole: list[Any] = [self.input_file, self.endpoint, self.window_seconds, self.metadata]
        whole += [self.output_expires_seconds, self.skip_invalid]
        if self.default_model is not None or self.default_priority is not None:
            whole += [self.default_model, self.default_priority]
        if self.webhook_url is not None:  # without one, as in every release before
            whole.append(self.webhook_url)
        return hashlib.sha256(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS)).digest()


def parse_batch_request(raw: bytes) -> BatchRequest:
    """Read and check the body of POST /v1/batches.

    Raises:
        InvalidRequest: naming every wrong field, its value and the remedy.
    """
    try:
        body = BatchBody.model_validate(parse_object(raw))
    except ValidationError as error:
        known = list(BatchBody.model_fields)
        raise invalid_request(field_errors(error.errors(include_url=False), known)) from None
    seconds = window_seconds(body.completion_window)
    assert seconds is not None
    expiry = body.output_expires_after
    return BatchRequest(
        input_file=body.input_file_id,
        input_file_id=parse_id(IdPrefix.FILE, body.input_file_id),
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        window_seconds=seconds,
        metadata=body.metadata,
        output_expires_seconds=None if expiry is None else expiry.seconds,
        skip_invalid=bool(body.skip_invalid),
        webhook_url=body.webhook_url,
    )
