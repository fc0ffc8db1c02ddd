"""Long polls: an answer comes when the job is final, and one poller serves them all."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import httpx2
import pytest

from api.waiters import Waiters
from core.errors import Unavailable
from core.ids import new_id
from db import registry
from db.database import Database
from tests.support.api import BASE, CHAT, CONTEXT, Api, finish, running_api
from tests.support.waiting import eventually


@pytest.fixture
async def api(database: Database, database_url: str) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url) as api:
        yield api


async def waiting(api: Api, number: int) -> None:
    async def reached() -> bool:
        return api.services.waiters.count == number

    await eventually(reached, f"{number} waiters")


async def test_a_wait_ends_when_the_job_does(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        poll = tasks.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=30"))
        await waiting(api, 1)
        await finish(database, job_id)
    assert poll.result().json()["state"] == "succeeded"
    assert poll.result().json()["response"]["object"] == "chat.completion"
    assert api.services.waiters.count == 0


async def test_a_cancel_wakes_too(api: Api) -> None:
    job_id = await api.submitted(CHAT)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        poll = tasks.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=30"))
        await waiting(api, 1)
        await api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert poll.result().json()["state"] == "cancelled"


async def test_a_final_job_is_not_waited_for(api: Api, database: Database) -> None:
    job_id = await api.submitted(CHAT)
    await finish(database, job_id)
    async with asyncio.timeout(20):
        job = (await api.client.get(f"/v1/jobs/{job_id}?wait=30")).json()
    assert job["state"] == "succeeded"


async def test_a_wait_that_is_over_answers_the_job_as_it_is(api: Api) -> None:
    job_id = await api.submitted(CHAT)
    job = (await api.client.get(f"/v1/jobs/{job_id}?wait=0.1")).json()
    assert job["state"] == "queued"


async def test_many_wait_and_each_gets_its_own(api: Api, database: Database) -> None:
    ids = [await api.submitted(CHAT) for _ in range(30)]
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        polls = {
            job_id: [
                tasks.create_task(api.client.get(f"/v1/jobs/{job_id}?wait=30")) for _ in range(2)
            ]
            for job_id in ids
        }
        await waiting(api, 60)
        for job_id in reversed(ids):
            await finish(database, job_id)
    for job_id, tasks_of_job in polls.items():
        for task in tasks_of_job:
            response: httpx2.Response = task.result()
            assert (response.json()["id"], response.json()["state"]) == (job_id, "succeeded")


class Looks:
    """Stands in for Postgres: counts the looks, and may fail some of them."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.finished: set[UUID] = set()
        self.at_once = 0
        self.most_at_once = 0
        self.asked: list[set[UUID]] = []

    async def __call__(self, ids: list[UUID]) -> set[UUID]:
        self.asked.append(set(ids))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if self.failures:
            raise self.failures.pop(0)
        return self.finished & set(ids)


async def test_one_look_asks_for_everybody() -> None:
    looks = Looks([])
    waiters = Waiters(looks)
    waiters.start()
    ids = [new_id() for _ in range(100)]
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for job_id in ids:
            tasks.create_task(waiters.wait(job_id, 30))

        async def all_asked() -> bool:
            return bool(looks.asked) and looks.asked[-1] == set(ids)

        await eventually(all_asked, "a look for everybody")
        looks.finished = set(ids)
    assert looks.most_at_once == 1
    await waiters.close()


async def test_nobody_waiting_means_no_look() -> None:
    looks = Looks([])
    waiters = Waiters(looks)
    waiters.start()
    for _ in range(10):
        await asyncio.sleep(0)
    assert looks.asked == []
    await waiters.close()


async def test_an_outage_or_a_fault_does_not_end_the_polling() -> None:
    looks = Looks([Unavailable("gone"), RuntimeError("odd")])
    waiters = Waiters(looks)
    waiters.start()
    job_id = new_id()
    looks.finished = {job_id}
    async with asyncio.timeout(20):
        await waiters.wait(job_id, 30)
    assert len(looks.asked) == 3
    await waiters.close()


async def test_a_stop_releases_whoever_waits() -> None:
    waiters = Waiters(Looks([]))
    waiters.start()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(waiters.wait(new_id(), 30))

        async def registered() -> bool:
            return waiters.count == 1

        await eventually(registered, "a waiter")
        waiters.release()
    async with asyncio.timeout(20):
        await waiters.wait(new_id(), 30)
    await waiters.close()
    await waiters.close()
