"""The steward process: one event loop, its duties, and a stop that waits for none of them."""

import asyncio
import logging

import uvloop

from core.errors import Unavailable, UsageError
from core.logs import configure_logging
from core.settings import Settings
from db.database import Database
from db.doorbell import Doorbell
from workers.steward.duties import all_duties
from workers.stop_signals import StopSignals

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Run a steward until SIGTERM. Blocking.

    Raises:
        UsageError: the database's or the broker's address is missing.
    """
    configure_logging(settings.log_level)
    for name in ("database_url", "broker_url"):
        if getattr(settings, name) is None:
            raise UsageError(f"LORRY_{name.upper()} is not set: a steward needs it")
    uvloop.run(_run(settings))


async def _run(settings: Settings) -> None:
    stop = StopSignals()
    database = await stop.unless_stopped(_open_database(settings))
    if database is None:
        return
    doorbell = Doorbell(str(settings.broker_url))
    duties = all_duties(database, doorbell, settings)
    tasks = [asyncio.create_task(duty.run(), name=duty.name) for duty in duties]
    log.info("Steward ready", extra={"action": "steward_ready"})
    try:
        await stop.wait()
    finally:
        # every duty is one short transaction, or safe to cut between two
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for duty in duties:
            if duty.close is not None:
                await duty.close()
        doorbell.close()
        await database.close()


async def _open_database(settings: Settings) -> Database:
    while True:
        try:
            return await Database.open(str(settings.database_url), max_size=8)
        except Unavailable as error:
            log.warning("Waiting for Postgres: %s", error, extra={"action": "postgres_waits"})
            await asyncio.sleep(1)
