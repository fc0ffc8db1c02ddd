"""What the lines of a batch name as their model, each name looked up once."""

from collections.abc import Iterable
from typing import Final

from core.errors import ModelNotFound
from db.database import Database
from db.registry import Target, find, resolve

#: Unknown names whose nearest ones are told.
MOST_ADVISED: Final = 100
#: Unknown names that are remembered: a file may hold a million.
MOST_REMEMBERED: Final = 1000


class Models:
    """The models of one batch. `look_up` names, then ask."""

    def __init__(self, database: Database, tenant_id: int) -> None:
        self._database = database
        self._tenant_id = tenant_id
        self._targets: dict[str, Target] = {}
        self._unknown: dict[str, str] = {}
        self._advised = 0

    async def look_up(self, names: Iterable[str]) -> None:
        """Find out what these names stand for."""
        if len(self._unknown) > MOST_REMEMBERED:
            self._unknown.clear()
        for name in names:
            if name not in self._targets and name not in self._unknown:
                await self._look_up(name)

    def target(self, name: str) -> Target | None:
        """What a name stands for, or None where it is unknown."""
        return self._targets.get(name)

    def why_not(self, name: str) -> str:
        """What to tell about an unknown name."""
        return self._unknown[name]

    async def _look_up(self, name: str) -> None:
        async with self._database.connection() as connection:
            if self._advised >= MOST_ADVISED:
                target = await find(connection, self._tenant_id, name)
                if target is None:
                    self._unknown[name] = f"model {name[:200]!r} does not exist or is not ready"
                else:
                    self._targets[name] = target
                return
            try:
                self._targets[name] = await resolve(connection, self._tenant_id, name)
            except ModelNotFound as error:
                self._unknown[name] = error.message
                self._advised += 1
