"""When a delivery is tried again, and when it is given up."""

import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

_MINUTE: Final = 60.0
_HOUR: Final = 3600.0
#: Waits before each try: ten tries over 75 hours.
DELAYS: Final = (
    0.0, 5.0, 5 * _MINUTE, 30 * _MINUTE, 2 * _HOUR, 5 * _HOUR, 10 * _HOUR, 14 * _HOUR, 20 * _HOUR,
    24 * _HOUR,
)  # fmt: skip
#: A delivery that is older is given up, however many tries it had; an endpoint that did nothing
#: but fail for so long is disabled.
GIVEN_UP_SECONDS: Final = 5 * 24 * _HOUR
#: A receiver may ask for a longer wait than ours, up to this.
LONGEST_RETRY_AFTER: Final = _HOUR
_JITTER: Final = 0.2

#: Failures in a row after which a line is held back as a whole, and tried with one delivery alone.
CIRCUIT_FAILURES: Final = 5
LONGEST_BLOCK_SECONDS: Final = 60.0


def retry_delay(
    failures: int,
    age_seconds: float,
    retry_after: float | None = None,
    chance: Callable[[], float] = random.random,
) -> float | None:
    """Seconds until the next try, or None where there is none.

    Args:
        failures: tries that failed so far, the last one included.
        age_seconds: how long the delivery has been owed.
        retry_after: what the receiver asked for, in seconds.
        chance: uniform in [0, 1).
    """
    if failures >= len(DELAYS) or age_seconds >= GIVEN_UP_SECONDS:
        return None
    delay = DELAYS[failures] * (1 - _JITTER + 2 * _JITTER * chance())
    if retry_after is not None:
        delay = max(delay, min(retry_after, LONGEST_RETRY_AFTER))
    return delay


def read_retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` asks for; None where it says nothing that can be read.

    Args:
        now: aware, to compare a date with.
    """
    if value is None or len(value) > 64:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text), GIVEN_UP_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - now).total_seconds()), GIVEN_UP_SECONDS)
