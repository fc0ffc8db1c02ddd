"""Submitting a job: at most once per Idempotency-Key, committed before it is answered or rung."""

from dataclasses import dataclass
from typing import Any, Final

from api.job_view import created_ms, stored_job, submitted_job
from api.services import Services
from core.errors import IdempotencyConflict, InvalidRequest, NotFound
from core.ids import IdPrefix, format_id, new_id
from core.priority import place_in_line
from core.request import JobRequest
from db import jobs
from db.registry import Target, resolve
from db.workers import clock

#: The scope of a key, with its tenant.
ROUTE: Final = "POST /v1/jobs"
LONGEST_KEY: Final = 255


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is committed. `replayed` where an earlier request had made it."""

    job: dict[str, Any]
    replayed: bool = False


async def submit(
    services: Services, tenant_id: int, request: JobRequest, key: str | None
) -> Submitted:
    """Commit a job, then ring; or find the job that this key made before.

    The key is looked up before anything is resolved: a repeat is answered with its job even when
    the model has gone or the deadline has passed meanwhile.

    Raises:
        InvalidRequest: the deadline has passed, the request cannot fit the model's context, or
            webhooks may not go to its URL.
        IdempotencyConflict: the key was used with another body.
        ModelNotFound: the model does not exist.
        Unavailable: Postgres cannot be reached. With a key it is safe to ask again.
    """
    use = None
    if key is not None:
        use = jobs.IdempotencyUse(ROUTE, check_key(key), request.fingerprint())
        earlier = await _earlier(services, tenant_id, use)
        if earlier is not None:
            return earlier
    request.check_webhook(services.settings.webhook_networks())
    deadline = None
    if request.deadline is not None:
        # by the clock that will expire it, whatever this machine's says
        deadline = request.deadline_at((await clock(services.database)).timestamp())
    async with services.database.connection() as connection:
        target = await resolve(connection, tenant_id, request.model)
    request.check_context(target.max_model_len)

    job_id = new_id()
    job = jobs.NewJob(
        id=job_id,
        tenant_id=tenant_id,
        target=target,
        endpoint=request.endpoint,
        model=request.model,
        body=request.body_json(),
        priority=request.priority,
        place=place_in_line(created_ms(job_id), request.priority),
        tokens=request.expected_tokens(target.max_model_len),
        deadline=deadline,
        metadata=request.metadata_json(),
        webhook_url=request.webhook_url,
    )
    return await _commit(services, job, use, request, target)


async def _commit(
    services: Services,
    job: jobs.NewJob,
    use: jobs.IdempotencyUse | None,
    request: JobRequest,
    target: Target,
) -> Submitted:
    # a loser of the race finds the winner; only if that key expired in between does it try again
    while not await jobs.submit(services.database, job, use):
        assert use is not None, "only a key can keep a job from being written"
        earlier = await _earlier(services, job.tenant_id, use)
        if earlier is not None:
            return earlier
    services.ring(target.base_model, target.partition)
    services.metrics.submitted(target.base_model)
    return Submitted(submitted_job(job.id, request, target))


async def _earlier(
    services: Services, tenant_id: int, use: jobs.IdempotencyUse
) -> Submitted | None:
    """The job that a key made before, or None for a fresh key."""
    record = await jobs.find_idempotent(services.database, tenant_id, use.route, use.key)
    if record is None:
        return None
    if record.fingerprint != use.fingerprint:
        raise IdempotencyConflict(
            f"Idempotency-Key {use.key!r} was used with another body; send the same body again, "
            "or a new key",
            field="Idempotency-Key",
        )
    row = await jobs.get(services.database, tenant_id, record.job_id)
    if row is None:
        raise NotFound(
            f"job {format_id(IdPrefix.JOB, record.job_id)}, made under this Idempotency-Key, is "
            "no longer kept; send a new key to run the request again"
        )
    return Submitted(stored_job(row), replayed=True)


def check_key(key: str) -> str:
    """`key` itself, or InvalidRequest where it is no Idempotency-Key."""
    if not 1 <= len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key {key[:80]!r} cannot be used; give 1 to {LONGEST_KEY} printable "
            "ASCII characters",
            field="Idempotency-Key",
        )
    return key
