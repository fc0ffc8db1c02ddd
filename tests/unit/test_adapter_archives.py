"""Archives and pickles of strangers: nothing leaves the scratch folder, nothing runs, nothing grows
without bound."""

import resource
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from core.errors import AdapterRejected
from db.adapter_package import PackageLimits, unpack
from tests.support.adapters import Draft
from tests.support.bad_adapters import Bad
from tests.support.bad_archives import BAD_ARCHIVES, BAD_PICKLES
from tests.support.good_adapters import GOOD

LIMITS = PackageLimits(adapter_bytes=256 * 1024**2, unpacked_bytes=512 * 1024**2)
_BAD = BAD_ARCHIVES | BAD_PICKLES


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("bad", _BAD.values(), ids=_BAD.keys())
def test_a_bad_archive_or_pickle_is_refused(bad: Bad, tmp_path: Path) -> None:
    source = bad.write(tmp_path / "source")
    before = _names(tmp_path)
    with pytest.raises(AdapterRejected) as refusal:
        unpack(source, tmp_path / "scratch", LIMITS)
    (finding,) = refusal.value.findings
    assert (finding.code, bad.word in finding.message) == (bad.code, True), finding
    added = _names(tmp_path) - before
    assert {name for name in added if not name.startswith("scratch")} == set()


@pytest.mark.parametrize(
    "name",
    ["a gzip bomb", "attributes without end", "a zip bomb", "a .zip that is all directory"],
)
def test_a_bomb_is_met_with_little_memory(name: str, tmp_path: Path) -> None:
    source = BAD_ARCHIVES[name].write(tmp_path / "source")
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected):
            unpack(source, tmp_path / "scratch", LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024**2
    finally:
        tracemalloc.stop()


def test_large_weights_are_looked_at_in_little_memory(tmp_path: Path) -> None:
    source = Draft(rank=256, layers=range(12)).write(tmp_path / "source")
    assert (source / "adapter_model.safetensors").stat().st_size > 40 * 1024**2
    tracemalloc.start()
    try:
        unpack(source, tmp_path / "scratch", LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 24 * 1024**2
    finally:
        tracemalloc.stop()


def test_a_folder_may_hold_links_to_files_as_a_hubs_cache_does(tmp_path: Path) -> None:
    blobs = Draft(layers=range(1)).write(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in blobs.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    package = unpack(tmp_path / "snapshot", tmp_path / "scratch", LIMITS)
    assert not any(path.is_symlink() for path in package.folder.iterdir())


def test_an_adapter_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    source = Draft(layers=range(2)).write(tmp_path / "source")
    with pytest.raises(AdapterRejected, match="expected at most 1000") as refusal:
        unpack(source, tmp_path / "scratch", PackageLimits(adapter_bytes=1000))
    assert refusal.value.findings[0].code == "file_too_large"


def test_the_converter_needs_torch_only_where_there_is_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API without torch: an interpreter that finds no packages stands in for it."""
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\nexec /usr/bin/env python3 -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    unpack(GOOD["PEFT 0.21"](tmp_path / "plain"), tmp_path / "scratch", LIMITS)
    with pytest.raises(AdapterRejected, match="convert it where it was trained") as refusal:
        unpack(GOOD["adapter_model.bin"](tmp_path / "pickled"), tmp_path / "again", LIMITS)
    assert refusal.value.findings[0].code == "bin_needs_torch"


def test_this_process_keeps_its_own_limits(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    unpack(GOOD["adapter_model.bin"](tmp_path / "source"), tmp_path / "scratch", LIMITS)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_zip_whose_paths_begin_at_a_dot_is_an_adapter(tmp_path: Path) -> None:
    """As bsdtar's `tar -a -cf adapter.zip .` makes it."""
    inside = Draft().write(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "adapter.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("./"), b"")
        for path in inside.iterdir():
            archive.writestr(zipfile.ZipInfo(f"./{path.name}"), path.read_bytes())
    package = unpack(tmp_path / "adapter.zip", tmp_path / "out", LIMITS)
    name = "adapter_config.json"
    assert (package.folder / name).read_bytes() == (inside / name).read_bytes()
