"""Priority as a head start in line.

A job's place in its adapter's line is the time it came, moved forward by its priority. So a higher
priority goes first, and a lower one cannot starve: after `SECONDS_PER_PRIORITY` × the difference it
is the older one that goes first, without any ageing pass over the table.
"""

from typing import Final

LOWEST: Final = -100
HIGHEST: Final = 100
#: One step of priority is worth a quarter of an hour in line; the whole range about two days.
SECONDS_PER_PRIORITY: Final = 900


def place_in_line(submitted_ms: int, priority: int) -> int:
    """Where a job stands in its adapter's line; the least is served first.

    Args:
        submitted_ms: when it was submitted, in milliseconds since the epoch.
        priority: −100 … 100, higher first.

    Returns:
        Milliseconds since the epoch, moved by the head start.
    """
    return submitted_ms - priority * SECONDS_PER_PRIORITY * 1000
