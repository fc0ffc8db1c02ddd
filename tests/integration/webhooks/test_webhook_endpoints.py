"""Endpoints and the log of deliveries, as their tenant sees them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from core.ids import IdPrefix, parse_id
from db import delivery_log
from db.database import Database
from db.tenants import create_key
from tests.support.api import CHAT, Api, assert_problem, running_api
from tests.support.jobs import Bench
from tests.support.receivers import Receiver
from tests.support.webhooks import JOB_EVENTS, deliveries, endpoint, finish, until_state
from workers.steward.webhook_sender import Sender


async def test_endpoints_are_made_listed_changed_and_deleted(api: Api) -> None:
    made = [await endpoint(api, f"https://example.com/{n}") for n in range(3)]
    page = (await api.client.get("/v1/webhooks", params={"limit": 2})).json()
    assert [each["id"] for each in page["data"]] == [made[2]["id"], made[1]["id"]]
    assert page["has_more"]
    rest = (await api.client.get("/v1/webhooks", params={"after": page["last_id"]})).json()
    assert [each["id"] for each in rest["data"]] == [made[0]["id"]]
    path = f"/v1/webhooks/{made[0]['id']}"
    changed = await api.client.patch(
        path, json={"url": "https://example.org/", "events": ["job.failed", "job.failed"]}
    )
    assert changed.json()["url"] == "https://example.org/"
    assert changed.json()["events"] == ["job.failed"]
    disabled = (await api.client.patch(path, json={"disabled": True})).json()
    assert disabled["disabled_reason"] == "user" and disabled["disabled_at"]
    assert disabled["events"] == ["job.failed"], "what is left out stays"
    assert_problem(await api.client.post(f"{path}/test"), 422, "disabled")
    enabled = (await api.client.patch(path, json={"disabled": False})).json()
    assert enabled["disabled_at"] is None and enabled["disabled_reason"] is None
    assert (await api.client.delete(path)).status_code == 204
    for response in (
        await api.client.get(path),
        await api.client.delete(path),
        await api.client.patch(path, json={}),
        await api.client.post(f"{path}/rotate"),
        await api.client.post(f"{path}/test"),
        await api.client.get(f"{path}/deliveries"),
        await api.client.get("/v1/webhooks/webhook_x"),
        await api.client.get("/v1/deliveries/delivery_x"),
    ):
        assert_problem(response, 404, "does not exist")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"url": "https://example.com"}, "events is required"),
        ({"events": JOB_EVENTS}, "url is required"),
        ({"url": "https://example.com", "events": []}, "events"),
        ({"url": "https://example.com", "events": ["job.done"]}, "which is no event"),
        ({"url": "https://example.com", "events": JOB_EVENTS, "secret": "x"}, "secret"),
        ({"url": "http://example.com:1/", "events": JOB_EVENTS, "description": "\0"}, "descr"),
        ({"url": "https://u:p@example.com", "events": JOB_EVENTS}, "credentials"),
        ({"url": "https://169.254.169.254/", "events": JOB_EVENTS}, "link-local"),
        ({"url": "http://8.8.8.8/", "events": JOB_EVENTS}, "https only"),
    ],
)
async def test_a_webhook_that_cannot_be_used_is_refused(
    api: Api, body: dict[str, Any], says: str
) -> None:
    assert_problem(await api.client.post("/v1/webhooks", json=body), 422, says)


async def test_a_test_event_reaches_one_endpoint_whatever_it_listens_to(
    api: Api, receiver: Receiver, sender: Sender
) -> None:
    made = await endpoint(api, receiver.url("/one"), ["adapter.ready"])
    await endpoint(api, receiver.url("/two"))
    response = await api.client.post(f"/v1/webhooks/{made['id']}/test")
    assert response.status_code == 202
    assert response.json()["type"] == "webhook.test"
    (got,) = await receiver.got(1)
    assert got.path == "/one" and got.event["data"]["id"] == made["id"]
    got.verify(made["secret"])
    await until_state(api, "delivered")
    assert len(receiver.received) == 1


async def test_tenants_never_see_each_others_webhooks(
    database_url: str, database: Database, bench: Bench
) -> None:
    keys = [await create_key(database, name) for name in ("ada", "bob")]
    async with running_api(database_url, require_keys=True) as api:
        ada, bob = ({"Authorization": f"Bearer {key}"} for key in keys)
        made = (
            await api.client.post(
                "/v1/webhooks",
                json={"url": "https://example.com/", "events": JOB_EVENTS},
                headers=ada,
            )
        ).json()
        job = await api.client.post(
            "/v1/jobs", json={**CHAT, "webhook_url": "https://example.com/x"}, headers=ada
        )
        await api.client.post(f"/v1/jobs/{job.json()['id']}/cancel", headers=ada)
        other = await api.client.post("/v1/jobs", json=CHAT, headers=bob)
        await api.client.post(f"/v1/jobs/{other.json()['id']}/cancel", headers=bob)
        mine = (await api.client.get("/v1/deliveries", headers=ada)).json()["data"]
        assert {d["subject"] for d in mine} == {job.json()["id"]}
        assert len(mine) == 2
        path, log = f"/v1/webhooks/{made['id']}", f"/v1/deliveries/{mine[0]['id']}"
        for method, where, body in (
            ("GET", path, None),
            ("PATCH", path, {"disabled": True}),
            ("DELETE", path, None),
            ("POST", f"{path}/rotate", None),
            ("POST", f"{path}/test", None),
            ("GET", f"{path}/deliveries", None),
            ("POST", f"{path}/replay", {"since": 0}),
            ("GET", log, None),
            ("POST", f"{log}/replay", None),
        ):
            response = await api.client.request(method, where, json=body, headers=bob)
            assert response.status_code == 404, (method, where)
        for where in ("/v1/deliveries", "/v1/webhooks"):
            assert (await api.client.get(where, headers=bob)).json()["data"] == []
        replayed = await api.client.post("/v1/deliveries/replay", json={"since": 0}, headers=bob)
        assert replayed.json()["replayed"] == 0
        seen = await api.client.get(path, headers=ada)
        assert seen.json()["disabled_at"] is None


async def test_the_log_pages_and_narrows(api: Api, bench: Bench, database: Database) -> None:
    made = await endpoint(api, "https://example.com/")
    ids = [await api.submitted({**CHAT, "webhook_url": "https://a.b/"}) for _ in range(3)]
    await finish(bench)
    assert len(await deliveries(api)) == 6
    path = f"/v1/webhooks/{made['id']}/deliveries"
    assert len(await deliveries(api, path)) == 3
    assert {d["webhook"] for d in await deliveries(api, path)} == {made["id"]}
    assert len(await deliveries(api, subject=ids[0])) == 2
    assert await deliveries(api, state="failed") == []
    seen: list[str] = []
    after = None
    while True:
        query = {"limit": 4, **({"after": after} if after else {})}
        page = (await api.client.get("/v1/deliveries", params=query)).json()
        seen += [d["id"] for d in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert len(seen) == len(set(seen)) == 6 and seen == sorted(seen, reverse=True)
    assert_problem(await api.client.get("/v1/deliveries?after=x"), 422, "not a delivery id")
    assert_problem(await api.client.get("/v1/deliveries?state=x"), 422, "state")


async def test_deliveries_are_pruned_with_their_age(
    api: Api, bench: Bench, database: Database
) -> None:
    for _ in range(3):
        await api.submitted({**CHAT, "webhook_url": "https://a.b/"})
    await finish(bench)
    rows = [parse_id(IdPrefix.DELIVERY, d["id"]) for d in await deliveries(api)]
    async with database.connection() as connection:
        for number, age in enumerate(("9 days", "9 days", "0 days")):
            at = datetime.now(UTC) - timedelta(days=int(age.split()[0]))
            old = f"{int(at.timestamp() * 1000):012x}7000800000000000000{number}"
            await connection.execute(
                "UPDATE deliveries SET id = $2::text::uuid WHERE id = $1", rows[number], old
            )
        await connection.execute(
            "UPDATE deliveries SET state = 'delivered', due_at = NULL,"
            " finished_at = now() - interval '8 days' WHERE right(id::text, 1) IN ('0', '2')"
        )
        await connection.execute(
            "INSERT INTO delivery_attempts (delivery_id, attempt, tenant_id, started_at, seconds)"
            " SELECT id, 1, 1, now(), 0 FROM deliveries"
        )
    assert await delivery_log.prune(database, 7 * 86_400) == 1
    left = await deliveries(api)
    assert len(left) == 2, "what is pending, and what is young, stays"
    assert await database.fetch_value("SELECT count(*) FROM delivery_attempts") == 2
