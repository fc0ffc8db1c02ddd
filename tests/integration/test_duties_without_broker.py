"""With the broker down every duty of the steward does its work: jobs flow by polling."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.ids import IdPrefix, parse_id
from core.settings import Settings
from core.webhook_events import EventType
from db import claims, workers
from db.database import Database
from db.deliveries import owe
from db.doorbell import Doorbell
from db.files import file_key
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.api import Api, running_api
from tests.support.batches import CHAT_URL, jsonl, line
from tests.support.cores import drain_core
from tests.support.jobs import BASE, Bench, make_bench, submit
from tests.support.receivers import Receiver
from tests.support.schedules import Timeline
from tests.support.settled import assert_one_result_each
from tests.support.stewards import running_steward
from tests.support.waiting import eventually
from workers.steward.duties import all_duties

Check = Callable[[], Awaitable[bool]]


class World:
    """Something for each duty to do, and whether it was done."""

    def __init__(self, bench: Bench, api: Api, store: Path, receiver: Receiver) -> None:
        self.bench = bench
        self.database = bench.database
        self.api = api
        self.store = store
        self.receiver = receiver
        #: by the duty's name
        self.done: dict[str, Check] = {}

    def expect(self, duty: str, statement: str, *arguments: object) -> None:
        """A duty's work is done once the statement says true."""

        async def look() -> bool:
            return bool(await self.database.fetch_value(statement, *arguments))

        self.done[duty] = look

    async def execute(self, statement: str, *arguments: object) -> None:
        async with self.database.connection() as connection:
            await connection.execute(statement, *arguments)

    async def prepare(self) -> None:
        await self._jobs()
        await self._old_things()
        await self._adapters()
        await self._batches()
        await self._schedules()
        await self._webhooks()

    async def _webhooks(self) -> None:
        async with self.database.transaction() as connection:
            url = self.receiver.url()
            await owe(connection, DEFAULT_TENANT_ID, EventType.JOB_FAILED, "told", "failed", url)
        self.expect("webhooks", "SELECT state = 'delivered' FROM deliveries WHERE subject = 'told'")

    async def _jobs(self) -> None:
        lost = await submit(self.database, "a0", 3)
        facts = WorkerFacts(self.bench.base_model_id, "x", 1, "simulated", "1", {})
        worker = await workers.register(self.database, facts, 60)
        version = "SELECT adapter_version_id FROM jobs WHERE id = $1"
        line_of = Line(
            self.bench.base_model_id,
            await self.database.fetch_value(version, lost[0]),
            DEFAULT_TENANT_ID,
        )
        assert len(await claims.claim(self.database, worker, line_of, 3)) == 3
        await self.execute("UPDATE workers SET lease_expires_at = now() - interval '1 s'")
        self.expect("rescue", "SELECT lost_at IS NOT NULL FROM workers WHERE id = $1", worker)
        unlisted = await submit(self.database, BASE, 3)
        late = await submit(self.database, BASE, 1)
        await self.execute("UPDATE jobs SET deadline = now() WHERE id = ANY($1)", late)
        await self.execute("DELETE FROM waiting_adapters")
        final = "SELECT bool_and(state = $2) FROM jobs WHERE id = ANY($1)"
        self.expect("expire", final, late, "expired")
        self.expect("rebuild", final, unlisted, "succeeded")
        # what a ring is for: every job comes to its end though nobody hears one
        self.expect("ring", final, [*lost, *unlisted], "succeeded")

    async def _old_things(self) -> None:
        (old,) = await submit(self.database, BASE, 1)
        await self.execute(
            "UPDATE jobs SET state = 'cancelled', finished_at = now() - interval '99 days'"
            " WHERE id = $1",
            old,
        )
        self.expect("prune", "SELECT NOT EXISTS (SELECT FROM jobs WHERE id = $1)", old)
        await self.execute(
            "INSERT INTO idempotency_keys (tenant_id, route, key, fingerprint, resource_id,"
            " created_at) VALUES (1, 'r', 'old', '', $1, now() - interval '25 hours')",
            old,
        )
        self.expect(
            "idempotency", "SELECT NOT EXISTS (SELECT FROM idempotency_keys WHERE key = 'old')"
        )
        await self.execute(
            "INSERT INTO usage_entries (day, tenant_id, base_model_id, adapter_version_id, jobs,"
            " input_tokens, output_tokens) VALUES ('2026-01-01', 1, $1, 0, 1, 2, 3)",
            self.bench.base_model_id,
        )
        self.expect("usage", "SELECT EXISTS (SELECT FROM usage_days WHERE day = '2026-01-01')")

    async def _adapters(self) -> None:
        refused = await submit(self.database, "a1", 2)
        await self.execute(
            "UPDATE adapter_versions SET state = 'rejected', findings = $2::text::json"
            " WHERE id = (SELECT adapter_version_id FROM jobs WHERE id = $1)",
            refused[0],
            '[{"code": "no_effect", "message": "it changes nothing"}]',
        )
        failed = "SELECT bool_and(state = 'failed') FROM jobs WHERE id = ANY($1)"
        self.expect("rejected", failed, refused)
        sha256 = await self.database.fetch_value(
            "UPDATE adapter_versions v SET retired_at = now() - interval '1 year'"
            " FROM adapters a WHERE a.id = v.adapter_id AND a.name = 'a2' RETURNING v.sha256"
        )
        files = self.store / "adapters" / sha256
        assert files.is_dir()

        async def forgotten() -> bool:
            return not any(files.glob("*"))

        self.done["adapter files"] = forgotten

    async def _batches(self) -> None:
        small = [line(f"r{n}", "a0") for n in range(3)]
        file = (await self._upload(jsonl(small)))["id"]
        ran, small_one, cancelled = [await self._create(file) for _ in range(3)]
        answer = await self.api.client.post(f"/v1/batches/{cancelled}/cancel")
        assert answer.json()["status"] == "cancelling"
        self._expect_batch("batch validation", ran, "completed")
        self._expect_batch("small batches", small_one, "completed")
        self._expect_batch("batch results", ran, "completed")
        self._expect_batch("small results", small_one, "completed")
        self._expect_batch("batch cancel", cancelled, "cancelled")
        file_id = parse_id(IdPrefix.FILE, (await self._upload(jsonl(small)))["id"])
        assert file_id is not None
        await self.execute("UPDATE files SET expires_at = now() WHERE id = $1", file_id)
        content = self.store / file_key(file_id)
        assert content.is_file()

        async def swept() -> bool:
            return not content.exists()

        self.done["files"] = swept

    async def _upload(self, content: bytes) -> dict[str, Any]:
        response = await self.api.client.post(
            "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}
        )
        found: dict[str, Any] = response.json()
        return found

    async def _create(self, file_id: str) -> str:
        body = {"input_file_id": file_id, "endpoint": CHAT_URL, "completion_window": "24h"}
        found: str = (await self.api.client.post("/v1/batches", json=body)).json()["id"]
        return found

    def _expect_batch(self, duty: str, batch_id: str, status: str) -> None:
        async def look() -> bool:
            found = (await self.api.client.get(f"/v1/batches/{batch_id}")).json()
            return bool(found["status"] == status)

        self.done[duty] = look

    async def _schedules(self) -> None:
        timeline = Timeline(self.database, datetime.now(UTC))
        schedule = await timeline.create(every_seconds=1)
        runs = "SELECT EXISTS (SELECT FROM schedule_runs WHERE schedule_id = $1 AND {})"
        self.expect("schedules", runs.format("batch_id IS NOT NULL"), schedule)
        # its file has no bytes: the batch fails, and so does the run
        self.expect("schedule runs", runs.format("finished_at IS NOT NULL"), schedule)
        await self.execute(
            "INSERT INTO schedule_runs (id, schedule_id, tenant_id, fire_at, due_at, state, reason,"
            " finished_at) SELECT uuidv7(), $1, 1, t, t, 'skipped', 'missed', t"
            " FROM (SELECT now() - interval '99 days' AS t) old",
            schedule,
        )
        old = "NOT EXISTS (SELECT FROM schedule_runs WHERE fire_at < now() - interval '90 days')"
        self.expect("old schedule runs", f"SELECT {old}")


@pytest.fixture
async def world(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    bench = await make_bench(database, tmp_path, adapters=3)
    store = tmp_path / "store"
    async with (
        running_api(database_url, store_url=str(store)) as api,
        Receiver.listening() as receiver,
    ):
        made = World(bench, api, store, receiver)
        await made.prepare()
        yield made


async def test_every_duty_works_with_the_broker_down(world: World, tmp_path: Path) -> None:
    nowhere = f"redis+socket://{tmp_path}/nothing.sock"
    settings = Settings(
        lease_seconds=1,
        sweep_seconds=0.2,
        poll_seconds=0.05,
        store_url=str(world.store),
        webhook_allow="127.0.0.0/8",
    )
    doorbell = Doorbell(nowhere)
    duties = {duty.name for duty in all_duties(world.database, doorbell, settings)}
    doorbell.close()
    assert duties == set(world.done), "a duty has no work here, or a work no duty"
    patient = settings.model_copy(update={"lease_seconds": 30})
    async with (
        running_steward(world.database, nowhere, settings),
        drain_core(world.bench, tmp_path / "cache", nowhere, settings=patient),
    ):
        for duty, done in world.done.items():
            await eventually(done, f"the work of {duty!r}", 60)
    await assert_one_result_each(world.database)
