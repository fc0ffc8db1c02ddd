"""Rules of schedules: intervals, bounds, missed firings, jitter, and bodies that are refused."""

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.ids import IdPrefix, format_id, new_id
from core.schedule_request import check_fires, check_schedule, merged
from core.schedule_rules import MOST_RECORDED, Missed, Rule, due_at, take_due

DAY = datetime(2027, 1, 1, tzinfo=UTC)
HOURLY = Rule("UTC", every_seconds=3600, anchor_at=DAY)
WEEK = 7 * 86_400


def at(hours: float) -> datetime:
    return DAY + timedelta(hours=hours)


def test_an_interval_keeps_to_its_grid() -> None:
    assert list(islice(HOURLY.firings(at(0.5)), 2)) == [at(1), at(2)]
    assert HOURLY.next_after(at(2)) == at(3)
    assert HOURLY.next_after(DAY - timedelta(days=9)) == DAY
    assert HOURLY.next_after(at(24 * 365 * 30) + timedelta(seconds=1)) == at(24 * 365 * 30 + 1)


def test_start_and_end_count_themselves() -> None:
    rule = Rule("UTC", cron="0 * * * *", start_at=at(2), end_at=at(4))
    assert list(rule.firings(at(0))) == [at(2), at(3), at(4)]


def test_once() -> None:
    rule = Rule("UTC", at=at(5))
    assert rule.next_after(at(4)) == at(5)
    assert rule.next_after(at(5)) is None


@pytest.mark.parametrize(
    ("policy", "late", "run", "passed"),
    [
        # on time: one is due, and noticed at once
        (Missed.SKIP, 0.001, [1], []),
        (Missed.LATEST, 0.001, [1], []),
        (Missed.ALL, 0.001, [1], []),
        # noticed half an hour late
        (Missed.SKIP, 0.5, [], [1]),
        (Missed.LATEST, 0.5, [1], []),
        (Missed.ALL, 0.5, [1], []),
        # nobody looked for three hours and some
        (Missed.SKIP, 3.5, [], [1, 2, 3, 4]),
        (Missed.LATEST, 3.5, [4], [1, 2, 3]),
        (Missed.ALL, 3.5, [1, 2, 3, 4], []),
        # nobody looked for three hours, but for this one in time
        (Missed.SKIP, 3.001, [4], [1, 2, 3]),
    ],
)
def test_missed_firings(policy: Missed, late: float, run: list[int], passed: list[int]) -> None:
    due = take_due(HOURLY, at(1), at(1 + late), policy, WEEK)
    assert due.run == [at(hour) for hour in run]
    assert due.skipped == [at(hour) for hour in passed]
    assert due.missed == len(passed)
    assert due.next_fire_at == at(max(run + passed) + 1)


def test_what_is_older_than_the_window_is_not_caught_up_with() -> None:
    due = take_due(HOURLY, at(1), at(10.5), Missed.ALL, 3 * 3600)
    assert due.run == [at(8), at(9), at(10)]
    assert due.missed == 7


@pytest.mark.parametrize("policy", list(Missed))
def test_a_long_outage_comes_in_pieces(policy: Missed) -> None:
    minutely = Rule("UTC", cron="* * * * *")
    now, first, run, missed = at(72) + timedelta(seconds=1), at(0), [], 0
    while first is not None and first <= now:
        due = take_due(minutely, first, now, policy, WEEK)
        assert len(due.skipped) <= MOST_RECORDED
        run += due.run
        missed += due.missed
        assert due.next_fire_at is not None
        first = due.next_fire_at
    minutes = 72 * 60 + 1
    expected = minutes if policy is Missed.ALL else 1
    assert (len(run), missed) == (expected, minutes - expected)
    assert run[-1] == at(72)


def test_the_end_leaves_no_next_firing() -> None:
    rule = Rule("UTC", every_seconds=3600, anchor_at=DAY, end_at=at(2))
    assert take_due(rule, at(1), at(9), Missed.LATEST, WEEK).next_fire_at is None


def test_jitter_is_spread_and_always_the_same() -> None:
    ids = [new_id().bytes for _ in range(400)]
    late = [(due_at(i, DAY, 600) - DAY).total_seconds() for i in ids]
    assert late == [(due_at(i, DAY, 600) - DAY).total_seconds() for i in ids]
    assert 0 <= min(late) < 60
    assert 540 < max(late) < 600
    assert due_at(ids[0], DAY, 0) == DAY


# --- bodies ---------------------------------------------------------------------------------------

FILE = format_id(IdPrefix.FILE, new_id())
NIGHTLY: dict[str, Any] = {"cron": "0 2 * * *", "input_file_id": FILE}
SECONDS = int(DAY.timestamp())


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"cron": "61 * * * *"}, "cron", "the minute '61'"),
        ({"cron": "0 0 30 2 *"}, "cron", "never fires"),
        ({"timezone": "Mars/Base"}, "timezone", "is not known"),
        ({"start_at": SECONDS, "end_at": SECONDS - 1}, "end_at", "is not behind start_at"),
        ({"start_at": SECONDS, "end_at": SECONDS}, "end_at", "is not behind start_at"),
        ({"cron": None, "every_seconds": 0}, "every_seconds", "greater than or equal to 1, not 0"),
        ({"cron": None, "every_seconds": -5}, "every_seconds", "greater than or equal to 1"),
        ({"cron": None, "every_seconds": 10**9}, "every_seconds", "less than or equal to"),
        ({"every_seconds": 60}, "cron", "cannot stand together (cron, every_seconds)"),
        ({"cron": None}, "cron", "are all missing; give exactly one"),
        ({"at": 1e14, "cron": None}, "at", "not milliseconds"),
        ({"input_file_id": None}, "input_file_id", "is required (or requests)"),
        ({"requests": [{}]}, "requests", "and input_file_id are both given"),
        ({"requests": [{}], "input_file_id": None, "template": {}}, "template", "needs input_file"),
        ({"requests": []}, "requests", "at least 1 item"),
        ({"missed": "never"}, "missed", "'skip', 'latest' or 'all'"),
        ({"overlap": "kill"}, "overlap", "'allow', 'skip', 'queue' or 'cancel_previous'"),
        ({"catch_up_seconds": 1}, "catch_up_seconds", "greater than or equal to 60"),
        ({"jitter_seconds": 10**6}, "jitter_seconds", "less than or equal to 86400"),
        ({"pause_after_failures": -1}, "pause_after_failures", "greater than or equal to 0"),
        ({"priority": 101}, "priority", "less than or equal to 100"),
        ({"completion_window": "soon"}, "completion_window", "must be a duration"),
        ({"name": "a b"}, "name", "letters, digits"),
        ({"dst_gap": "later"}, "dst_gap", "'after' or 'skip'"),
        ({"crom": "* * * * *"}, "crom", "did you mean 'cron'?"),
    ],
)
def test_a_bad_body_is_refused_with_its_field_and_reason(
    change: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_schedule({**NIGHTLY, **change})
    assert refused.value.details["field"] == field
    assert said in refused.value.message


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"cron": None, "at": SECONDS - 1}, "at", "has passed (now is 2027-01-01 00:00:00Z)"),
        ({"end_at": SECONDS - 1}, "end_at", "has passed"),
        ({"start_at": SECONDS + 10, "end_at": SECONDS + 60}, "cron", "never fires between"),
        ({"cron": None, "at": SECONDS + 99, "end_at": SECONDS + 60}, "at", "never fires between"),
    ],
)
def test_a_rule_with_nothing_left_to_fire_for_is_refused(
    body: dict[str, Any], field: str, said: str
) -> None:
    asked = check_schedule({**NIGHTLY, **body})
    with pytest.raises(InvalidRequest) as refused:
        check_fires(asked.rule, DAY)
    assert refused.value.details["field"] == field
    assert said in refused.value.message


def test_a_change_replaces_the_rule_and_the_input() -> None:
    assert merged(NIGHTLY, {"every_seconds": 60})["cron"] is None
    changed = merged({**NIGHTLY, "template": {}}, {"requests": [{}]})
    assert (changed["input_file_id"], changed["template"]) == (None, None)
    assert merged({**NIGHTLY, "missed": "all"}, {"missed": None})["missed"] is None
