"""Live rates: how many tokens and jobs a second each adapter gets, and telling Postgres about it.

A rate is an exponentially decayed sum: what finished weighs less the longer ago it was. Tokens
count when their job finishes, since the engine says nothing on the way.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from core.errors import Unavailable
from db.database import Database
from db.rates import Rate, forget_dead, publish, publish_resident

log = logging.getLogger(__name__)

#: What finished so long ago weighs 1/e.
WINDOW_SECONDS: Final = 30.0
PUBLISH_SECONDS: Final = 5.0
#: An adapter is forgotten below this many jobs in its decayed sum: ten windows after its last.
FORGET_JOBS: Final = math.exp(-10)
#: The first moments are taken as one second long: the first job must not look like a torrent.
SHORTEST_SECONDS: Final = 1.0


@dataclass(slots=True)
class _Decayed:
    tokens: float
    jobs: float
    at: float


class LiveRates:
    """Tokens and jobs per second by adapter version (0: the base model), over about 30 s.

    Right after the start the window is as long as the worker is old, so that a rate is true at
    once and not only after half a minute.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, window_seconds: float = WINDOW_SECONDS
    ) -> None:
        self._clock = clock
        self._window = window_seconds
        self._started_at = clock()
        self._sums: dict[int, _Decayed] = {}

    def add(self, adapter_version_id: int, tokens: int, jobs: int = 1) -> None:
        """Jobs have finished with so many tokens in their answers."""
        now = self._clock()
        known = self._sums.get(adapter_version_id)
        if known is None:
            self._sums[adapter_version_id] = _Decayed(tokens, jobs, now)
            return
        left = math.exp((known.at - now) / self._window)
        known.tokens = known.tokens * left + tokens
        known.jobs = known.jobs * left + jobs
        known.at = now

    def rates(self) -> dict[int, Rate]:
        """The rate of every adapter that finished something lately."""
        now = self._clock()
        age = max(now - self._started_at, SHORTEST_SECONDS)
        # what a steady rate of 1 would have summed up to by now
        weight = self._window * -math.expm1(-age / self._window)
        rates = {}
        for adapter_version_id, known in list(self._sums.items()):
            left = math.exp((known.at - now) / self._window)
            if known.jobs * left < FORGET_JOBS:
                del self._sums[adapter_version_id]
            else:
                rates[adapter_version_id] = Rate(
                    known.tokens * left / weight, known.jobs * left / weight
                )
        return rates


async def publish_rates(
    database: Database,
    worker_id: int,
    base_model_id: int,
    rates: LiveRates,
    every_seconds: float = PUBLISH_SECONDS,
    resident: Callable[[], Collection[int]] = tuple,
) -> None:
    """Publish for ever. Nothing is written while nothing changes; no failure stops the worker.

    Args:
        resident: the adapter versions in the engine's slots, published too.
    """
    tidied, published = False, False
    told: Collection[int] = ()
    while True:
        await asyncio.sleep(every_seconds)
        current = rates.rates()
        try:
            if not tidied:
                await forget_dead(database)
                tidied = True
            if current or published:
                await publish(database, worker_id, base_model_id, current)
                published = bool(current)
            if (now := resident()) != told:
                await publish_resident(database, worker_id, now)
                told = now
        except Unavailable as error:
            log.debug("Rates wait: %s", error, extra={"action": "rates_wait"})
        except Exception:  # rates are good to have; the drain must go on without them
            log.exception("Rates not published", extra={"action": "rates_failed"})
