"""The worker's disk: verified adapter folders below one size, the least recently used gone first.

Several workers may share the folder. Who uses an adapter holds a shared lock on its folder, since
vLLM may read it again long after it was loaded; only a folder that nobody holds is deleted.
"""

import fcntl
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from db.store import Store

log = logging.getLogger(__name__)

#: Of folders on their way out: no adapter's address begins so.
_LEAVING: Final = ".leaving-"


class HeldAdapter:
    """A local adapter folder that no process deletes until `release`.

    `fetched` tells whether it was brought for this hold or lay there.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.fetched = False
        self._lock = lock

    def release(self) -> None:
        """Let it go. Idempotent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


class AdapterCache:
    """Verified copies of adapters below one folder. Everything blocks.

    Args:
        most_bytes: what the folders may take together. Adapters in use count and stay, so that
            the sum can be larger while they alone are.
    """

    def __init__(self, store: Store, folder: Path, most_bytes: int) -> None:
        self._store = store
        self._folder = folder.absolute()
        self._most_bytes = most_bytes
        #: how many copies `tidy` has deleted
        self.evictions = 0

    def hold(self, sha256: str) -> HeldAdapter:
        """A verified local copy, fetched if need be, and held.

        Raises:
            AdapterInvalid: the store lacks it, or its bytes are not those of the address.
            OSError: the store or the disk failed.
        """
        while True:
            fetched = not (self._folder / sha256).exists()
            path = self._store.fetch(sha256, self._folder)
            held = _lock(path)
            if held is None:
                continue  # deleted in between: fetch it again
            os.utime(path)
            held.fetched = fetched
            if fetched:
                self.tidy()
            return held

    def tidy(self) -> list[str]:
        """Delete what was used least recently, down to the limit; returns the addresses."""
        entries = sorted(
            (entry for entry in self._entries()), key=lambda entry: entry.stat().st_mtime
        )
        sizes = {entry: sum(f.stat().st_size for f in entry.iterdir()) for entry in entries}
        excess, gone = sum(sizes.values()) - self._most_bytes, []
        for entry in entries:
            if excess <= 0:
                break
            if self._delete(entry):
                excess -= sizes[entry]
                gone.append(entry.name)
        self.evictions += len(gone)
        if gone:
            log.info(
                "Deleted %d adapters from the cache",
                len(gone),
                extra={"action": "cache_tidied", "adapters": len(gone)},
            )
        return gone

    def _entries(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return [e for e in self._folder.iterdir() if e.is_dir() and not e.name.startswith(".")]
        return []

    def _delete(self, entry: Path) -> bool:
        """Delete a folder that nobody holds."""
        leaving = entry.with_name(f"{_LEAVING}{os.getpid()}-{entry.name}")
        try:
            lock = os.open(entry, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(entry, leaving)
        except BlockingIOError:
            return False
        except FileNotFoundError:  # another worker tidies too
            return True
        finally:
            os.close(lock)
        shutil.rmtree(leaving, ignore_errors=True)
        return True


def _lock(path: Path) -> HeldAdapter | None:
    """Hold a folder; None where it was deleted before the lock was had."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        if path.stat().st_ino == os.fstat(lock).st_ino:
            return HeldAdapter(path, lock)
    except FileNotFoundError:
        pass
    os.close(lock)
    return None
