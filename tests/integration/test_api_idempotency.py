"""Idempotency-Key: the same request again is the same job."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from db import registry
from db.database import Database
from db.tenants import create_key
from tests.support.api import (
    BASE,
    CHAT,
    CONTEXT,
    Api,
    RecordingDoorbell,
    assert_problem,
    count,
    finish,
    running_api,
)


@pytest.fixture
async def api(database: Database, database_url: str) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url) as api:
        yield api


def key(text: str) -> dict[str, str]:
    return {"Idempotency-Key": text}


async def test_a_repeat_answers_with_the_job_as_it_is_now(api: Api, database: Database) -> None:
    first = await api.submit(CHAT, **key("k1"))
    assert first.status_code == 202
    assert "idempotent-replayed" not in first.headers
    again = await api.submit({**CHAT, "stream": False, "priority": 0}, **key("k1"))
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]

    await finish(database, first.json()["id"])
    later = await api.submit(CHAT, **key("k1"))
    assert later.json()["state"] == "succeeded"
    assert later.json()["response"]["object"] == "chat.completion"
    assert await count(database) == 1


async def test_another_body_under_the_key_is_refused(api: Api, database: Database) -> None:
    await api.submit(CHAT, **key("k1"))
    response = await api.submit({**CHAT, "temperature": 1}, **key("k1"))
    problem = assert_problem(response, 422, "'k1'", "another body")
    assert problem["code"] == "idempotency_key_reused"
    assert await count(database) == 1


async def test_twenty_at_once_make_one_job(api: Api, database: Database) -> None:
    doorbell = RecordingDoorbell()
    api.app.state.services = replace(api.services, doorbell=doorbell)
    responses = await asyncio.gather(*(api.submit(CHAT, **key("k1")) for _ in range(20)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    fresh = [r for r in responses if "idempotent-replayed" not in r.headers]
    assert len(fresh) == 1
    assert await count(database) == await count(database, "job_inputs") == 1
    assert len(doorbell.rings) == 1


async def test_of_different_bodies_at_once_one_wins(api: Api, database: Database) -> None:
    bodies = [{**CHAT, "seed": number} for number in range(10)]
    responses = await asyncio.gather(*(api.submit(body, **key("k1")) for body in bodies))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [202] + [422] * 9
    assert await count(database) == 1


async def test_a_repeat_is_answered_when_its_model_and_deadline_are_gone(
    api: Api, database: Database
) -> None:
    """The key is looked up before anything else is asked of the request."""
    body = {**CHAT, "deadline": 4e9}
    first = await api.submit(body, **key("k1"))
    async with database.connection() as connection:
        await connection.execute("UPDATE base_models SET name = 'renamed', max_model_len = 1")
    again = await api.submit(body, **key("k1"))
    assert again.json()["id"] == first.json()["id"]
    assert_problem(await api.submit(body, **key("k2")), 404)


async def test_a_refused_request_does_not_use_its_key_up(api: Api) -> None:
    assert_problem(await api.submit({**CHAT, "n": 0}, **key("k1")), 422)
    assert_problem(await api.submit({**CHAT, "model": "nobody"}, **key("k1")), 404)
    assert (await api.submit(CHAT, **key("k1"))).status_code == 202


async def test_keys_of_two_tenants_do_not_meet(database: Database, database_url: str) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    tokens = [await create_key(database, tenant) for tenant in ("one", "two")]
    async with running_api(database_url, require_keys=True) as api:
        ids = set()
        for token in tokens:
            headers = {**key("k1"), "Authorization": f"Bearer {token}"}
            response = await api.submit({**CHAT, "user": token}, **headers)
            assert response.status_code == 202
            ids.add(response.json()["id"])
    assert len(ids) == 2


async def test_a_key_is_1_to_255_printable_characters(api: Api) -> None:
    for bad in ["", "k" * 256, "a\tb", "ü"]:
        response = await api.client.post(
            "/v1/jobs", json=CHAT, headers=[(b"Idempotency-Key", bad.encode("latin-1"))]
        )
        problem = assert_problem(response, 422, "255 printable")
        assert problem["field"] == "Idempotency-Key"


async def test_the_longest_key_works(api: Api) -> None:
    assert (await api.submit(CHAT, **key("k" * 255))).status_code == 202


async def test_a_repeat_whose_job_was_pruned_says_so(api: Api, database: Database) -> None:
    await api.submit(CHAT, **key("k1"))
    async with database.connection() as connection:
        await connection.execute("DELETE FROM job_inputs")
    assert_problem(await api.submit(CHAT, **key("k1")), 404, "no longer kept", "new key")
