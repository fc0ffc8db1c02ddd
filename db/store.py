"""The adapter store: folders of weights, addressed by their content and never changed.

A version's address is the SHA-256 of its manifest, which names each file with its own SHA-256. So
one number, kept in Postgres, vouches for every byte that a worker loads.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlparse

from core.errors import AdapterInvalid, UsageError

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
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter's address and the size of its files in bytes."""

    sha256: str
    size_bytes: int


class Store:
    """A folder that every API and worker can reach (object stores come later)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def open(cls, url: str) -> Self:
        """The store behind `LORRY_STORE_URL`: a folder's path or a `file://` address.

        Raises:
            UsageError: an address of another kind.
        """
        parsed = urlparse(url)
        if parsed.scheme not in ("", "file"):
            raise UsageError(
                f"LORRY_STORE_URL={url!r}: {parsed.scheme}:// is not supported yet; "
                "give a folder that the API and every worker can reach"
            )
        root = Path(unquote(parsed.path) if parsed.scheme else url).absolute()
        root.mkdir(parents=True, exist_ok=True)
        return cls(root)

    def put(self, folder: Path) -> StoredAdapter:
        """Copy an adapter's files in; a folder with the same content is there only once.

        Blocking. Half-copied folders are never visible: the finished copy is renamed into place.

        Raises:
            AdapterInvalid: the folder is missing, or lacks a file that an adapter needs.
        """
        files = adapter_files(folder)
        manifest = {path.name: file_sha256(path) for path in files}
        sha256 = manifest_sha256(manifest)
        size = sum(path.stat().st_size for path in files)
        target = self._root / sha256
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix=".incoming-", dir=self._root))
            for path in files:
                shutil.copyfile(path, scratch / path.name)
            (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            _move_into_place(scratch, target)
        return StoredAdapter(sha256, size)

    def fetch(self, sha256: str, cache: Path) -> Path:
        """A verified local copy of an adapter, fetched unless the cache holds one.

        Blocking. The copy is verified byte for byte as it is made.

        Args:
            sha256: the version's address.
            cache: a local folder that belongs to Lorry.

        Raises:
            AdapterInvalid: the store lacks it, or its bytes are not those of the address.
        """
        target = cache.absolute() / sha256
        if target.exists():
            return target
        source = self._root / sha256
        if not (source / _MANIFEST).exists():
            raise AdapterInvalid(f"adapter {sha256} is not in the store {self._root}")
        manifest: dict[str, str] = json.loads((source / _MANIFEST).read_text())
        if manifest_sha256(manifest) != sha256:
            raise AdapterInvalid(f"adapter {sha256}: its manifest in the store was changed")
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".incoming-", dir=cache))
        for name, expected in manifest.items():
            shutil.copyfile(source / name, scratch / name)
            if file_sha256(scratch / name) != expected:
                shutil.rmtree(scratch)
                raise AdapterInvalid(f"adapter {sha256}: {name} in the store was changed")
        _move_into_place(scratch, target)
        return target


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
        if not target.exists():
            raise
        shutil.rmtree(scratch)  # another process was first, with the same content
