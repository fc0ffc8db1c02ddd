"""What becomes of a job whose try failed: a value, decided without I/O."""

import random
from dataclasses import dataclass
from typing import Final

from core.errors import ErrorCode

#: Failures that another try may not meet again. Everything else is the job's own doing.
RETRYABLE: Final = frozenset({ErrorCode.ENGINE_ERROR, ErrorCode.ADAPTER_LOAD_FAILED})

FIRST_DELAY_SECONDS: Final = 1.0
LONGEST_DELAY_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Queue the job again, not before `delay_seconds` from now."""

    delay_seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job fails with this code."""

    code: ErrorCode


def after_failure(
    code: ErrorCode, failures: int, max_attempts: int, jitter: random.Random
) -> Retry | GiveUp:
    """Decide on a job's next step after a failed try.

    Args:
        code: why the try failed.
        failures: failed tries so far, this one included.
        max_attempts: the retry budget, `LORRY_MAX_ATTEMPTS`.
        jitter: spreads retries by ±50 %, so that a herd does not come back at once.
    """
    if code not in RETRYABLE:
        return GiveUp(code)
    if failures >= max_attempts:
        return GiveUp(ErrorCode.ATTEMPTS_EXHAUSTED)
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (failures - 1))
    return Retry(delay * jitter.uniform(0.5, 1.5))
