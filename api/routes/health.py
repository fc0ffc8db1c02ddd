"""/healthz and /readyz, for whoever starts and stops this process."""

from typing import ClassVar

from fastapi import APIRouter, Response

from api.job_view import json_response
from api.services import Services, ServicesDep
from core.errors import LorryError
from db.migrate import current_revision, head_revision
from db.registry import list_models
from db.tenants import DEFAULT_TENANT_ID
from db.workers import has_live_worker

router = APIRouter(tags=["health"])


class NotReady(LorryError):
    """Lorry is not ready yet."""

    status = 503
    code = "not_ready"
    #: seconds after which to look again
    retry_after: ClassVar[int] = 1


@router.get("/healthz", summary="Whether the process lives")
async def healthz() -> Response:
    """200 while the process answers at all; Postgres is not asked."""
    return json_response({"live": True})


@router.get("/readyz", summary="Whether requests can be served")
async def readyz(services: ServicesDep) -> Response:
    """200 once Postgres is reachable and migrated (under `lorry up` also: a worker is ready)."""
    await _require_schema(services)
    if services.ready_model is not None:
        await _require_worker(services, services.ready_model)
    return json_response({"ready": True})


async def _require_schema(services: Services) -> None:
    revision, head = await current_revision(services.database), head_revision()
    if revision != head:
        raise NotReady(
            f"the database is at revision {revision or 'none'} and this release wants {head}; "
            "run `lorry migrate`"
        )


async def _require_worker(services: Services, base_model: str) -> None:
    models = await list_models(services.database, DEFAULT_TENANT_ID)
    if not any(row.kind == "base" and row.name == base_model for row in models):
        raise NotReady(f"the base model {base_model!r} is not listed yet; its worker is starting")
    if not await has_live_worker(services.database, base_model):
        raise NotReady(f"no worker for {base_model!r} is ready yet")
