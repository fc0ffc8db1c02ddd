"""How an invalid request is told: which field, which value, what to do; every error at once."""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import ErrorDetails

from core.errors import InvalidRequest

#: A list of 100,000 wrong items is one mistake: the rest of it is only counted.
MOST_ERRORS: Final = 20
_LONGEST_VALUE: Final = 80


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that is wrong.

    Args:
        field: its path, such as `messages[0].content`; empty for the whole.
        clause: what is wrong and what to do, to be read after the path.
        value: the value as it may be shown, or None where it would not help.
    """

    field: str
    clause: str
    value: str | None = None


def invalid_request(errors: Sequence[FieldError]) -> InvalidRequest:
    """The error that tells of all `errors`, of which there is at least one."""
    first = errors[0]
    message = f"{first.field} {first.clause}".strip()
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more: see errors)"
    return InvalidRequest(
        _encodable(message),
        field=_encodable(first.field),
        errors=[_as_member(error) for error in errors[:MOST_ERRORS]],
    )


def field_errors(details: Sequence[ErrorDetails], known: Collection[str] = ()) -> list[FieldError]:
    """What pydantic found, in the words that a user reads.

    Args:
        known: the fields that there are, of which the one nearest to an unknown field is named.
    """
    return [_field_error(detail, known) for detail in details]


def _field_error(detail: ErrorDetails, known: Collection[str]) -> FieldError:
    field = _path(detail["loc"])
    value = shown(detail["input"])
    context = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "lorry":
        field = context.get("field", field)
        return FieldError(field, detail["msg"], None if "field" in context else value)
    if kind == "missing":
        return FieldError(field, "is required; add it")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(field[:100], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "remove it"
        return FieldError(field, f"is not a known field; {remedy}", value)
    if kind == "none_required":
        return FieldError(field, "is not supported; remove it", value)
    clause = re.sub(r"^\w+ should ", "must ", detail["msg"]).replace(" after validation", "")
    # lengths are told as numbers already; for the rest the value is what helps
    return FieldError(field, clause if ", not " in clause else f"{clause}, not {value}", value)


def _path(location: Sequence[int | str]) -> str:
    """`("messages", 0, "content", "<list>", 1)` as `messages[0].content[1]`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "[key]":
            path += " (the key)"
        elif not part.startswith("<"):
            path += f".{part[:_LONGEST_VALUE]}"
    return path.removeprefix(".")


def shown(value: Any) -> str:
    """A value as an error shows it: at most about 80 characters, whatever it is."""
    if isinstance(value, str):
        cut = value[:_LONGEST_VALUE]
        return repr(cut) + ("…" if len(value) > len(cut) else "")
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) >= 10**_LONGEST_VALUE:
        return "a huge number"
    return repr(value)[:_LONGEST_VALUE]


def _as_member(error: FieldError) -> dict[str, str]:
    member = {"field": _encodable(error.field), "message": _encodable(error.clause)}
    if error.value is not None:
        member["value"] = _encodable(error.value)
    return member


def _encodable(text: str) -> str:
    """Lone surrogates written as escapes: the error about them must itself be valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
