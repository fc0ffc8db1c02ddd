"""How senders send: bounded answers, slow and failing receivers, several senders, their ends."""

import asyncio
from datetime import UTC, datetime

import pytest

from db import sending
from db.database import Database
from tests.support.api import CHAT, Api
from tests.support.jobs import Bench
from tests.support.receivers import Answer, Receiver
from tests.support.waiting import eventually
from tests.support.webhooks import SETTINGS, deliveries, finish, next_wait
from workers.steward.webhook_plan import Limits
from workers.steward.webhook_sender import Sender


async def test_answers_are_bounded_in_size_and_time(
    api: Api, bench: Bench, receiver: Receiver, database: Database
) -> None:
    endless = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n" + b"\0y" * 100_000
    trickle = b"HTTP/1.1 200 OK\r\nx: "
    answers = {"/endless": Answer(raw=endless), "/trickle": Answer(raw=trickle)}
    answers |= {"/drop": Answer(drop=True), "/noise": Answer(raw=b"\r\nnoise\r\n\r\n")}
    receiver.decide = lambda got: answers[got.path]
    for path in answers:
        await api.submitted({**CHAT, "webhook_url": receiver.url(path)})
    await finish(bench)
    sender = Sender(database, SETTINGS.model_copy(update={"webhook_seconds": 1}))
    await sender.act()
    await sender.close()
    found = {d["url"].rpartition("/")[2]: d for d in await deliveries(api)}
    assert found["endless"]["state"] == "delivered"
    (attempt,) = found["endless"]["attempts"]
    assert attempt["response"] == "\N{REPLACEMENT CHARACTER}y" * 1024
    for path, code in (("trickle", "timeout"), ("drop", "connection"), ("noise", "connection")):
        assert found[path]["state"] == "pending"
        (attempt,) = found[path]["attempts"]
        assert attempt["error"]["code"] == code and attempt["status"] is None
        assert attempt["seconds"] < 15


async def test_redirects_are_failures_and_not_followed(
    api: Api, bench: Bench, receiver: Receiver, sender: Sender, database: Database
) -> None:
    receiver.answer = Answer(307, headers={"location": receiver.url("/elsewhere")})
    await api.submitted({**CHAT, "webhook_url": receiver.url()})
    await finish(bench)
    await next_wait(database, 1)
    assert [got.path for got in receiver.received] == ["/hook"]
    (delivery,) = await deliveries(api)
    assert delivery["state"] == "pending" and delivery["attempts"][0]["status"] == 307


async def test_proxies_of_the_environment_are_ignored(
    api: Api,
    bench: Bench,
    receiver: Receiver,
    sender: Sender,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Receiver.listening() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        await api.submitted({**CHAT, "webhook_url": receiver.url()})
        await finish(bench)
        await receiver.got(1)
        assert proxy.connections == 0


async def test_a_slow_receiver_delays_nobody(
    api: Api, bench: Bench, receiver: Receiver, database: Database
) -> None:
    async with Receiver.listening() as slow:
        slow.answer = Answer(seconds=3600)
        for _ in range(60):
            await api.submitted({**CHAT, "webhook_url": slow.url()})
        for n in range(60):
            await api.submitted({**CHAT, "webhook_url": receiver.url(f"/{n % 5}")})
        await finish(bench)
        sender = Sender(database, SETTINGS.model_copy(update={"webhook_seconds": 60}))
        task = asyncio.create_task(sender.act())
        await receiver.got(60)

        async def recorded() -> bool:
            found = await database.fetch_value(
                "SELECT count(*) FROM deliveries WHERE state = 'delivered'"
            )
            return bool(found == 60)

        await eventually(recorded, "the good ones in the log")
        assert not task.done()
        assert len(slow.received) <= 32
        # none of them waited for an answer of the slow one
        assert {got.path for got in receiver.received} == {f"/{n}" for n in range(5)}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for open_ in list(sender._tasks):
            open_.cancel()
        await sender.close()
    pending = await database.fetch_value("SELECT count(*) FROM deliveries WHERE state = 'pending'")
    assert pending == 60
    due = await database.fetch_value(
        "SELECT count(*) FROM deliveries WHERE state = 'pending' AND due_at <= now()"
    )
    assert due >= 28


async def test_a_sender_stops_whatever_happens_at_that_moment(
    api: Api, bench: Bench, receiver: Receiver, database: Database
) -> None:
    receiver.answer = Answer(seconds=3600)
    for _ in range(3):
        await api.submitted({**CHAT, "webhook_url": receiver.url()})
    await finish(bench)
    settings = SETTINGS.model_copy(update={"webhook_seconds": 60})
    sender = Sender(database, settings, limits=Limits(line=1))
    task = asyncio.create_task(sender.act())
    await receiver.got(1)

    async def waiting() -> bool:
        return bool(sender._changed._waiters)

    await eventually(waiting, "the sender to wait for room")
    sender._changed.set()  # an answer comes in the same moment as the signal
    task.cancel()
    async with asyncio.timeout(30):
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    for open_ in list(sender._tasks):
        open_.cancel()
    await sender.close()


async def test_a_line_that_fails_is_held_back_and_probed_by_one_sender(
    api: Api, bench: Bench, receiver: Receiver, database: Database
) -> None:
    for _ in range(40):
        await api.submitted({**CHAT, "webhook_url": receiver.url()})
    await finish(bench)
    receiver.answer = Answer(500)
    sender = Sender(database, SETTINGS)
    await sender.act()
    await sender.close()
    sent = len(receiver.received)
    assert 5 <= sent <= 40
    assert await sending.look(database) == [], "held back"
    async with database.connection() as connection:
        await connection.execute("UPDATE webhook_circuits SET blocked_until = now()")
        await connection.execute("UPDATE deliveries SET due_at = now() WHERE state = 'pending'")
    senders = [Sender(database, SETTINGS) for _ in range(4)]
    await asyncio.gather(*(each.act() for each in senders))
    for each in senders:
        await each.close()
    assert len(receiver.received) == sent + 1, "one probe, whoever looks"
    receiver.answer = Answer()
    async with database.connection() as connection:
        await connection.execute("UPDATE webhook_circuits SET blocked_until = now()")
        await connection.execute("UPDATE deliveries SET due_at = now() WHERE state = 'pending'")
    sender = Sender(database, SETTINGS)

    async def all_delivered() -> bool:
        await sender.act()
        found = await database.fetch_value(
            "SELECT count(*) FROM deliveries WHERE state = 'pending'"
        )
        return not found

    await eventually(all_delivered, "the rest, once the probe has come through")
    await sender.close()


async def test_senders_share_what_is_owed_and_send_it_once(
    api: Api, bench: Bench, receiver: Receiver, database: Database
) -> None:
    for n in range(300):
        await api.submitted({**CHAT, "webhook_url": receiver.url(f"/{n % 7}")})
    await finish(bench)
    senders = [Sender(database, SETTINGS) for _ in range(4)]

    async def all_sent() -> bool:
        await asyncio.gather(*(sender.act() for sender in senders))
        return len(receiver.received) >= 300

    await eventually(all_sent, "all deliveries")
    for sender in senders:
        await sender.close()
    ids = [got.message_id for got in receiver.received]
    assert len(ids) == len(set(ids)) == 300
    states = await database.fetch_value(
        "SELECT count(*) FROM deliveries WHERE state = 'delivered' AND attempt = 1"
    )
    assert states == 300


async def test_a_late_outcome_of_a_lost_sender_is_dropped(
    api: Api, bench: Bench, receiver: Receiver, database: Database
) -> None:
    await api.submitted({**CHAT, "webhook_url": receiver.url()})
    await finish(bench)
    (line,) = await sending.look(database)
    grant = sending.Grant(line.line, 1)
    (lost,) = await sending.claim(database, [grant], lease_seconds=-1)
    (taken,) = await sending.claim(database, [grant], lease_seconds=60)
    assert (lost.attempt, taken.attempt) == (1, 2)
    assert lost.event_id == taken.event_id
    common = {"line": line.line, "endpoint_id": None, "started_at": datetime.now(UTC)}
    for claimed, state in ((lost, "failed"), (taken, "delivered")):
        outcome = sending.Outcome(
            id=claimed.id,
            attempt=claimed.attempt,
            state=state,  # type: ignore[arg-type]
            delay_seconds=None,
            seconds=0.1,
            status=200,
            **common,  # type: ignore[arg-type]
        )
        await sending.record(database, [outcome], ())
    (delivery,) = await deliveries(api)
    assert delivery["state"] == "delivered"
    assert [a["attempt"] for a in delivery["attempts"]] == [2]
