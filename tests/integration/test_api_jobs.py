"""Reading, listing and cancelling jobs."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from db import registry
from db.database import Database
from db.jobs import cancel
from db.tenants import DEFAULT_TENANT_ID, create_key
from db.workers import take_ended
from tests.support.api import (
    ANSWER,
    BASE,
    CHAT,
    CONTEXT,
    PROMPT,
    Api,
    assert_problem,
    finish,
    inside,
    run,
    running_api,
)


@pytest.fixture
async def api(database: Database, database_url: str) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url) as api:
        yield api


async def listed(api: Api, **parameters: Any) -> dict[str, Any]:
    response = await api.client.get("/v1/jobs", params=parameters)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_a_job_is_read_with_its_answer(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    await finish(database, job_id)
    job = (await api.client.get(f"/v1/jobs/{job_id}")).json()
    assert job["state"] == "succeeded"
    assert job["response"]["choices"][0]["message"]["content"] == "Hi"
    assert job["attempts"] == 1
    for moment in ("created_at", "started_at", "finished_at"):
        assert isinstance(job[moment], int)
        assert 1_700_000_000 < job[moment] < 5_000_000_000


async def test_a_failed_job_says_why(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET state = 'failed', finished_at = now()")
        await connection.execute(
            "INSERT INTO job_outputs (tenant_id, job_id, error_code, error_message)"
            " VALUES (1, $1, 'context_length_exceeded', 'too long')",
            inside(job_id),
        )
    job = (await api.client.get(f"/v1/jobs/{job_id}")).json()
    assert job["error"] == {"code": "context_length_exceeded", "message": "too long"}
    assert job["response"] is None


async def test_an_unknown_job_is_404(api: Api) -> None:
    zeros = "0" * 32
    for job_id in (f"job_{zeros}", "job_x", f"batch_{zeros}", zeros, "job_%00", "job_" + "é" * 32):
        assert_problem(await api.client.get(f"/v1/jobs/{job_id}"), 404, "does not exist")
        assert_problem(await api.client.post(f"/v1/jobs/{job_id}/cancel"), 404, "does not exist")


async def test_a_wait_is_0_to_30_seconds(api: Api) -> None:
    for wait in ["31", "-1", "nan", "inf", "soon", ""]:
        job_id = await api.submitted(CHAT)
        response = await api.client.get(f"/v1/jobs/{job_id}", params={"wait": wait})
        problem = assert_problem(response, 422, "wait")
        assert problem["field"] == "wait"


async def test_pages_hold_every_job_once_while_new_ones_come(api: Api) -> None:
    ids = [await api.submitted(PROMPT) for _ in range(7)]
    seen: list[str] = []
    page = await listed(api, limit=3)
    while True:
        assert page["object"] == "list"
        assert page["first_id"] == page["data"][0]["id"]
        assert page["last_id"] == page["data"][-1]["id"]
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        await api.submitted(PROMPT)
        page = await listed(api, limit=3, after=page["last_id"])
    assert seen == ids[::-1]


async def test_an_exact_last_page_has_no_more(api: Api) -> None:
    empty = await listed(api)
    assert empty == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    await api.submitted(PROMPT)
    await api.submitted(PROMPT)
    page = await listed(api, limit=2)
    assert (len(page["data"]), page["has_more"]) == (2, False)


async def test_lists_are_narrowed_by_state_and_model(api: Api, database: Database) -> None:
    await registry.declare_base(database, "other", CONTEXT)
    mine = await api.submitted(PROMPT)
    done = await api.submitted(PROMPT)
    theirs = await api.submitted({**PROMPT, "model": "other"})
    await finish(database, done)

    async def ids(**parameters: Any) -> list[str]:
        return [job["id"] for job in (await listed(api, **parameters))["data"]]

    assert await ids(state="queued") == [theirs, mine]
    assert await ids(state="succeeded") == [done]
    assert await ids(model=BASE) == [done, mine]
    assert await ids(model=BASE, state="queued", after=done) == [mine]
    assert await ids(model="nobody") == []


BAD_PARAMETERS: list[tuple[dict[str, str], str]] = [
    ({"limit": "0"}, "limit"),
    ({"limit": "101"}, "limit"),
    ({"limit": "many"}, "limit"),
    ({"state": "done"}, "state"),
    ({"after": "job_x"}, "after"),
    ({"after": ""}, "after"),
    ({"model": "a\0"}, "model"),
    ({"model": "a" * 300}, "model"),
    ({"status": "queued"}, "status"),
]


async def test_bad_parameters_are_named(api: Api) -> None:
    for parameters, field in BAD_PARAMETERS:
        response = await api.client.get("/v1/jobs", params=parameters)
        assert assert_problem(response, 422, field)["field"] == field


async def test_a_queued_job_is_cancelled_at_once(api: Api) -> None:
    job_id = await api.submitted(CHAT)
    response = await api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 200
    job = response.json()
    assert job["state"] == "cancelled"
    assert isinstance(job["finished_at"], int)
    assert (await api.client.get(f"/v1/jobs/{job_id}")).json() == job


async def test_a_running_job_is_cancelled_and_its_worker_told(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    await run(database, job_id, worker_id=7)
    job = (await api.client.post(f"/v1/jobs/{job_id}/cancel")).json()
    assert (job["state"], job["attempts"]) == ("cancelled", 1)
    assert await take_ended(database, 7) == [(inside(job_id), 1)]


async def test_a_final_job_stays_as_it_is(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    await finish(database, job_id)
    before = (await api.client.get(f"/v1/jobs/{job_id}")).json()
    response = await api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert (response.status_code, response.json()) == (200, before)
    cancelled = await api.submitted(CHAT)
    await cancel(database, DEFAULT_TENANT_ID, inside(cancelled))
    again = await api.client.post(f"/v1/jobs/{cancelled}/cancel")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")


async def test_tenants_never_see_each_other(database: Database, database_url: str) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    one, two = [
        {"Authorization": f"Bearer {await create_key(database, tenant)}"}
        for tenant in ("one", "two")
    ]
    async with running_api(database_url, require_keys=True) as api:
        job_id = (await api.submit(CHAT, **one)).json()["id"]
        path = f"/v1/jobs/{job_id}"
        assert_problem(await api.client.get(path, headers=two), 404, "does not exist")
        assert_problem(await api.client.get(f"{path}?wait=30", headers=two), 404)
        assert_problem(await api.client.post(f"{path}/cancel", headers=two), 404)
        for parameters in ({}, {"after": "job_" + "f" * 32}, {"model": BASE}):
            page = await api.client.get("/v1/jobs", params=parameters, headers=two)
            assert page.json()["data"] == []
        mine = (await api.client.get(path, headers=one)).json()
        assert mine["state"] == "queued"
        page = await api.client.get("/v1/jobs", headers=one)
        assert [job["id"] for job in page.json()["data"]] == [job_id]


async def test_an_answer_is_passed_on_as_it_was_kept(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    answer = ANSWER.replace("Hi", "é \\ud83d\\ude00 \\\\ \\n")
    await finish(database, job_id, answer)
    job = (await api.client.get(f"/v1/jobs/{job_id}")).json()
    assert job["response"]["choices"][0]["message"]["content"] == "é 😀 \\ \n"
    page = await listed(api)
    assert page["data"] == [job]
