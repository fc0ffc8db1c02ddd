"""Batches over HTTP, with a steward's duties that run when they are told to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.settings import Settings
from db.database import Database
from tests.support.api import Api, RecordingDoorbell, count, running_api
from tests.support.batches import CHAT_URL, line
from tests.support.jobs import make_bench
from workers.steward.batches import BatchDuties

MOST_LINES = 50_000
GOOD = line("good", "a0")


@dataclass
class Bench:
    """An API in this process, and the duties of a steward that run when they are told to."""

    api: Api
    database: Database
    duties: BatchDuties
    doorbell: RecordingDoorbell
    settings: Settings

    async def upload(self, content: bytes) -> str:
        response = await self.api.client.post(
            "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}
        )
        assert response.status_code == 200, response.text
        found: str = response.json()["id"]
        return found

    async def create(self, file_id: str, **fields: Any) -> Any:
        body = {
            "input_file_id": file_id,
            "endpoint": CHAT_URL,
            "completion_window": "24h",
            **fields,
        }
        return await self.api.client.post("/v1/batches", json=body)

    async def get(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.api.client.get(f"/v1/batches/{batch_id}")).json()
        return found

    async def validated(self, content: bytes, **fields: Any) -> dict[str, Any]:
        """The batch of this content after validation."""
        created = (await self.create(await self.upload(content), **fields)).json()
        assert created["status"] == "validating", created
        await self.duties.validate()
        return await self.get(created["id"])

    async def assert_nothing_left(self) -> None:
        for table in ("jobs", "job_inputs", "batch_lines", "batch_steps", "waiting_adapters"):
            assert await count(self.database, table) == 0, table


@asynccontextmanager
async def running_bench(
    database_url: str, database: Database, tmp_path: Path
) -> AsyncIterator[Bench]:
    """A bench with a base model and two adapters, its API running."""
    await make_bench(database, tmp_path, 2)
    settings = Settings(
        database_url=database_url,
        store_url=str(tmp_path / "store"),
        lease_seconds=5,
        require_keys=False,
        max_batch_lines=MOST_LINES,
    )
    doorbell = RecordingDoorbell()
    async with running_api(
        database_url, store_url=settings.store_url, max_file_bytes=50_000_000
    ) as api:
        yield Bench(api, database, BatchDuties(database, doorbell, settings), doorbell, settings)
