"""Which line to drain next, and for how long: pure decisions over what a look showed.

Lines are drained one after another, in turns. A turn feeds faster than the engine answers only
while the window fills, so many adapters are in the engine at once: the tail of one overlaps the
heads of the next. Turns are short enough that as many lines as there are slots have theirs within
one quantum; so a line waits at most ceil(adapters ahead / slots) quanta, and then for a slot at
most as long as the longest running job.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from db.claims import COUNT_CAP, PRESSING_SECONDS, WaitingLine
from db.models import BASE_VERSION_ID
from db.waiting import Line

#: A turn may go on to empty its line if what is left is at most this many times what it has fed:
#: the adapter's slot is free that much sooner.
FINISHING_FACTOR: Final = 2
#: Turns in a quantum, at least. One that has nobody beside it goes on after another look.
TURNS_IN_QUANTUM: Final = 8
#: A load pauses the engine. So a line that needs none goes before another tenant's, unless that
#: tenant was served less by more than so many tokens (about a second of a GPU's work).
RESIDENT_TOKENS: Final = 4000
#: Adapters that are made ready before there is a slot for them, at least.
LOADS_AHEAD: Final = 4
#: A line of fewer jobs is cold: not worth a load here while another worker holds its adapter.
COLD_JOBS: Final = 32
#: How long a cold line is left to the worker that holds its adapter.
LEAVE_SECONDS: Final = 1.5


@dataclass(frozen=True, slots=True)
class SlotView:
    """The engine's slots as the planner sees them.

    Args:
        held_seconds: for each adapter version with unfinished jobs in the engine, how long it has
            held its slot.
        resident: those loaded, in use or not.
        slots: `max_loras`.
        pinned: those that keep their slots, in use or not.
    """

    held_seconds: Mapping[int, float]
    resident: frozenset[int]
    slots: int
    pinned: frozenset[int] = frozenset()

    def has_slot(self, adapter_version_id: int) -> bool:
        """Whether an adapter needs no slot, or holds one."""
        return (
            adapter_version_id == BASE_VERSION_ID
            or adapter_version_id in self.held_seconds
            or adapter_version_id in self.pinned
        )

    def is_ready(self, adapter_version_id: int) -> bool:
        """Whether an adapter's jobs can be fed without a load."""
        return adapter_version_id == BASE_VERSION_ID or adapter_version_id in self.resident

    @property
    def shared(self) -> int:
        """Slots that the adapters take in turn."""
        return max(0, self.slots - len(self.pinned))

    @property
    def free(self) -> int:
        """Slots that another adapter may have now."""
        return max(0, self.slots - len(self.held_seconds.keys() | self.pinned))


@dataclass(frozen=True, slots=True)
class Shares:
    """What each tenant was served lately, in tokens: the least served goes first."""

    tokens: Mapping[int, float] = field(default_factory=dict)

    def of(self, tenant_id: int) -> float:
        return self.tokens.get(tenant_id, 0.0)


def order(
    lines: Sequence[WaitingLine],
    slots: SlotView,
    shares: Shares,
    quantum_seconds: float,
    *,
    seats_free: bool = False,
) -> list[WaitingLine]:
    """The lines that may be drained now, best first.

    An adapter without a slot may only be drained while one is free, and an adapter that is closing
    (see `closing`) is not fed at all.

    Args:
        lines: what a look showed.
        slots: the engine's slots.
        shares: tokens served lately, by tenant.
        quantum_seconds: `LORRY_QUANTUM_SECONDS`.
        seats_free: whether the engine has fewer jobs than it computes at once.
    """
    due = [w for w in lines if w.jobs > 0]
    closed = closing(due, slots, quantum_seconds)
    runnable = [
        w
        for w in due
        if (slots.has_slot(w.line.adapter_version_id) or slots.free)
        and w.line.adapter_version_id not in closed
    ]
    filler = _filler(runnable, slots) if seats_free else None
    return sorted(runnable, key=_precedence(due, slots, shares, quantum_seconds, filler))


def upcoming(
    lines: Sequence[WaitingLine],
    slots: SlotView,
    shares: Shares,
    quantum_seconds: float,
    *,
    seats_free: bool = False,
) -> list[int]:
    """The adapter versions that will probably be loaded next, soonest first: twice as many as
    there are free slots, and never fewer than a few, since slots may come free together."""
    due = [w for w in lines if w.jobs > 0]
    filler = _filler(due, slots) if seats_free else None
    due.sort(key=_precedence(due, slots, shares, quantum_seconds, filler))
    loads = dict.fromkeys(w.line.adapter_version_id for w in due)
    return [i for i in loads if not slots.is_ready(i)][: max(LOADS_AHEAD, 2 * slots.free)]


def _filler(lines: Sequence[WaitingLine], slots: SlotView) -> Line | None:
    """The line that is to take seats which stay empty for want of slots: the longest, unless one
    that has a slot does so already. Short ones would fill no seats; they keep their order."""
    if any(slots.has_slot(w.line.adapter_version_id) for w in lines):
        return None
    longest = max(lines, key=lambda w: w.jobs, default=None)
    return longest.line if longest is not None and longest.jobs >= COLD_JOBS else None


def _precedence(
    due: Sequence[WaitingLine],
    slots: SlotView,
    shares: Shares,
    quantum_seconds: float,
    filler: Line | None,
) -> Callable[[WaitingLine], tuple[float, ...]]:
    """What lines are sorted by, least first.

    Deadline-pressed ones first; then those that have waited past their bound, oldest first; then
    the tenant that was served least, where a line that needs no load has a start, for a quantum
    at most; then the one that fills empty seats; then the line that has waited longest.
    """
    overdue_after = quantum_seconds * -(-len(due) // max(1, slots.shared))

    def key(w: WaitingLine) -> tuple[float, ...]:
        ready = slots.is_ready(w.line.adapter_version_id) or w.since_seconds > quantum_seconds
        start = RESIDENT_TOKENS if ready or w.line == filler else 0
        return (
            w.deadline_seconds if _pressed(w) and w.deadline_seconds is not None else 1e18,
            -w.since_seconds if w.since_seconds > overdue_after else 0.0,
            shares.of(w.line.tenant_id) - start,
            w.line != filler,
            -w.since_seconds,
        )

    return key


def _pressed(w: WaitingLine) -> bool:
    return w.deadline_seconds is not None and w.deadline_seconds < PRESSING_SECONDS


def left_to_others(
    lines: Sequence[WaitingLine], slots: SlotView, elsewhere: Collection[int], *, busy: bool
) -> dict[Line, float]:
    """Cold lines that a busy worker leaves alone while another one holds their adapters.

    A hot line spreads over the workers at once. A cold one would cost a load, here and perhaps
    again there; so it is left to its holder, but for a moment only: the holder may be full, or
    gone. An idle worker leaves nothing, since its loads keep nobody waiting.

    Args:
        elsewhere: adapter versions resident in other live workers.
        busy: whether this worker has jobs in its engine.

    Returns:
        Each line with the seconds for which it is still left alone.
    """
    if not busy:
        return {}
    return {
        w.line: LEAVE_SECONDS - w.since_seconds
        for w in lines
        if w.line.adapter_version_id in elsewhere
        and not slots.is_ready(w.line.adapter_version_id)
        and w.jobs < COLD_JOBS
        and w.since_seconds < LEAVE_SECONDS
        and not _pressed(w)
    }


def closing(
    lines: Sequence[WaitingLine], slots: SlotView, quantum_seconds: float
) -> frozenset[int]:
    """Adapters that get no more jobs until they have left the engine, so that others get a slot.

    Those that have held a slot for a quantum or longer, longest first; as many as there are
    adapters blocked, but never more than half of the slots (rounded up): what stays open keeps
    the engine full meanwhile. A pinned adapter never closes: its slot would not come free.
    """
    if slots.free:
        return frozenset()
    blocked = {
        w.line.adapter_version_id for w in lines if not slots.has_slot(w.line.adapter_version_id)
    }
    held = slots.held_seconds
    old = [i for i in held if held[i] >= quantum_seconds and i not in slots.pinned]
    old.sort(key=lambda i: -held[i])
    return frozenset(old[: min(len(blocked), -(-slots.shared // 2))])


def turn_seconds(slots: SlotView, quantum_seconds: float) -> float:
    """How long a turn may last before others are looked for: as many turns as slots fit in a
    quantum, and a few where there is hardly a slot, for those that need none."""
    return quantum_seconds / max(TURNS_IN_QUANTUM, slots.slots)


def may_finish(fed: int, left: int) -> bool:
    """Whether a turn whose time is over may go on, because its line is nearly empty.

    Args:
        left: jobs that still wait; a look that counted up to its cap says nothing of the kind.
    """
    return left < COUNT_CAP and left <= FINISHING_FACTOR * fed
