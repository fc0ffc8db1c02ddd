"""Schedules over HTTP, and what a steward does with them."""

import json
from typing import Any

from tests.support.api import BASE, Api, RecordingDoorbell
from workers.steward.batches import BatchDuties
from workers.steward.schedules import follow, tick_and_fire

NIGHTLY = {"name": "nightly", "cron": "0 2 * * *", "timezone": "Europe/Berlin"}
ASK = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}


async def uploaded(api: Api, content: bytes, name: str = "in.jsonl") -> str:
    response = await api.client.post(
        "/v1/files", files={"file": (name, content)}, data={"purpose": "batch"}
    )
    assert response.status_code == 200, response.text
    found: str = response.json()["id"]
    return found


async def created(api: Api, **body: Any) -> dict[str, Any]:
    whole = {**NIGHTLY, **body}
    if "input_file_id" not in whole and "requests" not in whole:
        whole["requests"] = [{"model": BASE, **ASK}]
    response = await api.client.post("/v1/schedules", json=whole)
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/v1/schedules/{made['id']}"
    return made


async def act(api: Api, what: str, name: str = "nightly") -> dict[str, Any]:
    response = await api.client.post(f"/v1/schedules/{name}/{what}")
    assert response.status_code in (200, 202), response.text
    done: dict[str, Any] = response.json()
    return done


async def runs(api: Api, name: str = "nightly", **query: Any) -> list[dict[str, Any]]:
    response = await api.client.get(f"/v1/schedules/{name}/runs", params=query)
    assert response.status_code == 200, response.text
    data: list[dict[str, Any]] = response.json()["data"]
    return data


async def fire(api: Api) -> None:
    """What a steward does: tick, fire, validate the batches, and see to the ends of runs."""
    database = api.services.database
    await tick_and_fire(database)
    await BatchDuties(database, RecordingDoorbell(), api.services.settings).validate()
    await follow(database)


async def content(api: Api, file_id: str) -> list[dict[str, Any]]:
    response = await api.client.get(f"/v1/files/{file_id}/content")
    return [json.loads(text) for text in response.text.splitlines()]
