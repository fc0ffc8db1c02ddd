"""What a JSON value from outside may hold so that Postgres, orjson and the engine can all carry it.

Postgres refuses NUL, orjson refuses integers beyond 64 bits and writes NaN as null, and grammar
compilers have died of deep nesting. So each is refused at the door.
"""

import math
from typing import Any, Final

#: Levels of nesting in a value whose shape the user chooses (a schema, template arguments).
MAX_DEPTH: Final = 64


class Uncarriable(ValueError):
    """The value cannot be carried. The message is a whole clause: what is wrong, what to do."""


def check_text(text: str) -> str:
    """`text` itself, or Uncarriable where it holds a NUL character or a lone surrogate."""
    if "\0" in text:
        raise Uncarriable("must not contain the NUL character (\\u0000); remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Uncarriable(
                f"must not contain the lone surrogate \\u{ord(text[error.start]):04x}; "
                "send whole characters"
            ) from None
    return text


def check_value(value: Any) -> Any:
    """`value` itself, or Uncarriable for anything in it that cannot be carried.

    Walks with a list and not with calls, so that no nesting can exhaust the stack.
    """
    open_nodes = [(value, 1)]
    while open_nodes:
        node, depth = open_nodes.pop()
        if depth > MAX_DEPTH:
            raise Uncarriable(f"is nested more than {MAX_DEPTH} levels deep; flatten it")
        if isinstance(node, dict):
            for key in node:
                check_text(key)
            open_nodes.extend((child, depth + 1) for child in node.values())
        elif isinstance(node, list):
            open_nodes.extend((child, depth + 1) for child in node)
        elif isinstance(node, str):
            check_text(node)
        elif isinstance(node, float) and not math.isfinite(node):
            raise Uncarriable("must not contain a number beyond a double's range")
        elif isinstance(node, int) and not -(2**63) <= node < 2**63:
            raise Uncarriable("must not contain an integer beyond 64 bits")
    return value


def replace_unstorable(text: str) -> str:
    """`text` with U+FFFD for every NUL and lone surrogate: for output, which nobody can correct."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if not text.isascii():
        text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    return text
