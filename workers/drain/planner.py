"""Which line to drain next: a pure decision over what a look showed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from db.claims import WaitingLine
from db.models import BASE_VERSION_ID
from db.waiting import Line

#: A deadline nearer than this is pressing.
PRESSING_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SlotView:
    """The engine's slots as the planner sees them.

    Args:
        in_use: adapter version ids with unfinished jobs in the engine.
        resident: those loaded, in use or not.
        slots: `max_loras`.
    """

    in_use: frozenset[int]
    resident: frozenset[int]
    slots: int

    def can_run(self, adapter_version_id: int) -> bool:
        """Whether a job of this adapter may be fed without evicting a slot in use."""
        if adapter_version_id == BASE_VERSION_ID or adapter_version_id in self.in_use:
            return True
        return len(self.in_use) < self.slots


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

    Deadline-pressed ones first; then those that have waited past their turn; then the tenant
    that was served least; then what is resident, before what is large and old.

    Args:
        lines: what a look showed.
        slots: the engine's slots.
        shares: tokens served lately by tenant.
        quantum_seconds: a line that waited longer than a quantum for every round of slots before
            it is overdue.
    """
    runnable = [w for w in lines if w.jobs > 0 and slots.can_run(w.line.adapter_version_id)]
    rounds = -(-len(lines) // max(1, slots.slots))
    overdue_after = quantum_seconds * max(1, rounds)

    def key(w: WaitingLine) -> tuple[float, ...]:
        pressed = w.deadline_seconds is not None and w.deadline_seconds < PRESSING_SECONDS
        overdue = w.since_seconds > overdue_after
        resident = w.line.adapter_version_id in slots.resident
        return (
            w.deadline_seconds if pressed and w.deadline_seconds is not None else 1e18,
            -w.since_seconds if overdue else 0.0,
            shares.of(w.line.tenant_id),
            0 if resident or w.line.adapter_version_id == BASE_VERSION_ID else 1,
            w.place if w.place is not None else 0,
            -w.jobs,
        )

    return sorted(runnable, key=key)


def should_yield(
    line: Line, turn_seconds: float, lines: Sequence[WaitingLine], quantum_seconds: float
) -> bool:
    """Whether a line's turn is over: its quantum is spent while another line waits."""
    return turn_seconds >= quantum_seconds and any(w.line != line and w.jobs for w in lines)
