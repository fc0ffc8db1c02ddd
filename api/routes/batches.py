"""/v1/batches: create, read, list, cancel, as OpenAI has it; and the results while they come."""

from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from api.auth import TenantId
from api.batch_view import Batch, BatchList, batch_view, is_open
from api.body import read_json_body
from api.job_view import Row, json_response
from api.openapi import BATCH_REQUEST_BODY
from api.services import Services, ServicesDep
from api.submission import check_key
from core.batch_request import parse_batch_request
from core.batch_results import result_line
from core.errors import InvalidRequest, NotFound
from core.ids import IdPrefix, parse_id
from core.request import check_webhook_url
from db import batch_creation, batch_lines, batches
from db.jobs import IdempotencyUse

router = APIRouter(prefix="/v1/batches", tags=["batches"])


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ListParameters(_Parameters):
    """Where a page begins, and how long it is."""

    after: str | None = Field(None, description="the id of a batch: begin behind it")
    limit: int = Field(20, ge=1, le=100)


class ResultParameters(_Parameters):
    """Where to go on."""

    after: int = Field(0, ge=0, lt=2**31, description="how many results you have already")


@router.post(
    "",
    summary="Create a batch",
    responses={200: {"model": Batch}},
    openapi_extra=BATCH_REQUEST_BODY,
)
async def create_batch(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Validation and all that follows is done by a steward; poll the batch.

    With an `Idempotency-Key` a repeat within 24 hours answers with the first request's batch.
    """
    services.blob_store()  # without one there can be no input file
    raw = await read_json_body(request, services.settings.max_body_bytes)
    asked = parse_batch_request(raw)
    if asked.webhook_url is not None:
        check_webhook_url(asked.webhook_url, services.settings.webhook_networks())
    key = request.headers.get("idempotency-key")
    use = (
        None
        if key is None
        else IdempotencyUse(batch_creation.ROUTE, check_key(key), asked.fingerprint())
    )
    row, replayed = await batch_creation.create(services.database, tenant_id, asked, use)
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return json_response(await _shown(services, tenant_id, row), headers=headers)


@router.get("", summary="List batches, newest first", responses={200: {"model": BatchList}})
async def list_batches(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[ListParameters, Query()]
) -> Response:
    """One page of batches. `lorry` is null here; read a batch for its promise."""
    after = parameters.after and parse_id(IdPrefix.BATCH, parameters.after)
    if parameters.after is not None and not after:
        raise InvalidRequest(
            f"after {parameters.after[:80]!r} is not a batch id; give the last_id of a page",
            field="after",
        )
    rows = await batches.list_page(
        services.database, tenant_id, after or None, parameters.limit + 1
    )
    data = [batch_view(row) for row in rows[: parameters.limit]]
    return json_response(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(rows) > parameters.limit,
        }
    )


@router.get("/{batch_id}", summary="Read a batch", responses={200: {"model": Batch}})
async def get_batch(batch_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """The batch, its counts true at this moment."""
    row = await _known(services, tenant_id, batch_id)
    return json_response(await _shown(services, tenant_id, row))


@router.post("/{batch_id}/cancel", summary="Cancel a batch", responses={200: {"model": Batch}})
async def cancel_batch(batch_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Begins to cancel an open batch; its finished lines stay. One that has ended is answered."""
    row = await _known(services, tenant_id, batch_id)
    await batches.cancel(services.database, tenant_id, row["public_id"])
    row = await _known(services, tenant_id, batch_id)
    return json_response(await _shown(services, tenant_id, row))


@router.get(
    "/{batch_id}/results",
    summary="Read the results that there are",
    responses={200: {"content": {"application/jsonl": {}}}},
    response_class=Response,
)
async def get_results(
    batch_id: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[ResultParameters, Query()],
) -> Response:
    """Every line that is finished by now, as in the output and error files, in the order in which
    they were finished. That order never changes: give the number of lines you have as `after`.
    """
    row = await _known(services, tenant_id, batch_id)
    return StreamingResponse(
        _results(services, row["id"], tenant_id, parameters.after), media_type="application/jsonl"
    )


async def _results(
    services: Services, batch: int, tenant_id: int, after: int
) -> AsyncIterator[bytes]:
    while rows := await batch_lines.as_finished(services.database, batch, tenant_id, after):
        yield b"".join(map(result_line, rows))
        after += len(rows)


async def _shown(services: Services, tenant_id: int, row: Row) -> dict[str, Any]:
    if not is_open(row):
        return batch_view(row)
    return batch_view(row, await batches.outlook(services.database, tenant_id, row["public_id"]))


async def _known(services: Services, tenant_id: int, batch_id: str) -> Row:
    found: UUID | None = parse_id(IdPrefix.BATCH, batch_id)
    row = None if found is None else await batches.get(services.database, tenant_id, found)
    if row is None:
        raise NotFound(
            f"batch {batch_id[:80]!r} does not exist; GET /v1/batches lists those there are",
            field="id",
        )
    return row
