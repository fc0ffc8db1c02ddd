"""Archives and pickles as an attacker, or an accident, would make them."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.adapters import Draft
from tests.support.bad_adapters import Bad


def _inside(folder: Path) -> Path:
    return Draft(layers=range(1)).write(folder / "inside")


@contextmanager
def _tar(folder: Path) -> Iterator[tarfile.TarFile]:
    """A right adapter in adapter.tar.gz, and what the block adds."""
    inside = _inside(folder)
    with tarfile.open(folder / "adapter.tar.gz", "w:gz") as archive:
        archive.add(inside, "run")
        yield archive


def _tar_with(code: str, word: str, **entry: Any) -> Bad:
    def write(folder: Path) -> Path:
        with _tar(folder) as archive:
            info = tarfile.TarInfo(entry["name"])
            for name, value in entry.items():
                setattr(info, name, value)
            archive.addfile(info, io.BytesIO(b"\0" * info.size))
        return folder / "adapter.tar.gz"

    return Bad(write, code, word)


def _zip_with(code: str, word: str, add: Callable[[zipfile.ZipFile], object]) -> Bad:
    def write(folder: Path) -> Path:
        inside = _inside(folder)
        with zipfile.ZipFile(folder / "adapter.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in inside.iterdir():
                archive.write(path, path.name)
            add(archive)
        return folder / "adapter.zip"

    return Bad(write, code, word)


def _linked(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("README.md")
    entry.external_attr = 0o120777 << 16
    archive.writestr(entry, "/etc/passwd")


def _twice(archive: zipfile.ZipFile) -> None:
    archive.writestr("README.md", b"one")
    with warnings.catch_warnings(action="ignore"):  # Python's own says what we are about to
        archive.writestr("README.md", b"two")


def _bomb(archive: zipfile.ZipFile) -> None:
    with archive.open("tokenizer.json", "w") as file:
        for _ in range(100):
            file.write(b" " * 1024**2)


def _encrypted(folder: Path) -> Path:
    path = _zip_with("", "", lambda archive: archive.writestr("README.md", b"x")).write(folder)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the last entry's record in the directory
    content[at + 8] |= 1
    path.write_bytes(content)
    return path


def _gzip_bomb(folder: Path) -> Path:
    """1 GiB of zeros in 1 MB, as a file that would be dropped anyway."""
    info = tarfile.TarInfo("run/optimizer.pt")
    info.size = 1024**3
    with gzip.open(folder / "adapter.tar.gz", "wb", compresslevel=6) as file:
        file.write(info.tobuf())
        for _ in range(1024):
            file.write(b"\0" * 1024**2)
    return folder / "adapter.tar.gz"


def _header_bomb(folder: Path) -> Path:
    """An entry whose attributes alone have 200 MB, which tarfile would take into memory."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 200 * 1024**2
    with gzip.open(folder / "adapter.tar.gz", "wb", compresslevel=1) as file:
        file.write(info.tobuf())
        for _ in range(200):
            file.write(b"\0" * 1024**2)
    return folder / "adapter.tar.gz"


def _many(folder: Path) -> Path:
    with tarfile.open(folder / "adapter.tar.gz", "w:gz", compresslevel=1) as archive:
        for number in range(20_001):
            archive.addfile(tarfile.TarInfo(f"run/{number}"))
    return folder / "adapter.tar.gz"


def _many_zipped(folder: Path) -> Path:
    """A directory of 13 MB, which zipfile would turn into many times that of objects."""
    name = b"0" * 154
    entry = b"PK\1\2" + bytes(24) + len(name).to_bytes(2, "little") + bytes(16) + name
    count = 65_535
    ending = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, count * len(entry), 0, 0)
    (folder / "adapter.zip").write_bytes(entry * count + ending)
    return folder / "adapter.zip"


def _cut(folder: Path) -> Path:
    with _tar(folder):
        pass
    path = folder / "adapter.tar.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _text(folder: Path) -> Path:
    (folder / "adapter.tar.gz").write_text("not found\n")
    return folder / "adapter.tar.gz"


def _in_folder(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return write(folder)

    return made


class _Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def bin_adapter(folder: Path, content: Callable[[Path], None]) -> Path:
    """A right configuration beside an adapter_model.bin that `content` writes."""
    Draft(layers=range(1)).write(folder)
    (folder / "adapter_model.safetensors").unlink()
    content(folder / "adapter_model.bin")
    return folder


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _evil(folder: Path) -> Path:
    mark = folder / "README.md"
    return bin_adapter(folder, lambda path: _write(path, pickle.dumps(_Evil(mark))))


def _saved(make: Callable[[Any], Any]) -> Callable[[Path], Path]:
    import torch

    return lambda folder: bin_adapter(folder, lambda path: torch.save(make(torch), path))


_LINK = {"name": "run/README.md", "linkname": "/etc/passwd"}
BAD_ARCHIVES: dict[str, Bad] = {
    "a symbolic link": _tar_with("archive_entry", "link", **_LINK, type=tarfile.SYMTYPE),
    "a hard link": _tar_with("archive_entry", "link", **_LINK, type=tarfile.LNKTYPE),
    "a device": _tar_with("archive_entry", "device", name="run/null", type=tarfile.CHRTYPE),
    "a pipe": _tar_with("archive_entry", "device", name="run/pipe", type=tarfile.FIFOTYPE),
    "an absolute path": _tar_with("archive_entry", "absolute", name="/etc/cron.d/x", size=4),
    "a parent path": _tar_with("archive_entry", "parent", name="run/../../x", size=4),
    "a parent folder": _tar_with("archive_entry", "parent", name="../run", type=tarfile.DIRTYPE),
    "a file twice": _tar_with("archive_entry", "twice", name="run/adapter_config.json", size=4),
    "a drive's path": _tar_with("archive_entry", "absolute", name="C:/x", size=4),
    "a gzip bomb": Bad(_in_folder(_gzip_bomb), "archive_too_large", "unpacks"),
    "attributes without end": Bad(_in_folder(_header_bomb), "archive_too_large", "headers"),
    "too many files": Bad(_in_folder(_many), "archive_too_large", "20000"),
    "a .zip that is all directory": Bad(_in_folder(_many_zipped), "archive_too_large", "20000"),
    "a .tar.gz cut off": Bad(_in_folder(_cut), "archive_format", "broken"),
    "a text file": Bad(_in_folder(_text), "archive_format", "neither"),
    "a link in a .zip": _zip_with("archive_entry", "link", _linked),
    "a parent path in a .zip": _zip_with(
        "archive_entry", "parent", lambda archive: archive.writestr("../x", b"x")
    ),
    "a backslash in a .zip": _zip_with(
        "archive_entry", "absolute", lambda archive: archive.writestr("..\\x", b"x")
    ),
    "a file twice in a .zip": _zip_with("archive_entry", "twice", _twice),
    "LZMA in a .zip": _zip_with(
        "archive_entry",
        "deflate",
        lambda archive: archive.writestr("x", b"x", compress_type=zipfile.ZIP_LZMA),
    ),
    "a zip bomb": _zip_with("archive_too_large", "tokenizer.json", _bomb),
    "an encrypted .zip": Bad(_in_folder(_encrypted), "archive_entry", "encrypted"),
}
BAD_PICKLES: dict[str, Bad] = {
    "a pickle that runs a command": Bad(_evil, "bin_conversion", "adapter_model.bin"),
    "a list for a state dict": Bad(
        lambda folder: _saved(lambda torch: [torch.ones(2)])(folder), "bin_conversion", "list"
    ),
    "a tensor of a terabyte": Bad(
        lambda folder: _saved(lambda torch: {"a": torch.ones(1).expand(2**38)})(folder),
        "bin_conversion",
        "expected at most",
    ),
    "a sparse tensor": Bad(
        lambda folder: _saved(lambda torch: {"a": torch.eye(2).to_sparse()})(folder),
        "bin_conversion",
        "plain",
    ),
    "no pickle": Bad(
        lambda folder: bin_adapter(folder, lambda path: _write(path, b"?" * 99)),
        "bin_conversion",
        "adapter_model.bin",
    ),
}
