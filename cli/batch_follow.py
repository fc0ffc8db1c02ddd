"""A live bar of a batch: done, failed, tokens per second, time left."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cli.client import Client, Unreachable
from cli.paths import segment
from core.batch_status import BatchStatus

#: Pause between looks.
LOOK_SECONDS: Final = 0.5
#: How long the API may be away: a restart costs nothing.
AWAY_SECONDS: Final = 120.0
#: What tokens per second are taken over.
WINDOW_SECONDS: Final = 10.0

_T = TypeVar("_T")


def until_final(client: Client, batch: dict[str, Any]) -> dict[str, Any]:
    """Show the batch until it is final; returns it.

    Raises:
        LorryError: the API refused, or was away for too long.
    """
    console = Console(stderr=True)
    batch_id = batch["id"]
    pace = _Pace()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(batch["status"], total=None, facts="")
        while True:
            pace.note(batch)
            counts = batch["request_counts"]
            progress.update(
                task,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                facts=facts(batch, pace.tokens_per_second(), time.time()),
            )
            if BatchStatus(batch["status"]).is_final:
                return batch
            time.sleep(LOOK_SECONDS)
            batch = patiently(lambda: client.get(f"/v1/batches/{segment(batch_id)}"))


def facts(batch: dict[str, Any], tokens_per_second: float, now: float) -> str:
    """What stands beside the bar."""
    parts = []
    if failed := batch["request_counts"]["failed"]:
        parts.append(f"{failed} failed")
    if tokens_per_second:
        parts.append(f"{tokens_per_second:,.0f} tok/s")
    promised = batch["lorry"] or {}
    if promised.get("estimated_finish_at"):
        parts.append(f"{_clock(max(0.0, promised['estimated_finish_at'] - now))} left")
    if promised.get("warning"):
        parts.append(promised["warning"])
    return " · ".join(parts)


class _Pace:
    """Tokens of answers over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, batch: dict[str, Any]) -> None:
        now = time.monotonic()
        self._seen.append((now, batch["usage"]["output_tokens"]))
        while now - self._seen[0][0] > WINDOW_SECONDS:
            self._seen.popleft()

    def tokens_per_second(self) -> float:
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last > first else 0.0


def patiently(call: Callable[[], _T]) -> _T:
    """What `call` returns, called again while the API is away; it must bear being repeated."""
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return call()
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_SECONDS)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
