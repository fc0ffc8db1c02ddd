"""The adapter store: weights addressed by their content and never changed.

A version's address is the SHA-256 of its manifest, which names each file with its own SHA-256. So
one number, kept in Postgres, vouches for every byte that a worker loads. Objects lie under
`adapters/<sha256>/`, the manifest written last: an adapter is there once its manifest is.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from core.errors import AdapterInvalid
from db.blobs import CHUNK_BYTES, Blobs

#: What belongs to an adapter. Training leaves more behind (optimizer state, logs): not stored.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
REQUIRED_FILES = ADAPTER_FILES[:2]
_MANIFEST: Final = "manifest.json"
#: Where adapters lie; before 0.2 they lay at the top, and are still read from there.
_PREFIX: Final = "adapters/"
_PREFIXES: Final = (_PREFIX, "")


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter's address and the size of its files in bytes."""

    sha256: str
    size_bytes: int


class Store:
    """Adapters in the blob store that every API and worker can reach. Everything blocks."""

    def __init__(self, blobs: Blobs, url: str = "") -> None:
        self._blobs = blobs
        self._url = url

    @classmethod
    def open(cls, url: str) -> Self:
        """The store behind `LORRY_STORE_URL`.

        Raises:
            UsageError: an address that cannot be used.
        """
        return cls(Blobs.open(url), url)

    def put(self, folder: Path) -> StoredAdapter:
        """Copy an adapter's files in; the same content is there only once.

        What is there already is read through: files damaged since then are written again.

        Raises:
            AdapterInvalid: the folder is missing, or lacks a file that an adapter needs.
        """
        manifest, stored = _address(folder)
        if not self._is_whole(stored.sha256, manifest):
            for path in adapter_files(folder):
                with (
                    path.open("rb") as source,
                    self._blobs.write(f"{_PREFIX}{stored.sha256}/{path.name}") as target,
                ):
                    shutil.copyfileobj(source, target, CHUNK_BYTES)
            with self._blobs.write(f"{_PREFIX}{stored.sha256}/{_MANIFEST}") as target:
                target.write(json.dumps(manifest, indent=1).encode())
        return stored

    def has(self, sha256: str) -> bool:
        """Whether an adapter is there, whole."""
        return self._place(sha256) is not None

    def fetch(self, sha256: str, into: Path) -> Path:
        """A verified local copy of an adapter, made below `into` unless it is there.

        The copy is verified byte for byte as it is made, and appears whole or not at all.

        Raises:
            AdapterInvalid: the store lacks it, or its bytes are not those of the address.
        """
        target = into.absolute() / sha256
        if target.exists():
            return target
        place = self._place(sha256)
        if place is None:
            raise AdapterInvalid(f"adapter {sha256} is not in the store {self._url}")
        manifest = self._manifest(place)
        if manifest_sha256(manifest) != sha256:
            raise AdapterInvalid(f"adapter {sha256}: its manifest in the store was changed")
        into.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".incoming-", dir=into))
        try:
            for name, expected in manifest.items():
                if self._copy_out(f"{place}/{name}", scratch / name) != expected:
                    raise AdapterInvalid(f"adapter {sha256}: {name} in the store was changed")
            _move_into_place(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def delete(self, sha256: str) -> None:
        """Remove an adapter, its manifest first; nothing happens where there is none."""
        for prefix in _PREFIXES:
            # every name that there can be: no damage or deletion cut short may keep files
            for name in (_MANIFEST, *ADAPTER_FILES):
                self._blobs.delete(f"{prefix}{sha256}/{name}")

    def _is_whole(self, sha256: str, manifest: dict[str, str]) -> bool:
        """Whether an adapter is there, byte for byte."""
        place = self._place(sha256)
        try:
            return (
                place is not None
                and self._manifest(place) == manifest
                and all(self._sha256(f"{place}/{name}") == manifest[name] for name in manifest)
            )
        except (AdapterInvalid, FileNotFoundError):
            return False

    def _sha256(self, key: str) -> str:
        with self._blobs.read(key) as source:
            digest = hashlib.sha256()
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def _place(self, sha256: str) -> str | None:
        places = (f"{prefix}{sha256}" for prefix in _PREFIXES)
        return next((p for p in places if self._blobs.exists(f"{p}/{_MANIFEST}")), None)

    def _manifest(self, place: str) -> dict[str, str]:
        try:
            with self._blobs.read(f"{place}/{_MANIFEST}") as file:
                manifest: dict[str, str] = json.loads(file.read())
        except ValueError as error:
            raise AdapterInvalid(f"{place}: its manifest in the store is broken") from error
        if not set(manifest) <= set(ADAPTER_FILES):  # a name is a path on a worker's disk
            raise AdapterInvalid(f"{place}: its manifest in the store was changed")
        return manifest

    def _copy_out(self, key: str, target: Path) -> str:
        """Copy an object to a local file; returns its SHA-256."""
        digest = hashlib.sha256()
        with self._blobs.read(key) as source, target.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()


def address(folder: Path) -> StoredAdapter:
    """The address that a folder's files have in any store. Blocking. Raises AdapterInvalid."""
    return _address(folder)[1]


def _address(folder: Path) -> tuple[dict[str, str], StoredAdapter]:
    files = adapter_files(folder)
    manifest = {path.name: file_sha256(path) for path in files}
    size = sum(path.stat().st_size for path in files)
    return manifest, StoredAdapter(manifest_sha256(manifest), size)


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter folder that are kept, or AdapterInvalid saying what is missing."""
    if not folder.is_dir():
        raise AdapterInvalid(f"adapter folder {folder} does not exist")
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            raise AdapterInvalid(
                f"adapter folder {folder} holds no {name}: give the folder that PEFT's "
                "save_pretrained() wrote"
            )
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]


def file_sha256(path: Path) -> str:
    """The hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_sha256(manifest: dict[str, str]) -> str:
    """The content address of an adapter whose files have these hashes."""
    lines = "".join(f"{manifest[name]}  {name}\n" for name in sorted(manifest))
    return hashlib.sha256(lines.encode()).hexdigest()


def _move_into_place(scratch: Path, target: Path) -> None:
    os.chmod(scratch, 0o755)  # noqa: S103 - mkdtemp makes it private; weights are not
    try:
        os.replace(scratch, target)
    except OSError:
        if not target.exists():  # else another process was first, with the same content
            raise
