"""The server as a process: its address, its limits on a real socket, its stop."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.server import bind, serve
from core.errors import UsageError
from core.settings import Settings
from db import registry
from db.database import Database
from tests.support.api import BASE, CHAT, CONTEXT, PROMPT, assert_problem, count
from tests.support.waiting import eventually

SERVE = """
import json, sys
from api.server import serve
from core.settings import Settings
serve(Settings(**json.loads(sys.argv[1])), host="127.0.0.1", port=0)
"""


class Server:
    """`serve` in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def server(database_url: str, **settings: Any) -> Iterator[Server]:
    chosen = {"database_url": database_url, "require_keys": False, **settings}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, json.dumps(chosen)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"API on (http://\S+)", line)
            if found:
                url = found[1]
                break
        else:
            raise AssertionError("the server said no address")
        yield Server(process, url)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
async def base(database: Database) -> str:
    await registry.declare_base(database, BASE, CONTEXT)
    return BASE


async def test_jobs_over_a_real_socket(base: str, database: Database, database_url: str) -> None:
    with server(database_url, max_body_bytes=10_000) as running:
        async with httpx2.AsyncClient(base_url=running.url, timeout=60) as client:
            response = await client.post("/v1/jobs", json=CHAT)
            assert response.status_code == 202
            assert "server" not in response.headers
            path = response.headers["location"]
            assert (await client.get(path)).json() == response.json()
            assert (await client.get("/readyz")).status_code == 200

            large = json.dumps({**PROMPT, "prompt": "x" * 2_000_000}).encode()
            assert_problem(await client.post("/v1/jobs", content=large), 413, "10000")

            async def pieces() -> Any:
                for start in range(0, len(large), 65_536):
                    yield large[start : start + 65_536]

            assert_problem(await client.post("/v1/jobs", content=pieces()), 413, "10000")
            assert (await client.get(path)).status_code == 200
        assert running.stop() == 0
    assert await count(database) == 1


async def test_sigterm_releases_long_polls_and_ends_well(
    base: str, database: Database, database_url: str
) -> None:
    async def polled() -> bool:
        looks: int = await database.fetch_value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE '%finished_at IS NOT NULL' AND pid <> pg_backend_pid()"
        )
        return looks > 0

    with server(database_url) as running:
        async with (
            httpx2.AsyncClient(base_url=running.url, timeout=60) as client,
            asyncio.timeout(25),
            asyncio.TaskGroup() as tasks,
        ):
            path = (await client.post("/v1/jobs", json=CHAT)).headers["location"]
            poll = tasks.create_task(client.get(f"{path}?wait=30"))
            await eventually(polled, "a look for the long poll")
            assert await asyncio.to_thread(running.stop) == 0
        assert poll.result().json()["state"] == "queued"


async def test_sigint_ends_as_an_interrupt(database_url: str) -> None:
    with server(database_url) as running:
        await eventually(lambda: is_healthy(running.url), "the server healthy")
        assert running.stop(signal.SIGINT) in (-signal.SIGINT, 130)


async def is_healthy(url: str) -> bool:
    async with httpx2.AsyncClient(timeout=60) as client:
        return (await client.get(f"{url}/healthz")).status_code == 200


def test_a_taken_port_is_told_before_anything_starts() -> None:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with taken, pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is taken.*--port"):
        serve(Settings(database_url="postgresql://nowhere/x"), host="127.0.0.1", port=port)


def test_an_address_of_another_machine_is_refused() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid", "a" * 300):
        with pytest.raises(UsageError, match="not an address of this machine"):
            serve(Settings(database_url="postgresql://nowhere/x"), host=host, port=0)


def test_without_a_database_url_nothing_starts() -> None:
    with pytest.raises(UsageError, match="LORRY_DATABASE_URL is not set"):
        serve(Settings(), host="127.0.0.1", port=0)


def test_without_keys_only_this_machine_may_ask() -> None:
    settings = Settings(database_url="postgresql://nowhere/x", require_keys=False)
    with pytest.raises(UsageError, match="without keys"):
        serve(settings, host="0.0.0.0", port=0)


def test_ipv6_is_bound_where_there_is_any() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    try:
        listener = bind("::1", 0)
    except UsageError:
        pytest.skip("no IPv6 loopback on this machine")
    with listener:
        assert listener.getsockname()[1] > 0
