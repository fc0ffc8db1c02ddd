"""/v1/tasks: routes to adapters, versions and bases; jobs keep what they were routed to."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from db import adapters, registry
from db.database import Database
from db.store import Store
from tests.support.api import BASE, CONTEXT, Api, assert_problem, running_api
from tests.support.jobs import fake_adapter


@pytest.fixture
async def api(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT)
    store = Store.open(str(tmp_path / "store"))
    for number in (1, 2):
        await adapters.register_ready(
            database,
            store,
            tenant="default",
            base_model=BASE,
            name="sql",
            folder=fake_adapter(tmp_path / str(number)),
        )
    async with running_api(database_url) as api:
        yield api


async def routed(api: Api) -> tuple[str | None, int | None]:
    job = (await api.submit({"model": "task:ask", "prompt": "x"})).json()
    return job["adapter"], job["adapter_version"]


async def test_a_task_routes_jobs_and_they_keep_their_route(api: Api) -> None:
    task = await api.client.put("/v1/tasks/ask", json={"model": "sql"})
    assert (task.status_code, task.json()["id"], task.json()["version"]) == (200, "task:ask", None)
    first = (await api.submit({"model": "task:ask", "prompt": "x"})).json()
    assert (first["adapter"], first["adapter_version"]) == ("sql", 2)
    for model, route in (("sql@1", ("sql", 1)), (BASE, (None, None)), ("sql", ("sql", 2))):
        body = (await api.client.put("/v1/tasks/ask", json={"model": model})).json()
        assert body["model"] == model
        assert await routed(api) == route
    kept = (await api.client.get(f"/v1/jobs/{first['id']}")).json()
    assert (kept["model"], kept["adapter_version"]) == ("task:ask", 2)


async def test_tasks_are_listed_read_and_removed(api: Api) -> None:
    for name in ("c", "a", "b"):
        await api.client.put(f"/v1/tasks/{name}", json={"model": "sql@1"})
    page = (await api.client.get("/v1/tasks?limit=2")).json()
    assert [row["id"] for row in page["data"]] == ["task:a", "task:b"]
    rest = (await api.client.get(f"/v1/tasks?after={page['last_id']}")).json()
    assert [row["name"] for row in rest["data"]] == ["c"]
    assert (await api.client.get("/v1/tasks/a")).json()["model"] == "sql@1"
    assert (await api.client.delete("/v1/tasks/a")).status_code == 204
    assert_problem(await api.client.get("/v1/tasks/a"), 404)
    assert_problem(await api.client.delete("/v1/tasks/a"), 404)
    assert_problem(await api.submit({"model": "task:a", "prompt": "x"}), 404)


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("ask", {"model": "nope"}, 404),
        ("ask", {"model": "sql@9"}, 404),
        ("ask", {"model": "task:ask"}, 422),
        ("ask", {}, 422),
        ("ask", {"model": "sql", "weight": 1}, 422),
        ("ask", {"model": 7}, 422),
        ("a b", {"model": "sql"}, 422),
        ("ask", {"model": "\0"}, 422),
    ],
)
async def test_a_route_that_cannot_be_is_refused(
    api: Api, name: str, body: dict[str, object], status: int
) -> None:
    assert_problem(await api.client.put(f"/v1/tasks/{name}", json=body), status)
    assert (await api.client.get("/v1/tasks")).json()["data"] == []


async def test_an_adapter_with_a_task_is_not_removed(api: Api) -> None:
    await api.client.put("/v1/tasks/ask", json={"model": "sql"})
    refused = await api.client.delete("/v1/adapters/sql?drain=true")
    assert_problem(refused, 409, "task:ask")
    await api.client.delete("/v1/tasks/ask")
    assert (await api.client.delete("/v1/adapters/sql")).status_code == 200
