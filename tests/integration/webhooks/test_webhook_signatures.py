"""What a receiver verifies: signatures, timestamps, secrets and their rotation."""

import asyncio
import time

import openai
import pytest
from openai import InvalidWebhookSignatureError
from standardwebhooks import WebhookVerificationError

from db import delivery_log
from db.database import Database
from tests.support.api import CHAT, Api
from tests.support.jobs import Bench
from tests.support.receivers import Received, Receiver
from tests.support.webhooks import endpoint, finish
from workers.steward.webhook_sender import Sender


async def test_what_was_tampered_with_does_not_verify(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender
) -> None:
    made = await endpoint(api, receiver.url())
    await api.submitted(CHAT)
    await finish(bench)
    (got,) = await receiver.got(1)
    got.verify(made["secret"])
    client = openai.OpenAI(api_key="unused")
    changed = got.body.replace(b"succeeded", b"succeedex", 1)
    older = {**got.headers, "webhook-timestamp": str(int(time.time()) - 301)}
    other = await endpoint(api, receiver.url("/other"))
    for body, headers, secret in (
        (changed, got.headers, made["secret"]),
        (got.body[:-1] + b" ", got.headers, made["secret"]),
        (got.body, older, made["secret"]),
        (got.body, {**got.headers, "webhook-id": "evt_0"}, made["secret"]),
        (got.body, got.headers, other["secret"]),
    ):
        with pytest.raises(WebhookVerificationError):
            Received(got.path, headers, body).verify(secret)
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body, headers, secret=secret)


async def test_timestamps_are_utc_wherever_the_steward_runs(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        made = await endpoint(api, receiver.url())
        await api.submitted(CHAT)
        await finish(bench)
        (got,) = await receiver.got(1)
    finally:
        monkeypatch.undo()
        time.tzset()
    got.verify(made["secret"])
    assert abs(int(got.headers["webhook-timestamp"]) - got.at) < 60


async def test_several_secrets_sign_during_a_rotation(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    made = await endpoint(api, receiver.url())
    path = f"/v1/webhooks/{made['id']}"
    rotated = (await api.client.post(f"{path}/rotate")).json()
    assert rotated["secret"].startswith("whsec_") and rotated["former"] == 1
    assert rotated["secret"] != made["secret"]
    await api.submitted(CHAT)
    await finish(bench)
    (got,) = await receiver.got(1)
    assert len(got.headers["webhook-signature"].split(" ")) == 2
    for secret in (made["secret"], rotated["secret"]):
        got.verify(secret)
    async with database.connection() as connection:  # a day later
        await connection.execute(
            "UPDATE webhook_secrets SET expires_at = now() WHERE expires_at IS NOT NULL"
        )
    await api.submitted(CHAT)
    await finish(bench)
    got = (await receiver.got(2))[1]
    got.verify(rotated["secret"])
    with pytest.raises(WebhookVerificationError):
        got.verify(made["secret"])
    for _ in range(7):
        last = (await api.client.post(f"{path}/rotate")).json()
    assert last["former"] == 4
    await delivery_log.prune_leftovers(database)
    assert await database.fetch_value("SELECT count(*) FROM webhook_secrets") == 5


async def test_a_secret_is_shown_once(api: Api, database: Database) -> None:
    made = await endpoint(api, "https://example.com/")
    assert made["secret"].startswith("whsec_")
    for path in ("/v1/webhooks", f"/v1/webhooks/{made['id']}"):
        assert "whsec_" not in (await api.client.get(path)).text
    assert (await api.client.get("/v1/webhooks/secret")).json()["created_at"] is None
    first = (await api.client.post("/v1/webhooks/secret", json={})).json()
    again = (await api.client.post("/v1/webhooks/secret", json={})).json()
    assert first["secret"].startswith("whsec_") and again["secret"] is None
    assert again["shown_at"] is not None
    rotated = (await api.client.post("/v1/webhooks/secret", json={"rotate": True})).json()
    assert rotated["secret"] not in (None, first["secret"])
    assert (await api.client.get("/v1/webhooks/secret")).json()["former"] == 1
    await asyncio.gather(
        *(api.client.post("/v1/webhooks/secret", json={"rotate": True}) for _ in range(5))
    )
    current = await database.fetch_value(
        "SELECT count(*) FROM webhook_secrets WHERE endpoint_id IS NULL AND expires_at IS NULL"
    )
    assert current == 1
