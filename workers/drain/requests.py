"""Claimed jobs in the engine's terms, and what their answers were made by."""

import functools
from uuid import UUID

import orjson

from core.generation import GenerationRequest, Provenance
from db.claims import ClaimedJob
from workers.engine.protocol import EngineInfo, EngineRequest, LocalAdapter


def request_id(job_id: UUID, attempt: int) -> str:
    """The engine's name for one attempt of a job."""
    return f"{job_id.hex}-{attempt}"


def engine_request(job: ClaimedJob, adapter: LocalAdapter | None) -> EngineRequest:
    """A claimed job as the engine takes it. The tenant salts the prefix cache."""
    return EngineRequest(
        request_id=request_id(job.id, job.attempt),
        generation=GenerationRequest(
            "chat" if job.endpoint == "chat" else "completion", orjson.loads(job.body)
        ),
        adapter=adapter,
        cache_salt=str(job.tenant_id),
    )


@functools.lru_cache(maxsize=256)
def made_by(info: EngineInfo, adapter_sha256: str | None, seed: int | None) -> Provenance:
    """What an answer was made by; nearly always the same as the last one's."""
    return Provenance(
        engine=info.name,
        engine_version=info.version,
        base_model=info.base_model,
        base_revision=info.base_revision,
        adapter_sha256=adapter_sha256,
        seed=seed,
    )
