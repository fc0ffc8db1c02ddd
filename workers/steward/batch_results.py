"""The end of a batch: its output and error files, written line by line, then its last status."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO
from uuid import UUID

from core.batch_results import LineRow, result_line, succeeded
from core.ids import IdPrefix, format_id, new_id
from core.settings import Settings
from db import batch_ends, batch_lines, files
from db.batch_leases import Fenced, HeldBatch
from db.blobs import Blobs
from db.database import Database
from db.files import NewFile, Written, file_key

#: Where each status of a batch that has ended leads.
_ENDS = {"finalizing": "completed", "in_progress": "expired", "cancelling": "cancelled"}


async def write_results(
    database: Database, blobs: Blobs, settings: Settings, batch: HeldBatch
) -> None:
    """Write the files and move the batch to its end, together.

    The files exist for nobody before the transaction that ends the batch; a steward that is killed
    before leaves two silent writers, whose files are swept, and the next one begins anew.

    Raises:
        Fenced: the batch is another steward's.
    """
    output = _Results(blobs, batch, "output") if batch.completed else None
    errors = _Results(blobs, batch, "error") if batch.failed else None
    both = [results for results in (output, errors) if results is not None]
    ids = [results.id for results in both]
    for results in both:
        await files.begin(database, results.file)
    try:
        for results in both:
            await asyncio.to_thread(results.open)
        await _copy(database, batch, output, errors, ids)
        for results in both:
            await asyncio.to_thread(results.close)
        await _end(database, settings, batch, both, output, errors)
    except BaseException as error:
        for results in both:
            await asyncio.to_thread(results.abandon, error)
        await files.give_up(database, ids)
        for results in both:
            await asyncio.to_thread(blobs.delete, file_key(results.id))
        await files.forget(database, ids)
        raise


class _Results:
    """One of the two files. Everything of it blocks, and is called from a thread."""

    def __init__(self, blobs: Blobs, batch: HeldBatch, what: str) -> None:
        self.id = new_id()
        name = f"{format_id(IdPrefix.BATCH, batch.public_id)}_{what}.jsonl"
        self.file = NewFile(self.id, batch.tenant_id, "batch_output", name)
        self.size = 0
        self.lines = 0
        self._writing: AbstractContextManager[BinaryIO] = blobs.write(file_key(self.id))
        self._target: BinaryIO | None = None

    def open(self) -> None:
        self._target = self._writing.__enter__()

    def write(self, lines: list[bytes]) -> None:
        assert self._target is not None
        piece = b"".join(lines)
        self._target.write(piece)
        self.size += len(piece)
        self.lines += len(lines)

    def close(self) -> None:
        self._target = None
        self._writing.__exit__(None, None, None)

    def abandon(self, error: BaseException) -> None:
        if self._target is None:
            return
        self._target = None
        try:
            self._writing.__exit__(type(error), error, error.__traceback__)
        except BaseException as raised:
            if raised is not error:
                raise


async def _copy(
    database: Database,
    batch: HeldBatch,
    output: _Results | None,
    errors: _Results | None,
    ids: list[UUID],
) -> None:
    after, touched = 0, time.monotonic()
    while rows := await batch_lines.in_order(database, batch.id, batch.tenant_id, after):
        await asyncio.to_thread(_write_page, rows, output, errors)
        after = rows[-1]["line"]
        if time.monotonic() - touched > files.TOUCH_SECONDS:
            await files.touch(database, ids)
            touched = time.monotonic()


def _write_page(rows: Sequence[LineRow], output: _Results | None, errors: _Results | None) -> None:
    for results, wanted in ((output, True), (errors, False)):
        lines = [result_line(row) for row in rows if succeeded(row) is wanted]
        if lines:
            assert results is not None, "the counts say that there are no such lines"
            results.write(lines)


async def _end(
    database: Database,
    settings: Settings,
    batch: HeldBatch,
    both: list[_Results],
    output: _Results | None,
    errors: _Results | None,
) -> None:
    # no retention is for ever
    expires = batch.output_expires_seconds or settings.retention_seconds or None
    async with database.transaction() as connection:
        for results in both:
            written = Written(results.size, results.lines, results.file.filename, expires)
            if await files.finish(connection, results.id, written) is None:
                raise Fenced("its files were taken for abandoned")
        await batch_ends.settle(
            connection,
            batch,
            _ENDS[batch.status],
            None if output is None else output.id,
            None if errors is None else errors.id,
        )
