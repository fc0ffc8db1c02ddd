"""Creating batches from a stored file: once per key, or with the caller's own rows."""

import asyncio

import orjson
import pytest

from core.batch_request import BatchRequest, parse_batch_request
from core.errors import IdempotencyConflict, InvalidRequest, NotFound
from core.ids import IdPrefix, format_id, new_id
from db import batch_creation, files
from db.database import Database
from db.files import NewFile, Written
from db.jobs import IdempotencyUse
from tests.support.api import count


async def stored(database: Database, purpose: str = "batch", expires: float | None = None) -> str:
    file_id = new_id()
    await files.begin(database, NewFile(file_id, 1, purpose, "in.jsonl"))
    async with database.connection() as connection:
        await files.finish(connection, file_id, Written(10, 1, "in.jsonl", expires))
    return format_id(IdPrefix.FILE, file_id)


def asked(file_id: str, window: str = "24h") -> BatchRequest:
    body = {
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": window,
    }
    return parse_batch_request(orjson.dumps(body))


def under(key: str, request: BatchRequest) -> IdempotencyUse:
    return IdempotencyUse("POST /v1/batches", key, request.fingerprint())


async def test_twenty_at_once_under_one_key_make_one_batch(database: Database) -> None:
    request = asked(await stored(database))
    made = await asyncio.gather(
        *(batch_creation.create(database, 1, request, under("k", request)) for _ in range(20))
    )
    assert len({row["public_id"] for row, _ in made}) == 1
    assert sum(not replayed for _, replayed in made) == 1
    assert await count(database, "batches") == 1
    other = asked(request.input_file, "1h")
    with pytest.raises(IdempotencyConflict):
        await batch_creation.create(database, 1, other, under("k", other))


async def test_a_refused_creation_leaves_its_key_unused(database: Database) -> None:
    missing = asked(format_id(IdPrefix.FILE, new_id()))
    with pytest.raises(NotFound, match="input_file_id"):
        await batch_creation.create(database, 1, missing, under("k", missing))
    request = asked(await stored(database))
    _, replayed = await batch_creation.create(database, 1, request, under("k", request))
    assert not replayed


async def test_a_batch_is_made_with_the_callers_rows_or_not_at_all(database: Database) -> None:
    request = asked(await stored(database))
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as connection:
            await batch_creation.create_in(connection, 1, request)
            raise ZeroDivisionError
    assert await count(database, "batches") == 0
    async with database.transaction() as connection:
        await batch_creation.create_in(connection, 1, request)
    assert await count(database, "batches") == 1


async def test_only_an_own_living_file_for_batches_will_do(database: Database) -> None:
    output = asked(await stored(database, "batch_output"))
    expired = asked(await stored(database, expires=-1))
    own = asked(await stored(database))
    async with database.transaction() as connection:
        with pytest.raises(InvalidRequest, match="batch_output"):
            await batch_creation.create_in(connection, 1, output)
        with pytest.raises(NotFound):
            await batch_creation.create_in(connection, 1, expired)
        with pytest.raises(NotFound):
            await batch_creation.create_in(connection, 2, own)
    assert await count(database, "batches") == 0
