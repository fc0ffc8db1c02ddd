"""Shares: what each tenant was served lately, so that the least served goes first.

This is start-time fair queueing over decaying counts. Deficit round robin would bound the same
unfairness by one quantum for each tenant; see docs/decisions/0017-least-served-tenant-first.md.
"""

import time
from collections.abc import Callable, Collection
from typing import Final

from workers.drain.planner import Shares

#: What a tenant was served counts half as much after this time.
HALF_LIFE_SECONDS: Final = 30.0
#: Below this many tokens a tenant is forgotten.
FORGET_TOKENS: Final = 1.0


class Served:
    """Tokens fed to the engine by tenant, halved every 30 s."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens: dict[int, float] = {}
        self._waiting: frozenset[int] = frozenset()
        self._halved_at = clock()

    def add(self, tenant_id: int, tokens: int) -> None:
        """Jobs of a tenant were fed."""
        self._tokens[tenant_id] = self._tokens.get(tenant_id, 0.0) + tokens

    def shares(self, waiting: Collection[int]) -> Shares:
        """The shares of the tenants that wait now.

        One that did not wait at the last look begins just below the least served of those that
        did: it goes first, but what it did not use while it was away buys it nothing more.
        """
        self._halve()
        tenants = frozenset(waiting)
        if stayed := tenants & self._waiting:
            floor = min(self._tokens.get(t, 0.0) for t in stayed) - 1
            for newcomer in tenants - stayed:
                self._tokens[newcomer] = max(self._tokens.get(newcomer, 0.0), floor)
        self._waiting = tenants
        return Shares(dict(self._tokens))

    def _halve(self) -> None:
        now = self._clock()
        while now - self._halved_at > HALF_LIFE_SECONDS:
            self._halved_at += HALF_LIFE_SECONDS
            halved = {tenant: tokens / 2 for tenant, tokens in self._tokens.items()}
            self._tokens = {t: n for t, n in halved.items() if n > FORGET_TOKENS}
