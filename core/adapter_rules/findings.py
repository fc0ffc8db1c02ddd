"""One thing that is wrong with an adapter, told so that its owner can act on it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Args:
        code: for programs; docs/reference/adapter-formats.md lists them.
        message: which tensor or field, found, expected, what to do.
    """

    code: str
    message: str


def alike(code: str, messages: Sequence[str], what: str) -> list[Finding]:
    """One finding for many things wrong in the same way: the first in full, the rest counted.

    Args:
        messages: one for each thing; none gives no finding.
        what: what is counted, in the plural.
    """
    if not messages:
        return []
    rest = f" ({len(messages) - 1} more {what} likewise)" if len(messages) > 1 else ""
    return [Finding(code, messages[0] + rest)]
