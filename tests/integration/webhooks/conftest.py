"""An API, a receiver and a steward's sender, for tests of webhooks."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from db.database import Database
from tests.support.api import Api, running_api
from tests.support.jobs import Bench, make_bench
from tests.support.receivers import Receiver
from tests.support.webhooks import LOOPBACK, SETTINGS
from workers.steward.webhook_sender import Sender


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with running_api(database_url, webhook_allow=LOOPBACK) as running:
        yield running


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, 1)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver.listening() as listening:
        yield listening


@pytest.fixture
async def sender(database: Database) -> AsyncIterator[Sender]:
    """A steward's sender on its timer."""
    made = Sender(database, SETTINGS)

    async def run() -> None:
        while True:
            await made.act()
            await asyncio.sleep(0.02)

    task = asyncio.create_task(run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.close()
