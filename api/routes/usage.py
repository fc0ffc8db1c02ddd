"""/v1/usage: what a tenant used, by day and adapter version."""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from api.auth import TenantId
from api.job_view import json_response
from api.services import ServicesDep
from core.errors import InvalidRequest
from db.usage import report

router = APIRouter(prefix="/v1/usage", tags=["usage"])

#: What is shown where nothing is asked for.
DEFAULT_DAYS = 30
MOST_DAYS = 366
#: Nothing was used before; days are counted back from what is asked for.
_FIRST_DAY = date(2000, 1, 1)


class UsageRow(BaseModel):
    """What was used of one adapter version (or the base model itself) on one day, in UTC."""

    day: date
    base_model: str
    adapter: str | None
    adapter_version: int | None
    jobs: int
    input_tokens: int
    output_tokens: int


class Usage(BaseModel):
    """Newest day first."""

    object: Literal["list"]
    data: list[UsageRow]


class UsageParameters(BaseModel):
    """Which days, in UTC, both included."""

    model_config = ConfigDict(extra="forbid")

    start: date | None = Field(
        None, ge=_FIRST_DAY, description="the first day; 30 days before the last unless given"
    )
    end: date | None = Field(None, ge=_FIRST_DAY, description="the last day; today unless given")


@router.get("", summary="Read what was used", responses={200: {"model": Usage}})
async def get_usage(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[UsageParameters, Query()]
) -> Response:
    """Tokens of succeeded jobs. Kept for good, also when the jobs are not."""
    last = parameters.end or datetime.now(UTC).date()
    first = parameters.start or last - timedelta(days=DEFAULT_DAYS)
    if not 0 <= (last - first).days < MOST_DAYS:
        raise InvalidRequest(
            f"start {first} and end {last} must be in order and less than {MOST_DAYS} days apart",
            field="start",
        )
    rows = await report(services.database, tenant_id, first, last)
    data: list[dict[str, Any]] = [
        {
            "day": row["day"],
            "base_model": row["base_model"],
            "adapter": row["adapter"],
            "adapter_version": row["version"],
            "jobs": row["jobs"],
            "input_tokens": row["input_tokens"],
            "output_tokens": row["output_tokens"],
        }
        for row in rows
    ]
    return json_response({"object": "list", "data": data})
