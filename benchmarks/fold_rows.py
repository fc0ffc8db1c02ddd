"""The workloads of benchmarks/fold.py."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.engine_rows import Row, zipf


@dataclass(frozen=True, slots=True)
class FoldRow:
    """A workload.

    Args:
        row: its jobs, and which adapter each takes.
        against: the row that it is compared with.
        kind: "bare", "grouped" (bare, adapters in order, bounded in flight), "unfolded" or
            "folded" (our drain).
    """

    row: Row
    against: str = ""
    kind: str = "folded"

    @property
    def name(self) -> str:
        return self.row.name


def _cycle(adapters: int) -> Callable[[int], int]:
    return lambda number: number % adapters


def rows_of(jobs: dict[str, int]) -> dict[str, FoldRow]:
    def row(name: str, adapters: int, each: int, adapter_of: Callable[[int], int]) -> Row:
        return Row(name, adapters * jobs.get(name, each), adapter_of, "")

    one, eight, many = _cycle(1), _cycle(8), _cycle(32)
    grouped = jobs.get("bare-grouped", 80)
    rows = [
        FoldRow(row("bare-one", 1, 2000, one), kind="bare"),
        FoldRow(row("bare-eight", 8, 250, eight), kind="bare"),
        FoldRow(row("bare-grouped", 32, grouped, lambda i: i // grouped), kind="grouped"),
        FoldRow(row("one", 1, 2000, one), "bare-one"),
        FoldRow(row("eight", 8, 1000, eight), "bare-eight"),
        FoldRow(row("thirtytwo", 32, 250, many), "bare-grouped"),
        FoldRow(row("zipf-unfolded", 1, jobs.get("zipf", 4096), zipf(256)), kind="unfolded"),
        FoldRow(row("zipf", 1, 4096, zipf(256)), "zipf-unfolded"),
        FoldRow(row("small-unfolded", 8, jobs.get("small", 20), eight), kind="unfolded"),
        FoldRow(row("small", 8, 20, eight), "small-unfolded"),
        FoldRow(row("eight-unfolded", 8, jobs.get("eight", 1000), eight), kind="unfolded"),
    ]
    return {one.name: one for one in rows}
