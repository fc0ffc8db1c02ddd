"""Submitting: 202 means committed, and a refused request leaves nothing behind."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from core.ids import new_id
from db import adapters, registry
from db.database import Database
from db.jobs import get
from db.store import Store
from db.tenants import DEFAULT_TENANT_ID
from tests.support.api import (
    BASE,
    CHAT,
    CONTEXT,
    PROMPT,
    Api,
    RecordingDoorbell,
    assert_problem,
    count,
    inside,
    running_api,
)
from tests.support.jobs import fake_adapter
from tests.support.servers import in_thread

LIMIT = 20_000


@pytest.fixture
async def api(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    await adapters.register_ready(
        database,
        Store.open(str(tmp_path / "store")),
        tenant="default",
        base_model=BASE,
        name="sql",
        folder=fake_adapter(tmp_path / "sql"),
    )
    async with running_api(database_url, max_body_bytes=LIMIT) as api:
        yield api


async def test_an_accepted_job_is_told_and_found(api: Api) -> None:
    response = await api.submit({**CHAT, "priority": 7, "metadata": {"a": "ü"}, "deadline": 4e9})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["retry-after"] == "1"
    assert job["id"].startswith("job_")
    assert job == {
        "id": job["id"],
        "object": "job",
        "state": "queued",
        "model": BASE,
        "adapter": None,
        "adapter_version": None,
        "priority": 7,
        "deadline": 4_000_000_000,
        "attempts": 0,
        "created_at": job["created_at"],
        "started_at": None,
        "finished_at": None,
        "metadata": {"a": "ü"},
        "webhook_url": None,
        "response": None,
        "error": None,
    }
    assert (await api.client.get(response.headers["location"])).json() == job


async def test_202_means_committed(api: Api, database_url: str) -> None:
    job_id = await api.submitted({**PROMPT, "max_completion_tokens": 5, "stream": False})
    connection = await asyncpg.connect(database_url)
    try:
        row = await connection.fetchrow(
            "SELECT i.endpoint, i.body, j.tokens, j.state, w.partition FROM jobs j"
            " JOIN job_inputs i ON i.job_id = j.id"
            " JOIN waiting_adapters w ON w.base_model_id = j.base_model_id"
            " WHERE j.id = $1",
            inside(job_id),
        )
    finally:
        await connection.close()
    assert row is not None
    assert json.loads(row["body"]) == {"prompt": "Hello", "max_tokens": 5}
    assert (row["endpoint"], row["state"], row["tokens"]) == ("completion", "queued", 7)


async def test_a_job_for_an_adapter_keeps_the_version_it_was_sent_to(api: Api) -> None:
    for model in ("sql", "sql@1"):
        job = (await api.submit({**CHAT, "model": model})).json()
        assert (job["model"], job["adapter"], job["adapter_version"]) == (model, "sql", 1)


async def test_the_doorbell_rings_after_the_commit_only(api: Api, database_url: str) -> None:
    committed: list[int] = []

    class Looking(RecordingDoorbell):
        def ring(self, base_model: str, partition: int) -> None:
            super().ring(base_model, partition)
            in_thread(look)

    async def look() -> None:
        connection = await asyncpg.connect(database_url)
        committed.append(await connection.fetchval("SELECT count(*) FROM jobs"))
        await connection.close()

    doorbell = Looking()
    api.app.state.services = replace(api.services, doorbell=doorbell)
    await api.submitted(CHAT)
    assert committed == [1]
    await api.submit({**CHAT, "model": "nobody"})
    await api.submit({**CHAT, "n": 0})
    assert doorbell.rings == [(BASE, 0)]
    await api.submitted({**CHAT, "model": "sql"})
    async with api.services.database.connection() as connection:
        target = await registry.resolve(connection, DEFAULT_TENANT_ID, "sql")
    assert doorbell.rings[1] == (BASE, target.partition)


BAD_BODIES: list[tuple[Any, str]] = [
    ({**CHAT, **PROMPT}, "both given"),
    ({"model": BASE}, "messages is required (or prompt"),
    ({**CHAT, "messages": []}, "messages must have at least 1 item"),
    ({**CHAT, "temperature": "hot"}, "temperature must be a valid number, not 'hot'"),
    ({**CHAT, "max_tokens": 0}, "max_tokens must be greater than or equal to 1, not 0"),
    ({**CHAT, "max_tokens": -1}, "not -1"),
    ({**CHAT, "max_tokens": 10**9}, f"1000000000 leaves no room .* {CONTEXT} tokens"),
    ({**CHAT, "max_tokens": CONTEXT + 1}, f"{CONTEXT + 1} leaves no room .* {CONTEXT} tokens"),
    ({**PROMPT, "prompt": [1] * CONTEXT}, f"{CONTEXT} token ids"),
    (
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "strin"}},
            },
        },
        "not a valid JSON schema",
    ),
    ({**CHAT, "tempurature": 1}, "tempurature is not a known field; did you mean"),
    ({**CHAT, "stream": True}, "never streamed"),
    ({**CHAT, "tools": []}, "tools is not supported"),
    ({**CHAT, "webhook_url": "https://10.0.0.1/"}, "10.0.0.1 is forbidden (private)"),
    ({**CHAT, "webhook_url": "http://example.com/"}, "is not encrypted"),
    ({**PROMPT, "prompt": ["a"]}, "one job for each"),
    ({**CHAT, "user": "\0"}, "NUL"),
    ({**CHAT, "deadline": 1}, "has passed"),
    ([], "must be a JSON object"),
]


async def test_bad_input_is_named_and_leaves_nothing(api: Api, database: Database) -> None:
    for body, says in BAD_BODIES:
        response = await api.submit(body)
        problem = assert_problem(response, 422)
        assert problem["code"] == "invalid_request"
        for part in says.split(" .* "):
            assert part in problem["detail"]
        assert await count(database) == await count(database, "job_inputs") == 0


NOT_JSON = [
    (b'{"model": "\xff\xfe"}', "not UTF-8: at byte 11"),
    (b'{"model": ', "not valid JSON"),
    (b"", "not valid JSON"),
    (b'{"model": "sim-base", "prompt": "\\ud800"}', "prompt must not contain the lone"),
    (b'{"a":' * 2000, "nested more than 200"),
]


async def test_what_is_not_json_is_told_by_its_place(api: Api) -> None:
    for raw, says in NOT_JSON:
        response = await api.client.post("/v1/jobs", content=raw)
        assert_problem(response, 422, says)


async def test_an_unknown_model_is_404_with_the_nearest_names(api: Api) -> None:
    problem = assert_problem(await api.submit({**CHAT, "model": "sqll"}), 404, "'sqll'", "'sql'")
    assert problem["nearest"] == ["sql"]
    assert problem["code"] == "model_not_found"
    assert_problem(await api.submit({**CHAT, "model": "task:sum"}), 404, "task:sum")
    assert_problem(await api.submit({**CHAT, "model": "sql@2"}), 404, "sql@2")


async def test_a_body_over_the_limit_is_413_declared_or_not(api: Api, database: Database) -> None:
    raw = json.dumps({**PROMPT, "prompt": "x" * LIMIT}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 1000):
            yield raw[start : start + 1000]

    for content in (raw, pieces()):
        response = await api.client.post("/v1/jobs", content=content)
        problem = assert_problem(response, 413, str(LIMIT), "LORRY_MAX_BODY_BYTES")
        assert problem["limit"] == LIMIT
    assert await count(database) == 0
    fitting = json.dumps({**PROMPT, "prompt": "x" * (LIMIT - 200)}).encode()
    assert (await api.client.post("/v1/jobs", content=fitting)).status_code == 202


async def test_a_form_is_refused(api: Api) -> None:
    raw = json.dumps(CHAT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = await api.client.post("/v1/jobs", content=raw, headers={"content-type": kind})
        assert_problem(response, 422, kind, "application/json")
    response = await api.client.post(
        "/v1/jobs", content=raw, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.status_code == 202


async def test_what_was_sent_is_what_is_kept(api: Api) -> None:
    text = 'é "quotes" \u2028 \U0001f600 \\u0000 </script>'
    job_id = await api.submitted({**PROMPT, "prompt": text, "metadata": {text: text}})
    row = await get(api.services.database, DEFAULT_TENANT_ID, inside(job_id))
    assert row is not None
    job = (await api.client.get(f"/v1/jobs/{job_id}")).json()
    assert job["metadata"] == {text: text}
    assert inside(job_id).version == new_id().version == 7
