"""The real engine's own process killed or frozen in mid-generation: its worker goes too, and comes
back."""

import asyncio
import signal
from pathlib import Path

import psutil
import pytest
from platformdirs import user_cache_path

from cli.demo.base import DEMO_BASE, ensure_base
from db import registry
from db.database import Database
from tests.support.deployment import Deployment, Process
from tests.support.jobs import submit
from tests.support.processes import Tree
from tests.support.scale import Scale
from tests.support.settled import assert_few_connections, assert_nothing_left, settled
from tests.support.waiting import eventually

pytestmark = [pytest.mark.processes, pytest.mark.vllm]

JOBS = 24
START_SECONDS = 240
EXIT_ENGINE_DEAD = 3
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "8", "--served-model-name", DEMO_BASE)
STALL_SECONDS = 20
#: Five kills in a row are no job's fault.
PATIENT = {
    "LORRY_MAX_ATTEMPTS": "10",
    "LORRY_GRACE_SECONDS": "5",
    "LORRY_LEASE_SECONDS": "20",
    "LORRY_STALL_SECONDS": str(STALL_SECONDS),
}


@pytest.mark.timeout(1800)
async def test_an_engine_killed_in_mid_run_costs_no_job(
    database: Database, tmp_path: Path, database_url: str, broker_url: str, scale: Scale
) -> None:
    base = await asyncio.to_thread(ensure_base, user_cache_path("lorry"), print)
    await registry.declare_base(database, DEMO_BASE, 512, "test")
    blows = [signal.SIGKILL] * scale(1, 5) + [signal.SIGSTOP] * scale(0, 1)
    with Deployment(tmp_path, database_url, broker_url, **PATIENT) as deployment:
        deployment.start_steward()
        await submit(database, DEMO_BASE, JOBS, max_tokens=scale(50, 120), ignore_eos=True)
        for blow in blows:
            worker = deployment.start("worker", str(base), *FLAGS)
            await asyncio.to_thread(worker.wait_log, "ready:", START_SECONDS)
            await eventually(_some_run(database), "jobs in the engine", 30)
            tree = Tree(worker.popen.pid, worker.mark)
            _engine_core(worker).send_signal(blow)
            ended = await asyncio.to_thread(worker.popen.wait, STALL_SECONDS + 60)
            assert ended == EXIT_ENGINE_DEAD, worker.log()
            tree.assert_gone(15)
            await assert_few_connections(deployment, database)
        last = deployment.start("worker", str(base), *FLAGS)
        await asyncio.to_thread(last.wait_log, "ready:", START_SECONDS)
        await settled(database, JOBS, seconds=300, succeeded=JOBS)
        await assert_nothing_left(deployment, database)


def _some_run(database: Database):  # type: ignore[no-untyped-def]
    async def look() -> bool:
        running = await database.fetch_value("SELECT count(*) FROM jobs WHERE state = 'running'")
        return bool(running)  # from the second blow on a half, or a half of one

    return look


def _engine_core(worker: Process) -> psutil.Process:
    """vLLM's engine process, which does the computing."""
    family = psutil.Process(worker.popen.pid).children(recursive=True)
    found = [p for p in family if "EngineCore" in " ".join(p.cmdline())]
    assert found, [p.cmdline() for p in family]
    return found[0]
