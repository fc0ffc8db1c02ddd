"""The steward's part in batches: validate, cancel, write the results, sweep files.

Each batch is held by a lease on its row, renewed while this steward works on it. A steward that is
killed leaves a lease that runs out, and a status that says what is to be done next.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from core.errors import LorryError, Unavailable
from core.ids import IdPrefix, format_id
from core.settings import Settings
from db import batch_ends, batch_leases, batch_stage, files, usage
from db.batch_leases import Fenced, HeldBatch
from db.blobs import Blobs
from db.database import Database
from db.doorbell import Doorbell
from db.files import file_key
from workers.steward.batch_results import write_results
from workers.steward.batch_validation import validate

log = logging.getLogger(__name__)


class BatchDuties:
    """What a steward does for batches and files. Any number of stewards may do it."""

    def __init__(self, database: Database, doorbell: Doorbell, settings: Settings) -> None:
        self._database = database
        self._doorbell = doorbell
        self._settings = settings
        self._blobs: Blobs | None = None

    async def validate(self) -> None:
        """Bring batches from `validating` on, oldest first."""
        await self._each(batch_leases.VALIDATE, self._validate)

    async def validate_small(self) -> None:
        """The same, smallest first: a second lane, for those behind a huge one."""
        await self._each(batch_leases.VALIDATE_SMALL, self._validate)

    async def cancel(self) -> None:
        """Cancel the jobs of batches that are to be cancelled."""
        await self._each(batch_leases.CANCEL, self._cancel)

    async def settle(self) -> None:
        """Write the results of batches whose lines are all finished, first ended first."""
        await self._each(batch_leases.SETTLE, self._settle)

    async def settle_small(self) -> None:
        """The same, smallest first: a second lane here too."""
        await self._each(batch_leases.SETTLE_SMALL, self._settle)

    async def sweep_files(self) -> None:
        """Delete the bytes of files that expired, were deleted, or were never finished."""
        if self._settings.store_url is None:
            return  # then there are none
        blobs = await self._store()
        while taken := await files.take_expired(self._database):
            for file_id in taken:
                await asyncio.to_thread(blobs.delete, file_key(file_id))
        while buried := await files.buried(self._database):
            for file_id in buried:
                await asyncio.to_thread(blobs.delete, file_key(file_id))
            await files.forget(self._database, buried)

    async def fold_usage(self) -> None:
        """Add what was used to its days."""
        while await usage.fold(self._database):
            pass

    async def _each(self, what: str, act: Callable[[HeldBatch], Awaitable[None]]) -> None:
        lease = self._settings.lease_seconds
        while (batch := await batch_leases.claim(self._database, what, lease)) is not None:
            async with self._held(batch):
                await act(batch)

    async def _validate(self, batch: HeldBatch) -> None:
        rings = await validate(self._database, await self._store(), self._settings, batch)
        for base_model, partition in rings:
            self._doorbell.ring(base_model, partition)

    async def _cancel(self, batch: HeldBatch) -> None:
        if batch.total == 0:
            await batch_stage.clear_stage(self._database, batch)
            await batch_ends.cancel_unread(self._database, batch)
            return
        last: int | None = 0
        while last is not None:
            last = await batch_ends.cancel_step(self._database, batch, last)

    async def _settle(self, batch: HeldBatch) -> None:
        await write_results(self._database, await self._store(), self._settings, batch)

    async def _store(self) -> Blobs:
        if self._blobs is None:
            url = self._settings.store_url
            if url is None:
                raise Unavailable("LORRY_STORE_URL is not set: batches and files wait")
            self._blobs = await asyncio.to_thread(Blobs.open, url)
        return self._blobs

    @asynccontextmanager
    async def _held(self, batch: HeldBatch) -> AsyncIterator[None]:
        """Renew the lease while the block runs; then let go, also when this steward is stopped.

        After a failure that is not understood the lease is left to run out: the next try comes
        after a pause.
        """
        extra = {"action": "batch", "batch": format_id(IdPrefix.BATCH, batch.public_id)}
        renewing = asyncio.create_task(self._renew(batch))
        try:
            yield
        except Fenced as error:
            log.info("Batch let go: %s", error, extra=extra)
        except asyncio.CancelledError:
            with suppress(LorryError):
                await batch_leases.release(self._database, batch)
            raise
        except Exception:
            log.warning("Batch not carried on; the next try is when its lease ends", extra=extra)
            raise
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        with suppress(LorryError):
            await batch_leases.release(self._database, batch)

    async def _renew(self, batch: HeldBatch) -> None:
        lease = self._settings.lease_seconds
        while True:
            await asyncio.sleep(lease / 3)
            with suppress(Unavailable):
                if not await batch_leases.renew(self._database, batch, lease):
                    return  # what is written next is fenced
