"""/v1/webhooks: endpoints, their secrets, a test event, what was sent to each."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from api.adapter_view import page
from api.auth import TenantId
from api.body import json_body, read_model
from api.job_view import json_response
from api.routes.adapters import PageParameters
from api.routes.deliveries import (
    DeliveryParameters,
    deliveries_page,
    one_delivery,
    replay_since,
)
from api.services import Services, ServicesDep
from api.webhook_view import (
    Delivery,
    DeliveryList,
    Replayed,
    Secret,
    Webhook,
    WebhookList,
    secret_object,
    webhook_object,
)
from core.errors import InvalidRequest, NotFound
from core.ids import IdPrefix, parse_id
from core.request import check_webhook_url
from core.webhook_request import NewWebhook, ReplayRequest, SecretRequest, WebhookChanges
from db import webhooks
from db.deliveries import owe_test

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.post(
    "",
    status_code=201,
    summary="Make a webhook",
    responses={201: {"model": Webhook}},
    openapi_extra=json_body(NewWebhook),
)
async def create_webhook(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Answers with the webhook and, this once, its `secret`."""
    body = await read_model(request, services.settings.max_body_bytes, NewWebhook)
    check_webhook_url(body.url, services.settings.webhook_networks(), "url")
    row, secret = await webhooks.create(
        services.database, tenant_id, body.url, body.events, body.description
    )
    return json_response(webhook_object(row, secret), 201)


@router.get("", summary="List webhooks, newest first", responses={200: {"model": WebhookList}})
async def list_webhooks(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[PageParameters, Query()]
) -> Response:
    """One page of webhooks, without their secrets."""
    after = parameters.after and parse_id(IdPrefix.WEBHOOK, parameters.after)
    if parameters.after is not None and not after:
        raise InvalidRequest(
            f"after {parameters.after[:80]!r} is not a webhook id; give the last_id of a page",
            field="after",
        )
    rows = await webhooks.list_page(
        services.database, tenant_id, after or None, parameters.limit + 1
    )
    return json_response(page([webhook_object(row) for row in rows], parameters.limit))


@router.get("/secret", summary="Read about the default secret", responses={200: {"model": Secret}})
async def get_secret(tenant_id: TenantId, services: ServicesDep) -> Response:
    """When the secret behind every `webhook_url` was made and shown; never itself."""
    return json_response(
        secret_object(await webhooks.secret_state(services.database, tenant_id, None))
    )


@router.post(
    "/secret",
    summary="Show the default secret once, or rotate it",
    responses={200: {"model": Secret}},
    openapi_extra=json_body(SecretRequest),
)
async def show_secret(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Deliveries to a `webhook_url` are signed with it. It is made when it is first needed.

    `secret` is null where it was shown before: rotate it then. The former one signs beside the new
    one for 24 hours more.
    """
    body = await read_model(request, services.settings.max_body_bytes, SecretRequest)
    if body.rotate:
        secret = await webhooks.rotate(services.database, tenant_id, None)
    else:
        secret = await webhooks.reveal_default_secret(services.database, tenant_id)
    state = await webhooks.secret_state(services.database, tenant_id, None)
    return json_response(secret_object(state, secret))


@router.get("/{webhook_id}", summary="Read a webhook", responses={200: {"model": Webhook}})
async def get_webhook(webhook_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """One webhook, without its secret."""
    row = await webhooks.get(services.database, tenant_id, _known(webhook_id))
    if row is None:
        raise _no_webhook(webhook_id)
    return json_response(webhook_object(row))


@router.patch(
    "/{webhook_id}",
    summary="Change, disable or enable a webhook",
    responses={200: {"model": Webhook}},
    openapi_extra=json_body(WebhookChanges),
)
async def change_webhook(
    webhook_id: str, request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """What is left out stays. What is owed to it goes to its new URL."""
    body = await read_model(request, services.settings.max_body_bytes, WebhookChanges)
    if body.url is not None:
        check_webhook_url(body.url, services.settings.webhook_networks(), "url")
    row = await webhooks.update(
        services.database, tenant_id, _known(webhook_id), body.model_dump(exclude_none=True)
    )
    if row is None:
        raise _no_webhook(webhook_id)
    return json_response(webhook_object(row))


@router.delete("/{webhook_id}", summary="Delete a webhook", status_code=204)
async def delete_webhook(webhook_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Its secrets go too. What it was still owed fails."""
    if not await webhooks.delete(services.database, tenant_id, _known(webhook_id)):
        raise _no_webhook(webhook_id)
    return Response(status_code=204)


@router.post(
    "/{webhook_id}/rotate", summary="Rotate a webhook's secret", responses={200: {"model": Secret}}
)
async def rotate_secret(webhook_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Answers with the new secret, this once. The former one signs beside it for 24 hours more."""
    found = _known(webhook_id)
    secret = await webhooks.rotate(services.database, tenant_id, found)
    if secret is None:
        raise _no_webhook(webhook_id)
    state = await webhooks.secret_state(services.database, tenant_id, found)
    return json_response(secret_object(state, secret))


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    summary="Send a test event",
    responses={202: {"model": Delivery}},
)
async def test_webhook(webhook_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Owes it a `webhook.test` event, whatever it listens to; answers with the delivery."""
    found = await _existing(services, tenant_id, webhook_id)
    async with services.database.transaction() as connection:
        delivery_id = await owe_test(connection, tenant_id, found, webhook_id)
    if delivery_id is None:
        raise InvalidRequest(f"webhook {webhook_id} is disabled; enable it first", field="id")
    return json_response(await one_delivery(services, tenant_id, delivery_id), 202)


@router.get(
    "/{webhook_id}/deliveries",
    summary="List a webhook's deliveries, newest first",
    responses={200: {"model": DeliveryList}},
)
async def list_webhook_deliveries(
    webhook_id: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[DeliveryParameters, Query()],
) -> Response:
    """One page, each with its attempts."""
    found = await _existing(services, tenant_id, webhook_id)
    return json_response(await deliveries_page(services, tenant_id, parameters, found))


@router.post(
    "/{webhook_id}/replay",
    status_code=202,
    summary="Send a webhook's failed deliveries once more",
    responses={202: {"model": Replayed}},
    openapi_extra=json_body(ReplayRequest),
)
async def replay_webhook(
    webhook_id: str, request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """All that failed for good since a time, under their old event ids."""
    found = await _existing(services, tenant_id, webhook_id)
    answer: dict[str, Any] = await replay_since(services, tenant_id, request, found)
    return json_response(answer, 202)


async def _existing(services: Services, tenant_id: int, webhook_id: str) -> UUID:
    found = _known(webhook_id)
    if await webhooks.get(services.database, tenant_id, found) is None:
        raise _no_webhook(webhook_id)
    return found


def _known(webhook_id: str) -> UUID:
    found = parse_id(IdPrefix.WEBHOOK, webhook_id)
    if found is None:
        raise _no_webhook(webhook_id)
    return found


def _no_webhook(webhook_id: str) -> NotFound:
    return NotFound(
        f"webhook {webhook_id[:80]!r} does not exist; GET /v1/webhooks lists those there are",
        field="id",
    )
