"""Pins and partitions of real worker processes, on real queues."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.partitions import queue_name
from db.database import Database
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, all_final, make_bench
from tests.support.processes import environment
from tests.support.waiting import eventually
from workers.launcher import WorkerSpec
from workers.options import queues

pytestmark = pytest.mark.processes


def test_a_dedicated_partition_is_heard_by_those_that_name_it() -> None:
    everything = queues(WorkerSpec("m"), BASE, 32)
    assert len(everything) == 32
    assert queue_name(BASE, 40) not in everything
    assert queues(WorkerSpec("m", partitions=(40,)), BASE, 32) == [queue_name(BASE, 40)]


async def test_pins_are_taken_or_refused_by_name_and_a_move_is_heard(
    database: Database, database_url: str, broker_url: str, tmp_path: Path
) -> None:
    bench = await make_bench(database, tmp_path, adapters=3)
    flags = ("--max-loras", "2", "--served-model-name", BASE)
    with Deployment(tmp_path, database_url, broker_url, LORRY_METRICS_PORT="0") as deployment:
        for pin, told in (
            ("a0,a1", "--pin a1: with 2 slots (--max-loras) at most 1 adapters may be pinned"),
            ("nobody", "--pin nobody: no adapter of this base model has that name"),
        ):
            refused = deployment.start("worker", "m", "--engine", "simulated", "--pin", pin, *flags)
            assert refused.popen.wait(60) == 2
            assert told in refused.log()
        refused = deployment.start(
            "worker", "m", "--engine", "simulated", "--preload", "a0,nobody", *flags
        )
        assert refused.popen.wait(60) == 2
        assert "--preload nobody: no adapter" in refused.log()
        assert _moved(deployment, "a0", "40") == {
            "adapter": "a0",
            "tenant": "default",
            "partition": 40,
        }
        deployment.start_worker("m", "--pin", "a1", "--partitions", "40", *flags)
        deployment.start_worker("m", "--preload", "a2", *flags)
        deployment.start_api()
        deployment.client.post("/v1/jobs", json={"model": "a0", "prompt": "x"}).raise_for_status()
        await eventually(lambda: all_final(bench.database), "the job")


def _moved(deployment: Deployment, adapter: str, partition: str) -> object:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "adapters", "partition", adapter, partition, "--json"],
        env=environment(**deployment.settings),
        capture_output=True,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)
