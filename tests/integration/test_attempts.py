"""The history of a job's attempts, as its owner reads it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from db import claims, jobs, registry, results, workers
from db.database import Database
from db.results import Result, RetryLater
from db.suspects import Death, take_group
from db.tenants import DEFAULT_TENANT_ID, create_key
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.api import BASE, CONTEXT, PROMPT, Api, assert_problem, inside, running_api


@pytest.fixture
async def api(database: Database, database_url: str) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url) as api:
        yield api


async def worker(database: Database) -> int:
    return await workers.register(database, WorkerFacts(1, "x", 1, "simulated", "1", {}), 60)


async def claim(database: Database, owner: int) -> claims.ClaimedJob:
    (job,) = await claims.claim(database, owner, Line(1, 0, DEFAULT_TENANT_ID), 1)
    return job


async def listed(api: Api, job_id: str, **parameters: Any) -> dict[str, Any]:
    response = await api.client.get(f"/v1/jobs/{job_id}/attempts", params=parameters)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_every_attempt_is_told_with_its_worker_and_its_end(
    api: Api, database: Database
) -> None:
    job_id = await api.submitted(PROMPT)
    assert (await listed(api, job_id))["data"] == []
    owners = [await worker(database) for _ in range(4)]
    job = await claim(database, owners[0])
    (running,) = (await listed(api, job_id))["data"]
    assert (running["outcome"], running["worker"], running["ended_at"]) == (
        "running",
        owners[0],
        None,
    )
    await claims.release(database, owners[0], [(job.id, job.attempt)])
    job = await claim(database, owners[1])
    retry = RetryLater(job.id, job.attempt, 0.0, "engine_error: out of luck")
    await results.retry_later(database, owners[1], [retry])
    job = await claim(database, owners[2])
    death = Death("suspect", "the engine died (boom)", 2, 0.0)
    await workers.sign_off(database, owners[2], death, [job.id])
    (job,) = await take_group(database, owners[3], 1, waited_seconds=0, limit=9)
    await results.record(database, owners[3], [Result(job.id, job.attempt, response="{}")])

    page = await listed(api, job_id)
    assert [(a["attempt"], a["outcome"], a["worker"], a["error"]) for a in page["data"]] == [
        (1, "released", owners[0], None),
        (2, "retried", owners[1], "engine_error: out of luck"),
        (3, "suspect", owners[2], "the engine died (boom)"),
        (4, "succeeded", owners[3], None),
    ]
    assert all(a["started_at"] and a["ended_at"] for a in page["data"])
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("1", "4", False)
    part = await listed(api, job_id, after=1, limit=2)
    assert [a["attempt"] for a in part["data"]] == [2, 3] and part["has_more"]


async def test_success_leaves_no_history_row(api: Api, database: Database) -> None:
    await api.submitted(PROMPT)
    owner = await worker(database)
    job = await claim(database, owner)
    await results.record(database, owner, [Result(job.id, job.attempt, response="{}")])
    assert await database.fetch_value("SELECT count(*) FROM job_attempts") == 0


async def test_a_job_cancelled_while_queued_again_tells_no_attempt_twice(
    api: Api, database: Database
) -> None:
    job_id = await api.submitted(PROMPT)
    owner = await worker(database)
    await claim(database, owner)
    await workers.sign_off(database, owner)
    await jobs.cancel(database, DEFAULT_TENANT_ID, inside(job_id))
    assert [a["outcome"] for a in (await listed(api, job_id))["data"]] == ["released"]


async def test_another_tenants_attempts_are_not_found(
    database: Database, database_url: str
) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    key, other = await create_key(database, "acme"), await create_key(database, "umbrella")
    async with running_api(database_url, require_keys=True) as api:
        mine = {"Authorization": f"Bearer {key}"}
        response = await api.submit(PROMPT, **mine)
        path = f"/v1/jobs/{response.json()['id']}/attempts"
        assert (await api.client.get(path, headers=mine)).status_code == 200
        theirs = await api.client.get(path, headers={"Authorization": f"Bearer {other}"})
        assert_problem(theirs, 404, "does not exist")
