"""How long jobs are away when their worker is killed, with the default settings.

    python -m benchmarks.recovery [KILLS]

Workers on the simulated engine and a steward, with the default settings. The one that has all the
jobs is killed at a moment of its heartbeat's period that moves from kill to kill; the clock stops
when the first and the last of them run elsewhere. They come back in two groups that run apart
(decision 0008), so two idle workers are there to take them; with one, the second group would begin
where the first ends. What bounds it: the lease, less the time since its last heartbeat (a third of
a lease at most), and the pause between two looks for lost workers (`LORRY_SWEEP_SECONDS`); the
doorbell that follows a rescue costs milliseconds.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import orjson

from benchmarks.servers import Servers, running_servers
from core.errors import ModelNotFound
from core.ids import new_id
from core.priority import place_in_line
from core.settings import Settings
from db import registry
from db.bulk import submit_many
from db.database import Connection, Database
from db.jobs import NewJob
from db.migrate import upgrade
from db.registry import Target
from db.tenants import DEFAULT_TENANT_ID
from workers.drain.lease import BEATS_PER_LEASE

BASE: Final = "sim-base"
JOBS: Final = 64
SURVIVORS: Final = 2
#: Long enough to be running whenever the kill comes: a minute a token.
FLAGS: Final = ("--engine", "simulated", "--max-num-seqs", "64", "--sim-step-ms", "60000")


@dataclass(frozen=True, slots=True)
class Away:
    """Seconds from the kill until the first and the last job ran elsewhere."""

    first: float
    last: float


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    defaults = Settings()
    with ExitStack() as stack:
        servers = stack.enter_context(running_servers())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorry-bench-")))
        upgrade(servers.postgres_url)
        stack.enter_context(_running(servers, folder, "steward"))
        measured = asyncio.run(_measure(servers, folder, kills, defaults))
    first, last = [round(a.first, 1) for a in measured], [round(a.last, 1) for a in measured]
    print(
        json.dumps(
            {
                "name": "recovery",
                "jobs": JOBS,
                "lease_seconds": defaults.lease_seconds,
                "sweep_seconds": defaults.sweep_seconds,
                "first_seconds": first,
                "last_seconds": last,
            }
        )
    )
    print(f"recovery: {min(first):.1f} to {max(last):.1f} s")


async def _measure(servers: Servers, folder: Path, kills: int, defaults: Settings) -> list[Away]:
    measured = []
    async with Database.connect(servers.postgres_url) as database:
        for number in range(kills):
            with ExitStack() as workers:

                def start(stack: ExitStack = workers) -> "subprocess.Popen[bytes]":
                    return stack.enter_context(_running(servers, folder, "worker", BASE, *FLAGS))

                measured.append(await _kill_one(database, start, number / kills))
            await _clear(database)
    return measured


async def _kill_one(
    database: Database, start: Callable[[], "subprocess.Popen[bytes]"], share: float
) -> Away:
    """Kill the worker that has every job, at this share of its heartbeat's period."""
    victim = start()
    ids = await _submit(database)
    while await _running_of(database, ids) < JOBS:
        await asyncio.sleep(0.02)
    lost = await database.fetch_value("SELECT lease_owner FROM jobs WHERE id = $1", ids[0])
    for _ in range(SURVIVORS):
        start()
    while await _workers(database) < 1 + SURVIVORS:
        await asyncio.sleep(0.1)
    await asyncio.sleep(await _until_beat(database, lost, share))
    victim.kill()
    killed = time.monotonic()
    first = 0.0
    while (elsewhere := await _running_of(database, ids, but=lost)) < JOBS:
        first = first or (time.monotonic() - killed if elsewhere else 0.0)
        await asyncio.sleep(0.02)
    last = time.monotonic() - killed
    return Away(first or last, last)


async def _until_beat(database: Database, worker_id: int, share: float) -> float:
    """Seconds until this share of the period has passed since the worker's next heartbeat."""
    since: float = await database.fetch_value(
        "SELECT extract(epoch FROM clock_timestamp() - heartbeat_at)::float8"
        " FROM workers WHERE id = $1",
        worker_id,
    )
    period = Settings().lease_seconds / BEATS_PER_LEASE
    return period * (1 + share) - since


async def _submit(database: Database) -> list[UUID]:
    async with database.connection() as connection:
        # the worker declares its base when it starts
        while (found := await _target(connection)) is None:
            await asyncio.sleep(0.1)
    jobs = []
    for number in range(JOBS):
        job_id = new_id()
        jobs.append(
            NewJob(
                id=job_id,
                tenant_id=DEFAULT_TENANT_ID,
                target=found,
                endpoint="completion",
                model=BASE,
                body=orjson.dumps({"prompt": f"job {number}", "max_tokens": 8}).decode(),
                priority=0,
                place=place_in_line(job_id.int >> 80, 0),
                tokens=16,
            )
        )
    await submit_many(database, jobs)
    return [job.id for job in jobs]


async def _target(connection: Connection) -> Target | None:
    try:
        return await registry.resolve(connection, DEFAULT_TENANT_ID, BASE)
    except ModelNotFound:
        return None


async def _running_of(database: Database, ids: list[UUID], but: int = 0) -> int:
    found: int = await database.fetch_value(
        "SELECT count(*) FROM jobs WHERE id = ANY($1) AND state = 'running' AND lease_owner <> $2",
        ids,
        but,
    )
    return found


async def _workers(database: Database) -> int:
    found: int = await database.fetch_value(
        "SELECT count(*) FROM workers"
        " WHERE lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at > now()"
    )
    return found


async def _clear(database: Database) -> None:
    """The next kill begins with nobody's jobs and nobody's lease."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE jobs SET state = 'cancelled', finished_at = now()"
            " WHERE state IN ('queued', 'running')"
        )
        await connection.execute("UPDATE workers SET stopped_at = now() WHERE stopped_at IS NULL")


@contextmanager
def _running(
    servers: Servers, folder: Path, *arguments: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """`lorry ARGUMENTS` on those servers; killed at the end, its log on standard error."""
    environ = {
        **os.environ,
        "LORRY_DATABASE_URL": servers.postgres_url,
        "LORRY_BROKER_URL": servers.broker_url,
        "LORRY_STORE_URL": str(folder / "store"),
        "LORRY_CACHE_DIR": str(folder / "cache"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *arguments], env=environ, stdout=sys.stderr
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
