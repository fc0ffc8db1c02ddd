"""/v1/models: what `model` in a request can name, as OpenAI lists it."""

from typing import Any, Final, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from api.auth import TenantId
from api.job_view import json_response
from api.services import ServicesDep
from core.errors import ModelNotFound
from db.registry import ModelRow, list_models, resolve

router = APIRouter(prefix="/v1/models", tags=["models"])

#: No name is longer; looking for names near to a longer one would take long.
LONGEST_NAME: Final = 256


class Model(BaseModel):
    """A base model, an adapter or a task. `base` is the base model that runs it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["base", "adapter", "task"]
    base: str
    version: int | None


class ModelList(BaseModel):
    """Every model that the tenant can name."""

    object: Literal["list"]
    data: list[Model]


@router.get("", summary="List models", responses={200: {"model": ModelList}})
async def get_models(tenant_id: TenantId, services: ServicesDep) -> Response:
    """Base models first, then the tenant's adapters and tasks."""
    rows = await list_models(services.database, tenant_id)
    return json_response({"object": "list", "data": [_model(row) for row in rows]})


@router.get("/{name:path}", summary="Read a model", responses={200: {"model": Model}})
async def get_model(name: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """One model, also a version of an adapter (`name@3`)."""
    if "\0" in name or len(name) > LONGEST_NAME:
        raise ModelNotFound(f"model {name[:80]!r} does not exist; GET /v1/models lists them")
    rows = {row.name: row for row in await list_models(services.database, tenant_id)}
    if name in rows:
        return json_response(_model(rows[name]))
    async with services.database.connection() as connection:
        target = await resolve(connection, tenant_id, name)
    adapter = rows[target.adapter or target.base_model]
    return json_response(_model(adapter) | {"id": name, "version": target.version})


def _model(row: ModelRow) -> dict[str, Any]:
    return {
        "id": row.name,
        "object": "model",
        "created": row.created_at,
        "owned_by": "lorry",
        "kind": row.kind,
        "base": row.base_model,
        "version": row.version,
    }
