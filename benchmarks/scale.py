"""Whether claims and looks slow down as the backlog grows: 100,000 jobs beside 10 million.

    python -m benchmarks.scale [--jobs 10000000] [--adapters 10000] [--repeat 90]
                               [--together 1] [--shared-buffers 128MB]    (else as `lorry up`)

Two databases on one server, the small backlog always 100,000 jobs over 100 adapters. So many jobs
of one adapter stand together on disk: 1 is the worst case, where each job of a claim is on pages of
its own; a file of a batch stands together. Both are measured in turn; every claim takes 256 jobs
from another adapter's line and is not given back. Needs about 10 GB of disk and some minutes to
fill. Prints the medians and the two ratios.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

from benchmarks.backlog import BASE, CONTEXT
from benchmarks.servers import Servers, running_servers
from db import claims, registry, workers
from db.database import Database
from db.migrate import upgrade
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts

SMALL_JOBS, SMALL_ADAPTERS = 100_000, 100
CLAIM = 256
CHUNK = 500_000
LEASE_SECONDS = 3600.0
#: Filling writes gigabytes: keep its checkpoints out of the measurement.
FLAGS = ("-c", "max_wal_size=16GB", "-c", "checkpoint_timeout=1h")

FILL = """
WITH job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, place, tokens)
    SELECT uuidv7(), $1, $2, 1 + n / $6::int % $3, 1700000000000 + n, 32
    FROM generate_series($4::bigint, $5::bigint) n
    RETURNING id, tenant_id
)
INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body)
SELECT id, tenant_id, 'completion', 'a',
       '{"prompt": "Summarise this document in one sentence, please.", "max_tokens": 16}'
FROM job
"""
LINES = """
INSERT INTO waiting_adapters (base_model_id, adapter_version_id, tenant_id, partition, since)
SELECT $2, version, $1, version % 32, now() - make_interval(secs => version / 100.0)
FROM generate_series(1, $3::int) version
"""


@dataclass(slots=True)
class Backlog:
    """A filled database and what was measured on it, in milliseconds."""

    database: Database
    base_model_id: int
    worker_id: int
    adapters: list[int]
    claims: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)

    async def measure(self) -> None:
        """One claim from a line not claimed before, and one look."""
        adapter = self.adapters.pop()
        started = time.perf_counter()
        jobs = await claims.claim(
            self.database,
            self.worker_id,
            Line(self.base_model_id, adapter, DEFAULT_TENANT_ID),
            CLAIM,
        )
        self.claims.append(1000 * (time.perf_counter() - started))
        assert len(jobs) == CLAIM
        started = time.perf_counter()
        lines = await claims.look(self.database, self.base_model_id, resident=self.adapters[:8])
        self.looks.append(1000 * (time.perf_counter() - started))
        assert len(lines) >= min(64, len(self.adapters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000_000)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=90)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--shared-buffers", help="as `lorry up` has it; Postgres's own: 128MB")
    options = parser.parse_args()
    given = options.shared_buffers
    buffers = () if given is None else ("-c", f"shared_buffers={given}")
    with running_servers((*FLAGS, *buffers)) as servers:
        sizes = (options.jobs, options.adapters)
        asyncio.run(compare(servers, *sizes, options.together, options.repeat))


async def compare(servers: Servers, jobs: int, adapters: int, together: int, repeat: int) -> None:
    """Fill both, measure in turn, print."""
    small = await fill(servers, "small", SMALL_JOBS, SMALL_ADAPTERS, together)
    large = await fill(servers, "large", jobs, adapters, together)
    for number in range(repeat + 5):
        for backlog in (small, large) if number % 2 else (large, small):
            await backlog.measure()
    for name, size, backlog in (("small", SMALL_JOBS, small), ("large", jobs, large)):
        figures = {"claim_ms": backlog.claims[5:], "look_ms": backlog.looks[5:]}
        medians = {what: round(statistics.median(all_), 2) for what, all_ in figures.items()}
        print(json.dumps({"name": name, "jobs": size, "repeat": repeat, **medians}))
        await backlog.database.close()
    print(f"claim of {CLAIM}, large / small: {_ratio(large.claims, small.claims):.2f}")
    print(f"look, large / small: {_ratio(large.looks, small.looks):.2f}")


def _ratio(large: list[float], small: list[float]) -> float:
    return statistics.median(large[5:]) / statistics.median(small[5:])


async def fill(servers: Servers, name: str, jobs: int, adapters: int, together: int = 1) -> Backlog:
    """A migrated database of this name with a backlog in it."""
    await asyncio.to_thread(servers.execute, f"CREATE DATABASE {name}")
    await asyncio.to_thread(upgrade, servers.url(name))
    database = await Database.open(servers.url(name), max_size=1)
    base_model_id = await registry.declare_base(database, BASE, CONTEXT, "bench")
    started = time.monotonic()
    async with database.connection() as connection:
        for first in range(0, jobs, CHUNK):
            last = min(jobs, first + CHUNK) - 1
            arguments = (DEFAULT_TENANT_ID, base_model_id, adapters, first, last, together)
            await connection.execute(FILL, *arguments, timeout=3600)
        await connection.execute(LINES, DEFAULT_TENANT_ID, base_model_id, adapters)
        await connection.execute("VACUUM ANALYZE", timeout=3600)
        await connection.execute("CHECKPOINT", timeout=3600)
    print(json.dumps({"filled": name, "seconds": round(time.monotonic() - started)}), flush=True)
    facts = WorkerFacts(base_model_id, "bench", 1, "simulated", "1", {})
    worker_id = await workers.register(database, facts, LEASE_SECONDS)
    order = random.Random(1).sample(range(1, adapters + 1), adapters)
    return Backlog(database, base_model_id, worker_id, order)


if __name__ == "__main__":
    main()
