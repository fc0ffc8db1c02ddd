"""`/v1/schedules`: create and refuse; what a schedule's runs become."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from db import registry
from db.database import Database
from db.tenants import create_key
from tests.support.api import BASE, CONTEXT, Api, assert_problem, count, running_api
from tests.support.batches import jsonl, line
from tests.support.schedules_api import ASK, NIGHTLY, act, content, created, fire, runs, uploaded


@pytest.fixture
async def api(database_url: str, database: Database, tmp_path: Path) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url, store_url=str(tmp_path / "store")) as running:
        yield running


async def test_a_schedule_as_it_is_shown(api: Api) -> None:
    made = await created(
        api, model=BASE, priority=5, completion_window="6h", metadata={"team": "x"},
        missed="all", overlap="queue", jitter_seconds=60, webhook_url="https://example.com/hook",
    )  # fmt: skip
    assert made["object"] == "schedule"
    assert (made["state"], made["requests"], made["endpoint"]) == (
        "active", 1, "/v1/chat/completions",
    )  # fmt: skip
    assert (made["cron"], made["timezone"]) == ("0 2 * * *", "Europe/Berlin")
    assert (made["missed"], made["overlap"]) == ("all", "queue")
    assert (made["dst_gap"], made["dst_fold"]) == ("after", "first")
    assert (made["metadata"], made["priority"]) == ({"team": "x"}, 5)
    for name in (made["id"], "nightly"):
        assert (await api.client.get(f"/v1/schedules/{name}")).json() == made
    listed = (await api.client.get("/v1/schedules")).json()
    assert listed["data"] == [made]


async def test_inline_requests_run_as_a_batch_under_the_runs_id(api: Api) -> None:
    await created(
        api,
        model=BASE,
        priority=7,
        requests=[ASK, {"custom_id": "second", "body": {**ASK, "model": BASE, "priority": 1}}],
    )
    run = await act(api, "run")
    assert (run["state"], run["trigger"], run["batch"]) == ("pending", "manual", None)
    await fire(api)
    (run,) = await runs(api)
    assert run["state"] == "started"
    assert 0 <= run["lateness_seconds"] < 60
    assert run["batch"]["status"] == "in_progress"
    assert run["batch"]["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    batch = (await api.client.get(f"/v1/batches/{run['batch']['id']}")).json()
    lines = await content(api, batch["input_file_id"])
    assert [each["custom_id"] for each in lines] == ["request-1", "second"]
    # the schedule's model and priority are laid under the lines
    async with api.services.database.connection() as connection:
        rows = await connection.fetch("SELECT priority FROM jobs ORDER BY batch_line")
    assert [row["priority"] for row in rows] == [7, 1]
    asked = {
        "input_file_id": batch["input_file_id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    taken = await api.client.post("/v1/batches", json=asked, headers={"Idempotency-Key": run["id"]})
    assert taken.status_code == 400  # the key is the run's, and its body had a model
    assert taken.json()["error"]["code"] == "idempotency_key_reused"


async def test_a_stored_file_runs_as_it_is(api: Api) -> None:
    file_id = await uploaded(api, jsonl([line("a", BASE), line("b", BASE)]))
    made = await created(api, input_file_id=file_id)
    assert made["input_file_id"] == made["run_input_file_id"] == file_id
    kept = (await api.client.get(f"/v1/files/{file_id}")).json()
    assert kept["expires_at"] is None  # as long as a schedule has it
    await act(api, "run")
    await fire(api)
    (run,) = await runs(api)
    assert run["batch"]["request_counts"]["total"] == 2
    await api.client.delete("/v1/schedules/nightly")
    assert (await api.client.get(f"/v1/files/{file_id}")).json()["expires_at"] is not None


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("rows.csv", b"text,kind\nfirst,x\n\"second, with\na line feed\",y\n"),
        ("rows.tsv", b"\xef\xbb\xbftext\tkind\r\nfirst\tx\r\n\"second, with\na line feed\"\ty\r\n"),
        ("rows.jsonl", b'{"text": "first", "kind": "x"}\n\n{"text": "second, with\\na line feed",'
                       b' "kind": "y"}'),
    ],
)  # fmt: skip
async def test_a_template_over_the_rows_of_a_file(api: Api, name: str, rows: bytes) -> None:
    template = {
        "messages": [{"role": "user", "content": "As {kind}, {{so}}: {text}"}],
        "max_tokens": 4,
    }
    file_id = await uploaded(api, rows, name)
    made = await created(api, input_file_id=file_id, template=template, model=BASE)
    assert (made["input_file_id"], made["template"]) == (file_id, template)
    lines = await content(api, made["run_input_file_id"])
    assert [each["body"]["messages"][0]["content"] for each in lines] == [
        "As x, {so}: first",
        "As y, {so}: second, with\na line feed",
    ]
    await act(api, "run")
    await fire(api)
    (run,) = await runs(api)
    assert run["batch"]["request_counts"]["total"] == 2


async def test_a_model_follows_its_current_version_or_is_pinned(api: Api) -> None:
    made = await created(api, model=BASE, requests=[ASK])
    response = await api.client.patch(f"/v1/schedules/{made['id']}", json={"model": "nothing@3"})
    assert_problem(response, 404, "'nothing@3' does not exist")


BAD = [
    ({"cron": "61 * * * *"}, 422, "the minute '61'"),
    ({"timezone": "Mars/Base"}, 422, "'Mars/Base' is not known"),
    ({"cron": "0 0 30 2 *"}, 422, "never fires"),
    ({"cron": None, "every_seconds": 0}, 422, "greater than or equal to 1, not 0"),
    ({"start_at": 2e9, "end_at": 1.9e9}, 422, "is not behind start_at"),
    ({"end_at": 1e9}, 422, "has passed"),
    ({"cron": None, "at": 1e9}, 422, "has passed"),
    ({"model": "sim-bas"}, 404, "did you mean 'sim-base'?"),
    ({"requests": None, "input_file_id": "file_0"}, 404, "does not exist"),
    ({"requests": [{**ASK, "model": BASE, "max_tokens": 0}]}, 422, "requests[0].max_tokens must"),
    ({"requests": [ASK]}, 422, "requests[0].model is required"),
    ({"requests": [{"model": BASE, **ASK}, {"model": BASE, "prompt": "x"}]}, 422,
     "a batch has one"),
    ({"requests": [{"custom_id": "a", "body": {"model": BASE, **ASK}}] * 2}, 422,
     "that of requests[0] too"),
    ({"endpoint": "/v1/completions"}, 422, "does not fit"),
    ({"webhook": "x"}, 422, "did you mean 'webhook_url'?"),
    ({"webhook_url": "https://10.0.0.1/"}, 422, "10.0.0.1 is forbidden (private)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "said"), BAD)
async def test_a_bad_schedule_is_refused_with_the_reason(
    api: Api, body: dict[str, Any], status: int, said: str
) -> None:
    whole = {**NIGHTLY, "requests": [{"model": BASE, **ASK}], **body}
    assert_problem(await api.client.post("/v1/schedules", json=whole), status, said)
    assert await count(api.services.database, "schedules") == 0
    assert await count(api.services.database, "files") == 0


@pytest.mark.parametrize(
    ("text", "rows", "name", "said"),
    [
        ("{nothing}", b"text\na\n", "in.csv", "names 'nothing'; the columns are text"),
        ("{text}", b"text\n", "in.csv", "has no rows"),
        ("{text}", b"", "in.txt", "has no rows"),
        ("{text}", b"\xff\xfe", "in.txt", "is not UTF-8"),
        ("{text}", b'{"text": "a"}\n[1]\n', "in.jsonl", "line 2 must be a JSON object"),
        ("{text}", b"{no json\n", "in.jsonl", "line 1 is not JSON"),
        ("{text}", b'{"text": "a"}\n{"other": 1}\n', "in.jsonl", "(line 2 of the file)"),
    ],
)
async def test_bad_rows_are_refused_and_nothing_is_left(
    api: Api, tmp_path: Path, text: str, rows: bytes, name: str, said: str
) -> None:
    file_id = await uploaded(api, rows, name)
    body = {
        **NIGHTLY,
        "model": BASE,
        "input_file_id": file_id,
        "template": {"messages": [{"role": "user", "content": text}]},
    }
    assert_problem(await api.client.post("/v1/schedules", json=body), 422, said)
    assert await count(api.services.database, "files") == 1
    stored = [p for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert len(stored) == 1


async def test_a_name_is_given_once(api: Api, tmp_path: Path) -> None:
    await created(api)
    again = {**NIGHTLY, "requests": [{"model": BASE, **ASK}]}
    assert_problem(
        await api.client.post("/v1/schedules", json=again), 422, "is that of another schedule"
    )
    assert len([p for p in (tmp_path / "store").rglob("*") if p.is_file()]) == 1


async def test_tenants_never_see_each_others_schedules(
    database_url: str, database: Database, tmp_path: Path
) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    keys = {name: await create_key(database, name) for name in ("ours", "theirs")}
    async with running_api(
        database_url, store_url=str(tmp_path / "s"), require_keys=True
    ) as running:
        ours, theirs = ({"Authorization": f"Bearer {keys[n]}"} for n in ("ours", "theirs"))
        body = {**NIGHTLY, "requests": [{"model": BASE, **ASK}]}
        made = (await running.client.post("/v1/schedules", json=body, headers=ours)).json()
        for name in (made["id"], "nightly"):
            for method, path in (
                ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/run"),
                ("POST", "/skip-next"), ("GET", "/runs"), ("GET", "/preview"),
            ):  # fmt: skip
                response = await running.client.request(
                    method, f"/v1/schedules/{name}{path}", headers=theirs,
                    json={} if method == "PATCH" else None,
                )  # fmt: skip
                assert_problem(response, 404, "does not exist")
        assert (await running.client.get("/v1/schedules", headers=theirs)).json()["data"] == []
        # the same name is free for them
        again = await running.client.post("/v1/schedules", json=body, headers=theirs)
        assert again.status_code == 201
