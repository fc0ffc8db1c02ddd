"""A steward killed before and after every statement of sending: nothing lost, the same webhook-id.

A dry run names the statements; then one victim dies at each. What it leaves is sent by another
sender, once its leases have run out.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from core.settings import Settings
from core.webhook_events import EventType
from db import webhooks
from db.database import Database
from db.deliveries import owe
from db.tenants import DEFAULT_TENANT_ID
from tests.support.killable_steward import start_steward
from tests.support.killable_worker import Blow, Victim
from tests.support.receivers import Answer, Received, Receiver
from tests.support.servers import PostgresServer
from tests.support.waiting import eventually
from workers.steward.webhook_sender import Sender

pytestmark = pytest.mark.processes

SCENES = 3
#: Statements that must be among those found.
EXPECTED = {
    "sending.look: WITH RECURSIVE",
    "sending.claim: BEGIN",
    "sending.claim: WITH granted",
    "sending.claim > webhooks.ensure_default_secret: INSERT",
    "sending.claim: COMMIT",
    "sending.record: BEGIN",
    "sending.record: WITH result",
    "sending.record > sending._record_lines: DELETE",
    "sending.record > sending._record_lines: INSERT",
    "sending.record > sending._record_lines > sending._disable: UPDATE",
    "sending.record > sending._record_lines > sending._disable > deliveries.owe: WITH",
    "sending.record: COMMIT",
    "sending.release: UPDATE",
}
SETTINGS = Settings(webhook_allow="127.0.0.0/8", webhook_seconds=20)


class Scene:
    """A database and a receiver of its own, on which one round after another is played."""

    def __init__(
        self, database: Database, url: str, broker_url: str, receiver: Receiver, folder: Path
    ) -> None:
        self.database = database
        self.receiver = receiver
        self.folder = folder
        self.settings = {
            "LORRY_DATABASE_URL": url,
            "LORRY_BROKER_URL": broker_url,
            "LORRY_STORE_URL": str(folder),
            "LORRY_WEBHOOK_ALLOW": "127.0.0.0/8",
            "LORRY_WEBHOOK_SECONDS": "20",
            "LORRY_LOG_LEVEL": "warning",
        }
        self._alive = False
        self._hiccups: set[str] = set()
        receiver.decide = self._decide

    def _decide(self, got: Received) -> Answer:
        if got.path == "/gone":
            return Answer(410)
        if got.path == "/hiccup" and got.message_id not in self._hiccups:
            self._hiccups.add(got.message_id)
            return Answer(500)
        if got.path == "/slow" and self._alive:
            return Answer(seconds=600)
        return Answer()

    async def play(self, blow: Blow | None) -> Victim | None:
        """One round; None where the victim never came to the chosen statement."""
        owed = await self._owe()
        first = len(self.receiver.received)
        victim = Victim("", (), self.settings, self.folder / f"{uuid4().hex[:8]}.log", blow)
        self._alive = True
        process = start_steward(victim)
        terminated = False
        try:
            while process.is_alive():
                # a retry after 5 s comes at once; leases are longer
                await self._execute(
                    "UPDATE deliveries SET due_at = now() WHERE state = 'pending'"
                    " AND due_at BETWEEN now() + interval '2 s' AND now() + interval '8 s'"
                )
                slow = any(got.path == "/slow" for got in self.receiver.received[first:])
                if not terminated and slow and await self._left() == 1:
                    assert process.pid is not None
                    with suppress(ProcessLookupError):  # it has just died
                        os.kill(process.pid, signal.SIGTERM)
                    terminated = True
                await asyncio.sleep(0.02)
        finally:
            self._alive = False
            process.kill()
            process.join()
        died = process.exitcode == -signal.SIGKILL
        assert died or process.exitcode == 0, victim.log.read_text()
        if not died and blow is None:
            assert len(self.receiver.received) - first == len(owed) + 1 + 1, "each once; a hiccup"
        await self._take_up()
        await self._check(owed, first)
        return victim if died == (blow is not None) else None

    async def _owe(self) -> dict[UUID, str]:
        """Deliveries of every kind; returns them with what they must end as."""
        await self._execute("TRUNCATE deliveries, delivery_attempts, webhook_circuits")
        await self._execute("DELETE FROM webhook_secrets")
        await self._execute("DELETE FROM webhook_endpoints")
        listens = ["job.failed"]
        url = self.receiver.url
        await webhooks.create(self.database, DEFAULT_TENANT_ID, url("/gone"), listens, "")
        await webhooks.create(
            self.database, DEFAULT_TENANT_ID, url("/told"), ["webhook.disabled"], ""
        )
        async with self.database.transaction() as connection:
            for path in ("/ok", "/ok", "/hiccup", "/slow"):
                await owe(
                    connection,
                    DEFAULT_TENANT_ID,
                    EventType.JOB_SUCCEEDED,
                    f"job_{uuid4().hex}",
                    "succeeded",
                    url(path),
                )
            await owe(
                connection, DEFAULT_TENANT_ID, EventType.JOB_FAILED, f"job_{uuid4().hex}", "failed"
            )
            rows = await connection.fetch("SELECT id, url FROM deliveries")
        return {row["id"]: "failed" if row["url"] is None else "delivered" for row in rows}

    async def _left(self) -> int:
        found: int = await self.database.fetch_value(
            "SELECT count(*) FROM deliveries WHERE state = 'pending'"
        )
        return found

    async def _take_up(self) -> None:
        """What the dead one held is sent by another, once its leases have run out."""
        sender = Sender(self.database, SETTINGS)

        async def settled() -> bool:
            await self._execute("UPDATE webhook_circuits SET blocked_until = NULL")
            await self._execute(
                "UPDATE deliveries SET due_at = now() WHERE state = 'pending' AND due_at > now()"
            )
            await sender.act()
            return await self._left() == 0

        await eventually(settled, "everything to be sent", 30)
        await sender.close()

    async def _check(self, owed: dict[UUID, str], first: int) -> None:
        async with self.database.connection() as connection:
            rows = await connection.fetch("SELECT id, event_id, state, type FROM deliveries")
        states = {row["id"]: row["state"] for row in rows}
        assert {each: states.get(each) for each in owed} == owed
        assert len(rows) == len(owed) + 1, "the other endpoint is told once that one is disabled"
        bodies: dict[str, set[bytes]] = {}
        for got in self.receiver.received[first:]:
            bodies.setdefault(got.message_id, set()).add(got.body)
        assert set(bodies) == {f"evt_{row['event_id'].hex}" for row in rows}
        assert {len(each) for each in bodies.values()} == {1}, "a repeat is the same"

    async def _execute(self, statement: str) -> None:
        async with self.database.connection() as connection:
            await connection.execute(statement)


@pytest.fixture
async def scenes(
    postgres: PostgresServer, template: str, broker_url: str, tmp_path: Path
) -> AsyncIterator[list[Scene]]:
    async with AsyncExitStack() as stack:
        made = []
        for number in range(SCENES):
            name = f"w_{uuid4().hex[:12]}"
            postgres.create_database(name, template)
            stack.callback(postgres.drop_database, name)
            database = await stack.enter_async_context(Database.connect(postgres.url(name)))
            receiver = await stack.enter_async_context(Receiver.listening())
            folder = tmp_path / str(number)
            folder.mkdir()
            made.append(Scene(database, postgres.url(name), broker_url, receiver, folder))
        yield made


@pytest.mark.timeout(900)
async def test_a_steward_killed_at_any_statement_of_sending_loses_nothing(
    scenes: list[Scene], record_property: Callable[[str, object], None]
) -> None:
    dry = await scenes[0].play(None)
    assert dry is not None
    statements = [name for name in dry.statements() if name.startswith("sending.")]
    for expected in EXPECTED:
        assert any(name.startswith(expected) for name in statements), (expected, statements)
    blows = [Blow(name, after) for name in sorted(statements) for after in (False, True)]
    record_property("blows", len(blows))
    left, missed = list(blows), []

    async def play_on(scene: Scene) -> None:
        while left:
            blow = left.pop()
            try:
                for _ in range(3):  # what depends on timing may not come by at once
                    if await scene.play(blow):
                        break
                else:
                    missed.append(str(blow))
            except AssertionError as error:
                raise AssertionError(f"killed {blow}: {error}") from error

    async with asyncio.TaskGroup() as tasks:
        for scene in scenes:
            tasks.create_task(play_on(scene))
    assert missed == []
