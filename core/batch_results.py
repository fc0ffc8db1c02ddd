"""Lines of a batch's output and error files, as OpenAI writes them."""

from typing import Any, Protocol

import orjson

from core.batch_status import EXPIRED, UNFINISHED
from core.ids import IdPrefix, format_id


class LineRow(Protocol):
    """A line with what became of it, read by column."""

    def __getitem__(self, column: str, /) -> Any: ...


def result_line(row: LineRow) -> bytes:
    """A line as JSON, with its end. The answer in it is passed on as it was stored."""
    job_id = row["job_id"]
    document: dict[str, Any] = {"id": f"batch_req_{job_id.hex}", "custom_id": row["custom_id"]}
    if succeeded(row):
        document["response"] = {
            "status_code": 200,
            "request_id": format_id(IdPrefix.JOB, job_id),
            "body": orjson.Fragment(row["response"]),
        }
        document["error"] = None
    else:
        code, message = _why(row)
        document["response"] = None
        document["error"] = {"code": code, "message": message}
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


def succeeded(row: LineRow) -> bool:
    """Whether the line belongs into the output file, and not into the error file."""
    return bool(row["state"] == "succeeded")


def _why(row: LineRow) -> tuple[str, str]:
    """Code and message of a line that has no answer."""
    if row["state"] == "expired" and row["own_deadline"]:
        return EXPIRED, "This request could not be executed before its deadline."
    if row["state"] in UNFINISHED:
        return UNFINISHED[row["state"]]
    code, message = row["error_code"], row["error_message"]
    if row["state"] is not None:
        return code, message
    if code is None:
        return "not_kept", "This result is no longer kept; read the batch's files."
    # a bad line may have no custom_id to be known by
    return code, f"line {row['line']}: {message}"
