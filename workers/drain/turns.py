"""Turns: which line is drained now, and when another's time has come.

Carries out what `planner.py` decides: looks at the waiting list, begins and ends turns, and leaves
alone for a moment what has nothing due or is another worker's.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from core.retry import backoff
from db import claims
from db.claims import WaitingLine
from db.database import Database
from db.waiting import Line
from workers.drain.fold import Choice
from workers.drain.neighbours import Neighbours
from workers.drain.planner import (
    SlotView,
    left_to_others,
    may_finish,
    order,
    turn_seconds,
    upcoming,
)
from workers.drain.shares import Served
from workers.drain.slots import Slots
from workers.metrics import Waiting

#: Lines left with jobs that a look shows, wherever they stand: they may fill seats again.
UNEMPTIED: Final = 16
#: A line whose jobs are not due yet (they wait out a retry) is left alone this long.
COOL_DOWN_SECONDS: Final = 0.25


@dataclass(slots=True)
class Turn:
    """A line that is being drained.

    Args:
        waiting: the line as it was last seen.
        seconds_allowed: how long the turn may last.
        jobs_allowed: how many jobs it may claim.
        fed: jobs claimed in it so far.
    """

    waiting: WaitingLine
    seconds_allowed: float
    jobs_allowed: float = math.inf
    started_at: float = field(default_factory=time.monotonic)
    fed: int = 0

    @property
    def line(self) -> Line:
        return self.waiting.line

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def over(self) -> bool:
        """Whether it has had its time, or its jobs."""
        return self.seconds >= self.seconds_allowed or self.fed >= self.jobs_allowed


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look showed, and what follows for this worker, best first."""

    lines: Sequence[WaitingLine]
    slots: SlotView
    best: Sequence[WaitingLine]


class Turns:
    """Begins and ends turns; at most one is open.

    Args:
        partitions: those to serve; None is all but those that others have to themselves.
        adapters: those to serve, by name; None is all.
        neighbours: what the other workers hold.
        max_num_seqs: sequences that the engine computes at once.
    """

    def __init__(
        self,
        database: Database,
        slots: Slots,
        *,
        base_model_id: int,
        partitions: Collection[int] | None,
        adapters: Collection[str] | None,
        quantum_seconds: float,
        neighbours: Neighbours,
        max_num_seqs: int = 256,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._database = database
        self._slots = slots
        self._base_model_id = base_model_id
        self._partitions = partitions
        self._adapters = adapters
        self._quantum_seconds = quantum_seconds
        self._neighbours = neighbours
        self._cool_until: dict[Line, float] = {}
        self._put_off: Counter[Line] = Counter()
        self._jitter = random.Random()
        #: lines of this worker's own: a probe that wants a slot (admission.py)
        self.own_lines: Callable[[], list[WaitingLine]] = list
        self._left_until: dict[Line, float] = {}
        #: adapter versions whose lines had jobs left when their turns ended, latest last
        self._unemptied: dict[int, None] = {}
        self._served = Served()
        self.current: Turn | None = None
        #: what the last look showed
        self.seen: Seen | None = None
        self._fold = Choice(None)
        self._rest_until = 0.0
        #: what the last look saw for this worker
        self.waiting = Waiting.NOTHING
        #: partitions with a line that was newly left to others: they want a ring
        self.left_partitions: set[int] = set()

    async def current_or_next(self, *, running: int) -> Turn | None:
        """The open turn, or a new one for the line that the planner puts first.

        Args:
            running: jobs in the engine.
        """
        if self.current is None:
            seen = await self._look(running)
            if seen.best:
                self.current = Turn(seen.best[0], *self._allowed(seen))
            blocked = Waiting.SLOT if seen.lines else Waiting.NOTHING
            self.waiting = Waiting.FEEDABLE if seen.best else blocked
        return self.current

    def set_fold(self, fold: Choice, rest_seconds: float) -> None:
        """From now on one adapter alone computes: its lines come first, or get nothing.

        Args:
            rest_seconds: where none is folded, how long the others then have to get their turns in.
        """
        self._fold = fold
        self._rest_until = time.monotonic() + rest_seconds
        if self.current is not None:
            self.current.seconds_allowed = 0.0  # it ends, or is the best one still

    def _allowed(self, seen: Seen) -> tuple[float, float]:
        """How long a turn may last, and how many jobs it may claim.

        Around the end of a fold everybody gets a turn, and a fair part of what computes at once.
        """
        usual = turn_seconds(seen.slots, self._quantum_seconds)
        closing = self._fold.version is not None and not self._fold.feed
        if not closing and time.monotonic() >= self._rest_until:
            return usual, math.inf
        lines = max(1, len(seen.lines))
        return min(usual, self._quantum_seconds / lines), math.ceil(self._max_num_seqs / lines)

    def idle_seconds(self) -> float:
        """After how long a look may find more, without a ring: a line is left alone no longer."""
        first = min(self._left_until.values(), default=math.inf)
        return max(0.01, first - time.monotonic())

    def served(self, tenant_id: int, tokens: int) -> None:
        """Jobs of a tenant were fed."""
        self._served.add(tenant_id, tokens)

    async def end_if_over(self, turn: Turn, *, running: int) -> None:
        """End a turn whose time is over, if another line can use it.

        Args:
            running: jobs in the engine.
        """
        if not turn.over or self.current is not turn:
            return
        look = await self._look(running)
        seen = next((w for w in look.lines if w.line == turn.line), None)
        # none is best where this line is closing and no other has a slot yet
        if seen is None or not look.best or look.best[0].line != turn.line:
            nearly_empty = seen is not None and may_finish(turn.fed, seen.jobs)
            if not nearly_empty or turn.seconds > self._quantum_seconds or self._fold.version:
                await self.end(turn)
            return
        turn.waiting = seen
        turn.started_at, turn.fed = time.monotonic(), 0
        turn.seconds_allowed, turn.jobs_allowed = self._allowed(look)

    def put_off(self, turn: Turn) -> None:
        """Leave a line alone whose adapter cannot be had now, longer each time."""
        self.current = None
        self._put_off[turn.line] += 1
        delay = backoff(self._put_off[turn.line], self._jitter)
        self._cool_until[turn.line] = time.monotonic() + delay

    async def end(self, turn: Turn) -> None:
        """Close a turn: its line leaves the waiting list, or goes to its back."""
        self.current = None
        self._put_off.pop(turn.line, None)
        left = await claims.end_turn(self._database, turn.line)
        if left and not turn.fed:
            self._cool_until[turn.line] = time.monotonic() + COOL_DOWN_SECONDS
        self._unemptied.pop(turn.line.adapter_version_id, None)
        if left:
            self._unemptied[turn.line.adapter_version_id] = None
        while len(self._unemptied) > UNEMPTIED:
            del self._unemptied[next(iter(self._unemptied))]

    async def _look(self, running: int) -> Seen:
        everything = self._partitions is None and self._adapters is None
        found = await claims.look(
            self._database,
            self._base_model_id,
            partitions=self._partitions,
            adapters=self._adapters,
            resident=self._slots.resident | self._unemptied.keys(),
            without=self._neighbours.partitions if everything else (),
            highest_rank=self._slots.highest_rank,
        )
        now = time.monotonic()
        self._cool_until = {line: t for line, t in self._cool_until.items() if t > now}
        for waiting in found:
            if waiting.jobs == 0 and waiting.line not in self._cool_until:
                await self._settle_empty(waiting.line)
        due = [w for w in found if w.jobs and w.line not in self._cool_until]
        slots = self._slots.view()
        lines = self._without_left(due, slots, running > 0) + self.own_lines()
        if self.current is not None:  # it has its turn: its place in line is the last
            mine = self.current.line
            lines = [replace(w, since_seconds=0.0) if w.line == mine else w for w in lines]
        shares = self._served.shares({w.line.tenant_id for w in lines})
        seats_free = running < self._max_num_seqs
        soon = upcoming(lines, slots, shares, self._quantum_seconds, seats_free=seats_free)
        self._slots.prefetch(soon)
        best = order(lines, slots, shares, self._quantum_seconds, seats_free=seats_free)
        version, feed = self._fold
        if version is not None and feed:
            best.sort(key=lambda w: w.line.adapter_version_id != version)
        elif version is not None:
            best = [w for w in best if w.line.adapter_version_id != version]
        self.seen = Seen(lines, slots, best)
        return self.seen

    def _without_left(
        self, due: Sequence[WaitingLine], slots: SlotView, busy: bool
    ) -> list[WaitingLine]:
        """The lines that are not left to other workers; remembers which are, and until when."""
        left = left_to_others(due, slots, self._neighbours.resident, busy=busy)
        now = time.monotonic()
        self.left_partitions.update(
            w.partition for w in due if w.line in left and w.line not in self._left_until
        )
        self._left_until = {line: now + seconds for line, seconds in left.items()}
        return [w for w in due if w.line not in left]

    async def _settle_empty(self, line: Line) -> None:
        """A line with nothing due leaves the list, or is left alone for a moment."""
        if await claims.end_turn(self._database, line):
            self._cool_until[line] = time.monotonic() + COOL_DOWN_SECONDS
