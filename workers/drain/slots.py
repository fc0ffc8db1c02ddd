"""Slots: which adapters are resident, and which of them have unfinished jobs in the engine.

The engine evicts its least recently used slot when another adapter is loaded, running or not. So
the one rule here: adapters with unfinished jobs, and pinned ones, are never more than the slots.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from core.errors import AdapterInvalid, StoreUnavailable
from db.models import BASE_VERSION_ID
from workers.adapter_files import LONG_PATIENCE_SECONDS, PATIENCE_SECONDS, AdapterFiles
from workers.drain.planner import SlotView
from workers.engine.protocol import AdapterLoadError, Engine, LocalAdapter
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)

#: Adapters that the engine reads ahead, at most: each is memory, and few get a slot at once.
READ_AHEAD: Final = 4


class Slots:
    """Keeps count of the adapters in the engine. One task loads; any may release.

    Args:
        pinned: versions that stay in their slots once `load_first` has put them there.
        loading: entered for each call that loads: the lease watches how long it takes.
        preload: versions that `load_first` loads too, as far as there are slots.
    """

    def __init__(
        self,
        engine: Engine,
        files: AdapterFiles,
        metrics: DrainMetrics,
        pinned: Collection[int] = (),
        loading: Callable[[], AbstractContextManager[None]] = nullcontext,
        preload: Collection[int] = (),
    ) -> None:
        self._engine = engine
        self._files = files
        self._metrics = metrics
        self._loading = loading
        self._slots = engine.info.limits.max_loras
        #: least recently used first, as the engine's own cache keeps them
        self._resident: OrderedDict[int, LocalAdapter] = OrderedDict()
        self._unfinished: Counter[int] = Counter()
        self._held_since: dict[int, float] = {}
        self._to_pin = tuple(pinned)
        self._to_preload = tuple(version for version in preload if version not in self._to_pin)
        self._pinned: frozenset[int] = frozenset()
        self.loads = 0
        self.load_seconds = 0.0

    @property
    def highest_rank(self) -> int:
        """Of the adapters that the engine takes; 0 where it takes none."""
        limits = self._engine.info.limits
        return limits.max_lora_rank if limits.max_loras else 0

    @property
    def in_use(self) -> int:
        """How many adapters have unfinished jobs; any thread may ask."""
        return len(self._held_since)

    @property
    def resident(self) -> frozenset[int]:
        """The adapter versions in the slots, in use or not; any thread may ask."""
        return frozenset(self._resident)

    def view(self) -> SlotView:
        """The slots as the planner sees them."""
        now = time.monotonic()
        held = {i: now - since for i, since in self._held_since.items()}
        return SlotView(held, frozenset(self._resident), self._slots, self._pinned)

    async def load_first(self) -> None:
        """Load what a worker was told to begin with: pinned adapters, which stay, and others.

        Those beyond the slots come to the local disk. One that cannot be loaded is served all the
        same: its jobs will say why.

        Raises:
            EngineDead: the engine has died.
        """
        for version in self._to_pin:
            try:
                await self.load(version, LONG_PATIENCE_SECONDS)
                await self._engine.pin_adapter(version)
            except (AdapterInvalid, StoreUnavailable, AdapterLoadError) as error:
                log.error("Adapter not pinned: %s", error, extra={"action": "pin_failed"})
            else:
                self._pinned |= {version}
        self._metrics.pinned = len(self._pinned)
        free = max(0, self._slots - len(self._resident))
        for number, version in enumerate(self._to_preload):
            try:
                if number < free:
                    await self.load(version, LONG_PATIENCE_SECONDS)
                else:
                    await self._files.local(version, LONG_PATIENCE_SECONDS)
            except (AdapterInvalid, StoreUnavailable, AdapterLoadError) as error:
                log.error("Adapter not preloaded: %s", error, extra={"action": "preload_failed"})

    def prefetch(self, adapter_version_ids: Sequence[int]) -> None:
        """Bring the files of these to the local disk, and what lies there to the engine's memory,
        in the background."""
        wanted = [i for i in adapter_version_ids if i not in self._resident]
        self._files.prefetch(wanted)
        ready = [self._files.ready(i) for i in wanted[:READ_AHEAD]]
        self._engine.read_ahead([adapter for adapter in ready if adapter is not None])

    def close(self) -> None:
        """Fetch nothing more ahead."""
        self._files.close()

    async def load(
        self, adapter_version_id: int, patience_seconds: float = PATIENCE_SECONDS
    ) -> LocalAdapter | None:
        """Make an adapter resident; None stands for the base model, which needs no slot.

        Args:
            patience_seconds: how long to wait for its files.

        Raises:
            AdapterInvalid: the files are missing or were changed.
            StoreUnavailable: the files cannot be had now, or not so soon.
            AdapterLoadError: the engine refused the adapter.
            EngineDead: the engine has died.
            RuntimeError: no slot is free (the caller must ask the planner first).
        """
        if adapter_version_id == BASE_VERSION_ID:
            return None
        if (adapter := self._resident.get(adapter_version_id)) is not None:
            self._resident.move_to_end(adapter_version_id)
            return adapter
        if len(self._unfinished.keys() | self._pinned) >= self._slots:
            raise RuntimeError("every slot has unfinished jobs")
        adapter = await self._files.local(adapter_version_id, patience_seconds)
        self._make_room()
        started = time.monotonic()
        with self._loading(), self._metrics.loading():
            await self._engine.load_adapter(adapter)
        self.load_seconds += time.monotonic() - started
        self._resident[adapter_version_id] = adapter
        self.loads += 1
        return adapter

    def _make_room(self) -> None:
        """Let the least recently used idle adapter go, so that the engine evicts none in use."""
        while len(self._resident) >= self._slots:
            kept = self._unfinished.keys() | self._pinned
            idle = next(i for i in self._resident if i not in kept)
            del self._resident[idle]
            self._metrics.evictions += 1

    def enter(self, adapter_version_id: int, jobs: int) -> None:
        """Jobs of an adapter were fed to the engine."""
        if adapter_version_id != BASE_VERSION_ID and jobs:
            self._unfinished[adapter_version_id] += jobs
            self._held_since.setdefault(adapter_version_id, time.monotonic())

    def leave(self, adapter_version_id: int) -> bool:
        """One job of an adapter has left the engine; returns whether its slot is free now."""
        if adapter_version_id == BASE_VERSION_ID:
            return False
        self._unfinished[adapter_version_id] -= 1
        if self._unfinished[adapter_version_id] > 0:
            return False
        del self._unfinished[adapter_version_id]
        del self._held_since[adapter_version_id]
        self._resident.move_to_end(adapter_version_id)  # the engine used it until now
        return True
