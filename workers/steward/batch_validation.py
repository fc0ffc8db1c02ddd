"""Validation: a batch's file, line by line, into staged lines; then all of them become jobs.

The file is read and parsed on a thread, a piece at a time, while the piece before is on its way to
Postgres. Nothing of it is ever whole in memory but the hashes of its custom_ids.
"""

import asyncio
import logging
import time
from collections.abc import Generator
from typing import Final

import orjson

from core.batch_lines import BadLine, GoodLine, LineDefaults, LineReader, split_lines
from core.errors import InvalidRequest
from core.ids import IdPrefix, format_id, new_id
from core.settings import Settings
from db import batch_ends, batch_stage, files
from db.batch_leases import HeldBatch
from db.batch_stage import StagedInput, StagedLine, Validated
from db.blobs import CHUNK_BYTES, Blobs
from db.database import Database
from db.files import file_key
from db.registry import Target
from db.workers import clock
from workers.steward.batch_models import Models

log = logging.getLogger(__name__)

#: Bad lines that are told about; at one more, reading ends.
MOST_ERRORS: Final = 1000
#: Lines handled at once.
CHUNK_LINES: Final = 1000

GONE: Final = "The input file was deleted, or has expired."

Lines = list[GoodLine | BadLine]


async def validate(
    database: Database, blobs: Blobs, settings: Settings, batch: HeldBatch
) -> set[tuple[str, int]]:
    """`validating` → `in_progress`, or → `failed` with nothing left behind.

    Returns:
        The base models and partitions whose doorbells are to be rung.

    Raises:
        Fenced: the batch is another steward's, or was cancelled.
    """
    started = time.monotonic()
    await batch_stage.clear_stage(database, batch)  # what a steward before us left
    validation = _Validation(database, settings, batch)
    if await files.get(database, batch.tenant_id, batch.input_file_id) is None:
        validation.refuse("file_not_found", GONE, "input_file_id")
    else:
        try:
            await validation.read(blobs)
        except FileNotFoundError:
            validation.refuse("file_not_found", GONE, "input_file_id")
    extra = {
        "action": "batch_validated",
        "batch": format_id(IdPrefix.BATCH, batch.public_id),
        "lines": validation.good + validation.bad,
        "bad": validation.bad,
        "read_seconds": round(time.monotonic() - started, 2),
    }
    errors = validation.errors()
    if errors:
        await batch_stage.clear_stage(database, batch)
        await batch_ends.fail(database, batch, orjson.dumps(errors).decode())
        log.info("Batch failed validation", extra=extra)
        return set()
    await batch_stage.begin(database, batch, validation.found())
    extra["seconds"] = round(time.monotonic() - started, 2)
    log.info("Batch in progress", extra=extra)
    return validation.rings()


class _Validation:
    """One batch's lines on their way."""

    def __init__(self, database: Database, settings: Settings, batch: HeldBatch) -> None:
        self._database = database
        self._settings = settings
        self._batch = batch
        self._named = Models(database, batch.tenant_id)
        self._used: set[Target] = set()
        self._models: set[str] = set()
        self._kept: list[BadLine] = []
        self._refused: dict[str, object] | None = None
        self.good = 0
        self.bad = 0

    def refuse(self, code: str, message: str, param: str | None = None) -> None:
        """The batch as a whole cannot be used."""
        self._refused = {"code": code, "message": message, "param": param, "line": None}

    async def read(self, blobs: Blobs) -> None:
        """Read and stage the whole file, or as far as there is a use in it.

        Raises:
            FileNotFoundError: the file is gone from the store.
            Fenced: the batch is another steward's, or was cancelled.
        """
        chunks = self._chunks(blobs)
        ahead = asyncio.create_task(asyncio.to_thread(next, chunks, None))
        try:
            while (chunk := await ahead) is not None:
                ahead = asyncio.create_task(asyncio.to_thread(next, chunks, None))
                await self._take(chunk)
                if self._is_over():
                    return
        finally:
            await asyncio.gather(ahead, return_exceptions=True)
            await asyncio.to_thread(chunks.close)
        if not self.good + self.bad:
            self.refuse("empty_file", "The input file has no lines.", "input_file_id")

    def errors(self) -> list[dict[str, object]]:
        """Why the batch fails; empty where it does not."""
        skipped = self._batch.skip_invalid
        listed = [] if skipped else [bad.as_error() for bad in self._kept]
        if not skipped and self.bad > MOST_ERRORS:
            line = self._kept[-1].number
            message = f"More than {MOST_ERRORS} lines are bad; what follows line {line} was not "
            listed.append(
                {"code": "too_many_errors", "message": message + "told.", "param": None,
                 "line": None}
            )  # fmt: skip
        return [*([self._refused] if self._refused else []), *listed]

    def found(self) -> Validated:
        """What the batch is to begin with."""
        return Validated(
            good=self.good,
            bad=self.bad,
            model=next(iter(self._models)) if len(self._models) == 1 else None,
            lines={target.line(self._batch.tenant_id) for target in self._used},
        )

    def rings(self) -> set[tuple[str, int]]:
        """The partitions that have work now."""
        return {(target.base_model, target.partition) for target in self._used}

    def _chunks(self, blobs: Blobs) -> Generator[Lines, None, None]:
        """The file's lines, parsed; runs on a thread."""
        longest = self._settings.max_body_bytes
        defaults = LineDefaults(self._batch.default_model, self._batch.default_priority)
        reader = LineReader(self._batch.endpoint, longest, defaults)
        with blobs.read(file_key(self._batch.input_file_id)) as file:
            chunk: Lines = []
            size = 0
            for raw in split_lines(iter(lambda: file.read(CHUNK_BYTES), b""), longest):
                chunk.append(reader.read(raw))
                size += raw.size
                if len(chunk) >= CHUNK_LINES or size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = [], 0
            if chunk:
                yield chunk

    async def _take(self, chunk: Lines) -> None:
        await self._named.look_up(
            line.request.model for line in chunk if isinstance(line, GoodLine)
        )
        staged, inputs = self._judge(chunk, await self._now(chunk))
        if self.good + self.bad > self._settings.max_batch_lines:
            self.refuse(
                "too_many_lines",
                f"The input file has more than {self._settings.max_batch_lines} lines "
                "(LORRY_MAX_BATCH_LINES); split it.",
                "input_file_id",
            )
        # without a doubt the batch fails: what is left is to be told about, not to be kept
        if staged and self._refused is None and (self._batch.skip_invalid or not self.bad):
            await batch_stage.stage(self._database, self._batch, staged, inputs)

    def _is_over(self) -> bool:
        return self._refused is not None or (
            self.bad > MOST_ERRORS and not self._batch.skip_invalid
        )

    async def _now(self, chunk: Lines) -> float:
        """The time by the clock that expires jobs, where a line has a deadline."""
        if any(isinstance(line, GoodLine) and line.request.deadline for line in chunk):
            return (await clock(self._database)).timestamp()
        return 0.0

    def _judge(self, chunk: Lines, now: float) -> tuple[list[StagedLine], list[StagedInput]]:
        staged: list[StagedLine] = []
        inputs: list[StagedInput] = []
        for line in chunk:
            bad = line if isinstance(line, BadLine) else self._stage(line, now, staged, inputs)
            if bad is None:
                self.good += 1
                continue
            self.bad += 1
            if len(self._kept) < MOST_ERRORS:
                self._kept.append(bad)
            if self._batch.skip_invalid:
                staged.append(_staged_bad(bad))
        return staged, inputs

    def _stage(
        self,
        line: GoodLine,
        now: float,
        staged: list[StagedLine],
        inputs: list[StagedInput],
    ) -> BadLine | None:
        """Add a line to those staged, or say why it is bad."""
        request = line.request
        target = self._named.target(request.model)
        if target is None:
            message = self._named.why_not(request.model)
            return BadLine(line.number, "model_not_found", message, "body.model", line.custom_id)
        try:
            request.check_context(target.max_model_len)
            deadline = request.deadline_at(now)
        except InvalidRequest as error:
            param = f"body.{error.details.get('field')}"
            return BadLine(line.number, "invalid_request", error.message, param, line.custom_id)
        job_id = new_id()
        staged.append(
            StagedLine(
                line.number,
                job_id,
                line.custom_id,
                target.base_model_id,
                target.adapter_version_id,
                request.expected_tokens(target.max_model_len),
                request.priority,
                deadline,
            )
        )
        inputs.append(
            StagedInput(
                job_id,
                request.endpoint,
                request.model,
                request.body_json(),
                request.metadata_json(),
            )
        )
        self._used.add(target)
        self._models.add(request.model)
        return None


def _staged_bad(bad: BadLine) -> StagedLine:
    return StagedLine(
        bad.number, new_id(), bad.custom_id, None, None, 0, 0, None, bad.code, bad.message
    )
