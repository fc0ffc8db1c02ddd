"""What becomes of deliveries that fail: waits, Retry-After, endpoints disabled, giving up."""

import time

import pytest

from db.database import Database
from tests.support.api import CHAT, Api
from tests.support.jobs import Bench
from tests.support.receivers import Answer, Receiver
from tests.support.waiting import eventually
from tests.support.webhooks import deliveries, endpoint, finish, make_due, next_wait, until_state
from workers.steward.webhook_sender import Sender


async def test_failures_are_tried_again_on_schedule_and_logged(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    made = await endpoint(api, receiver.url())
    receiver.answer = Answer(500, b"x" * 5000)
    await api.submitted(CHAT)
    await finish(bench)
    for attempt, delay in enumerate(
        (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400), start=1
    ):
        await receiver.got(attempt)
        wait = await next_wait(database, attempt)
        assert delay * 0.8 - 2 <= wait <= delay * 1.2 + 2, (attempt, wait)
        await make_due(database)
    await receiver.got(10)
    (delivery,) = await until_state(api, "failed")
    assert [a["attempt"] for a in delivery["attempts"]] == list(range(1, 11))
    assert {a["status"] for a in delivery["attempts"]} == {500}
    assert {len(a["response"]) for a in delivery["attempts"]} == {2048}
    assert delivery["next_attempt_at"] is None
    assert len({got.message_id for got in receiver.received}) == 1
    assert len({got.body for got in receiver.received}) == 1
    receiver.answer = Answer()
    replayed = await api.client.post(f"/v1/deliveries/{delivery['id']}/replay")
    assert replayed.status_code == 202
    got = (await receiver.got(11))[-1]
    assert got.message_id == receiver.received[0].message_id
    got.verify(made["secret"])
    (delivery,) = await until_state(api, "delivered")
    assert len(delivery["attempts"]) == 11


@pytest.mark.parametrize(
    ("header", "least", "most"), [("120", 119, 121), ("1", 3, 7), ("999999", 3599, 3601)]
)
async def test_retry_after_is_honoured_within_bounds(
    api: Api,
    bench: Bench,
    receiver: Receiver,
    sender: Sender,
    database: Database,
    header: str,
    least: float,
    most: float,
) -> None:
    await endpoint(api, receiver.url())
    receiver.answer = Answer(429, headers={"retry-after": header})
    await api.submitted(CHAT)
    await finish(bench)
    await receiver.got(1)
    assert least - 2 <= await next_wait(database, 1) <= most
    blocked = await database.fetch_value(
        "SELECT extract(epoch FROM blocked_until - now())::float8 FROM webhook_circuits"
    )
    assert blocked <= 300


async def test_a_receiver_that_is_gone_is_disabled_and_the_others_are_told(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender
) -> None:
    made = await endpoint(api, receiver.url("/gone"))
    await endpoint(api, receiver.url("/watch"), ["webhook.disabled"])
    receiver.decide = lambda got: Answer(410 if got.path == "/gone" else 200)
    await api.submitted(CHAT)
    await finish(bench)
    got = (await receiver.got(2))[1]
    assert got.path == "/watch" and got.event["type"] == "webhook.disabled"
    assert got.event["data"]["id"] == made["id"]
    shown = (await api.client.get(f"/v1/webhooks/{made['id']}")).json()
    assert shown["disabled_reason"] == "gone"
    (delivery,) = await until_state(api, "failed")
    assert delivery["attempts"][0]["status"] == 410
    await api.submitted(CHAT)
    await finish(bench)
    assert len(await deliveries(api)) == 2, "nothing is owed to it any more"


async def test_five_days_of_nothing_but_failures_disable(
    api: Api,
    bench: Bench,
    receiver: Receiver,
    sender: Sender,
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = await endpoint(api, receiver.url())
    receiver.answer = Answer(503)
    await api.submitted(CHAT)
    await finish(bench)
    await next_wait(database, 1)
    for days, reason in ((4.9, None), (5.1, "failing")):
        async with database.connection() as connection:
            await connection.execute(
                "UPDATE webhook_circuits SET failing_since = now() - make_interval(secs => $1)",
                days * 86_400,
            )
        await make_due(database)
        await next_wait(database, 2 if reason is None else 3)
        shown = (await api.client.get(f"/v1/webhooks/{made['id']}")).json()
        assert shown["disabled_reason"] == reason
    assert "Webhook disabled" in caplog.text
    await make_due(database)
    (delivery,) = await until_state(api, "failed")
    assert delivery["attempts"][-1]["error"]["code"] == "endpoint_disabled"
    assert len(receiver.received) == 3
    enabled = await api.client.patch(f"/v1/webhooks/{made['id']}", json={"disabled": False})
    assert enabled.status_code == 200
    receiver.answer = Answer()
    since = time.time() - 3600
    path = f"/v1/webhooks/{made['id']}"
    replayed = await api.client.post(f"{path}/replay", json={"since": since})
    assert replayed.json() == {"object": "webhook.replay", "replayed": 1}
    await until_state(api, "delivered")


async def test_a_success_between_failures_keeps_an_endpoint(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    await endpoint(api, receiver.url())
    receiver.answer = Answer(503)
    await api.submitted(CHAT)
    await finish(bench)
    await next_wait(database, 1)
    async with database.connection() as connection:
        await connection.execute("UPDATE webhook_circuits SET failing_since = '2020-01-01'")
    receiver.answer = Answer()
    await make_due(database)
    await until_state(api, "delivered")

    async def forgotten() -> bool:
        return not await database.fetch_value("SELECT count(*) FROM webhook_circuits")

    await eventually(forgotten, "the failures to be forgotten")


async def test_a_pending_delivery_of_five_days_is_given_up(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    receiver.answer = Answer(500)
    await api.submitted({**CHAT, "webhook_url": receiver.url()})
    await finish(bench)
    await next_wait(database, 1)
    async with database.connection() as connection:
        await connection.execute("UPDATE deliveries SET owed_at = now() - interval '6 days'")
    await make_due(database)
    (delivery,) = await until_state(api, "failed")
    assert len(delivery["attempts"]) == 2
