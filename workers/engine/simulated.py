"""The simulated engine: for queue and fault tests, never the default, and it says so in every
answer. It keeps time like an engine (so many sequences at once, so long a step) and makes up words.
"""

import argparse
import asyncio
import hashlib
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from core.errors import ErrorCode, UsageError
from core.generation import Aborted, Choice, Completion, Failure, FinishReason, Outcome
from workers.engine.protocol import (
    AdapterLoadError,
    Done,
    EngineDead,
    EngineInfo,
    EngineLimits,
    EngineRequest,
    LocalAdapter,
)

#: An answer's length in tokens (here: words) where nothing asks for another.
NATURAL_TOKENS = 12
#: The answer of the no-op mode, one for all.
_NOOP = Completion([Choice("simulated", "length")], 1, 1)
_WORDS = ("amber", "brook", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "knoll")


@dataclass(slots=True)
class _Sequence:
    """A submitted request; `timer` is set while it computes."""

    request: EngineRequest
    done: Done
    outcome: Outcome
    seconds: float
    timer: asyncio.TimerHandle | None = None


class SimulatedEngine:
    """Answers after `step_seconds` × tokens, at most `max_num_seqs` at once, first come first."""

    def __init__(
        self,
        base_model: str,
        limits: EngineLimits,
        *,
        step_seconds: float,
        die_on: str | None,
        noop: bool = False,
    ) -> None:
        self._info = EngineInfo("simulated", "1", base_model, "simulated", limits)
        self._step_seconds = step_seconds
        self._die_on = die_on
        self._noop = noop
        self._waiting: deque[_Sequence] = deque()
        self._sequences: dict[str, _Sequence] = {}
        self._computing = 0
        self._tokens = 0
        self._stepped_at = time.monotonic()
        self._adapters: set[int] = set()
        self._dead: asyncio.Future[str] | None = None

    @classmethod
    def from_flags(cls, model: str, flags: Sequence[str]) -> Self:
        """Build from vLLM's flags that matter to a queue, and `--sim-…` ones of its own.

        Raises:
            UsageError: a flag that the simulated engine does not take.
        """
        options = _parse(flags)
        limits = EngineLimits(
            options.max_model_len, options.max_num_seqs, options.max_loras, options.max_lora_rank
        )
        return cls(
            options.served_model_name or os.path.basename(model.rstrip("/")) or model,
            limits,
            step_seconds=options.sim_step_ms / 1000,
            die_on=options.sim_die_on,
            noop=options.sim_noop,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def running(self) -> int:
        return len(self._sequences)

    async def start(self) -> None:
        self._dead = asyncio.get_running_loop().create_future()

    async def load_adapter(self, adapter: LocalAdapter) -> None:
        self._check_alive()
        if not os.path.isdir(adapter.path):  # noqa: ASYNC240 - a local folder
            raise AdapterLoadError(f"adapter folder {adapter.path} does not exist")
        self._adapters.add(adapter.lora_int_id)

    async def remove_adapter(self, lora_int_id: int) -> None:
        self._adapters.discard(lora_int_id)

    def submit(self, requests: Sequence[EngineRequest], done: Done) -> None:
        for request in requests:
            outcome, tokens = (_NOOP, 0) if self._noop else _answer(request, self._info)
            sequence = _Sequence(request, done, outcome, tokens * self._step_seconds)
            self._sequences[request.request_id] = sequence
            self._waiting.append(sequence)
        if self._noop:
            asyncio.get_running_loop().call_soon(self._finish_all)
        else:
            self._start_waiting()

    def _finish_all(self) -> None:
        """The no-op mode: everything that waits is answered at once, without a timer each."""
        waiting, self._waiting = self._waiting, deque()
        for sequence in waiting:
            if self._sequences.pop(sequence.request.request_id, None) is not None:
                self._tokens += 1
                sequence.done(sequence.request, sequence.outcome)

    def _start_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self._computing < self._info.limits.max_num_seqs:
            sequence = self._waiting.popleft()
            if sequence.request.request_id not in self._sequences:
                continue  # aborted while it waited
            if self._die_on and self._die_on in str(sequence.request.generation.body):
                self.die("poisoned by a request (--sim-die-on)")
                return
            self._computing += 1
            sequence.timer = loop.call_later(sequence.seconds, self._finish, sequence)

    def _finish(self, sequence: _Sequence) -> None:
        self._computing -= 1
        del self._sequences[sequence.request.request_id]
        if isinstance(sequence.outcome, Completion):
            self._tokens += sequence.outcome.completion_tokens
        self._start_waiting()
        sequence.done(sequence.request, sequence.outcome)

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if sequence := self._sequences.pop(request_id, None):
                if sequence.timer is not None:
                    sequence.timer.cancel()
                    self._computing -= 1
                sequence.done(sequence.request, Aborted())
        self._start_waiting()

    def progress(self) -> int:
        # while anything computes, steps go by
        alive = self._dead is not None and not self._dead.done()
        if self._computing and alive:
            self._stepped_at = time.monotonic()
        return self._tokens + int(self._stepped_at / max(self._step_seconds, 1e-3))

    def die(self, reason: str) -> None:
        """Behave as an engine whose core has died (fault tests)."""
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(reason)
        self._abandon()

    async def wait_dead(self) -> str:
        if self._dead is None:
            raise EngineDead("the engine was never started")
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        sequences, self._sequences = self._sequences, {}
        self._waiting.clear()
        self._computing = 0
        for sequence in sequences.values():
            if sequence.timer is not None:
                sequence.timer.cancel()
            sequence.done(sequence.request, Aborted())

    def _check_alive(self) -> None:
        if self._dead is None or self._dead.done():
            raise EngineDead("the engine is not running")


def _answer(request: EngineRequest, info: EngineInfo) -> tuple[Outcome, int]:
    """The outcome that a request will have, and how many steps it takes."""
    body = request.generation.body
    prompt_tokens = _prompt_tokens(body)
    limit = body.get("max_tokens")
    room = info.limits.max_model_len - prompt_tokens
    if room < (limit or 1):
        message = (
            f"the prompt has {prompt_tokens} tokens and max_tokens is {limit or 1}; together they "
            f"exceed the context of {info.limits.max_model_len}"
        )
        return Failure(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message), 1
    natural = room if body.get("ignore_eos") else NATURAL_TOKENS
    tokens = min(natural, limit or natural)
    reason: FinishReason = "length" if limit is not None and tokens == limit else "stop"
    choices = [
        Choice(" ".join(itertools.islice(_words(request, index), tokens)), reason)
        for index in range(body.get("n") or 1)
    ]
    return Completion(choices, prompt_tokens, tokens * len(choices)), tokens


def _prompt_tokens(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    return max(1, len(str(prompt if prompt is not None else body.get("messages")).split()))


def _words(request: EngineRequest, index: int) -> Iterator[str]:
    """Words that depend on the prompt, the adapter, the seed and the choice alone."""
    body = request.generation.body
    adapter = request.adapter.sha256 if request.adapter else "base"
    asked = str(body.get("prompt", body.get("messages")))
    key = f"{adapter}/{body.get('seed')}/{index}/{asked}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=16).digest()
    yield "simulated"
    yield request.adapter.lora_name[:12] if request.adapter else "base"
    for byte in itertools.cycle(digest):
        yield _WORDS[byte % len(_WORDS)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"simulated engine: {message}")


def _parse(flags: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="simulated engine", add_help=False, allow_abbrev=False)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--sim-step-ms", type=float, default=1.0, help="time of one token")
    parser.add_argument("--sim-die-on", help="die when a request's body holds this text")
    parser.add_argument("--sim-noop", action="store_true", help="one word, at once: for benchmarks")
    return parser.parse_args(list(flags))
