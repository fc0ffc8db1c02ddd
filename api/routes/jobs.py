"""/v1/jobs: submit, read and wait, list, cancel."""

import asyncio
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from api.attempt_view import AttemptList, attempt_list
from api.auth import TenantId
from api.body import read_json_body
from api.job_view import Job, JobList, json_response, stored_job
from api.openapi import JOB_REQUEST_BODY
from api.services import Services, ServicesDep
from api.submission import submit
from core.errors import InvalidRequest, NotFound
from core.ids import IdPrefix, parse_id
from core.json_values import check_text
from core.request import parse_job_request
from core.states import JobState
from db import jobs
from db.attempts import list_attempts

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

LONGEST_WAIT_SECONDS: Final = 30
#: Bodies beyond this are parsed on a thread: a schema of this size takes 60 ms to check.
INLINE_BYTES: Final = 16 * 1024


@router.post(
    "",
    status_code=202,
    summary="Submit a job",
    responses={202: {"model": Job, "description": "The job is committed and will run."}},
    openapi_extra=JOB_REQUEST_BODY,
)
async def submit_job(request: Request, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Takes the body of `/v1/chat/completions` or `/v1/completions` and answers with the job.

    With an `Idempotency-Key` a repeat within 24 hours answers with the job of the first request
    (and the header `Idempotent-Replayed: true`); another body under the same key is an error.
    """
    raw = await read_json_body(request, services.settings.max_body_bytes)
    if len(raw) <= INLINE_BYTES:
        parsed = parse_job_request(raw)
    else:
        parsed = await asyncio.to_thread(parse_job_request, raw)
    key = request.headers.get("idempotency-key")
    submitted = await submit(services, tenant_id, parsed, key)
    headers = {"Location": f"/v1/jobs/{submitted.job['id']}", "Retry-After": "1"}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    return json_response(submitted.job, 202, headers)


class _Parameters(BaseModel):
    """Query parameters; an unknown one is an error, since it would be silently without effect."""

    model_config = ConfigDict(extra="forbid")


class ListParameters(_Parameters):
    """What a list of jobs is narrowed by."""

    state: JobState | None = None
    model: Annotated[str, AfterValidator(check_text)] | None = Field(None, max_length=256)
    after: str | None = Field(None, description="the id of a job: begin behind it")
    limit: int = Field(20, ge=1, le=100)


@router.get("", summary="List jobs, newest first", responses={200: {"model": JobList}})
async def list_jobs(
    tenant_id: TenantId, services: ServicesDep, parameters: Annotated[ListParameters, Query()]
) -> Response:
    """One page of jobs. Give the page's `last_id` as `after` for the next one."""
    rows = await jobs.list_page(
        services.database,
        tenant_id,
        jobs.JobFilter(parameters.state, parameters.model),
        _cursor(parameters.after),
        parameters.limit + 1,  # one more tells whether there are more
    )
    data = [stored_job(row) for row in rows[: parameters.limit]]
    return json_response(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(rows) > parameters.limit,
        }
    )


def _cursor(after: str | None) -> UUID | None:
    job_id = after and parse_id(IdPrefix.JOB, after)
    if after is not None and not job_id:
        raise InvalidRequest(
            f"after {after[:80]!r} is not a job id; give the last_id of a page", field="after"
        )
    return job_id or None


class WaitParameters(_Parameters):
    """How long the answer may take."""

    wait: float = Field(
        0,
        ge=0,
        le=LONGEST_WAIT_SECONDS,
        allow_inf_nan=False,
        description="seconds to wait for the job to become final",
    )


@router.get("/{job_id}", summary="Read a job", responses={200: {"model": Job}})
async def get_job(
    job_id: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[WaitParameters, Query()],
) -> Response:
    """The job, with `response` once it succeeded. With `wait`, as soon as it is final."""
    found = _known_id(job_id)
    job = await _read(services, tenant_id, found, job_id)
    if parameters.wait and not JobState(job["state"]).is_final:
        await services.waiters.wait(found, parameters.wait)
        job = await _read(services, tenant_id, found, job_id)
    return json_response(job)


class AttemptParameters(_Parameters):
    """Which attempts are listed."""

    after: int = Field(0, ge=0, le=2**31 - 1, description="begin behind this attempt")
    limit: int = Field(20, ge=1, le=100)


@router.get(
    "/{job_id}/attempts", summary="List a job's attempts", responses={200: {"model": AttemptList}}
)
async def list_job_attempts(
    job_id: str,
    tenant_id: TenantId,
    services: ServicesDep,
    parameters: Annotated[AttemptParameters, Query()],
) -> Response:
    """The job's attempts, oldest first: which worker, when, and what became of each."""
    found = _known_id(job_id)
    rows = await list_attempts(
        services.database, tenant_id, found, parameters.after, parameters.limit + 1
    )
    if rows is None:
        raise _no_job(job_id)
    return json_response(attempt_list(rows, parameters.limit))


@router.post("/{job_id}/cancel", summary="Cancel a job", responses={200: {"model": Job}})
async def cancel_job(job_id: str, tenant_id: TenantId, services: ServicesDep) -> Response:
    """Cancels a job that is queued or running; a final one stays as it is. Answers the job."""
    found = _known_id(job_id)
    await jobs.cancel(services.database, tenant_id, found)
    return json_response(await _read(services, tenant_id, found, job_id))


def _known_id(job_id: str) -> UUID:
    found = parse_id(IdPrefix.JOB, job_id)
    if found is None:
        raise _no_job(job_id)
    return found


async def _read(services: Services, tenant_id: int, found: UUID, job_id: str) -> dict[str, Any]:
    row = await jobs.get(services.database, tenant_id, found)
    if row is None:
        raise _no_job(job_id)
    return stored_job(row)


def _no_job(job_id: str) -> NotFound:
    return NotFound(
        f"job {job_id[:80]!r} does not exist; GET /v1/jobs lists those there are", field="id"
    )
