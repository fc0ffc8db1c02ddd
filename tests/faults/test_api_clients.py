"""Clients that go away, dawdle or stay: the API keeps nothing of them, and answers the others."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from core.ids import IdPrefix, format_id
from db.database import Database
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench, submit
from tests.support.settled import assert_few_connections, assert_nothing_left
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

#: Descriptors that may come with normal service: the pool of 8, the doorbell's connection.
SPARE_DESCRIPTORS = 12
#: What repeated waves of clients may add to the process's memory once it has warmed up.
SPARE_BYTES = 24 * 1024 * 1024

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Api:
    """A running API, looked at from outside."""

    def __init__(self, deployment: Deployment, waited_for: str) -> None:
        self.deployment = deployment
        self.waited_for = waited_for
        self._process = psutil.Process(deployment.processes[0].popen.pid)

    async def connect(self, request: str) -> Stream:
        """A connection on which this much of a request was sent."""
        stream = await asyncio.open_connection("127.0.0.1", self.deployment.port)
        stream[1].write(request.encode())
        await stream[1].drain()
        return stream

    async def answers(self) -> None:
        """Somebody else is served meanwhile."""
        async with asyncio.timeout(20):
            reader, writer = await self.connect(request("GET", f"/v1/jobs/{self.waited_for}"))
            assert b" 200 " in await reader.readline()
            writer.close()

    @property
    def descriptors(self) -> int:
        return self._process.num_fds()

    @property
    def memory(self) -> int:
        found: int = self._process.memory_info().rss
        return found


def request(method: str, path: str, *headers: str) -> str:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: lorry", *headers, "", ""))


@pytest.fixture
async def api(
    database: Database, tmp_path: Path, database_url: str, broker_url: str
) -> AsyncIterator[Api]:
    """No worker runs: the one job stays queued, so that it can be waited for."""
    await make_bench(database, tmp_path, adapters=0)
    (job_id,) = await submit(database, BASE)
    with Deployment(tmp_path, database_url, broker_url, LORRY_KEEP_ALIVE_SECONDS="5") as deployment:
        deployment.start_api()
        found = Api(deployment, format_id(IdPrefix.JOB, job_id))
        await found.answers()
        yield found
        await assert_few_connections(deployment, database)
        await assert_nothing_left(deployment, database)


async def gone(stream: Stream, *, rudely: bool) -> None:
    """Close a connection; rudely, by a reset."""
    if rudely:
        sock = stream[1].get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream[1].close()


async def assert_no_leak(api: Api, wave: Callable[[], Awaitable[None]]) -> None:
    """Play the wave again and again: descriptors come back, memory stays where it was."""
    before = api.descriptors

    async def back() -> bool:
        return api.descriptors <= before + SPARE_DESCRIPTORS

    await wave()
    await eventually(back, "the descriptors of the first wave to be closed", 40)
    warm = api.memory
    for _ in range(3):
        await wave()
        await eventually(back, "the descriptors of a wave to be closed", 40)
        await api.answers()
    assert api.memory - warm < SPARE_BYTES


async def test_clients_that_leave_in_mid_upload_leave_nothing(api: Api) -> None:
    half = request("POST", "/v1/jobs", "Content-Type: application/json", "Content-Length: 200000")

    async def wave() -> None:
        streams = [await api.connect(half + '{"prompt": "' + "x" * 100_000) for _ in range(60)]
        await api.answers()
        for number, stream in enumerate(streams):
            await gone(stream, rudely=number % 2 == 0)

    await assert_no_leak(api, wave)
    log = api.deployment.processes[0].log()
    assert "Traceback" not in log, log


async def test_clients_that_leave_in_mid_wait_leave_nothing(api: Api) -> None:
    wait = request("GET", f"/v1/jobs/{api.waited_for}?wait=30")

    async def wave() -> None:
        streams = [await api.connect(wait) for _ in range(200)]
        await api.answers()
        for number, stream in enumerate(streams):
            await gone(stream, rudely=number % 2 == 0)

    await assert_no_leak(api, wave)


#: Whether the API's one poller, which asks every 20 ms while anybody waits, asked within a second.
POLLED = """
SELECT coalesce(max(query_start) > clock_timestamp() - interval '1 second', false)
FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'SELECT id FROM jobs WHERE id = ANY($1)%'
"""


async def test_nobody_is_waited_for_longer_than_it_asked(api: Api, database: Database) -> None:
    async def polled() -> bool:
        found: bool = await database.fetch_value(POLLED)
        return found

    async def quiet() -> bool:
        return not await polled()

    wait = request("GET", f"/v1/jobs/{api.waited_for}?wait=5")
    streams = [await api.connect(wait) for _ in range(20)]
    await eventually(polled, "the poller to ask for those who wait", 30)
    for stream in streams:
        await gone(stream, rudely=True)
    await eventually(quiet, "nobody to be polled for", 30)


async def test_slow_writers_and_readers_hold_nobody_up(api: Api) -> None:
    head = request("POST", "/v1/jobs", "Content-Type: application/json", "Content-Length: 20000")
    page = request("GET", "/openapi.json")

    async def wave() -> None:
        writers = [await api.connect("GET /v1/jobs HT") for _ in range(100)]
        writers += [await api.connect(head + '{"model"') for _ in range(100)]
        readers = [await api.connect(page * 3) for _ in range(100)]
        for _ in range(3):
            for stream in writers:
                stream[1].write(b" ")
            await api.answers()
        for stream in (*writers, *readers):
            await gone(stream, rudely=False)

    await assert_no_leak(api, wave)


async def test_a_thousand_connections_that_stay_are_served_and_let_go(api: Api) -> None:
    async def wave() -> None:
        streams: list[Stream] = []
        for _ in range(1000):
            streams.append(await api.connect(request("GET", "/healthz")))
            assert b" 200 " in await streams[-1][0].readline()
        await api.answers()
        for stream in streams:
            await gone(stream, rudely=False)

    await assert_no_leak(api, wave)


async def test_idle_connections_are_closed_by_the_api_itself(api: Api) -> None:
    stream = await api.connect(request("GET", "/healthz"))
    async with asyncio.timeout(30):
        assert b'"live"' in await stream[0].read()  # to the end, which the API must make
    stream[1].close()
