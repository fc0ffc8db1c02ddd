"""/v1/adapters: add, check, list, show, roll back, remove."""

from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.adapter_upload import uploaded
from api.adapter_view import (
    Adapter,
    AdapterList,
    AddedVersion,
    Judgement,
    Removed,
    Version,
    VersionList,
    adapter_object,
    finding_objects,
    page,
    version_object,
)
from api.auth import TenantId
from api.body import json_body, read_model
from api.job_view import json_response
from api.services import Services, ServicesDep
from core.errors import AdapterRejected, InvalidRequest
from core.ids import IdPrefix, parse_id
from db import adapter_life, adapter_views, adapters

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


def _form(*required: str) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a form by itself."""
    properties = {
        "name": {"type": "string", "description": "what jobs call it"},
        "base_model": {
            "type": "string",
            "description": "needed where there are several and the adapter does not tell",
        },
        "file": {"type": "string", "format": "binary", "description": "a .tar.gz, .tar or .zip"},
    }
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


@router.post(
    "",
    status_code=201,
    summary="Add an adapter, or a version of one",
    responses={
        201: {"model": AddedVersion, "description": "A new version, `validating`."},
        200: {"model": AddedVersion, "description": "These very files are there already."},
    },
    openapi_extra=_form("name", "file"),
)
async def add_adapter(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Uploads an adapter as a form. It is judged at once: one that breaks a rule is 422 with every
    finding, and nothing is kept of it. Then a worker of its base probes it; jobs for it wait until
    it is `ready`.
    """
    store = services.store()
    async with uploaded(request, services) as upload:
        if not upload.name:
            raise InvalidRequest("name is required; add it (-F name=sql)", field="name")
        added = await adapters.add(
            services.database,
            store,
            tenant_id=tenant_id,
            name=upload.name,
            base_model=upload.base_model,
            package=upload.package,
            partitions=services.settings.partitions,
        )
    services.ring(added.base_model, added.partition)
    version = await _version(services, tenant_id, added.name, added.version)
    answer = version | {"created": added.created, "hints": finding_objects(added.hints)}
    headers = {"Location": f"/v1/adapters/{added.name}/versions/{added.version}"}
    return json_response(answer, 201 if added.created else 200, headers)


@router.post(
    "/check",
    summary="Check an adapter, and store nothing",
    responses={200: {"model": Judgement}},
    openapi_extra=_form("file"),
)
async def check_adapter(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Applies every rule that needs no worker. `findings` would keep it from being added."""
    async with uploaded(request, services) as upload:
        package, findings, hints = upload.package, [], []
        try:
            facts, found = await adapters.judge(
                services.database, tenant_id, upload.name, upload.base_model, package
            )
        except AdapterRejected as error:
            findings = finding_objects(error.findings)
            base_model = upload.base_model or ""
        else:
            hints, base_model = finding_objects(found), facts.name
    return json_response(
        {
            "object": "adapter.check",
            "base_model": base_model,
            "rank": package.config.highest_rank,
            "size_bytes": package.size_bytes,
            "findings": findings,
            "hints": hints,
        }
    )


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PageParameters(_Parameters):
    """Where a page begins, and how long it is."""

    after: str | None = Field(None, max_length=200, description="the last_id of the page before")
    limit: int = Field(20, ge=1, le=100)


@router.get("", summary="List adapters, newest first", responses={200: {"model": AdapterList}})
async def list_adapters(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[PageParameters, Query()]
) -> Response:
    """With the version that each name stands for: where it is resident, what waits for it."""
    views = await adapter_views.list_adapters(
        services.database, tenant_id, _cursor(parameters.after), parameters.limit + 1
    )
    return json_response(page([adapter_object(view) for view in views], parameters.limit))


@router.get("/{name}", summary="Read an adapter", responses={200: {"model": Adapter}})
async def get_adapter(name: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """One adapter, with its current and its newest version."""
    view = await adapter_views.get_adapter(services.database, tenant_id, _known(name))
    return json_response(adapter_object(view))


@router.get(
    "/{name}/versions",
    summary="List an adapter's versions",
    responses={200: {"model": VersionList}},
)
async def list_versions(
    name: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[PageParameters, Query()],
) -> Response:
    """Newest first, rejected ones with the reasons."""
    views = await adapter_views.list_versions(
        services.database,
        tenant_id,
        _known(name),
        _version_cursor(parameters.after),
        parameters.limit + 1,
    )
    return json_response(page([version_object(view) for view in views], parameters.limit))


@router.get(
    "/{name}/versions/{version}", summary="Read a version", responses={200: {"model": Version}}
)
async def get_version(
    name: str, version: int, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """One version of an adapter."""
    if not 0 < version <= _HIGHEST:
        raise adapter_life.no_adapter(f"{name}@{version}")
    return json_response(await _version(services, tenant_id, _known(name), version))


_HIGHEST: Final = 2**31 - 2


class Rollback(BaseModel):
    """Which version is to be the current one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, le=_HIGHEST)


@router.post(
    "/{name}/rollback",
    summary="Make another version current",
    responses={200: {"model": Adapter}},
    openapi_extra=json_body(Rollback),
)
async def roll_back(
    name: str, request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """From now on the name stands for that version, also for a newer one than the current. Jobs
    keep the version that they were submitted for.
    """
    body = await read_model(request, services.settings.max_body_bytes, Rollback)
    await adapter_life.rollback(services.database, tenant_id, _known(name), body.version)
    view = await adapter_views.get_adapter(services.database, tenant_id, name)
    return json_response(adapter_object(view))


class RemoveParameters(_Parameters):
    """How to remove an adapter."""

    drain: bool = Field(False, description="let the jobs that it has finish")


@router.delete("/{name}", summary="Remove an adapter", responses={200: {"model": Removed}})
async def remove_adapter(
    name: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[RemoveParameters, Query()],
) -> Response:
    """No new job resolves to it. With jobs that wait or run it is 409 unless `drain=true`: then
    they finish. Its files are deleted after its last job.
    """
    jobs = await adapter_life.remove(
        services.database, tenant_id, _known(name), drain=parameters.drain
    )
    return json_response({"object": "adapter.removed", "name": name, "jobs": jobs})


async def _version(services: Services, tenant_id: int, name: str, version: int) -> dict[str, Any]:
    view = await adapter_views.get_version(services.database, tenant_id, name, version)
    return version_object(view)


def _known(name: str) -> str:
    """`name`, or NotFound for what no adapter can be called (and Postgres not be asked)."""
    if "\0" in name or len(name) > 200:
        raise adapter_life.no_adapter(name)
    return name


def _cursor(after: str | None) -> UUID | None:
    found = after and parse_id(IdPrefix.ADAPTER, after)
    if after is not None and not found:
        raise InvalidRequest(
            f"after {after[:80]!r} is not an adapter id; give the last_id of a page", field="after"
        )
    return found or None


def _version_cursor(after: str | None) -> int | None:
    if after is None:
        return None
    digits = after.rpartition("@")[2]
    if not (digits.isascii() and digits.isdigit() and int(digits) <= _HIGHEST):
        raise InvalidRequest(
            f"after {after[:80]!r} is not a version; give the last_id of a page", field="after"
        )
    return int(digits)
