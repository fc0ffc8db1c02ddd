"""How late runs start: many schedules, a hundred of them due at the same moment of every second.

    python -m benchmarks.schedules [--schedules 10000] [--each-second 100] [--seconds 120]
                                   [--stewards 1] [--no-validation]

Real `lorry steward` processes with all their duties on a real PostgreSQL; every run makes a batch
of one request over one stored file, which the same stewards then validate into jobs. Lateness is
from the moment that a run is due to the write that starts it, by Postgres's clock. With
`--no-validation` the batches are left alone, as where other stewards have the time for them.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.servers import Servers, running_servers
from core.ids import new_id
from db import registry
from db.blobs import Blobs
from db.database import Database
from db.files import file_key
from db.migrate import upgrade

BASE = "sim-base"
LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": BASE, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 8},
}
#: Each fires every so many seconds that the wanted number is due at the start of each second.
FILL = """
INSERT INTO schedules (id, tenant_id, name, every_seconds, timezone, anchor_at, dst_gap, dst_fold,
                       input_file_id, endpoint, model, completion_window, window_seconds,
                       skip_invalid, missed, catch_up_seconds, overlap, pause_after_failures,
                       jitter_seconds, enabled, next_fire_at)
SELECT uuidv7(), 1, 's' || n, $3, 'Europe/Berlin', first, 'after', 'first', $1,
       '/v1/chat/completions', $4, '24h', 86400, false, 'latest', 604800, 'allow', 10, 0, true,
       first
FROM generate_series(0, $2::int - 1) n,
     LATERAL (SELECT date_trunc('second', now()) + make_interval(secs => 20 + n % $3)) f(first)
"""
LATENESS = """
SELECT count(*) AS runs,
       (percentile_cont(0.5) WITHIN GROUP (ORDER BY late))::float8 AS p50,
       (percentile_cont(0.99) WITHIN GROUP (ORDER BY late))::float8 AS p99, max(late) AS most
FROM (SELECT extract(epoch FROM started_at - due_at)::float8 AS late FROM schedule_runs
      WHERE state IN ('started', 'finished')) runs
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--each-second", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--stewards", type=int, default=1)
    parser.add_argument("--no-validation", action="store_true")
    options = parser.parse_args()
    with running_servers() as servers, tempfile.TemporaryDirectory() as name:
        upgrade(servers.postgres_url)
        print(json.dumps(asyncio.run(measure(servers, Path(name), options))), flush=True)


async def measure(servers: Servers, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Let the stewards run for a while; returns the figures."""
    every = options.schedules // options.each_second
    async with Database.connect(servers.postgres_url) as database:
        await registry.declare_base(database, BASE, 4096)
        file_id = new_id()
        with Blobs.open(str(folder / "store")).write(file_key(file_id)) as file:
            file.write(json.dumps(LINE).encode() + b"\n")
        async with database.connection() as connection:
            if options.no_validation:
                await connection.execute(_HIDE)
            await connection.execute(
                "INSERT INTO files (id, tenant_id, purpose, filename, state, size_bytes, newlines)"
                " VALUES ($1, 1, 'batch', 'in.jsonl', 'ready', 200, 1)",
                file_id,
            )
            await connection.execute(FILL, file_id, options.schedules, every, BASE)
            await connection.execute("VACUUM ANALYZE")
        with ExitStack() as stack:
            pids = [_steward(servers, folder, stack) for _ in range(options.stewards)]
            await asyncio.sleep(20 + options.seconds)
            spent = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)
        async with database.connection() as connection:
            row = await connection.fetchrow(LATENESS)
            made = await connection.fetchval("SELECT count(*) FROM batches")
            skipped = await connection.fetchval(
                "SELECT count(*) FROM schedule_runs WHERE state IN ('skipped', 'failed')"
            )
            behind = await connection.fetchval(
                "SELECT count(*) FROM batches WHERE status = 'validating'"
            )
    assert row is not None
    assert made == row["runs"]
    return {
        "schedules": options.schedules,
        "stewards": options.stewards,
        "runs": row["runs"],
        "runs_per_second": round(row["runs"] / options.seconds, 1),
        "skipped_or_failed": skipped,
        "not_validated_yet": behind,
        "p50_ms": round(1000 * row["p50"]),
        "p99_ms": round(1000 * row["p99"]),
        "most_ms": round(1000 * row["most"]),
        "steward_cpu_ms_per_run": round(1000 * spent / row["runs"], 2),
        "load": os.getloadavg()[0],
    }


#: Batches look held by another steward.
_HIDE = """
ALTER TABLE batches ALTER COLUMN lease_expires_at SET DEFAULT now() + interval '1 day'
"""


def _steward(servers: Servers, folder: Path, stack: ExitStack) -> int:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("LORRY_")}
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "cli.main", "steward"],
            env={
                **environment,
                "LORRY_DATABASE_URL": servers.postgres_url,
                "LORRY_BROKER_URL": servers.broker_url,
                "LORRY_STORE_URL": str(folder / "store"),
                "LORRY_LOG_LEVEL": "warning",
            },
        )
    )
    stack.callback(process.terminate)
    time.sleep(0.1)
    return process.pid


if __name__ == "__main__":
    main()
