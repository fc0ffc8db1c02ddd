"""Webhooks through real processes: API, worker, steward, and the command line on both ends."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from db.database import Database
from tests.support.batches import jsonl as as_jsonl
from tests.support.batches import line, openai_client, settled, submit
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench
from tests.support.listener import Listener
from tests.support.processes import environment, until
from tests.support.servers import in_thread

pytestmark = pytest.mark.processes


@pytest.fixture
def deployment(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    async def prepare() -> None:
        async with Database.connect(database_url) as database:
            await make_bench(database, tmp_path, 1)

    in_thread(prepare)
    with Deployment(
        tmp_path, database_url, broker_url, LORRY_WEBHOOK_ALLOW="127.0.0.0/8"
    ) as running:
        running.start_api()
        running.start_steward()
        running.start_worker(BASE)
        yield running


def lorry(deployment: Deployment, *arguments: str, code: int = 0) -> str:
    """What `lorry ARGUMENTS` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=environment(uuid4().hex, LORRY_URL=f"http://127.0.0.1:{deployment.port}"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def as_json(deployment: Deployment, *arguments: str) -> Any:
    return json.loads(lorry(deployment, *arguments, "--json"))


@pytest.mark.timeout(240)
def test_the_log_and_replays_through_api_and_command_line(deployment: Deployment) -> None:
    listener = Listener(deployment, "--port", "0")
    (registered,) = as_json(deployment, "webhooks", "list")
    assert registered["url"].startswith("http://127.0.0.1:")
    job_id = deployment.post(BASE, "Hello")
    (first,) = listener.got(1)
    assert first["verified"] and first["problem"] is None
    assert first["event"]["type"] == "job.succeeded"
    assert first["event"]["data"]["id"] == job_id

    until(lambda: as_json(deployment, "webhooks", "deliveries", "--state", "delivered"), 30, "log")

    # a receiver that nobody is at, until somebody is
    client = openai_client(deployment)
    batch = submit(
        client, as_jsonl([line("a", BASE)]), webhook_url=f"http://127.0.0.1:{_closed_port()}/"
    )
    settled(client, batch)
    events = listener.got(2)
    assert {e["event"]["type"] for e in events} == {"job.succeeded", "batch.completed"}

    def attempted() -> Any:
        found = as_json(deployment, "webhooks", "deliveries", "--subject", batch.id)
        dead = [d for d in found if d["url"]]
        return dead[0] if dead and dead[0]["attempts"] else None

    dead = until(attempted, 30, "the dead receiver in the log")
    assert dead["attempts"][0]["error"]["code"] == "connection"
    assert "connection failed" in lorry(deployment, "webhooks", "delivery", dead["id"])
    page = deployment.client.get("/v1/deliveries", params={"subject": batch.id}).json()
    assert {d["id"] for d in page["data"]} >= {dead["id"]}
    # its secret was made for it, and is shown once
    secret = lorry(deployment, "webhooks", "secret").strip()
    assert secret.startswith("whsec_")
    assert "is shown once" in lorry(deployment, "webhooks", "secret", code=1)
    port = dead["url"].rpartition(":")[2].strip("/")
    late = Listener(deployment, "--port", port, "--secret", secret)
    lorry(deployment, "webhooks", "replay", dead["id"])
    (told,) = late.got(1)
    assert told["verified"] and told["event"]["data"]["id"] == batch.id
    assert told["event"]["id"] == dead["event"]
    assert told["event"]["data"]["counts"] == {"total": 1, "completed": 1, "failed": 0}

    # all that failed since a time, through both
    _fail_all(deployment)
    answer = deployment.client.post("/v1/deliveries/replay", json={"since": time.time() - 600})
    assert answer.status_code == 202 and answer.json()["replayed"] == 3
    late.got(2)
    listener.got(4)
    _fail_all(deployment)
    said = lorry(deployment, "webhooks", "replay", "--since", "10m", "--webhook", registered["id"])
    assert said == "2 are sent once more\n"
    repeated = listener.got(6)
    assert all(event["verified"] for event in repeated)
    assert len({event["event"]["id"] for event in repeated}) == 2
    assert "status" in lorry(deployment, "webhooks", "test", registered["id"], "--json")
    tested = listener.got(7)[-1]
    assert tested["event"]["type"] == "webhook.test"

    wrong = Listener(deployment, "--port", "0", "--secret", "whsec_" + "A" * 44)
    made = as_json(deployment, "webhooks", "create", wrong.url, "--events", "job.failed")
    lorry(deployment, "webhooks", "test", made["id"])
    (refused,) = wrong.got(1)
    assert refused["verified"] is False and "No matching signature" in refused["problem"]
    new = lorry(deployment, "webhooks", "rotate", made["id"]).strip()
    assert new.startswith("whsec_") and new != made["secret"]
    assert "disabled" in lorry(deployment, "webhooks", "update", made["id"], "--disable")
    lorry(deployment, "webhooks", "delete", made["id"])
    assert listener.stop() == 130
    assert as_json(deployment, "webhooks", "list") == [], "it deletes what it had made"
    late.stop()
    wrong.stop()


def _closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _fail_all(deployment: Deployment) -> None:
    """As if every delivery had been given up a moment ago."""

    async def run() -> None:
        url = deployment.settings["LORRY_DATABASE_URL"]
        async with Database.connect(url, max_size=1) as database, database.connection() as c:
            await c.execute(
                "UPDATE deliveries SET state = 'failed', due_at = NULL, finished_at = now()"
                " WHERE type <> 'webhook.test'"
            )

    def quiet() -> bool:
        found = deployment.client.get("/v1/deliveries", params={"state": "pending"}).json()
        return not found["data"]

    until(quiet, 30, "everything to be delivered")
    in_thread(run)
