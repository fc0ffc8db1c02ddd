"""What the demo shows: live on a terminal, as plain lines anywhere else."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cli.jobs import answers

#: Between two lines about a wait, where there is no terminal to redraw.
_PLAIN_SECONDS: Final = 10.0
#: Columns of the answers where no terminal says how many it has.
_PLAIN_WIDTH: Final = 120
#: Which logs of the stack tell a newcomer what it is doing.
_TOLD: Final = ("lorry", "demo")


class Show:
    """Writes to a console; knows whether it can redraw."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = "starting the stack"
        self._began = time.monotonic()

    def title(self, text: str) -> None:
        """Say what is about to happen."""
        self._console.print(text, style="bold", highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Take a line of the stack's log: its phases are shown, the rest is for the files."""
        name, bar, said = text.partition("|")
        if bar and name.strip() in _TOLD:
            self._phase = said.strip()
            if not self._console.is_terminal:
                self._plain(self._phase)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Show the phases while the stack starts (the engine: half a minute) or stops."""
        if not self._console.is_terminal:
            with _ticking(self._tick):
                yield
            return
        with Live(get_renderable=self._spinner, console=self._console, transient=True):
            yield

    @contextmanager
    def progress(self, models: Sequence[str], totals: Sequence[int]) -> Iterator["Board"]:
        """Show a bar for each model and the speed, while jobs finish."""
        board = Board(models, totals)
        if not self._console.is_terminal:
            board.on_change = lambda: self._plain(board.line())
            yield board
            return
        with Live(get_renderable=board.render, console=self._console, refresh_per_second=4):
            yield board

    def answers(self, jobs: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Print questions and answers side by side, model by model.

        Args:
            jobs: model, question and finished job.
        """
        table = Table(show_lines=False, expand=True, title="What they answered")
        table.add_column("model", style="bold cyan", no_wrap=True)
        table.add_column("question", ratio=2)
        table.add_column("answer", ratio=3)
        order = {model: None for model, _, _ in jobs}
        for model in order:
            for index, (_, question, job) in enumerate(row for row in jobs if row[0] == model):
                table.add_row(model if index == 0 else "", Text(question), _answer(job))
            table.add_section()
        self._console.print(table, width=None if self._console.is_terminal else _PLAIN_WIDTH)

    def _spinner(self) -> Spinner:
        return Spinner("dots", f"{self._phase} ({time.monotonic() - self._began:.0f} s)")

    def _tick(self) -> None:
        self._plain(f"... {self._phase} ({time.monotonic() - self._began:.0f} s)")

    def _plain(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False, soft_wrap=True)


class Board:
    """The jobs' progress, by model."""

    def __init__(self, models: Sequence[str], totals: Sequence[int]) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>24}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._all = self._bars.add_task("all", total=sum(totals))
        self._tasks = {
            model: self._bars.add_task(model, total=total)
            for model, total in zip(models, totals, strict=True)
        }
        self._began = time.monotonic()
        self._tokens = 0
        #: called after every change, where nothing redraws by itself
        self.on_change: Callable[[], None] = lambda: None

    def finished(self, model: str, tokens: int) -> None:
        """Count a finished job and the tokens of its answer."""
        self._tokens += tokens
        self._bars.advance(self._all)
        self._bars.advance(self._tasks[model])
        self.on_change()

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens per second since the first submission."""
        return self._tokens / max(time.monotonic() - self._began, 1e-3)

    def line(self) -> str:
        """The state as text."""
        by_id = {task.id: task for task in self._bars.tasks}
        counts = ", ".join(
            f"{model} {by_id[task].completed:.0f}/{by_id[task].total:.0f}"
            for model, task in self._tasks.items()
        )
        done = by_id[self._all]
        speed = f"{self.tokens_per_second:.0f} tok/s"
        return f"{done.completed:.0f}/{done.total:.0f} jobs ({counts}), {speed}"

    def render(self) -> Group:
        """The state as something that rich can redraw."""
        return Group(self._bars, Text(f"{self.tokens_per_second:>24.0f} tok/s", style="bold"))


def _answer(job: dict[str, Any]) -> Text:
    if job["state"] == "succeeded":
        return Text("\n".join(answers(job)).strip())
    error = job.get("error") or {}
    return Text(f"{job['state']}: {error.get('message', 'no answer')}", style="bold red")


@contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    import threading

    over = threading.Event()

    def run() -> None:
        while not over.wait(_PLAIN_SECONDS):
            tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
