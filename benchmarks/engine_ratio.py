"""The drain over the bare engine: the same requests, the same engine, the same run, bare first.

    python -m benchmarks.engine_ratio ROW…                    (8B-shaped random weights, a GPU)
    python -m benchmarks.engine_ratio --cpu [ROW…]            (the demo's model and adapters)

Rows: none, one, eight, thirtytwo, zipf, barrier, barrier80, demo; all need 8 slots but zipf, which
needs 16. They run in the order given on one engine; name a row again to measure it again. Its bare
workload runs before it for the first time, and once more wherever `bare-none`, `bare-one` or
`bare-eight` stands between the rows. `--repeat N` does all of it N times, bare runs too.
`--scale S` multiplies the number of jobs.

The jobs of a row stand in a real Postgres before its clock starts; the clock runs from the drain's
start to the last commit. `barrier` is our own drain kept from topping up: each adapter's jobs are
fed at once and waited for, one adapter after another; `barrier80` in batches of at most 80, which
is how many of 640 jobs each of eight adapters had where a barrier was first measured. Every run is
printed at once, the medians last; a ratio is that of a row's run to the bare run before it.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from benchmarks.bare import bare_run, report
from benchmarks.drained import Bench, clear, drained
from benchmarks.engine_rows import BARE_AGAIN, ROWS, Row
from benchmarks.servers import running_servers
from benchmarks.trace import traced
from benchmarks.workload import ENGINE_FLAGS, Work, make_adapters, make_model, requests
from core.settings import Settings
from db import registry
from db.database import Database
from db.migrate import upgrade
from db.store import Store
from workers.engine.vllm_engine import VllmEngine

#: What is measured where nothing is named: all but zipf, which needs more slots.
DEFAULT_ROWS = ("none", "one", "eight", "barrier", "thirtytwo")


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
    """The rows in order, each behind its bare run; a line for every run, the medians last."""
    await run_bare(bench, ROWS["eight"], requests_for(options, 200, seed=9))
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        bare: dict[tuple[str, int], float] = {}
        for name in options.rows:
            if name in BARE_AGAIN:
                bare = {key: rate for key, rate in bare.items() if key[0] != BARE_AGAIN[name]}
                continue
            row = ROWS[name]
            if (row.against, row.jobs) not in bare:
                work = requests_for(options, row.jobs)
                async with traced(bench.engine, f"bare {row.against}", options.trace):
                    rate = await run_bare(bench, ROWS[row.against], work)
                bare[row.against, row.jobs] = rate
                report(name=f"bare {row.against}", jobs=len(work), out_tok_s=round(rate))
            rate, facts = await run_drain(
                bench, row, requests_for(options, row.jobs), options.trace
            )
            rates.setdefault(name, []).append(rate)
            ratios.setdefault(name, []).append(rate / bare[row.against, row.jobs])
            report(name=name, out_tok_s=round(rate), ratio=round(ratios[name][-1], 3), **facts)
    summarise(rates, ratios)


def summarise(rates: Mapping[str, Sequence[float]], ratios: Mapping[str, Sequence[float]]) -> None:
    """The medians, and what the barrier costs where it was measured."""
    for name, found in ratios.items():
        runs = [round(ratio, 3) for ratio in found]
        report(name=f"{name} / bare", median=round(statistics.median(found), 3), runs=runs)
    for name in sorted({"barrier", "barrier80"} & rates.keys()):
        if "eight" in rates:
            times = statistics.median(rates["eight"]) / statistics.median(rates[name])
            report(name=f"eight / {name}", ratio=round(times, 2))


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


async def run_drain(
    bench: Bench, row: Row, work: Sequence[Work], trace: Path | None = None
) -> tuple[float, dict[str, Any]]:
    """Output tokens per second of the drain on a row, and what it cost."""
    run = await drained(bench, row, work, trace=trace)
    states = await bench.database.fetch_value(
        "SELECT json_object_agg(state, n)::text FROM"
        " (SELECT state, count(*) n FROM jobs GROUP BY state) s"
    )
    await clear(bench)
    loading = {"load_s": round(run.core.slots.load_seconds, 2), "states": json.loads(states)}
    return run.rate, run.facts | loading


def on_gpu(options: argparse.Namespace) -> tuple[list[str], Path, list[Path]]:
    """Flags, model and adapters of the 8B shape."""
    slots = 16 if "zipf" in options.rows else 8
    folder = Path(options.folder)
    model = make_model(folder / "model")
    adapters = make_adapters(folder / "adapters", 32)
    flags = [*ENGINE_FLAGS, "--max-loras", str(slots), "--max-cpu-loras", "64", *options.flags]
    return flags, model, adapters


def on_cpu() -> tuple[list[str], Path, list[Path]]:
    """Flags, model and adapters of the demo."""
    import cli.demo
    from cli.demo.base import ensure_base

    model = ensure_base(Settings().cache_folder(), lambda text: print(text, file=sys.stderr))
    adapters = Path(cli.demo.__file__).parent / "adapters"
    flags = ["--max-model-len", "1024", "--max-num-seqs", "32", "--max-lora-rank", "8"]
    flags += ["--no-enable-prefix-caching"]
    return flags, model, [adapters / name for name in ("sql", "pirate", "json")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", default="/tmp/lorry-bench")
    parser.add_argument("--trace", type=Path, help="write what the runs did over time to it")
    parser.add_argument("--flags", default="", help="more flags for the engine, in one argument")
    options = parser.parse_args()
    options.flags = options.flags.split()
    options.rows = options.rows or (["demo"] if options.cpu else list(DEFAULT_ROWS))
    if unknown := set(options.rows) - ROWS.keys() - BARE_AGAIN.keys():
        parser.error(f"unknown row {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
