"""The API in this process, spoken to over HTTP, and what its tests need around it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
from fastapi import FastAPI

from api.app import create_app
from api.services import Services
from core.ids import IdPrefix, parse_id
from core.settings import Settings
from db.database import Database
from db.doorbell import Doorbell

BASE = "sim-base"
CONTEXT = 4096
CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "Hello?"}]}
PROMPT: dict[str, Any] = {"model": BASE, "prompt": "Hello"}
ANSWER = '{"object": "chat.completion", "choices": [{"message": {"content": "Hi"}}]}'


@dataclass(frozen=True)
class Api:
    """A running application and a client of it."""

    app: FastAPI
    client: httpx2.AsyncClient

    @property
    def services(self) -> Services:
        found: Services = self.app.state.services
        return found

    async def submit(self, body: dict[str, Any], **headers: str) -> httpx2.Response:
        return await self.client.post("/v1/jobs", json=body, headers=headers)

    async def submitted(self, body: dict[str, Any]) -> str:
        """The id of a job that was accepted."""
        response = await self.submit(body)
        assert response.status_code == 202, response.text
        found: str = response.json()["id"]
        return found


@asynccontextmanager
async def running_api(
    database_url: str, ready_model: str | None = None, **settings: Any
) -> AsyncIterator[Api]:
    """The application with its lifespan; requests without a key unless `settings` say otherwise."""
    app = create_app(
        Settings(**{"database_url": database_url, "require_keys": False, **settings}), ready_model
    )
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://lorry", timeout=60) as client,
    ):
        yield Api(app, client)


class RecordingDoorbell(Doorbell):
    """Keeps the rings instead of sending them."""

    def __init__(self) -> None:
        self.rings: list[tuple[str, int]] = []

    def ring(self, base_model: str, partition: int) -> None:
        self.rings.append((base_model, partition))

    def close(self) -> None: ...


def inside(job_id: str) -> UUID:
    found = parse_id(IdPrefix.JOB, job_id)
    assert found is not None, job_id
    return found


async def finish(database: Database, job_id: str, response: str = ANSWER) -> None:
    """Let a job succeed, as a worker would have written it."""
    async with database.transaction() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'succeeded', attempt = 1, started_at = now(),"
            " finished_at = now() WHERE id = $1",
            inside(job_id),
        )
        await connection.execute(
            "INSERT INTO job_outputs (tenant_id, job_id, response)"
            " SELECT tenant_id, id, $2::text::json FROM jobs WHERE id = $1",
            inside(job_id),
            response,
        )


async def run(database: Database, job_id: str, worker_id: int = 1) -> None:
    """Let a worker have claimed a job."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'running', attempt = attempt + 1, lease_owner = $2,"
            " started_at = now() WHERE id = $1",
            inside(job_id),
            worker_id,
        )


async def count(database: Database, table: str = "jobs") -> int:
    found: int = await database.fetch_value(f"SELECT count(*) FROM {table}")
    return found


def assert_problem(response: httpx2.Response, status: int, *words: str) -> dict[str, Any]:
    """The response is a problem document that says `words`; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"]
    assert problem["title"]
    for word in words:
        assert word in problem["detail"], problem
    return problem
