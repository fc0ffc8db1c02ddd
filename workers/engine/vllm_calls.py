"""vLLM's calls, with its errors (which moved between releases) turned into a few of our own.

Import it only after `prepare_environment`.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from workers.engine.protocol import AdapterLoadError, EngineDead, EngineLimits, LocalAdapter
from workers.engine.vllm_params import BAD_REQUEST, SamplingRules, message_of
from workers.engine.vllm_processes import ProcessFamily
from workers.engine.vllm_render import adapter_chat_template
from workers.engine.vllm_stats import WorkCount

DIED = "the engine's core process has died; its own messages say why"
_GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter in the engine: what vLLM calls it by, and the chat template it came with."""

    request: Any
    chat_template: str | None


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
        self._llm = AsyncLLM.from_engine_args(args, stat_loggers=[self.work.logger_factory()])
        self.tokenizer: Any = self._llm.tokenizer
        # A fast tokenizer decodes in one call what vLLM would decode token by token.
        self.backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        self._model = self._llm.vllm_config.model_config
        self.vocab_size: int = self._model.get_vocab_size()
        family.look()

    @property
    def limits(self) -> EngineLimits:
        """What the engine can hold."""
        config = self._llm.vllm_config
        lora = config.lora_config
        return EngineLimits(
            max_model_len=self._model.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_loras=lora.max_loras if lora else 0,
            max_lora_rank=lora.max_lora_rank if lora else 0,
            cache_tokens=(config.cache_config.num_gpu_blocks or 0)
            * (config.cache_config.block_size or 0),
        )

    @property
    def rules(self) -> SamplingRules:
        """How requests are sampled, by the rules of `vllm serve`."""
        model = self._model
        defaults = model.get_diff_sampling_param()
        # A cap is only what the operator set, not what the model's own config suggests.
        if model.generation_config in ("auto", "vllm"):
            cap = (model.override_generation_config or {}).get("max_new_tokens")
        else:
            cap = defaults.get("max_tokens")
        return SamplingRules(
            max_model_len=model.max_model_len,
            defaults=defaults,
            max_tokens_cap=cap,
            decoding="none" if self.tokenizer is None else "final" if self.backend else "vllm",
        )

    @property
    def hub_revision(self) -> str | None:
        """The commit that a model from a hub was loaded at."""
        return getattr(self._model.hf_config, "_commit_hash", None)

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

    async def load(self, adapter: LocalAdapter) -> ResidentAdapter:
        """Read an adapter from its folder into a slot.

        Raises:
            AdapterLoadError: it cannot be used; the message says why.
            EngineDead: the engine has died.
        """
        if not self.limits.max_loras:
            raise AdapterLoadError("adapters are off: the worker runs with --no-enable-lora")
        template = await asyncio.to_thread(_preflight, adapter)
        request = LoRARequest(adapter.lora_name, adapter.lora_int_id, adapter.path)
        try:
            added = await self._llm.add_lora(request)
        except EngineDeadError as error:
            raise EngineDead(DIED) from error
        except Exception as error:  # the core sends any kind of error back
            if self.dead:
                raise EngineDead(DIED) from error
            raise AdapterLoadError(_reason(error)) from error
        if not added:
            raise AdapterLoadError(f"vLLM did not take adapter {adapter.lora_name}")
        return ResidentAdapter(request, template)

    async def remove(self, lora_int_id: int) -> None:
        """Free an adapter's slot. Unknown ids are ignored."""
        if self.limits.max_loras:
            try:
                await self._llm.remove_lora(lora_int_id)
            except EngineDeadError as error:
                raise EngineDead(DIED) from error

    async def listen(self) -> None:
        """Read the core's messages on the running loop from now on, not from the first request.

        Building in a thread leaves that undone, and a death before the first request unseen.
        """
        with contextlib.suppress(EngineDeadError):
            await self._llm.get_supported_tasks()

    def shutdown(self) -> None:
        """Stop every process of the engine. Blocks for seconds; idempotent."""
        self._family.look()
        self._llm.shutdown(timeout=_GRACE_SECONDS)
        self._family.kill()


def _preflight(adapter: LocalAdapter) -> str | None:
    folder = Path(adapter.path)
    # vLLM takes a path that is not there for a hub's name.
    if not folder.is_absolute():
        raise AdapterLoadError(f"adapter path {adapter.path} is not absolute")
    if not (folder / "adapter_config.json").is_file():
        raise AdapterLoadError(f"no adapter_config.json in {adapter.path}")
    try:
        return adapter_chat_template(folder)
    except (OSError, ValueError) as error:
        raise AdapterLoadError(f"adapter {adapter.lora_name}: {error}") from error


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.removeprefix("Call to add_lora method failed: ")
