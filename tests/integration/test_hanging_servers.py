"""Servers that hang rather than refuse: everybody waits for a bounded time, and comes back."""

import asyncio
import logging
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from db import registry
from db.database import Database
from db.doorbell import Doorbell
from tests.support.api import BASE, CONTEXT, PROMPT, assert_problem, running_api
from tests.support.network import proxied
from tests.support.servers import ValkeyServer
from tests.support.waiting import eventually


async def test_the_api_answers_503_while_postgres_hangs_and_keeps_its_connections_few(
    database: Database, database_url: str
) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    with tempfile.TemporaryDirectory(prefix="lorry-w-") as folder:
        async with proxied(database_url, Path(folder)) as (proxy, url):
            with (
                patch("api.services.STATEMENT_SECONDS", 0.3),
                patch("db.database.CONNECT_SECONDS", 0.3),
            ):
                async with running_api(url) as api:
                    await api.submitted(PROMPT)
                    for _ in range(2):
                        proxy.hanging = True
                        answers = await asyncio.wait_for(
                            asyncio.gather(*(api.submit(PROMPT) for _ in range(20))), 20
                        )
                        for answer in answers:
                            assert_problem(answer, 503, "Postgres")
                            assert answer.headers["retry-after"]
                        proxy.hanging = False

                        async def back() -> bool:
                            return (await api.submit(PROMPT)).status_code == 202

                        await eventually(back, "the API is back")

                    async def few() -> bool:
                        connections: int = await database.fetch_value(
                            "SELECT count(*) FROM pg_stat_activity"
                            " WHERE datname = current_database()"
                        )
                        return connections <= 8 + 2  # the API's pool, and this test's

                    await eventually(few, "abandoned connections end")


async def test_a_full_disk_is_503(database: Database, database_url: str) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    async with database.connection() as connection:
        await connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'No space left on device' USING ERRCODE = '53100'; END $$;"
            "CREATE TRIGGER refuse BEFORE INSERT ON job_inputs EXECUTE FUNCTION refuse()"
        )
    async with running_api(database_url) as api:
        assert_problem(await api.submit(PROMPT), 503, "No space left")
        assert await database.fetch_value("SELECT count(*) FROM jobs") == 0


@pytest.fixture
def own_valkey(servers_folder: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(servers_folder / "hang") as server:
        yield server


async def test_a_broker_that_hangs_does_not_hold_up_later_rings(
    own_valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def said(action: str) -> bool:
        return any(getattr(record, "action", None) == action for record in caplog.records)

    with patch("db.doorbell.BROKER_SECONDS", 0.3):
        doorbell = Doorbell(own_valkey.url)
    assert own_valkey.process is not None
    try:
        doorbell.ring("base", 1)
        own_valkey.process.send_signal(signal.SIGSTOP)
        doorbell.ring("base", 2)

        async def lost() -> bool:
            doorbell.ring("base", 2)
            return said("doorbell_lost")

        await eventually(lost, "the ring is given up")
        own_valkey.process.send_signal(signal.SIGCONT)

        async def back() -> bool:
            doorbell.ring("base", 3)
            return said("doorbell_back")

        await eventually(back, "rings go out again")
    finally:
        own_valkey.process.send_signal(signal.SIGCONT)
        doorbell.close()
