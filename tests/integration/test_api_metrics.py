"""/metrics of the API: the queue, the workers, and its own requests."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from api.metrics import LOOK_SECONDS
from core.labels import OTHER, BoundedLabels
from db import workers
from db.database import Database
from db.stats import QueueNow, queue_now
from db.workers import WorkerFacts
from tests.support.api import BASE, CHAT, Api, assert_problem, running_api
from tests.support.jobs import Bench, make_bench, submit

Samples = dict[tuple[str, ...], float]


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, 3)


@pytest.fixture
async def api(bench: Bench, database_url: str) -> AsyncIterator[Api]:
    async with running_api(database_url) as api:
        yield api


async def scrape(api: Api) -> Samples:
    """Every sample by its name and label values, in the order of the text."""
    response = await api.client.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_the_queue_and_the_workers(api: Api, bench: Bench, database: Database) -> None:
    await submit(database, "a1", 4)
    await submit(database, BASE, 2)
    facts = WorkerFacts(bench.base_model_id, "secret-host", 1, "simulated", "1", {})
    await workers.register(database, facts, 60)
    await workers.register(database, facts, 60)
    found = await scrape(api)
    version = await database.fetch_value(
        "SELECT v.id FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id"
        " WHERE a.name = 'a1'"
    )
    assert found["lorry_queue_jobs", str(version), BASE] == 4
    assert found["lorry_queue_jobs", "base", BASE] == 2
    assert found["lorry_queue_oldest_age_seconds", "base", BASE] >= 0
    assert found["lorry_queue_lines", "true"] == 2
    assert found["lorry_workers", BASE, "simulated"] == 2
    assert found["lorry_running_jobs", BASE, "simulated"] == 0
    # nothing of a tenant's: no adapter's name, no tenant's, no host's
    words = {word for key in found for word in key}
    assert not {"a1", "a1@1", "default", "secret-host"} & words


async def test_deliveries_owed(api: Api, bench: Bench, database: Database) -> None:
    found = await scrape(api)
    assert found["lorry_pending_deliveries", "true"] == 0
    assert found["lorry_deliveries_oldest_due_seconds",] == 0
    owe = (
        "INSERT INTO deliveries (tenant_id, url, line, event_id, type, subject, told, due_at)"
        " SELECT id, 'http://x.example/', 1, uuidv7(), 'job.succeeded', 'job_1', 'succeeded',"
        " now() + $1::interval FROM tenants WHERE name = 'default'"
    )
    async with database.connection() as connection:
        for due in (-90, -30, 300):
            await connection.execute(owe, timedelta(seconds=due))
    api.services.metrics._looked_at = -LOOK_SECONDS
    found = await scrape(api)
    assert found["lorry_pending_deliveries", "true"] == 2
    assert found["lorry_pending_deliveries", "false"] == 1
    assert 90 <= found["lorry_deliveries_oldest_due_seconds",] < 150


async def test_labels_are_bounded_and_the_rest_is_summed(
    api: Api, bench: Bench, database: Database
) -> None:
    api.services.metrics._queue._labels = BoundedLabels(1)
    for name, count in (("a0", 1), ("a1", 5), ("a2", 2)):
        await submit(database, name, count)
    found = await scrape(api)
    lines = {key[1]: value for key, value in found.items() if key[0] == "lorry_queue_jobs"}
    assert sorted(lines.values()) == [3, 5]  # the longest line has the label
    assert lines[OTHER] == 3


async def test_requests_are_counted_by_template_and_jobs_once(api: Api) -> None:
    job = await api.submitted(CHAT)
    for _ in range(2):
        response = await api.submit(CHAT, **{"Idempotency-Key": "k"})
        assert response.status_code == 202
    assert (await api.submit({**CHAT, "n": 0})).status_code == 422
    assert (await api.client.get(f"/v1/jobs/{job}")).status_code == 200
    assert (await api.client.get("/v1/jobs/job_0")).status_code == 404
    assert (await api.client.get("/nothing/here")).status_code == 404
    assert (await api.client.put("/v1/models")).status_code == 405
    assert (await api.client.request("BREW", "/v1/models")).status_code == 405
    found = await scrape(api)
    assert found["lorry_submitted_jobs_total", BASE] == 2
    requests = {key[1:]: n for key, n in found.items() if key[0] == "lorry_http_requests_total"}
    assert requests == {
        ("POST", "/v1/jobs", "202"): 3,
        ("POST", "/v1/jobs", "422"): 1,
        ("GET", "/v1/jobs/{job_id}", "200"): 1,
        ("GET", "/v1/jobs/{job_id}", "404"): 1,
        ("GET", "unmatched", "404"): 1,
        ("PUT", "/v1/models", "405"): 1,
        ("unmatched", "/v1/models", "405"): 1,
    }
    assert found["lorry_http_request_seconds_count", "POST", "/v1/jobs"] == 4
    again = await scrape(api)
    assert again["lorry_http_requests_total", "GET", "/metrics", "200"] == 1


async def test_a_fault_of_ours_is_counted(api: Api) -> None:
    break_down(api.app)
    assert (await api.client.get("/broken")).status_code == 500
    assert (await scrape(api))["lorry_http_requests_total", "GET", "/broken", "500"] == 1


def break_down(app: FastAPI) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret")


async def test_many_scrapes_are_one_look(
    api: Api, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    async def counted(database: Database) -> QueueNow:
        nonlocal looks
        looks += 1
        return await queue_now(database)

    monkeypatch.setattr("api.metrics.queue_now", counted)
    await asyncio.gather(*(scrape(api) for _ in range(5)))
    assert looks == 1
    await submit(database, "a0", 1)
    assert ("lorry_queue_jobs", "base", BASE) not in await scrape(api)
    monkeypatch.setattr("api.metrics.LOOK_SECONDS", 0.0)
    await scrape(api)
    assert looks == 2


async def test_without_postgres_it_is_503_and_its_door_is_open_without_a_key(
    tmp_path: Path, database_url: str
) -> None:
    url = f"postgresql://postgres@/none?host={tmp_path}"
    async with running_api(url, require_keys=True) as api:
        for _ in range(2):
            response = await api.client.get("/metrics")
            assert_problem(response, 503, "Postgres cannot be reached")
            assert int(response.headers["retry-after"]) > 0
    async with running_api(database_url, require_keys=True) as api:
        await scrape(api)
