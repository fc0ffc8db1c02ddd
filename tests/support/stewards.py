"""A steward in this process: the duties of `lorry steward`, without its start."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.settings import Settings
from db.database import Database
from db.doorbell import Doorbell
from workers.steward.duties import all_duties


@asynccontextmanager
async def running_steward(
    database: Database, broker_url: str, settings: Settings
) -> AsyncIterator[None]:
    """Every duty, each on its own timer, until the end of the block."""
    doorbell = Doorbell(broker_url)
    duties = all_duties(database, doorbell, settings)
    tasks = [asyncio.create_task(duty.run()) for duty in duties]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for duty in duties:
            if duty.close is not None:
                await duty.close()
        await asyncio.to_thread(doorbell.close)
