"""Jobs and adapters for tests, made through the same functions that the API uses."""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from core.ids import new_id
from core.priority import place_in_line
from db import adapters as registered
from db import jobs, registry
from db.database import Database
from db.jobs import NewJob
from db.store import Store
from db.tenants import DEFAULT_TENANT_ID

BASE = "sim-base"


@dataclass(frozen=True, slots=True)
class Bench:
    """A declared base model and adapters `a0`, `a1`, … of the default tenant."""

    database: Database
    store: Store
    base_model_id: int
    adapters: tuple[str, ...]


async def make_bench(database: Database, folder: Path, adapters: int) -> Bench:
    """Declare a base model and register adapters whose weights the simulated engine takes."""
    base_model_id = await registry.declare_base(database, BASE, 8192, "test")
    store = Store.open(str(folder / "store"))
    names = tuple(f"a{i}" for i in range(adapters))
    for name in names:
        await registered.register_ready(
            database,
            store,
            tenant="default",
            base_model=BASE,
            name=name,
            folder=fake_adapter(folder / "sources" / name),
        )
    return Bench(database, store, base_model_id, names)


def fake_adapter(folder: Path, rank: int = 8) -> Path:
    """A folder that looks like a PEFT adapter; its weights differ from folder to folder."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    return folder


async def submit(
    database: Database,
    model: str,
    count: int = 1,
    *,
    tenant_id: int = DEFAULT_TENANT_ID,
    priority: int = 0,
    due_seconds: float | None = None,
    **body: Any,
) -> list[UUID]:
    """Queue jobs for a model; the prompt numbers them unless `body` gives one.

    Args:
        due_seconds: a deadline, from now on.
    """
    due = None if due_seconds is None else datetime.now(UTC) + timedelta(seconds=due_seconds)
    async with database.connection() as connection:
        target = await registry.resolve(connection, tenant_id, model)
    ids = []
    for number in range(count):
        job_id = new_id()
        milliseconds = job_id.int >> 80
        job = NewJob(
            id=job_id,
            tenant_id=tenant_id,
            target=target,
            endpoint="completion",
            model=model,
            body=orjson.dumps({"prompt": f"{model} {number}", "max_tokens": 4, **body}).decode(),
            priority=priority,
            place=place_in_line(milliseconds, priority),
            tokens=16,
            deadline=due,
        )
        assert await jobs.submit(database, job, None)
        ids.append(job_id)
    return ids


async def states(database: Database) -> Counter[str]:
    """How many jobs stand in each state."""
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT state, count(*) AS jobs FROM jobs GROUP BY state")
    return Counter({row["state"]: row["jobs"] for row in rows})


async def all_final(database: Database) -> bool:
    """Whether no job is queued or running."""
    found = await states(database)
    return not (found["queued"] or found["running"])
