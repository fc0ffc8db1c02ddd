"""/v1/files: what is uploaded is read, limits hold, and nothing is left of what failed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.ids import IdPrefix, new_id, parse_id
from core.settings import Settings
from db import files
from db.database import Database
from tests.support.api import Api, RecordingDoorbell, count, running_api
from workers.steward.batches import BatchDuties

CONTENT = b'{"custom_id": "a"}\n' * 1000


@pytest.fixture
async def api(database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(
        database_url, store_url=str(tmp_path / "store"), max_file_bytes=3_000_000
    ) as running:
        yield running


async def upload(api: Api, content: bytes = CONTENT, **fields: Any) -> Any:
    return await api.client.post(
        "/v1/files",
        files={"file": ("in.jsonl", content)},
        data={"purpose": "batch", **fields},
    )


def stored(folder: Path) -> list[Path]:
    return list((folder / "store").rglob("*"))


async def test_what_is_uploaded_is_read(api: Api) -> None:
    content = bytes(range(256)) * 10_000
    uploaded = (await upload(api, content)).json()
    assert uploaded["object"] == "file"
    assert uploaded["bytes"] == len(content)
    assert uploaded["filename"] == "in.jsonl"
    assert uploaded["purpose"] == "batch"
    assert uploaded["expires_at"] == uploaded["created_at"] + 30 * 86_400
    path = f"/v1/files/{uploaded['id']}"
    assert (await api.client.get(path)).json() == uploaded
    got = await api.client.get(f"{path}/content")
    assert got.status_code == 200
    assert got.content == content


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-99", 0, 100), ("bytes=100-", 100, None), ("bytes=-7", -7, None)],
)
async def test_a_range_of_it_is_read(api: Api, asked: str, start: int, end: int | None) -> None:
    path = f"/v1/files/{(await upload(api)).json()['id']}/content"
    got = await api.client.get(path, headers={"Range": asked})
    assert got.status_code == 206
    assert got.content == CONTENT[start:end]
    assert got.headers["content-range"].endswith(f"/{len(CONTENT)}")


async def test_a_range_outside_is_refused(api: Api) -> None:
    path = f"/v1/files/{(await upload(api)).json()['id']}/content"
    got = await api.client.get(path, headers={"Range": "bytes=999999-"})
    assert got.status_code == 416
    assert got.json()["error"]["code"] == "range_not_satisfiable"


async def test_the_list_pages(api: Api) -> None:
    ids = [(await upload(api)).json()["id"] for _ in range(5)]
    page = (await api.client.get("/v1/files", params={"limit": 2})).json()
    assert [file["id"] for file in page["data"]] == ids[:2:-1]
    assert page["has_more"]
    rest = await api.client.get("/v1/files", params={"limit": 3, "after": page["last_id"]})
    assert [file["id"] for file in rest.json()["data"]] == ids[2::-1]
    assert not rest.json()["has_more"]
    oldest = await api.client.get("/v1/files", params={"order": "asc", "purpose": "batch"})
    assert [file["id"] for file in oldest.json()["data"]] == ids
    other = await api.client.get("/v1/files", params={"purpose": "batch_output"})
    assert other.json()["data"] == []


async def test_a_deleted_file_is_gone(api: Api, tmp_path: Path) -> None:
    path = f"/v1/files/{(await upload(api)).json()['id']}"
    deleted = await api.client.delete(path)
    assert deleted.json()["deleted"] is True
    for response in (
        await api.client.get(path),
        await api.client.get(f"{path}/content"),
        await api.client.delete(path),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert [p for p in stored(tmp_path) if p.is_file()] == []


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"purpose": "fine-tune"}, "purpose", "fine-tune"),
        ({"colour": "red"}, "colour", "colour"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, None, "3600"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, None, "created_at"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_left(
    api: Api, tmp_path: Path, database: Database, fields: dict[str, Any], param: Any, word: str
) -> None:
    response = await upload(api, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert word in error["message"]
    assert param is None or error["param"] == param
    assert [p for p in stored(tmp_path) if p.is_file()] == []
    assert await count(database, "files") == 0


async def test_the_expiry_asked_for_is_kept(api: Api) -> None:
    fields: Any = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    uploaded = (await upload(api, **fields)).json()
    assert uploaded["expires_at"] == uploaded["created_at"] + 3600


async def test_without_retention_a_file_stays_for_ever(database_url: str, tmp_path: Path) -> None:
    async with running_api(
        database_url, store_url=str(tmp_path / "store"), retention_seconds=0
    ) as api:
        uploaded = (await upload(api)).json()
        assert uploaded["expires_at"] is None
        assert (await api.client.get(f"/v1/files/{uploaded['id']}")).status_code == 200


async def test_an_expired_file_is_gone_and_its_bytes_are_swept(
    api: Api, database: Database, tmp_path: Path
) -> None:
    path = f"/v1/files/{(await upload(api)).json()['id']}"
    kept = (await upload(api)).json()["id"]
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE files SET expires_at = now() WHERE id <> $1", parse_id(IdPrefix.FILE, kept)
        )
    for gone in (path, f"{path}/content"):
        assert (await api.client.get(gone)).status_code == 404
    listed = (await api.client.get("/v1/files")).json()["data"]
    assert [file["id"] for file in listed] == [kept]
    assert len([p for p in stored(tmp_path) if p.is_file()]) == 2
    settings = Settings(store_url=str(tmp_path / "store"))
    duties = BatchDuties(database, RecordingDoorbell(), settings)
    await duties.sweep_files()
    assert len([p for p in stored(tmp_path) if p.is_file()]) == 1
    async with database.connection() as connection:
        await connection.execute("UPDATE files SET touched_at = now() - interval '1 day'")
    await duties.sweep_files()
    assert await count(database, "files") == 1


async def test_a_file_beyond_the_limit_is_refused_and_not_kept(
    api: Api, tmp_path: Path, database: Database
) -> None:
    response = await upload(api, b"x" * 3_000_001)
    assert response.status_code == 413
    assert "LORRY_MAX_FILE_BYTES" in response.json()["error"]["message"]
    assert [p for p in stored(tmp_path) if p.is_file()] == []
    assert await count(database, "files") == 0
    assert (await upload(api, b"x" * 3_000_000)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b\r\n",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf of it',
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
        b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf of it',
        b"no form at all",
    ],
)
async def test_a_broken_form_is_refused(api: Api, database: Database, body: bytes) -> None:
    response = await api.client.post(
        "/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_upload"
    assert await count(database, "files") == 0


async def test_files_of_another_tenant_are_not_there(api: Api, database: Database) -> None:
    path = f"/v1/files/{(await upload(api)).json()['id']}"
    async with database.connection() as connection:
        await connection.execute("UPDATE files SET tenant_id = 2")
    assert (await api.client.get(path)).status_code == 404
    assert (await api.client.get(f"{path}/content")).status_code == 404
    assert (await api.client.delete(path)).status_code == 404
    assert (await api.client.get("/v1/files")).json()["data"] == []


async def test_a_dead_writers_file_is_taken_for_deletion(database: Database) -> None:
    dead, alive = new_id(), new_id()
    for file_id in (dead, alive):
        await files.begin(database, files.NewFile(file_id, 1, "batch", "x"))
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE files SET touched_at = now() - interval '1 hour' WHERE id = $1", dead
        )
    await files.touch(database, [alive])
    taken = await asyncio.gather(files.take_expired(database), files.take_expired(database))
    assert [file_id for ids in taken for file_id in ids] == [dead]


async def test_a_purpose_that_no_file_can_have_is_refused(api: Api) -> None:
    answer = await api.client.get("/v1/files", params={"purpose": "\0"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "purpose"
