"""Requests on their way through vLLM: each is answered exactly once, whatever happens to it.

Import it only after `prepare_environment`.
"""

import asyncio
import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from core.errors import ErrorCode
from core.generation import Aborted, Failure, Outcome
from workers.engine.protocol import Done, EngineDead, EngineRequest
from workers.engine.vllm_adapters import ResidentAdapter
from workers.engine.vllm_calls import RequestFailedError, VllmCalls
from workers.engine.vllm_outputs import outcome_of
from workers.engine.vllm_params import ContextLengthError, sampling_params
from workers.engine.vllm_render import PromptRenderer

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Open:
    """A request that is not answered yet."""

    request: EngineRequest
    adapter: ResidentAdapter | None
    done: Done
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    prompt: list[int]
    params: Any


class RequestFlow:
    """Renders requests a chunk at a time in one thread, then runs one task for each.

    Args:
        calls: the started engine.
        chat_template: the operator's, in place of the tokenizer's own.
        died: told the reason when a request meets a dead engine.
    """

    def __init__(
        self, calls: VllmCalls, chat_template: str | None, died: Callable[[str], None]
    ) -> None:
        self._calls = calls
        self._rules = calls.facts.rules
        # A copy: the thread must not meet the loop, which decodes, in one tokenizer.
        tokenizer = copy.deepcopy(calls.tokenizer)
        self._renderer = PromptRenderer(tokenizer, chat_template, calls.facts.vocab_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorry-render")
        self._died = died
        self._open: dict[str, _Open] = {}
        self._chunks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Requests that are not answered yet."""
        return len(self._open)

    def submit(
        self, requests: Sequence[tuple[EngineRequest, ResidentAdapter | None]], done: Done
    ) -> None:
        """Take requests in, each with its loaded adapter; `done` hears of every one, once."""
        chunk = [_Open(request, adapter, done) for request, adapter in requests]
        for entry in chunk:
            if entry.request.request_id in self._open:
                raise ValueError(f"request {entry.request.request_id} is running already")
            self._open[entry.request.request_id] = entry
        task = asyncio.get_running_loop().create_task(self._feed(chunk))
        self._chunks.add(task)
        task.add_done_callback(self._chunks.discard)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Answer requests with `Aborted` and take them out of the engine."""
        entries = [self._open[name] for name in request_ids if name in self._open]
        tasks = [entry.task for entry in entries if entry.task]
        for entry in entries:
            self._answer(entry, Aborted())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            # One cancelled on its way in may have reached the engine, with nobody listening.
            await self._calls.abort([entry.request.request_id for entry in entries])

    def drop_all(self) -> None:
        """Answer everything with `Aborted`: the engine is gone or going."""
        for entry in list(self._open.values()):
            self._answer(entry, Aborted())
            if entry.task:
                entry.task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _feed(self, chunk: Sequence[_Open]) -> None:
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._thread, self._prepare_all, chunk)
        for entry, ready in zip(chunk, prepared, strict=True):
            if not self._is_open(entry):
                continue
            if isinstance(ready, Failure):
                self._answer(entry, ready)
            else:
                entry.task = loop.create_task(self._run(entry, ready))

    def _prepare_all(self, chunk: Sequence[_Open]) -> list[_Prepared | Failure]:
        return [self._prepare(entry) for entry in chunk]

    def _prepare(self, entry: _Open) -> _Prepared | Failure:
        generation, adapter = entry.request.generation, entry.adapter
        if entry.request.adapter is not None and adapter is None:
            # vLLM would load it inside a step, where a bad one can take the engine down.
            name = entry.request.adapter.lora_name
            return Failure(ErrorCode.ENGINE_ERROR, f"Adapter {name} is not loaded.")
        try:
            template = adapter.chat_template if adapter else None
            prompt = self._renderer.token_ids(generation, template)
            end_token = adapter.end_token if adapter else None
            params = sampling_params(generation, len(prompt), self._rules, end_token)
            return _Prepared(prompt, params)
        except ContextLengthError as error:
            return Failure(ErrorCode.CONTEXT_LENGTH_EXCEEDED, str(error))
        except ValueError as error:
            return Failure(ErrorCode.INVALID_REQUEST, str(error))
        except Exception as error:  # one odd body must not take its whole chunk along
            _log.exception("request %s cannot be prepared", entry.request.request_id)
            return Failure(ErrorCode.INVALID_REQUEST, f"{type(error).__name__}: {error}")

    async def _run(self, entry: _Open, ready: _Prepared) -> None:
        outcome: Outcome = Aborted()
        try:
            outcome = await self._generate(entry, ready)
        except EngineDead as error:
            self._died(str(error))
        finally:
            self._answer(entry, outcome)

    async def _generate(self, entry: _Open, ready: _Prepared) -> Outcome:
        request = entry.request
        try:
            output = await self._calls.generate(
                request.request_id, ready.prompt, ready.params, entry.adapter, request.cache_salt
            )
        except ValueError as error:
            return Failure(ErrorCode.INVALID_REQUEST, str(error))
        except RequestFailedError as error:
            return Failure(ErrorCode.ENGINE_ERROR, str(error))
        return outcome_of(output, ready.params, self._calls.backend)

    def _is_open(self, entry: _Open) -> bool:
        return self._open.get(entry.request.request_id) is entry

    def _answer(self, entry: _Open, outcome: Outcome) -> None:
        if not self._is_open(entry):
            return
        del self._open[entry.request.request_id]
        try:
            entry.done(entry.request, outcome)
        except Exception:  # the other answers are still owed
            _log.exception("the answer to %s was not taken", entry.request.request_id)
