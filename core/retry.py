"""What becomes of a job whose try failed: a value, decided without I/O.

Three kinds of trouble, and what each costs a job:

- its own doing, or something that another try meets again: the job fails at once (`FINAL`);
- a hiccup at this job alone: another try after a growing delay, from its budget (`RETRYABLE`);
- the death of the engine or the loss of the worker: nothing, unless the job was alone in the engine
  (db/suspects.py).
"""

import random
from dataclasses import dataclass
from typing import Final

from core.errors import ErrorCode

#: Failures that another try may not meet again.
RETRYABLE: Final = frozenset({ErrorCode.ENGINE_ERROR})
#: The job's or its adapter's own doing, and the end of a budget.
FINAL: Final = frozenset(
    {
        ErrorCode.INVALID_REQUEST,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.ADAPTER_MISSING,
        ErrorCode.ADAPTER_LOAD_FAILED,
        ErrorCode.ADAPTER_REJECTED,
        ErrorCode.UNSTORABLE,
        ErrorCode.ATTEMPTS_EXHAUSTED,
    }
)

FIRST_DELAY_SECONDS: Final = 1.0
LONGEST_DELAY_SECONDS: Final = 60.0
#: An engine that died twice with one job alone in it died of that job.
LONE_ENGINE_DEATHS: Final = 2


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
        jitter: spreads retries, so that a herd does not come back at once.
    """
    if code not in RETRYABLE:
        return GiveUp(code)
    if failures >= max_attempts:
        return GiveUp(ErrorCode.ATTEMPTS_EXHAUSTED)
    return Retry(backoff(failures, jitter))


def backoff(tries: int, jitter: random.Random) -> float:
    """Seconds to wait after so many failed tries: 1, 2, 4 … at most 60, each ±50 %."""
    # bounded before it is raised: 2.0 ** 1024 is an error
    delay = FIRST_DELAY_SECONDS * 2.0 ** min(tries - 1, 10)
    return min(LONGEST_DELAY_SECONDS, delay) * jitter.uniform(0.5, 1.5)


def lone_losses(max_attempts: int) -> int:
    """How often a worker may be lost with one job alone in its engine before the job fails.

    A worker is lost for many reasons that are no job's fault (a kill, a reboot, a network), so the
    operator's budget holds where it is larger.
    """
    return max(LONE_ENGINE_DEATHS, max_attempts)


def lone_delay(jitter: random.Random) -> float:
    """Seconds that a job waits after the engine died with it alone inside."""
    return backoff(1, jitter)
