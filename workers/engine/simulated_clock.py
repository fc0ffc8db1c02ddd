"""The time of the simulated engine: steps that take longer the more sequences compute."""

import time
from collections.abc import Callable
from typing import Final

#: No step is shorter, so that none divides by zero.
SHORTEST_STEP_SECONDS: Final = 1e-6


class StepClock:
    """Counts steps, in fractions too: each sequence makes one token in a step.

    Args:
        step_seconds: a step's time without any sequence.
        seconds_per_sequence: what each computing sequence adds to it.
        now: the time in seconds.
    """

    def __init__(
        self,
        step_seconds: float,
        seconds_per_sequence: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step_seconds = step_seconds
        self._seconds_per_sequence = seconds_per_sequence
        self._now = now
        self._at = self._paused_until = now()
        #: sequences that compute; call `advance` before you change it
        self.computing = 0
        #: what a step's time is multiplied by; call `advance` before you change it
        self.factor = 1.0
        self.steps = 0.0
        #: tokens made, one by each computing sequence in each step
        self.tokens = 0.0

    @property
    def seconds(self) -> float:
        """How long a step takes now."""
        step = self._step_seconds + self._seconds_per_sequence * self.computing
        return max(SHORTEST_STEP_SECONDS, step * self.factor)

    def advance(self) -> float:
        """Count the steps since the last call, in which as many sequences computed as now."""
        now = self._now()
        since = max(self._at, min(now, self._paused_until))
        if self.computing:
            steps = (now - since) / self.seconds
            self.steps += steps
            self.tokens += steps * self.computing
        self._at = now
        return self.steps

    def pause(self, seconds: float) -> None:
        """No steps are made for so long: an adapter is loaded between two of them."""
        self.advance()
        self._paused_until = max(self._at, self._paused_until) + seconds

    def seconds_until(self, step: float) -> float:
        """How long until a step is reached, if nothing starts or ends before it."""
        paused = max(0.0, self._paused_until - self._at)
        return paused + max(0.0, step - self.steps) * self.seconds
