"""Adapter files on this worker's disk: fetched from the store, verified, ready to load.

Those of adapters that will probably be next are fetched ahead, so that a load does not wait for
the store.
"""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeAlias

from core.errors import AdapterInvalid, StoreUnavailable
from core.settings import Settings
from db.claims import version_files
from db.database import Database
from db.store import Store
from workers.adapter_cache import AdapterCache, HeldAdapter
from workers.engine.protocol import LocalAdapter
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)

#: Adapters whose files this worker holds on to at least: more than an engine keeps in memory.
FEWEST_HELD: Final = 64
#: Versions fetched ahead at once; what a load waits for comes on top.
FETCHES_AHEAD: Final = 2
#: Threads that fetch. Of their own: a store that hangs must not take those of everybody else.
FETCH_THREADS: Final = FETCHES_AHEAD + 2
#: How long a load waits for its files. It holds up every other load; the fetch itself goes on.
PATIENCE_SECONDS: Final = 2.0
#: The same where nobody else waits: for pinned adapters, and for probes.
LONG_PATIENCE_SECONDS: Final = 60.0
#: A version that could not be fetched ahead is left to its load for so long.
FAILED_PAUSE_SECONDS: Final = 10.0


#: A local adapter, and the hold on its files.
_Fetched: TypeAlias = tuple[LocalAdapter, HeldAdapter]


class AdapterFiles:
    """Turns an adapter version's id into a verified local folder.

    Args:
        held: how many adapters' files stay on the disk whatever the cache's limit: at least those
            that the engine may read again by itself, `max_cpu_loras`.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        cache: Path,
        *,
        cache_bytes: int = Settings.model_fields["adapter_cache_bytes"].default,
        held: int = FEWEST_HELD,
    ) -> None:
        self._database = database
        self._cache = AdapterCache(store, cache, cache_bytes)
        self._most_held = max(held, FEWEST_HELD)
        self._held: OrderedDict[int, tuple[LocalAdapter, HeldAdapter]] = OrderedDict()
        #: fetches under way: nobody fetches a version twice at once
        self._fetching: dict[int, asyncio.Task[_Fetched]] = {}
        self._wanted: deque[int] = deque()
        self._ahead: set[int] = set()
        self._failed_until: dict[int, float] = {}
        self._threads = ThreadPoolExecutor(FETCH_THREADS, "adapter-files")
        #: where fetches are counted
        self.metrics = DrainMetrics()

    async def local(
        self, adapter_version_id: int, patience_seconds: float = PATIENCE_SECONDS
    ) -> LocalAdapter:
        """The local copy of a version, fetched if need be (in a thread: it reads every byte).

        Args:
            patience_seconds: how long to wait for the fetch, which goes on by itself.

        Raises:
            AdapterInvalid: the version or its files are not there, or not as they were stored.
            StoreUnavailable: the store, or the local disk, cannot be read or written now, or has
                not brought the files yet.
            Unavailable: Postgres cannot be reached.
        """
        if known := self._held.get(adapter_version_id):
            self._held.move_to_end(adapter_version_id)
            return known[0]
        fetch = asyncio.shield(self._fetch_once(adapter_version_id))
        try:
            async with asyncio.timeout(patience_seconds):
                adapter, _ = await fetch
        except TimeoutError:
            raise StoreUnavailable(
                f"the files of adapter version {adapter_version_id} are still on their way from "
                f"the store after {patience_seconds:g} s"
            ) from None
        return adapter

    def ready(self, adapter_version_id: int) -> LocalAdapter | None:
        """The local copy of a version, if it is there."""
        known = self._held.get(adapter_version_id)
        return known[0] if known else None

    def prefetch(self, adapter_version_ids: Sequence[int]) -> None:
        """Fetch these ahead, in this order; what was wanted before and not begun is forgotten.

        Returns at once. Failures are left to the load that will meet them.
        """
        now = time.monotonic()
        self._failed_until = {i: t for i, t in self._failed_until.items() if t > now}
        self._wanted = deque(
            i for i in adapter_version_ids if i not in self._held and i not in self._failed_until
        )
        self._fetch_ahead()

    def close(self) -> None:
        """Fetch nothing more."""
        self._wanted.clear()
        for task in list(self._fetching.values()):
            task.cancel()

    def _fetch_ahead(self) -> None:
        while self._wanted and len(self._ahead) < FETCHES_AHEAD:
            version = self._wanted.popleft()
            if version not in self._held and version not in self._fetching:
                self._ahead.add(version)
                self._fetch_once(version)

    def _fetch_once(self, adapter_version_id: int) -> "asyncio.Task[_Fetched]":
        task = self._fetching.get(adapter_version_id)
        if task is None:
            task = asyncio.create_task(self._fetch(adapter_version_id))
            self._fetching[adapter_version_id] = task
            task.add_done_callback(lambda done: self._fetched(adapter_version_id, done))
        return task

    def _fetched(self, adapter_version_id: int, task: "asyncio.Task[_Fetched]") -> None:
        del self._fetching[adapter_version_id]
        self._ahead.discard(adapter_version_id)
        if task.cancelled():
            return  # the worker stops
        if (error := task.exception()) is None:
            self._keep(*task.result())
        else:
            self._failed_until[adapter_version_id] = time.monotonic() + FAILED_PAUSE_SECONDS
            log.debug("Adapter not fetched: %s", error, extra={"action": "fetch_failed"})
        self._fetch_ahead()

    async def _fetch(self, adapter_version_id: int) -> _Fetched:
        files = await version_files(self._database, adapter_version_id)
        if files is None:
            raise AdapterInvalid(f"adapter version {adapter_version_id} is not registered")
        try:
            started = time.monotonic()
            loop = asyncio.get_running_loop()
            copy = await loop.run_in_executor(self._threads, self._cache.hold, files.sha256)
        except FileNotFoundError as error:
            raise AdapterInvalid(f"adapter {files.sha256} lacks a file: {error}") from error
        except OSError as error:
            raise StoreUnavailable(
                f"adapter {files.sha256} cannot be fetched now: {error}"
            ) from error
        if copy.fetched:
            self.metrics.fetches.observe(time.monotonic() - started)
        self.metrics.cache_evictions = self._cache.evictions
        adapter = LocalAdapter(
            lora_int_id=adapter_version_id,
            lora_name=f"{adapter_version_id}-{files.sha256}",
            path=str(copy.path),
            sha256=files.sha256,
        )
        return adapter, copy

    def _keep(self, adapter: LocalAdapter, copy: HeldAdapter) -> None:
        if other := self._held.pop(adapter.lora_int_id, None):  # fetched twice at once
            other[1].release()
        self._held[adapter.lora_int_id] = (adapter, copy)
        while len(self._held) > self._most_held:
            _, (_, oldest) = self._held.popitem(last=False)
            oldest.release()
