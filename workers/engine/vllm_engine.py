"""The vLLM engine's life: start, slots, death, end.

The `vllm_*` modules beside this one are the only ones that import vLLM, and they are imported
once the environment is set: by `from_flags`, which comes before everything else.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from core.generation import Aborted
from workers.engine.probe import memory_bytes, probe
from workers.engine.protocol import (
    Done,
    EngineDead,
    EngineInfo,
    EngineRequest,
    FoldCopy,
    FoldRefused,
    FoldTimes,
    LocalAdapter,
    ProbeResult,
)
from workers.engine.vllm_environment import prepare_environment
from workers.engine.vllm_processes import ProcessFamily

if TYPE_CHECKING:
    from workers.engine.vllm_adapters import ResidentAdapter
    from workers.engine.vllm_calls import VllmCalls
    from workers.engine.vllm_flags import EngineFlags
    from workers.engine.vllm_flow import RequestFlow

_WATCH_SECONDS = 0.25
_CLOSED = "the engine was closed"
_T = TypeVar("_T")


class VllmEngine:
    """`Engine` by vLLM's `AsyncLLM`, whose core runs in a process of its own."""

    def __init__(self, flags: "EngineFlags", fold_copy: FoldCopy = "auto") -> None:
        self._flags = flags
        self._fold_copy = fold_copy
        self._building: asyncio.Future[VllmCalls] | None = None
        self._family = ProcessFamily()
        self._calls: VllmCalls | None = None
        self._flow: RequestFlow | None = None
        self._info: EngineInfo | None = None
        self._adapters: dict[int, ResidentAdapter] = {}
        self._wanted_ahead: tuple[LocalAdapter, ...] = ()
        self._told_ahead: tuple[LocalAdapter, ...] = ()
        self._can_read_ahead = True
        self._reading: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._dead = asyncio.Event()
        self._over = asyncio.Event()  # dead or closed: nothing more will come
        self._reason = "the engine was not started"

    @classmethod
    def from_flags(
        cls,
        model: str,
        flags: Sequence[str],
        *,
        fold: bool = False,
        fold_copy: FoldCopy = "auto",
    ) -> "VllmEngine":
        """An engine that is not started yet. The first call imports vLLM: about ten seconds.

        Args:
            model: a local folder, or the name of a model in the local Hugging Face cache.
            flags: vLLM's own, as `vllm serve` takes them.
            fold: whether it is built so that it can fold adapters.
            fold_copy: where it keeps the copy of the base weights that folding needs.

        Raises:
            UsageError: a flag, the model or the machine will not do.
        """
        prepare_environment()
        from workers.engine.vllm_flags import parse_flags

        return cls(parse_flags(model, flags, fold=fold), fold_copy)

    @property
    def info(self) -> EngineInfo:
        """Available once started."""
        if self._info is None:
            raise EngineDead(self._reason)
        return self._info

    @property
    def running(self) -> int:
        """Submitted requests that are not answered yet."""
        return self._flow.running if self._flow else 0

    def progress(self) -> int:
        """Tokens worked on so far, prompts included."""
        return self._calls.work.value if self._calls else 0

    def made(self) -> int:
        """Tokens of answers made so far."""
        return self._calls.work.made if self._calls else 0

    async def start(self) -> None:
        """Load the base model, in a thread: the loop and its signals stay live meanwhile.

        Raises:
            EngineDead: `close` came in between.
            Exception: whatever vLLM raises. Nothing is left running then.
        """
        try:
            calls = await self._build()
            await self._unless_over(calls.listen())
            self._info = await self._unless_over(self._ready_to_fold(calls, self.info))
        except BaseException as error:
            closed = self._closing is not None
            await self.close()
            if closed and isinstance(error, Exception):
                raise EngineDead(f"{_CLOSED} while it started") from None
            raise
        self._watcher = asyncio.create_task(self._watch(calls))

    async def _ready_to_fold(self, calls: "VllmCalls", info: EngineInfo) -> EngineInfo:
        """Make ready to fold, once; where it cannot be, folding is simply not used."""
        refusal = self._flags.fold_refusal
        if refusal is None:
            try:
                seconds = await calls.prepare_fold(self._fold_copy)
            except FoldRefused as error:
                refusal = str(error)
            else:
                return replace(info, fold_refusal=None, fold_seconds=seconds)
        return replace(info, fold_refusal=refusal)

    async def load_adapter(self, adapter: LocalAdapter) -> None:
        """Make an adapter resident; see `Engine`."""
        busy = self.running > 0
        resident = await self._unless_over(self._alive().adapters.load(adapter, busy=busy))
        self._adapters[adapter.lora_int_id] = resident

    def read_ahead(self, adapters: Sequence[LocalAdapter]) -> None:
        """Read adapters while the engine computes; see `Engine`."""
        self._wanted_ahead = tuple(adapters)
        if self._must_tell_ahead and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read_ahead())

    @property
    def _must_tell_ahead(self) -> bool:
        return self._can_read_ahead and self._wanted_ahead != self._told_ahead

    async def _read_ahead(self) -> None:
        """Tell the workers what is wanted, one call after another, as long as it changes."""
        with contextlib.suppress(EngineDead):  # others say so
            while self._must_tell_ahead:
                self._told_ahead = self._wanted_ahead
                read = await self._unless_over(self._alive().adapters.read_ahead(self._told_ahead))
                self._can_read_ahead = read is not None

    async def remove_adapter(self, lora_int_id: int) -> None:
        """Let a resident adapter go; see `Engine`."""
        if self._adapters.pop(lora_int_id, None) is not None:
            await self._unless_over(self._alive().adapters.remove(lora_int_id))

    async def probe_adapter(self, adapter: LocalAdapter) -> ProbeResult:
        """Compare a loaded adapter with the base model; see `Engine`."""
        dtype_bytes = self._alive().facts.dtype_bytes
        result = await self._unless_over(probe(self.submit, adapter))
        taken = await asyncio.to_thread(memory_bytes, adapter, dtype_bytes)
        return replace(result, memory_bytes=taken)

    async def pin_adapter(self, lora_int_id: int) -> None:
        """Keep a resident adapter in its slot; see `Engine`."""
        await self._unless_over(self._alive().adapters.pin(lora_int_id))

    async def fold(self, lora_int_id: int | None) -> FoldTimes:
        """Fold an adapter, or restore the base; see `Engine`."""
        if self.info.fold_refusal is not None:
            raise FoldRefused(self.info.fold_refusal)
        return await self._unless_over(self._alive().fold(lora_int_id))

    async def fold_digest(self) -> list[str]:
        """A fingerprint of the weights that folding touches, of each rank (tests, benchmarks)."""
        return await self._unless_over(self._alive().fold_digest())

    def submit(self, requests: Sequence[EngineRequest], done: Done) -> None:
        """Feed requests; see `Engine`. A dead or closed engine answers `Aborted`.

        Raises:
            EngineDead: the engine was never started.
        """
        if self._flow is None:
            raise EngineDead(self._reason)
        if self._over.is_set():
            for request in requests:
                asyncio.get_running_loop().call_soon(done, request, Aborted())
            return
        self._flow.submit([(request, self._resident(request)) for request in requests], done)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests; see `Engine`."""
        if self._flow is not None:
            await self._flow.abort(request_ids)

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died; closing it is no death."""
        await self._dead.wait()
        return self._reason

    async def close(self) -> None:
        """Stop the engine and every process of it, also half-way through `start`. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _build(self) -> "VllmCalls":
        from workers.engine.vllm_calls import VllmCalls
        from workers.engine.vllm_flow import RequestFlow

        self._family = ProcessFamily()
        # Not a task, which the loop's end would cancel and leave the thread unseen.
        loop = asyncio.get_running_loop()
        self._building = loop.run_in_executor(None, VllmCalls, self._flags.args, self._family)
        self._calls = await asyncio.shield(self._building)
        self._flow = RequestFlow(self._calls, self._flags.chat_template, self._die)
        self._info = EngineInfo(
            name="vllm",
            version=self._calls.version,
            base_model=self._flags.base_model,
            base_revision=self._calls.facts.hub_revision or self._flags.base_revision,
            limits=self._calls.facts.limits,
        )
        return self._calls

    async def _watch(self, calls: "VllmCalls") -> None:
        from workers.engine.vllm_answers import DIED

        while not calls.dead:
            await asyncio.sleep(_WATCH_SECONDS)
        self._die(DIED)

    def _die(self, reason: str) -> None:
        if self._over.is_set():
            return
        self._reason = reason
        self._over.set()
        if self._flow is not None:
            self._flow.drop_all()
        self._dead.set()

    async def _close(self) -> None:
        self._over.set()
        if not self._dead.is_set():
            self._reason = _CLOSED
        if self._watcher is not None:
            self._watcher.cancel()
        if self._flow is not None:
            self._flow.drop_all()
        calls = self._calls or await self._stop_building()
        if calls is not None:
            await asyncio.to_thread(calls.shutdown)

    async def _stop_building(self) -> "VllmCalls | None":
        if self._building is None:
            return None
        while not self._building.done():
            # The build fails by itself once the process that it waits for is gone.
            await asyncio.to_thread(self._family.kill)
            await asyncio.wait({self._building}, timeout=0.2)
        return None if self._building.exception() else self._building.result()

    def _resident(self, request: EngineRequest) -> "ResidentAdapter | None":
        return self._adapters.get(request.adapter.lora_int_id) if request.adapter else None

    def _alive(self) -> "VllmCalls":
        if self._calls is None or self._over.is_set():
            raise EngineDead(self._reason)
        return self._calls

    async def _unless_over(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Await a call of the core, which never answers once it is dead."""
        task, over = asyncio.create_task(call), asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineDead(self._reason)
            return task.result()
        except EngineDead as error:
            self._die(str(error))
            raise
        finally:
            for pending in (task, over):
                pending.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.gather(task, over, return_exceptions=True)
