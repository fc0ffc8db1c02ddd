"""What a fold is taken to gain, from what the engine was seen to do."""

import pytest

from workers.drain.folding import FORGET_SECONDS, GAIN_PRIOR, REMEMBER_SECONDS, Gauge


def test_nothing_is_believed_before_both_were_seen_for_a_while() -> None:
    gauge = Gauge()
    gauge.add(False, 60_000, 60_000, 10)
    gauge.add(True, 100, 100, 1)
    assert gauge.gain == GAIN_PRIOR


def test_a_short_fold_that_is_mostly_prompts_is_not_taken_to_be_slow() -> None:
    """6,000 tokens a second without a fold, and 8,000 in one that begins with 50,000 of prompts."""
    gauge = Gauge()
    gauge.add(False, 60_000, 60_000, 10)
    for _ in range(3):
        gauge.add(True, 0, 50_000, 50_000 / 40_000)
        gauge.add(True, 8_000, 8_000, 1)
    assert gauge.gain == pytest.approx(8 / 6)


def test_a_fold_that_was_found_not_to_gain_is_tried_again_in_time() -> None:
    gauge = Gauge()
    gauge.add(False, 60_000, 60_000, 10)
    gauge.add(True, 30_000, 30_000, 10)
    assert gauge.gain == pytest.approx(0.5)
    gauge.add(False, FORGET_SECONDS * 6_000, FORGET_SECONDS * 6_000, FORGET_SECONDS)
    assert gauge.gain == pytest.approx(0.5)
    gauge.add(False, 6_000, 6_000, 1)
    assert gauge.gain == GAIN_PRIOR
    gauge.add(True, 45_000, 45_000, 5)
    assert gauge.gain == pytest.approx(1.5)


def test_the_newest_counts_most() -> None:
    gauge = Gauge()
    gauge.add(False, 60_000, 60_000, 10)
    gauge.add(
        True, 6_000 * REMEMBER_SECONDS * 2, 6_000 * REMEMBER_SECONDS * 2, REMEMBER_SECONDS * 2
    )
    assert gauge.gain == pytest.approx(1)
    for _ in range(10):
        gauge.add(True, 9_000 * REMEMBER_SECONDS, 9_000 * REMEMBER_SECONDS, REMEMBER_SECONDS)
    assert gauge.gain == pytest.approx(1.5, rel=0.01)
