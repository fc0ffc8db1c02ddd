"""Adapters, versions and tasks as the outside sees them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from core.adapter_rules import Finding
from core.adapter_rules.check import rank_step
from core.ids import IdPrefix, format_id
from db.adapter_views import COUNT_CAP, AdapterView, VersionView
from db.tasks import TaskRow


class FindingObject(BaseModel):
    """One thing that is wrong with an adapter: what, found, expected, remedy."""

    code: str
    message: str


class Version(BaseModel):
    """A version of an adapter. Times are unix seconds.

    `waiting_for` says why a `validating` version is not ready yet, or why the jobs of a ready one
    would wait; `probe` what the worker measured: `load_seconds`, `memory_bytes`, `differs`,
    `difference`, `engine`.
    """

    id: str
    object: Literal["adapter.version"]
    adapter: str
    base_model: str
    version: int
    state: Literal["validating", "ready", "rejected"]
    current: bool
    sha256: str
    rank: int
    size_bytes: int
    created_at: int
    validated_at: int | None
    waiting_for: str | None
    findings: list[FindingObject]
    probe: dict[str, Any] | None
    resident_on: list[int]
    waiting_jobs: int
    waiting_jobs_capped: bool
    tokens_per_second: float


class AddedVersion(Version):
    """A version that was just added. `hints` stop nothing."""

    created: bool
    hints: list[FindingObject]


class Adapter(BaseModel):
    """An adapter: the version that its name stands for, if any, and the newest one."""

    id: str
    object: Literal["adapter"]
    name: str
    base_model: str
    created_at: int
    current_version: int | None
    current: Version | None
    newest: Version


class Page(BaseModel):
    """One page; the next one begins after `last_id`."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterList(Page):
    """Adapters, newest first."""

    data: list[Adapter]


class VersionList(Page):
    """Versions, newest first."""

    data: list[Version]


class Judgement(BaseModel):
    """What the rules say of an adapter that was not stored."""

    object: Literal["adapter.check"]
    base_model: str
    rank: int
    size_bytes: int
    findings: list[FindingObject]
    hints: list[FindingObject]


class Removed(BaseModel):
    """An adapter that nothing resolves to any more. `jobs` of it still wait or run."""

    object: Literal["adapter.removed"]
    name: str
    jobs: int


class Task(BaseModel):
    """A task: `model` is what `task:<name>` stands for."""

    id: str
    object: Literal["task"]
    name: str
    model: str
    base_model: str
    adapter: str | None
    version: int | None
    created_at: int


class TaskList(Page):
    """Tasks by name."""

    data: list[Task]


def adapter_object(view: AdapterView) -> dict[str, Any]:
    """An adapter."""
    return {
        "id": format_id(IdPrefix.ADAPTER, view.id),
        "object": "adapter",
        "name": view.name,
        "base_model": view.base_model,
        "created_at": int(view.created_at.timestamp()),
        "current_version": view.current.version if view.current else None,
        "current": version_object(view.current) if view.current else None,
        "newest": version_object(view.newest),
    }


def version_object(view: VersionView) -> dict[str, Any]:
    """A version of an adapter."""
    return {
        "id": f"{view.name}@{view.version}",
        "object": "adapter.version",
        "adapter": view.name,
        "base_model": view.base_model,
        "version": view.version,
        "state": view.state,
        "current": view.is_current,
        "sha256": view.sha256,
        "rank": view.rank,
        "size_bytes": view.size_bytes,
        "created_at": int(view.created_at.timestamp()),
        "validated_at": view.validated_at and int(view.validated_at.timestamp()),
        "waiting_for": _waiting_for(view),
        "findings": view.findings,
        "probe": view.probe,
        "resident_on": view.resident_on,
        "waiting_jobs": view.waiting_jobs,
        "waiting_jobs_capped": view.waiting_jobs >= COUNT_CAP,
        "tokens_per_second": view.tokens_per_second,
    }


def _waiting_for(view: VersionView) -> str | None:
    if view.state == "rejected":
        return None
    if not view.worker_lives:
        return f"no worker of {view.base_model} that takes adapters is running; start one"
    if view.state == "validating":
        return f"a worker of {view.base_model} probes it once a slot is free"
    if not view.rank_fits:
        return (
            f"no worker of {view.base_model} that runs takes rank {view.rank}: start one with "
            f"`--max-lora-rank {rank_step(view.rank)}`"
        )
    return None


def finding_objects(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Findings as JSON."""
    return [{"code": finding.code, "message": finding.message} for finding in findings]


def task_object(row: TaskRow) -> dict[str, Any]:
    """A task."""
    return {
        "id": f"task:{row.name}",
        "object": "task",
        "name": row.name,
        "model": row.model,
        "base_model": row.base_model,
        "adapter": row.adapter,
        "version": row.version,
        "created_at": int(row.created_at.timestamp()),
    }


def page(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list of at most `limit`, made of one more where there are more."""
    data = list(found[:limit])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > limit,
    }
