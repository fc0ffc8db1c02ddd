"""The window: how much may be in the engine at once, by jobs and by tokens.

More than computes at once, so that the scheduler always has a next one; not much more, so that a
job that comes later with a higher priority is not stuck behind them.
"""

import math
from typing import Final

from workers.drain.fold import Choice, Held
from workers.engine.protocol import EngineLimits

#: A claim is worth its round trips from this share of the window on, unless the engine is short.
SMALLEST_CHUNK_SHARE: Final = 1 / 16


#: `LORRY_FEED_FACTOR` of a folded adapter while others wait for it to end.
FOLDED_FACTOR: Final = 1.1


class Window:
    """Counts what is in the engine against what may be.

    Args:
        limits: the engine's.
        feed_factor: `LORRY_FEED_FACTOR`.
        backlog_allowed: results that may wait for Postgres before they take up room: a slow
            Postgres sets the pace.
    """

    __slots__ = ("_backlog_allowed", "_chunk", "_tokens", "_tokens_allowed", "enough", "fold",
                 "held", "jobs", "others_wait", "size")  # fmt: skip

    def __init__(self, limits: EngineLimits, feed_factor: float, backlog_allowed: int) -> None:
        #: jobs that compute at once
        self.enough = limits.max_num_seqs
        #: jobs that may be in the engine
        self.size = math.ceil(limits.max_num_seqs * feed_factor)
        self.jobs = 0
        #: the same by adapter version
        self.held: dict[int, Held] = {}
        #: what is folded, and whether it is fed
        self.fold = Choice(None)
        #: whether others than the folded adapter wait
        self.others_wait = False
        self._chunk = max(1, math.floor(self.size * SMALLEST_CHUNK_SHARE))
        self._tokens = 0
        self._tokens_allowed = math.ceil(limits.cache_tokens * feed_factor) or math.inf
        self._backlog_allowed = backlog_allowed

    def enter(self, version: int, jobs: int, tokens: int) -> None:
        """Jobs of an adapter version with so many expected tokens were fed."""
        self._change(version, jobs, tokens)

    def leave(self, version: int, tokens: int) -> None:
        """One has left the engine."""
        self._change(version, -1, -tokens)

    def _change(self, version: int, jobs: int, tokens: int) -> None:
        self.jobs += jobs
        self._tokens += tokens
        held = self.held.get(version, Held())
        if held.jobs + jobs:
            self.held[version] = Held(held.jobs + jobs, held.tokens + tokens)
        else:
            self.held.pop(version, None)

    @property
    def _active(self) -> int:
        """Jobs that compute, or do so as soon as others end: those of the folded adapter alone."""
        if self.fold.version is None:
            return self.jobs
        return self.held.get(self.fold.version, Held()).jobs

    @property
    def _room(self) -> int:
        """For how many more there is room, as far as their number goes.

        While an adapter is folded and fed, only its own jobs count: the others' are parked. Once
        it is not fed any more, others' are, as many as will compute when they may.
        """
        if self.fold.version is None:
            return self.size - self.jobs
        if not self.fold.feed:
            return self.enough - (self.jobs - self._active)
        # what waits in the engine of it when the fold ends would be in the others' way
        size = math.ceil(self.enough * FOLDED_FACTOR) if self.others_wait else self.size
        return size - self._active

    @property
    def cache_full(self) -> bool:
        """Whether the expected tokens suffice, however few the jobs."""
        return self._tokens >= self._tokens_allowed

    @property
    def short(self) -> bool:
        """Whether the engine could compute more than it has."""
        return self._active < self.enough and self._tokens < self._tokens_allowed

    def room(self, unrecorded: int) -> int:
        """How many more jobs may be claimed; below 1 none.

        Args:
            unrecorded: results that Postgres has not taken yet.
        """
        if self._tokens >= self._tokens_allowed:
            return 0
        backlog = unrecorded - self._backlog_allowed
        return self._room - (backlog if backlog > 0 else 0)

    def room_beside(self, version: int) -> float:
        """How many jobs of an adapter version may be fed: where another is folded, as many as will
        compute when they may."""
        if self.fold.version == version:
            return math.inf if self.fold.feed else 0
        if self.fold.version is None:
            return math.inf
        return self.enough - (self.jobs - self._active)

    @property
    def least_chunk(self) -> int:
        """Room from which a claim is worth it: some, or any where the engine runs short."""
        return 1 if self._active < self.enough else self._chunk
