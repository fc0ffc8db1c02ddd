"""/v1/schedules: batches every night, or every so often, or once; and their runs."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.adapter_view import page
from api.auth import TenantId
from api.body import read_json_body
from api.job_view import Row, json_response
from api.openapi import SCHEDULE_REQUEST_BODY
from api.schedule_input import discard, prepare_input
from api.schedule_view import (
    PREVIEWED,
    Deleted,
    Preview,
    Run,
    RunList,
    Schedule,
    ScheduleList,
    preview_view,
    run_view,
    schedule_body,
    schedule_view,
)
from api.services import Services, ServicesDep
from core.errors import InvalidRequest, NotFound, Unavailable
from core.ids import IdPrefix, format_id, parse_id
from core.json_text import parse_object
from core.request import check_webhook_url
from core.schedule_request import (
    INPUTS,
    ScheduleRequest,
    check_fires,
    check_schedule,
    merged,
)
from db import schedule_runs, schedules
from db.registry import resolve
from db.schedule_files import InputLost, ScheduleInput
from db.schedule_ticks import rule_of
from db.schedules import anchored
from db.workers import clock

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ListParameters(_Parameters):
    """Where a page begins, and how long it is."""

    after: str | None = Field(None, description="an id of that list: begin behind it")
    limit: int = Field(20, ge=1, le=100)


class PreviewParameters(_Parameters):
    """How far to look."""

    count: int = Field(PREVIEWED, ge=1, le=1000)


@router.post(
    "",
    status_code=201,
    summary="Create a schedule",
    responses={201: {"model": Schedule}},
    openapi_extra=SCHEDULE_REQUEST_BODY,
)
async def create_schedule(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """A rule that can never fire, an unknown zone, model or file is refused here."""
    given = await _body(request, services)
    asked = check_schedule(given)
    await _check(services, tenant_id, asked)
    made = await prepare_input(services, tenant_id, asked)
    schedule_id = await _entered(
        services, made, schedules.create(services.database, tenant_id, asked, made)
    )
    shown = format_id(IdPrefix.SCHEDULE, schedule_id)
    row = await _known(services, tenant_id, shown)
    return json_response(schedule_view(row), 201, {"Location": f"/v1/schedules/{shown}"})


@router.post(
    "/preview",
    summary="Preview a rule without making a schedule",
    responses={200: {"model": Preview}},
    openapi_extra=SCHEDULE_REQUEST_BODY,
)
async def preview_rule(
    request: Request,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[PreviewParameters, Query()],
) -> Response:
    """The next firings of a body as POST /v1/schedules takes it; what to run may be left out."""
    asked = check_schedule(await _body(request, services), has_input=True)
    now = await clock(services.database)
    rule = anchored(asked.rule, now)
    check_fires(rule, now)
    return json_response(preview_view(rule, rule.firings(now), parameters.count))


@router.get("", summary="List schedules, newest first", responses={200: {"model": ScheduleList}})
async def list_schedules(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[ListParameters, Query()]
) -> Response:
    """One page of schedules."""
    after = _after(parameters.after, IdPrefix.SCHEDULE)
    rows = await schedules.list_page(services.database, tenant_id, after, parameters.limit + 1)
    return json_response(page([schedule_view(row) for row in rows], parameters.limit))


@router.get("/{schedule_id}", summary="Read a schedule", responses={200: {"model": Schedule}})
async def get_schedule(schedule_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """A schedule by its id or its name."""
    return json_response(schedule_view(await _known(services, tenant_id, schedule_id)))


@router.patch(
    "/{schedule_id}",
    summary="Change a schedule",
    responses={200: {"model": Schedule}},
    openapi_extra=SCHEDULE_REQUEST_BODY,
)
async def change_schedule(
    schedule_id: str, request: Request, tenant_id: TenantId, services: ServicesDep
) -> Response:
    """Only the fields given change; null takes one back to its default. What was due before the
    change still runs, once; what has not started yet runs as the schedule says then.
    """
    change = await _body(request, services)
    row = await _known(services, tenant_id, schedule_id)
    current = schedule_body(row) | {"requests": None}
    new_input = any(name in change for name in INPUTS)
    asked = check_schedule(merged(current, change), has_input=not new_input)
    await _check(services, tenant_id, asked, only_new=change)
    made = await prepare_input(services, tenant_id, asked) if new_input else None
    await _entered(
        services, made, schedules.change(services.database, tenant_id, row["id"], asked, made)
    )
    return json_response(schedule_view(await _known(services, tenant_id, schedule_id)))


@router.delete("/{schedule_id}", summary="Delete a schedule", responses={200: {"model": Deleted}})
async def delete_schedule(schedule_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """It is gone with its runs; batches that they made go on."""
    row = await _known(services, tenant_id, schedule_id)
    await schedules.delete(services.database, tenant_id, row["id"])
    shown = format_id(IdPrefix.SCHEDULE, row["id"])
    return json_response({"id": shown, "object": "schedule", "deleted": True})


@router.post(
    "/{schedule_id}/pause", summary="Pause a schedule", responses={200: {"model": Schedule}}
)
async def pause_schedule(schedule_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Nothing fires, and runs that have not started are skipped. Batches that run go on."""
    row = await _known(services, tenant_id, schedule_id)
    await schedules.pause(services.database, tenant_id, row["id"])
    return json_response(schedule_view(await _known(services, tenant_id, schedule_id)))


@router.post(
    "/{schedule_id}/resume", summary="Resume a schedule", responses={200: {"model": Schedule}}
)
async def resume_schedule(schedule_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """It fires again from its next firing on; the pause is not made up for."""
    row = await _known(services, tenant_id, schedule_id)
    await schedules.resume(services.database, tenant_id, row["id"])
    return json_response(schedule_view(await _known(services, tenant_id, schedule_id)))


@router.post(
    "/{schedule_id}/run",
    status_code=202,
    summary="Run a schedule now",
    responses={202: {"model": Run}},
)
async def run_schedule(schedule_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """One run more, due at once, also while the schedule is paused."""
    row = await _known(services, tenant_id, schedule_id)
    run_id = await schedule_runs.run_now(services.database, tenant_id, row["id"])
    return await _run(services, tenant_id, row["id"], run_id, 202)


@router.post(
    "/{schedule_id}/skip-next",
    summary="Skip a schedule's next firing",
    responses={200: {"model": Run}},
)
async def skip_next(schedule_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """The next firing is recorded as skipped; each call skips one more."""
    row = await _known(services, tenant_id, schedule_id)
    run_id = await schedule_runs.skip_next(services.database, tenant_id, row["id"])
    return await _run(services, tenant_id, row["id"], run_id, 200)


@router.get(
    "/{schedule_id}/preview",
    summary="Preview a schedule's next firings",
    responses={200: {"model": Preview}},
)
async def preview_schedule(
    schedule_id: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[PreviewParameters, Query()],
) -> Response:
    """The next firings in UTC and in the schedule's zone.

    Of a paused schedule: as if it were resumed now.
    """
    row = await _known(services, tenant_id, schedule_id)
    rule = rule_of(row)
    now = await clock(services.database)
    upcoming = row["next_fire_at"]
    firings = rule.firings(now if upcoming is None else upcoming)
    shown = [] if upcoming is None else [upcoming]
    return json_response(preview_view(rule, (*shown, *_some(firings, parameters.count)),
                                      parameters.count))  # fmt: skip


@router.get(
    "/{schedule_id}/runs",
    summary="List a schedule's runs, latest first",
    responses={200: {"model": RunList}},
)
async def list_runs(
    schedule_id: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[ListParameters, Query()],
) -> Response:
    """One page of runs, each with its batch, the batch's counts as they are now, and lateness."""
    row = await _known(services, tenant_id, schedule_id)
    after = _after(parameters.after, IdPrefix.RUN)
    rows = await schedule_runs.list_runs(
        services.database, tenant_id, row["id"], after, parameters.limit + 1
    )
    return json_response(page([run_view(each) for each in rows], parameters.limit))


# --- parts ----------------------------------------------------------------------------------------


async def _body(request: Request, services: Services) -> dict[str, Any]:
    return parse_object(await read_json_body(request, services.settings.max_body_bytes))


async def _check(
    services: Services,
    tenant_id: int,
    asked: ScheduleRequest,
    only_new: dict[str, Any] | None = None,
) -> None:
    """What the body alone does not tell: where webhooks may go, the model, and the time."""
    if asked.webhook_url is not None and (only_new is None or "webhook_url" in only_new):
        check_webhook_url(asked.webhook_url, services.settings.webhook_networks())
    if asked.model is not None and (only_new is None or "model" in only_new):
        async with services.database.connection() as connection:
            await resolve(connection, tenant_id, asked.model)
    if only_new is None:
        now = await clock(services.database)
        check_fires(anchored(asked.rule, now), now)


async def _entered(services: Services, made: ScheduleInput | None, entering: Any) -> Any:
    """Await the transaction that enters a schedule; without it, its file is discarded."""
    try:
        return await entering
    except InputLost:
        raise Unavailable("the schedule's file was given up meanwhile; try again") from None
    except BaseException as error:
        if not isinstance(
            error, Unavailable
        ):  # that one may be committed: its file is swept if not
            await discard(services, made)
        raise


async def _run(
    services: Services, tenant_id: int, schedule_id: UUID, run_id: UUID, status: int
) -> Response:
    row = await schedule_runs.get_run(services.database, tenant_id, schedule_id, run_id)
    if row is None:
        raise NotFound("the schedule was deleted meanwhile", field="id")
    return json_response(run_view(row), status)


def _some(firings: Any, count: int) -> list[Any]:
    return [moment for moment, _ in zip(firings, range(count), strict=False)]


def _after(given: str | None, prefix: IdPrefix) -> UUID | None:
    after = given and parse_id(prefix, given)
    if given is not None and not after:
        raise InvalidRequest(
            f"after {given[:80]!r} is not an id of this list; give the last_id of a page",
            field="after",
        )
    return after or None


async def _known(services: Services, tenant_id: int, schedule_id: str) -> Row:
    found = parse_id(IdPrefix.SCHEDULE, schedule_id)
    row = None
    if "\0" not in schedule_id:
        row = await schedules.get(services.database, tenant_id, found, schedule_id)
    if row is None:
        raise NotFound(
            f"schedule {schedule_id[:80]!r} does not exist; GET /v1/schedules lists those there "
            "are",
            field="id",
        )
    return row
