r"""Folding against not folding: the same jobs, the same engine, the same run.

    python -m benchmarks.fold [ROW[:JOBS]…]                     (8B-shaped random weights, a GPU)
    python -m benchmarks.fold --simulated [ROW[:JOBS]…]         (the simulated engine)
    python -m benchmarks.fold --cpu --flags \
        "--worker-extension-cls tests.support.unpacked_cpu.UnpackedFold" one:60     (the demo)

Rows, run in the order given on one engine, again if named again; JOBS is how many of each adapter:

    times         what restoring and folding take, with each kind of copy, idle and under load
    bare-one      the bare engine with LoRA, one adapter        bare-eight  eight, interleaved
    bare-grouped  32 adapters one after another, 512 in flight
    one           2,000 jobs of one adapter, to bare-one        eight       8 × 1,000, to bare-eight
    thirtytwo     32 × 250 on 8 slots, to bare-grouped
    zipf          256 adapters by a Zipf law, 4,096 jobs, to our own drain unfolded
    small         8 × 20, to our own drain unfolded

What a row is compared with runs before it for the first time, shorter where its rate is all that
is needed. No row begins that would not end within `--budget` seconds by what was seen so far.
Each run is a JSON line at once; `digest` says whether the base's weights are what they were.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import uvloop

from benchmarks.bare import report
from benchmarks.drained import Bench, clear, drained
from benchmarks.engine_ratio import on_cpu, requests_for
from benchmarks.fold_bare import bare
from benchmarks.fold_rows import FoldRow, rows_of
from benchmarks.fold_times import times
from benchmarks.servers import running_servers
from benchmarks.workload import ENGINE_FLAGS, Work, make_adapters, make_model, requests
from db import registry
from db.database import Database
from db.migrate import upgrade
from db.store import Store
from workers.engine.protocol import Engine
from workers.engine.simulated import SimulatedEngine

#: Measured on an H100: a step takes 8 ms and 0.155 ms a sequence with adapters, and 7 and 0.11
#: without; a load 80 ms, a fold or a restore 30 to 150 ms.
MILLISECONDS: Final = {"step-ms": 8, "step-ms-per-seq": 0.155, "load-ms": 80, "fold-ms": 80}
SIMULATED: Final = (
    "--sim-fold-factor", "0.74", "--sim-cache-tokens", "340000", "--max-model-len", "2048",
)  # fmt: skip
#: Slower than any engine measured: what is not known yet must not overrun the budget.
SLOWEST: Final = 3500.0


def main() -> None:
    options = parse()
    if options.verbose:
        logging.basicConfig(level="INFO", format="%(relativeCreated)d %(message)s")
    with running_servers() as servers:
        upgrade(servers.postgres_url)
        uvloop.run(run(options, servers.postgres_url))


async def run(options: argparse.Namespace, database_url: str) -> None:
    """Start the engine, measure, stop it."""
    began = time.perf_counter()
    with TemporaryDirectory(prefix="lorry-bench-") as folder:
        engine, folders = build(options, Path(folder))
        await engine.start()
        info = engine.info
        report(
            name="engine",
            start_s=round(time.perf_counter() - began, 1),
            version=info.version,
            fold_refusal=info.fold_refusal,
            restore_s=round(info.fold_seconds, 4),
            cache_tokens=info.limits.cache_tokens,
        )
        async with Database.connect(database_url) as database:
            base = await registry.declare_base(database, info.base_model, info.limits.max_model_len)
            store = Store.open(str(Path(folder) / "store"))
            bench = Bench(engine, database, store, base, folders, Path(folder) / "cache")  # type: ignore[arg-type]
            await measure(bench, options, began)
        await engine.close()


def build(options: argparse.Namespace, folder: Path) -> tuple[Engine, list[Path]]:
    """The engine, not started, and the folders of the adapters."""
    if options.simulated:
        folders = [folder / "adapters" / f"a{number}" for number in range(32)]
        for number, adapter in enumerate(folders):
            adapter.mkdir(parents=True)
            (adapter / "adapter_config.json").write_text(f'{{"r": {number + 1}}}')
            (adapter / "adapter_model.safetensors").write_bytes(b"%d" % number)
        flags = [f"--sim-{name}={ms / options.speed}" for name, ms in MILLISECONDS.items()]
        flags += [*SIMULATED, *options.flags]
        return SimulatedEngine.from_flags("sim", flags, fold=True), folders
    from workers.engine.vllm_engine import VllmEngine

    if options.cpu:
        flags, demo, folders = on_cpu()
        return VllmEngine.from_flags(str(demo), [*flags, *options.flags], fold=True), folders
    place = Path(options.folder)
    wanted = 32 if {"thirtytwo", "zipf", "bare-grouped"} & {name for name, _ in options.rows} else 8
    folders = make_adapters(place / "adapters", wanted)
    flags = [*ENGINE_FLAGS, "--max-loras", "8", "--max-cpu-loras", "64", *options.flags]
    model = str(make_model(place / "model"))
    return VllmEngine.from_flags(model, flags, fold=True, fold_copy=options.copy), folders


async def measure(bench: Bench, options: argparse.Namespace, began: float) -> None:
    """The rows in order, each behind what it is compared with."""
    rows = rows_of({name: jobs for name, jobs in options.rows if jobs})
    rates: dict[str, float] = {}
    digest = await _digest(bench)
    if not (options.simulated or options.cpu):
        warm = replace(rows["bare-eight"].row, jobs=160)
        await bare(bench, FoldRow(warm, kind="bare"), requests(160))
    for name, _ in options.rows:
        if name == "times":
            await times(bench)
            continue
        for one in filter(None, (rows[name].against, name)):
            if one in rates and one != name:
                continue
            row = rows[one]
            work = requests_for(options, row.row.jobs)
            tokens = sum(request.output_tokens for request in work)
            left = options.budget - (time.perf_counter() - began)
            if not options.cpu and tokens / max([SLOWEST, *rates.values()]) > left:
                report(name=one, skipped=f"{left:.0f} s left for {tokens} tokens")
                continue
            rate, facts = await _run(bench, row, work, options)
            rates[one] = rate
            against = rates.get(row.against)
            ratio = {"ratio": round(rate / against, 3)} if against else {}
            report(name=one, jobs=row.row.jobs, out_tok_s=round(rate), **ratio, **facts)
    if digest:
        report(name="digest", same=await _digest(bench) == digest)


async def _run(
    bench: Bench, row: FoldRow, work: Sequence[Work], options: argparse.Namespace
) -> tuple[float, dict[str, Any]]:
    if row.kind in ("bare", "grouped"):
        return await bare(bench, row, work), {}
    return await drain(bench, row, work, options)


async def _digest(bench: Bench) -> Any:
    engine: Any = bench.engine
    return await engine.fold_digest() if hasattr(engine, "fold_digest") else None


async def drain(
    bench: Bench, row: FoldRow, work: Sequence[Work], options: argparse.Namespace
) -> tuple[float, dict[str, Any]]:
    """Output tokens per second of our drain, and what it took."""
    fold = row.kind == "folded"
    run = await drained(bench, row.row, work, speed=options.speed, fold=fold, trace=options.trace)
    await clear(bench)
    if run.core.feeder.folding.folded is not None:  # the next bare run would wait for ever
        await bench.engine.fold(None)
    for version in run.core.slots.resident:  # the next run loads its own
        await bench.engine.remove_adapter(version)
    return run.rate, run.facts | {
        "folds": run.metrics.folds,
        "folded_s": round(run.metrics.folded_seconds, 1),
        "paused_s": round(run.metrics.fold_pause_seconds, 2),
        "gain": round(run.core.feeder.folding.gauge.gain, 3),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW[:JOBS]", default=["times", "one", "eight"])
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of jobs")
    parser.add_argument("--speed", type=float, default=1.0, help="of the simulated engine's time")
    parser.add_argument("--verbose", action="store_true", help="log each fold")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all of it")
    parser.add_argument("--copy", default="auto", choices=("auto", "gpu", "host"))
    parser.add_argument("--folder", default="/tmp/lorry-bench")
    parser.add_argument("--trace", type=Path, help="write what the drains did over time to it")
    parser.add_argument("--flags", default="", help="more flags for the engine, in one argument")
    options = parser.parse_args()
    options.flags = options.flags.split()
    named = [row.partition(":") for row in options.rows]
    options.rows = [(name, int(jobs) if jobs else 0) for name, _, jobs in named]
    known = {"times", *rows_of({})}
    if unknown := {name for name, _ in options.rows} - known:
        parser.error(f"unknown row {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
