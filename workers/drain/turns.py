"""Turns: which line is drained now, and when another's time has come.

Carries out what `planner.py` decides: looks at the waiting list, begins and ends turns, and leaves
alone for a moment what has nothing due.
"""

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from db import claims
from db.claims import WaitingLine
from db.database import Database
from db.waiting import Line
from workers.drain.planner import Shares, may_finish, order, turn_seconds
from workers.drain.slots import Slots

#: A line whose jobs are not due yet (they wait out a retry) is left alone this long.
COOL_DOWN_SECONDS: Final = 0.25
#: What a tenant was served counts half as much after this time.
SHARE_HALF_LIFE_SECONDS: Final = 30.0


@dataclass(slots=True)
class Turn:
    """A line that is being drained.

    Args:
        waiting: the line as it was last seen.
        seconds_allowed: how long the turn may last.
        fed: jobs claimed in it so far.
    """

    waiting: WaitingLine
    seconds_allowed: float
    started_at: float = field(default_factory=time.monotonic)
    fed: int = 0

    @property
    def line(self) -> Line:
        return self.waiting.line

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_at


class Turns:
    """Begins and ends turns; at most one is open."""

    def __init__(
        self,
        database: Database,
        slots: Slots,
        *,
        base_model_id: int,
        partitions: Collection[int] | None,
        adapters: Collection[str] | None,
        quantum_seconds: float,
    ) -> None:
        self._database = database
        self._slots = slots
        self._base_model_id = base_model_id
        self._partitions = partitions
        self._adapters = adapters
        self._quantum_seconds = quantum_seconds
        self._cool_until: dict[Line, float] = {}
        self._served: Counter[int] = Counter()
        self._halved_at = time.monotonic()
        self.current: Turn | None = None
        #: whether the last look saw work that could not be fed: no slot was free for it
        self.blocked = False

    async def current_or_next(self) -> Turn | None:
        """The open turn, or a new one for the line that the planner puts first."""
        if self.current is None:
            lines = await self._look()
            slots = self._slots.view()
            best = order(lines, slots, self._shares(), self._quantum_seconds)
            self.blocked = bool(lines) and not best
            if best:
                allowed = turn_seconds(lines, slots, self._quantum_seconds)
                self.current = Turn(best[0], allowed)
        return self.current

    def served(self, tenant_id: int, tokens: int) -> None:
        """Jobs of a tenant were fed."""
        self._served[tenant_id] += tokens

    async def end_if_over(self, turn: Turn) -> None:
        """End a turn whose time is over, if another line can use it."""
        if turn.seconds < turn.seconds_allowed or self.current is not turn:
            return
        lines = await self._look()
        slots = self._slots.view()
        best = order(lines, slots, self._shares(), self._quantum_seconds)
        seen = next((w for w in lines if w.line == turn.line), None)
        if seen is None or (best and best[0].line != turn.line):
            nearly_empty = seen is not None and may_finish(turn.fed, seen.jobs)
            if not nearly_empty or turn.seconds > self._quantum_seconds:
                await self.end(turn)
            return
        turn.waiting = seen
        turn.started_at, turn.fed = time.monotonic(), 0
        turn.seconds_allowed = turn_seconds(lines, slots, self._quantum_seconds)

    async def end(self, turn: Turn) -> None:
        """Close a turn: its line leaves the waiting list, or goes to its back."""
        self.current = None
        left = await claims.end_turn(self._database, turn.line)
        if left and not turn.fed:
            self._cool_until[turn.line] = time.monotonic() + COOL_DOWN_SECONDS

    async def _look(self) -> list[WaitingLine]:
        seen = await claims.look(
            self._database,
            self._base_model_id,
            partitions=self._partitions,
            adapters=self._adapters,
            resident=self._slots.view().resident,
        )
        now = time.monotonic()
        self._cool_until = {line: t for line, t in self._cool_until.items() if t > now}
        for waiting in seen:
            if waiting.jobs == 0 and waiting.line not in self._cool_until:
                await self._settle_empty(waiting.line)
        return [w for w in seen if w.jobs and w.line not in self._cool_until]

    async def _settle_empty(self, line: Line) -> None:
        """A line with nothing due leaves the list, or is left alone for a moment."""
        if await claims.end_turn(self._database, line):
            self._cool_until[line] = time.monotonic() + COOL_DOWN_SECONDS

    def _shares(self) -> Shares:
        now = time.monotonic()
        while now - self._halved_at > SHARE_HALF_LIFE_SECONDS:
            self._halved_at += SHARE_HALF_LIFE_SECONDS
            self._served = Counter({t: n // 2 for t, n in self._served.items() if n > 1})
        return Shares(self._served)
