"""`/v1/schedules`, once made: changed, acted on, listed, previewed."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from db import registry
from db.database import Database
from tests.support.api import BASE, CONTEXT, Api, assert_problem, count, running_api
from tests.support.batches import jsonl, line
from tests.support.schedules_api import ASK, act, content, created, fire, runs, uploaded


@pytest.fixture
async def api(database_url: str, database: Database, tmp_path: Path) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url, store_url=str(tmp_path / "store")) as running:
        yield running


async def test_a_change_of_some_fields_leaves_the_others(api: Api) -> None:
    made = await created(api, metadata={"a": "b"}, missed="all", model=BASE, requests=[ASK])
    change = {"cron": "30 4 * * *", "priority": 3, "missed": None, "name": "early"}
    response = await api.client.patch(f"/v1/schedules/{made['id']}", json=change)
    assert response.status_code == 200, response.text
    changed = response.json()
    assert (changed["cron"], changed["priority"], changed["name"]) == ("30 4 * * *", 3, "early")
    assert (changed["missed"], changed["metadata"]) == ("latest", {"a": "b"})
    assert changed["run_input_file_id"] == made["run_input_file_id"]
    assert changed["next_fire_at"] != made["next_fire_at"]
    interval = await api.client.patch("/v1/schedules/early", json={"every_seconds": 60})
    assert (interval.json()["cron"], interval.json()["every_seconds"]) == (None, 60)


async def test_a_change_of_the_input_makes_another_file(api: Api) -> None:
    made = await created(api)
    response = await api.client.patch(
        "/v1/schedules/nightly", json={"requests": [{"model": BASE, **ASK}] * 3}
    )
    changed = response.json()
    assert changed["requests"] == 3
    lines = await content(api, changed["run_input_file_id"])
    assert len(lines) == 3
    old = (await api.client.get(f"/v1/files/{made['run_input_file_id']}")).json()
    assert old["expires_at"] is not None
    rows = await uploaded(api, b"text\na\nb\n", "rows.csv")
    template = {"model": BASE, "prompt": "{text}", "max_tokens": 2}
    response = await api.client.patch(
        "/v1/schedules/nightly", json={"input_file_id": rows, "template": template}
    )
    assert (response.json()["endpoint"], response.json()["requests"]) == ("/v1/completions", None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cron": "0 0 31 2 *"}, "never fires"),
        ({"end_at": 1e9}, "has passed"),
        ({"template": {"prompt": "x"}}, "needs input_file_id"),
        ({"cron": None}, "are all missing"),
        ({"name": "other"}, "is that of another schedule"),
    ],
)
async def test_a_bad_change_is_refused_and_changes_nothing(
    api: Api, change: dict[str, Any], said: str
) -> None:
    made = await created(api)
    await created(api, name="other")
    response = await api.client.patch("/v1/schedules/nightly", json=change)
    assert_problem(response, 422, said)
    assert (await api.client.get("/v1/schedules/nightly")).json() == made


async def test_pause_resume_skip_and_delete(api: Api) -> None:
    made = await created(api)
    paused = await act(api, "pause")
    assert (paused["state"], paused["next_fire_at"]) == ("paused", None)
    assert paused["pause_reason"] == "requested"
    shown = (await api.client.get("/v1/schedules/nightly/preview")).json()
    assert shown["data"][0]["fire_at"] == made["next_fire_at"]
    assert_problem(
        await api.client.post("/v1/schedules/nightly/skip-next"), 422, "no next firing to skip"
    )
    resumed = await act(api, "resume")
    assert (resumed["state"], resumed["next_fire_at"]) == ("active", made["next_fire_at"])
    skipped = await act(api, "skip-next")
    assert (skipped["state"], skipped["reason"]) == ("skipped", "requested")
    assert skipped["fire_at"] == made["next_fire_at"]
    shown = (await api.client.get("/v1/schedules/nightly/preview")).json()
    assert shown["data"][0]["fire_at"] > made["next_fire_at"]
    await act(api, "run")
    await fire(api)
    gone = await api.client.delete("/v1/schedules/nightly")
    assert gone.json() == {"id": made["id"], "object": "schedule", "deleted": True}
    assert_problem(await api.client.get("/v1/schedules/nightly"), 404, "does not exist")
    assert await count(api.services.database, "schedule_runs") == 0
    assert await count(api.services.database, "batches") == 1


async def test_pages_of_schedules_and_of_runs(api: Api) -> None:
    ids = [(await created(api, name=f"s{n}"))["id"] for n in range(5)]
    page = (await api.client.get("/v1/schedules", params={"limit": 2})).json()
    assert [each["id"] for each in page["data"]] == ids[:-3:-1]
    assert page["has_more"]
    rest = {"limit": 9, "after": page["last_id"]}
    page = (await api.client.get("/v1/schedules", params=rest)).json()
    assert [each["id"] for each in page["data"]] == ids[-3::-1]
    made = [(await act(api, "run", "s0"))["id"] for _ in range(5)]
    first = await runs(api, "s0", limit=2)
    assert [run["id"] for run in first] == made[:-3:-1]
    assert [run["id"] for run in await runs(api, "s0", after=first[-1]["id"])] == made[-3::-1]
    response = await api.client.get("/v1/schedules/s0/runs", params={"after": "job_1"})
    assert_problem(response, 422, "not an id of this list")


async def test_a_run_whose_batch_fails_says_why_and_the_schedule_stays(api: Api) -> None:
    file_id = await uploaded(api, jsonl([line("a", BASE), line("b", "nothing")]))
    await created(api, input_file_id=file_id)
    await act(api, "run")
    await fire(api)
    (run,) = await runs(api)
    assert (run["state"], run["error"]["code"]) == ("failed", "model_not_found")
    assert run["error"]["message"].startswith("line 2: model 'nothing' does not exist")
    assert run["batch"]["status"] == "failed"
    found = (await api.client.get("/v1/schedules/nightly")).json()
    assert (found["state"], found["failures_in_a_row"]) == ("active", 1)


async def test_the_next_ten_in_both_times(api: Api) -> None:
    made = await created(api)
    shown = (await api.client.get("/v1/schedules/nightly/preview")).json()
    assert shown["timezone"] == "Europe/Berlin"
    assert len(shown["data"]) == 10
    assert shown["data"][0]["fire_at"] == made["next_fire_at"]
    for firing in shown["data"]:
        assert firing["utc"].endswith("Z")
        assert "T02:00:00+0" in firing["local"]


async def test_a_rule_can_be_previewed_before_it_is_made(api: Api) -> None:
    rule = {"cron": "30 2 * * *", "timezone": "Europe/Berlin", "start_at": 1806105600}
    response = await api.client.post("/v1/schedules/preview?count=2", json=rule)
    assert [each["utc"] for each in response.json()["data"]] == [
        "2027-03-27T01:30:00Z",
        "2027-03-28T01:00:00Z",
    ]
    assert [each["local"] for each in response.json()["data"]] == [
        "2027-03-27T02:30:00+01:00",
        "2027-03-28T03:00:00+02:00",
    ]
    refused = await api.client.post("/v1/schedules/preview", json={"cron": "0 0 30 2 *"})
    assert_problem(refused, 422, "never fires")
    assert await count(api.services.database, "schedules") == 0
