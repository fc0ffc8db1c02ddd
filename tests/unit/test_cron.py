"""Cron rules: what is refused and why, and the nights when clocks change."""

import itertools
import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim

from core.cron import DstFold, DstGap, check_cron, check_zone, firings, follows_elapsed_time
from core.errors import InvalidRequest


def listed(
    rule: str,
    zone: str,
    after: str,
    count: int,
    gap: DstGap = DstGap.AFTER,
    fold: DstFold = DstFold.FIRST,
) -> list[str]:
    """Firings behind a UTC time, as `28 01:00`, in UTC."""
    begin = datetime.fromisoformat(after).replace(tzinfo=UTC)
    found = itertools.islice(firings(rule, ZoneInfo(zone), begin, gap, fold), count)
    return [moment.strftime("%d %H:%M") for moment in found]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("61 * * * *", "the minute '61', which is none; give 0 to 59"),
        ("* 24 * * *", "the hour '24'"),
        ("* * 32 * *", "the day of month '32'"),
        ("* * 0 * *", "the day of month '0'"),
        ("* * * 13 *", "the month '13'"),
        ("* * * * 8", "the day of week '8'"),
        ("5-1 * * * *", "the minute '5-1'"),
        ("*/0 * * * *", "the minute '*/0'"),
        ("1,,2 * * * *", "the minute '1,,2'"),
        ("a b c d e", "the minute 'a'"),
        ("² * * * *", "the minute '²'"),
        ("0 0 ? * *", "the day of month '?'"),
        ("0 0 * * 1#6", "the day of week '1#6'"),
        ("0 0 * * 1#1/2", "the day of week '1#1/2'"),
        ("0 0 30 2 *", "never fires: no date has the day of month '30', the month '2'"),
        ("0 0 31 2,4,6 *", "never fires"),
        ("0 0 31 4 */2", "never fires"),
        ("* * * *", "has 4 fields; give five"),
        ("0 * * * * *", "has 6 fields; give five"),
        ("", "has 0 fields"),
        ("@reboot", "is no nickname; give one of @hourly"),
        ("0 0 " + "1," * 200 + "1 * *", "is longer than 200 characters"),
    ],
)
def test_a_bad_rule_is_refused_with_its_reason(rule: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_cron(rule)
    assert said in refused.value.message
    assert refused.value.details["field"] == "cron"


@pytest.mark.parametrize("name", ["Mars/Base", "", "../etc/passwd", "Europe/Berlin\0", "x" * 999])
def test_an_unknown_zone_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not known; give an IANA name"):
        check_zone(name)


def test_nicknames_and_spaces() -> None:
    assert check_cron(" @Daily ") == "0 0 * * *"
    assert check_cron("0  2 *\t* mon-fri") == "0 2 * * mon-fri"


# --- the nights when clocks change ----------------------------------------------------------------

GAPS = [
    # 02:00 becomes 03:00, at 01:00 UTC
    ("Europe/Berlin", "30 2 * * *", "2027-03-27T12:00", ["28 01:00", "29 00:30"], "29 00:30"),
    # 02:00 becomes 03:00, at 07:00 UTC
    ("America/New_York", "30 2 * * *", "2027-03-13T12:00", ["14 07:00", "15 06:30"], "15 06:30"),
    # 02:00 becomes 02:30, at 15:30 UTC the day before
    ("Australia/Lord_Howe", "15 2 * * *", "2027-10-02T00:00", ["02 15:30", "03 15:15"], "03 15:15"),
    # midnight becomes 01:00, at 22:00 UTC the day before
    ("Africa/Cairo", "0 0 * * *", "2027-04-29T12:00", ["29 22:00", "30 21:00"], "30 21:00"),
]


@pytest.mark.parametrize(("zone", "rule", "after", "expected", "next_one"), GAPS)
def test_a_time_that_is_skipped(
    zone: str, rule: str, after: str, expected: list[str], next_one: str
) -> None:
    assert listed(rule, zone, after, 2) == expected
    assert listed(rule, zone, after, 1, DstGap.SKIP) == [next_one]


FOLDS = [
    # 03:00 becomes 02:00, at 01:00 UTC
    ("Europe/Berlin", "30 2 * * *", "2027-10-30T12:00", "31 00:30", "31 01:30", "01 01:30"),
    # 02:00 becomes 01:00, at 06:00 UTC
    ("America/New_York", "30 1 * * *", "2027-11-06T12:00", "07 05:30", "07 06:30", "08 06:30"),
    # 02:00 becomes 01:30, at 15:00 UTC
    ("Australia/Lord_Howe", "45 1 * * *", "2027-04-03T12:00", "03 14:45", "03 15:15", "04 15:15"),
]


@pytest.mark.parametrize(("zone", "rule", "after", "first", "second", "next_one"), FOLDS)
def test_a_time_that_comes_twice(
    zone: str, rule: str, after: str, first: str, second: str, next_one: str
) -> None:
    assert listed(rule, zone, after, 2) == [first, next_one]
    assert listed(rule, zone, after, 2, fold=DstFold.SECOND) == [second, next_one]
    assert listed(rule, zone, after, 3, fold=DstFold.BOTH) == [first, second, next_one]


def test_between_the_two_passes_nothing_is_lost_or_repeated() -> None:
    # asked in the second pass, where the wall clock is behind times that were already
    assert listed("30 2 * * *", "Europe/Berlin", "2027-10-31T01:10", 1) == ["01 01:30"]
    both = listed("30 2 * * *", "Europe/Berlin", "2027-10-31T00:40", 1, fold=DstFold.BOTH)
    assert both == ["31 01:30"]


@pytest.mark.parametrize(
    ("zone", "begin"),
    [
        ("Europe/Berlin", "2027-03-27T23:50"),
        ("Europe/Berlin", "2027-10-30T23:50"),
        ("America/New_York", "2027-03-14T05:50"),
        ("America/New_York", "2027-11-07T04:50"),
        ("Australia/Lord_Howe", "2027-10-02T14:50"),
        ("Australia/Lord_Howe", "2027-04-03T13:50"),
    ],
)
def test_a_rule_of_every_so_often_runs_through_at_an_even_pace(zone: str, begin: str) -> None:
    after = datetime.fromisoformat(begin).replace(tzinfo=UTC)
    found = list(
        itertools.islice(
            firings("*/10 * * * *", ZoneInfo(zone), after, DstGap.AFTER, DstFold.FIRST), 24
        )
    )
    assert {b - a for a, b in itertools.pairwise(found)} == {timedelta(minutes=10)}


# --- dates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "after", "expected"),
    [
        ("0 0 29 2 *", "2027-01-01", ["2028-02-29", "2032-02-29"]),
        ("0 0 29 2 *", "2096-03-01", ["2104-02-29"]),  # 2100 is no leap year
        ("0 0 31 * *", "2027-01-15", ["2027-01-31", "2027-03-31", "2027-05-31"]),
        ("0 0 L * *", "2027-12-30", ["2027-12-31", "2028-01-31", "2028-02-29"]),
        ("0 0 LW * *", "2027-01-01", ["2027-01-29", "2027-02-26"]),
        ("0 0 * * 5L", "2027-01-01", ["2027-01-29", "2027-02-26"]),
        ("0 0 1 1 *", "2027-01-01", ["2028-01-01"]),
        ("0 0 13 * 5", "2027-01-01", ["2027-01-08", "2027-01-13", "2027-01-15"]),
    ],
)
def test_leap_days_and_month_ends(rule: str, after: str, expected: list[str]) -> None:
    begin = datetime.fromisoformat(after).replace(tzinfo=UTC)
    found = firings(check_cron(rule), ZoneInfo("UTC"), begin, DstGap.AFTER, DstFold.FIRST)
    assert [f"{moment:%Y-%m-%d}" for moment in itertools.islice(found, len(expected))] == expected


# --- against the library's own treatment ----------------------------------------------------------

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Sydney", "Asia/Kolkata", "UTC")


def _some_rule(chosen: random.Random) -> str:
    minute = chosen.choice(["*/20", "0", "30", "15,45", "7", "*"])
    hour = chosen.choice(["*", "*/3", "2", "1-3", "0,12", "23"])
    day = chosen.choice(["*", "1", "15", "28-31", "L"])
    weekday = chosen.choice(["*", "0", "1-5", "SAT"])
    return f"{minute} {hour} {day} * {weekday}"


@pytest.mark.parametrize("seed", range(60))
def test_by_default_it_is_as_the_library_and_debians_cron_have_it(seed: int) -> None:
    chosen = random.Random(seed)
    rule, zone = _some_rule(chosen), ZoneInfo(chosen.choice(ZONES))
    changes = [datetime(2027, m, d, h, tzinfo=UTC) for m in (3, 4, 10, 11) for d in (1, 27, 30)
               for h in (0, 12)]  # fmt: skip
    after = chosen.choice(changes) + timedelta(minutes=chosen.randrange(2000))
    if after.astimezone(zone).fold:
        after += timedelta(hours=2)  # there the library goes back in time
    own = list(itertools.islice(firings(rule, zone, after, DstGap.AFTER, DstFold.FIRST), 60))
    library = [
        each.astimezone(UTC) for each in itertools.islice(CronSim(rule, after.astimezone(zone)), 60)
    ]
    # where it moves a skipped time onto one that is there, the library names that twice
    once = list(dict.fromkeys(library))
    assert own[: len(once)] == once
    assert all(a < b for a, b in itertools.pairwise([after, *own]))


@pytest.mark.parametrize("seed", range(40))
def test_asked_one_by_one_it_names_the_same_moments(seed: int) -> None:
    chosen = random.Random(seed)
    rule = _some_rule(chosen)
    zone = ZoneInfo(chosen.choice([*ZONES, "Australia/Lord_Howe", "Africa/Cairo"]))
    gap, fold = chosen.choice(list(DstGap)), chosen.choice(list(DstFold))
    after = datetime(2027, chosen.choice([3, 4, 10, 11]), 1, tzinfo=UTC)
    at_once = list(itertools.islice(firings(rule, zone, after, gap, fold), 300))
    one_by_one = []
    for _ in at_once:
        after = next(firings(rule, zone, after, gap, fold))
        one_by_one.append(after)
    assert one_by_one == at_once


def test_what_follows_elapsed_time() -> None:
    assert follows_elapsed_time("*/5 2 * * *")
    assert follows_elapsed_time("0 * * * *")
    assert not follows_elapsed_time("0 2-4 * * *")
