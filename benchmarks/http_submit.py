"""Single submissions over HTTP to a real `lorry api`: a part of benchmarks/queue.py."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx

from benchmarks import backlog
from benchmarks.servers import Servers
from benchmarks.stack import free_port, percentile, wait_ready

CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Answers:
    """What the clients saw.

    Args:
        seconds: of the whole run.
        latencies: seconds of each request.
    """

    seconds: float
    latencies: list[float]

    def figures(self) -> dict[str, float]:
        return {
            "requests": len(self.latencies),
            "clients": CLIENTS,
            "requests_s": round(len(self.latencies) / self.seconds),
            "p50_ms": round(1000 * percentile(self.latencies, 0.5), 2),
            "p99_ms": round(1000 * percentile(self.latencies, 0.99), 2),
        }


def measure(servers: Servers, store: Path, requests: int) -> dict[str, float]:
    """Requests per second and latencies, after a tenth of the requests to warm up."""
    with running_api(servers, store) as port:
        asyncio.run(post_all(port, requests // 10))
        return asyncio.run(post_all(port, requests)).figures()


@contextmanager
def running_api(servers: Servers, store: Path) -> Iterator[int]:
    """`lorry api` in a process of its own; yields its port."""
    port = free_port()
    environ = {
        **os.environ,
        "LORRY_DATABASE_URL": servers.postgres_url,
        "LORRY_BROKER_URL": servers.broker_url,
        "LORRY_STORE_URL": str(store),
        "LORRY_REQUIRE_KEYS": "false",
        "LORRY_LOG_LEVEL": "warning",
    }
    command = [sys.executable, "-m", "cli.main", "api", "--port", str(port)]
    process = subprocess.Popen(command, stdout=sys.stderr, env=environ)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_ready(process, client, 60)
        yield port
    finally:
        process.terminate()
        process.wait(60)


async def post_all(port: int, requests: int) -> Answers:
    """Post jobs over `CLIENTS` connections, each waiting for its answer before the next."""
    numbers = iter(range(requests))
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            started = time.perf_counter()
            writer.write(_request(number))
            await _answer(reader)
            latencies.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return Answers(time.perf_counter() - started, latencies)


def _request(number: int) -> bytes:
    """Written by hand: an HTTP library's time would be the larger part on two cores."""
    content = f'{{"model": "a{number % 8}", {backlog.body(number)[1:]}'.encode()
    head = (
        "POST /v1/jobs HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def _answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b" 202 " not in head.split(b"\r\n", 1)[0]:
        raise SystemExit(f"the API answered {head.decode()}")
    await reader.readexactly(int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]))
