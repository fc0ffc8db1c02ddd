"""The adapter store on a folder and on S3; the worker's cache below its limit."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import AdapterInvalid
from db.store import ADAPTER_FILES, Store
from tests.integration.test_blobs import s3_url  # noqa: F401  a fixture
from tests.support.jobs import fake_adapter
from workers.adapter_cache import AdapterCache


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    folder = str(tmp_path / "store")
    return Store.open(folder if request.param == "folder" else request.getfixturevalue("s3_url"))


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def test_what_is_put_is_fetched_and_only_that(store: Store, tmp_path: Path) -> None:
    source = fake_adapter(tmp_path / "sql")
    (source / "optimizer.pt").write_bytes(b"not ours")
    stored = store.put(source)
    assert store.put(source) == stored
    path = store.fetch(stored.sha256, tmp_path / "cache")
    assert sorted(file.name for file in path.iterdir()) == sorted(ADAPTER_FILES[:2])
    assert all((path / n).read_bytes() == (source / n).read_bytes() for n in ADAPTER_FILES[:2])
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [stored.sha256]


def test_a_deleted_adapter_is_gone_and_can_come_again(store: Store, tmp_path: Path) -> None:
    source = fake_adapter(tmp_path / "gone")
    stored = store.put(source)
    store.delete(stored.sha256)
    store.delete(stored.sha256)
    assert not store.has(stored.sha256)
    with pytest.raises(AdapterInvalid, match="is not in the store"):
        store.fetch(stored.sha256, tmp_path / "cache")
    assert store.put(source) == stored
    store.fetch(stored.sha256, tmp_path / "cache")


def test_changed_bytes_are_never_loaded(local: Store, tmp_path: Path) -> None:
    stored = local.put(fake_adapter(tmp_path / "sql"))
    place = tmp_path / "store" / "adapters" / stored.sha256
    (place / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(AdapterInvalid, match="safetensors in the store was changed"):
        local.fetch(stored.sha256, tmp_path / "cache")
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "../evil": "0" * 64}))
    with pytest.raises(AdapterInvalid, match="manifest in the store was changed"):
        local.fetch(stored.sha256, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "gone", "manifest"])
def test_a_damaged_adapter_is_mended_by_adding_it_again_and_can_be_deleted(
    local: Store, tmp_path: Path, damage: str
) -> None:
    source = fake_adapter(tmp_path / "sql")
    stored = local.put(source)
    place = tmp_path / "store" / "adapters" / stored.sha256

    def spoil() -> None:
        if damage == "gone":
            (place / "adapter_config.json").unlink()
        else:
            name = "manifest.json" if damage == "manifest" else "adapter_model.safetensors"
            (place / name).write_bytes(b"!")

    spoil()
    assert local.put(source) == stored
    local.fetch(stored.sha256, tmp_path / "cache")
    spoil()
    local.delete(stored.sha256)
    assert not place.exists()


def test_an_adapter_that_an_older_release_stored_is_still_read(
    local: Store, tmp_path: Path
) -> None:
    source = fake_adapter(tmp_path / "sql")
    stored = local.put(source)
    shutil.move(tmp_path / "store" / "adapters" / stored.sha256, tmp_path / "store")
    assert local.put(source) == stored
    assert local.fetch(stored.sha256, tmp_path / "cache").is_dir()
    local.delete(stored.sha256)
    assert not local.has(stored.sha256)


@pytest.fixture
def addresses(local: Store, tmp_path: Path) -> Iterator[list[str]]:
    yield [local.put(fake_adapter(tmp_path / f"a{number}")).sha256 for number in range(4)]


def test_the_cache_stays_below_its_limit_and_drops_the_least_recently_used(
    local: Store, tmp_path: Path, addresses: list[str]
) -> None:
    one = sum(f.stat().st_size for f in local.fetch(addresses[0], tmp_path / "size").iterdir())
    cache = AdapterCache(local, tmp_path / "cache", most_bytes=2 * one + one // 2)
    for seconds, sha256 in enumerate(addresses[:2]):
        cache.hold(sha256).release()
        os.utime(tmp_path / "cache" / sha256, (seconds, seconds))
    cache.hold(addresses[0]).release()  # used again: now the other is the oldest
    cache.hold(addresses[2]).release()
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert kept == {addresses[0], addresses[2]}


def test_what_a_worker_holds_is_never_deleted(
    local: Store, tmp_path: Path, addresses: list[str]
) -> None:
    first = AdapterCache(local, tmp_path / "cache", most_bytes=0)
    second = AdapterCache(local, tmp_path / "cache", most_bytes=0)  # another worker, same disk
    held = first.hold(addresses[0])
    assert second.tidy() == []
    assert held.path.is_dir()
    other = second.hold(addresses[1])
    assert held.path.is_dir()
    held.release()
    held.release()
    assert second.tidy() == [addresses[0]]
    assert other.path.is_dir()
    assert first.hold(addresses[0]).path.is_dir()  # fetched again
