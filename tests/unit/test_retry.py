"""Retries are values: which failures are tried again, how often, and after how long."""

import random

import pytest

from core.errors import ErrorCode
from core.retry import (
    FINAL,
    LONE_ENGINE_DEATHS,
    RETRYABLE,
    GiveUp,
    Retry,
    after_failure,
    backoff,
    lone_losses,
)

JITTER = random.Random(1)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_code_is_of_one_class(code: ErrorCode) -> None:
    assert (code in RETRYABLE) != (code in FINAL)


@pytest.mark.parametrize("code", sorted(FINAL))
def test_what_another_try_meets_again_is_not_tried_again(code: ErrorCode) -> None:
    assert after_failure(code, 1, 3, JITTER) == GiveUp(code)


@pytest.mark.parametrize("code", sorted(RETRYABLE))
def test_a_hiccup_is_tried_again_within_the_budget(code: ErrorCode) -> None:
    assert isinstance(after_failure(code, 1, 3, JITTER), Retry)
    assert isinstance(after_failure(code, 2, 3, JITTER), Retry)
    assert after_failure(code, 3, 3, JITTER) == GiveUp(ErrorCode.ATTEMPTS_EXHAUSTED)


def test_delays_double_up_to_a_minute_and_are_spread() -> None:
    for tries, middle in ((1, 1), (2, 2), (3, 4), (7, 60), (100, 60), (5000, 60)):
        seen = [backoff(tries, JITTER) for _ in range(200)]
        assert 0.5 * middle <= min(seen) < 0.7 * middle
        assert 1.3 * middle < max(seen) <= 1.5 * middle


def test_a_lost_worker_convicts_no_sooner_than_a_dead_engine() -> None:
    assert lone_losses(1) == LONE_ENGINE_DEATHS
    assert lone_losses(5) == 5
