"""Schedules in a time of the test's own, on real Postgres: clock changes, dates, outages, edits."""

from datetime import UTC, datetime, timedelta

import pytest

from core.errors import InvalidRequest
from db import schedule_runs, schedules
from db.database import Database
from tests.support.schedules import Timeline, batches_of


def timeline(database: Database, now: str) -> Timeline:
    return Timeline(database, datetime.fromisoformat(now).replace(tzinfo=UTC))


# --- clock changes --------------------------------------------------------------------------------

NIGHTS = [
    # zone, daily rule, the noon before; firings by policy, in UTC
    ("Europe/Berlin", "30 2 * * *", "2027-03-27T12:00", {"after": ["03-28 01:00"], "skip": []}),
    ("America/New_York", "30 2 * * *", "2027-03-13T12:00", {"after": ["03-14 07:00"], "skip": []}),
    ("Australia/Lord_Howe", "15 2 * * *", "2027-10-02T02:00",
     {"after": ["10-02 15:30"], "skip": []}),
    ("Europe/Berlin", "30 2 * * *", "2027-10-30T12:00",
     {"first": ["10-31 00:30"], "second": ["10-31 01:30"], "both": ["10-31 00:30", "10-31 01:30"]}),
    ("America/New_York", "30 1 * * *", "2027-11-06T16:00",
     {"first": ["11-07 05:30"], "second": ["11-07 06:30"], "both": ["11-07 05:30", "11-07 06:30"]}),
    ("Australia/Lord_Howe", "45 1 * * *", "2027-04-03T02:00",
     {"first": ["04-03 14:45"], "second": ["04-03 15:15"], "both": ["04-03 14:45", "04-03 15:15"]}),
]  # fmt: skip


@pytest.mark.parametrize(("zone", "rule", "noon", "expected"), NIGHTS)
async def test_both_nights_in_three_zones(
    database: Database, zone: str, rule: str, noon: str, expected: dict[str, list[str]]
) -> None:
    clock = timeline(database, noon)
    made = {}
    for policy in expected:
        field = "dst_gap" if policy in ("after", "skip") else "dst_fold"
        made[policy] = await clock.create(cron=rule, timezone=zone, **{field: policy})
    even = await clock.create(cron="*/30 * * * *", timezone=zone)
    # a steward that ticks every ten minutes, to the next noon
    await clock.tick_through(24 * 3600, every=600)
    for policy, firings in expected.items():
        assert await clock.firings(made[policy]) == firings
        assert set(await clock.states(made[policy])) <= {"started"}
    begun = datetime.fromisoformat(noon).replace(tzinfo=UTC)
    each = [f"{begun + timedelta(minutes=30 * n):%m-%d %H:%M}" for n in range(1, 49)]
    assert await clock.firings(even, "started") == each


@pytest.mark.parametrize(
    ("rule", "begin", "days", "expected"),
    [
        ("0 0 29 2 *", "2028-02-27T00:00", 400, ["02-29 00:00"]),
        ("0 0 31 * *", "2027-01-15T00:00", 140, ["01-31 00:00", "03-31 00:00", "05-31 00:00"]),
        ("0 0 L * *", "2028-01-30T00:00", 40, ["01-31 00:00", "02-29 00:00"]),
        ("0 0 30 * *", "2027-01-29T00:00", 62, ["01-30 00:00", "03-30 00:00"]),
    ],
)
async def test_leap_days_and_month_ends(
    database: Database, rule: str, begin: str, days: int, expected: list[str]
) -> None:
    clock = timeline(database, begin)
    made = await clock.create(cron=rule)
    await clock.tick_through(days * 86_400, every=6 * 3600)
    assert await clock.firings(made, "started") == expected


async def test_an_interval_once_and_the_dates_of_a_schedule(database: Database) -> None:
    clock = timeline(database, "2027-05-01T00:00")
    day = clock.now.timestamp()
    interval = await clock.create(every_seconds=5400)
    begins = await clock.create(every_seconds=5400, start_at=day + 3600, end_at=day + 9000)
    once = await clock.create(at=day + 7200)
    await clock.tick_through(4 * 3600, every=60)
    assert await clock.firings(interval) == ["05-01 01:30", "05-01 03:00"]
    assert await clock.firings(begins) == ["05-01 01:00", "05-01 02:30"]
    assert await clock.firings(once) == ["05-01 02:00"]
    assert (await clock.row(begins))["next_fire_at"] is None
    assert (await clock.row(once))["next_fire_at"] is None
    assert await batches_of(database) == {"validating": 5}


# --- outages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "started", "skipped"),
    [
        ({"missed": "skip"}, [], ["05-02 02:00", "05-03 02:00", "05-04 02:00"]),
        ({"missed": "latest"}, ["05-04 02:00"], ["05-02 02:00", "05-03 02:00"]),
        ({"missed": "all"}, ["05-02 02:00", "05-03 02:00", "05-04 02:00"], []),
        (
            {"missed": "all", "catch_up_seconds": 2 * 86_400},
            ["05-03 02:00", "05-04 02:00"],
            ["05-02 02:00"],
        ),
    ],
)
async def test_stewards_down_for_three_days(
    database: Database, policy: dict[str, object], started: list[str], skipped: list[str]
) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *", **policy)
    clock.later(days=3)
    await clock.tick()
    assert await clock.firings(made, "started") == started
    assert await clock.firings(made, "skipped") == skipped
    assert set(await clock.states(made)) <= {"started", "skipped: missed"}
    row = await clock.row(made)
    assert row["missed_runs"] == len(skipped)
    # and from then on as ever
    await clock.tick_through(86_400, every=3600)
    assert await clock.firings(made, "started") == [*started, "05-05 02:00"]


@pytest.mark.parametrize(("policy", "batches"), [("skip", 1), ("latest", 1), ("all", 4321)])
async def test_a_minutely_schedule_after_three_days(
    database: Database, policy: str, batches: int
) -> None:
    clock = timeline(database, "2027-05-01T12:00:30")
    made = await clock.create(cron="* * * * *", missed=policy)
    other = await clock.create(cron="0 0 1 1 *")
    clock.later(days=3, seconds=40)
    await clock.tick()
    assert len(await clock.firings(made, "started")) == batches
    assert (await clock.row(made))["missed_runs"] == 4321 - batches
    assert await clock.firings(other) == []


# --- edits ----------------------------------------------------------------------------------------


async def test_an_edit_between_due_and_tick_neither_loses_nor_doubles_the_firing(
    database: Database,
) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *")
    clock.later(hours=14, seconds=1)  # 02:00:01, and no tick yet
    await clock.change(made, cron="0 3 * * *")
    assert await clock.states(made) == ["pending"]
    await clock.tick()
    await clock.tick()
    assert await clock.firings(made, "started") == ["05-02 02:00"]
    await clock.tick_through(2 * 3600, every=600)
    assert await clock.firings(made, "started") == ["05-02 02:00", "05-02 03:00"]


async def test_an_edit_to_a_rule_that_was_due_already_does_not_fire_back_in_time(
    database: Database,
) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *")
    clock.later(hours=1)
    await clock.change(made, cron="30 12 * * *")
    await clock.tick()
    assert await clock.firings(made) == []
    assert (await clock.row(made))["next_fire_at"].isoformat() == "2027-05-02T12:30:00+00:00"


async def test_an_edit_of_something_else_leaves_the_grid_of_an_interval(
    database: Database,
) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(every_seconds=3600)
    clock.later(minutes=30)
    await clock.change(made, every_seconds=3600, metadata={"a": "b"})
    await clock.tick_through(3600, every=300)
    assert await clock.firings(made) == ["05-01 13:00"]


async def test_an_edit_that_never_fires_is_refused_and_changes_nothing(
    database: Database,
) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *")
    with pytest.raises(InvalidRequest, match="has passed"):
        await clock.change(made, at=clock.now.timestamp() - 1)
    assert (await clock.row(made))["cron"] == "0 2 * * *"


async def test_a_pause_between_due_and_tick_stops_the_firing(database: Database) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *")
    clock.later(hours=14, seconds=1)
    await clock.act(schedules.pause, made)
    await clock.tick()
    assert await clock.states(made) == ["skipped: paused"]
    clock.later(days=3)
    await clock.tick()
    await clock.act(schedules.resume, made)  # at 02:00:01 three days later
    assert await clock.tick() == 0
    await clock.tick_through(86_400, every=3600)
    assert await clock.firings(made, "started") == ["05-06 02:00"]


async def test_run_now_and_skip_next(database: Database) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *")
    await clock.act(schedule_runs.skip_next, made)
    await clock.act(schedule_runs.run_now, made)
    await clock.act(schedule_runs.run_now, made)  # in the very same microsecond
    await clock.tick()
    assert await clock.states(made) == ["started", "started", "skipped: requested"]
    await clock.tick_through(2 * 86_400, every=3600)
    assert (await clock.firings(made, "started"))[2:] == ["05-03 02:00"]
    await clock.act(schedules.pause, made)
    await clock.act(schedule_runs.run_now, made)
    await clock.tick()
    assert (await clock.states(made))[-1] == "started"
    with pytest.raises(InvalidRequest, match="no next firing"):
        await clock.act(schedule_runs.skip_next, made)


async def test_a_skipped_firing_stays_skipped_when_the_rule_is_taken_anew(
    database: Database,
) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = await clock.create(cron="0 2 * * *")
    await clock.act(schedule_runs.skip_next, made)
    await clock.change(made, cron="0 2 * * *", timezone="Etc/UTC")
    await clock.tick_through(86_400, every=3600)
    assert await clock.states(made) == ["skipped: requested"]


# --- jitter ---------------------------------------------------------------------------------------


async def test_jitter_spreads_the_starts_and_is_no_lateness(database: Database) -> None:
    clock = timeline(database, "2027-05-01T12:00")
    made = [await clock.create(cron="0 13 * * *", jitter_seconds=600) for _ in range(40)]
    clock.later(hours=1)
    await clock.tick()
    waiting = [await clock.states(each) for each in made]
    assert waiting.count(["pending"]) >= 35
    await clock.tick_through(600, every=10)
    starts = set()
    for each in made:
        (run,) = await clock.runs(each)
        assert run["state"] == "started"
        assert timedelta() <= run["started_at"] - run["due_at"] <= timedelta(seconds=10)
        starts.add(run["started_at"])
    assert len(starts) > 20
