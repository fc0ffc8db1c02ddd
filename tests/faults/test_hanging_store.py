"""A store that hangs rather than fails: its adapter's jobs wait, the others run, a stop ends."""

import os
from pathlib import Path

import pytest

from db.database import Database
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench, states, submit
from tests.support.settled import assert_few_connections, assert_nothing_left, settled, spent
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes


async def test_a_store_that_hangs_holds_up_its_own_adapter_only(
    database: Database, tmp_path: Path, database_url: str, broker_url: str
) -> None:
    await make_bench(database, tmp_path, adapters=3)
    sha256 = await database.fetch_value(
        "SELECT sha256 FROM adapter_versions v JOIN adapters a ON a.id = v.adapter_id"
        " WHERE a.name = 'a0'"
    )
    weights = tmp_path / "store/adapters" / sha256 / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    os.mkfifo(weights)  # who opens it waits for a writer, as for a file server that is gone
    with Deployment(tmp_path, database_url, broker_url) as deployment:
        deployment.start_steward()
        worker = deployment.start_worker(BASE)
        held_up = await submit(database, "a0", 5)
        for model in ("a1", "a2", BASE):
            await submit(database, model, 5)

        async def others_done() -> bool:
            return await states(database) == {"succeeded": 15, "queued": 5}

        await eventually(others_done, "the others' jobs")
        await submit(database, "a1", 5)  # while loads of a0 are tried again and again

        async def more_done() -> bool:
            return await states(database) == {"succeeded": 20, "queued": 5}

        await eventually(more_done, "later jobs of others")
        assert worker.stop(60) == 0, worker.log()  # though a thread hangs in the store
        await assert_few_connections(deployment, database)
        weights.unlink()
        weights.write_bytes(content)
        deployment.start_worker(BASE)
        await settled(database, 25, succeeded=25)
        assert await spent(database, held_up) == {1: 5}
        await assert_nothing_left(deployment, database)
