"""How often a fault is injected: a few times in CI, as often as promised with `--full`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Chooses between the quick and the full count of a test."""

    full: bool

    def __call__(self, quick: int, full: int) -> int:
        return full if self.full else quick
