"""The blob store behind `LORRY_STORE_URL`: bytes under keys, in a folder or an object store.

Adapters, uploaded files and batches' results lie here, never in Postgres. Everything blocks: call
it from a thread.
"""

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from core.errors import UsageError

#: Bytes moved at once when a caller streams.
CHUNK_BYTES = 1024 * 1024


class Blobs:
    """Whole objects under keys such as `files/3f…/input.jsonl`, written once.

    An object store's credentials and endpoint come from where its own clients look for them
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …).
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._local = isinstance(filesystem, LocalFileSystem)

    @classmethod
    def open(cls, url: str) -> Self:
        """The store at a folder's path or an address that fsspec knows (`s3://bucket/prefix`).

        Raises:
            UsageError: an unknown kind of address, or one whose client is not installed.
        """
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"LORRY_STORE_URL={url!r} cannot be used ({error}): give a folder that the API and "
                "every worker can reach, or s3://bucket/prefix with `pip install lorry[s3]`"
            ) from None
        if isinstance(filesystem, LocalFileSystem):
            Path(root).mkdir(parents=True, exist_ok=True)
        return cls(filesystem, root)

    @contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        """A file to write; the object appears, whole, when the block ends without an error."""
        path = self._path(key)
        if self._local:
            with self._write_local(Path(path)) as file:
                yield file
            return
        # an object store shows an object only once its upload is complete
        file = self._fs.open(path, "wb", autocommit=False)
        try:
            yield cast(BinaryIO, file)
        except BaseException:
            file.close()
            file.discard()
            raise
        file.close()
        file.commit()

    @contextmanager
    def _write_local(self, path: Path) -> Iterator[BinaryIO]:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.incoming")
        try:
            with scratch.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    @contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        """An object to read from its beginning; it can be sought.

        Raises:
            FileNotFoundError: there is none under this key.
        """
        with self._fs.open(self._path(key), "rb") as file:
            yield cast(BinaryIO, file)

    def exists(self, key: str) -> bool:
        """Whether there is an object under this key."""
        return bool(self._fs.isfile(self._path(key)))

    def size(self, key: str) -> int:
        """An object's bytes. Raises FileNotFoundError."""
        return int(self._fs.size(self._path(key)))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none.

        In a folder, what writes of it that were killed left behind goes too.
        """
        path = self._path(key)
        if self._local:
            for scratch in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.incoming"):
                scratch.unlink(missing_ok=True)
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            pass
        if self._local:
            _remove_if_empty(Path(path).parent)

    def _path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"bad key {key!r}")
        return f"{self._root}/{key}"


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # others are in it, or it never was
