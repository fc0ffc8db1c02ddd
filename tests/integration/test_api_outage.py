"""Postgres away: 503 with Retry-After, nothing half-written, and service again once it is back."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from db import registry
from db.database import Database
from db.migrate import upgrade
from tests.support.api import BASE, CHAT, CONTEXT, assert_problem, count, finish, running_api
from tests.support.servers import PostgresServer
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def own_postgres(servers_folder: Path) -> Iterator[PostgresServer]:
    """A server that these tests may stop."""
    with PostgresServer(servers_folder / "own") as server:
        yield server


@pytest.fixture
def own_url(own_postgres: PostgresServer) -> Iterator[str]:
    own_postgres.create_database("away")
    upgrade(own_postgres.url("away"))
    yield own_postgres.url("away")
    own_postgres.drop_database("away")


async def test_an_api_that_never_saw_its_database_answers_503(tmp_path: Path) -> None:
    url = f"postgresql://postgres@/none?host={tmp_path}"
    async with running_api(url, ready_model=BASE) as api:
        job = "/v1/jobs/job_" + "0" * 32
        for method, path in (
            ("GET", "/v1/jobs"),
            ("GET", job),
            ("GET", f"{job}?wait=30"),
            ("POST", f"{job}/cancel"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/x"),
            ("GET", "/readyz"),
        ):
            response = await api.client.request(method, path)
            assert_problem(response, 503, "Postgres cannot be reached")
            assert int(response.headers["retry-after"]) > 0
        for headers in ({}, {"Idempotency-Key": "k"}):
            response = await api.submit(CHAT, **headers)
            assert_problem(response, 503, "Postgres cannot be reached")
            assert int(response.headers["retry-after"]) > 0
        assert_problem(await api.submit({**CHAT, "n": 0}), 422)
        assert (await api.client.get("/healthz")).status_code == 200
    async with running_api(url, require_keys=True) as api:
        response = await api.client.get("/v1/jobs", headers={"Authorization": "Bearer k"})
        assert_problem(response, 503)


async def test_service_comes_back_with_its_database(
    own_postgres: PostgresServer, own_url: str
) -> None:
    key = {"Idempotency-Key": "k1"}
    async with Database.connect(own_url) as database, running_api(own_url) as api:
        await registry.declare_base(database, BASE, CONTEXT)
        before = await api.submitted(CHAT)

        own_postgres.stop(signal.SIGINT)
        response = await api.submit(CHAT, **key)
        assert_problem(response, 503)
        assert response.headers["retry-after"]
        assert_problem(await api.client.get(f"/v1/jobs/{before}"), 503)

        own_postgres.start()
        assert await count(database) == await count(database, "job_inputs") == 1
        assert await count(database, "idempotency_keys") == 0
        assert (await api.submit(CHAT, **key)).status_code == 202
        assert (await api.client.get(f"/v1/jobs/{before}")).json()["state"] == "queued"


async def test_a_long_poll_outlives_a_restart_of_its_database(
    own_postgres: PostgresServer, own_url: str
) -> None:
    async with Database.connect(own_url) as database, running_api(own_url) as api:
        await registry.declare_base(database, BASE, CONTEXT)
        job_id = await api.submitted(CHAT)
        async with asyncio.timeout(25), asyncio.TaskGroup() as tasks:
            poll = tasks.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=30"))

            async def waiting() -> bool:
                return api.services.waiters.count == 1

            await eventually(waiting, "a waiter")
            await asyncio.to_thread(own_postgres.stop, signal.SIGINT)
            await asyncio.to_thread(own_postgres.start)
            await finish(database, job_id)
        assert poll.result().json()["state"] == "succeeded"
