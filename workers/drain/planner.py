"""Which line to drain next, and for how long: pure decisions over what a look showed.

Lines are drained one after another, in turns. A turn feeds faster than the engine answers only
while the window fills, so many adapters are in the engine at once: the tail of one overlaps the
heads of the next. Turns are short enough that as many lines as there are slots have theirs within
one quantum; so a line waits at most ceil(adapters ahead / slots) quanta, and then for a slot at
most as long as the longest running job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from db.claims import WaitingLine
from db.models import BASE_VERSION_ID

#: A deadline nearer than this is pressing.
PRESSING_SECONDS: Final = 60.0
#: A turn may go on to empty its line if what is left is at most this many times what it has fed:
#: the adapter's slot is free that much sooner.
FINISHING_FACTOR: Final = 2


@dataclass(frozen=True, slots=True)
class SlotView:
    """The engine's slots as the planner sees them.

    Args:
        held_seconds: for each adapter version with unfinished jobs in the engine, how long it has
            held its slot.
        resident: those loaded, in use or not.
        slots: `max_loras`.
    """

    held_seconds: Mapping[int, float]
    resident: frozenset[int]
    slots: int

    def has_slot(self, adapter_version_id: int) -> bool:
        """Whether an adapter needs no slot, or holds one."""
        return adapter_version_id == BASE_VERSION_ID or adapter_version_id in self.held_seconds

    @property
    def free(self) -> int:
        """Slots without unfinished jobs."""
        return max(0, self.slots - len(self.held_seconds))


@dataclass(frozen=True, slots=True)
class Shares:
    """What each tenant was served lately, in tokens: the least served goes first."""

    tokens: Mapping[int, float] = field(default_factory=dict)

    def of(self, tenant_id: int) -> float:
        return self.tokens.get(tenant_id, 0.0)


def order(
    lines: Sequence[WaitingLine], slots: SlotView, shares: Shares, quantum_seconds: float
) -> list[WaitingLine]:
    """The lines that may be drained now, best first.

    Deadline-pressed ones first; then those that have waited past their bound, oldest first; then
    the tenant that was served least; then the line that has waited longest for its turn. An
    adapter without a slot may only be drained while one is free, and an adapter that is closing
    (see `closing`) is not fed at all.

    Args:
        lines: what a look showed.
        slots: the engine's slots.
        shares: tokens served lately, by tenant.
        quantum_seconds: `LORRY_QUANTUM_SECONDS`.
    """
    due = [w for w in lines if w.jobs > 0]
    closed = closing(due, slots, quantum_seconds)
    runnable = [
        w
        for w in due
        if (slots.has_slot(w.line.adapter_version_id) or slots.free)
        and w.line.adapter_version_id not in closed
    ]
    overdue_after = quantum_seconds * -(-len(due) // max(1, slots.slots))

    def key(w: WaitingLine) -> tuple[float, ...]:
        pressed = w.deadline_seconds is not None and w.deadline_seconds < PRESSING_SECONDS
        return (
            w.deadline_seconds if pressed and w.deadline_seconds is not None else 1e18,
            -w.since_seconds if w.since_seconds > overdue_after else 0.0,
            shares.of(w.line.tenant_id),
            -w.since_seconds,
        )

    return sorted(runnable, key=key)


def closing(
    lines: Sequence[WaitingLine], slots: SlotView, quantum_seconds: float
) -> frozenset[int]:
    """Adapters that get no more jobs until they have left the engine, so that others get a slot.

    Those that have held a slot for a quantum or longer, longest first; as many as there are
    adapters blocked, but never more than half of the slots (rounded up): what stays open keeps
    the engine full meanwhile.
    """
    if slots.free:
        return frozenset()
    blocked = {
        w.line.adapter_version_id for w in lines if not slots.has_slot(w.line.adapter_version_id)
    }
    old = [i for i, seconds in slots.held_seconds.items() if seconds >= quantum_seconds]
    old.sort(key=lambda i: -slots.held_seconds[i])
    return frozenset(old[: min(len(blocked), -(-slots.slots // 2))])


def turn_seconds(lines: Sequence[WaitingLine], slots: SlotView, quantum_seconds: float) -> float:
    """How long a turn may last while these lines wait: as many turns as slots fit in a quantum."""
    together = min(max(1, slots.slots), sum(1 for w in lines if w.jobs > 0))
    return quantum_seconds / max(1, together)


def may_finish(fed: int, left: int) -> bool:
    """Whether a turn whose time is over may go on, because its line is nearly empty."""
    return left <= FINISHING_FACTOR * fed
