"""GET /v1/models, as OpenAI's client reads it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai.types import Model

from db import adapters, registry
from db.database import Database
from db.store import Store
from db.tenants import create_key
from tests.support.api import BASE, CONTEXT, Api, assert_problem, running_api
from tests.support.jobs import fake_adapter


@pytest.fixture
async def api(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    await registry.declare_base(database, "org/base", CONTEXT)
    await registry.declare_base(database, BASE, CONTEXT)
    for tenant, name in (("default", "sql"), ("other", "secret")):
        await create_key(database, tenant)
        await adapters.register_ready(
            database,
            Store.open(str(tmp_path / "store")),
            tenant=tenant,
            base_model=BASE,
            name=name,
            folder=fake_adapter(tmp_path / name),
        )
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO tasks (tenant_id, name, base_model_id, adapter_id)"
            " SELECT tenant_id, 'queries', base_model_id, id FROM adapters WHERE name = 'sql'"
        )
    async with running_api(database_url) as api:
        yield api


async def test_the_list_holds_bases_and_the_tenants_own(api: Api) -> None:
    found = (await api.client.get("/v1/models")).json()
    assert found["object"] == "list"
    shown = [
        (Model.model_validate(m).id, m["kind"], m["base"], m["version"]) for m in found["data"]
    ]
    assert shown == [
        ("org/base", "base", "org/base", None),
        (BASE, "base", BASE, None),
        ("sql", "adapter", BASE, 1),
        ("task:queries", "task", BASE, None),
    ]
    for model in found["data"]:
        assert (model["object"], model["owned_by"]) == ("model", "lorry")
        assert isinstance(model["created"], int)


async def test_one_model_is_read_by_its_name(api: Api) -> None:
    for name in ["org/base", BASE, "sql", "task:queries", "sql@1"]:
        model = (await api.client.get(f"/v1/models/{name}")).json()
        assert (model["id"], model["object"]) == (name, "model")
        assert (model["version"] == 1) == name.startswith("sql")


async def test_an_unknown_or_foreign_model_is_404(api: Api) -> None:
    for name in ["secret", "secret@1", "sql@2", "sq", "%00", "x" * 3000, "a/b"]:
        problem = assert_problem(await api.client.get(f"/v1/models/{name}"), 404, "does not exist")
        assert "secret" not in problem.get("nearest", [])
        if name == "sq":
            assert problem["nearest"] == ["sql"]
