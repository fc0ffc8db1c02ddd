"""The promise of a batch: from measured rates, with a warning where the window will not hold."""

from dataclasses import replace

import pytest

from core.promise import Work, promise

WORK = Work(remaining=100, finished=0, since_seconds=0, ahead=0, jobs_per_second=10, workers=1)


@pytest.mark.parametrize(
    ("work", "finish"),
    [
        (WORK, 1010),
        (replace(WORK, ahead=50), 1015),
        (replace(WORK, jobs_per_second=0), None),
        # its own pace counts once it is known, whatever the workers do elsewhere
        (replace(WORK, finished=50, since_seconds=25, ahead=9999), 1050),
        (replace(WORK, finished=49, since_seconds=25), 1010),
        (replace(WORK, finished=50, since_seconds=9), 1010),
    ],
)
def test_the_finish_is_estimated(work: Work, finish: int | None) -> None:
    assert promise(work, 1000, 90_000)["estimated_finish_at"] == finish


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (replace(WORK, workers=0, jobs_per_second=0), "no worker is running"),
        (replace(WORK, workers=0), "any more"),
        (replace(WORK, jobs_per_second=1), "60 s after its window ends"),
        (replace(WORK, jobs_per_second=0.1), "16 min after its window ends"),
        (replace(WORK, jobs_per_second=0.01), "2.8 h after its window ends"),
    ],
)
def test_what_speaks_against_it_is_said(work: Work, words: str) -> None:
    assert words in promise(work, 1000, 1040)["warning"]


def test_a_window_that_holds_needs_no_warning() -> None:
    assert promise(WORK, 1000, 1040)["warning"] is None
    assert promise(replace(WORK, jobs_per_second=0), 1000, 1040)["warning"] is None
