"""The blob store: a folder, and a local S3-compatible server, behave alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from core.errors import UsageError
from core.settings import Settings
from db.blobs import Blobs
from db.database import Database
from tests.support.api import RecordingDoorbell, running_api
from workers.steward.batches import BatchDuties


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="lorry")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield "s3://lorry/store"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    found: str = request.getfixturevalue("s3_url")
    return found


@pytest.fixture
def blobs(store_url: str) -> Blobs:
    return Blobs.open(store_url)


@pytest.mark.parametrize("size", [0, 11, 12 * 1024 * 1024])
def test_what_is_written_is_read(blobs: Blobs, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with blobs.write(f"files/{size}/input") as file:
        file.write(content)
    assert blobs.size(f"files/{size}/input") == size
    with blobs.read(f"files/{size}/input") as file:
        assert file.read() == content
        file.seek(size // 2)
        assert file.read() == content[size // 2 :]


def test_nothing_is_seen_of_a_write_that_broke(blobs: Blobs) -> None:
    with pytest.raises(ConnectionError), blobs.write("files/broken") as file:
        file.write(b"half")
        raise ConnectionError
    assert not blobs.exists("files/broken")
    with pytest.raises(FileNotFoundError), blobs.read("files/broken"):
        pass


def test_nothing_is_left_behind_in_a_folder(tmp_path: Path) -> None:
    blobs = Blobs.open(str(tmp_path))
    with pytest.raises(ConnectionError), blobs.write("a/b") as file:
        file.write(b"half")
        raise ConnectionError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_deleted_object_is_gone_and_deleting_again_is_nothing(blobs: Blobs) -> None:
    with blobs.write("gone") as file:
        file.write(b"x")
    blobs.delete("gone")
    blobs.delete("gone")
    assert not blobs.exists("gone")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x"])
def test_a_key_never_leaves_the_store(blobs: Blobs, key: str) -> None:
    with pytest.raises(ValueError, match="bad key"):
        blobs.exists(key)


def test_an_unknown_kind_of_address_is_refused() -> None:
    with pytest.raises(UsageError, match="LORRY_STORE_URL='gopher://x'"):
        Blobs.open("gopher://x")


async def test_a_batch_lives_in_either_store(
    database: Database, database_url: str, store_url: str
) -> None:
    """Upload, ranges, validation, results, deletion: through the API and a steward."""
    settings = Settings(store_url=store_url, max_file_bytes=9_000_000)
    duties = BatchDuties(database, RecordingDoorbell(), settings)
    content = b"no json\n" * 900_000  # more than one part of a multipart upload
    async with running_api(database_url, store_url=store_url, max_file_bytes=9_000_000) as api:
        form: dict[str, Any] = {"data": {"purpose": "batch"}}
        sent = await api.client.post("/v1/files", files={"file": ("x", content)}, **form)
        path = f"/v1/files/{sent.json()['id']}"
        got = await api.client.get(f"{path}/content", headers={"Range": "bytes=-9000"})
        assert got.status_code == 206
        assert got.content == content[-9000:]
        too_long = {"file": ("x", content + b"x" * 3_000_000)}
        assert (await api.client.post("/v1/files", files=too_long, **form)).status_code == 413
        body = {
            "input_file_id": sent.json()["id"],
            "endpoint": "/v1/completions",
            "completion_window": "1h",
        }
        failed = (await api.client.post("/v1/batches", json=body)).json()
        few = await api.client.post("/v1/files", files={"file": ("x", content[:80])}, **form)
        body |= {"input_file_id": few.json()["id"], "skip_invalid": True}
        skipped = (await api.client.post("/v1/batches", json=body)).json()
        await duties.validate()
        await duties.settle()
        ends = [
            (await api.client.get(f"/v1/batches/{batch['id']}")).json()
            for batch in (failed, skipped)
        ]
        assert [batch["status"] for batch in ends] == ["failed", "completed"]
        errors = await api.client.get(f"/v1/files/{ends[1]['error_file_id']}/content")
        assert len(errors.text.splitlines()) == 10
        assert (await api.client.delete(path)).json()["deleted"]
        assert (await api.client.get(f"{path}/content")).status_code == 404
    assert await database.fetch_value("SELECT count(*) FROM files WHERE state = 'ready'") == 2
