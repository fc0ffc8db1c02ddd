"""Idle pickup, POST to engine, through a real `lorry up`: a part of benchmarks/queue.py.

The clocks are one machine's. A job's `started_at` is when its claim began in Postgres, its
`finished_at` when its record did: the engine has it between the two. The simulated engine takes
1 ms for the one token asked of it.
"""

import asyncio
import time

import asyncpg

from benchmarks.servers import Servers
from benchmarks.stack import percentile, running_stack
from core.ids import IdPrefix, parse_id

PAUSE_SECONDS = 0.05


def measure(servers: Servers, jobs: int) -> dict[str, float]:
    """Post jobs one by one, each to an idle stack; percentiles of how soon it was run."""
    environ = {
        "LORRY_DATABASE_URL": servers.url("pickup"),
        "LORRY_BROKER_URL": servers.broker_url,
        "LORRY_LOG_LEVEL": "warning",
    }
    servers.execute("CREATE DATABASE pickup")
    posted: dict[str, float] = {}
    with running_stack(["--engine", "simulated"], ready_seconds=120, environ=environ) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for number in range(jobs + 10):
            body = {"model": model, "prompt": f"job {number}", "max_tokens": 1}
            at = time.time()
            job = client.post("/v1/jobs", json=body).raise_for_status().json()
            if number >= 10:  # the first ones warm the connections up
                posted[job["id"]] = at
            client.get(f"/v1/jobs/{job['id']}", params={"wait": 30}).raise_for_status()
            time.sleep(PAUSE_SECONDS)
    return asyncio.run(_figures(servers.url("pickup"), posted))


async def _figures(url: str, posted: dict[str, float]) -> dict[str, float]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT id, extract(epoch FROM started_at)::float8 AS started,"
            " extract(epoch FROM finished_at)::float8 AS finished FROM jobs"
        )
    finally:
        await connection.close()
    at = {parse_id(IdPrefix.JOB, job_id): seconds for job_id, seconds in posted.items()}
    found = [(at[row["id"]], row["started"], row["finished"]) for row in rows if row["id"] in at]
    claimed = [1000 * (started - begun) for begun, started, _ in found]
    finished = [1000 * (ended - begun) for begun, _, ended in found]
    return {
        "jobs": len(found),
        "post_to_claim_p50_ms": round(percentile(claimed, 0.5), 1),
        "post_to_claim_p99_ms": round(percentile(claimed, 0.99), 1),
        "post_to_record_p50_ms": round(percentile(finished, 0.5), 1),
        "post_to_record_p99_ms": round(percentile(finished, 0.99), 1),
    }
