"""/v1/adapters: what is taken, what is refused, versions, rollback, removal, tenants."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from db import registry
from db.adapter_files import forget_files
from db.database import Database
from db.store import Store
from db.tenants import create_key
from tests.support.adapters import SMOLLM, Draft
from tests.support.api import BASE, CONTEXT, Api, assert_problem, count, finish, running_api
from tests.support.uploads import added, tarred, tiny, upload


@pytest.fixture
async def api(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    await registry.declare_base(database, BASE, CONTEXT, facts=SMOLLM)
    async with running_api(
        database_url,
        store_url=str(tmp_path / "store"),
        cache_dir=tmp_path / "cache",
        max_adapter_bytes=2_000_000,
    ) as api:
        yield api


async def make_ready(database: Database, name: str, version: int) -> None:
    """What a worker's probe does in the end."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE adapter_versions v SET state = 'ready' FROM adapters a"
            " WHERE a.id = v.adapter_id AND a.name = $1 AND v.version = $2",
            name,
            version,
        )
        await connection.execute(
            "UPDATE adapters SET current_version = $2 WHERE name = $1", name, version
        )


async def submitted(api: Api, model: str) -> dict[str, Any]:
    response = await api.submit({"model": model, "prompt": "x"})
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def stored(tmp_path: Path) -> list[str]:
    return sorted(p.parent.name for p in (tmp_path / "store").rglob("manifest.json"))


async def test_an_upload_is_stored_and_waits_for_its_probe(api: Api, tmp_path: Path) -> None:
    response = await upload(api, "sql", tiny(tmp_path / "sql"))
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/adapters/sql/versions/1"
    version = response.json()
    assert (version["id"], version["state"], version["rank"]) == ("sql@1", "validating", 2)
    assert version["current"] is False
    assert "no worker of sim-base" in version["waiting_for"]
    assert version["hints"][0]["code"] == "base_name"  # trained on another name
    assert stored(tmp_path) == [version["sha256"]]
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []
    found = (await api.client.get(response.headers["location"])).json()
    assert found["sha256"] == version["sha256"]


async def test_the_same_bytes_again_are_the_same_version(api: Api, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "sql")
    await added(api, "sql", folder)
    again = await upload(api, "sql", folder)
    assert again.status_code == 200
    assert (again.json()["version"], again.json()["created"]) == (1, False)
    second = await added(api, "sql", tiny(tmp_path / "new", seed=2))
    assert second["version"] == 2
    listed = (await api.client.get("/v1/adapters/sql/versions")).json()
    assert [version["id"] for version in listed["data"]] == ["sql@2", "sql@1"]


async def test_the_same_old_bytes_do_not_roll_back(
    api: Api, database: Database, tmp_path: Path
) -> None:
    first = tiny(tmp_path / "1")
    await added(api, "sql", first)
    await added(api, "sql", tiny(tmp_path / "2", seed=2))
    await make_ready(database, "sql", 1)
    await make_ready(database, "sql", 2)
    again = (await upload(api, "sql", first)).json()
    assert (again["version"], again["current"]) == (1, False)
    assert (await submitted(api, "sql"))["adapter_version"] == 2


async def test_every_finding_is_told_and_nothing_is_stored(
    api: Api, database: Database, tmp_path: Path
) -> None:
    bad = Draft(rank=2, layers=(0, 99)).having(use_dora=True).write(tmp_path / "bad")
    problem = assert_problem(await upload(api, "sql", bad), 422)
    assert problem["code"] == "adapter_rejected"
    assert len({finding["code"] for finding in problem["findings"]}) >= 2
    assert all(finding["message"] for finding in problem["findings"])
    assert await count(database, "adapters") == await count(database, "adapter_versions") == 0
    assert stored(tmp_path) == []
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


async def test_the_rank_is_that_of_the_live_workers(
    api: Api, database: Database, tmp_path: Path
) -> None:
    async with database.connection() as connection:
        for rank in (64, 1):
            await connection.execute(
                "INSERT INTO workers (base_model_id, hostname, pid, engine, engine_version, limits,"
                " lease_expires_at) SELECT id, 'h', 1, 'e', '1', json_build_object('max_loras', 4,"
                " 'max_lora_rank', $1::int), now() + interval '1 minute' FROM base_models",
                rank,
            )
    problem = assert_problem(await upload(api, "sql", tiny(tmp_path / "sql")), 422, "r is 2")
    assert "`--max-lora-rank 8`" in problem["findings"][0]["message"]
    async with database.connection() as connection:
        await connection.execute("UPDATE workers SET stopped_at = now() WHERE id = 2")
    version = await added(api, "sql", tiny(tmp_path / "sql"))
    assert "slot" in version["waiting_for"]


async def test_check_judges_and_stores_nothing(
    api: Api, database: Database, tmp_path: Path
) -> None:
    good = await upload(api, None, tiny(tmp_path / "good"), "/v1/adapters/check")
    assert (good.status_code, good.json()["findings"]) == (200, [])
    bad = Draft(rank=2, layers=(99,)).write(tmp_path / "bad")
    found = (await upload(api, None, bad, "/v1/adapters/check")).json()
    assert found["findings"]
    assert await count(database, "adapters") == 0
    assert stored(tmp_path) == []


_FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"data": {"name": "sql"}, "files": {"other": ("x", b"x")}}, "other"),
        ({"data": {}, "files": {"file": ("x.tar", b"x")}}, ""),
        ({"data": {"name": "sql", "file": "/etc/passwd"}, "files": {"a": ("x", b"")}}, "file"),
        ({"data": {"name": "sql"}, "files": {"file": ("x", b"")}}, "file is required"),
        ({"data": {"name": "sql", "bas_model": "x"}, "files": {"file": ("x", b"x")}}, "bas_model"),
        ({"json": {"name": "sql"}}, "multipart/form-data"),
        ({"content": b"--x\r\nbroken", "headers": {"content-type": _FORM}}, "form"),
        ({"data": {"name": "x" * 70_000}, "files": {"file": ("x", b"x")}}, "is longer"),
    ],
)
async def test_a_form_that_is_none_is_told_why(api: Api, form: dict[str, Any], words: str) -> None:
    assert_problem(await api.client.post("/v1/adapters", **form), 422, words)


async def test_an_upload_over_the_limit_is_413(api: Api, tmp_path: Path) -> None:
    files = {"file": ("x.tar", b"\0" * 2_100_000)}
    response = await api.client.post("/v1/adapters", data={"name": "sql"}, files=files)
    assert_problem(response, 413, "LORRY_MAX_ADAPTER_BYTES")
    assert list((tmp_path / "cache" / "incoming").iterdir()) == []


@pytest.mark.parametrize("name", ["", "a b", "../x", "x@1", "task:x", "x" * 129, "-x", "é"])
async def test_a_name_that_cannot_be_is_refused(api: Api, tmp_path: Path, name: str) -> None:
    problem = assert_problem(await upload(api, name, tiny(tmp_path / "sql")), 422)
    assert problem["field"] == "name"
    assert stored(tmp_path) == []


async def test_the_base_is_told_by_the_form_the_adapter_or_the_lack_of_others(
    api: Api, database: Database, tmp_path: Path
) -> None:
    await added(api, "one", tiny(tmp_path / "one"))  # there is one base
    await registry.declare_base(database, "org/SmolLM2-135M-Instruct", CONTEXT)
    told = await added(api, "told", tiny(tmp_path / "told", seed=2))
    assert told["base_model"] == "org/SmolLM2-135M-Instruct"
    version = await added(api, "one", tiny(tmp_path / "next", seed=3))  # its name has one
    assert version["base_model"] == BASE
    mute = tiny(tmp_path / "mute", seed=4, base_model_name_or_path=None)
    problem = assert_problem(await upload(api, "mute", mute), 422, "base_model is needed")
    assert problem["field"] == "base_model"
    assert_problem(await upload(api, "mute", mute, base_model="nope"), 422, "'nope'", BASE)
    other = "org/SmolLM2-135M-Instruct"
    assert_problem(await upload(api, "one", mute, base_model=other), 422, "belongs to 'sim-base'")
    assert_problem(await upload(api, BASE, mute, base_model=BASE), 422, "taken by a base model")
    assert len(stored(tmp_path)) == 3


async def test_jobs_keep_the_version_of_their_submission(
    api: Api, database: Database, tmp_path: Path
) -> None:
    await added(api, "sql", tiny(tmp_path / "1"))
    early = await submitted(api, "sql")  # accepted, waits for the probe
    assert early["adapter_version"] == 1
    await make_ready(database, "sql", 1)
    await added(api, "sql", tiny(tmp_path / "2", seed=2))
    assert (await submitted(api, "sql"))["adapter_version"] == 1  # 2 is not ready
    assert (await submitted(api, "sql@2"))["adapter_version"] == 2
    await make_ready(database, "sql", 2)
    assert (await submitted(api, "sql"))["adapter_version"] == 2
    assert (await submitted(api, "sql@1"))["adapter_version"] == 1
    assert (await api.client.get(f"/v1/jobs/{early['id']}")).json()["adapter_version"] == 1


async def test_a_rollback_makes_a_ready_version_current(
    api: Api, database: Database, tmp_path: Path
) -> None:
    for number in (1, 2):
        await added(api, "sql", tiny(tmp_path / str(number), seed=number))
        await make_ready(database, "sql", number)
    await added(api, "sql", tiny(tmp_path / "3", seed=3))
    rolled = await api.client.post("/v1/adapters/sql/rollback", json={"version": 1})
    assert rolled.json()["current_version"] == 1
    assert (await submitted(api, "sql"))["adapter_version"] == 1
    refused = await api.client.post("/v1/adapters/sql/rollback", json={"version": 3})
    assert_problem(refused, 422, "validating")
    missing = await api.client.post("/v1/adapters/sql/rollback", json={"version": 9})
    assert_problem(missing, 404, "no version 9")
    odd = await api.client.post("/v1/adapters/sql/rollback", json={"version": "1", "x": 1})
    assert {e["field"] for e in assert_problem(odd, 422)["errors"]} == {"version", "x"}


async def test_removal_waits_for_jobs_and_files_outlive_the_last_one(
    api: Api, database: Database, tmp_path: Path
) -> None:
    store = Store.open(str(tmp_path / "store"))
    await added(api, "sql", tiny(tmp_path / "1"))
    await make_ready(database, "sql", 1)
    job = await submitted(api, "sql")
    assert_problem(await api.client.delete("/v1/adapters/sql"), 409, "1 jobs", "drain=true")
    removed = await api.client.delete("/v1/adapters/sql?drain=true")
    assert removed.json() == {"object": "adapter.removed", "name": "sql", "jobs": 1}
    assert_problem(await api.client.get("/v1/adapters/sql"), 404)
    assert_problem(await api.submit({"model": "sql", "prompt": "x"}), 404)
    assert (await api.client.get("/v1/adapters")).json()["data"] == []
    assert await forget_files(database, store, 0) == 0  # the job still needs them
    assert len(stored(tmp_path)) == 1
    await finish(database, job["id"])
    assert await forget_files(database, store, 60) == 0  # jobs may be on their way
    assert await forget_files(database, store, 0) == 1
    assert stored(tmp_path) == []
    assert await forget_files(database, store, 0) == 0
    shown = (await api.client.get(f"/v1/jobs/{job['id']}")).json()
    assert (shown["adapter"], shown["adapter_version"]) == ("sql", 1)

    again = await added(api, "sql", tiny(tmp_path / "1"))
    assert again["version"] == 2  # a number is never used twice
    assert len(stored(tmp_path)) == 1


async def test_files_that_another_adapter_shares_stay(
    api: Api, database: Database, tmp_path: Path
) -> None:
    store = Store.open(str(tmp_path / "store"))
    for name in ("a", "b"):
        await added(api, name, tiny(tmp_path / "same"))
    assert len(stored(tmp_path)) == 1
    assert (await api.client.delete("/v1/adapters/a")).status_code == 200
    assert await forget_files(database, store, 0) == 0
    assert len(stored(tmp_path)) == 1
    assert (await api.client.delete("/v1/adapters/b")).status_code == 200
    assert await forget_files(database, store, 0) == 1
    assert stored(tmp_path) == []


async def test_lists_page(api: Api, tmp_path: Path) -> None:
    for number in range(3):
        await added(api, f"a{number}", tiny(tmp_path / str(number), seed=number))
        await added(api, "many", tiny(tmp_path / f"m{number}", seed=10 + number))
    page = (await api.client.get("/v1/adapters?limit=3")).json()
    assert [row["name"] for row in page["data"]] == ["a2", "a1", "many"]
    assert page["has_more"] is True
    rest = (await api.client.get(f"/v1/adapters?after={page['last_id']}")).json()
    assert [row["name"] for row in rest["data"]] == ["a0"]
    page = (await api.client.get("/v1/adapters/many/versions?limit=2")).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("many@3", "many@2", True)
    rest = (await api.client.get("/v1/adapters/many/versions?after=many@2")).json()
    assert [row["version"] for row in rest["data"]] == [1]
    for path in ("/v1/adapters?after=x", "/v1/adapters/many/versions?after=x", "/v1/adapters?x=1"):
        assert_problem(await api.client.get(path), 422)


async def test_what_waits_is_shown(api: Api, database: Database, tmp_path: Path) -> None:
    await added(api, "sql", tiny(tmp_path / "1"))
    await make_ready(database, "sql", 1)
    for _ in range(3):
        await submitted(api, "sql")
    async with database.connection() as connection:
        worker = await connection.fetchval(
            "INSERT INTO workers (base_model_id, hostname, pid, engine, engine_version, limits,"
            " lease_expires_at, resident) SELECT id, 'h', 1, 'e', '1',"
            " '{\"max_loras\": 4, \"max_lora_rank\": 8}', now() + interval '1 minute', '{1}'"
            " FROM base_models RETURNING id"
        )
        await connection.execute(
            "INSERT INTO worker_rates SELECT $1, 1, id, 120, 3 FROM base_models", worker
        )
    (row,) = (await api.client.get("/v1/adapters")).json()["data"]
    current = row["current"]
    assert (current["waiting_jobs"], current["tokens_per_second"]) == (3, 120)
    assert current["resident_on"] == [worker]


async def live_worker(database: Database, max_lora_rank: int) -> int:
    async with database.connection() as connection:
        worker: int = await connection.fetchval(
            "INSERT INTO workers (base_model_id, hostname, pid, engine, engine_version, limits,"
            " lease_expires_at) SELECT id, 'h', 1, 'e', '1',"
            " jsonb_build_object('max_loras', 4, 'max_lora_rank', $1::int)::json,"
            " now() + interval '1 minute' FROM base_models RETURNING id",
            max_lora_rank,
        )
    return worker


async def test_a_rank_that_no_live_worker_takes_is_told(
    api: Api, database: Database, tmp_path: Path
) -> None:
    folder = Draft(rank=12, modules=("self_attn.q_proj",), layers=(0,)).write(tmp_path / "1")
    await added(api, "sql", folder)
    await make_ready(database, "sql", 1)

    async def waits_for() -> str | None:
        version: dict[str, Any] = (await api.client.get("/v1/adapters/sql")).json()["current"]
        told: str | None = version["waiting_for"]
        return told

    assert "no worker of sim-base that takes adapters" in str(await waits_for())
    await live_worker(database, 8)
    assert "takes rank 12: start one with `--max-lora-rank 16`" in str(await waits_for())
    assert_problem(await upload(api, "new", folder), 422, "retrain with r ≤ 8")
    await live_worker(database, 16)
    assert await waits_for() is None


@pytest.mark.parametrize(
    "address", ["https://hub/sql", "s3://bucket/sql", "hf://org/sql", "file:///etc/passwd"]
)
async def test_remote_addresses_are_refused_with_the_remedy(
    api: Api, tmp_path: Path, address: str
) -> None:
    for field in ("source", "file", "url"):
        response = await api.client.post(
            "/v1/adapters", files={"name": (None, "sql"), field: (None, address)}
        )
        assert_problem(response, 422, address, "download it")
    assert stored(tmp_path) == []


async def test_tenants_never_see_each_other(database_url: str, tmp_path: Path) -> None:
    async with Database.connect(database_url) as database:
        await registry.declare_base(database, BASE, CONTEXT)
        ann, bob = [f"Bearer {await create_key(database, name)}" for name in ("ann", "bob")]
        async with running_api(
            database_url,
            require_keys=True,
            store_url=str(tmp_path / "store"),
            cache_dir=tmp_path / "cache",
        ) as api:
            await added(api, "sql", tiny(tmp_path / "1"), authorization=ann)
            theirs = await added(api, "sql", tiny(tmp_path / "2", seed=2), authorization=bob)
            assert theirs["version"] == 1  # a name of each one's own
            headers = {"Authorization": ann}
            await api.client.put("/v1/tasks/ask", json={"model": "sql"}, headers=headers)
            await added(api, "mine", tiny(tmp_path / "3", seed=3), authorization=ann)

            headers = {"Authorization": bob}
            listed = (await api.client.get("/v1/adapters", headers=headers)).json()["data"]
            assert [row["newest"]["sha256"] for row in listed] == [theirs["sha256"]]
            for method, path in (
                ("GET", "/v1/adapters/mine"),
                ("GET", "/v1/adapters/mine/versions"),
                ("GET", "/v1/adapters/mine/versions/1"),
                ("DELETE", "/v1/adapters/mine"),
                ("GET", "/v1/tasks/ask"),
                ("DELETE", "/v1/tasks/ask"),
            ):
                assert_problem(await api.client.request(method, path, headers=headers), 404)
            path, first = "/v1/adapters/mine/rollback", {"version": 1}
            assert_problem(await api.client.post(path, json=first, headers=headers), 404)
            mine = {"model": "mine"}
            assert_problem(await api.client.put("/v1/tasks/t", json=mine, headers=headers), 404)
            assert (await api.client.get("/v1/tasks", headers=headers)).json()["data"] == []
            no_key = await upload(api, "x", tiny(tmp_path / "4", seed=4))
            assert_problem(no_key, 401)


async def test_what_is_no_archive_is_refused(api: Api, tmp_path: Path) -> None:
    files = {"file": ("adapter.tar.gz", b"PK not really")}
    response = await api.client.post("/v1/adapters", data={"name": "x"}, files=files)
    assert assert_problem(response, 422)["code"] == "adapter_rejected"
    archive = tarred(tiny(tmp_path / "cut"))
    files = {"file": ("adapter.tar.gz", archive[: len(archive) // 2])}
    response = await api.client.post("/v1/adapters", data={"name": "x"}, files=files)
    assert assert_problem(response, 422)["code"] == "adapter_rejected"
