"""The schema, as SQLAlchemy models: what Alembic migrates and what the tests compare with it.

Runtime statements are written by hand beside this package (docs/decisions/0002-sql-by-hand.md).
"""

from db.models.base import Base
from db.models.batches import (
    Batch,
    BatchLine,
    BatchStep,
    File,
    UsageDay,
    UsageEntry,
)
from db.models.jobs import IdempotencyKey, Job, JobAttempt, JobInput, JobOutput, WaitingAdapter
from db.models.registry import Adapter, AdapterVersion, BaseModel, Task
from db.models.schedules import Schedule, ScheduleRun
from db.models.tenants import ApiKey, Tenant
from db.models.webhooks import (
    Delivery,
    DeliveryAttempt,
    WebhookCircuit,
    WebhookEndpoint,
    WebhookSecret,
)
from db.models.workers import Worker, WorkerRate

#: `adapter_version_id` of a job for the base model itself; version ids start at 1.
BASE_VERSION_ID = 0

__all__ = [
    "BASE_VERSION_ID",
    "Adapter",
    "AdapterVersion",
    "ApiKey",
    "Base",
    "BaseModel",
    "Batch",
    "BatchLine",
    "BatchStep",
    "Delivery",
    "DeliveryAttempt",
    "File",
    "IdempotencyKey",
    "Job",
    "JobAttempt",
    "JobInput",
    "JobOutput",
    "Schedule",
    "ScheduleRun",
    "Task",
    "Tenant",
    "UsageDay",
    "UsageEntry",
    "WaitingAdapter",
    "WebhookCircuit",
    "WebhookEndpoint",
    "WebhookSecret",
    "Worker",
    "WorkerRate",
]
