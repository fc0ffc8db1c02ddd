"""Whether pruning slows claims: the same claims with and without it, in turns, in one run.

    python -m benchmarks.pruning [--jobs 400000] [--finished 400000] [--turns 12] [--claims 60]

One database with queued jobs over 100 adapters and as many finished ones past their time. Turns
alternate: in every other one a steward's pruning runs beside the claims, as the duty does it.
Every claim takes 256 jobs of one line and is not given back. Prints both medians and their ratio.
"""

import argparse
import asyncio
import json
import statistics
import time

from benchmarks import scale
from benchmarks.servers import Servers, running_servers
from db import claims
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from workers.steward.duties import prune_jobs

ADAPTERS = 100
CLAIM = 256
DAY = 86_400.0

FINISHED = """
WITH job AS (
    INSERT INTO jobs (id, tenant_id, base_model_id, adapter_version_id, place, tokens, attempt,
                      state, finished_at)
    SELECT uuidv7(), $1, $2, 1 + n % 100, n, 32, 1, 'succeeded',
           now() - interval '40 days' - make_interval(secs => n)
    FROM generate_series(1, $3::int) n
    RETURNING id, tenant_id
), input AS (
    INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body)
    SELECT id, tenant_id, 'completion', 'a', json_build_object('prompt', repeat('word ', 100))
    FROM job
)
INSERT INTO job_outputs (tenant_id, job_id, response)
SELECT tenant_id, id, json_build_object('text', repeat('word ', 100)) FROM job
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=400_000)
    parser.add_argument("--finished", type=int, default=400_000)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--claims", type=int, default=60)
    options = parser.parse_args()
    with running_servers(scale.FLAGS) as servers:
        asyncio.run(compare(servers, options))


async def compare(servers: Servers, options: argparse.Namespace) -> None:
    """Fill, measure in turns, print."""
    backlog = await scale.fill(servers, "pruning", options.jobs, ADAPTERS)
    async with Database.connect(servers.url("pruning")) as pruner:
        async with pruner.connection() as connection:
            facts = (DEFAULT_TENANT_ID, backlog.base_model_id, options.finished)
            await connection.execute(FINISHED, *facts, timeout=3600)
            await connection.execute("VACUUM ANALYZE", timeout=3600)
            await connection.execute("CHECKPOINT", timeout=3600)
        await measure(backlog, 10)
        alone: list[float] = []
        beside: list[float] = []
        pruned, seconds = 0, 0.0
        for turn in range(options.turns):
            if turn % 2 == 0:
                alone += await measure(backlog, options.claims)
                continue
            before = await left(pruner)
            started = time.monotonic()
            pruning = asyncio.create_task(prune_jobs(pruner, 30 * DAY))
            beside += await measure(backlog, options.claims)
            seconds += time.monotonic() - started
            pruning.cancel()
            await asyncio.gather(pruning, return_exceptions=True)
            pruned += before - await left(pruner)
    show("without pruning", alone)
    show("with pruning", beside, pruned_per_second=round(pruned / seconds))
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"claim of {CLAIM}, with / without pruning: {ratio:.2f}")
    await backlog.database.close()


async def left(database: Database) -> int:
    count: int = await database.fetch_value("SELECT count(*) FROM jobs WHERE state = 'succeeded'")
    return count


async def measure(backlog: scale.Backlog, count: int) -> list[float]:
    """Milliseconds of each claim, the lines taken in turn."""
    found = []
    for _ in range(count):
        adapter = backlog.adapters.pop(0)
        backlog.adapters.append(adapter)
        line = Line(backlog.base_model_id, adapter, DEFAULT_TENANT_ID)
        started = time.perf_counter()
        jobs = await claims.claim(backlog.database, backlog.worker_id, line, CLAIM)
        found.append(1000 * (time.perf_counter() - started))
        assert len(jobs) == CLAIM, "give more --jobs"
    return found


def show(name: str, figures: list[float], **more: int) -> None:
    """One JSON line."""
    p90 = statistics.quantiles(figures, n=10)[-1]
    print(
        json.dumps(
            {
                "name": name,
                "claims": len(figures),
                "p50_ms": round(statistics.median(figures), 2),
                "p90_ms": round(p90, 2),
                **more,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
