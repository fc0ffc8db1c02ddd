"""The workloads of benchmarks/engine_ratio.py."""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A workload: which adapter each request takes, and which bare run it is compared with.

    Args:
        jobs: how many.
        adapter_of: adapter number of request i; −1 is the base model.
        against: the name of the bare workload.
        barrier: how many jobs are fed at once, and waited for, before the next; 0 is no barrier.
    """

    name: str
    jobs: int
    adapter_of: Callable[[int], int]
    against: str
    barrier: int = 0


def zipf(adapters: int, seed: int = 1) -> Callable[[int], int]:
    """Adapter numbers by a Zipf law with exponent 1."""
    weights = [1 / (rank + 1) for rank in range(adapters)]
    drawn = random.Random(seed).choices(range(adapters), weights, k=100_000)
    return drawn.__getitem__


ROWS = {
    row.name: row
    for row in (
        Row("none", 2000, lambda i: -1, "none"),
        Row("one", 2000, lambda i: 0, "one"),
        Row("eight", 2000, lambda i: i % 8, "eight"),
        Row("thirtytwo", 2560, lambda i: i % 32, "one"),
        Row("zipf", 4096, zipf(256), "one"),
        Row("barrier", 2000, lambda i: i % 8, "eight", barrier=2000),
        Row("barrier80", 800, lambda i: i % 8, "eight", barrier=80),
        Row("demo", 240, lambda i: i % 3, "demo"),
    )
}
#: A bare workload measured once more, for the rows after it.
BARE_AGAIN = {f"bare-{row.against}": row.against for row in ROWS.values()}
