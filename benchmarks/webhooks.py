"""How soon webhooks arrive: jobs that finish at a steady pace, each owing one of 20 receivers.

    python -m benchmarks.webhooks [--jobs 10000] [--seconds 60] [--slow 29]

A real steward sends; jobs are finished by the worker's own statement. Of the receivers two are dead
(one port is closed, one takes connections and never answers) and one answers after `--slow`
seconds; the other 17 answer at once. Prints for those 17 how long after its job each delivery
arrived, and whether each arrived exactly once.
"""

import argparse
import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

import orjson
import psutil

from benchmarks.servers import running_servers
from benchmarks.stack import free_port, percentile
from db import claims, registry, results, workers
from db.database import Database
from db.migrate import upgrade
from db.results import Result
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts

RECEIVERS, DEAD = 20, 2
#: How long after the last job deliveries of the good receivers are waited for.
PATIENCE_SECONDS = 120.0
TICK_SECONDS = 0.05


@dataclass(slots=True)
class Receivers:
    """The receivers' URLs, and when each job was told, by the receivers that answer at once."""

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    arrived: dict[str, list[float]] = field(default_factory=dict)
    slow: Counter[str] = field(default_factory=Counter)

    @property
    def urls(self) -> list[str]:
        return [*self.good, *self.bad]


@asynccontextmanager
async def receiving(slow_seconds: float) -> AsyncIterator[Receivers]:
    """Run the receivers, each on a port of its own."""
    found = Receivers()

    async def serve(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float
    ) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                job_id = orjson.loads(await reader.readexactly(length))["data"]["id"]
                if seconds:
                    found.slow[job_id] += 1
                    await asyncio.sleep(seconds)
                else:
                    found.arrived.setdefault(job_id, []).append(time.time())
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async with AsyncExitStack() as stack:
        for number in range(RECEIVERS - DEAD):
            seconds = slow_seconds if number == 0 else 0.0
            server = await asyncio.start_server(
                functools.partial(serve, seconds=seconds), "127.0.0.1", 0
            )
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            (found.bad if seconds else found.good).append(f"http://127.0.0.1:{port}/hook")
        silent = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        stack.callback(silent.close)
        found.bad.append(f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}/hook")
        found.bad.append(f"http://127.0.0.1:{free_port()}/hook")
        yield found


async def queue_jobs(database: Database, urls: list[str], count: int) -> tuple[int, int]:
    """Queue jobs whose webhook_url are the receivers' in turn; returns base model and worker."""
    base_model_id = await registry.declare_base(database, "base", 4096)
    facts = WorkerFacts(base_model_id, "bench", 1, "simulated", "1", {})
    worker_id = await workers.register(database, facts, 3600)
    async with database.connection() as connection:
        await connection.execute(_FILL, DEFAULT_TENANT_ID, base_model_id, urls, count, timeout=300)
    return base_model_id, worker_id


_FILL = """
WITH job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, place, tokens, webhook)
    SELECT uuidv7(), $1, $2, n, 16, true FROM generate_series(1, $4::int) n
    RETURNING id, tenant_id, place
)
INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body, webhook_url)
SELECT id, tenant_id, 'completion', 'base', '{"prompt": "x"}',
       ($3::text[])[1 + place % cardinality($3::text[])] FROM job
"""


async def finish_jobs(
    database: Database, base_model_id: int, worker_id: int, count: int, seconds: float
) -> dict[str, float]:
    """Finish the jobs at a steady pace as a worker does; returns when each was, by its id."""
    line = Line(base_model_id, 0, DEFAULT_TENANT_ID)
    finished: dict[str, float] = {}
    started = time.monotonic()
    while len(finished) < count:
        due = min(count, int((time.monotonic() - started) / seconds * count) + 1)
        if due > len(finished):
            claimed = await claims.claim(database, worker_id, line, due - len(finished))
            done = [Result(job.id, job.attempt, response='{"a": 1}') for job in claimed]
            await results.record(database, worker_id, done)
            now = time.time()
            finished |= {shown(job.id): now for job in claimed}
        await asyncio.sleep(TICK_SECONDS)
    return finished


def shown(job_id: UUID) -> str:
    """A job's outside id."""
    return f"job_{job_id.hex}"


async def measure(
    database: Database, receivers: Receivers, jobs: int, seconds: float
) -> dict[str, object]:
    """Finish the jobs while a steward sends; returns the figures of the good receivers."""
    base_model_id, worker_id = await queue_jobs(database, receivers.urls, jobs)
    finished = await finish_jobs(database, base_model_id, worker_id, jobs, seconds)
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT job_id FROM job_inputs WHERE webhook_url = ANY($1::text[])", receivers.good
        )
    wanted = {shown(row["job_id"]) for row in rows}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not wanted <= receivers.arrived.keys() and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)  # for what might come twice
    times = [
        receivers.arrived[each][0] - finished[each] for each in wanted & set(receivers.arrived)
    ]
    return {
        "jobs": jobs,
        "over_seconds": round(max(finished.values()) - min(finished.values()), 1),
        "owed_to_the_17": len(wanted),
        "arrived": len(times),
        "twice": sum(len(each) > 1 for each in receivers.arrived.values()),
        "p50_seconds": round(percentile(times, 0.5), 3),
        "p99_seconds": round(percentile(times, 0.99), 3),
        "most_seconds": round(max(times), 3),
        "slow_twice": sum(count > 1 for count in receivers.slow.values()),
    }


def steward_settings(database_url: str, broker_url: str, folder: str) -> Mapping[str, str]:
    """What a steward needs to reach receivers on loopback."""
    return {
        "LORRY_DATABASE_URL": database_url,
        "LORRY_BROKER_URL": broker_url,
        "LORRY_STORE_URL": folder,
        "LORRY_WEBHOOK_ALLOW": "127.0.0.0/8",
        "LORRY_LOG_LEVEL": "error",
    }


async def run(options: argparse.Namespace, database_url: str) -> dict[str, object]:
    async with Database.connect(database_url) as database, receiving(options.slow) as receivers:
        return await measure(database, receivers, options.jobs, options.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slow", type=float, default=29)
    options = parser.parse_args()
    # ended by `timeout` it must not leave the steward behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running_servers() as servers:
        upgrade(servers.postgres_url)
        settings = steward_settings(servers.postgres_url, servers.broker_url, "/nowhere")
        steward = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "steward"], env={**os.environ, **settings}
        )
        try:
            time.sleep(3)
            figures = asyncio.run(run(options, servers.postgres_url))
            used = psutil.Process(steward.pid).cpu_times()
            figures["steward_cpu_seconds"] = round(used.user + used.system, 1)
        finally:
            steward.terminate()
            steward.wait(60)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
