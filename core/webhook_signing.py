"""Signatures of Standard Webhooks 1.0, by the reference library."""

import base64
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from standardwebhooks import Webhook

_PREFIX: Final = "whsec_"
_BYTES: Final = 32
#: How long the former secrets go on signing beside a new one.
ROTATION_SECONDS: Final = 86_400
#: Most secrets that sign at once.
MOST_SECRETS: Final = 5


def new_secret() -> bytes:
    """A secret of 256 random bits."""
    return secrets.token_bytes(_BYTES)


def shown_secret(secret: bytes) -> str:
    """The form that receivers are given: `whsec_…`."""
    return _PREFIX + base64.b64encode(secret).decode()


def signed_headers(
    secrets_: Sequence[bytes], message_id: str, now: datetime, body: bytes
) -> dict[str, str]:
    """The three headers of a delivery: one signature for each secret, the newest first.

    Args:
        secrets_: at least one.
        now: when it is sent, aware.
    """
    # the library takes a time's digits for UTC, whatever its zone: it must be in UTC
    moment = now.astimezone(UTC).replace(microsecond=0)
    text = body.decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(
            Webhook(secret).sign(message_id, moment, text) for secret in secrets_
        ),
    }
