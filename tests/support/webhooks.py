"""Endpoints, deliveries and ends of jobs, for tests of webhooks."""

from typing import Any

from core.settings import Settings
from core.webhook_events import EventType
from db import claims, results, workers
from db.database import Database
from db.results import Result
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.api import Api
from tests.support.jobs import Bench
from tests.support.waiting import eventually

LOOPBACK = "127.0.0.0/8"
SETTINGS = Settings(webhook_allow=LOOPBACK, webhook_seconds=5)
JOB_EVENTS = [e.value for e in EventType if e.startswith("job.")]
BATCH_EVENTS = [e.value for e in EventType if e.startswith("batch.")]


async def endpoint(api: Api, url: str, events: list[str] | None = None) -> dict[str, Any]:
    response = await api.client.post(
        "/v1/webhooks", json={"url": url, "events": events or JOB_EVENTS}
    )
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


async def deliveries(api: Api, path: str = "/v1/deliveries", **query: Any) -> list[dict[str, Any]]:
    response = await api.client.get(path, params=query)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


async def finish(
    bench: Bench, error: str | None = None, count: int = 1000, *, all_its: bool = True
) -> None:
    """Let a worker take every queued job of the base model, and record its end.

    Args:
        all_its: whether nobody else ends a job of them meanwhile.
    """
    facts = WorkerFacts(bench.base_model_id, "test", 1, "simulated", "1", {})
    worker = await workers.register(bench.database, facts, 600)
    line = Line(bench.base_model_id, 0, DEFAULT_TENANT_ID)
    claimed = await claims.claim(bench.database, worker, line, count)
    ended = [
        Result(job.id, job.attempt, error_code=error, error_message="no")
        if error
        else Result(job.id, job.attempt, response='{"choices": []}')
        for job in claimed
    ]
    recorded = await results.record(bench.database, worker, ended)
    assert len(recorded) == len(ended) or not all_its


async def default_secret(api: Api) -> str:
    response = await api.client.post("/v1/webhooks/secret", json={})
    found: str = response.json()["secret"]
    return found


async def until_state(api: Api, state: str, count: int = 1, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        nonlocal found
        found = await deliveries(api, state=state, **query)
        return len(found) >= count

    await eventually(there, f"{count} deliveries {state}")
    return found


async def next_wait(database: Database, attempts: int) -> float:
    """Seconds from the latest attempt's record to the next, once it is recorded."""

    async def recorded() -> bool:
        found = await database.fetch_value("SELECT count(*) FROM delivery_attempts")
        return bool(found == attempts)

    await eventually(recorded, f"attempt {attempts} in the log")
    found: float = await database.fetch_value(
        "SELECT extract(epoch FROM due_at - now())::float8 FROM deliveries"
    )
    return found


async def make_due(database: Database) -> None:
    async with database.connection() as connection:
        await connection.execute("UPDATE webhook_circuits SET blocked_until = NULL")
        await connection.execute("UPDATE deliveries SET due_at = now() WHERE state = 'pending'")


async def rows(database: Database, statement: str) -> list[Any]:
    async with database.connection() as connection:
        return list(await connection.fetch(statement))
