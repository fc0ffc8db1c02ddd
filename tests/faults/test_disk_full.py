"""Postgres out of disk: submissions get 503, results wait, and all goes on once there is room."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from db.database import Database
from db.migrate import upgrade
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench, submit
from tests.support.servers import PostgresServer
from tests.support.settled import assert_few_connections, assert_nothing_left, settled
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

SIZE = "400m"
JOBS = 200


@pytest.fixture
def small_disk(servers_folder: Path) -> Iterator[Path]:
    """A file system of its own, which only root may make."""
    folder = servers_folder / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=755", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(240)
async def test_a_full_disk_delays_and_loses_nothing(
    small_disk: Path, tmp_path: Path, broker_url: str
) -> None:
    with PostgresServer(small_disk / "pg") as postgres:
        postgres.create_database("lorry_own")
        url = postgres.url("lorry_own")
        await asyncio.to_thread(upgrade, url)
        async with Database.connect(url) as database:
            await make_bench(database, tmp_path, adapters=1)
            with Deployment(tmp_path, url, broker_url) as deployment:
                flags = ("--max-num-seqs", "16", "--sim-step-ms", "60")
                worker = deployment.start("worker", BASE, "--engine", "simulated", *flags)
                deployment.start_steward()
                deployment.start_api()
                worker.wait_log("ready:")
                await submit(database, "a0", JOBS, max_tokens=8)
                ballast = small_disk / "ballast"
                _fill(ballast)

                # answers and prompts of this size want new pages, and there are none
                def refused() -> bool:
                    body = {"model": "a0", "prompt": "x " * 3000, "max_tokens": 8}
                    response = deployment.client.post("/v1/jobs", json=body)
                    accepted.append(response.status_code == 202)
                    assert response.status_code in (202, 503), response.text
                    return response.status_code == 503

                accepted: list[bool] = []
                for _ in range(2000):
                    if await asyncio.to_thread(refused):
                        break
                else:
                    pytest.fail("the disk was never full")

                async def waits() -> bool:
                    return "Results wait for Postgres" in worker.log()

                await eventually(waits, f"results that wait: {worker.log()}", 30)
                ballast.unlink()
                jobs = JOBS + sum(accepted)
                await settled(database, jobs, succeeded=jobs)
                assert worker.popen.poll() is None
                await assert_few_connections(deployment, database)
                await assert_nothing_left(deployment, database)


def _fill(ballast: Path) -> None:
    """Take every byte that is left."""
    size = 1 << 20
    with ballast.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(os.urandom(size))
            except OSError:
                size //= 2
