"""What is asked of a started `AsyncLLM` about adapters.

Import it only after `prepare_environment`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from workers.engine.protocol import AdapterLoadError, EngineDead, LocalAdapter
from workers.engine.vllm_answers import DIED, CallFailedError, answer
from workers.engine.vllm_preflight import end_token, preflight
from workers.engine.vllm_render import adapter_chat_template

_log = logging.getLogger(__name__)

#: Pause before an adapter is asked for again that was still being read. A core that computes
#: answers between two steps only.
_READING_SECONDS: Final = 0.004
_NOT_AHEAD: Final = "Adapters are not read ahead: %s"


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


class AdapterCalls:
    """Loads adapters, reads them ahead, pins them and lets them go.

    Args:
        slots: `max_loras` as the worker has it; 0 where adapters are off.
        tokenizer: the base's, or None.
    """

    def __init__(self, llm: AsyncLLM, slots: int, tokenizer: Any) -> None:
        self._llm = llm
        self._slots = slots
        self._tokenizer = tokenizer

    async def load(self, adapter: LocalAdapter, *, busy: bool = False) -> ResidentAdapter:
        """Read an adapter from its folder into a slot.

        Args:
            busy: whether other requests compute, which must not wait for the reading.

        Raises:
            AdapterLoadError: it cannot be used; the message says why.
            EngineDead: the engine has died.
        """
        if not self._slots:
            raise AdapterLoadError("adapters are off: the worker runs with --no-enable-lora")
        folder = await asyncio.to_thread(preflight, adapter)
        template = await asyncio.to_thread(_chat_template, adapter, folder)
        request = LoRARequest(adapter.lora_name, adapter.lora_int_id, adapter.path)
        try:
            added = await self._added(request, busy)
        except CallFailedError as error:
            # It may be half in: vLLM would call it loaded the next time.
            await self.remove(adapter.lora_int_id)
            raise AdapterLoadError(str(error)) from error
        if not added:
            raise AdapterLoadError(f"vLLM did not take adapter {adapter.lora_name}")
        return ResidentAdapter(request, template, end_token(folder, self._tokenizer))

    async def _added(self, request: LoRARequest, busy: bool) -> bool:
        """Whether vLLM has taken an adapter; see `ReadAheadExtension.lorry_load`."""
        named = (request.lora_int_id, request.lora_name, request.lora_path)
        while True:
            try:
                taken = await answer(
                    self._llm, self._llm.collective_rpc("lorry_load", args=(named, not busy))
                )
            except CallFailedError as error:
                if "lorry_load" not in str(error):
                    raise
                # the operator's own extension (`--worker-extension-cls`), without ours
                return await answer(self._llm, self._llm.add_lora(request))
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
            read = await answer(
                self._llm, self._llm.collective_rpc("lorry_read_ahead", args=(named,))
            )
        except CallFailedError as error:
            _log.info(_NOT_AHEAD, error)
            return None
        if any(ids is None for ids in read):
            _log.info(_NOT_AHEAD, "this release of vLLM reads them in another place")
            return None
        return [i for i in read[0] if all(i in ids for ids in read)]

    async def remove(self, lora_int_id: int) -> None:
        """Free an adapter's slot. Unknown ids are ignored."""
        if self._slots:
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
            pinned = await answer(self._llm, self._llm.pin_lora(lora_int_id))
        except CallFailedError as error:
            raise AdapterLoadError(str(error)) from error
        if not pinned:
            raise AdapterLoadError(f"vLLM did not pin adapter {lora_int_id}")


def _chat_template(adapter: LocalAdapter, folder: Path) -> str | None:
    try:
        return adapter_chat_template(folder)
    except (OSError, ValueError) as error:
        raise AdapterLoadError(f"adapter {adapter.lora_name}: {error}") from error
