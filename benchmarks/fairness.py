"""Who waits how long while one tenant floods: a real Postgres and drain, the simulated engine.

    python -m benchmarks.fairness [CASE…] [--seconds 240] [--speed 1]

One tenant queues 100,000 jobs at once; 50 others submit one job each every 5 seconds, for so many
seconds. Cases:

    adapters  every tenant has an adapter of its own; the worker has 8 slots
    base      every tenant uses the base model
    deadline  as adapters, and two further tenants submit the same job at the same moment, one with
              a deadline; one job with a deadline stands behind the flood in its own line

A line is printed for each case, and last the 99th percentile of the wait until a job is fed, over
the bound: ceil(adapters ahead / slots) quanta and the longest running job. A job that was never fed
counts as having waited until we gave it up, `--patience` seconds after the last was submitted.

`--speed F` divides every time by F (the engine's steps and loads, the quantum, the intervals, the
deadlines) and multiplies what was measured by it again; the planner's own constants (when a
deadline is pressing, how soon a tenant's share is forgotten) stay.
"""

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import orjson
import uvloop

from benchmarks.backlog import write_adapter
from benchmarks.fairness_figures import Observed, Sent, figures_of
from benchmarks.servers import Servers, running_servers
from core.ids import new_id
from core.priority import place_in_line
from core.settings import Settings
from db import adapters, registry, workers
from db.bulk import submit_many
from db.database import Database
from db.doorbell import Doorbell
from db.jobs import NewJob, submit
from db.migrate import upgrade
from db.registry import Target
from db.store import Store
from db.tenants import create_key
from db.workers import WorkerFacts
from workers.adapter_files import AdapterFiles
from workers.drain.core import DrainCore
from workers.engine.simulated import SimulatedEngine

BASE = "bench-base"
CONTEXT = 2048
PROMPT_TOKENS = 224
#: A job with a deadline has so long: less than the planner calls pressing.
DEADLINE_SECONDS = 50.0
PAIRS_EVERY_SECONDS = 10.0
PAIR_TOKENS = 120
CASES = ("adapters", "base", "deadline")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who submits, and what for."""

    name: str
    id: int
    target: Target


class Scene:
    """One case: its database, its tenants, its worker, and what was submitted."""

    def __init__(self, database: Database, options: argparse.Namespace) -> None:
        self.database = database
        self.options = options
        self.sent: dict[UUID, Sent] = {}
        self._random = random.Random(1)

    def real(self, seconds: float) -> float:
        """How long so many seconds of the scene take."""
        return seconds / float(self.options.speed)

    def new_job(
        self, tenant: Tenant, tokens: int | None = None, deadline: float | None = None
    ) -> NewJob:
        """A job as the GPU benchmarks have them: log-normal, median about 120, up to 768."""
        job_id = new_id()
        length = tokens or max(16, min(768, int(self._random.lognormvariate(4.8, 0.7))))
        due = None if deadline is None else timedelta(seconds=self.real(deadline))
        return NewJob(
            id=job_id,
            tenant_id=tenant.id,
            target=tenant.target,
            endpoint="completion",
            model=tenant.target.adapter or BASE,
            body=orjson.dumps({"prompt": "?", "max_tokens": length, "ignore_eos": True}).decode(),
            priority=0,
            place=place_in_line(job_id.int >> 80, 0),
            tokens=PROMPT_TOKENS + length,
            deadline=None if due is None else datetime.now(UTC) + due,
        )

    async def send(self, label: str, tenant: Tenant, job: NewJob) -> None:
        """Submit one job, and note when and behind how many lines."""
        ahead = await self.database.fetch_value(
            "SELECT count(*) FROM waiting_adapters"
            " WHERE (adapter_version_id, tenant_id) IS DISTINCT FROM ($1::int, $2::int)",
            tenant.target.adapter_version_id,
            tenant.id,
        )
        at = time.time()
        await submit(self.database, job, None)
        # not before: the case's end may have cut the submission off
        self.sent[job.id] = Sent(label, at, ahead)

    async def send_every(self, seconds: float, first: float, tenant: Tenant) -> None:
        """One job every so many seconds, from `first` on."""
        await asyncio.sleep(self.real(first))
        while True:
            await self.send("others", tenant, self.new_job(tenant))
            await asyncio.sleep(self.real(seconds))

    async def send_pairs(self, hurried: Tenant, patient: Tenant) -> None:
        """The same job at the same moment from two tenants, one with a deadline."""
        while True:
            await self.send(
                "with deadline", hurried, self.new_job(hurried, PAIR_TOKENS, DEADLINE_SECONDS)
            )
            await self.send("without", patient, self.new_job(patient, PAIR_TOKENS))
            await asyncio.sleep(self.real(PAIRS_EVERY_SECONDS))


def main() -> None:
    options = parse()
    ratios: dict[str, float] = {}
    with running_servers() as servers:
        for case in options.cases:
            figures = uvloop.run(run_case(case, servers, options))
            print(json.dumps({"name": case, "engine": "simulated", **figures}), flush=True)
            ratios[case] = round(figures["until_fed_s"]["p99"] / figures["bound_s"], 2)
    print("p99 / bound:", json.dumps(ratios))


async def run_case(case: str, servers: Servers, options: argparse.Namespace) -> dict[str, Any]:
    """Set a case up in a database of its own, run it, and read its figures."""
    await asyncio.to_thread(servers.execute, f"CREATE DATABASE {case}")
    await asyncio.to_thread(upgrade, servers.url(case))
    with TemporaryDirectory(prefix="lorry-fair-") as name:
        async with Database.connect(servers.url(case), max_size=16) as database:
            scene = Scene(database, options)
            base_model_id = await registry.declare_base(database, BASE, CONTEXT, "bench")
            names = ["flood", *(f"t{n}" for n in range(options.others)), "hurried", "patient"]
            flood, *others, hurried, patient = [
                await settle(database, Path(name), tenant, case != "base") for tenant in names
            ]
            await submit_many(database, [scene.new_job(flood) for _ in range(options.flood)])
            core = await start_worker(scene, base_model_id, Path(name))
            began = time.time()
            tasks = [
                asyncio.create_task(scene.send_every(options.every, i * options.every / 50, t))
                for i, t in enumerate(others)
            ]
            if case == "deadline":
                behind = scene.new_job(flood, PAIR_TOKENS, DEADLINE_SECONDS)
                await scene.send("behind the flood", flood, behind)
                tasks.append(asyncio.create_task(scene.send_pairs(hurried, patient)))
            draining = asyncio.create_task(core.run())
            await asyncio.sleep(scene.real(options.seconds))
            ended = time.time()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await all_finished(scene)
            observed = Observed(scene.sent, flood.id, began, ended, until=time.time())
            core.stop()
            core.stop()  # the flood is given back
            await draining
            figures = await figures_of(database, observed, options)
            return figures | loads_of(core)


async def settle(database: Database, folder: Path, name: str, with_adapter: bool) -> Tenant:
    """A tenant with an adapter of its own, or one that uses the base model."""
    await create_key(database, name)
    tenant_id = await database.fetch_value("SELECT id FROM tenants WHERE name = $1", name)
    if with_adapter:
        await adapters.register_ready(
            database,
            Store.open(str(folder / "store")),
            tenant=name,
            base_model=BASE,
            name=name,
            folder=write_adapter(folder / "sources" / name),
        )
    async with database.connection() as connection:
        target = await registry.resolve(connection, tenant_id, name if with_adapter else BASE)
    return Tenant(name, tenant_id, target)


async def start_worker(scene: Scene, base_model_id: int, folder: Path) -> DrainCore:
    """A drain with the simulated engine, not running yet."""
    options, speed = scene.options, scene.options.speed
    settings = Settings(quantum_seconds=scene.real(options.quantum), grace_seconds=0)
    flags = {
        "served-model-name": BASE,
        "max-model-len": CONTEXT,
        "max-num-seqs": options.seqs,
        "max-loras": options.slots,
        "sim-step-ms": options.step_ms / speed,
        "sim-step-ms-per-seq": options.step_ms_per_seq / speed,
        "sim-load-ms": options.load_ms / speed,
    }
    engine = SimulatedEngine.from_flags(BASE, [f"--{name}={v}" for name, v in flags.items()])
    await engine.start()
    facts = WorkerFacts(base_model_id, "bench", 1, "simulated", "1", {"max_loras": options.slots})
    return DrainCore(
        database=scene.database,
        engine=engine,
        files=AdapterFiles(scene.database, Store.open(str(folder / "store")), folder / "cache"),
        doorbell=Doorbell("memory://"),  # nobody listens: the drain looks by itself
        settings=settings,
        worker_id=await workers.register(scene.database, facts, settings.lease_seconds),
        base_model_id=base_model_id,
    )


async def all_finished(scene: Scene) -> None:
    """Wait until every measured job has finished or can no more, but not for ever."""
    give_up = time.monotonic() + scene.real(scene.options.patience)
    while time.monotonic() < give_up:
        left = await scene.database.fetch_value(
            "SELECT count(*) FROM jobs WHERE id = ANY($1) AND finished_at IS NULL"
            " AND (deadline IS NULL OR deadline > now())",
            list(scene.sent),
        )
        if not left:
            return
        await asyncio.sleep(0.2)


def loads_of(core: DrainCore) -> dict[str, Any]:
    """How often adapters were loaded, which stops the engine each time."""
    return {"loads": core.slots.loads, "load_s": round(core.slots.load_seconds, 2)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=CASES, help=", ".join(CASES))
    times = {"seconds": 240.0, "patience": 240.0, "every": 5.0, "quantum": 10.0, "speed": 1.0}
    for name, value in times.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    for name, count in (("flood", 100_000), ("others", 50), ("slots", 8), ("seqs", 256)):
        parser.add_argument(f"--{name}", type=int, default=count)
    for name, ms in (("step-ms", 8.0), ("step-ms-per-seq", 0.155), ("load-ms", 80.0)):
        parser.add_argument(f"--{name}", type=float, default=ms)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
