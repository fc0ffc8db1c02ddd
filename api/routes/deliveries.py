"""/v1/deliveries: what was sent to webhooks and to each `webhook_url`; sending it once more."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from api.adapter_view import page
from api.auth import TenantId
from api.body import json_body, read_model
from api.job_view import json_response
from api.services import Services, ServicesDep
from api.webhook_view import Delivery, DeliveryList, Replayed, delivery_object
from core.errors import InvalidRequest, NotFound
from core.ids import IdPrefix, parse_id
from core.json_values import check_text
from core.webhook_request import ReplayRequest
from db import delivery_log
from db.delivery_log import DeliveryFilter

router = APIRouter(prefix="/v1/deliveries", tags=["webhooks"])


class DeliveryParameters(BaseModel):
    """What a list of deliveries is narrowed by."""

    model_config = ConfigDict(extra="forbid")

    state: Literal["pending", "delivered", "failed"] | None = None
    subject: Annotated[str, AfterValidator(check_text)] | None = Field(
        None, max_length=200, description="what it tells of, such as job_…"
    )
    after: str | None = Field(None, description="the id of a delivery: begin behind it")
    limit: int = Field(20, ge=1, le=100)


@router.get("", summary="List deliveries, newest first", responses={200: {"model": DeliveryList}})
async def list_deliveries(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[DeliveryParameters, Query()]
) -> Response:
    """One page, each with its attempts: those of every webhook and every `webhook_url`."""
    return json_response(await deliveries_page(services, tenant_id, parameters, None))


@router.post(
    "/replay",
    status_code=202,
    summary="Send failed deliveries once more",
    responses={202: {"model": Replayed}},
    openapi_extra=json_body(ReplayRequest),
)
async def replay_deliveries(
    request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """All that failed for good since a time, under their old event ids."""
    return json_response(await replay_since(services, tenant_id, request, None), 202)


@router.get("/{delivery_id}", summary="Read a delivery", responses={200: {"model": Delivery}})
async def get_delivery(delivery_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """One delivery with its attempts."""
    return json_response(await one_delivery(services, tenant_id, _known(delivery_id)))


@router.post(
    "/{delivery_id}/replay",
    status_code=202,
    summary="Send a delivery once more",
    responses={202: {"model": Delivery}},
)
async def replay_delivery(delivery_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Under its old event id; one that waits for its next attempt gets it now."""
    found = _known(delivery_id)
    if not await delivery_log.replay(services.database, tenant_id, found):
        raise _no_delivery(delivery_id)
    return json_response(await one_delivery(services, tenant_id, found), 202)


async def deliveries_page(
    services: Services, tenant_id: int, parameters: DeliveryParameters, endpoint_id: UUID | None
) -> dict[str, Any]:
    """A page of a tenant's deliveries, of one endpoint alone where one is given."""
    after = parameters.after and parse_id(IdPrefix.DELIVERY, parameters.after)
    if parameters.after is not None and not after:
        raise InvalidRequest(
            f"after {parameters.after[:80]!r} is not a delivery id; give the last_id of a page",
            field="after",
        )
    rows = await delivery_log.list_page(
        services.database,
        tenant_id,
        DeliveryFilter(endpoint_id, parameters.state, parameters.subject),
        after or None,
        parameters.limit + 1,
    )
    shown = rows[: parameters.limit]
    attempts = await delivery_log.attempts(
        services.database, tenant_id, [row["id"] for row in shown]
    )
    objects = [delivery_object(row, attempts.get(row["id"], [])) for row in rows]
    return page(objects, parameters.limit)


async def one_delivery(services: Services, tenant_id: int, delivery_id: UUID) -> dict[str, Any]:
    """A delivery with its attempts. Raises NotFound."""
    row = await delivery_log.get(services.database, tenant_id, delivery_id)
    if row is None:
        raise _no_delivery(f"{IdPrefix.DELIVERY}_{delivery_id.hex}")
    attempts = await delivery_log.attempts(services.database, tenant_id, [delivery_id])
    return delivery_object(row, attempts[delivery_id])


async def replay_since(
    services: Services, tenant_id: int, request: Request, endpoint_id: UUID | None
) -> dict[str, Any]:
    """Replay what failed since the time in the request's body."""
    body = await read_model(request, services.settings.max_body_bytes, ReplayRequest)
    since = datetime.fromtimestamp(body.since, UTC)
    replayed = await delivery_log.replay_failed(services.database, tenant_id, endpoint_id, since)
    return {"object": "webhook.replay", "replayed": replayed}


def _known(delivery_id: str) -> UUID:
    found = parse_id(IdPrefix.DELIVERY, delivery_id)
    if found is None:
        raise _no_delivery(delivery_id)
    return found


def _no_delivery(delivery_id: str) -> NotFound:
    return NotFound(
        f"delivery {delivery_id[:80]!r} does not exist; GET /v1/deliveries lists those there are",
        field="id",
    )
