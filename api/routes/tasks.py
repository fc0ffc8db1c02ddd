"""/v1/tasks: aliases that route `task:<name>` to an adapter, a version or a base model."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from api.adapter_view import Task, TaskList, page, task_object
from api.auth import TenantId
from api.body import json_body, read_model
from api.job_view import json_response
from api.routes.adapters import PageParameters
from api.services import ServicesDep
from core.errors import NotFound
from core.json_values import check_text
from db import tasks
from db.registry import TASK_PREFIX

router = APIRouter(prefix="/v1/tasks", tags=["tasks"])


class Route(BaseModel):
    """What a task stands for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, AfterValidator(check_text)] = Field(
        min_length=1, max_length=256, description="a base model, an adapter, or `name@3`"
    )


@router.put(
    "/{name}",
    summary="Route a task",
    responses={200: {"model": Task}},
    openapi_extra=json_body(Route),
)
async def put_task(
    name: str, request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """Makes the task, or routes it elsewhere. Jobs keep what they were routed to."""
    body = await read_model(request, services.settings.max_body_bytes, Route)
    row = await tasks.put_task(services.database, tenant_id, name, body.model)
    return json_response(task_object(row))


@router.get("", summary="List tasks by name", responses={200: {"model": TaskList}})
async def list_tasks(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[PageParameters, Query()]
) -> Response:
    """One page of tasks."""
    after = parameters.after and _known(parameters.after.removeprefix(TASK_PREFIX))
    rows = await tasks.list_tasks(services.database, tenant_id, after, parameters.limit + 1)
    return json_response(page([task_object(row) for row in rows], parameters.limit))


@router.get("/{name}", summary="Read a task", responses={200: {"model": Task}})
async def get_task(name: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """One task."""
    return json_response(
        task_object(await tasks.get_task(services.database, tenant_id, _known(name)))
    )


@router.delete("/{name}", summary="Remove a task", status_code=204)
async def delete_task(name: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Its jobs run on; new ones for `task:<name>` are 404."""
    await tasks.delete_task(services.database, tenant_id, _known(name))
    return Response(status_code=204)


def _known(name: str) -> str:
    if "\0" in name:
        raise NotFound(f"task {name[:80]!r} does not exist", field="name")
    return name
