r"""Folding against not folding: the same jobs, the same engine, the same run.

    python -m benchmarks.fold [ROW[:JOBS]…]                     (8B-shaped random weights, a GPU)
    python -m benchmarks.fold --simulated [ROW[:JOBS]…]         (the simulated engine)
    python -m benchmarks.fold --cpu --flags \
        "--worker-extension-cls tests.support.unpacked_cpu.UnpackedFold" one:60     (the demo)

Rows, run in the order given on one engine; JOBS is how many of each adapter:

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
import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import uvloop

from benchmarks.bare import bare_run, report
from benchmarks.engine_ratio import Bench, clear, on_cpu, queue, requests_for
from benchmarks.engine_rows import Row, zipf
from benchmarks.servers import running_servers
from benchmarks.trace import trace
from benchmarks.workload import ENGINE_FLAGS, Work, make_adapters, make_model, requests
from core.generation import GenerationRequest, Outcome
from core.settings import Settings
from db import registry, workers
from db.database import Database
from db.doorbell import Doorbell
from db.migrate import upgrade
from db.store import Store
from db.workers import WorkerFacts
from workers.adapter_files import AdapterFiles
from workers.drain.core import DrainCore
from workers.engine.protocol import Engine, EngineRequest, FoldRefused, LocalAdapter
from workers.engine.simulated import SimulatedEngine
from workers.metrics import DrainMetrics

#: Measured on an H100: a step takes 8 ms and 0.155 ms a sequence with adapters, and 7 and 0.11
#: without; a load 80 ms, a fold or a restore 30 to 150 ms.
MILLISECONDS: Final = {"step-ms": 8, "step-ms-per-seq": 0.155, "load-ms": 80, "fold-ms": 80}
SIMULATED: Final = (
    "--sim-fold-factor", "0.74", "--sim-cache-tokens", "340000", "--max-model-len", "2048",
)  # fmt: skip
#: Slower than any engine measured: what is not known yet must not overrun the budget.
SLOWEST: Final = 3500.0


@dataclass(frozen=True, slots=True)
class FoldRow:
    """A workload.

    Args:
        row: its jobs, and which adapter each takes.
        against: the row that it is compared with.
        kind: "bare", "grouped" (bare, adapters in order, bounded in flight), "unfolded" or
            "folded" (our drain).
    """

    row: Row
    against: str = ""
    kind: str = "folded"

    @property
    def name(self) -> str:
        return self.row.name


def _cycle(adapters: int) -> Callable[[int], int]:
    return lambda number: number % adapters


def _rows(jobs: dict[str, int]) -> dict[str, FoldRow]:
    def row(name: str, adapters: int, each: int, adapter_of: Callable[[int], int]) -> Row:
        return Row(name, adapters * jobs.get(name, each), adapter_of, "")

    one, eight, many = _cycle(1), _cycle(8), _cycle(32)
    grouped = jobs.get("bare-grouped", 80)
    rows = [
        FoldRow(row("bare-one", 1, 2000, one), kind="bare"),
        FoldRow(row("bare-eight", 8, 250, eight), kind="bare"),
        FoldRow(row("bare-grouped", 32, grouped, lambda i: i // grouped), kind="grouped"),
        FoldRow(row("one", 1, 2000, one), "bare-one"),
        FoldRow(row("eight", 8, 1000, eight), "bare-eight"),
        FoldRow(row("thirtytwo", 32, 250, many), "bare-grouped"),
        FoldRow(row("zipf-unfolded", 1, jobs.get("zipf", 4096), zipf(256)), kind="unfolded"),
        FoldRow(row("zipf", 1, 4096, zipf(256)), "zipf-unfolded"),
        FoldRow(row("small-unfolded", 8, jobs.get("small", 20), eight), kind="unfolded"),
        FoldRow(row("small", 8, 20, eight), "small-unfolded"),
        FoldRow(row("eight-unfolded", 8, jobs.get("eight", 1000), eight), kind="unfolded"),
    ]
    return {one.name: one for one in rows}


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
    rows = _rows({name: jobs for name, jobs in options.rows if jobs})
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
            if one in rates:
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
    return await drain(bench, row, work, options.speed, options.trace)


async def _digest(bench: Bench) -> Any:
    engine: Any = bench.engine
    return await engine.fold_digest() if hasattr(engine, "fold_digest") else None


_numbers = itertools.count(1)


async def bare(bench: Bench, row: FoldRow, work: Sequence[Work]) -> float:
    """Output tokens per second of the engine by itself: no queue, no fold."""
    in_flight = 512 if row.kind == "grouped" else len(work)
    if not isinstance(bench.engine, SimulatedEngine):
        return await _bare_vllm(bench, row, work, in_flight)
    waiting = asyncio.Semaphore(in_flight)
    done: asyncio.Event = asyncio.Event()
    left = len(work)

    def ended(_request: EngineRequest, outcome: Outcome) -> None:
        nonlocal left
        left -= 1
        waiting.release()
        if not left:
            done.set()

    adapters = {
        which: _bare_adapter(bench, which) for which in {*map(row.row.adapter_of, range(len(work)))}
    }
    for adapter in list(adapters.values())[:8]:
        await bench.engine.load_adapter(adapter)
    started = time.perf_counter()
    loaded = dict.fromkeys(list(adapters)[:8])
    for number, request in enumerate(work):
        await waiting.acquire()
        which = row.row.adapter_of(number)
        if which not in loaded:
            await bench.engine.load_adapter(adapters[which])
            loaded[which] = None
        bench.engine.submit([_engine_request(request, adapters[which])], ended)
    await done.wait()
    seconds = time.perf_counter() - started
    for adapter in adapters.values():
        await bench.engine.remove_adapter(adapter.lora_int_id)
    return sum(request.output_tokens for request in work) / seconds


async def _bare_vllm(bench: Bench, row: FoldRow, work: Sequence[Work], in_flight: int) -> float:
    from vllm.lora.request import LoRARequest

    def adapter(number: int) -> Any:
        one = _bare_adapter(bench, row.row.adapter_of(number))
        return LoRARequest(one.lora_name, one.lora_int_id, one.path)

    return await bare_run(bench.engine, work, adapter, in_flight)


def _bare_adapter(bench: Bench, which: int) -> LocalAdapter:
    # ids far from those of the registry
    return LocalAdapter(
        1_000_000 + which, f"bare-{which}", str(bench.folder(which)), f"bare-{which}"
    )


def _engine_request(
    request: Work, adapter: LocalAdapter | None, greedy: bool = False
) -> EngineRequest:
    body = {
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0 if greedy else 0.8,
        "ignore_eos": True,
    }
    return EngineRequest(
        f"bare-{next(_numbers)}", GenerationRequest("completion", body), adapter, ""
    )


async def drain(
    bench: Bench, row: FoldRow, work: Sequence[Work], speed: float, traced: Path | None = None
) -> tuple[float, dict[str, Any]]:
    """Output tokens per second of our drain, from its start to the last commit."""
    await queue(bench, row.row, work)
    settings = Settings(grace_seconds=600, quantum_seconds=10 / speed)
    facts = WorkerFacts(bench.base_model_id, "bench", 1, "vllm", "", {})
    worker_id = await workers.register(bench.database, facts, settings.lease_seconds)
    doorbell = Doorbell("memory://")
    metrics = DrainMetrics()
    core = DrainCore(
        database=bench.database,
        engine=bench.engine,
        files=AdapterFiles(bench.database, bench.store, bench.cache),
        doorbell=doorbell,
        settings=settings,
        worker_id=worker_id,
        base_model_id=bench.base_model_id,
        metrics=metrics,
        fold=row.kind == "folded",
    )
    started = time.perf_counter()
    task = asyncio.create_task(core.run())
    tracing = asyncio.create_task(trace(core, bench.engine, row.name, traced)) if traced else None
    while core.recorder.recorded < len(work):
        await asyncio.sleep(0.01)
        if task.done():
            task.result()
    seconds = time.perf_counter() - started
    if tracing:
        tracing.cancel()
    core.stop()
    await task
    doorbell.close()
    await clear(bench)
    for version in core.slots.resident:  # the next run loads its own
        await bench.engine.remove_adapter(version)
    spent, gauge = metrics.seconds, core.feeder.folding.gauge
    return sum(request.output_tokens for request in work) / seconds, {
        "s": round(seconds, 1),
        "loads": core.slots.loads,
        "folds": metrics.folds,
        "folded_s": round(metrics.folded_seconds, 1),
        "paused_s": round(metrics.fold_pause_seconds, 2),
        "gain": round(gauge.gain, 3),
        "starved": round(spent.starved / seconds, 3),
        "slot_bound": round(spent.slot_bound / seconds, 3),
        "load_stalled": round(spent.load_stalled / seconds, 3),
    }


async def times(bench: Bench) -> None:
    """Restore and fold with each kind of copy, idle and under load."""
    engine: Any = bench.engine
    pair = [_bare_adapter(bench, which) for which in (0, 1)]
    for adapter in pair:
        await engine.load_adapter(adapter)
    for kind in ("host", "gpu", "auto"):
        if hasattr(engine, "_calls"):
            try:
                await engine._calls.prepare_fold(kind)
            except FoldRefused as error:
                report(name=f"times {kind}", refused=str(error))
                continue
        for load in (0, 256):
            await _times(engine, pair, kind, load)
    for adapter in pair:
        await engine.remove_adapter(adapter.lora_int_id)


async def _times(engine: Engine, pair: Sequence[LocalAdapter], kind: str, load: int) -> None:
    rng = random.Random(3)
    work = [Work([rng.randrange(10, 9000) for _ in range(128)], 1500) for _ in range(load)]
    ended: list[Outcome] = []
    sent = [_engine_request(request, pair[i % 2]) for i, request in enumerate(work)]
    engine.submit(sent, lambda _request, outcome: ended.append(outcome))
    await asyncio.sleep(2 if load else 0)
    switches = [pair[0].lora_int_id, pair[1].lora_int_id, pair[0].lora_int_id, None]
    found = [await engine.fold(version) for version in switches]
    await engine.abort([request.request_id for request in sent])
    while len(ended) < load:
        await asyncio.sleep(0.01)
    report(
        name=f"times {kind}",
        running=load,
        first_fold_ms=[round(1000 * x, 1) for x in (found[0].fold, found[0].pause)],
        restore_ms=[round(1000 * times.restore, 1) for times in found[1:]],
        fold_ms=[round(1000 * times.fold, 1) for times in found[1:3]],
        pause_ms=[round(1000 * times.pause, 1) for times in found[1:]],
    )


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
    known = {"times", *_rows({})}
    if unknown := {name for name, _ in options.rows} - known:
        parser.error(f"unknown row {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
