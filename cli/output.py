"""How answers are shown: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

#: `--json`, on every command that answers with data.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show_json(value: Any) -> None:
    """Print a JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def show_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool, none: str
) -> None:
    """Print rows as a table of some of their columns, or whole as a JSON list.

    Args:
        rows: what to show.
        columns: the table's columns, as keys of the rows.
        as_json: whether to print JSON.
        none: what a person reads where there are no rows.
    """
    if as_json:
        show_json(list(rows))
    elif not rows:
        print(none)
    else:
        _table(rows, columns)


def error(message: str) -> None:
    """Tell on stderr, in one line, what went wrong."""
    print(f"lorry: {' '.join(message.split())}", file=sys.stderr)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a pipe has no width: what another program reads must not be cut
    console.print(table)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.endswith("_at") and isinstance(value, int | float):
        value = datetime.fromtimestamp(value, UTC)
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return str(value)
