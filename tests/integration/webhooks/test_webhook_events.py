"""What events are owed, for which ends of jobs and batches, and what they say."""

import asyncio
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import openai
import pytest

from core.ids import IdPrefix, format_id, parse_id
from core.webhook_events import LARGEST_BODY_BYTES, EventType
from db import batch_ends, batch_leases, jobs, maintenance
from db.database import Database
from db.deliveries import owe
from db.tenants import DEFAULT_TENANT_ID
from tests.support.api import CHAT, Api, running_api
from tests.support.jobs import Bench
from tests.support.receivers import Receiver
from tests.support.webhooks import (
    BATCH_EVENTS,
    LOOPBACK,
    default_secret,
    deliveries,
    endpoint,
    finish,
    rows,
    until_state,
)
from workers.steward.webhook_sender import Sender


async def test_a_jobs_own_url_is_told_and_verifies(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender
) -> None:
    job_id = await api.submitted({**CHAT, "webhook_url": receiver.url("/told?key=1")})
    job = (await api.client.get(f"/v1/jobs/{job_id}")).json()
    assert job["webhook_url"] == receiver.url("/told?key=1")
    secret = await default_secret(api)
    await finish(bench)
    (got,) = await receiver.got(1)
    assert got.path == "/told?key=1"
    assert got.verify(secret) == got.event
    event = got.event
    assert event["object"] == "event" and event["type"] == "job.succeeded"
    assert event["id"] == got.message_id and event["id"].startswith("evt_")
    assert event["data"] == {
        "id": job_id,
        "state": "succeeded",
        "counts": None,
        "link": f"/v1/jobs/{job_id}",
    }
    assert abs(event["created_at"] - time.time()) < 60
    assert datetime.fromisoformat(event["timestamp"]).tzinfo is not None
    assert len(got.body) < LARGEST_BODY_BYTES
    (delivery,) = await until_state(api, "delivered")
    assert delivery["url"] == receiver.url("/told?key=1") and delivery["webhook"] is None
    assert delivery["event"] == event["id"] and delivery["subject"] == job_id
    (attempt,) = delivery["attempts"]
    assert attempt["status"] == 200 and attempt["response"] == "ok" and attempt["error"] is None


async def test_every_way_of_finishing_a_job_owes_its_event_once(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    made = await endpoint(api, receiver.url("/all"))
    only_failed = await endpoint(api, receiver.url("/failed"), ["job.failed"])
    succeeded = await api.submitted(CHAT)
    await finish(bench)
    failed = await api.submitted(CHAT)
    await finish(bench, "engine_error")
    cancelled = await api.submitted(CHAT)
    for _ in range(2):  # a repeat owes nothing more
        await api.client.post(f"/v1/jobs/{cancelled}/cancel")
    expired = await api.submitted({**CHAT, "deadline": time.time() + 3600})
    async with database.connection() as connection:
        await connection.execute("UPDATE jobs SET deadline = now() WHERE state = 'queued'")
    assert await maintenance.expire_due(database) == 1
    await receiver.got(5)
    await until_state(api, "delivered", 5)
    told = {(got.path, got.event["type"], got.event["data"]["id"]) for got in receiver.received}
    assert told == {
        ("/all", "job.succeeded", succeeded),
        ("/all", "job.failed", failed),
        ("/all", "job.cancelled", cancelled),
        ("/all", "job.expired", expired),
        ("/failed", "job.failed", failed),
    }
    assert len(receiver.received) == 5
    ids = [g.message_id for g in receiver.received if g.event["type"] == "job.failed"]
    assert ids[0] == ids[1], "one event, whoever is told"
    for got in receiver.received:
        got.verify(made["secret"] if got.path == "/all" else only_failed["secret"])
    by_time = sorted(receiver.received, key=lambda g: g.event["timestamp"])
    sequences = [got.event["sequence"] for got in by_time]
    assert sequences == sorted(sequences)
    assert max(sequences) < 2**53


async def test_nothing_is_owed_for_what_nobody_wants(
    api: Api, bench: Bench, database: Database
) -> None:
    await endpoint(api, "https://example.com/", ["job.failed"])
    disabled = await endpoint(api, "https://example.org/")
    await api.client.patch(f"/v1/webhooks/{disabled['id']}", json={"disabled": True})
    await api.submitted(CHAT)
    await finish(bench)
    # a batch's lines are told of by the batch
    await api.submitted(CHAT)
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET batch_id = 1, batch_line = 1 WHERE state = 'queued'"
        )
    await finish(bench, "engine_error")
    assert await database.fetch_value("SELECT count(*) FROM deliveries") == 0
    # nor where a job alone ends in the same statement
    await endpoint(api, "https://example.net/", ["job.succeeded"])
    alone, _ = await api.submitted(CHAT), await api.submitted(CHAT)
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET batch_id = 1, batch_line = 2 WHERE id ="
            " (SELECT id FROM jobs WHERE state = 'queued' ORDER BY id DESC LIMIT 1)"
        )
    await finish(bench)
    assert [d["subject"] for d in await deliveries(api)] == [alone]


async def held_batch(database: Database, status: str, webhook_url: str | None) -> Any:
    """A batch at a step, claimed as a steward claims it."""
    ended = "now()" if status in ("finalizing", "cancelling") else "NULL"
    total = 0 if status in ("validating", "failed") else 3
    async with database.connection() as connection:
        await connection.execute(
            f"""
            INSERT INTO batches (public_id, tenant_id, status, total, completed, failed, endpoint,
                                 completion_window, skip_invalid, input_file_id, expires_at,
                                 ended_at, webhook_url, cancelling_at)
            VALUES (uuidv7(), 1, $1, $2, $2 - least($2, 1), least($2, 1), '/v1/completions', '24h',
                    false, uuidv7(), now() + interval '1 day', {ended}, $3,
                    CASE WHEN $1 = 'cancelling' THEN now() END)
            """,
            status,
            total,
            webhook_url,
        )
    what = batch_leases.VALIDATE if status == "validating" else batch_leases.SETTLE
    held = await batch_leases.claim(database, what, 60)
    assert held is not None
    return held


async def test_batch_events_verify_as_openais(
    api: Api, database: Database, receiver: Receiver, sender: Sender
) -> None:
    secret = await default_secret(api)
    made = await endpoint(api, receiver.url("/endpoint"), BATCH_EVENTS)
    failed = await held_batch(database, "validating", receiver.url("/own"))
    await batch_ends.fail(database, failed, "[]")
    ends = [("finalizing", "completed"), ("cancelling", "cancelled")]
    for status, end in ends:
        held = await held_batch(database, status, receiver.url("/own"))
        async with database.transaction() as connection:
            await batch_ends.settle(connection, held, end, None, None)
    await receiver.got(6)
    client = openai.OpenAI(api_key="unused")
    types = set()
    for got in receiver.received:
        used = secret if got.path == "/own" else made["secret"]
        client.webhooks.verify_signature(got.body, got.headers, secret=used)
        event: Any = client.webhooks.unwrap(got.body, got.headers, secret=used)
        assert type(event).__name__.startswith("Batch"), event
        assert event.object == "event" and event.data.id.startswith("batch_")
        types.add((got.path, event.type))
        counts = got.event["data"]["counts"]
        assert counts["completed"] + counts["failed"] == counts["total"]
        assert got.event["data"]["status"] == event.type.removeprefix("batch.")
    wanted = {"batch.failed", "batch.completed", "batch.cancelled"}
    assert types == {(path, event) for path in ("/own", "/endpoint") for event in wanted}


async def test_a_batchs_url_is_taken_kept_and_checked(tmp_path: Path, database_url: str) -> None:
    async with running_api(
        database_url, webhook_allow=LOOPBACK, store_url=str(tmp_path / "store")
    ) as api:
        file = await api.client.post(
            "/v1/files",
            files={"file": ("in.jsonl", b'{"custom_id": "1"}\n')},
            data={"purpose": "batch"},
        )
        asked = {
            "input_file_id": file.json()["id"],
            "endpoint": "/v1/completions",
            "completion_window": "1h",
            "webhook_url": "https://example.com/batches",
        }
        response = await api.client.post("/v1/batches", json=asked)
        assert response.status_code == 200, response.text
        assert response.json()["webhook_url"] == "https://example.com/batches"
        for url, says in (("http://10.0.0.1/", "forbidden"), ("ftp://x/", "is not a URL")):
            response = await api.client.post("/v1/batches", json={**asked, "webhook_url": url})
            assert response.status_code == 400 and says in response.text


async def test_owe_is_rolled_back_with_its_event(api: Api, database: Database) -> None:
    await endpoint(api, "https://example.com/", ["schedule.run_failed"])
    with pytest.raises(RuntimeError):
        async with database.transaction() as connection:
            await owe(connection, 1, EventType.SCHEDULE_RUN_FAILED, "schedule_1", "failed")
            raise RuntimeError
    assert await database.fetch_value("SELECT count(*) FROM deliveries") == 0
    async with database.transaction() as connection:
        await owe(
            connection, 1, EventType.SCHEDULE_RUN_FAILED, "schedule_1", "failed", "https://a.b/"
        )
        await owe(connection, 2, EventType.SCHEDULE_RUN_FAILED, "schedule_2", "failed")
    found = await deliveries(api)
    assert {(d["subject"], d["url"]) for d in found} == {
        ("schedule_1", None),
        ("schedule_1", "https://a.b/"),
    }
    assert len({d["event"] for d in found}) == 1


async def test_jobs_end_while_a_receiver_listens_at_once(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    """Cancels of the API and records of a worker at once owe each job's event exactly once."""
    await endpoint(api, receiver.url())
    ids = [await api.submitted(CHAT) for _ in range(60)]

    async def cancel(job_id: str) -> None:
        found = parse_id(IdPrefix.JOB, job_id)
        assert found is not None
        await jobs.cancel(database, DEFAULT_TENANT_ID, found)

    await asyncio.gather(
        finish(bench, all_its=False), *(cancel(i) for i in ids[::2]), finish_late(bench)
    )
    await receiver.got(60)
    assert sorted(got.event["data"]["id"] for got in receiver.received) == sorted(ids)
    states = {
        format_id(IdPrefix.JOB, row["id"]): row["state"]
        for row in await rows(database, "SELECT id, state FROM jobs")
    }
    for got in receiver.received:
        assert states[got.event["data"]["id"]] == got.event["data"]["state"]


async def finish_late(bench: Bench) -> None:
    await asyncio.sleep(0)
    await maintenance.expire_due(bench.database)
