"""Where an adapter's files come from: a folder, a tar file (gzipped or not) or a zip file.

Archives come from strangers. Nothing is extracted by the archive's own idea of paths: entries are
listed and judged first, then the few wanted ones are copied to names of ours, counted as they are
read. Links, devices, absolute and parent paths are refused, as is whatever expands beyond measure.
"""

import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import IO, Final, Protocol

from core.adapter_rules import Finding
from core.errors import AdapterRejected
from core.invalid import shown

_CHUNK_BYTES: Final = 1024 * 1024
_DIRECTORY_BYTES: Final = 5  # in what zipfile reads at a zip file's end
_ZIP_ENTRY_BYTES: Final = 512
_BUFFER_BYTES: Final = 64 * 1024
_TAR_HEADERS_BYTES: Final = 1024 * 1024  # names and attributes of one entry
_PLAIN_ZIP: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED: Final = 0x1
_SLACK_BYTES: Final = 64 * 1024 * 1024  # a small archive may be as dense as it likes
_BROKEN: Final = (
    tarfile.TarError,
    zipfile.BadZipFile,
    BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class PackageLimits:
    """How much an adapter's source may hold.

    Args:
        adapter_bytes: of the files that are kept.
        unpacked_bytes: of a whole archive, read to its end.
        ratio: unpacked bytes for each packed byte.
        entries: files and folders in an archive or a folder.
    """

    adapter_bytes: int = 4 * 1024**3
    unpacked_bytes: int = 64 * 1024**3
    ratio: int = 200
    entries: int = 20_000


class Source(Protocol):
    """A place with files."""

    def sizes(self) -> dict[str, int]:
        """Every regular file's path inside (`run/adapter_config.json`) and its size in bytes."""
        ...

    def copy(self, wanted: Mapping[str, Path]) -> None:
        """Write the files wanted, by path, to where they are wanted."""
        ...


@contextmanager
def open_source(path: Path, limits: PackageLimits) -> Iterator[Source]:
    """The source at a path, told apart by its content, not by its name.

    Raises:
        AdapterRejected: it is none of the three, or it is broken.
    """
    if path.is_dir():
        yield _Folder(path, limits)
        return
    if not path.is_file():
        raise refused("no_adapter", f"{path.name}: no such folder or archive")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(b"PK"):
            _check_directory(path, limits)
            with zipfile.ZipFile(path) as archive:
                yield _Zip(archive, limits)
        elif head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
            yield _Tar(path, limits)
        else:
            raise refused(
                "archive_format",
                f"{path.name}: neither a folder nor a .tar.gz, .tar or .zip archive; pack the "
                "adapter's folder as one of these",
            )
    except _BROKEN as error:
        raise refused(
            "archive_format",
            f"{path.name}: the archive is broken ({type(error).__name__}: {str(error)[:100]}); "
            "pack it again",
        ) from error


def refused(code: str, message: str) -> AdapterRejected:
    """A refusal for one reason."""
    return AdapterRejected([Finding(code, message)])


class _Folder:
    """A folder of the caller's own: a link to a file is a file, as in a hub's cache."""

    def __init__(self, root: Path, limits: PackageLimits) -> None:
        self._root, self._limits = root, limits

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for number, path in enumerate(self._root.rglob("*")):
            if number >= self._limits.entries:
                raise _too_many(self._limits.entries)
            if path.is_file():
                sizes[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return sizes

    def copy(self, wanted: Mapping[str, Path]) -> None:
        for name, target in wanted.items():
            with (self._root / name).open("rb") as file:
                _copy(file, target, self._limits.adapter_bytes)


class _Zip:
    def __init__(self, archive: zipfile.ZipFile, limits: PackageLimits) -> None:
        self._archive, self._limits = archive, limits

    def sizes(self) -> dict[str, int]:
        entries = self._archive.infolist()
        if len(entries) > self._limits.entries:
            raise _too_many(self._limits.entries)
        sizes: dict[str, int] = {}
        for entry in entries:
            mode = entry.external_attr >> 16
            kind = stat.S_IFMT(mode)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _bad_entry(entry.filename, "is a link or a device")
            if entry.flag_bits & _ENCRYPTED:
                raise _bad_entry(entry.filename, "is encrypted")
            if entry.compress_type not in _PLAIN_ZIP:
                raise _bad_entry(entry.filename, "is packed by a method other than deflate")
            if entry.is_dir():
                _check_path(entry.filename.rstrip("/"), root=True)
            else:
                _add(sizes, entry.filename.removeprefix("./"), entry.file_size)
        return sizes

    def copy(self, wanted: Mapping[str, Path]) -> None:
        entries = {entry.filename.removeprefix("./"): entry for entry in self._archive.infolist()}
        for name, target in wanted.items():
            entry = entries[name]
            limit = self._limits.ratio * entry.compress_size + _SLACK_BYTES
            with self._archive.open(entry) as file:
                _copy(file, target, min(limit, self._limits.adapter_bytes))


class _Tar:
    """Read twice, as a stream: once to list, once to copy."""

    def __init__(self, path: Path, limits: PackageLimits) -> None:
        self._path, self._limits = path, limits

    def sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for number, (entry, _) in enumerate(self._entries()):
            if number >= self._limits.entries:
                raise _too_many(self._limits.entries)
            if entry.isdir():
                _check_path(entry.name, root=True)
            elif entry.isreg() and not entry.issparse():
                _add(sizes, entry.name.removeprefix("./"), entry.size)
            else:
                raise _bad_entry(entry.name, "is a link, a device or a sparse file")
        return sizes

    def copy(self, wanted: Mapping[str, Path]) -> None:
        left = dict(wanted)
        for entry, file in self._entries():
            target = left.pop(entry.name.removeprefix("./"), None)
            if target is not None:
                assert file is not None
                _copy(file, target, self._limits.adapter_bytes)
            if not left:
                return

    def _entries(self) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
        with self._path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            packed = self._path.stat().st_size
            limit = min(self._limits.unpacked_bytes, self._limits.ratio * packed + _SLACK_BYTES)
            metered = _Metered(GzipFile(fileobj=raw) if zipped else raw, limit)
            # tarfile takes an entry's attributes into memory whole, however long they are
            metered.until(_TAR_HEADERS_BYTES)
            with tarfile.open(fileobj=metered, mode="r|", bufsize=_BUFFER_BYTES) as archive:
                while (entry := archive.next()) is not None:
                    metered.until(entry.offset_data + entry.size + _TAR_HEADERS_BYTES)
                    yield entry, archive.extractfile(entry) if entry.isreg() else None
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them all


class _Metered(io.RawIOBase):
    """A stream read up to its limit, and on the way no further than it was said to go."""

    def __init__(self, file: IO[bytes] | GzipFile, limit: int) -> None:
        self._file, self._limit = file, limit
        self._at, self._until = 0, 0

    def until(self, position: int) -> None:
        """Reading past this position, in bytes from the start, is refused from now on."""
        self._until = position + 2 * _BUFFER_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._at += len(chunk)
        if self._at > min(self._limit, self._until):
            raise refused(
                "archive_too_large",
                "the archive unpacks to more than an adapter could need (or its headers do): pack "
                "only the adapter's folder",
            )
        return chunk


def _check_directory(path: Path, limits: PackageLimits) -> None:
    """Judge a zip file's directory before zipfile takes it into memory whole."""
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # noqa: SLF001
    if end is not None and end[_DIRECTORY_BYTES] > limits.entries * _ZIP_ENTRY_BYTES:
        raise _too_many(limits.entries)


def _copy(file: IO[bytes], target: Path, limit: int) -> None:
    left = limit
    with target.open("xb") as out:
        while chunk := file.read(_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise refused(
                    "archive_too_large", f"{target.name}: unpacks to more than {limit} bytes"
                )
            out.write(chunk)


def _add(sizes: dict[str, int], name: str, size: int) -> None:
    _check_path(name)
    if name in sizes:
        raise _bad_entry(name, "stands twice in the archive")
    sizes[name] = size


def _check_path(name: str, *, root: bool = False) -> None:
    parts = name.split("/")
    if root and name in (".", "./", ""):
        return
    if root or name.startswith("./"):
        parts = [part for part in parts if part != "."]
    odd = "\\" in name or "\0" in name or (len(name) > 1 and name[1] == ":")
    if odd or any(part in ("", ".", "..") for part in parts):
        raise _bad_entry(name, "has an absolute path, a parent path or no plain one")


def _bad_entry(name: str, what: str) -> AdapterRejected:
    return refused(
        "archive_entry",
        f"the archive's entry {shown(name)} {what}, expected plain files in plain folders: pack "
        "the adapter's folder again",
    )


def _too_many(entries: int) -> AdapterRejected:
    return refused(
        "archive_too_large",
        f"more than {entries} files and folders: give the folder that holds "
        "adapter_config.json, without the checkpoints",
    )
