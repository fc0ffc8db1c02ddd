"""Webhooks and their deliveries as the outside sees them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel

from api.job_view import Row, unix_seconds
from core.ids import IdPrefix, format_id
from core.webhook_signing import shown_secret
from db.webhooks import SecretState

#: What a tenant is told where there was no answer. That a host's addresses are forbidden and that
#: it has none is one thing to them: what names stand for inside is not theirs to learn.
ERRORS: Final[Mapping[str, str]] = {
    "address": "the host has no address that webhooks may reach",
    "connection": "the connection failed or broke",
    "timeout": "there was no answer in time",
    "tls": "no secure connection: the certificate is not valid for the host, or not trusted",
    "endpoint_disabled": "the webhook was disabled or deleted meanwhile",
}


class Webhook(BaseModel):
    """An endpoint. Times are unix seconds; `secret` is there once, in the answer that made it."""

    id: str
    object: Literal["webhook"]
    url: str
    events: list[str]
    description: str
    created_at: int
    disabled_at: int | None
    disabled_reason: Literal["user", "gone", "failing"] | None
    secret: str | None = None


class WebhookList(BaseModel):
    """One page of endpoints, newest first."""

    object: Literal["list"]
    data: list[Webhook]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Secret(BaseModel):
    """A secret; itself only in the one answer that shows it."""

    object: Literal["webhook.secret"]
    secret: str | None
    created_at: int | None
    shown_at: int | None
    former: int


class DeliveryError(BaseModel):
    """Why there was no answer."""

    code: Literal["address", "connection", "timeout", "tls", "endpoint_disabled"]
    message: str


class DeliveryAttempt(BaseModel):
    """One attempt. `status` is HTTP's; `response` the first 2 kB of the answer's body."""

    attempt: int
    started_at: int
    seconds: float
    status: int | None
    error: DeliveryError | None
    response: str | None


class Delivery(BaseModel):
    """One event for one receiver: a webhook, or the `url` that its subject named."""

    id: str
    object: Literal["webhook.delivery"]
    webhook: str | None
    url: str | None
    event: str
    type: str
    subject: str
    state: Literal["pending", "delivered", "failed"]
    created_at: int
    next_attempt_at: int | None
    finished_at: int | None
    attempts: list[DeliveryAttempt]


class DeliveryList(BaseModel):
    """One page of deliveries, newest first."""

    object: Literal["list"]
    data: list[Delivery]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Replayed(BaseModel):
    """How many deliveries are sent once more."""

    object: Literal["webhook.replay"]
    replayed: int


def webhook_object(row: Row, secret: bytes | None = None) -> dict[str, Any]:
    """The endpoint of a row; with its secret in the answer that made it."""
    shown = {} if secret is None else {"secret": shown_secret(secret)}
    return {
        "id": format_id(IdPrefix.WEBHOOK, row["id"]),
        "object": "webhook",
        "url": row["url"],
        "events": list(row["events"]),
        "description": row["description"],
        "created_at": unix_seconds(row["created_at"]),
        "disabled_at": unix_seconds(row["disabled_at"]),
        "disabled_reason": row["disabled_reason"],
        **shown,
    }


def secret_object(state: SecretState | None, secret: bytes | None = None) -> dict[str, Any]:
    """What is known of a secret, and itself where it may be shown."""
    return {
        "object": "webhook.secret",
        "secret": None if secret is None else shown_secret(secret),
        "created_at": None if state is None else unix_seconds(state.created_at),
        "shown_at": None if state is None else unix_seconds(state.shown_at),
        "former": 0 if state is None else state.former,
    }


def delivery_object(row: Row, attempts: Sequence[Row]) -> dict[str, Any]:
    """The delivery of a row as db.delivery_log reads it."""
    endpoint = row["endpoint_id"]
    return {
        "id": format_id(IdPrefix.DELIVERY, row["id"]),
        "object": "webhook.delivery",
        "webhook": None if endpoint is None else format_id(IdPrefix.WEBHOOK, endpoint),
        "url": row["url"],
        "event": format_id(IdPrefix.EVENT, row["event_id"]),
        "type": row["type"],
        "subject": row["subject"],
        "state": row["state"],
        "created_at": unix_seconds(row["created_at"]),
        "next_attempt_at": unix_seconds(row["due_at"]),
        "finished_at": unix_seconds(row["finished_at"]),
        "attempts": [_attempt(attempt) for attempt in attempts],
    }


def _attempt(row: Row) -> dict[str, Any]:
    code = row["error"]
    return {
        "attempt": row["attempt"],
        "started_at": unix_seconds(row["started_at"]),
        "seconds": row["seconds"],
        "status": row["status"],
        "error": None if code is None else {"code": code, "message": ERRORS[code]},
        "response": row["response"],
    }
