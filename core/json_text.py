"""JSON from outside, from its bytes to an object, and where exactly it is broken."""

import json
import re
from typing import Any

from pydantic_core import from_json

from core.errors import InvalidRequest
from core.invalid import FieldError, invalid_request, shown
from core.json_values import Uncarriable, check_value


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object in `raw`; where a key is repeated, the last one counts.

    Raises:
        InvalidRequest: `raw` is not UTF-8, not JSON or no object; the message says at which byte.
    """
    try:
        given = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(_json_problem(raw, str(error))) from None
    if not isinstance(given, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {shown(given)}")
    return given


def _json_problem(raw: bytes, message: str) -> str:
    """Why `raw` could not be parsed, and where: by its field if that can be told, else by byte."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return f"the body is not UTF-8: at byte {error.start} of {len(raw)}; encode it as UTF-8"
    if "hex escape" in message:
        surrogate = _surrogate_problem(raw)
        if surrogate is not None:
            return surrogate
    if "recursion" in message:
        return "the body is not acceptable JSON: it is nested more than 200 levels deep; flatten it"
    where = re.fullmatch(r"(.*) at line (\d+) column (\d+)", message, re.DOTALL)
    if where is None:
        return f"the body is not valid JSON: {message}"
    lines_before = raw.split(b"\n")[: int(where[2]) - 1]
    byte = sum(len(line) + 1 for line in lines_before) + int(where[3])
    return f"the body is not valid JSON: {where[1]} at byte {byte} of {len(raw)}"


def _surrogate_problem(raw: bytes) -> str | None:
    """Names the field with a lone surrogate; orjson and pydantic only say that there is one."""
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    for name, value in given.items() if isinstance(given, dict) else ():
        try:
            check_value([name, value])
        except Uncarriable as error:
            return invalid_request([FieldError(name, str(error))]).message
    return None
