"""A worker killed while an adapter is folded: what it began is answered rightly by the next one."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from platformdirs import user_cache_path

from cli.demo.base import DEMO_BASE, ensure_base
from db import adapters as registered
from db import registry
from db.database import Database
from db.store import Store
from tests.engine.test_demo_adapters import FOLDER
from tests.support.deployment import Deployment
from tests.support.jobs import submit
from tests.support.scale import Scale
from tests.support.settled import assert_nothing_left, settled

pytestmark = [pytest.mark.processes, pytest.mark.vllm]

START_SECONDS = 240
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "8", "--served-model-name", DEMO_BASE)
UNPACKED = ("--worker-extension-cls", "tests.support.unpacked_cpu.UnpackedFold")
PATIENT = {"LORRY_MAX_ATTEMPTS": "10", "LORRY_GRACE_SECONDS": "60", "LORRY_LEASE_SECONDS": "8"}
GREEDY: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}


@pytest.mark.timeout(1800)
async def test_a_worker_killed_while_folded_answers_rightly_after_its_restart(
    database: Database, tmp_path: Path, database_url: str, broker_url: str, scale: Scale
) -> None:
    if not scale.full:
        pytest.skip("three engines, one after another: with --full")
    base = str(await asyncio.to_thread(ensure_base, user_cache_path("lorry"), print))
    await registry.declare_base(database, DEMO_BASE, 512, "test")
    jobs = 160
    with Deployment(tmp_path, database_url, broker_url, **PATIENT) as deployment:
        await _register(database, deployment)
        deployment.start_steward()
        wanted = await _submit(database, jobs)  # what a worker answers that never folds
        first = deployment.start("worker", base, "--fold", "off", *FLAGS, *UNPACKED)
        await asyncio.to_thread(first.wait_log, "ready:", START_SECONDS)
        await settled(database, len(wanted), seconds=600, succeeded=len(wanted))
        await asyncio.to_thread(first.stop, 90)
        again = await _submit(database, jobs)
        for _ in range(3):
            worker = deployment.start("worker", base, *FLAGS, *UNPACKED)
            await asyncio.to_thread(worker.wait_log, "Folded", START_SECONDS)
            await asyncio.to_thread(worker.kill)
        deployment.start("worker", base, *FLAGS, *UNPACKED)
        total = len(wanted) + len(again)
        await settled(database, total, seconds=600, succeeded=total)
        # what the dead worker held runs apart and unfolded; what comes now is folded once more
        after = await _submit(database, jobs)
        total += len(after)
        await settled(database, total, seconds=600, succeeded=total)
        texts = await _texts(database, wanted)
        assert await _texts(database, again) == texts
        assert await _texts(database, after) == texts
        folded = await database.fetch_value("SELECT count(*) FROM job_outputs WHERE folded")
        assert folded > 0
        await assert_nothing_left(deployment, database)


async def _register(database: Database, deployment: Deployment) -> None:
    store = Store.open(deployment.settings["LORRY_STORE_URL"])
    for name in ("sql", "pirate"):
        await registered.register_ready(
            database, store, tenant="default", base_model=DEMO_BASE, name=name, folder=FOLDER / name
        )


async def _submit(database: Database, jobs: int) -> list[UUID]:
    """Mostly of one adapter, a few of another and of the base."""
    ids = await submit(database, "sql", jobs, **GREEDY)
    ids += await submit(database, "pirate", 6, **GREEDY)
    return [*ids, *await submit(database, DEMO_BASE, 4, **GREEDY)]


async def _texts(database: Database, ids: list[UUID]) -> list[str]:
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT job_id, response->'choices'->0->>'text' AS text FROM job_outputs"
            " WHERE job_id = ANY($1::uuid[])",
            ids,
        )
    texts = {row["job_id"]: row["text"] for row in rows}
    return [texts[one] for one in ids]
