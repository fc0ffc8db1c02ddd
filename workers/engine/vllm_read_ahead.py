"""Reading adapters ahead inside vLLM's worker processes, one on each rank.

A load reads the adapter's file, locks its memory for the GPU, merges its scaling and copies it into
a slot piece by piece, all of it between two steps, while nothing computes. Only one copy has to be
there: the rest is done here, in a thread, while the steps before it compute. Measured in
`benchmarks/adapter_loads.py`.
"""

import itertools
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import PriorityQueue
from typing import Any, Final, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from workers.engine.vllm_file_layouts import FileLayouts
from workers.engine.vllm_slot_images import Image, SlotImages, slot_images

_log = init_logger(__name__)

#: A load whose turn does not come for so long, since the thread is held up by another adapter's
#: file, reads its own by itself.
_PATIENCE_SECONDS: Final = 2.0
#: Threads that copy beside a GPU's steps. By itself torch takes one for each core, all of them busy
#: between two copies, too, and the steps' own thread would have to share its core.
_THREADS: Final = min(4, max(1, (os.cpu_count() or 1) // 4))


class ReadAheadExtension:
    """Methods that `collective_rpc` finds on a worker. vLLM mixes them into its own class."""

    def lorry_read_ahead(self, adapters: Sequence[tuple[int, str, str]]) -> list[int] | None:
        """Read these adapters, in this order; what was read before and is not among them is
        forgotten. Returns at once. An adapter that cannot be read is left to its load.

        Args:
            adapters: of each its id, name and folder.

        Returns:
            The ids of those that have been read; None where this release of vLLM has no place
            for it.
        """
        if (reader := self._reader()) is None:
            return None
        return reader.want([LoRARequest(name, i, path) for i, name, path in adapters])

    def lorry_load(self, adapter: tuple[int, str, str], wait: bool) -> bool | None:
        """Load an adapter as vLLM's `add_lora` does. What is not read yet is read next, before
        all others.

        Args:
            adapter: its id, name and folder.
            wait: for the reading, if it must be; nothing is computed meanwhile.

        Returns:
            Whether vLLM has taken it; None if it is not read yet and was not to be waited for.
        """
        version, name, path = adapter
        request = LoRARequest(name, version, path)
        if (reader := self._reader()) is not None:
            if not wait and not reader.has(request):
                return None
            reader.hand_over(version)
        added: bool = self.add_lora(request)  # type: ignore[attr-defined]
        return added

    def _reader(self) -> "_Reader | None":
        """This rank's, made when it is first asked for."""
        reader: _Reader | None = getattr(self, "_lorry_reader", None)
        if reader is None:
            manager = getattr(getattr(self, "model_runner", None), "lora_manager", None)
            if not hasattr(manager, "_load_adapter") or not hasattr(manager, "list_adapters"):
                return None
            reader = self._lorry_reader = _Reader(manager, getattr(self, "device", None))
        return reader


@dataclass(frozen=True, slots=True, order=True)
class _Wanted:
    """An adapter to be read: least first."""

    urgency: int
    number: int
    request: Any = field(compare=False)
    future: Future["_Read"] = field(compare=False)
    #: a `LoRAModel` that need not be read, since vLLM has it in memory
    kept: Any = field(compare=False)


class _Read(NamedTuple):
    """A `LoRAModel`, and its slot's image where one was made."""

    lora: Any
    image: Image | None

    def whole(self) -> Any:
        """Both in one, as a load takes them."""
        if self.image is not None:
            self.lora.lorry_image = self.image
        return self.lora


class _Reader:
    """What one rank has read. Its methods are called between two steps, by one thread."""

    def __init__(self, manager: Any, device: Any) -> None:
        self._manager = manager
        self._device = device
        self._read = manager._load_adapter  # noqa: SLF001 - vLLM has no other place
        self._images: SlotImages | None = None
        self._files: FileLayouts | None = None
        self._ahead: dict[int, tuple[str, Future[_Read]]] = {}
        self._wanted: PriorityQueue[_Wanted] = PriorityQueue()
        self._numbers = itertools.count()
        #: the one whose load waits for it
        self._next: int | None = None
        #: what the thread is at, and since when
        self._at: tuple[int, float] | None = None
        # a daemon: a file that cannot be read to its end must not keep the process
        self._thread = threading.Thread(target=self._run, name="lorry-read-ahead", daemon=True)
        self._thread.start()
        manager._load_adapter = self._load  # noqa: SLF001

    def want(self, requests: Sequence[Any]) -> list[int]:
        """Read these, and hold nothing else; returns which have been read."""
        wanted = {request.lora_int_id: request for request in requests}
        for version in self._ahead.keys() - wanted.keys() - {self._next}:
            self._ahead.pop(version)[1].cancel()
        for version, request in wanted.items():
            if version not in self._ahead and not self._needs_nothing(version):
                self._put(request, urgency=1)
        return [version for version, (_, future) in self._ahead.items() if _succeeded(future)]

    def has(self, request: Any) -> bool:
        """Whether an adapter's load need not wait: it has been read, or cannot be. If not, it is
        read next."""
        version = self._next = request.lora_int_id
        if version in self._manager.list_adapters() or self._held_up(version):
            return True
        _, future = self._ahead.get(version, ("", None))
        if future is None or future.cancel():  # it may be behind others: this is before them
            self._put(request, urgency=0)
            return False
        return future.done()

    def _held_up(self, version: int) -> bool:
        """Whether the thread will not come to an adapter soon."""
        at, since = self._at or (version, 0.0)
        late = at != version and time.monotonic() - since > _PATIENCE_SECONDS
        return late or not self._thread.is_alive()

    def hand_over(self, version: int) -> None:
        """An adapter is loaded now: with its image, if vLLM has it in memory and that is made."""
        self._next = None
        if self._images is None or (lora := self._images.in_memory(version)) is None:
            return
        _, future = self._ahead.pop(version, ("", None))
        if future is not None and not future.cancel() and _succeeded(future):
            lora.lorry_image = future.result().image

    def _needs_nothing(self, version: int) -> bool:
        if version not in self._manager.list_adapters():
            return False
        images = self._images
        return images is None or images.in_slot(version) or images.in_memory(version) is None

    def _put(self, request: Any, urgency: int) -> None:
        future: Future[_Read] = Future()
        version = request.lora_int_id
        kept = self._images.in_memory(version) if self._images else None
        self._ahead[version] = (request.lora_path, future)
        self._wanted.put(_Wanted(urgency, next(self._numbers), request, future, kept))

    def _load(self, request: Any) -> Any:
        """In place of vLLM's own: what was read, or is being read, is not read again."""
        path, future = self._ahead.pop(request.lora_int_id, ("", None))
        if future is None or path != request.lora_path or future.cancel():
            return self._read(request)
        try:
            return future.result().whole()
        except Exception:  # it may be read by now; if not, this raises what vLLM raises
            return self._read(request)

    def _run(self) -> None:
        if getattr(self._device, "type", "cpu") == "cuda":
            torch.cuda.set_device(self._device)  # memory is locked through the rank's own GPU
            torch.set_num_threads(_THREADS)
        if (images := self._with_images()) is not None:
            slots = self._manager._adapter_manager  # noqa: SLF001
            self._images, self._files = images, FileLayouts(slots, self._read, images)
        while True:
            self._make_ready(self._wanted.get())  # no name for it: it would keep an image alive
            self._at = None

    def _with_images(self) -> SlotImages | None:
        """Loads by one copy; without them vLLM's own way is as right, and slower."""
        try:
            slots = self._manager._adapter_manager  # noqa: SLF001
            images = slot_images(slots, self._device or torch.device("cpu"))
        except Exception as error:  # whatever another release has otherwise
            _log.warning("adapters are loaded piece by piece: %r", error)
            return None
        if images is None:
            _log.info("this release of vLLM has its slots otherwise: adapters are loaded its way")
        return images

    def _make_ready(self, wanted: _Wanted) -> None:
        if not wanted.future.set_running_or_notify_cancel():
            return
        self._at = wanted.request.lora_int_id, time.monotonic()
        try:
            wanted.future.set_result(self._ready(wanted.request, wanted.kept))
        except BaseException as error:  # whatever a broken file makes vLLM raise
            wanted.future.set_exception(error)

    def _ready(self, request: Any, kept: Any) -> _Read:
        if self._images is None or self._files is None:
            return _Read(self._read(request) if kept is None else kept, None)
        if kept is not None:
            return _Read(kept, self._images.make(kept))
        return _Read(*self._files.read(request))


def _succeeded(future: Future[_Read]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
