"""vLLM's calls, with its errors (which moved between releases) turned into a few of our own.

Import it only after `prepare_environment`.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import vllm
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from workers.engine.protocol import (
    AdapterLoadError,
    EngineDead,
    FoldRefused,
    FoldTimes,
    LocalAdapter,
)
from workers.engine.vllm_base_slot import (
    extra_slots,
    keep_last_slot_empty,
    with_extra_slots,
)
from workers.engine.vllm_facts import VllmFacts
from workers.engine.vllm_params import BAD_REQUEST, Decoding, message_of
from workers.engine.vllm_preflight import end_token, preflight
from workers.engine.vllm_processes import ProcessFamily
from workers.engine.vllm_render import adapter_chat_template
from workers.engine.vllm_stats import WorkCount

_log = logging.getLogger(__name__)

DIED = "the engine's core process has died; its own messages say why"
_GRACE_SECONDS = 2.0
#: Pause before an adapter is asked for again that was still being read. A core that computes
#: answers between two steps only.
_READING_SECONDS = 0.004
_NOT_AHEAD = "Adapters are not read ahead: %s"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter in the engine: what vLLM calls it by, and what it came with.

    Args:
        request: vLLM's `LoRARequest`.
        chat_template: its own, or None.
        end_token: the id of a token that ends its answers beside the base's own, or None.
    """

    request: Any
    chat_template: str | None
    end_token: int | None = None


class RequestFailedError(Exception):
    """The engine failed at one request and lives on."""


class _CallFailedError(Exception):
    """The core failed at a call and lives on; its message says why."""


class VllmCalls:
    """A started `AsyncLLM`. Building it blocks for tens of seconds and may be done in a thread.

    Args:
        args: vLLM's `AsyncEngineArgs`.
        family: told of the processes, so that none outlives `shutdown`.

    Raises:
        Exception: whatever vLLM raises; no process of it is left.
    """

    version: str = vllm.__version__

    def __init__(self, args: Any, family: ProcessFamily) -> None:
        self._family = family
        self.work = WorkCount()
        self._extra_slots = extra_slots(args)
        self._llm = AsyncLLM.from_engine_args(
            with_extra_slots(args), stat_loggers=[self.work.logger_factory()]
        )
        self.tokenizer: Any = self._llm.tokenizer
        # A fast tokenizer decodes in one call what vLLM would decode token by token.
        self.backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        decoding: Decoding = (
            "none" if self.tokenizer is None else "final" if self.backend else "vllm"
        )
        self.facts = VllmFacts.of(self._llm.vllm_config, decoding, self._extra_slots)
        family.look()

    @property
    def dead(self) -> bool:
        """Whether the engine's core is gone."""
        return bool(self._llm.errored)

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: Any,
        adapter: ResidentAdapter | None,
        cache_salt: str,
    ) -> Any:
        """Run one request; returns its final `RequestOutput`.

        Raises:
            ValueError: vLLM refuses the request; the message is for the user.
            RequestFailedError: the engine failed at it, and lives on.
            EngineDead: the engine has died.
        """
        final = None
        try:
            async for output in self._llm.generate(
                tokens_input(prompt, cache_salt=cache_salt or None),
                params,
                request_id,
                lora_request=adapter.request if adapter else None,
            ):
                final = output
        except EngineDeadError as error:
            raise EngineDead(DIED) from error
        except EngineGenerateError as error:
            raise self._sorted(error.__cause__ or error) from error
        except BAD_REQUEST as error:
            raise ValueError(message_of(error)) from error
        return final

    def _sorted(self, error: BaseException) -> Exception:
        if self.dead:
            return EngineDead(DIED)
        if isinstance(error, BAD_REQUEST):
            return ValueError(message_of(error))
        return RequestFailedError(f"{type(error).__name__}: {error}")

    async def abort(self, request_ids: list[str]) -> None:
        """Drop requests; their `generate` returns with finish_reason "abort"."""
        with contextlib.suppress(EngineDeadError):
            await self._llm.abort(request_ids)

    async def load(self, adapter: LocalAdapter, *, busy: bool = False) -> ResidentAdapter:
        """Read an adapter from its folder into a slot.

        Args:
            busy: whether other requests compute, which must not wait for the reading.

        Raises:
            AdapterLoadError: it cannot be used; the message says why.
            EngineDead: the engine has died.
        """
        if not self.facts.limits.max_loras:
            raise AdapterLoadError("adapters are off: the worker runs with --no-enable-lora")
        folder = await asyncio.to_thread(preflight, adapter)
        template = await asyncio.to_thread(_chat_template, adapter, folder)
        request = LoRARequest(adapter.lora_name, adapter.lora_int_id, adapter.path)
        try:
            added = await self._added(request, busy)
        except _CallFailedError as error:
            # It may be half in: vLLM would call it loaded the next time.
            await self.remove(adapter.lora_int_id)
            raise AdapterLoadError(str(error)) from error
        if not added:
            raise AdapterLoadError(f"vLLM did not take adapter {adapter.lora_name}")
        return ResidentAdapter(request, template, end_token(folder, self.tokenizer))

    async def _added(self, request: LoRARequest, busy: bool) -> bool:
        """Whether vLLM has taken an adapter; see `ReadAheadExtension.lorry_load`."""
        named = (request.lora_int_id, request.lora_name, request.lora_path)
        while True:
            try:
                taken = await self._call(
                    self._llm.collective_rpc("lorry_load", args=(named, not busy))
                )
            except _CallFailedError as error:
                if "lorry_load" not in str(error):
                    raise
                # the operator's own extension (`--worker-extension-cls`), without ours
                return await self._call(self._llm.add_lora(request))
            if None not in taken:
                return all(taken)
            await asyncio.sleep(_READING_SECONDS)

    async def read_ahead(self, adapters: Sequence[LocalAdapter]) -> Sequence[int] | None:
        """Let the workers read adapters ahead; see `ReadAheadExtension.lorry_read_ahead`.

        Returns:
            The ids of those that have been read; None where this engine cannot.

        Raises:
            EngineDead: the engine has died.
        """
        named = []
        for adapter in adapters:
            with contextlib.suppress(AdapterLoadError):  # its load will say so
                await asyncio.to_thread(preflight, adapter)
                named.append((adapter.lora_int_id, adapter.lora_name, adapter.path))
        try:
            read = await self._call(self._llm.collective_rpc("lorry_read_ahead", args=(named,)))
        except _CallFailedError as error:
            _log.info(_NOT_AHEAD, error)
            return None
        if any(ids is None for ids in read):
            _log.info(_NOT_AHEAD, "this release of vLLM reads them in another place")
            return None
        return [i for i in read[0] if all(i in ids for ids in read)]

    async def remove(self, lora_int_id: int) -> None:
        """Free an adapter's slot. Unknown ids are ignored."""
        if self.facts.limits.max_loras:
            try:
                await self._llm.remove_lora(lora_int_id)
            except EngineDeadError as error:
                raise EngineDead(DIED) from error

    async def pin(self, lora_int_id: int) -> None:
        """Keep a resident adapter in its slot.

        Raises:
            AdapterLoadError: it is not resident, or every slot would be pinned.
            EngineDead: the engine has died.
        """
        try:
            pinned = await self._call(self._llm.pin_lora(lora_int_id))
        except _CallFailedError as error:
            raise AdapterLoadError(str(error)) from error
        if not pinned:
            raise AdapterLoadError(f"vLLM did not pin adapter {lora_int_id}")

    async def prepare_fold(self, copy: str) -> float:
        """Make the engine ready to fold; returns the seconds that restoring takes.

        Args:
            copy: where the base weights are copied to: "auto", "gpu" or "host".

        Raises:
            FoldRefused: it cannot; the message says why.
            EngineDead: the engine has died.
        """
        if self.facts.fold_refusal:
            raise FoldRefused(self.facts.fold_refusal)
        core = self._llm.engine_core
        try:
            made = await self._call(core.call_utility_async("lorry_fold_prepare", copy))
        except _CallFailedError as error:
            raise FoldRefused(str(error)) from error
        if "refused" in made:
            raise FoldRefused(made["refused"])
        _log.info("Ready to fold", extra={"action": "fold_ready", **made})
        return float(made["restore_seconds"])

    async def fold(self, lora_int_id: int | None) -> FoldTimes:
        """Fold a resident adapter, or restore the base with None.

        Raises:
            FoldRefused: this adapter is not folded; nothing was changed.
            EngineDead: the engine has died, or the change went wrong: nothing that it computed
                from then on may be believed.
        """
        core = self._llm.engine_core
        try:
            made = await core.call_utility_async("lorry_fold", lora_int_id)
        except EngineDeadError as error:
            raise EngineDead(DIED) from error
        except Exception as error:  # the core ends after that, and may have ended already
            raise EngineDead(f"a fold went wrong half-way: {_reason(error)}") from error
        if "refused" in made:
            raise FoldRefused(made["refused"])
        return FoldTimes(made["restore"], made["fold"], made["pause"])

    async def fold_digest(self) -> list[str]:
        """A fingerprint of the weights that folding touches, of each rank (tests, benchmarks)."""
        digests: list[str] = await self._llm.engine_core.call_utility_async("lorry_fold_digest")
        return digests

    async def _call(self, call: Awaitable[_T]) -> _T:
        """Await an answer of the core, which sends any kind of error back.

        Raises:
            _CallFailedError: it failed, and the core lives on.
            EngineDead: the engine has died.
        """
        try:
            return await call
        except EngineDeadError as error:
            raise EngineDead(DIED) from error
        except Exception as error:
            if self.dead:
                raise EngineDead(DIED) from error
            raise _CallFailedError(_reason(error)) from error

    async def listen(self) -> None:
        """Read the core's messages on the running loop from now on, not from the first request;
        then settle the slots.

        Building in a thread leaves that undone, and a death before the first request unseen.
        """
        with contextlib.suppress(EngineDeadError):
            await self._llm.get_supported_tasks()
            if self._extra_slots:
                await keep_last_slot_empty(
                    self._llm, self.facts.limits.max_loras + self._extra_slots
                )

    def shutdown(self) -> None:
        """Stop every process of the engine. Blocks for seconds; idempotent."""
        self._family.look()
        self._llm.shutdown(timeout=_GRACE_SECONDS)
        self._family.kill()


def _chat_template(adapter: LocalAdapter, folder: Path) -> str | None:
    try:
        return adapter_chat_template(folder)
    except (OSError, ValueError) as error:
        raise AdapterLoadError(f"adapter {adapter.lora_name}: {error}") from error


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return re.sub(r"^Call to \w+ method failed: ", "", text)
