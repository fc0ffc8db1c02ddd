"""How long a migration may keep others waiting.

A migration that changes two tables holds one while it waits for the other, and a statement of the
running release may hold the other and wait for the first. Postgres ends such a circle after
`deadlock_timeout` (1 s) at the expense of whoever looks first. So a migration gives up well
before, lets go of all that it has, and tries again: nobody else ever pays for it.
"""

from typing import Final

LIMITS: Final = {"lock_timeout": "200ms", "statement_timeout": "60s"}
#: For so long a migration tries to have its locks.
PATIENCE_SECONDS: Final = 120.0
#: Between two tries, at most; the traffic that queued behind the first goes on meanwhile.
LONGEST_PAUSE_SECONDS: Final = 1.0
#: SQLSTATE of a lock that was not had in time, and of a deadlock.
LOCKED: Final = ("55P03", "40P01")


def set_limits() -> list[str]:
    """The statements that set the limits for a connection."""
    return [f"SET {setting} = '{value}'" for setting, value in LIMITS.items()]
