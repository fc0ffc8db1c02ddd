"""Plans of the statements of `db/`, as they are executed: for EXPLAIN tests."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import orjson

from db.database import Connection, Database

PLANS = ("force_custom_plan", "force_generic_plan")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of an executed plan; counts are over all its loops."""

    kind: str
    relation: str | None
    index: str | None
    rows: float
    loops: int
    filtered: float

    @property
    def scanned(self) -> float:
        return self.rows + self.filtered


@dataclass(frozen=True, slots=True)
class Plan:
    """An executed statement's plan, flat."""

    statement: str
    nodes: tuple[Node, ...]
    pages: int

    def of(self, relation: str) -> list[Node]:
        """The scans of a table."""
        return [n for n in self.nodes if n.relation == relation and "Scan" in n.kind]

    def scanned(self, relation: str) -> float:
        """Rows read from a table, those filtered out too."""
        return sum(node.scanned for node in self.of(relation))

    def indexes(self, relation: str) -> set[str | None]:
        """How a table was read: by which indexes, by `ctid`; None stands for a scan of it all."""
        return {"ctid" if n.kind == "Tid Scan" else n.index for n in self.of(relation)}


@asynccontextmanager
async def explained(database: Database, mode: str) -> AsyncIterator[list[Plan]]:
    """Explain and run every statement that fetches rows, in transactions that are rolled back.

    The statements are those of `db/` itself, caught on their way through the connection.
    """
    plans: list[Plan] = []
    connect = Database.connection

    @asynccontextmanager
    async def connection(self: Database) -> AsyncIterator[Connection]:
        async with connect(self) as real:
            yield _Explaining(real, mode, plans)  # type: ignore[misc]

    with patch.object(Database, "connection", connection):
        yield plans


class _Explaining:
    """A connection whose statements are explained before they are run; both are rolled back."""

    def __init__(self, connection: Connection, mode: str, plans: list[Plan]) -> None:
        self._connection = connection
        self._mode = mode
        self._plans = plans

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        return list(await self._run("fetch", statement, arguments))

    async def execute(self, statement: str, *arguments: Any) -> str:
        return str(await self._run("execute", statement, arguments))

    async def fetchval(self, statement: str, *arguments: Any) -> Any:
        return await self._run("fetchval", statement, arguments)

    def transaction(self) -> Any:
        return self._connection.transaction()

    async def _run(self, method: str, statement: str, arguments: Sequence[Any]) -> Any:
        connection = self._connection
        outer = connection.transaction()
        await outer.start()
        try:
            await connection.execute(f"SET LOCAL plan_cache_mode = {self._mode}")
            inner = connection.transaction()
            await inner.start()
            # EXPLAIN of a statement with parameters never shows its generic plan; EXECUTE does
            prepared = await connection.prepare(statement)
            given = f"({', '.join(map(_literal, arguments))})" if arguments else ""
            document = await connection.fetchval(
                f'EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE "{prepared.get_name()}"{given}'
            )
            await inner.rollback()
            root = orjson.loads(document)[0]["Plan"]
            pages = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
            self._plans.append(Plan(statement, tuple(_nodes(root)), pages))
            return await getattr(connection, method)(statement, *arguments)
        finally:
            await outer.rollback()


def _literal(value: Any) -> str:
    """A parameter as SQL text that takes the parameter's type."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        escaped = (str(v).replace("\\", "\\\\").replace('"', '\\"') for v in value)
        elements = (
            "NULL" if v is None else f'"{text}"' for v, text in zip(value, escaped, strict=True)
        )
        return "'{" + ",".join(elements).replace("'", "''") + "}'"
    return "'" + str(value).replace("'", "''") + "'"


def _nodes(node: dict[str, Any]) -> Iterator[Node]:
    loops = node["Actual Loops"]
    yield Node(
        kind=node["Node Type"],
        relation=node.get("Relation Name"),
        index=node.get("Index Name"),
        rows=node["Actual Rows"] * loops,
        loops=loops,
        filtered=node.get("Rows Removed by Filter", 0) * loops,
    )
    for child in node.get("Plans", ()):
        yield from _nodes(child)
