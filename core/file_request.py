"""The form fields of POST /v1/files, beside the file itself."""

from collections.abc import Mapping
from typing import Any, Final

import orjson
from pydantic import ValidationError

from core.batch_request import ExpiresAfter
from core.errors import UploadInvalid
from core.invalid import field_errors, invalid_request, shown

PURPOSE: Final = "batch"
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_KNOWN: Final = frozenset({"purpose", "expires_after", _ANCHOR, _SECONDS})


def check_fields(fields: Mapping[str, str]) -> int | None:
    """Check everything that was sent beside the file.

    Returns:
        After how many seconds the file is to expire; None where nothing was said.

    Raises:
        InvalidRequest: a wrong field.
        UploadInvalid: an unknown or missing one.
    """
    for name in fields:
        if name not in _KNOWN:
            raise UploadInvalid(
                f"{shown(name)} is not a known form field; remove it", field=name[:80]
            )
    purpose = fields.get("purpose")
    if purpose is None:
        raise UploadInvalid(
            "purpose is required; add the form field purpose=batch", field="purpose"
        )
    if purpose != PURPOSE:
        raise UploadInvalid(
            f"purpose {shown(purpose)} is not supported; give 'batch'", field="purpose"
        )
    return _expiry(fields)


def _expiry(fields: Mapping[str, str]) -> int | None:
    given: Any
    if "expires_after" in fields:
        try:
            given = orjson.loads(fields["expires_after"])
        except ValueError:
            given = fields["expires_after"]
    elif _ANCHOR in fields or _SECONDS in fields:
        seconds = fields.get(_SECONDS)
        number = seconds is not None and len(seconds) < 20 and seconds.isascii()
        given = {
            "anchor": fields.get(_ANCHOR),
            "seconds": int(seconds) if number and seconds and seconds.isdigit() else seconds,
        }
    else:
        return None
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            detail["loc"] = ("expires_after", *detail["loc"])
        raise invalid_request(field_errors(details)) from None
