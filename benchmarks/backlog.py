"""A backlog of jobs for the queue's benchmarks, made through the functions that the API uses."""

import json
from collections.abc import Sequence
from pathlib import Path

import orjson

from core.ids import new_id
from core.priority import place_in_line
from db import adapters as registered
from db import registry
from db.database import Connection, Database
from db.jobs import NewJob
from db.registry import Target
from db.store import Store
from db.tenants import DEFAULT_TENANT_ID

BASE = "bench-base"
CONTEXT = 8192


async def register(database: Database, folder: Path, adapters: int) -> list[Target]:
    """Declare the base model and adapters with made-up files; returns what jobs may name."""
    await registry.declare_base(database, BASE, CONTEXT, "bench")
    store = Store.open(str(folder / "store"))
    for number in range(adapters):
        await registered.register_ready(
            database,
            store,
            tenant="default",
            base_model=BASE,
            name=f"a{number}",
            folder=write_adapter(folder / "sources" / f"a{number}"),
        )
    async with database.connection() as connection:
        return await targets(connection, adapters)


async def targets(connection: Connection, adapters: int) -> list[Target]:
    """What was registered."""
    return [await registry.resolve(connection, DEFAULT_TENANT_ID, f"a{n}") for n in range(adapters)]


def write_adapter(folder: Path) -> Path:
    """A folder that the registry takes for an adapter; its weights are made up."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    return folder


def body(number: int) -> str:
    """A small request: what the queue does with it is what is measured."""
    prompt = f"Summarise document {number} of the bench in one sentence, please."
    return orjson.dumps({"prompt": prompt, "max_tokens": 16}).decode()


def new_jobs(count: int, targets: Sequence[Target]) -> list[NewJob]:
    """Jobs spread over the targets one after another."""
    return [new_job(targets[n % len(targets)], body(n), tokens=32) for n in range(count)]


def new_job(target: Target, request: str, tokens: int) -> NewJob:
    """A job of the default tenant, at its place in line.

    Args:
        request: its body, as JSON.
        tokens: of its prompt and its answer, as the planner counts them.
    """
    job_id = new_id()
    return NewJob(
        id=job_id,
        tenant_id=DEFAULT_TENANT_ID,
        target=target,
        endpoint="completion",
        model=target.adapter or target.base_model,
        body=request,
        priority=0,
        place=place_in_line(job_id.int >> 80, 0),
        tokens=tokens,
    )
