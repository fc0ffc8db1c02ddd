"""Folding: carries out what `fold.py` decides, and measures what it is worth.

It looks several times a second at what is in the engine and what the last look at the waiting list
showed. Loading stays the feeder's: only an adapter that is resident is folded.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from workers.drain.fold import Choice, FoldView, Held, choose, rest_after
from workers.drain.slots import Slots
from workers.drain.turns import Turns
from workers.drain.window import Window
from workers.engine.protocol import Engine, FoldRefused
from workers.metrics import DrainMetrics

log = logging.getLogger(__name__)

#: Pause between two decisions while there is work.
TICK_SECONDS: Final = 0.05
#: What a fold gains is taken to be this until it was measured: less than was ever measured.
GAIN_PRIOR: Final = 1.3
#: Seconds of a full engine, with and without a fold, until its own measurement is believed.
BELIEVE_SECONDS: Final = 3.0
#: After so many seconds of either kind what was seen counts half.
REMEMBER_SECONDS: Final = 60.0
#: After so many seconds of a full engine without a fold, what folds were seen to do is forgotten:
#: one that was found not to gain is tried again.
FORGET_SECONDS: Final = 300.0
#: What a prompt's token costs beside one that is made: a prompt's are computed many at once.
#: About 30,000 to 6,000 a second of an H100 and an 8B model.
PROMPT_COST: Final = 0.2
#: Of a full engine with adapters, prompts included, until measured.
TOKENS_PER_SECOND_PRIOR: Final = 8000.0
#: What a switch takes until one was made, where the engine did not try at its start.
SWITCH_PRIOR_SECONDS: Final = 0.2


class Gauge:
    """What a full engine does in a second, folded and not: the newest minute counts most."""

    def __init__(self) -> None:
        self._work = {True: 0.0, False: 0.0}
        self._tokens = {True: 0.0, False: 0.0}
        self._seconds = {True: 0.0, False: 0.0}
        self._since_fold = 0.0

    def add(self, folded: bool, made: float, tokens: float, seconds: float) -> None:
        """So many tokens were made, and worked on with prompts, while the engine was full."""
        if self._seconds[folded] > REMEMBER_SECONDS:
            for sums in (self._work, self._tokens, self._seconds):
                sums[folded] /= 2
        # a fold begins with many prompts: a short one would seem slow if they did not count
        self._work[folded] += made + PROMPT_COST * (tokens - made)
        self._tokens[folded] += tokens
        self._seconds[folded] += seconds
        self._since_fold = 0.0 if folded else self._since_fold + seconds
        if self._since_fold > FORGET_SECONDS:
            self._work[True] = self._tokens[True] = self._seconds[True] = 0.0

    @property
    def gain(self) -> float:
        """How many times faster a folded engine works."""
        if min(self._seconds.values()) < BELIEVE_SECONDS or not self._work[False]:
            return GAIN_PRIOR
        rate = {folded: self._work[folded] / self._seconds[folded] for folded in (True, False)}
        return rate[True] / rate[False]

    @property
    def tokens_per_second(self) -> float:
        """Of an engine with adapters, prompts included."""
        if self._seconds[False] < BELIEVE_SECONDS or not self._tokens[False]:
            return TOKENS_PER_SECOND_PRIOR
        return self._tokens[False] / self._seconds[False]


class Folding:
    """Decides and folds. All its methods run on the event loop that owns the engine.

    Args:
        allowed: whether adapters are folded at all, where the engine can.
        blocked: whether nothing may be folded: suspects or a probe have the engine, or it stops.
        folds: told of an adapter version that is folded from now on: its jobs run folded.
        look: makes the feeder look at once.
        loading: entered for each switch: the lease watches how long it takes.
    """

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        turns: Turns,
        window: Window,
        metrics: DrainMetrics,
        *,
        allowed: bool = True,
        quantum_seconds: float,
        blocked: Callable[[], bool],
        folds: Callable[[int], None],
        look: Callable[[], None],
        loading: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._turns = turns
        self._window = window
        self._metrics = metrics
        self._allowed = allowed
        self._quantum_seconds = quantum_seconds
        self._blocked = blocked
        self._folds = folds
        self._look = look
        self._loading = loading
        self._clock = clock
        self._changed_at = clock()
        self._parked_at: float | None = None
        self._rest_seconds = 0.0
        self._refused: set[int] = set()
        self._seen = (clock(), engine.made(), engine.progress())
        self._wake = asyncio.Event()
        self.gauge = Gauge()
        self.switch_seconds = 2 * engine.info.fold_seconds or SWITCH_PRIOR_SECONDS
        #: the adapter version that is folded
        self.folded: int | None = None

    def wake(self) -> None:
        """There is work, or there was."""
        self._wake.set()

    async def run(self) -> None:
        """Fold and unfold for ever. Raises EngineDead."""
        if not self._allowed:
            return
        if refusal := self._engine.info.fold_refusal:
            log.info("Adapters are not folded: %s", refusal, extra={"action": "fold_refused"})
            return
        while True:
            if self.folded is None and not self._window.held:
                self._wake.clear()
                await self._wake.wait()
            self._measure()
            choice = Choice(None) if self._blocked() else choose(self.view())
            if choice.version != self.folded:
                await self._switch(choice.version)
            self._feed(choice)
            await asyncio.sleep(TICK_SECONDS)

    def view(self) -> FoldView:
        """What the next decision is made of."""
        now, limits = self._clock(), self._engine.info.limits
        seen = self._turns.seen
        return FoldView(
            folded=self.folded,
            held=self._window.held,
            lines=seen.best if seen else (),
            waiting=seen.lines if seen else (),
            slots=self._slots.view(),
            max_num_seqs=limits.max_num_seqs,
            cache_tokens=limits.cache_tokens,
            refused=self._refused,
            state_seconds=now - self._changed_at,
            parked_seconds=0.0 if self._parked_at is None else now - self._parked_at,
            rest_seconds=self._rest_seconds,
            quantum_seconds=self._quantum_seconds,
            gain=self.gauge.gain,
            switch_seconds=self.switch_seconds,
            tokens_per_second=self.gauge.tokens_per_second,
        )

    async def _switch(self, version: int | None) -> None:
        before, since, now = self.folded, self._changed_at, self._clock()
        others = any(v != before for v in self._window.held) or bool(self._others_wait())
        try:
            with self._loading():
                times = await self._engine.fold(version)
        except FoldRefused as error:
            assert version is not None
            self._refused.add(version)
            log.warning("Adapter not folded: %s", error, extra={"action": "fold_refused"})
            return
        self.folded, self._changed_at = version, self._clock()
        if version is not None and before is not None:
            self.switch_seconds = (self.switch_seconds + times.pause) / 2
        elif version is not None:  # the way back costs about as much again
            self.switch_seconds = (self.switch_seconds + 2 * times.pause) / 2
        self._metrics.switched(version is not None, times)
        self._seen = (self._changed_at, self._engine.made(), self._engine.progress())
        if version is None:
            self._parked_at = None
            self._rest_seconds = rest_after(now - since, others)
        else:
            self._folds(version)
            if self._parked_at is None:
                self._parked_at = self._changed_at
        self._tell(Choice(version))
        log.info(
            "Folded %s" if version is not None else "Unfolded",
            *([version] if version is not None else []),
            extra={"action": "fold", "adapter_version": version, "seconds": times.pause},
        )

    def _feed(self, choice: Choice) -> None:
        """Feed the folded adapter, or others who wait for its end: because it is not to be fed,
        or has nothing to be fed with."""
        if self.folded is None or choice.version != self.folded:
            return
        seen = self._turns.seen
        more = seen and any(w.line.adapter_version_id == self.folded for w in seen.lines)
        fold = Choice(self.folded, choice.feed and bool(more))
        self._window.others_wait = self._others_wait()
        if fold != self._window.fold:
            self._tell(fold)

    def _tell(self, fold: Choice) -> None:
        self._window.fold = fold
        self._turns.set_fold(fold, self._rest_seconds if fold.version is None else 0.0)
        self._look()

    def _others_wait(self) -> bool:
        seen = self._turns.seen
        return any(w.line.adapter_version_id != self.folded for w in seen.lines) if seen else False

    def _measure(self) -> None:
        """Count what the engine did since the last look, if it was full all the while."""
        seen = now, made, tokens = self._clock(), self._engine.made(), self._engine.progress()
        at, made_before, tokens_before = self._seen
        self._seen = seen
        held = self._window.held
        folded = self.folded is not None
        jobs = held.get(self.folded or 0, Held()).jobs if folded else _adapted(held)
        if folded:
            self._metrics.folded_tokens += made - made_before
        if jobs >= self._window.enough and now > at:
            self.gauge.add(folded, made - made_before, tokens - tokens_before, now - at)


def _adapted(held: dict[int, Held]) -> int:
    return sum(one.jobs for version, one in held.items() if version)
