"""The drain over the bare engine: the same requests, the same engine, the same run, bare first.

    python -m benchmarks.engine_ratio ROW…                    (8B-shaped random weights, a GPU)
    python -m benchmarks.engine_ratio --cpu ROW…              (the demo's model and adapters)

Rows: none, one, eight, thirtytwo, zipf, barrier; all need 8 slots but zipf, which needs 16.
`--scale S` multiplies the number of jobs. The jobs of a row stand in a real Postgres before its
clock starts; the clock runs from the drain's start to the last commit. `barrier` is our own drain
kept from topping up: each adapter's jobs are fed at once and waited for, one adapter after another.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import uvloop

from benchmarks.bare import bare_run, report
from benchmarks.servers import running_servers
from benchmarks.workload import ENGINE_FLAGS, Work, make_adapters, make_model, requests
from core.ids import new_id
from core.settings import Settings
from db import registry, workers
from db.bulk import submit_many
from db.database import Database
from db.doorbell import Doorbell
from db.jobs import NewJob
from db.migrate import upgrade
from db.store import Store
from db.tenants import DEFAULT_TENANT_ID
from db.workers import WorkerFacts
from workers.adapter_files import AdapterFiles
from workers.drain.core import DrainCore
from workers.engine.vllm_engine import VllmEngine

#: The doorbell of a benchmark rings nowhere: the drain looks by itself.
NO_BROKER = "memory://"


@dataclass(frozen=True, slots=True)
class Row:
    """A workload: which adapter each request takes, and which bare run it is compared with.

    Args:
        jobs: how many.
        adapter_of: adapter number of request i; −1 is the base model.
        against: the name of the bare workload.
    """

    name: str
    jobs: int
    adapter_of: Callable[[int], int]
    against: str


def zipf(adapters: int, seed: int = 1) -> Callable[[int], int]:
    """Adapter numbers by a Zipf law with exponent 1."""
    weights = [1 / (rank + 1) for rank in range(adapters)]
    drawn = random.Random(seed).choices(range(adapters), weights, k=100_000)
    return drawn.__getitem__


ROWS = {
    row.name: row
    for row in (
        Row("none", 2000, lambda i: -1, "none"),
        Row("one", 2000, lambda i: 0, "one"),
        Row("eight", 2000, lambda i: i % 8, "eight"),
        Row("thirtytwo", 2560, lambda i: i % 32, "one"),
        Row("zipf", 4096, zipf(256), "one"),
        Row("barrier", 2000, lambda i: i % 8, "eight"),
    )
}


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine with its adapters, and a database that knows them."""

    engine: VllmEngine
    database: Database
    store: Store
    base_model_id: int
    folders: Sequence[Path]
    cache: Path

    def folder(self, adapter: int) -> Path:
        """The weights of an adapter; more names than files share them."""
        return self.folders[adapter % len(self.folders)]


def main() -> None:
    options = parse()
    with running_servers() as servers:
        upgrade(servers.postgres_url)
        uvloop.run(run(options, servers.postgres_url))


async def run(options: argparse.Namespace, database_url: str) -> None:
    """Start the engine, measure, stop it."""
    flags, model, folders = on_cpu() if options.cpu else on_gpu(options)
    engine = VllmEngine.from_flags(str(model), flags)
    started = time.perf_counter()
    await engine.start()
    report(name="engine", flags=flags, start_s=round(time.perf_counter() - started, 1))
    with TemporaryDirectory(prefix="lorry-bench-") as folder:
        async with Database.connect(database_url) as database:
            info = engine.info
            base_model_id = await registry.declare_base(
                database, info.base_model, info.limits.max_model_len
            )
            store = Store.open(str(Path(folder) / "store"))
            cache = Path(folder) / "cache"
            bench = Bench(engine, database, store, base_model_id, folders, cache)
            await measure(bench, options)
    await engine.close()


async def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Every bare workload once, then every row; prints a line for each, the ratios last."""
    rows = [ROWS[name] for name in options.rows]
    bare: dict[str, float] = {}
    await run_bare(bench, ROWS["eight"], requests_for(options, 200, seed=9))
    for name in dict.fromkeys(row.against for row in rows):
        row = ROWS[name]
        jobs = max(r.jobs for r in rows if r.against == name)
        bare[name] = await run_bare(bench, row, requests_for(options, jobs))
        report(name=f"bare {name}", jobs=int(jobs * options.scale), out_tok_s=round(bare[name]))
    ratios: dict[str, list[float]] = {}
    for repeat in range(options.repeat):
        for row in rows:
            rate, facts = await run_drain(bench, row, requests_for(options, row.jobs))
            ratio = round(rate / bare[row.against], 3)
            ratios.setdefault(row.name, []).append(ratio)
            report(name=row.name, run=repeat, out_tok_s=round(rate), ratio=ratio, **facts)
    print("drain / bare:", json.dumps(ratios), flush=True)


def requests_for(options: argparse.Namespace, jobs: int, seed: int = 1) -> list[Work]:
    """The requests of a row: the GPU's lengths, or short ones for the CPU."""
    count = max(8, int(jobs * options.scale))
    if not options.cpu:
        return requests(count, seed)
    rng = random.Random(seed)
    return [
        Work([rng.randrange(500, 40_000) for _ in range(rng.randrange(16, 64))],
             max(8, min(128, int(rng.lognormvariate(3.2, 0.6)))))
        for _ in range(count)
    ]  # fmt: skip


async def run_bare(bench: Bench, row: Row, work: Sequence[Work]) -> float:
    """Output tokens per second of the bare engine on a row."""
    from vllm.lora.request import LoRARequest

    def adapter(number: int) -> Any:
        which = row.adapter_of(number)
        if which < 0:
            return None
        # ids far from those of the registry
        return LoRARequest(f"bare-{which}", 1_000_000 + which, str(bench.folder(which)))

    return await bare_run(bench.engine, work, adapter)


async def run_drain(bench: Bench, row: Row, work: Sequence[Work]) -> tuple[float, dict[str, Any]]:
    """Output tokens per second of the drain on a row, and what it cost."""
    await queue(bench, row, work)
    settings = Settings(grace_seconds=600)
    facts = WorkerFacts(bench.base_model_id, "bench", 1, "vllm", "", {})
    worker_id = await workers.register(bench.database, facts, settings.lease_seconds)
    doorbell = Doorbell(NO_BROKER)
    core = DrainCore(
        database=bench.database,
        engine=bench.engine,
        files=AdapterFiles(bench.database, bench.store, bench.cache),
        doorbell=doorbell,
        settings=settings,
        worker_id=worker_id,
        base_model_id=bench.base_model_id,
    )
    if row.name == "barrier":
        with_barrier(core)
    starved = Starvation(core, len(work))
    started = time.perf_counter()
    task = asyncio.create_task(core.run())
    while core.recorder.recorded < len(work):
        starved.sample()
        await asyncio.sleep(0.01)
        if task.done():
            task.result()
    seconds = time.perf_counter() - started
    core.stop()
    await task
    doorbell.close()
    states = await bench.database.fetch_value(
        "SELECT json_object_agg(state, n)::text FROM"
        " (SELECT state, count(*) n FROM jobs GROUP BY state) s"
    )
    await clear(bench)
    cost = {
        "s": round(seconds, 1),
        "loads": core.slots.loads,
        "load_s": round(core.slots.load_seconds, 2),
        "starved": round(starved.share, 4),
        "states": json.loads(states),
    }
    return sum(request.output_tokens for request in work) / seconds, cost


class Starvation:
    """The share of time with work waiting in Postgres and too few sequences in the engine."""

    def __init__(self, core: DrainCore, jobs: int) -> None:
        self._core = core
        self._jobs = jobs
        self._starved = self._total = 0

    def sample(self) -> None:
        """Look once, 100 times a second."""
        running = self._core.feeder.running
        done = self._core.recorder.recorded + self._core.recorder.unrecorded
        waiting = self._jobs - done - running
        self._total += 1
        self._starved += waiting > 0 and running < min(self._core.feeder.enough, waiting + running)

    @property
    def share(self) -> float:
        return self._starved / max(1, self._total)


async def queue(bench: Bench, row: Row, work: Sequence[Work]) -> None:
    """Put a row's jobs into Postgres, adapters registered."""
    targets = {}
    for which in sorted({row.adapter_of(i) for i in range(len(work))}):
        model = bench.engine.info.base_model if which < 0 else f"a{which}"
        if which >= 0:
            await register(bench, which)
        async with bench.database.connection() as connection:
            targets[which] = await registry.resolve(connection, DEFAULT_TENANT_ID, model)
    jobs = []
    for number, request in enumerate(work):
        job_id = new_id()
        body = {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0.8,
            "ignore_eos": True,
        }
        target = targets[row.adapter_of(number)]
        jobs.append(
            NewJob(
                id=job_id,
                tenant_id=DEFAULT_TENANT_ID,
                target=target,
                endpoint="completion",
                model=target.adapter or target.base_model,
                body=orjson.dumps(body).decode(),
                priority=0,
                place=job_id.int >> 80,
                tokens=len(request.prompt) + request.output_tokens,
            )
        )
    await submit_many(bench.database, jobs)


async def register(bench: Bench, which: int) -> None:
    """Make adapter number `which` known. Versions of equal files share an address, not an id."""
    await registry.register_adapter(
        bench.database,
        bench.store,
        tenant="default",
        base_model=bench.engine.info.base_model,
        name=f"a{which}",
        folder=bench.folder(which),
    )


async def clear(bench: Bench) -> None:
    """Empty the tables between rows, and forget what the engine holds."""
    async with bench.database.connection() as connection:
        await connection.execute("TRUNCATE jobs, job_inputs, job_outputs, waiting_adapters")


def with_barrier(core: DrainCore) -> None:
    """Make the drain wait for everything in the engine before it claims again."""
    feeder = type(core.feeder)

    class Barrier(feeder):  # type: ignore[valid-type, misc]
        @property
        def free(self) -> int:
            return self.window if self.running == 0 else 0

    core.feeder.__class__ = Barrier


def on_gpu(options: argparse.Namespace) -> tuple[list[str], Path, list[Path]]:
    """Flags, model and adapters of the 8B shape."""
    slots = 16 if "zipf" in options.rows else 8
    folder = Path(options.folder)
    model = make_model(folder / "model")
    adapters = make_adapters(folder / "adapters", 32)
    return [*ENGINE_FLAGS, "--max-loras", str(slots), "--max-cpu-loras", "64"], model, adapters


def on_cpu() -> tuple[list[str], Path, list[Path]]:
    """Flags, model and adapters of the demo."""
    import cli.demo
    from cli.demo.base import ensure_base

    model = ensure_base(Settings().cache_folder(), lambda text: print(text, file=sys.stderr))
    adapters = Path(cli.demo.__file__).parent / "adapters"
    flags = ["--max-model-len", "1024", "--max-num-seqs", "32", "--max-lora-rank", "8"]
    return flags, model, [adapters / name for name in ("sql", "pirate", "json")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", default="/tmp/lorry-bench")
    return parser.parse_args()


if __name__ == "__main__":
    main()
