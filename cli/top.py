"""`lorry top`: what waits and what works, live in a terminal."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.local import DataDir, with_database
from cli.output import AsJson, show_json
from core.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from db.database import Database
    from db.stats import AdapterNow, QueueNow, WorkerNow

#: Adapters shown per base model where the terminal's height says nothing better.
_SHOWN: Final = 20


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between frames.")] = 2.0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show workers and waiting adapters, live; end it with Ctrl-C.

    With --json every frame is a line of JSON; with --once it is one document.
    """
    with_database(data_dir, lambda database: _show(database, once, every, as_json))


async def _show(database: "Database", once: bool, every: float, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    queue, workers = await _look(database)
    if once and as_json:
        show_json(as_document(queue, workers))
    elif as_json:
        while True:
            print(json.dumps(as_document(queue, workers)), flush=True)
            await asyncio.sleep(every)
            queue, workers = await _look(database)
    elif once or not console.is_terminal:  # a pipe has no screen to redraw
        console.print(frame(queue, workers))
    else:
        with Live(frame(queue, workers), console=console, screen=True, auto_refresh=False) as live:
            note = ""
            while True:
                live.update(frame(queue, workers, note, console.height), refresh=True)
                await asyncio.sleep(every)
                try:
                    queue, workers = await _look(database)
                    note = ""
                except Unavailable as error:  # the last frame stays until Postgres is back
                    note = error.message


async def _look(database: "Database") -> "tuple[QueueNow, list[WorkerNow]]":
    from db.stats import queue_now, workers_now

    return await queue_now(database), await workers_now(database)


def as_document(queue: "QueueNow", workers: "list[WorkerNow]") -> dict[str, Any]:
    """A frame for programs: totals, and the rows behind them."""
    return {
        "waiting": sum(row.waiting for row in queue.adapters),
        "waiting_is_at_least": any(row.capped for row in queue.adapters)
        or queue.lines > queue.lines_counted,
        "running": sum(worker.running for worker in workers),
        "tokens_per_second": round(sum(worker.tokens_per_second for worker in workers), 1),
        "workers": [asdict(worker) for worker in workers],
        "adapters": [asdict(row) for row in queue.adapters],
    }


def frame(
    queue: "QueueNow", workers: "list[WorkerNow]", note: str = "", height: int | None = None
) -> "RenderableType":
    """A frame for people.

    Args:
        note: a line on top, such as why this frame is old.
        height: of the terminal, in lines; None shows up to 20 adapters of each base model.
    """
    from rich.console import Group
    from rich.text import Text

    totals = as_document(queue, workers)
    more = "≥ " if totals["waiting_is_at_least"] else ""
    head = (
        f"{more}{totals['waiting']:,} waiting   {totals['running']:,} running   "
        f"{totals['tokens_per_second']:,.0f} tok/s   {len(workers)} workers"
    )
    parts: list[RenderableType] = [Text(note, style="red")] if note else []
    parts.append(Text(head, style="bold"))
    bases = sorted({w.base_model for w in workers} | {row.base_model for row in queue.adapters})
    # six lines of every base are headings and blanks
    left = None if height is None else height - 2 - len(workers) - 6 * len(bases)
    shown = _SHOWN if left is None else max(3, left // max(1, len(bases)))
    for base in bases:
        parts += [Text(""), Text(base, style="bold cyan")]
        parts.append(_workers([w for w in workers if w.base_model == base]))
        rows = [row for row in queue.adapters if row.base_model == base]
        parts.append(_adapters(rows[:shown]))
        if len(rows) > shown:
            parts.append(Text(f"  and {len(rows) - shown:,} more", style="dim"))
    return Group(*parts)


def _workers(workers: "list[WorkerNow]") -> "RenderableType":
    if not workers:
        from rich.text import Text

        return Text("  no live worker", style="red")
    table = _table(("worker", "engine"), ("running", "heartbeat", "tok/s"))
    for worker in workers:
        window = "" if worker.max_num_seqs is None else f"/{worker.max_num_seqs}"
        table.add_row(
            f"{worker.id} {worker.hostname}:{worker.pid}",
            f"{worker.engine} {worker.engine_version}",
            f"{worker.running}{window}",
            f"{_age(worker.heartbeat_age_seconds)} ago",
            f"{worker.tokens_per_second:,.0f}",
        )
    return table


def _adapters(rows: "list[AdapterNow]") -> "RenderableType":
    table = _table(("adapter", "tenant"), ("waiting", "oldest", "tok/s"))
    for row in rows:
        table.add_row(
            row.adapter or "(base model)",
            row.tenant or "-",
            f"{'≥ ' if row.capped else ''}{row.waiting:,}",
            "-" if row.oldest_age_seconds is None else _age(row.oldest_age_seconds),
            f"{row.tokens_per_second:,.0f}",
        )
    return table


def _table(left: Iterable[str], right: Iterable[str]) -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=True)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
