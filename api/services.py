"""What one process of the API holds while it runs, and how a request reaches it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Final, cast

from fastapi import Depends, Request

from api.metrics import ApiMetrics
from api.waiters import Waiters
from core.errors import Unavailable, UsageError
from core.settings import Settings
from db.blobs import Blobs
from db.database import Database
from db.doorbell import Doorbell
from db.jobs import finished_among
from db.migrate import current_revision
from db.store import Store

log = logging.getLogger(__name__)

#: Longest wait for one statement: a client wants its 503 before it gives up itself.
STATEMENT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Services:
    """Made when the process starts, closed when it stops.

    Args:
        blobs: None where no store is set: then there are no files and batches.
        doorbell: None where no broker is set: then jobs flow by the workers' own polling.
        ready_model: the base model without which this process is not ready, or None.
    """

    settings: Settings
    database: Database
    doorbell: Doorbell | None
    waiters: Waiters
    ready_model: str | None
    metrics: ApiMetrics
    blobs: Blobs | None

    def blob_store(self) -> Blobs:
        """Where files lie. Raises Unavailable where LORRY_STORE_URL is not set."""
        if self.blobs is None:
            raise Unavailable("this API keeps no files: LORRY_STORE_URL is not set")
        return self.blobs

    def store(self) -> Store:
        """The adapter store. Raises UsageError where none is set, or its address is none."""
        if self.settings.store_url is None:
            raise UsageError("LORRY_STORE_URL is not set: the API has nowhere to keep adapters")
        return Store.open(self.settings.store_url)

    def ring(self, base_model: str, partition: int) -> None:
        """Ring the partition's doorbell; only ever after the commit."""
        if self.doorbell is not None:
            self.doorbell.ring(base_model, partition)


@asynccontextmanager
async def open_services(
    settings: Settings, ready_model: str | None, metrics: ApiMetrics
) -> AsyncIterator[Services]:
    """Open what a process needs. Postgres may be away: requests get 503 until it is back.

    Raises:
        UsageError: no database is set.
    """
    if settings.database_url is None:
        raise UsageError("LORRY_DATABASE_URL is not set: give the address of a Postgres")
    blobs = None
    if settings.store_url is not None:
        blobs = await asyncio.to_thread(Blobs.open, settings.store_url)
    # no connection is opened ahead, so that an API can start before its database
    database = await Database.open(
        settings.database_url, min_size=0, command_seconds=STATEMENT_SECONDS
    )
    doorbell = None if settings.broker_url is None else Doorbell(settings.broker_url)
    waiters = Waiters(partial(finished_among, database))
    waiters.start()
    try:
        await _report_database(database)
        yield Services(settings, database, doorbell, waiters, ready_model, metrics, blobs)
    finally:
        # the reverse of opening: waiters query the database, and a ring follows a commit
        await waiters.close()
        if doorbell is not None:
            await asyncio.to_thread(doorbell.close)
        await database.close()


async def _report_database(database: Database) -> None:
    """Open the first connection, so that no request pays for it, and say how Postgres stands."""
    try:
        revision = await current_revision(database)
    except Unavailable as error:
        log.warning("%s", error.message, extra={"action": "database_unreachable"})
    else:
        log.info("Postgres reached", extra={"action": "database_reached", "revision": revision})


async def services_of(request: Request) -> Services:
    """The services of the process that serves `request`."""
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(services_of)]
