"""The simulated engine: for queue and fault tests, never the default, and it says so in every
answer. It keeps time like an engine (so many sequences at once, steps that take longer the more
compute, a pause for every load) and makes up words.
"""

import asyncio
import heapq
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from core.generation import Aborted, Choice, Completion, Outcome
from workers.engine.protocol import (
    AdapterLoadError,
    Done,
    EngineDead,
    EngineInfo,
    EngineLimits,
    EngineRequest,
    FoldRefused,
    FoldTimes,
    LocalAdapter,
    ProbeResult,
)
from workers.engine.simulated_answers import answer
from workers.engine.simulated_clock import StepClock
from workers.engine.simulated_flags import parse

#: The answer of the no-op mode, one for all.
_NOOP = Completion([Choice("simulated", "length")], 1, 1)
#: Sequences that end so soon end together: timers are no finer.
_TIMER_SECONDS = 0.0005


@dataclass(slots=True)
class _Sequence:
    """A submitted request, and how many steps it still takes.

    Args:
        turn: counts up whenever it stops computing before its end.
        ends_at: the clock's step at which it ends, while it computes.
    """

    request: EngineRequest
    done: Done
    outcome: Outcome
    steps: float
    computing: bool = False
    turn: int = 0
    ends_at: float = 0.0

    @property
    def adapter(self) -> int:
        return self.request.adapter.lora_int_id if self.request.adapter else 0


@dataclass(frozen=True, slots=True)
class SimulatedFold:
    """How the simulated engine folds.

    Args:
        factor: a folded step's time over that of a step with adapters.
        seconds: how long the engine stands still to fold, and again to restore.
        fails_on: an adapter at whose fold the engine dies half-way.
    """

    factor: float = 1.0
    seconds: float = 0.0
    fails_on: int | None = None


class SimulatedEngine:
    """Answers after a step a token, at most `max_num_seqs` at once, first come first.

    Args:
        base_model: the name it serves.
        limits: what it takes at once.
        clock: how long a step takes.
        load_seconds: how long the engine stands still for an adapter that is not resident.
        die_on: text in a request's body at which the engine dies.
        noop: answer at once, with one word for all.
        fold: how it folds; None does not.
    """

    def __init__(
        self,
        base_model: str,
        limits: EngineLimits,
        *,
        clock: StepClock,
        load_seconds: float = 0.0,
        die_on: str | None = None,
        noop: bool = False,
        fold: SimulatedFold | None = None,
    ) -> None:
        refusal = None if fold and limits.max_loras else "folding is off (--fold off)"
        self._info = EngineInfo(
            "simulated",
            "1",
            base_model,
            "simulated",
            limits,
            refusal,
            fold.seconds if fold else 0.0,
        )
        self._fold = fold or SimulatedFold()
        #: the adapter that alone computes
        self.folded: int | None = None
        self._clock = clock
        self._load_seconds = load_seconds
        self._die_on = die_on
        self._noop = noop
        self._waiting: deque[_Sequence] = deque()
        self._sequences: dict[str, _Sequence] = {}
        #: those that compute, by the step at which they end; aborted ones stay until then
        self._ends: list[tuple[float, int, int, _Sequence]] = []
        self._started = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        #: answers of the no-op mode, which takes no steps
        self._tokens = 0
        #: the slots, least recently used first
        self._adapters: OrderedDict[int, None] = OrderedDict()
        self._dead: asyncio.Future[str] | None = None

    @classmethod
    def from_flags(cls, model: str, flags: Sequence[str], *, fold: bool = False) -> Self:
        """Build from vLLM's flags that matter to a queue, and `--sim-…` ones of its own.

        Args:
            fold: whether it may fold adapters.

        Raises:
            UsageError: a flag that the simulated engine does not take.
        """
        options = parse(flags)
        limits = EngineLimits(
            options.max_model_len,
            options.max_num_seqs,
            options.max_loras,
            options.max_lora_rank,
            options.sim_cache_tokens,
        )
        return cls(
            options.served_model_name or os.path.basename(model.rstrip("/")) or model,
            limits,
            clock=StepClock(options.sim_step_ms / 1000, options.sim_step_ms_per_seq / 1000),
            load_seconds=options.sim_load_ms / 1000,
            die_on=options.sim_die_on,
            noop=options.sim_noop,
            fold=SimulatedFold(
                options.sim_fold_factor, options.sim_fold_ms / 1000, options.sim_fold_fails
            )
            if fold
            else None,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def running(self) -> int:
        return len(self._sequences)

    @property
    def step_seconds(self) -> float:
        """How long a step takes now."""
        return self._clock.seconds

    async def start(self) -> None:
        self._dead = asyncio.get_running_loop().create_future()

    async def load_adapter(self, adapter: LocalAdapter) -> None:
        self._check_alive()
        if not os.path.isdir(adapter.path):  # noqa: ASYNC240 - a local folder
            raise AdapterLoadError(f"adapter folder {adapter.path} does not exist")
        if adapter.lora_int_id not in self._adapters and self._load_seconds:
            self._clock.pause(self._load_seconds)
            await asyncio.sleep(self._load_seconds)
        self._use(adapter.lora_int_id)

    def read_ahead(self, adapters: Sequence[LocalAdapter]) -> None:
        """Nothing: a load takes what it was told to take."""

    def _use(self, lora_int_id: int) -> None:
        """The adapter is the most recently used; the least recent goes where it is one too many."""
        self._adapters[lora_int_id] = None
        self._adapters.move_to_end(lora_int_id)
        if len(self._adapters) > self._info.limits.max_loras:
            self._adapters.popitem(last=False)

    async def remove_adapter(self, lora_int_id: int) -> None:
        self._adapters.pop(lora_int_id, None)

    async def probe_adapter(self, adapter: LocalAdapter) -> ProbeResult:
        self._check_alive()
        if self._die_on and self._die_on in _config_of(adapter):
            self.die("poisoned by an adapter (--sim-die-on)")
            self._check_alive()
        return ProbeResult(None, note="the simulated engine does not compute with adapters")

    async def pin_adapter(self, lora_int_id: int) -> None:
        self._check_alive()
        if lora_int_id not in self._adapters:
            raise AdapterLoadError(f"adapter {lora_int_id} is not resident")

    async def fold(self, lora_int_id: int | None) -> FoldTimes:
        self._check_alive()
        if self._info.fold_refusal is not None:
            raise FoldRefused(self._info.fold_refusal)
        if lora_int_id is not None and lora_int_id not in self._adapters:
            raise FoldRefused(f"adapter {lora_int_id} is not resident")
        restore = self._fold.seconds if self.folded is not None else 0.0
        fold = self._fold.seconds if lora_int_id is not None else 0.0
        self._clock.pause(restore + fold)
        self._clock.factor = self._fold.factor if lora_int_id is not None else 1.0
        self.folded = lora_int_id
        if lora_int_id is not None:
            self._park(lora_int_id)
        self._start_waiting()
        await asyncio.sleep(restore + fold)
        if lora_int_id is not None and lora_int_id == self._fold.fails_on:
            reason = "a fold went wrong half-way (--sim-fold-fails)"
            self.die(reason)
            raise EngineDead(reason)
        return FoldTimes(restore, fold, restore + fold)

    def _park(self, lora_int_id: int) -> None:
        """What computes and may not any more goes to the front of the line, as far as it is."""
        step = self._clock.advance()
        others = [one for one in self._sequences.values() if one.computing]
        for sequence in others:
            if sequence.adapter != lora_int_id:
                sequence.computing = False
                sequence.steps = max(0.0, sequence.ends_at - step)
                sequence.turn += 1
                self._clock.computing -= 1
                self._waiting.appendleft(sequence)

    def submit(self, requests: Sequence[EngineRequest], done: Done) -> None:
        for request in requests:
            outcome, tokens = (_NOOP, 0) if self._noop else answer(request, self._info)
            sequence = _Sequence(request, done, outcome, tokens)
            if request.adapter is not None:
                self._use(request.adapter.lora_int_id)
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
        step = self._clock.advance()
        parked: deque[_Sequence] = deque()
        while self._waiting and self._clock.computing < self._info.limits.max_num_seqs:
            sequence = self._waiting.popleft()
            if sequence.request.request_id not in self._sequences:
                continue  # aborted while it waited
            if self.folded is not None and sequence.adapter != self.folded:
                parked.append(sequence)
                continue
            if self._die_on and self._die_on in str(sequence.request.generation.body):
                self.die("poisoned by a request (--sim-die-on)")
                return
            sequence.computing = True
            sequence.ends_at = step + sequence.steps
            self._clock.computing += 1
            number = next(self._started)
            heapq.heappush(self._ends, (sequence.ends_at, number, sequence.turn, sequence))
        self._waiting.extendleft(reversed(parked))
        self._set_timer()

    def _check_step(self) -> None:
        """As the real engine: a step with requests of another adapter than the folded ends it."""
        if self.folded is None:
            return
        computing = {one.adapter for one in self._sequences.values() if one.computing}
        if computing - {self.folded}:
            self.die(f"adapter {self.folded} is folded, and others computed")

    def _set_timer(self) -> None:
        """Wake when the next sequence ends; whatever changes the clock's pace calls this."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ends and not _is_current(self._ends[0]):
            heapq.heappop(self._ends)
        if self._ends:
            seconds = self._clock.seconds_until(self._ends[0][0])
            self._timer = asyncio.get_running_loop().call_later(seconds, self._finish_due)

    def _finish_due(self) -> None:
        self._check_step()
        due = self._clock.advance() + _TIMER_SECONDS / self._clock.seconds
        finished = []
        while self._ends and self._ends[0][0] <= due:
            end = heapq.heappop(self._ends)
            if _is_current(end):
                finished.append(end[-1])
                self._clock.tokens += max(0.0, end[0] - self._clock.steps)  # a timer's width early
                self._leave(end[-1])
        self._start_waiting()
        for sequence in finished:
            sequence.done(sequence.request, sequence.outcome)

    def _leave(self, sequence: _Sequence) -> None:
        """A sequence is over, whether it computed or not. The clock was advanced."""
        self._sequences.pop(sequence.request.request_id, None)
        if sequence.computing:
            sequence.computing = False
            self._clock.computing -= 1

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._clock.advance()
        for request_id in request_ids:
            if sequence := self._sequences.get(request_id):
                self._leave(sequence)
                sequence.done(sequence.request, Aborted())
        self._start_waiting()

    def progress(self) -> int:
        self._clock.advance()
        return self._tokens + round(self._clock.tokens)

    def made(self) -> int:
        return self.progress()

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
        self._ends.clear()
        self._set_timer()
        self._clock.advance()
        self._clock.computing = 0
        for sequence in sequences.values():
            sequence.done(sequence.request, Aborted())

    def _check_alive(self) -> None:
        if self._dead is None or self._dead.done():
            raise EngineDead("the engine is not running")


def _is_current(end: tuple[float, int, int, _Sequence]) -> bool:
    """Whether an end still holds: neither aborted nor parked since."""
    _, _, turn, sequence = end
    return sequence.computing and sequence.turn == turn


def _config_of(adapter: LocalAdapter) -> str:
    try:
        return Path(adapter.path, "adapter_config.json").read_text(encoding="utf-8")
    except OSError:
        return ""
