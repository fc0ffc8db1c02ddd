"""Overlap, failures, and the ends of runs, in a time of the test's own, on real Postgres."""

from datetime import UTC, datetime

import pytest

from core.ids import IdPrefix, format_id
from db import files, registry, schedule_runs, schedules
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.schedules import Timeline, batches_of
from workers.steward.schedules import tick_and_fire


@pytest.fixture
def clock(database: Database) -> Timeline:
    return Timeline(database, datetime(2027, 5, 1, 12, tzinfo=UTC))


async def hour(clock: Timeline) -> None:
    """One hour, one tick."""
    clock.later(hours=1)
    await clock.tick()


# --- overlap --------------------------------------------------------------------------------------


async def test_allow(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", overlap="allow")
    for _ in range(3):
        await hour(clock)
    assert await clock.states(made) == ["started"] * 3


async def test_skip(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", overlap="skip")
    await hour(clock)
    await hour(clock)
    await clock.end_batches()
    await hour(clock)
    assert await clock.states(made) == ["finished", "skipped: overlap", "started"]


async def test_queue(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", overlap="queue")
    for _ in range(3):
        await hour(clock)
    assert await clock.states(made) == ["started", "queued", "queued"]
    await clock.end_batches()
    clock.later(minutes=5)
    await clock.tick()
    assert await clock.states(made) == ["finished", "started", "queued"]
    second = (await clock.runs(made))[1]
    assert (second["started_at"] - second["due_at"]).total_seconds() == 65 * 60
    await clock.end_batches()
    await hour(clock)  # the next firing does not overtake the one that waits
    assert await clock.states(made) == ["finished", "finished", "started", "queued"]


async def test_a_firing_does_not_overtake_one_that_was_not_woken_yet(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", overlap="queue")
    await hour(clock)
    await hour(clock)
    await clock.end_batches()
    clock.later(hours=1)
    await tick_and_fire(clock.database, clock.now)
    assert await clock.states(made) == ["started", "queued", "queued"]
    await clock.tick()
    assert await clock.states(made) == ["finished", "started", "queued"]


async def test_queue_is_bounded(clock: Timeline) -> None:
    made = await clock.create(every_seconds=60, overlap="queue", missed="all")
    clock.later(seconds=110 * 60)
    await clock.tick()
    states = await clock.states(made)
    assert states[:101] == ["started", *["queued"] * 100]
    assert states[101:] == ["skipped: overlap"] * 9


async def test_cancel_previous(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", overlap="cancel_previous")
    await hour(clock)
    await hour(clock)
    assert await clock.states(made) == ["started", "started"]
    assert [run["batch_status"] for run in await clock.runs(made)] == ["cancelling", "validating"]
    assert await batches_of(clock.database) == {"cancelling": 1, "validating": 1}


async def test_missed_runs_that_are_caught_up_with_do_not_overlap_either(
    clock: Timeline,
) -> None:
    made = await clock.create(cron="0 * * * *", overlap="skip", missed="all")
    clock.later(hours=4)
    await clock.tick()
    assert await clock.states(made) == ["started", *["skipped: overlap"] * 3]


async def test_a_run_that_was_asked_for_obeys_the_policy(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", overlap="skip")
    await hour(clock)
    clock.later(minutes=1)
    await clock.act(schedule_runs.run_now, made)
    await clock.tick()
    assert await clock.states(made) == ["started", "skipped: overlap"]


# --- runs that fail to start ----------------------------------------------------------------------


async def test_a_missing_file_is_recorded_and_the_schedule_stays(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *")
    file_id = (await clock.row(made))["input_file_id"]
    await files.delete(clock.database, DEFAULT_TENANT_ID, file_id)
    await hour(clock)
    (run,) = await clock.runs(made)
    assert (run["state"], run["error_code"]) == ("failed", "file_not_found")
    assert format_id(IdPrefix.FILE, file_id) in run["error_message"]
    assert run["batch_id"] is None
    row = await clock.row(made)
    assert row["next_fire_at"] is not None
    await clock.tick()
    assert (await clock.row(made))["failures_in_a_row"] == 1


async def test_a_missing_adapter_is_recorded_and_the_schedule_stays(clock: Timeline) -> None:
    await registry.declare_base(clock.database, "base", 4096)
    made = await clock.create(cron="0 * * * *", model="base")
    await hour(clock)
    async with clock.database.connection() as connection:
        await connection.execute("UPDATE base_models SET name = 'gone'")
    await hour(clock)
    first, second = await clock.runs(made)
    assert first["state"] == "started"
    assert (second["state"], second["error_code"]) == ("failed", "model_not_found")
    assert "'base' does not exist" in second["error_message"]
    assert (await clock.row(made))["next_fire_at"] is not None


async def test_a_batch_that_fails_validation_is_a_failed_run(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *")
    await hour(clock)
    await clock.end_batches("failed")
    await clock.tick()
    (run,) = await clock.runs(made)
    assert (run["state"], run["error_code"]) == ("failed", "model_not_found")
    assert run["error_message"] == "line 2: no such model"
    assert run["batch_status"] == "failed"


async def test_runs_that_fail_are_told_and_batches_get_the_url(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", webhook_url="https://example.com/hook")
    file_id = (await clock.row(made))["input_file_id"]
    await hour(clock)
    url = await clock.database.fetch_value("SELECT webhook_url FROM batches")
    assert url == "https://example.com/hook"
    await clock.end_batches("failed")
    await clock.tick()
    await files.delete(clock.database, DEFAULT_TENANT_ID, file_id)
    await hour(clock)
    async with clock.database.connection() as connection:
        told = await connection.fetch("SELECT * FROM deliveries ORDER BY id")
    runs = await clock.runs(made)
    assert [run["state"] for run in runs] == ["failed", "failed"]
    assert [row["subject"] for row in told] == [format_id(IdPrefix.RUN, r["id"]) for r in runs]
    assert {(row["type"], row["told"], row["url"]) for row in told} == {
        ("schedule.run_failed", "failed", "https://example.com/hook")
    }
    shown = format_id(IdPrefix.SCHEDULE, made)
    assert {row["link"] for row in told} == {f"/v1/schedules/{shown}/runs"}


@pytest.mark.parametrize(
    ("status", "completed", "state"),
    [
        ("completed", 3, "finished"),
        ("completed", 1, "finished"),
        ("completed", 0, "failed"),
        ("expired", 2, "finished"),
        ("expired", 0, "failed"),
        ("cancelled", 0, "finished"),
    ],
)
async def test_a_run_without_a_single_answer_has_failed(
    clock: Timeline, status: str, completed: int, state: str
) -> None:
    made = await clock.create(cron="0 * * * *")
    await hour(clock)
    await clock.end_batches(status, completed)
    await clock.tick()
    assert await clock.states(made) == [state]


async def test_failures_in_a_row_pause_the_schedule(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", pause_after_failures=3)
    for end in ("failed", "failed", "completed", "failed", "failed", "failed"):
        await hour(clock)
        await clock.end_batches(end)
        await clock.tick()
    row = await clock.row(made)
    assert (row["pause_reason"], row["next_fire_at"]) == ("failures", None)
    assert row["failures_in_a_row"] == 3
    for _ in range(3):
        await hour(clock)
    assert len(await clock.runs(made)) == 6
    await clock.act(schedules.resume, made)
    await hour(clock)
    assert (await clock.states(made))[-1] == "started"
    assert (await clock.row(made))["failures_in_a_row"] == 0


async def test_no_number_of_failures_pauses_where_that_is_off(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", pause_after_failures=0)
    for _ in range(15):
        await hour(clock)
        await clock.end_batches("failed")
    await clock.tick()
    row = await clock.row(made)
    assert (row["paused_at"], row["failures_in_a_row"]) == (None, 15)


async def test_a_pause_by_failures_skips_what_waits(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", pause_after_failures=1, overlap="queue")
    await hour(clock)
    await hour(clock)
    assert await clock.states(made) == ["started", "queued"]
    await clock.end_batches("failed")
    await clock.tick()
    assert await clock.states(made) == ["failed", "skipped: paused"]


# --- the rest -------------------------------------------------------------------------------------


async def test_a_deleted_schedule_leaves_its_batches(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *")
    await hour(clock)
    file_id = (await clock.row(made))["input_file_id"]
    await schedules.delete(clock.database, DEFAULT_TENANT_ID, made)
    await hour(clock)
    assert await clock.runs(made) == []
    assert await clock.database.fetch_value("SELECT count(*) FROM batches") == 1
    expires = await clock.database.fetch_value(
        "SELECT expires_at FROM files WHERE id = $1", file_id
    )
    assert expires is not None


async def test_a_disabled_schedule_does_not_fire(clock: Timeline) -> None:
    made = await clock.create(cron="0 * * * *", enabled=False)
    await hour(clock)
    await clock.change(made, cron="0 * * * *", enabled=True)
    await hour(clock)
    assert await clock.firings(made) == ["05-01 14:00"]


async def test_old_runs_are_pruned(clock: Timeline) -> None:
    clock.now = datetime(2020, 5, 1, 12, tzinfo=UTC)
    made = await clock.create(cron="0 * * * *")
    await hour(clock)
    await hour(clock)
    await clock.end_batches()
    await clock.tick()
    await hour(clock)
    assert await schedule_runs.prune_runs(clock.database, 86_400) == 2
    assert await clock.states(made) == ["started"]
