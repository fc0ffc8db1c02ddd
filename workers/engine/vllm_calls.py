"""vLLM's calls, with its errors (which moved between releases) turned into a few of our own.

Import it only after `prepare_environment`.
"""

import contextlib
import logging
from typing import Any

import vllm
from vllm.inputs import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from workers.engine.protocol import EngineDead, FoldRefused, FoldTimes
from workers.engine.vllm_adapters import AdapterCalls, ResidentAdapter
from workers.engine.vllm_answers import DIED, CallFailedError, answer, reason_of
from workers.engine.vllm_base_slot import (
    extra_slots,
    keep_last_slot_empty,
    with_extra_slots,
)
from workers.engine.vllm_facts import VllmFacts
from workers.engine.vllm_params import BAD_REQUEST, Decoding, message_of
from workers.engine.vllm_processes import ProcessFamily
from workers.engine.vllm_stats import WorkCount

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0


class RequestFailedError(Exception):
    """The engine failed at one request and lives on."""


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
        self.adapters = AdapterCalls(self._llm, self.facts.limits.max_loras, self.tokenizer)
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
            made = await answer(self._llm, core.call_utility_async("lorry_fold_prepare", copy))
        except CallFailedError as error:
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
            raise EngineDead(f"a fold went wrong half-way: {reason_of(error)}") from error
        if "refused" in made:
            raise FoldRefused(made["refused"])
        return FoldTimes(made["restore"], made["fold"], made["pause"])

    async def fold_digest(self) -> list[str]:
        """A fingerprint of the weights that folding touches, of each rank (tests, benchmarks)."""
        digests: list[str] = await self._llm.engine_core.call_utility_async("lorry_fold_digest")
        return digests

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
