"""A batch from its upload to its results, with an engine that does nothing.

    python -m benchmarks.batches [--lines 50000] [--adapters 20] [--line-bytes 0]

Real processes of API, steward and worker on real servers. Memory is the peak of the resident sets
while the batch goes through them (of a worker with its launcher), sampled every 20 ms. The raw
COPY is of as many rows, made before, into tables with nothing but a primary key.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from benchmarks import backlog, bulk
from benchmarks.servers import Servers, running_servers
from benchmarks.stack import free_port
from db.database import Database
from db.migrate import upgrade

MIB = 1024 * 1024
FLAGS = ("--engine", "simulated", "--sim-noop", "--max-num-seqs=4096", "--max-loras=32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--line-bytes", type=int, default=0, help="make lines so long, at least")
    options = parser.parse_args()
    with running_servers() as servers, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upgrade(servers.postgres_url)
        asyncio.run(_register(servers, folder, options.adapters))
        source = folder / "input.jsonl"
        write_input(source, options.lines, options.adapters, options.line_bytes)
        figures = {"lines": options.lines, "input_mib": round(source.stat().st_size / MIB, 1)}
        figures |= run(servers, folder, source, options.lines)
        figures |= asyncio.run(_raw_copy(servers, options.lines, options.adapters))
        print(json.dumps(figures), flush=True)


def write_input(path: Path, lines: int, adapters: int, line_bytes: int) -> None:
    """An input file whose lines go to the adapters in turn."""
    more = max(0, line_bytes - 330)
    with path.open("w") as file:
        for number in range(lines):
            body = {
                "model": f"a{number % adapters}",
                "messages": [
                    {"role": "system", "content": "You are a careful summariser."},
                    {"role": "user", "content": _prompt(number, more)},
                ],
                "max_tokens": 64,
                "temperature": 0,
            }
            line: dict[str, Any] = {"custom_id": f"request-{number}", "method": "POST"}
            line |= {"url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def _prompt(number: int, more: int) -> str:
    """Digits, which compress by half or so, as text does."""
    prompt = f"Summarise document {number} in one sentence."
    return prompt + (f" {random.Random(number).getrandbits(more * 4):x}"[:more] if more else "")


def run(servers: Servers, folder: Path, source: Path, lines: int) -> dict[str, Any]:
    """Take one batch through, and tell the seconds of each part."""
    port = free_port()
    figures: dict[str, Any] = {}
    with ExitStack() as stack:

        def start(*arguments: str) -> "subprocess.Popen[bytes]":
            return stack.enter_context(_process(servers, folder, lines, arguments))

        api = start("api", "--port", str(port))
        steward = start("steward")
        memory = stack.enter_context(Memory())
        memory.watch("api", api.pid)
        memory.watch("steward", steward.pid)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600))
        _wait(lambda: _answers(client), 60)
        figures |= memory.take("idle")
        began = time.perf_counter()
        with source.open("rb") as file:
            uploaded = client.post(
                "/v1/files", files={"file": ("in.jsonl", file)}, data={"purpose": "batch"}
            ).json()
        figures["upload_s"] = _since(began)
        body = {
            "input_file_id": uploaded["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        created = time.perf_counter()
        batch = client.post("/v1/batches", json=body).json()
        batch = _until(client, batch, lambda b: b["status"] != "validating")
        assert batch["status"] == "in_progress", batch["errors"]
        figures["create_to_in_progress_s"] = _since(created)
        figures["upload_to_in_progress_s"] = _since(began)
        figures["lines_s"] = round(lines / (time.perf_counter() - created))
        figures |= memory.take("until_in_progress")
        started = time.perf_counter()
        memory.watch("worker", start("worker", backlog.BASE, *FLAGS).pid)
        batch = _until(client, batch, lambda b: b["request_counts"]["completed"] == lines)
        figures["drain_with_worker_start_s"] = _since(started)
        figures |= memory.take("draining")
        ended = time.perf_counter()
        batch = _until(client, batch, lambda b: b["status"] == "completed")
        figures["results_s"] = _since(ended)
        ended = time.perf_counter()
        size = 0
        with client.stream("GET", f"/v1/files/{batch['output_file_id']}/content") as response:
            for piece in response.iter_bytes():
                size += len(piece)
        figures["download_s"] = _since(ended)
        figures["output_mib"] = round(size / MIB, 1)
        figures["whole_s"] = _since(began)
        figures |= memory.take("results")
    return figures


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _until(client: httpx.Client, batch: dict[str, Any], is_it: Any) -> dict[str, Any]:
    while not is_it(batch):
        time.sleep(0.05)
        batch = client.get(f"/v1/batches/{batch['id']}").json()
    return batch


def _answers(client: httpx.Client) -> bool:
    try:
        return bool(client.get("/readyz").status_code == 200)
    except httpx.HTTPError:
        return False


def _wait(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("not ready in time")
        time.sleep(0.05)


@contextmanager
def _process(
    servers: Servers, folder: Path, lines: int, arguments: Sequence[str]
) -> Iterator["subprocess.Popen[bytes]"]:
    settings = {
        "LORRY_DATABASE_URL": servers.postgres_url,
        "LORRY_BROKER_URL": servers.broker_url,
        "LORRY_STORE_URL": str(folder / "store"),
        "LORRY_CACHE_DIR": str(folder / "cache"),
        "LORRY_REQUIRE_KEYS": "false",
        "LORRY_MAX_BATCH_LINES": str(max(lines, 50_000)),
        "LORRY_MAX_FILE_BYTES": str(3_000_000_000),
    }
    command = [sys.executable, "-m", "cli.main", *arguments]
    process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


class Memory:
    """The peaks of processes' resident sets with their children's, in MiB."""

    def __init__(self) -> None:
        self._processes: dict[str, psutil.Process] = {}
        self._peaks: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Memory":  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def watch(self, name: str, pid: int) -> None:
        self._processes = {**self._processes, name: psutil.Process(pid)}

    def take(self, phase: str) -> dict[str, float]:
        """The peaks since the last phase."""
        peaks, self._peaks = self._peaks, {}
        return {f"{name}_mib_{phase}": round(peak, 1) for name, peak in peaks.items()}

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            for name, process in self._processes.items():
                with suppress(psutil.NoSuchProcess):
                    family = [process, *process.children(recursive=True)]
                    rss = sum(each.memory_info().rss for each in family) / MIB
                    self._peaks[name] = max(self._peaks.get(name, 0.0), rss)


async def _register(servers: Servers, folder: Path, adapters: int) -> None:
    async with Database.connect(servers.postgres_url, max_size=1) as database:
        await backlog.register(database, folder, adapters)


async def _raw_copy(servers: Servers, lines: int, adapters: int) -> dict[str, float]:
    """Seconds of a COPY of as many jobs and inputs."""
    async with (
        Database.connect(servers.postgres_url, max_size=1) as database,
        database.connection() as connection,
    ):
        targets = await backlog.targets(connection, adapters)
        for statement in bulk.BARE_TABLES:
            await connection.execute(statement)
        jobs = backlog.new_jobs(lines, targets)
        return {"raw_copy_s": round(await bulk.copy_raw(connection, jobs), 2)}


if __name__ == "__main__":
    main()
