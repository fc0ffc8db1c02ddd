"""Who asks: a bearer key stands for its tenant."""

from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.services import ServicesDep
from core.errors import Unauthorized
from db.tenants import DEFAULT_TENANT_ID, tenant_of_key

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description="A key made by `lorry keys create`. Not looked at where keys are not required.",
)


async def tenant_of_request(
    services: ServicesDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> int:
    """The tenant's id. Asks Postgres every time, so that a revoked key ends at once.

    Where keys are not required a key is ignored, since OpenAI's clients always send one.

    Raises:
        Unauthorized: the key is missing, wrong or revoked.
        Unavailable: Postgres cannot be reached.
    """
    if not services.settings.require_keys:
        return DEFAULT_TENANT_ID
    if credentials is None:
        raise Unauthorized("no API key was given: send the header `Authorization: Bearer <key>`")
    tenant_id = await tenant_of_key(services.database, credentials.credentials)
    if tenant_id is None:
        raise Unauthorized(
            "the API key is unknown or revoked: check it, or make one with `lorry keys create`"
        )
    return tenant_id


TenantId = Annotated[int, Depends(tenant_of_request)]
