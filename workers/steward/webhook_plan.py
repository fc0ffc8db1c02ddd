"""How many deliveries of which line are sent next: pure, so that it can be tested without I/O.

A line is one receiver's deliveries. It holds a few requests at once, fewer while it fails or is
slow, and one alone while it is held back; so what a slow or dead receiver takes from the others is
bounded, whatever waits for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from core.webhook_retry import CIRCUIT_FAILURES
from db.sending import Grant, WaitingLine

#: Beyond this mean time of its answers, a receiver is slow.
SLOW_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests may be under way at once."""

    all: int = 512
    tenant: int = 256
    line: int = 32
    slow_line: int = 4


def grants(
    lines: Sequence[WaitingLine],
    limits: Limits,
    *,
    by_line: Mapping[int, int],
    by_tenant: Mapping[int, int],
    seconds: Callable[[int], float],
) -> list[Grant]:
    """What to claim, the lines with the fewest requests under way first.

    Args:
        lines: those that wait.
        by_line: requests under way, by line.
        by_tenant: likewise, by tenant.
        seconds: the mean time of a line's answers, 0 where none is known.
    """
    left = limits.all - sum(by_line.values())
    tenants = dict(by_tenant)
    granted = []
    waiting = sorted(lines, key=lambda line: by_line.get(line.line, 0))
    for number, line in enumerate(waiting):
        under_way = by_line.get(line.line, 0)
        probe = line.failures >= CIRCUIT_FAILURES
        room = _room(line, limits, seconds(line.line), probe=probe) - under_way
        # an equal share of what is left, so that the last line gets some of it too
        share = max(1, left // (len(waiting) - number))
        of_tenant = limits.tenant - tenants.get(line.tenant_id, 0)
        room = min(room, share, left, of_tenant)
        if room > 0:
            granted.append(Grant(line.line, room, probe))
            left -= room
            tenants[line.tenant_id] = tenants.get(line.tenant_id, 0) + room
    return granted


def _room(line: WaitingLine, limits: Limits, seconds: float, *, probe: bool) -> int:
    if probe:
        return 1
    most = limits.slow_line if seconds > SLOW_SECONDS else limits.line
    return max(1, most >> line.failures)
