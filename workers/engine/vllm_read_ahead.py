"""Reading adapters ahead inside vLLM's worker processes, one on each rank.

A load reads the adapter's file, locks its memory for the GPU, merges its scaling and copies it into
a slot piece by piece, all of it between two steps, while nothing computes. Only one copy has to be
there: the rest is done here, in a thread, while the steps before it compute. Measured in
`benchmarks/adapter_loads.py`.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from workers.engine.vllm_slot_images import SlotImages, slot_images

_log = init_logger(__name__)


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
        reader: _Reader | None = getattr(self, "_lorry_reader", None)
        if reader is None:
            manager = getattr(getattr(self, "model_runner", None), "lora_manager", None)
            if not hasattr(manager, "_load_adapter") or not hasattr(manager, "list_adapters"):
                return None
            reader = self._lorry_reader = _Reader(manager, getattr(self, "device", None))
        return reader.want([LoRARequest(name, i, path) for i, name, path in adapters])


class _Reader:
    """What one rank has read. Its methods are called between two steps, by one thread."""

    def __init__(self, manager: Any, device: Any) -> None:
        self._manager = manager
        self._device = device
        self._read = manager._load_adapter  # noqa: SLF001 - vLLM has no other place
        self._images: SlotImages | None = None
        self._ahead: dict[int, tuple[str, Future[Any]]] = {}
        self._wanted: SimpleQueue[tuple[Any, Future[Any]]] = SimpleQueue()
        # a daemon: a file that cannot be read to its end must not keep the process
        threading.Thread(target=self._run, name="lorry-read-ahead", daemon=True).start()
        manager._load_adapter = self._load  # noqa: SLF001

    def want(self, requests: Sequence[Any]) -> list[int]:
        """Read these, and hold nothing else; returns which have been read."""
        wanted = {request.lora_int_id: request for request in requests}
        for version in self._ahead.keys() - wanted.keys():
            self._ahead.pop(version)[1].cancel()
        loaded = set(self._manager.list_adapters())
        for version, request in wanted.items():
            if version not in self._ahead and version not in loaded:
                future: Future[Any] = Future()
                self._ahead[version] = (request.lora_path, future)
                self._wanted.put((request, future))
        return [version for version, (_, future) in self._ahead.items() if _succeeded(future)]

    def _load(self, request: Any) -> Any:
        """In place of vLLM's own: what was read, or is being read, is not read again."""
        path, future = self._ahead.pop(request.lora_int_id, ("", None))
        if future is None or path != request.lora_path or future.cancel():
            return self._read(request)
        try:
            return future.result()
        except Exception:  # it may be read by now; if not, this raises what vLLM raises
            return self._read(request)

    def _run(self) -> None:
        if getattr(self._device, "type", "cpu") == "cuda":
            torch.cuda.set_device(self._device)  # memory is locked through the rank's own GPU
        self._images = self._with_images()
        while True:
            self._read_into(*self._wanted.get())

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

    def _read_into(self, request: Any, future: "Future[Any]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            lora = self._read(request)
            if self._images is not None:
                self._images.make(lora)
            future.set_result(lora)
        except BaseException as error:  # whatever a broken file makes vLLM raise
            future.set_exception(error)


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
