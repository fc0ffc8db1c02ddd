"""Slots: which adapters are resident, and which of them have unfinished jobs in the engine.

The engine evicts its least recently used slot when another adapter is loaded, running or not. So
the one rule here: adapters with unfinished jobs are never more than the slots.
"""

import time
from collections import Counter, OrderedDict

from db.models import BASE_VERSION_ID
from workers.adapter_files import AdapterFiles
from workers.drain.planner import SlotView
from workers.engine.protocol import Engine, LocalAdapter
from workers.metrics import DrainMetrics


class Slots:
    """Keeps count of the adapters in the engine. One task loads; any may release."""

    def __init__(self, engine: Engine, files: AdapterFiles, metrics: DrainMetrics) -> None:
        self._engine = engine
        self._files = files
        self._metrics = metrics
        self._slots = engine.info.limits.max_loras
        #: least recently used first, as the engine's own cache keeps them
        self._resident: OrderedDict[int, LocalAdapter] = OrderedDict()
        self._unfinished: Counter[int] = Counter()
        self._held_since: dict[int, float] = {}
        self.loads = 0
        self.load_seconds = 0.0

    @property
    def in_use(self) -> int:
        """How many adapters have unfinished jobs; any thread may ask."""
        return len(self._held_since)

    def view(self) -> SlotView:
        """The slots as the planner sees them."""
        now = time.monotonic()
        held = {i: now - since for i, since in self._held_since.items()}
        return SlotView(held, frozenset(self._resident), self._slots)

    async def load(self, adapter_version_id: int) -> LocalAdapter | None:
        """Make an adapter resident; None stands for the base model, which needs no slot.

        Raises:
            AdapterInvalid: the files are missing or were changed.
            AdapterLoadError: the engine refused the adapter.
            EngineDead: the engine has died.
            RuntimeError: no slot is free (the caller must ask the planner first).
        """
        if adapter_version_id == BASE_VERSION_ID:
            return None
        if (adapter := self._resident.get(adapter_version_id)) is not None:
            self._resident.move_to_end(adapter_version_id)
            return adapter
        if len(self._unfinished) >= self._slots:
            raise RuntimeError("every slot has unfinished jobs")
        adapter = await self._files.local(adapter_version_id)
        await self._make_room()
        started = time.monotonic()
        await self._engine.load_adapter(adapter)
        seconds = time.monotonic() - started
        self.load_seconds += seconds
        self._metrics.load(seconds)
        self._resident[adapter_version_id] = adapter
        self.loads += 1
        return adapter

    async def _make_room(self) -> None:
        """Let the least recently used idle adapter go, so that the engine evicts none in use."""
        while len(self._resident) >= self._slots:
            idle = next(i for i in self._resident if i not in self._unfinished)
            del self._resident[idle]

    def enter(self, adapter_version_id: int, jobs: int) -> None:
        """Jobs of an adapter were fed to the engine."""
        if adapter_version_id != BASE_VERSION_ID and jobs:
            self._unfinished[adapter_version_id] += jobs
            self._held_since.setdefault(adapter_version_id, time.monotonic())

    def leave(self, adapter_version_id: int) -> None:
        """One job of an adapter has left the engine."""
        if adapter_version_id == BASE_VERSION_ID:
            return
        self._unfinished[adapter_version_id] -= 1
        if self._unfinished[adapter_version_id] <= 0:
            del self._unfinished[adapter_version_id]
            del self._held_since[adapter_version_id]
