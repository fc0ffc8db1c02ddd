"""Stewards that validate batches: all or nothing, once, whatever becomes of the steward."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from db import batch_ends, batch_leases, batch_stage
from db.batch_leases import Fenced
from db.blobs import Blobs
from db.database import Database
from tests.support.api import count
from tests.support.batch_bench import GOOD, Bench, running_bench
from tests.support.batches import jsonl, line
from tests.support.jobs import states
from workers.steward.batch_results import write_results
from workers.steward.batches import BatchDuties


@pytest.fixture
async def bench(database_url: str, database: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    async with running_bench(database_url, database, tmp_path) as running:
        yield running


async def test_lines_become_jobs_with_all_that_they_ask(bench: Bench) -> None:
    soon = line("soon", "a1", priority=7, deadline=4_000_000_000, metadata={"k": "v"})
    batch = await bench.validated(jsonl([soon]))
    async with bench.database.connection() as connection:
        job = await connection.fetchrow(
            "SELECT j.*, i.model, i.body::text AS body, i.metadata::text AS metadata"
            " FROM jobs j JOIN job_inputs i ON i.job_id = j.id"
        )
    assert job is not None
    assert job["priority"] == 7
    assert int(job["deadline"].timestamp()) == batch["expires_at"]
    assert json.loads(job["metadata"]) == {"k": "v"}
    assert "priority" not in json.loads(job["body"])
    # a job that came when the batch did, with the same priority, would stand there
    head_start = 7 * 900
    assert abs(job["place"] / 1000 + head_start - batch["created_at"]) < 2


async def test_no_worker_sees_a_line_before_all_are_good(bench: Bench) -> None:
    content = jsonl(line(f"r{n}", "a0") for n in range(5000))
    created = (await bench.create(await bench.upload(content))).json()
    validating = asyncio.create_task(bench.duties.validate())
    seen = set()
    while not validating.done():
        seen.add(await count(bench.database))
        await asyncio.sleep(0)
    assert seen <= {0, 5000}
    assert (await bench.get(created["id"]))["request_counts"]["total"] == 5000


async def test_a_batch_cancelled_in_validation_leaves_nothing(bench: Bench) -> None:
    content = jsonl(line(f"r{n}", "a0") for n in range(20_000))
    created = (await bench.create(await bench.upload(content))).json()
    validating = asyncio.create_task(bench.duties.validate())
    while not await count(bench.database, "batch_lines"):
        await asyncio.sleep(0)
    await bench.api.client.post(f"/v1/batches/{created['id']}/cancel")
    await validating
    await bench.duties.cancel()
    batch = await bench.get(created["id"])
    assert batch["status"] == "cancelled"
    assert batch["request_counts"]["total"] == 0
    await bench.assert_nothing_left()


async def test_a_steward_taken_for_dead_writes_nothing_more(bench: Bench) -> None:
    await bench.create(await bench.upload(jsonl([GOOD])))
    first = await batch_leases.claim(bench.database, batch_leases.VALIDATE, 0.01)
    assert first is not None
    await asyncio.sleep(0.05)  # its lease runs out
    second = await batch_leases.claim(bench.database, batch_leases.VALIDATE, 30)
    assert second is not None
    assert second.id == first.id
    assert await batch_leases.claim(bench.database, batch_leases.VALIDATE, 30) is None
    with pytest.raises(Fenced):
        await batch_stage.stage(bench.database, first, [], [])
    with pytest.raises(Fenced):
        await batch_stage.begin(bench.database, first, batch_stage.Validated(0, 0, None, []))
    with pytest.raises(Fenced):
        await batch_ends.fail(bench.database, first, "[]")
    assert not await batch_leases.renew(bench.database, first, 30)
    await batch_leases.release(bench.database, first)
    assert await batch_leases.claim(bench.database, batch_leases.VALIDATE, 30) is None


async def test_a_steward_taken_for_dead_ends_no_batch(bench: Bench, tmp_path: Path) -> None:
    batch = await bench.validated(b"bad\n" * 30, skip_invalid=True)
    assert batch["status"] == "finalizing"
    first = await batch_leases.claim(bench.database, batch_leases.SETTLE, 0.01)
    assert first is not None
    await asyncio.sleep(0.05)  # its lease runs out
    blobs = Blobs.open(str(tmp_path / "store"))
    other = BatchDuties(bench.database, bench.doorbell, bench.settings)
    await other.settle_small()
    done = await bench.get(batch["id"])
    assert done["status"] == "completed"
    with pytest.raises(Fenced):
        await write_results(bench.database, blobs, bench.settings, first)
    assert await bench.get(batch["id"]) == done
    # the input, and the results that the other one wrote
    assert await count(bench.database, "files") == 2
    assert len([p for p in (tmp_path / "store/files").rglob("*") if p.is_file()]) == 2


async def test_a_steward_that_is_stopped_lets_go_of_its_batch(bench: Bench) -> None:
    content = jsonl(line(f"r{n}", "a0") for n in range(20_000))
    created = (await bench.create(await bench.upload(content))).json()
    validating = asyncio.create_task(bench.duties.validate())
    while not await count(bench.database, "batch_lines"):
        await asyncio.sleep(0)
    validating.cancel()
    await asyncio.gather(validating, return_exceptions=True)
    other = BatchDuties(bench.database, bench.doorbell, bench.settings)
    await other.validate()  # at once, and from the beginning
    assert (await bench.get(created["id"]))["request_counts"]["total"] == 20_000


async def test_two_stewards_validate_a_batch_once(bench: Bench) -> None:
    for number in range(6):
        content = jsonl(line(f"r{n}", f"a{number % 2}") for n in range(200))
        await bench.create(await bench.upload(content))
    other = BatchDuties(bench.database, bench.doorbell, bench.settings)
    await asyncio.gather(bench.duties.validate(), other.validate_small(), other.validate())
    assert await states(bench.database) == {"queued": 1200}
